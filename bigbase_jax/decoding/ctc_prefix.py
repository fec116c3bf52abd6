"""How probable it is, by CTC, that a transcript begins with given tokens; inside compiled programs.

Joint decoding asks this of every next token (Watanabe et al. 2017, "Hybrid CTC/attention architecture for end-to-end
speech recognition", algorithm 2). All probabilities are natural logarithms.

Axes: B recordings, b prefixes, B x N of them, S frames, V tokens, L = V + 1 labels, of which the last is the blank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigbase_jax.core import Array

NONE = -1e9


class Prefix(NamedTuple):
    """What is kept of prefixes.

    Attributes:
      token, blank: f32[b,S+1], of the paths through so many frames that give a prefix and end in its last token, or in
        a blank.
      last: i32[b], the last token; -1 of an empty prefix.
      score: f32[b], of all transcripts that begin so.
    """

    token: jax.Array
    blank: jax.Array
    last: jax.Array
    score: jax.Array


def framed(logits_BSL: Array, frames_B: Array) -> jax.Array:
    """Log-probabilities of the labels; behind the end the blank is certain."""
    real_BS1 = (jnp.arange(logits_BSL.shape[1]) < frames_B[:, None])[..., None]
    nothing_L = jnp.where(jnp.arange(logits_BSL.shape[2]) == logits_BSL.shape[2] - 1, 0.0, NONE)
    return jnp.where(real_BS1, jax.nn.log_softmax(logits_BSL), nothing_L)


def empty(log_p_BSL: jax.Array) -> Prefix:
    """That of no token, of each recording."""
    B = len(log_p_BSL)
    blank = jnp.pad(jnp.cumsum(log_p_BSL[..., -1], axis=1), ((0, 0), (1, 0)))
    return Prefix(jnp.full_like(blank, NONE), blank, jnp.full(B, -1, jnp.int32), jnp.zeros(B))


def following(log_p_BSL: jax.Array, prefix: Prefix) -> jax.Array:
    """f32[b,L]: of each prefix, the score of what is one token longer; last, that of itself as the whole transcript."""
    B, S, L = log_p_BSL.shape
    either_bS = jnp.logaddexp(prefix.token, prefix.blank)[:, :-1]
    is_last_bV = prefix.last[:, None] == jnp.arange(L - 1)
    before = jnp.where(is_last_bV[:, None], prefix.blank[:, :-1, None], either_bS[..., None])  # a blank between equals
    before = before.reshape(B, -1, S, L - 1)
    longer_bV = jax.nn.logsumexp(before + log_p_BSL[:, None, :, :-1], 2).reshape(-1, L - 1)
    whole_b1 = jnp.logaddexp(prefix.token[:, -1:], prefix.blank[:, -1:])
    return jnp.maximum(jnp.concatenate([longer_bV, whole_b1], 1), NONE)


def longer(log_p_BSL: jax.Array, prefix: Prefix, token_b: jax.Array) -> Prefix:
    """The prefixes with one more token each."""
    B, _, L = log_p_BSL.shape
    N = len(token_b) // B
    score_b = jnp.take_along_axis(following(log_p_BSL, prefix), token_b[:, None], 1)[:, 0]
    of_token_bS = jnp.take_along_axis(log_p_BSL, token_b.reshape(B, 1, N), 2).swapaxes(1, 2).reshape(B * N, -1)
    of_blank_bS = jnp.repeat(log_p_BSL[..., L - 1], N, 0)
    either = jnp.logaddexp(prefix.token, prefix.blank)
    before_bS = jnp.where((prefix.last == token_b)[:, None], prefix.blank, either)[:, :-1]

    def step(carry: Any, of: Any) -> Any:
        token, blank = carry
        before, of_token, of_blank = of
        new = jnp.logaddexp(token, before) + of_token, jnp.logaddexp(token, blank) + of_blank
        return new, new

    none_b = jnp.full(B * N, NONE)
    frames = before_bS.T, of_token_bS.T, of_blank_bS.T
    _, found = jax.lax.scan(step, (none_b, none_b), frames)
    token, blank = (jnp.concatenate([none_b[None], x]).T for x in found)
    return Prefix(token, blank, token_b.astype(jnp.int32), score_b)
