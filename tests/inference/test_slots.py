"""Continuous batching: the same sequences as alone, whoever comes and goes; prefixes, limits, failures, leaving."""

import contextlib
import functools
import threading
import time

import jax
import numpy as np
import pytest
from toys import styled
from waiting import until

from bigbase_jax.core import UserError
from bigbase_jax.decoding.sampling import SamplingParams
from bigbase_jax.inference import generation
from bigbase_jax.inference import slots as module
from bigbase_jax.inference.generation import Engine
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.inference.slots import Closed, Full, Slots
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.transformer import stack_blocks
from bigbase_jax.parallel import FROZEN
from bigbase_jax.pretrained.start import runnable
from bigbase_jax.tasks.language import CausalLanguageModel
from bigbase_jax.text.tokenizer import Characters
from bigbase_jax.wrappers.lora import LoRA

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ."
FILTERED = {"top_k": 9, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}


@functools.cache
def engine():
    """A tiny Llama with large random parameters, two tokens that end a text, and a tokenizer of as many letters."""
    model = styled(Decoder, vocab_size=65, length=128, width=16, depth=2, heads=4, positions="rope", tied=False)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    random = np.random.default_rng(0)

    def draw(path, x):
        return np.float32((path[-1].key == "scale") + 0.4 * random.normal(size=x.shape))

    tokenizer = Characters().fit(lambda: iter([LETTERS]), lambda: iter(()), end=True)
    return Engine(model, {"params": jax.tree.map_with_path(draw, shapes)}, (7, 30), tokenizer)


@contextlib.contextmanager
def running(**words):
    slots = Slots(engine(), **{"slots": 4, "places": 96, "chunk": 32, **words})
    try:
        yield slots
    finally:
        slots.close()
        assert not slots._thread.is_alive()


class Listener:
    """Keeps what it is told, and waits for the end."""

    def __init__(self, slow=0.0):
        self.pieces, self.ended, self.slow = [], threading.Event(), slow

    def __call__(self, piece):
        time.sleep(self.slow)
        self.pieces.append(piece)
        if piece.finish_reason is not None:
            self.ended.set()

    def wait(self):
        assert self.ended.wait(120), "a sequence has not ended"
        return self

    @property
    def tokens(self):
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces)

    @property
    def reason(self):
        return self.pieces[-1].finish_reason


def asked(slots, prompt, params, **words):
    listener = Listener(words.pop("slow", 0.0))
    return listener, slots.submit(np.asarray(prompt, np.int32), params, listener, **words)


def requests(count, seed):
    """Prompts of all lengths, some with a long beginning in common, and every kind of parameters."""
    random = np.random.default_rng(seed)
    shared = random.integers(0, 65, 40)
    for i in range(count):
        own = random.integers(0, 65, random.integers(1, 30))
        kind = [{}, {"temperature": 1.1}, {"temperature": 1.3, **FILTERED}, {"repetition_penalty": 1.5}][i % 4]
        params = SamplingParams(
            max_new_tokens=int(random.integers(1, 24)), seed=i if "temperature" in kind else 0, **kind
        )
        yield np.concatenate([shared, own] if i % 3 == 0 else [own]).astype(np.int32), params


def wanted(some):
    return [alone.tokens.tolist() for alone in engine().complete([p for p, _ in some], [s for _, s in some])]


# ------------------------------------------------------------------------------------------------------------ the same


def test_sequences_are_the_same_whoever_comes_and_goes(monkeypatch):
    """Also where the cache grows and shrinks at nearly every step, and where others leave in the middle."""
    monkeypatch.setattr(module, "_SMALL", 32)
    monkeypatch.setattr(module, "_PATIENCE", 2)
    some, random = list(requests(24, 0)), np.random.default_rng(1)
    expected = wanted(some)
    assert len({tuple(x) for x in expected}) > 20 and len({len(x) for x in expected}) > 5
    with running() as slots:
        told, left = [], []
        for i, (prompt, params) in enumerate(some):
            told.append(asked(slots, prompt, params)[0])
            if i % 5 == 0:
                left.append(asked(slots, prompt, SamplingParams(max_new_tokens=26)))
            time.sleep(random.exponential(0.003))
            if i % 5 == 3:
                left[-1][1].cancel()
        assert [listener.wait().tokens for listener in told] == expected
        shared = [p.finish_reason for listener in told for p in listener.pieces if p.finish_reason]
        assert set(shared) == {"length", "end"} and len(shared) == len(some)
        found = slots.stats()
        assert found["prefix_hits"] > 2 and found["prefix_tokens"] >= 40 * found["prefix_hits"]


def test_a_prompt_that_is_another_ones_beginning_or_itself():
    long = np.random.default_rng(3).integers(0, 65, 60).astype(np.int32)
    params = SamplingParams(max_new_tokens=6, temperature=1.0, seed=3)
    some = [(p, params) for p in (long, long, long[:33], long[:17], np.concatenate([long, long[:20]]), long[:5])]
    with running(prefixes=2) as slots:
        assert [asked(slots, *each)[0].wait().tokens for each in some] == wanted(some)
        assert slots.stats()["prefix_hits"] == 4 and len(slots._prefixes) == 1
    with running(prefixes=0) as slots:
        assert [asked(slots, *each)[0].wait().tokens for each in some[:2]] == wanted(some[:2])
        assert slots.stats()["prefix_hits"] == 0


def test_texts_stop_as_they_do_alone():
    some = [(p, SamplingParams(max_new_tokens=20)) for p, _ in requests(4, 5)]
    plain = engine().complete([p for p, _ in some], [s for _, s in some])
    longest = max(plain, key=lambda c: len(c.text))
    stop = longest.text[4:6]
    some = [(p, SamplingParams(max_new_tokens=20, stop=(stop, "~~"))) for p, _ in some]
    expected = engine().complete([p for p, _ in some], [s for _, s in some])
    assert "stop" in {c.finish_reason for c in expected} and "end" in {c.finish_reason for c in plain}
    with running() as slots:
        told = [asked(slots, *each)[0] for each in some]
        found = [(x.wait().text, x.tokens, x.reason) for x in told]
    assert found == [(c.text, c.tokens.tolist(), c.finish_reason) for c in expected]


def test_logprobs_are_the_models():
    prompt, params = (
        np.arange(8, 20, dtype=np.int32),
        SamplingParams(max_new_tokens=5, temperature=0.7, seed=4, top_k=5),
    )
    with running() as slots:
        other = asked(slots, prompt[:3], SamplingParams(max_new_tokens=40))[0]
        told = asked(slots, prompt, params, top=3)[0].wait()
        assert not any(piece.logprobs for piece in other.wait().pieces)
    tokens = np.concatenate([prompt, told.tokens])[None]
    logits = jax.jit(engine().model.apply)(engine().variables, tokens)[0, len(prompt) - 1 : -1]
    logp = np.asarray(jax.nn.log_softmax(logits))
    said = [x for piece in told.pieces for x in piece.logprobs]
    np.testing.assert_allclose([x.logprob for x in said], logp[range(len(said)), told.tokens], atol=1e-4)
    for own, row in zip(said, logp, strict=True):
        assert [t for t, _ in own.top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([x for _, x in own.top], np.sort(row)[:-4:-1], atol=1e-4)
    assert len({x.logprob for x in said}) > 1


@pytest.mark.parametrize("scan", [False, True])
def test_adapters_share_a_base_and_the_steps(scan):
    """Of other ranks and layers, some rows with none: each sequence is that of the model with its adapter merged."""
    task, base = CausalLanguageModel(engine().model.clone(scan=scan)), engine().variables["params"]
    batch, tuned = dict.fromkeys(("inputs", "segment_ids", "positions"), np.zeros((1, 8), np.int32)), {}
    random = np.random.default_rng(2)
    for name, rank, targets in (("a0", 2, "(query|value)$"), ("a1", 3, "(mlp.up|out|key)$")):
        wrapper = LoRA(task, rank=rank, targets=targets)
        shapes = jax.eval_shape(wrapper.init, jax.random.key(0), batch)["params"]
        params = jax.tree.map(lambda x: np.float32(0.4 * random.normal(size=x.shape)), shapes)
        tuned[name] = Predictor(wrapper, {"params": params, FROZEN: stack_blocks(base) if scan else base}, {}, {}, None)
    engines = {
        name: Engine(*runnable(x.task, x.variables), engine().ends, engine().tokenizer) for name, x in tuned.items()
    }
    names = [None, "a0", "a1"] * 2
    some = [(prompt, params, name) for (prompt, params), name in zip(requests(6, 11), names, strict=True)]
    expected = [engines.get(name, engine()).complete([p], s)[0].tokens.tolist() for p, s, name in some]
    plain = wanted([(p, s) for p, s, _ in some])
    assert [a == b for a, b in zip(plain, expected, strict=True)].count(True) == 2
    with running(adapters=tuned) as slots:
        told = [asked(slots, prompt, params, adapter=name)[0] for prompt, params, name in some]
        assert [listener.wait().tokens for listener in told] == expected
        before = slots.stats()["prefix_hits"]
        for name in (None, "a0", "a1"):  # a prompt that is kept is that of its adapter
            asked(slots, np.arange(8, 40), SamplingParams(max_new_tokens=1), adapter=name)[0].wait()
        assert slots.stats()["prefix_hits"] == before
        leaves = (jax.tree.leaves(x.variables["params"]) for x in (slots.engine, engine()))
        assert all(x is y for x, y in zip(*leaves, strict=True))
        with pytest.raises(UserError, match="no adapter 'a2'. Known adapters: a0, a1"):
            asked(slots, some[0][0], SamplingParams(), adapter="a2")


# --------------------------------------------------------------------------------------------------- come, wait, leave


def test_who_leaves_frees_the_slot_and_who_is_too_many_is_told():
    params = SamplingParams(max_new_tokens=80)
    prompts = np.random.default_rng(9).integers(8, 30, (4, 4))
    prompt = next(p for p in prompts if len(engine().generate([p.astype(np.int32)], params)[0]) > 40)
    with running(slots=1, waiting=1) as slots:
        first, leaves = asked(slots, prompt, params, slow=0.02)
        until(lambda: slots.stats()["used"] == 1 and first.pieces)
        second, _ = asked(slots, prompt, params)
        with pytest.raises(Full, match="1 sequences are written and 1 wait"):
            asked(slots, prompt, params)
        leaves.cancel()
        until(lambda: second.pieces)
        assert not first.ended.is_set() and len(first.pieces) < 40
        third, waits = asked(slots, prompt, params)
        waits.cancel()
        assert second.wait().tokens == wanted([(prompt.astype(np.int32), params)])[0]
        until(lambda: slots.stats()["waiting"] == 0 and slots.stats()["used"] == 0)
        assert slots.stats()["cancelled"] == 2 and not third.pieces


def test_who_cannot_listen_is_left_out():
    def breaks(piece):
        raise BrokenPipeError

    with running(slots=2) as slots:
        slots.submit(np.arange(9, dtype=np.int32), SamplingParams(max_new_tokens=50), breaks)
        some = list(requests(1, 2))
        assert asked(slots, *some[0])[0].wait().tokens == wanted(some)[0]
        until(lambda: slots.stats()["used"] == 0)


def test_a_failure_ends_what_it_was_about_and_no_more(monkeypatch, caplog):
    """The model is given up only after several in a row."""
    real, broken = module.read, threading.Event()

    def read(model, variables, cache, tokens, *rest):
        if broken.is_set() or 64 in tokens:
            for leaf in jax.tree.leaves(cache):
                leaf.delete()
            raise RuntimeError("a secret of /home")
        return real(model, variables, cache, tokens, *rest)

    monkeypatch.setattr(module, "read", read)
    some = [(p, s) for p, s in requests(8, 6) if 64 not in p][:3]
    with running(slots=2) as slots:
        for _ in range(4):  # not in a row
            bad = asked(slots, [64, 3], SamplingParams())[0].wait()
            assert (bad.reason, bad.pieces[-1].error) == ("error", "the model has failed (RuntimeError)")
            assert [asked(slots, *each)[0].wait().tokens for each in some[:1]] == wanted(some[:1])
        assert slots.stats()["failures"] == 4 and not slots.broken
        broken.set()
        told = []
        with contextlib.suppress(Closed):
            for _ in range(8):
                told.append(asked(slots, *some[0])[0])
        assert {listener.wait().reason for listener in told} == {"error"}
        until(lambda: slots.broken)
        with pytest.raises(Closed, match="failed again and again"):
            asked(slots, *some[0])
    assert "a step of the model has failed" in caplog.text


@pytest.mark.parametrize("drain", [60.0, 0.0])
def test_closing_lets_end_or_ends(drain):
    with running() as slots:
        some = list(requests(6, 8))
        told = [asked(slots, *each, slow=0.01)[0] for each in some]
        slots.close(drain)
        reasons = {listener.wait().reason for listener in told}
        assert ("error" in reasons) == (drain == 0)
        with pytest.raises(Closed):
            asked(slots, *some[0])
        if drain:
            assert [listener.tokens for listener in told] == wanted(some)


@pytest.mark.parametrize(
    ("prompt", "words", "says"),
    [
        ([], {}, "the prompt is empty"),
        ([99], {}, "the token 99 of a prompt is none of the model's 65"),
        (range(60), {"max_new_tokens": 40}, "60 tokens and max_new_tokens of 40 are more than the 96 places"),
        ([1] * 96, {}, "96 tokens"),
        ([1], {"beams": 2}, "a beam search does not share its steps"),
    ],
)
def test_what_does_not_fit_is_one_sentence(prompt, words, says):
    with running() as slots, pytest.raises(UserError, match=says):
        asked(slots, prompt, SamplingParams(**words))


def test_all_programs_are_compiled_before():
    programs = generation._prefill, module._choose, module._likely
    with running(slots=3) as slots:
        slots.warm()
        compiled = [program._cache_size() for program in programs]
        some = list(requests(9, 10))
        for listener in [asked(slots, *each, top=2)[0] for each in some]:
            listener.wait()
        assert [program._cache_size() for program in programs] == compiled
