"""Decoding: which tokens follow, by greedy search, sampling or beam search; pure functions, to be compiled.

A model that decodes has three methods: ``cache(batch_size, length)``, an empty variable collection "cache", all arrays
of which have a leading axis B; ``decode(tokens_BL, at, first_B)``, which reads the tokens at places ``at`` to
``at + L - 1``, keeps what it must in the cache and returns what ``logits`` takes (see ``models.decoder``); and
``logits``. One that also reads a source takes ``cache(batch_size, length, source_length)`` and, the first time only,
``decode(tokens_BL, at, first_B, source_BS)``: what later tokens need of the source is in the cache.

Axes: B sequences, N beams, C candidates, L length of the prompts, M of the source, S places of the cache, T new tokens,
V entries of the vocabulary, E tokens that end a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigbase_jax.core import Array, PyTree, Variables

NEVER = -1e9
"""A score that no sequence reaches."""


class Progress(NamedTuple):
    """Sequences that are being written.

    Attributes:
      cache: of the tokens before the last one.
      tokens_BS: i32[B,S], the prompts, whose last tokens stand at place L - 1, and what follows.
      at: i32[], the place of the next token.
      first_B: i32[B], the place of each sequence's first token.
      done_B: bool[B], which sequences have ended; ``tokens_BS`` goes on with their last token.
    """

    cache: PyTree
    tokens_BS: Array
    at: Array
    first_B: Array
    done_B: Array


def read(
    model: Any, variables: Variables, cache: PyTree, tokens_BL: Array, at: Any, first_B: Array, *source: Array
) -> tuple[jax.Array, PyTree]:
    """(logits f32[B,V] of the token after the last of ``tokens_BL``, the cache with all of them in it)."""
    y_BLD, kept = model.apply(
        {**variables, "cache": cache}, tokens_BL, at, first_B, *source, method="decode", mutable=["cache"]
    )
    return model.apply(variables, y_BLD[:, -1:], method="logits")[:, 0], kept["cache"]


# -------------------------------------------------------------------------------------------------------------- greedy


def greedy_tokens(
    model: Any,
    variables: Variables,
    tokens_BL: Array,
    first_B: Array | None = None,
    *,
    max_new_tokens: int,
    end: int | None = None,
    source_BS: Array | None = None,
) -> jax.Array:
    """The most probable token, again and again: i32[B,T], T being ``max_new_tokens``.

    Args:
      tokens_BL: prompts of at least one token, shorter ones padded on the left; a decoder's start token.
      first_B: the place of each prompt's first token; None: 0.
      end: the token that ends a sequence; it is the last one, and fills what is left. None: there is none.
      source_BS: what the model translates.
    """
    (B, L), ends_E = tokens_BL.shape, end_tokens(end)
    tokens_BL, first_B = _start(tokens_BL, first_B)
    cache, source = _cache(model, B, L + max_new_tokens, source_BS)
    logits_BV, cache = read(model, variables, cache, tokens_BL, jnp.int32(0), first_B, *source)
    progress = begin(cache, tokens_BL, first_B, L + max_new_tokens, jnp.argmax(logits_BV, -1), ends_E)

    def more(progress: Progress) -> Any:
        return (progress.at < L + max_new_tokens) & ~jnp.all(progress.done_B)

    def step(progress: Progress) -> Progress:
        logits_BV, progress = advance(model, variables, progress)
        return append(progress, jnp.argmax(logits_BV, -1), ends_E)

    progress = jax.lax.while_loop(more, step, progress)
    tokens_BT = progress.tokens_BS[:, L:]
    written_T = jnp.arange(max_new_tokens) < progress.at - L
    return jnp.where(written_T, tokens_BT, tokens_BT[:, :1] if end is None else end)


def begin(cache: PyTree, tokens_BL: Array, first_B: Array, places: int, token_B: Array, ends_E: Array) -> Progress:
    """The first new token after the prompts, which the cache holds; ``places`` is S."""
    B, L = tokens_BL.shape
    tokens_BS = jnp.zeros((B, places), jnp.int32).at[:, :L].set(tokens_BL)
    return append(Progress(cache, tokens_BS, jnp.int32(L), first_B, jnp.zeros(B, bool)), token_B, ends_E)


def advance(model: Any, variables: Variables, progress: Progress) -> tuple[jax.Array, Progress]:
    """(the logits f32[B,V] of the next token, the progress with the last token in the cache)."""
    last_B1 = jax.lax.dynamic_slice_in_dim(progress.tokens_BS, progress.at - 1, 1, 1)
    logits_BV, cache = read(model, variables, progress.cache, last_B1, progress.at - 1, progress.first_B)
    return logits_BV, progress._replace(cache=cache)


def append(progress: Progress, token_B: Array, ends_E: Array) -> Progress:
    """One more token for each sequence that has not ended."""
    last_B = jax.lax.dynamic_slice_in_dim(progress.tokens_BS, progress.at - 1, 1, 1)[:, 0]
    token_B = jnp.where(progress.done_B, last_B, token_B.astype(jnp.int32))
    tokens_BS = jax.lax.dynamic_update_slice_in_dim(progress.tokens_BS, token_B[:, None], progress.at, 1)
    done_B = progress.done_B | jnp.any(token_B[:, None] == ends_E, -1)
    return progress._replace(tokens_BS=tokens_BS, at=progress.at + 1, done_B=done_B)


def end_tokens(end: int | Sequence[int] | None) -> jax.Array:
    """i32[E] of the tokens that end a sequence; [-1], which no token is, where there are none."""
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    return jnp.array(ends or [-1], jnp.int32)


def _start(tokens_BL: Array, first_B: Array | None) -> tuple[jax.Array, jax.Array]:
    first_B = jnp.zeros(len(tokens_BL), jnp.int32) if first_B is None else jnp.asarray(first_B, jnp.int32)
    return jnp.asarray(tokens_BL, jnp.int32), first_B


def _cache(model: Any, B: int, S: int, source_BS: Array | None) -> tuple[PyTree, tuple[Array, ...]]:
    if source_BS is None:
        return model.cache(B, S), ()
    return model.cache(B, S, source_BS.shape[1]), (source_BS,)


# ---------------------------------------------------------------------------------------------------------- beam search


class _Beams(NamedTuple):
    """The state of a beam search.

    Attributes:
      cache: arrays with a leading axis B x N.
      t: i32[], tokens written.
      open_BNT, open_BN: the sequences that go on, best first, and the sums of their log-probabilities.
      done_BNT, done_BN: the best of those that have ended, best first, and their scores; ``NEVER``: there is none.
      logits_BNV: of the next token of those that go on.
      improving_B: whether one that goes on may still be better than those that have ended.
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
    first_B: Array | None = None,
    *,
    max_new_tokens: int,
    beams: int,
    end: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    source_BS: Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Beam search: (tokens i32[B,N,T], scores f32[B,N]), the best first; T is ``max_new_tokens``, N is ``beams``.

    A sequence's score is the sum of its tokens' log-probabilities (the end's included) over
    ``length ** length_penalty``. The rules are those of transformers: 2 N candidates a step, of which those that end
    are kept if they are among the first N; at the last step all of the first N are.

    Args:
      tokens_BL, first_B, end, source_BS: see ``greedy_tokens``.
      early_stopping: when a sequence's search ends. True: as soon as N have ended. False: once no open one would be
        better at its present length. "never": once none can become better, even at the greatest length.
    """
    (B, L), N, T = tokens_BL.shape, beams, max_new_tokens
    tokens_BL, first_B = _start(tokens_BL, first_B)
    cache, source = _cache(model, B, L + T, source_BS)
    logits_BV, cache = read(model, variables, cache, tokens_BL, jnp.int32(0), first_B, *source)
    first_b = jnp.repeat(first_B, N)  # b = B x N
    rows_B1 = jnp.arange(B)[:, None]

    def grow(search: _Beams) -> _Beams:
        """One more token for every beam, but for the cache and the logits."""
        V = search.logits_BNV.shape[-1]
        total_BNV = search.open_BN[..., None] + jax.nn.log_softmax(search.logits_BNV)
        sum_BC, index_BC = jax.lax.top_k(total_BNV.reshape(B, N * V), min(2 * N, N * V))
        beam_BC, token_BC = index_BC // V, (index_BC % V).astype(jnp.int32)
        tokens_BCT = jax.lax.dynamic_update_slice_in_dim(
            search.open_BNT[rows_B1, beam_BC], token_BC[..., None], search.t, 2
        )
        ended_BC = (token_BC == (-1 if end is None else end)) | (search.t + 1 >= T)

        going_BC = jnp.where(ended_BC, sum_BC + NEVER, sum_BC)
        open_BN, at_BN = jax.lax.top_k(going_BC, N)

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
        logits_bV, cache = read(model, variables, search.cache, last_b1, L + search.t - 1, first_b)
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
