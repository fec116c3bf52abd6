"""Synthesis: padding does not leak, what is said follows durations, rate and pitch, and texts become files."""

import io
import json
import pathlib
import runpy
import wave

import jax
import numpy as np
import pytest

from bigbase_jax import verbs
from bigbase_jax.audio.pitch import yin
from bigbase_jax.build import build
from bigbase_jax.core import UserError
from bigbase_jax.data.sources.audio import voices
from bigbase_jax.data.sources.synthetic.sounds import SpokenTexts
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.models.fastspeech import FastSpeech
from bigbase_jax.tasks.synthesis import Synthesis
from bigbase_jax.text.phonemes import front_end

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "voice.py"
INFO = {"rate": 8000, "symbols": ("", "^", "a", "b"), "speakers": ("x", "y"), "pitch_centre": 7.0, "pitch_spread": 0.5}


def config(arg):
    return runpy.run_path(str(CONFIG))["get_config"](arg)


@pytest.fixture(scope="module")
def task():
    return Synthesis(FastSpeech(4, 2, width=16, hidden=16, encoder_layers=1, decoder_layers=2, reduction=2), **INFO)


def batch(phonemes, frames, L=8, F=24):
    random = np.random.default_rng(0)
    B = len(phonemes)
    given = {
        "phonemes": np.array([[1] * n + [0] * (L - n) for n in phonemes], np.int32),
        "speaker": np.arange(B, dtype=np.int32) % 2,
        "rate": np.ones(B, np.float32),
        "pitch": np.zeros(B, np.float32),
        "mel": random.normal(-5, 2, (B, F, 80)).astype(np.float32),
        "f0": random.uniform(0, 200, (B, F)).astype(np.float32),
        "frames": np.array(frames, np.int32),
        "mask": np.ones(B, np.float32),
    }
    given["phonemes"][:, 1] *= 2
    return given


@pytest.fixture(scope="module")
def variables(task):
    return jax.jit(lambda key: task.init(key, batch([5], [20])))(jax.random.key(0))


def test_padding_does_not_leak(task, variables):
    evaluate, predict = jax.jit(task.evaluate), jax.jit(task.predict)
    given = batch([5, 8], [13, 24])
    short = {name: x[:1] for name, x in given.items()} | {"phonemes": given["phonemes"][:1, :6]}
    short |= {name: given[name][:1, :14] for name in ("mel", "f0")}
    other = {name: x.copy() for name, x in given.items()}
    other["mel"][0, 13:], other["f0"][0, 13:] = 7, 99
    assert not np.array_equal(other["mel"], given["mel"])
    for variant in (other, short):
        for b in range(len(variant["mask"])):
            mask = np.arange(2) == b
            one = evaluate(variables, {**given, "mask": mask.astype(np.float32)})[1]
            same = evaluate(variables, {**variant, "mask": mask[: len(variant["mask"])].astype(np.float32)})[1]
            for name in one:
                np.testing.assert_allclose(one[name].total, same[name].total, rtol=2e-4, err_msg=name)
                np.testing.assert_allclose(one[name].weight, same[name].weight)
    said = predict(variables, given)
    n = int(said["frames"][0])
    alone = predict(
        variables, {name: given[name][:1, :5] if name == "phonemes" else given[name][:1] for name in task.inputs}
    )
    np.testing.assert_allclose(said["mel"][0, :n], alone["mel"][0, :n], atol=1e-4)


def test_loss_has_a_gradient_everywhere_and_durations_sum_to_the_frames(task, variables):
    given = batch([5, 8], [13, 24])

    def loss(params):
        terms = task.loss({"params": params}, given, jax.random.key(1))[0]
        return sum(terms.scale[name] * term.mean() for name, term in terms.terms.items())

    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(variables["params"]))
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in gradients)
    durations = jax.jit(task.evaluate)(variables, given)[0]["durations"]
    assert durations.sum(1).tolist() == [13, 24] and ((durations > 0) == (given["phonemes"] > 0)).all()


def test_rate_pitch_and_speaker_are_heard(task, variables):
    given = batch([8], [24])
    given = {name: np.repeat(given[name], 4, 0) for name in task.inputs}
    given["rate"] = np.array([1, 0.5, 1, 1], np.float32)
    given["pitch"] = np.array([0, 0, 6, 0], np.float32)
    given["speaker"] = np.array([0, 0, 0, 1], np.int32)
    said = jax.device_get(jax.jit(task.predict)(variables, given))
    assert said["frames"][1] >= said["frames"][0] and said["frames"][2] == said["frames"][0]
    assert all(np.abs(said["mel"][0] - said["mel"][n]).max() > 1e-3 for n in (1, 2, 3))


def test_yin_finds_a_tone_and_no_pitch_in_noise():
    t, random = np.arange(8000) / 16_000, np.random.default_rng(0)
    for hz in (90.0, 123.4, 220.0, 400.0):
        x = 0.1 * np.sin(2 * np.pi * hz * t) + 0.05 * np.sin(4 * np.pi * hz * t + 1)
        np.testing.assert_allclose(yin(x, 16_000, 256, 31)[2:-2], hz, rtol=5e-3)
    assert (yin(0.1 * random.normal(size=8000), 16_000, 256, 31) == 0).mean() > 0.9
    assert (yin(np.zeros(8000), 16_000, 256, 31) == 0).all() and len(yin(np.zeros(3), 16_000, 256, 31)) == 31


def wav(path, x, rate=8000):
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes((32767 * np.asarray(x)).astype("<i2").tobytes())


def test_ljspeech_and_digits_are_read_and_the_impossible_is_left_out(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "lj" / "wavs").mkdir(parents=True)
    texts = ["abc", "b a", "...", "a" * 90, "ab", "ba", "cab", "abba"]
    lines = [f"a{n:02d}|{text}" for n, text in enumerate(texts)]
    (tmp_path / "lj" / "metadata.csv").write_text("\n".join(lines))
    for n in range(len(texts)):
        wav(tmp_path / "lj" / "wavs" / f"a{n:02d}.wav", random.uniform(-0.1, 0.1, 40_000 if n == 4 else 8000))
    made = voices.RecordedVoices(
        root=str(tmp_path / "lj"), rate=8000, language="characters", test="a07", seconds=4.0, val_fraction=0.2
    ).prepare(tmp_path / "cache", 1e9, print)
    for part in (
        "1 without anything to speak",
        "1 longer than 4 s",
        "1 with more phonemes than frames (such as wavs/a03.wav)",
    ):
        assert part in made.description
    assert {name: len(source) for name, source in made.splits.items()} == {"train": 3, "val": 1, "test": 1}
    example = made.splits["test"][0]
    assert made.splits["test"].name(0) == "wavs/a07.wav" and example["phonemes"][:7].tolist() == [1, 2, 3, 3, 2, 1, 0]
    assert example["mel"].shape == (made.dataset_info["frames"], 80) and example["frames"] > 50
    (tmp_path / "digits").mkdir()
    for name in ("0_ann_0", "7_bob_9", "1_ann_5", "2_bob_12"):
        wav(tmp_path / "digits" / f"{name}.wav", random.uniform(-0.1, 0.1, 4000))
    made = voices.RecordedVoices(root=str(tmp_path / "digits"), rate=8000, language="characters").prepare(
        tmp_path / "cache", 0, print
    )
    assert made.dataset_info["speakers"] == ("ann", "bob") and len(made.splits["test"]) == 1
    with pytest.raises(UserError, match="has a name of 'z' or after"):
        voices.RecordedVoices(root=str(tmp_path / "digits"), language="characters", test="z").utterances()


def test_marks_stay_with_their_sounds():
    symbols = list("ˈɔːθɚ, ˌŋ̩a")
    assert voices.units(symbols) == ["ˈɔː", "θ", "ɚ", ",", " ", "ˌŋ̩", "a"]
    assert voices.units(["zh", "ong", "1"], pinyin=True) == ["zh", "ong1"]
    assert voices.ids(["ˈɔː", "ˌa", "x"], ["", "^", "a", "ˈɔː"]).tolist() == [1, 3, 2, 1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voice") / "run"
    made = config("tiny")
    made.train.steps = 2
    verbs.train(made, str(folder))
    return str(folder)


def test_texts_become_files(run, tmp_path):
    texts = ["bad cafe", "?!", "egg. " * 6 + "head " * 40, "dad"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    out = io.StringIO()
    assert verbs.predict(run, str(tmp_path / "texts.txt"), output=str(tmp_path / "out"), out=out) == 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert "nothing in '?!'" in rows[1]["error"] and "file" not in rows[1]
    for row in rows[:1] + rows[2:]:
        with wave.open(str(tmp_path / "out" / row["file"])) as sound:
            assert sound.getframerate() == 8000
            assert sound.getnframes() / 8000 == pytest.approx(row["duration"], abs=0.01)
        assert np.diff([sound["start"] for sound in row["phonemes"]]).min() > 0
    assert rows[2]["duration"] > 4 * rows[0]["duration"]


def test_what_is_asked_for_is_checked(run):
    predictor = Predictor.open(run)
    slow, fast, high = (
        predictor.answer({"text": "bad", **more})[0] for more in ({"rate": 0.5}, {"rate": 2.0}, {"speaker": "high"})
    )
    assert slow["duration"] >= fast["duration"] and (slow["speaker"], high["speaker"]) == ("high", "high")
    for more, error in (
        ({"speaker": "Bob"}, "there is no speaker 'Bob'"),
        ({"rate": 9}, "rate is 9; it is a number from 0.5 to 2"),
        ({"pitch": "up"}, "pitch is 'up'"),
        ({"text": ""}, "the text is empty"),
        ({"text": "∑"}, "nothing in '∑'"),
    ):
        with pytest.raises(UserError, match=error.replace("(", r"\(")):
            predictor.examples({"text": "bad", **more})


def test_all_recipes_words_build():
    made = build(config("tiny").data, _path="config.data")
    assert isinstance(made.dataset, SpokenTexts) and front_end("characters")("bad") == list("bad")
