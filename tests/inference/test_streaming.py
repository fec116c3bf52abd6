"""A stream hears what the whole recording gives, however it comes, and keeps no more than it must."""

import itertools

import jax
import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.inference.streaming import Stream
from bigbase_jax.models.conformer import Conformer
from bigbase_jax.models.speech_encoder import CTC, SpeechEncoder
from bigbase_jax.tasks.recognition import Recognition
from bigbase_jax.text.tokenizer import Symbols

RATE = 8000
TOKENIZER = Symbols(" ab", False).state()


def task(encoder=None, **words):
    small = {"width": 16, "depth": 2, "heads": 2, "kernel": 5, "channels": 4, "chunk": 4, "left": 2, "right": 1}
    model = CTC(encoder or Conformer(**small), 3)
    given = {"whole": False, "mels": 20, "frame_seconds": 0.04, **words}
    return Recognition(model, TOKENIZER, RATE, "words", **given)


def stats(variables):
    return variables["batch_stats"]["encoder"]


@pytest.fixture(scope="module")
def heard():
    """A task, variables by which it says something, a recording, and what the whole of it gives."""
    one = task(beams=3)
    rng = np.random.default_rng(0)
    audio = (rng.normal(size=int(3.3 * RATE)) * 8000 * np.sin(np.arange(int(3.3 * RATE)) / 700)).astype(np.int16)
    batch = {"audio": audio[None], "audio_length": np.array([len(audio)], np.int32)}
    variables = jax.jit(one.init)(jax.random.key(0), batch)
    params = dict(variables["params"])
    h, _ = one.model.encoder.apply({"params": params["encoder"], "batch_stats": stats(variables)}, *one.bands(batch))
    kernel = 5 * params["head"]["kernel"]
    params["head"] = {"kernel": kernel, "bias": -np.asarray(h[0] @ kernel).mean(0)}  # no token is the usual one
    variables = {**variables, "params": params}
    whole = jax.device_get(jax.jit(one.predict)(variables, batch))
    return one, variables, audio, {name: x[0] for name, x in whole.items()}


@pytest.mark.parametrize("sizes", [(1, 50), (400, 4000), (40_000, 40_001)])
def test_the_pieces_in_which_it_comes_do_not_matter(heard, sizes):
    one, variables, audio, whole = heard
    expected = one.postprocess(whole, {})
    assert len(expected["words"]) > 1
    stream, rng, at = Stream(one, variables, pause=100.0, longest=100.0), np.random.default_rng(1), 0
    partial = []
    while at < len(audio):
        size = int(rng.integers(*sizes))
        said = stream.feed(audio[at : at + size])
        assert said["final"] == []
        partial.append(said["text"])
        at += size
    last = stream.finish()
    assert last["text"] == "" and last["words"] == []
    (final,) = last["final"]
    assert final["text"] == expected["text"]
    assert final["words"] == expected["words"]
    assert len(set(partial)) > 2 or sizes[0] == 40_000


def test_pauses_end_parts_and_memory_stays_as_it_is(heard):
    one, variables, audio, _ = heard
    stream = Stream(one, variables, pause=0.2, longest=2.0)
    final, most = [], 0
    for _ in range(6):
        final += stream.feed(audio)["final"]
        most = max(most, stream._parts.frames, len(stream._waiting) // 320)
    final += stream.finish()["final"]
    assert len(final) > 3
    assert most <= 2.0 / 0.04 + 8
    for a, b in itertools.pairwise(final):
        assert a["start"] <= a["end"] <= b["start"] + 1e-6
        assert a["text"].split() == [word["word"] for word in a["words"]]
    assert final[-1]["end"] <= 6 * len(audio) / RATE + 1e-3


def test_nothing_is_heard_in_nothing(heard):
    stream = Stream(heard[0], heard[1])
    assert stream.rate == RATE
    assert stream.latency == pytest.approx((19 * 80 + 200) / RATE)
    assert stream.feed(np.zeros(0, np.int16)) == {"text": "", "final": [], "words": []}
    assert stream.feed(np.zeros(7, np.float32))["text"] == ""
    assert stream.finish() == {"text": "", "final": [], "words": []}


def test_what_cannot_stream_says_so(heard):
    for one in (task(SpeechEncoder(width=16, depth=1)), task(Conformer(16, 1, 2, 5))):
        with pytest.raises(UserError, match="whole recordings only"):
            Stream(one, {})
    with pytest.raises(UserError, match=r"task\.whole=False"):
        Stream(task(whole=True), {})
    with pytest.raises(UserError, match=r"not int64\[3\]"):
        Stream(heard[0], heard[1]).feed(np.array([1, 2, 3]))
