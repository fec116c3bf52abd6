"""Alignment of phonemes and frames: against brute force, scipy's beta-binomial and torch's CTC."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch

from bigbase_jax.models.alignment import NEVER, log_prior, monotonic, spread
from bigbase_jax.tasks import synthesis


def paths(F, L):
    """All monotonic paths: the phoneme of each frame."""
    for cuts in itertools.combinations(range(1, F), L - 1):
        yield np.searchsorted(cuts, np.arange(F), side="right")


@pytest.mark.parametrize(("F", "L"), [(1, 1), (5, 1), (4, 4), (7, 3), (8, 5)])
def test_the_search_finds_the_best_path_of_all(F, L):
    score_BFL = np.random.default_rng(F * L).normal(size=(3, 9, 6)).astype(np.float32)
    at_BF = np.asarray(monotonic(jnp.asarray(score_BFL), jnp.full(3, L), jnp.full(3, F)))
    for score_FL, at_F in zip(score_BFL, at_BF, strict=True):
        sums = {tuple(path): score_FL[np.arange(F), path].sum() for path in paths(F, L)}
        assert tuple(at_F[:F]) == max(sums, key=sums.get)
        assert (at_F[F:] == L - 1).all()


def test_the_prior_is_scipys_beta_binomial():
    for L, F in ((1, 3), (4, 9), (6, 6)):
        found = np.asarray(log_prior(jnp.array([L]), jnp.array([F]), 8, 12))[0]
        f = np.arange(F)[:, None]
        expected = scipy.stats.betabinom.logpmf(np.arange(L), L - 1, f + 1, F - f)
        np.testing.assert_allclose(found[:F, :L], expected, atol=2e-5)
        assert (found[:, L:] == NEVER).all()


def test_the_forward_sum_is_torchs_ctc():
    random, (B, F, L) = np.random.default_rng(0), (3, 12, 6)
    near_BFL = -random.uniform(0, 3, (B, F, L)).astype(np.float32)
    phonemes_BL = np.zeros((B, L), np.int32)
    counts, frames = [6, 3, 1], [12, 9, 5]
    for b, n in enumerate(counts):
        phonemes_BL[b, :n] = random.integers(1, 9, n)
    sum_B, at_BF = synthesis.aligned(jnp.asarray(near_BFL), jnp.asarray(phonemes_BL), jnp.array(frames))
    for b, (n, f) in enumerate(zip(counts, frames, strict=True)):
        near = torch.tensor(near_BFL[b, :f, :n]).log_softmax(-1)
        k = np.arange(f)[:, None]
        prior = torch.tensor(scipy.stats.betabinom.logpmf(np.arange(n), n - 1, k + 1, f - k)).float()
        logits = torch.nn.functional.pad(near + prior, (1, 0), value=-1.0).log_softmax(-1)
        labels = torch.arange(1, n + 1)[None]
        expected = torch.nn.functional.ctc_loss(logits[:, None], labels, [f], [n], reduction="none")
        np.testing.assert_allclose(sum_B[b], expected.item(), rtol=1e-4)
        steps = np.diff(np.asarray(at_BF)[b, :f], prepend=0)
        assert set(steps) <= {0, 1} and steps.sum() == n - 1  # every phoneme has a frame, and they are in order


def test_durations_sum_to_the_frames_and_come_back():
    score_BFL = jnp.asarray(np.random.default_rng(1).normal(size=(4, 15, 5)), jnp.float32)
    count_B, frames_B = jnp.array([5, 4, 1, 3]), jnp.array([15, 9, 7, 3])
    at_BF = monotonic(score_BFL, count_B, frames_B)
    real_BF = jnp.arange(15) < frames_B[:, None]
    duration_BL = jnp.sum((at_BF[..., None] == jnp.arange(5)) & real_BF[..., None], 1)
    assert (duration_BL.sum(1) == frames_B).all() and ((duration_BL > 0) == (jnp.arange(5) < count_B[:, None])).all()
    again_BF, there_BF = spread(duration_BL, 15)
    assert (there_BF == real_BF).all() and (jnp.where(real_BF, again_BF - at_BF, 0) == 0).all()
    cut_BF, there_BF = spread(duration_BL, 8)
    assert (jnp.where(there_BF, cut_BF - at_BF[:, :8], 0) == 0).all()
