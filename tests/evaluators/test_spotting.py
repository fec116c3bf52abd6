"""Words in continuous sound: streams, peaks, what counts, and a run that finds words in a long file."""

import tracemalloc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from bigbase_jax import parallel
from bigbase_jax.audio.files import decode, pcm16
from bigbase_jax.core import UserError
from bigbase_jax.data.sources.audio.audio import AudioCodec
from bigbase_jax.evaluators.spotting import Spotted, Spotting, Stream, peaks, rates
from bigbase_jax.inference.inputs import Input
from bigbase_jax.inference.predictor import Predictor, Reading

NAMES = ("high", "low", "silence")


class Source:
    labels = np.array([0, 1, 2, 0, 2])

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return {"audio": np.full(800 + i, i + 1, np.int16)}


def test_a_stream_has_every_recording_where_it_says_and_background_between():
    how = Spotting(class_names=NAMES, gap=(0.5, 1.0))
    stream, again = how.stream(Source(), 800), how.stream(Source(), 800)
    np.testing.assert_array_equal(stream.audio, again.audio, strict=True)
    assert sorted(stream.word) == [0, 0, 1] and (np.diff(stream.start) > 1.4).all()
    for word, start, end in zip(stream.word, stream.start, stream.end, strict=True):
        inside = stream.audio[round(start * 800) : round(end * 800)]
        assert len(set(inside)) == 1 and Source.labels[inside[0] - 1] == word
        assert stream.audio[round(start * 800) - 1] in (3, 5)


def test_peaks_are_the_largest_around_and_counted_once():
    p_WK = np.zeros((40, 3))
    p_WK[:, 2] = 0.1  # silence is no word
    p_WK[8:11, 0] = 0.9
    p_WK[20, 1] = 0.6
    p_WK[22, 0] = 0.4  # too near a larger one
    at, word, score = peaks(p_WK, np.array([True, True, False]), 1, 5)
    big = score > 0.1
    assert at[big].tolist() == [8, 20] and word[big].tolist() == [0, 1] and score[big].tolist() == [0.9, 0.6]
    at, _, score = peaks(p_WK, np.array([True, True, False]), 3, 5)
    assert at[score > 0.5].tolist() == [9] and score.max() == pytest.approx(0.9)


def test_what_finds_a_word_and_what_is_a_false_alarm():
    how = Spotting(class_names=NAMES, smooth=1)
    p_WK = np.zeros((60, 3))
    p_WK[10, 0], p_WK[30, 0], p_WK[50, 1] = 0.9, 0.8, 0.7  # middles at 1.5, 3.5 and 5.5 s
    stream = Stream(np.zeros(0), np.array([0, 1]), np.array([1.0, 5.0]), np.array([2.0, 6.0]))
    said, other = how.scored(p_WK, stream)
    assert said.tolist() == [0.9, 0.7] and np.sort(other)[-1] == 0.8 and (np.sort(other)[:-1] == 0).all()
    wrong = how.scored(p_WK[:, [1, 0, 2]], stream)
    assert wrong[0].tolist() == [0, 0] and np.sort(wrong[1])[-3:].tolist() == [0.7, 0.8, 0.9]
    thresholds, alarms, misses = rates(said, other, 0.5)
    for t, a, m in zip(thresholds, alarms, misses, strict=True):
        assert a == np.sum(other >= t) / 0.5 and m == np.mean(said < t)


def test_windows_are_those_of_the_whole_recording(tmp_path):
    x_T = np.random.default_rng(0).uniform(-0.5, 0.5, 8000 * 3 + 123).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", x_T, 8000)
    windows = AudioCodec(8000, 1.0, 0.1).decode(str(tmp_path / "x.wav"))
    whole = np.pad(pcm16(decode(str(tmp_path / "x.wav"), 8000)), (0, 8000))
    assert len(windows) == 22 and (len(windows) - 1) * 800 + 8000 >= len(x_T)
    for k, window in enumerate(windows[:]):
        np.testing.assert_array_equal(window["audio"], whole[k * 800 :][:8000], strict=True)
        np.testing.assert_array_equal(windows[k]["audio"], window["audio"], strict=True)
    assert windows[5:5] == [] and len(windows[20:99]) == 2
    assert len(AudioCodec(8000, 4.0, 0.1).decode(str(tmp_path / "x.wav"))) == 1


def test_without_names_or_a_threshold_there_is_a_sentence():
    with pytest.raises(UserError, match="names of the classes"):
        Spotting().words()
    with pytest.raises(UserError, match="kept no threshold"):
        Spotting(class_names=NAMES).answering(None, {"threshold": "high"})
    answer = Spotted(None, Spotting(class_names=NAMES, smooth=1), 0.5).postprocess({"probabilities": np.eye(3)[1]}, {})
    assert answer == {"events": [{"word": "low", "start": 0.0, "end": 1.0, "score": 1.0}]}


class Toy:
    """Loud and fast is "high", loud and slow "low"."""

    inputs = ("audio",)

    def predict(self, variables, inputs):
        x_BT = jnp.asarray(inputs["audio"], jnp.float32) / 32768
        loud_B = jnp.minimum(jnp.mean(x_BT**2, 1) / 0.125, 1.0)
        loud_B = jnp.where(loud_B > 0.1, loud_B, 0.0)
        fast_B = jnp.mean(jnp.diff(x_BT) ** 2, 1) > 0.7 * jnp.mean(x_BT**2, 1)
        return {"probabilities": jnp.stack([loud_B * fast_B, loud_B * ~fast_B, 1 - loud_B], 1)}


def tone(hz, seconds=1.0):
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(4000 * seconds)) / 4000)


def test_words_are_found_in_streams_and_in_a_file_of_minutes_within_little_memory(tmp_path):
    rng = np.random.default_rng(0)
    sounds = [pcm16(tone(hz) + 0.01 * rng.standard_normal(4000)) for hz in (1200, 1300, 200, 300)]
    labels = np.array([0, 0, 1, 1, 2, 0])  # and the last is said to be "high", but nothing is heard
    sounds += [pcm16(0.01 * rng.standard_normal(4000)) for _ in range(2)]

    class Sounds(list):
        pass

    source = Sounds({"audio": x_T} for x_T in sounds)
    source.labels = labels
    data = types.SimpleNamespace(
        splits={"val": 6, "test": 6}, eval_batch_size=8, dataset_info={"rate": 4000}, source=lambda split: source
    )
    how = Spotting(class_names=NAMES)
    evaluated = how.run(Toy(), {}, data, parallel.make_mesh(1))
    found = evaluated.metrics
    assert found["words"] == 5 and found["miss_rate"] == pytest.approx(0.2) and found["false_alarms"] == 0
    (plot,) = how.figures(evaluated)
    assert plot.series["words"][1][0] == 100 and "20.0 % missed" in plot.note

    long = 0.01 * rng.standard_normal(4000 * 200)
    for second, hz in ((20, 1250), (150, 250)):
        long[4000 * second : 4000 * (second + 1)] += tone(hz)
    soundfile.write(tmp_path / "long.wav", long, 4000)
    spec = {"audio": jax.ShapeDtypeStruct((4000,), jnp.int16)}
    predictor = Predictor(
        how.answering(Toy(), found), {}, data.dataset_info, spec, lambda: Reading(AudioCodec(4000, 1.0, 0.1))
    )
    tracemalloc.start()
    ((_, answer),) = predictor.answers([Input(str(tmp_path / "long.wav"), "long.wav")])
    assert tracemalloc.get_traced_memory()[1] < 8e6  # all windows at once are 16 MB
    tracemalloc.stop()
    assert predictor.answer((tmp_path / "long.wav").read_bytes()) == [answer]
    assert [(event["word"], round(event["start"])) for event in answer["events"]] == [("high", 20), ("low", 150)]
