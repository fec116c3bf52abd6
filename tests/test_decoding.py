"""Decoding: equal to recomputing without a cache, padding, filters against a reference, beams against all sequences."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import some_slow
from toys import styled

from bigbase_jax.decoding import beams, sampling
from bigbase_jax.models.decoder import Decoder

SHAPES = {
    "gpt2": {"tied": True},
    "llama": {
        "positions": "rope",
        "norm": "rmsnorm",
        "gated": True,
        "activation": "silu",
        "kv_heads": 2,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "tied": False,
    },
    "window": {"positions": "rope", "window": 3, "kv_heads": 1, "tied": False},
}
TINY = {"vocab_size": 13, "length": 24, "width": 16, "depth": 2, "heads": 4}


@functools.cache
def ready(shape="gpt2", seed=0, **more):
    """A tiny decoder whose parameters are so large that the tokens vary."""
    model = styled(Decoder, **{**TINY, **SHAPES[shape], **more})
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    random = np.random.default_rng(seed)

    def draw(path, x):
        name = path[-1].key
        size = {"bias": 0.1, "position": 2.0}.get(name, 0.5)
        return np.float32((name == "scale") + size * random.normal(size=x.shape))

    return model, {"params": jax.tree.map_with_path(draw, shapes)}


def padded(prompts, length=None):
    """(tokens i32[B,L], lengths i32[B]): prompts of several lengths, padded on the right."""
    length = length or max(map(len, prompts))
    lengths = np.array([len(p) for p in prompts], np.int32)
    return np.stack([list(p) + [0] * (length - len(p)) for p in prompts]).astype(np.int32), lengths


@functools.cache
def compiled(function, model, **words):
    return jax.jit(functools.partial(function, model, **words))


def greedy(model, variables, tokens, lengths=None, **words):
    return np.asarray(compiled(sampling.greedy_tokens, model, **words)(variables, tokens, lengths))


def beam(model, variables, tokens, lengths=None, **words):
    return jax.tree.map(np.asarray, compiled(beams.beam_tokens, model, **words)(variables, tokens, lengths))


def slow_greedy(model, variables, prompt, count):
    """What a reader would do by hand: all logits anew for every token."""
    apply, tokens = compiled(Decoder.apply, model), list(prompt)
    for _ in range(count):
        whole = np.array([tokens + [0] * (20 - len(tokens))])  # what comes later has no influence
        tokens.append(int(np.argmax(apply(variables, whole)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_recomputing_without_a_cache(shape):
    model, variables = ready(shape)
    tokens, lengths = padded(PROMPTS)
    found = greedy(model, variables, tokens, lengths, max_new_tokens=12)
    wanted = [slow_greedy(model, variables, prompt, 12) for prompt in PROMPTS]
    np.testing.assert_array_equal(found, wanted)
    assert len(set(itertools.chain(*wanted))) > 4  # they do say something


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_every_position_equal_those_without_a_cache(shape):
    model, variables = ready(shape)
    tokens = np.random.default_rng(1).integers(0, 13, (2, 14), np.int32)
    wanted = compiled(Decoder.apply, model)(variables, tokens)
    prefill = jax.jit(functools.partial(sampling.prefill, model))
    found, cache = prefill(variables, model.cache(2, 14), tokens[:, :4], jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(found, wanted[:, 3], atol=1e-5)
    for at in range(4, 14):
        found, cache = prefill(variables, cache, tokens[:, at : at + 1], jnp.full(2, at))
        np.testing.assert_allclose(found, wanted[:, at], atol=1e-5)


def test_greedy_ends_and_fills_with_the_end():
    model, variables = ready()
    free = slow_greedy(model, variables, PROMPTS[0], 12)
    end = free[4]
    stop = free.index(end)
    tokens, lengths = padded([PROMPTS[0]], 9)
    found = greedy(model, variables, tokens, lengths, max_new_tokens=12, end=end)
    assert found[0].tolist() == free[: stop + 1] + [end] * (11 - stop)


# --------------------------------------------------------------------------------------------------------- beam search


def log_probability(model, variables, prompt, continuations):
    """f64[n]: the sum over each continuation (of one length)."""
    whole = np.array([list(prompt) + list(c) for c in continuations])
    logp = jax.nn.log_softmax(compiled(Decoder.apply, model)(variables, whole))
    rows, places = np.arange(len(whole))[:, None], np.arange(len(prompt), whole.shape[1])
    return np.asarray(logp)[rows, places - 1, whole[:, places]].astype(np.float64).sum(1)


def every_sequence(model, variables, prompt, V, T, end, length_penalty):
    """All sequences that end within T tokens or are T long, with their scores, best first."""
    found = []
    for length in range(1, T + 1):
        some = [c for c in itertools.product(range(V), repeat=length) if end not in c[:-1]]
        some = [c for c in some if c[-1] == end or length == T]
        sums = log_probability(model, variables, prompt, some)
        found += [(s / length**length_penalty, [*c, *[end] * (T - length)]) for s, c in zip(sums, some, strict=True)]
    return sorted(found, reverse=True)


@pytest.mark.parametrize("length_penalty", some_slow([0.0, 1.0, 2.0], 0.0, 2.0))
def test_wide_beams_find_the_best_of_all_sequences(length_penalty):
    model, variables = ready(vocab_size=5, seed=0)
    tokens, lengths = padded([[1, 2, 3], [4]])
    words = {"max_new_tokens": 4, "beams": 130, "end": 0, "early_stopping": "never"}
    found, scores = beam(model, variables, tokens, lengths, length_penalty=length_penalty, **words)
    for b, prompt in enumerate([[1, 2, 3], [4]]):
        wanted = every_sequence(model, variables, prompt, 5, 4, 0, length_penalty)[:20]
        np.testing.assert_allclose(scores[b, :20], [s for s, _ in wanted], rtol=1e-4)
        assert found[b, :20].tolist() == [c for _, c in wanted]
        assert len({len([t for t in c if t]) for _, c in wanted}) > 1  # of several lengths


def test_a_beam_of_one_without_penalty_is_greedy():
    model, variables = ready("llama")
    tokens, lengths = padded(PROMPTS)
    found, _ = beam(model, variables, tokens, lengths, max_new_tokens=8, beams=1, length_penalty=0.0)
    np.testing.assert_array_equal(found[:, 0], greedy(model, variables, tokens, lengths, max_new_tokens=8))


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beams_of_a_batch_are_those_of_single_prompts(early_stopping):
    model, variables = ready()
    words = {"max_new_tokens": 8, "beams": 3, "end": 11, "early_stopping": early_stopping}
    tokens, lengths = padded(PROMPTS)
    found, scores = beam(model, variables, tokens, lengths, **words)
    for b, prompt in enumerate(PROMPTS):
        alone, score = beam(model, variables, *padded([prompt], 5), **words)
        np.testing.assert_array_equal(found[b], alone[0])
        np.testing.assert_allclose(scores[b], score[0], rtol=1e-4)
    assert (np.diff(scores) <= 0).all() and (np.asarray(found) == 11).any()


# ------------------------------------------------------------------------------------------------------------ sampling


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference(logits, seen, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """The filters of one sequence, by sorting, in numpy."""
    x = logits.astype(np.float64)
    for t in set(seen):
        x[t] = x[t] * repetition_penalty if x[t] < 0 else x[t] / repetition_penalty
    x = x / temperature
    if top_k:
        x[x < np.sort(x)[-min(top_k, len(x))]] = -np.inf
    if top_p < 1:
        order = np.argsort(-x)
        above = np.cumsum(softmax(x)[order]) - softmax(x)[order]
        x[order[(above >= top_p) & (np.arange(len(x)) > 0)]] = -np.inf
    p = softmax(x)
    x[p < min_p * p.max()] = -np.inf
    return x


SETTINGS = [
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_k": 500},
    {"top_p": 0.8},
    {"top_p": 0.0},
    {"min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
]
WORDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def arrays(settings, seeds=None):
    """Each sequence with its own settings, in one batch."""
    columns = {f"{w}_B": np.array([{**NEUTRAL, **s}[w] for s in settings], np.float32) for w in WORDS}
    columns["top_k_B"] = columns["top_k_B"].astype(np.int32)
    seeds = np.arange(len(settings)) if seeds is None else seeds
    return sampling.SamplingArrays(seed_B=np.asarray(seeds, np.uint32), **columns)


@jax.jit
def processed(logits, tokens, how):
    seen = sampling.seen_tokens(tokens, jnp.ones(tokens.shape, bool), logits.shape[1])
    return sampling.filtered(sampling.penalise(logits, seen, how.repetition_penalty_B), how)


def some_logits():
    random = np.random.default_rng(0)
    logits = random.normal(size=(len(SETTINGS), 101)).astype(np.float32) * 3
    return logits, random.integers(0, 101, (len(SETTINGS), 30), np.int32)


def test_filters_equal_a_reference_that_sorts():
    logits, tokens = some_logits()
    found = np.asarray(processed(logits, tokens, arrays(SETTINGS)))
    kept = []
    for b, settings in enumerate(SETTINGS):
        wanted = reference(logits[b], tokens[b], **settings)
        np.testing.assert_array_equal(np.isinf(found[b]), np.isinf(wanted), err_msg=str(settings))
        np.testing.assert_allclose(found[b], wanted, rtol=1e-5)
        kept.append(int(np.isfinite(wanted).sum()))
    assert kept[1] == 3 and kept[2] == 101 and 1 < kept[3] < 101 and kept[4] == 1 and 1 < kept[7] < 20


def test_filters_equal_those_of_transformers():
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits, tokens = some_logits()
    found = np.asarray(processed(logits, tokens, arrays(SETTINGS)))
    for b, settings in enumerate(SETTINGS):
        words = {**NEUTRAL, **settings}
        scores, seen = torch.tensor(logits[b : b + 1]), torch.tensor(tokens[b : b + 1]).long()
        chain = [processors.RepetitionPenaltyLogitsProcessor(words["repetition_penalty"])]
        chain += [processors.TemperatureLogitsWarper(words["temperature"])]
        chain += [processors.TopKLogitsWarper(words["top_k"])] if words["top_k"] else []
        chain += [processors.TopPLogitsWarper(words["top_p"]), processors.MinPLogitsWarper(words["min_p"])]
        for step in chain:
            scores = step(seen, scores)
        np.testing.assert_allclose(found[b], scores[0].numpy(), rtol=1e-5, err_msg=str(settings))


def test_equal_logits_stay_or_go_together():
    logits = np.array([[0.0, 2.0, 1.0, 1.0, 1.0, -1.0]], np.float32)
    found = processed(logits, np.zeros((1, 1), np.int32), arrays([{"top_k": 2}]))
    assert np.isfinite(found[0]).tolist() == [False, True, True, True, True, False]


def test_tokens_are_as_frequent_as_they_are_probable():
    random = np.random.default_rng(1)
    logits, N = random.normal(size=23).astype(np.float32) * 2, 20_000
    settings = {"temperature": 1.3, "top_k": 15, "top_p": 0.95, "min_p": 0.02}
    wanted = softmax(reference(logits, [], **settings))
    how = arrays([settings] * N)._replace(repetition_penalty_B=None)
    nothing = sampling.State(None, jnp.zeros((N, 4), jnp.int32), *jnp.full((2, N), 1), None, None)
    drawn = jax.jit(sampling.choose)(np.broadcast_to(logits, (N, 23)), nothing, how)
    share = np.bincount(np.asarray(drawn), minlength=23) / N
    sigma = np.sqrt(wanted * (1 - wanted) / N)
    assert (np.abs(share - wanted) <= 4 * sigma).all() and (share[wanted == 0] == 0).all()
    assert 3 < (wanted > 0).sum() < 15


def test_a_temperature_of_zero_is_greedy_beside_others():
    logits, tokens = some_logits()
    how = arrays([{"temperature": 0.0}, {"temperature": 9.0}] * 4)
    state = sampling.State(None, tokens, *jnp.full((2, 8), 30), None, None)
    drawn = np.asarray(jax.jit(sampling.choose)(logits, state, how))
    best = logits.argmax(-1)
    assert (drawn[::2] == best[::2]).all() and (drawn[1::2] != best[1::2]).any()
