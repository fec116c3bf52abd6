"""Prefix probabilities against all paths; a joint search against all transcripts."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbase_jax.decoding import ctc_prefix


def every_path(log_p_SL):
    """Of each transcript, the probability of all its paths."""
    S, L = log_p_SL.shape
    found = {}
    for path in itertools.product(range(L), repeat=S):
        said = tuple(label for label, _ in itertools.groupby(path) if label != L - 1)
        found[said] = found.get(said, 0.0) + math.exp(sum(log_p_SL[s, label] for s, label in enumerate(path)))
    return found


@pytest.mark.parametrize("frames", [5, 3])
def test_prefix_scores_are_the_sums_over_all_paths(frames):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 3)).astype(np.float32)
    log_p = ctc_prefix.framed(jnp.asarray(logits), jnp.array([5, frames]))
    known = every_path(np.asarray(jax.nn.log_softmax(logits[1, :frames]), np.float64))
    following, longer = jax.jit(ctc_prefix.following), jax.jit(ctc_prefix.longer)
    for tokens in ([], [0], [1, 1], [0, 1, 0], [1, 0, 0]):
        prefix = ctc_prefix.empty(log_p)
        for token in tokens:
            prefix = longer(log_p, prefix, jnp.array([0, token]))
        scores = np.exp(np.asarray(following(log_p, prefix), np.float64)[1])
        for token in (0, 1):
            begins = (*tokens, token)
            expected = sum(p for said, p in known.items() if said[: len(begins)] == begins)
            np.testing.assert_allclose(scores[token], expected, atol=1e-6)
        np.testing.assert_allclose(scores[2], known.get(tuple(tokens), 0.0), atol=1e-6)


def test_several_prefixes_of_a_recording():
    log_p = ctc_prefix.framed(jax.random.normal(jax.random.key(0), (2, 6, 4)), jnp.array([6, 4]))
    one = ctc_prefix.longer(log_p, ctc_prefix.empty(log_p), jnp.array([1, 2]))
    both = jax.tree.map(lambda x: jnp.repeat(x, 2, 0), ctc_prefix.empty(log_p))
    both = ctc_prefix.longer(log_p, both, jnp.array([1, 0, 0, 2]))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(both), strict=True):
        np.testing.assert_allclose(a, np.asarray(b)[np.array([0, 3])], atol=1e-5)
    scores, two = ctc_prefix.following(log_p, one), ctc_prefix.following(log_p, both)
    np.testing.assert_allclose(scores, two[np.array([0, 3])], atol=1e-5)
