"""Beam search: the sequences of tokens that are the most probable as a whole; a pure function, to be compiled.

See ``sampling`` for what a model needs.

Axes: B sequences, N beams, C candidates, L length of the prompts, T new tokens, V entries of the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigbase_jax.core import Array, PyTree, Variables
from bigbase_jax.decoding.sampling import prefill, read_prompts

NEVER = -1e9
"""A score that no sequence reaches."""


class _Beams(NamedTuple):
    """The state of a beam search.

    Attributes:
      cache: arrays with a leading axis B x N.
      t: i32[], tokens written.
      open_BNT, open_BN: the sequences that have not ended, best first, and the sums of their log-probabilities.
      done_BNT, done_BN: the best of those that have ended, best first, and their scores; ``NEVER``: there is none.
      logits_BNV: of the next token of the open ones.
      improving_B: whether an open one may still become better than those that have ended.
    """

    cache: PyTree
    t: jax.Array
    open_BNT: jax.Array
    open_BN: jax.Array
    done_BNT: jax.Array
    done_BN: jax.Array
    logits_BNV: jax.Array
    improving_B: jax.Array


def beam_tokens(
    model: Any,
    variables: Variables,
    tokens_BL: Array,
    length_B: Array | None = None,
    *,
    max_new_tokens: int,
    beams: int,
    end: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    source_BS: Array | None = None,
    scores: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Beam search: (tokens i32[B,N,T], scores f32[B,N]), the best first; T is ``max_new_tokens``, N is ``beams``.

    A sequence's score is the sum of its tokens' log-probabilities (the end's included) over
    ``length ** length_penalty``. The rules are those of transformers: 2 N candidates a step, of which those that end
    are kept if they are among the first N; at the last step all of the first N are.

    Args:
      tokens_BL, length_B, end, source_BS: see ``sampling.greedy_tokens``.
      early_stopping: when a sequence's search ends. True: as soon as N have ended. False: once no open one would be
        better at its present length. "never": once none can become better, even at the greatest length.
      scores: what the model calls logits is added up as it is; they are at most 0.
    """
    (B, L), N, T = tokens_BL.shape, beams, max_new_tokens
    logits_BV, cache, length_B = read_prompts(model, variables, tokens_BL, length_B, L + T, source_BS)
    length_b = jnp.repeat(length_B, N)  # b = B x N
    rows_B1 = jnp.arange(B)[:, None]

    def grow(search: _Beams) -> _Beams:
        """One more token for every beam, but for the cache and the logits."""
        V = search.logits_BNV.shape[-1]
        total_BNV = search.open_BN[..., None] + (search.logits_BNV if scores else jax.nn.log_softmax(search.logits_BNV))
        sum_BC, index_BC = jax.lax.top_k(total_BNV.reshape(B, N * V), min(2 * N, N * V))
        beam_BC, token_BC = index_BC // V, (index_BC % V).astype(jnp.int32)
        tokens_BCT = jax.lax.dynamic_update_slice_in_dim(
            search.open_BNT[rows_B1, beam_BC], token_BC[..., None], search.t, 2
        )
        ended_BC = (token_BC == (-1 if end is None else end)) | (search.t + 1 >= T)

        unended_BC = jnp.where(ended_BC, sum_BC + NEVER, sum_BC)
        open_BN, at_BN = jax.lax.top_k(unended_BC, N)

        length = (search.t + 1).astype(jnp.float32)
        full_B1 = jnp.all(search.done_BN > NEVER / 2, -1, keepdims=True) & (early_stopping is True)
        counts_BC = ended_BC & (jnp.arange(sum_BC.shape[1]) < N) & ~full_B1 & search.improving_B[:, None]
        score_BC = jnp.where(counts_BC & (sum_BC > NEVER / 2), sum_BC / length**length_penalty, NEVER)
        both_BX = jnp.concatenate([search.done_BN, score_BC], 1)
        done_BN, best_BN = jax.lax.top_k(both_BX, N)
        done_BNT = jnp.concatenate([search.done_BNT, tokens_BCT], 1)[rows_B1, best_BN]

        reach = T if early_stopping == "never" and length_penalty > 0 else length
        bound_B = open_BN[:, 0] / jnp.float32(reach) ** length_penalty
        improving_B = search.improving_B & (bound_B > done_BN[:, -1])
        source_BN = jnp.take_along_axis(beam_BC, at_BN, 1)
        return search._replace(
            cache=jax.tree.map(lambda x: x[(rows_B1 * N + source_BN).reshape(-1)], search.cache),
            t=search.t + 1,
            open_BNT=tokens_BCT[rows_B1, at_BN],
            open_BN=open_BN,
            done_BNT=done_BNT,
            done_BN=done_BN,
            improving_B=improving_B,
        )

    def step(search: _Beams) -> _Beams:
        last_b1 = jax.lax.dynamic_slice_in_dim(search.open_BNT, search.t - 1, 1, 2).reshape(B * N, 1)
        logits_bV, cache = prefill(model, variables, search.cache, last_b1, length_b + search.t - 1)
        return grow(search._replace(cache=cache, logits_BNV=logits_bV.reshape(B, N, -1)))

    def more(search: _Beams) -> Any:
        waiting = jnp.any(search.done_BN <= NEVER / 2) if early_stopping is True else True
        return (search.t < T) & jnp.any(search.improving_B) & waiting

    fill_BNT = jnp.full((B, N, T), 0 if end is None else end, jnp.int32)
    never_BN = jnp.full((B, N), NEVER, jnp.float32)
    search = _Beams(
        cache=jax.tree.map(lambda x: jnp.repeat(x, N, 0), cache),
        t=jnp.int32(0),
        open_BNT=fill_BNT,
        open_BN=never_BN.at[:, 0].set(0.0),  # one beam to begin with: all others would be its copies
        done_BNT=fill_BNT,
        done_BN=never_BN,
        logits_BNV=jnp.broadcast_to(logits_BV[:, None], (B, N, logits_BV.shape[-1])),
        improving_B=jnp.ones(B, bool),
    )
    search = jax.lax.while_loop(more, step, grow(search))
    return search.done_BNT, search.done_BN
