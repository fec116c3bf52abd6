"""Long recordings: windows that are joined say what one window says, and memory stays as it is."""

import io
import itertools
import tracemalloc

import jax
import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.data.sources.audio.transcribed import TranscribedCodec
from bigbase_jax.inference.predictor import Reading
from bigbase_jax.inference.windowed import Windowed, cuts, joined
from bigbase_jax.models.speech_encoder import CTC, SpeechEncoder
from bigbase_jax.tasks.recognition import Recognition
from bigbase_jax.text.tokenizer import Symbols

RATE = 8000
TOKENIZER = Symbols(" ab", False).state()
NOTES = (400, 900, 2000, 3000)


class Tones(Recognition):
    """Says ``a``, ``b`` or a space where it hears a tone, and nothing in silence: by the loudest band, unlearned."""

    def outputs(self, logits_BSV, frames_B, inputs):
        found = super().outputs(logits_BSV, frames_B, inputs)
        x_BT = jax.numpy.asarray(inputs["audio"], jax.numpy.float32)
        frames = x_BT.shape[1] // 320
        spectrum = jax.numpy.abs(jax.numpy.fft.rfft(x_BT[:, : frames * 320].reshape(len(x_BT), frames, 320)))
        at = [round(hz * 320 / RATE) for hz in NOTES[:3]]
        loud = spectrum[..., jax.numpy.array(at)]
        label = jax.numpy.where(loud.max(-1) > 1e5, loud.argmax(-1), 3)
        path = jax.numpy.pad(label, ((0, 0), (0, found["path"].shape[1] - frames)), constant_values=3)
        return {**found, "path": jax.numpy.where(found["path"] >= 0, path, -1)}


def predictor(seconds, rows=4):
    model = CTC(SpeechEncoder(width=8, depth=1, taps=3), 3)
    task = Tones(model, TOKENIZER, RATE, "words", mels=20, frame_seconds=0.04)
    window = round(seconds * RATE)
    batch = {"audio": np.zeros((1, window), np.int16), "audio_length": np.array([window], np.int32)}
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch.items()}
    variables = jax.jit(task.init)(jax.random.key(0), batch)
    return Windowed(task, variables, {}, spec, lambda: Reading(TranscribedCodec(RATE)), rows=rows)


def said(words, pause=1.5, every=4):
    """f32[T] of tones, and the text of them; a longer pause behind every fourth word."""
    parts = []
    for n, word in enumerate(words):
        for letter in f"{word} ":
            t = np.arange(round(0.12 * RATE)) / RATE
            parts += [0.5 * np.sin(2 * np.pi * NOTES[" ab".index(letter)] * t), np.zeros(round(0.12 * RATE))]
        if n % every == every - 1:
            parts.append(np.zeros(round(pause * RATE)))
    return np.concatenate(parts).astype(np.float32), " ".join(words)


def wav(x_T):
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    soundfile.write(file, x_T, RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def words(count):
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("ab"), rng.integers(1, 4))) for _ in range(count)]


def test_a_long_recording_says_what_one_window_says():
    x_T, text = said(words(24))
    data = wav(x_T)
    (whole,), (parts,) = (predictor(seconds).answer(data) for seconds in (60.0, 4.0))
    assert len(x_T) / RATE > 20
    assert whole["text"] == parts["text"] == text
    assert whole["duration"] == parts["duration"] == round(len(x_T) / RATE, 3)
    assert [w["word"] for w in whole["words"]] == [w["word"] for w in parts["words"]] == text.split()
    for a, b in zip(whole["words"], parts["words"], strict=True):
        assert abs(a["start"] - b["start"]) <= 0.081
        assert abs(a["end"] - b["end"]) <= 0.081
    assert [s["text"] for s in whole["segments"]] == [s["text"] for s in parts["segments"]]
    assert len(whole["segments"]) == 6


def test_windows_cover_a_recording_once():
    rng = np.random.default_rng(0)
    x_T = rng.normal(size=1000).astype(np.float32) / 10
    for size in (1, 99, 100, 101, 160, 161, 1000):
        blocks = iter(np.split(x_T[:size], [7, 8, 300]))
        found = list(cuts(blocks, 100, 60))
        assert found[-1][0] == size
        assert all(len(part) == 100 for _, part in found[:-1])
        path = [{"path": part.astype(np.int64)} for _, part in found]
        ends = [end for end, _ in found]
        together = np.concatenate([part["path"] for _, part in joined(zip(ends, path, strict=True), 60, 10**6)])
        np.testing.assert_array_equal(together, np.rint(x_T[:size] * 32768))


def test_a_join_is_where_both_say_nothing():
    one, two = np.array([0, 1, 1, 9, 2, 2, 9, 2, 2, 9]), np.array([2, 2, 9, 9, 2, 9, 3, 3])
    windows = [(10, {"path": one}), (14, {"path": two})]
    found = [part["path"].tolist() for _, part in joined(iter(windows), 4, 9)]
    assert found == [[0, 1, 1, 9, 2, 2], [9, 9, 2, 9, 3, 3]]
    assert list(itertools.chain(*found))[4:8] == [2, 2, 9, 9]


def test_memory_does_not_grow_with_the_recording(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    one = predictor(8.0)
    x_T, text = said(words(12))
    peaks = []
    for minutes in (2, 24):
        path, times = tmp_path / f"{minutes}.wav", round(minutes * 60 * RATE / len(x_T))
        with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
            for _ in range(times):
                file.write(x_T)
        tracemalloc.start()  # of the process, the peak is that of all tests before
        (answer,) = one.answer(str(path))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert answer["text"] == " ".join([text] * times)
    assert peaks[1] - peaks[0] < 20e6  # bytes, where 24 minutes are 23 MB of samples in 16 bits and 46 in 32


def test_windows_that_are_too_short_are_told():
    with pytest.raises(UserError, match=r"0\.04 seconds at once"):
        predictor(0.04).answer(wav(np.zeros(RATE, np.float32)))
