"""Alignment of phonemes and frames without labels (Badlani et al. 2021, "One TTS Alignment To Rule Them All").

Every phoneme has one frame at least, and they follow each other in order.

Legend: B examples, F frames, L phonemes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

NEVER = -1e9  # a log-probability


@functools.lru_cache(8)
def _log_factorials(size: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size)))]).astype(np.float32)


def log_prior(phonemes_B: Int32[Array, " B"], frames_B: Int32[Array, " B"], L: int, F: int) -> Float32[Array, "B F L"]:
    """The beta-binomial prior of each frame (equation 4 there, with omega 1): near the diagonal, wide in the middle.

    ``NEVER`` at phonemes behind the last.
    """
    table = jnp.asarray(_log_factorials(2 * F + 2 * L + 4))

    def log_factorial(n: jax.Array) -> jax.Array:
        return table[jnp.maximum(n, 0)]

    n = phonemes_B[:, None, None] - 1
    total, k = frames_B[:, None, None], jnp.arange(L)
    f = jnp.minimum(jnp.arange(F)[:, None], total - 1)
    # a = f + 1 and b = F - f: all arguments of the gamma functions are whole numbers
    log_p = log_factorial(n) - log_factorial(k) - log_factorial(n - k)
    log_p += log_factorial(k + f) + log_factorial(n - k + total - f - 1) - log_factorial(n + total)
    log_p += log_factorial(total) - log_factorial(f) - log_factorial(total - f - 1)
    return jnp.where(k <= n, log_p, NEVER)


def monotonic(
    score_BFL: Float32[Array, "B F L"], phonemes_B: Int32[Array, " B"], frames_B: Int32[Array, " B"]
) -> Int32[Array, "B F"]:
    """The phoneme of each frame on the monotonic path with the highest sum of scores (Kim et al. 2020, Glow-TTS).

    Frames behind the last have the last phoneme. There is a path where there are no more phonemes than frames.
    """
    score_FBL = jnp.moveaxis(score_BFL, 1, 0)
    first_L = jnp.where(jnp.arange(score_BFL.shape[2]) == 0, 0.0, NEVER)

    def forward(best_BL: jax.Array, score_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        before_BL = jnp.pad(best_BL[:, :-1], ((0, 0), (1, 0)), constant_values=NEVER)
        moved_BL = before_BL > best_BL
        return jnp.where(moved_BL, before_BL, best_BL) + score_BL, moved_BL

    _, moved_FBL = jax.lax.scan(forward, score_FBL[0] + first_L, score_FBL[1:])
    moved_FBL = jnp.pad(moved_FBL, ((1, 0), (0, 0), (0, 0)))

    def backward(at_B: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        f, moved_BL = given
        moved_B = jnp.take_along_axis(moved_BL, at_B[:, None], 1)[:, 0] & (f < frames_B)
        return at_B - moved_B, at_B

    frames = jnp.arange(score_BFL.shape[1])
    _, at_FB = jax.lax.scan(backward, phonemes_B - 1, (frames, moved_FBL), reverse=True)
    return at_FB.T


def spread(duration_BL: Int32[Array, "B L"], F: int) -> tuple[Int32[Array, "B F"], Bool[Array, "B F"]]:
    """The phoneme of each of F frames, and which frames there are: what durations come to. What is beyond F is cut."""
    stop_BL = jnp.cumsum(duration_BL, axis=1)
    frames = jnp.arange(F)
    at_BF = jnp.sum(stop_BL[:, None, :] <= frames[:, None], -1)
    return jnp.minimum(at_BF, duration_BL.shape[1] - 1), frames < stop_BL[:, -1:]
