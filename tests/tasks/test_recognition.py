"""Recognition: padding changes nothing, answers, impossible transcripts, and a run that learns."""

import functools
import types

import jax
import numpy as np
import pytest

from bigbase_jax.compare import scores
from bigbase_jax.compare.runs import Run
from bigbase_jax.core import UserError
from bigbase_jax.models.speech_encoder import CTC, SpeechEncoder
from bigbase_jax.tasks.recognition import Recognition
from bigbase_jax.text import ngram
from bigbase_jax.text.tokenizer import Symbols

RATE = 8000
TOKENIZER = Symbols(" ab", False).state()


def task(**words):
    model = CTC(SpeechEncoder(width=16, depth=2, taps=5, dropout=0.0), 3)
    return Recognition(model, TOKENIZER, RATE, "words", mels=20, frame_seconds=0.04, **words)


def batch(T=RATE, lengths=(RATE // 2, RATE // 3), labels=((1, 2), (1, 1))):
    rng = np.random.default_rng(0)
    audio = np.zeros((2, T), np.int16)
    for row, length in zip(audio, lengths, strict=True):
        row[:length] = rng.normal(size=length) * 3000
    return {
        "audio": audio,
        "audio_length": np.array(lengths, np.int32),
        "labels": np.pad(np.array(labels, np.int32), ((0, 0), (0, 3))),
        "labels_length": np.full(2, len(labels[0]), np.int32),
        "reference": np.frombuffer(b"ab\0aa\0", np.uint8).reshape(2, 3),
        "mask": np.ones(2, np.float32),
    }


def test_padding_changes_neither_outputs_nor_loss():
    short, long = batch(), batch(T=2 * RATE + 80)
    one = task(beams=4)
    variables = one.init(jax.random.key(0), short)
    (a, sums_a), (b, sums_b) = (jax.jit(one.evaluate)(variables, rows) for rows in (short, long))
    S = a["path"].shape[1]
    np.testing.assert_array_equal(a["path"], b["path"][:, :S])
    assert (np.asarray(b["path"][:, S:]) == -1).all() and (np.asarray(a["path"]) == -1).any()
    real = np.asarray(a["candidates"]) >= 0
    np.testing.assert_allclose(np.asarray(a["log_p"])[real], np.asarray(b["log_p"])[:, :S][real], atol=1e-5)
    np.testing.assert_allclose(sums_a["loss"].total, sums_b["loss"].total, rtol=1e-5)


def test_digital_silence_is_as_quiet_as_the_floor_and_speech_is_as_it_was():
    rows = batch(lengths=(RATE, RATE // 3))
    rows["audio"][0, : RATE // 2] = 0
    plain, floored = (np.asarray(task(whole=False, floor=floor).bands(rows)[0]) for floor in (None, 1e4))
    quiet, loud = slice(0, RATE // 2 // 80 - 3), slice(RATE // 2 // 80 + 1, None)
    np.testing.assert_allclose(floored[0, quiet], (np.log(1e4) - 12) / 4, atol=1e-6)
    assert plain[0, quiet].max() < floored[0, quiet].min() - 5
    np.testing.assert_array_equal(floored[0, loud], plain[0, loud])


def test_an_impossible_transcript_and_silence_have_no_weight_and_no_text():
    rows = batch(lengths=(RATE // 2, 1), labels=((1, 2), (1, 1)))
    one = task()
    variables = one.init(jax.random.key(0), rows)
    loss, _ = one.loss(variables, rows, jax.random.key(1))
    total, weight = loss.terms["loss"]
    assert weight == 2 and np.isfinite(total)
    outputs = jax.device_get(one.predict(variables, rows))
    answer = one.postprocess({name: x[1] for name, x in outputs.items()}, {})
    assert answer == {"text": "", "words": [], "segments": [], "duration": 0.0}


def test_masks_lie_within_a_recording_and_only_in_training():
    rows = batch()
    one, masking = task(), task(time_masks=(2, 0.3), frequency_masks=(1, 10))
    variables = one.init(jax.random.key(0), rows)
    plain, masked = (t.loss(variables, rows, jax.random.key(1))[0].terms["loss"] for t in (one, masking))
    assert plain.total != masked.total and plain.weight == masked.weight
    assert one.evaluate(variables, rows)[1]["loss"].total == masking.evaluate(variables, rows)[1]["loss"].total


def test_answers_have_words_segments_and_their_times():
    one = task()
    path = np.full(100, 3)
    path[[5, 6, 8]], path[10], path[[12, 60]], path[90:] = 1, 0, 2, -1
    answer = one.postprocess({"path": path, "seconds": np.float32(3.6)}, {})
    assert answer["text"] == "aa bb" and answer["duration"] == 3.6
    assert answer["words"] == [{"word": "aa", "start": 0.2, "end": 0.36}, {"word": "bb", "start": 0.48, "end": 2.44}]
    assert answer["segments"] == [{"start": 0.2, "end": 2.44, "text": "aa bb"}]
    path[30] = 0
    segments = one.postprocess({"path": path, "seconds": np.float32(3.6)}, {})["segments"]
    assert [part["text"] for part in segments] == ["aa b", "b"]


def test_the_search_goes_by_the_language_model_of_the_data():
    arpa = ngram.fit([["ab"], ["ab", "ab"]], 2).arpa()
    searching = task(beams=8, language_model=arpa, language_weight=2.0)
    log_p = np.log(np.array([[0.02, 0.9, 0.04, 0.04], [0.02, 0.5, 0.44, 0.04]]))
    order = np.argsort(-log_p, 1)
    output = {
        "path": order[:, 0],
        "candidates": order,
        "log_p": np.take_along_axis(log_p, order, 1),
        "seconds": np.float32(0.08),
    }
    assert task().postprocess(output, {})["text"] == "a"
    answer = searching.postprocess(output, {})
    assert answer["words"] == [{"word": "ab", "start": 0.0, "end": 0.08}]


@pytest.mark.parametrize("missing", ["tokenizer", "rate", "frame_seconds"])
def test_facts_of_the_data_are_asked_for(missing):
    words = {"tokenizer": TOKENIZER, "rate": RATE, "frame_seconds": 0.04, missing: None}
    with pytest.raises(UserError, match=f"does not know the {missing}"):
        Recognition(CTC(SpeechEncoder(), 3), **words)


def test_two_recognisers_are_compared_utterance_by_utterance(tmp_path):
    reference = np.zeros((40, 5), np.uint8)
    reference[:, :5] = np.frombuffer(b"ab ba", np.uint8)
    path = np.tile(np.array([1, 2, 0, 2, 1]), (40, 1))
    worse = path.copy()
    worse[:30, 4] = 3
    scored = []
    for name, said in (("good", path), ("bad", worse)):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "predictions-test.npz", path=said, reference=reference, index=np.arange(40))
        run = types.SimpleNamespace(path=tmp_path / name, name=name, examples="same", task=task())
        run.evaluated = functools.partial(Run.evaluated, types.SimpleNamespace(path=tmp_path / name, evals={}))
        scored.append(scores.read(run, "test"))
    good, bad = scored
    assert good.same_as == bad.same_as and set(good.scores) == {"wer", "cer"}
    assert (good.mean("wer"), bad.mean("wer"), bad.mean("cer")) == (0, 30 / 80, 30 / 200)
