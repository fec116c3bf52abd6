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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigbase_jax.core import Array, PyTree, Variables

NEVER = -1e9
"""A score that no sequence reaches."""


class Choice(NamedTuple):
    """How the next token is chosen; each attribute is [B], or None where no sequence needs it.

    In this order, as transformers does: the repetition penalty, the temperature, top-k, top-p, min-p; then a token is
    drawn. The n-th new token's randomness depends on the seed and n alone, not on other sequences.

    Attributes:
      seed_B: u32; read where the temperature is.
      temperature_B: f32, logits are divided by it; 0: the most probable token.
      top_k_B: i32, only the k most probable tokens (and those as probable as the last of them); 0: all.
      top_p_B: f32, only the most probable tokens that together have this probability (Holtzman et al. 2020); 1: all.
      min_p_B: f32, only tokens of this probability times that of the most probable (Nguyen et al. 2024); 0: all.
      repetition_penalty_B: f32, logits of tokens in the prompt or written since are divided by it if they are
        positive, else multiplied (Keskar et al. 2019); 1: nothing is done.
    """

    seed_B: Array | None = None
    temperature_B: Array | None = None
    top_k_B: Array | None = None
    top_p_B: Array | None = None
    min_p_B: Array | None = None
    repetition_penalty_B: Array | None = None


class Progress(NamedTuple):
    """Sequences that are being written.

    Attributes:
      cache: of the tokens before the last one.
      tokens_BS: i32[B,S], the prompts, whose last tokens stand at place L - 1, and what follows.
      start: i32[], L.
      at: i32[], the place of the next token.
      first_B: i32[B], the place of each sequence's first token.
      limit_B: i32[B], how many new tokens each may have.
      done_B: bool[B], which sequences have ended; ``tokens_BS`` goes on with their last token.
    """

    cache: PyTree
    tokens_BS: Array
    start: Array
    at: Array
    first_B: Array
    limit_B: Array
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
    (B, L), T, ends_E = tokens_BL.shape, max_new_tokens, end_tokens(end)
    tokens_BL, first_B = _start(tokens_BL, first_B)
    cache, source = _cache(model, B, L + T, source_BS)
    logits_BV, cache = read(model, variables, cache, tokens_BL, jnp.int32(0), first_B, *source)
    limit_B = jnp.full(B, T, jnp.int32)
    progress = begin(logits_BV, cache, tokens_BL, first_B, limit_B, L + T, Choice(), ends_E)
    progress = go_on(model, variables, progress, Choice(), ends_E, L + T)
    tokens_BT = progress.tokens_BS[:, L:]
    return jnp.where(jnp.arange(L, L + T) < progress.at, tokens_BT, 0 if end is None else end)


def begin(
    logits_BV: jax.Array,
    cache: PyTree,
    tokens_BL: Array,
    first_B: Array,
    limit_B: Array,
    places: int,
    choice: Choice,
    ends_E: Array,
) -> Progress:
    """The first new token after the prompts, which the cache holds and these logits follow; ``places`` is S."""
    B, L = tokens_BL.shape
    tokens_BS = jnp.zeros((B, places), jnp.int32).at[:, :L].set(tokens_BL)
    start, done_B = jnp.int32(L), limit_B <= 0
    progress = Progress(cache, tokens_BS, start, start, first_B, limit_B, done_B)
    return _append(progress, choose(logits_BV, progress, choice), ends_E)


def go_on(model: Any, variables: Variables, progress: Progress, choice: Choice, ends_E: Array, until: Any) -> Progress:
    """More tokens, up to place ``until`` or until all sequences have ended."""

    def more(progress: Progress) -> Any:
        return (progress.at < until) & ~jnp.all(progress.done_B)

    def step(progress: Progress) -> Progress:
        last_B1 = jax.lax.dynamic_slice_in_dim(progress.tokens_BS, progress.at - 1, 1, 1)
        logits_BV, cache = read(model, variables, progress.cache, last_B1, progress.at - 1, progress.first_B)
        return _append(progress._replace(cache=cache), choose(logits_BV, progress, choice), ends_E)

    return jax.lax.while_loop(more, step, progress)


def _append(progress: Progress, token_B: Array, ends_E: Array) -> Progress:
    """One more token for each sequence that has not ended."""
    last_B = jax.lax.dynamic_slice_in_dim(progress.tokens_BS, progress.at - 1, 1, 1)[:, 0]
    token_B = jnp.where(progress.done_B, last_B, token_B)
    tokens_BS = jax.lax.dynamic_update_slice_in_dim(progress.tokens_BS, token_B[:, None], progress.at, 1)
    at = progress.at + 1
    done_B = progress.done_B | jnp.any(token_B[:, None] == ends_E, -1) | (at - progress.start >= progress.limit_B)
    return progress._replace(tokens_BS=tokens_BS, at=at, done_B=done_B)


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


# ------------------------------------------------------------------------------------------------------------ sampling


def choose(logits_BV: jax.Array, progress: Progress, choice: Choice) -> jax.Array:
    """The next token i32[B] of each sequence, from its logits f32[B,V]."""
    if choice.repetition_penalty_B is not None:
        place_S = jnp.arange(progress.tokens_BS.shape[1])
        real_BS = (place_S >= progress.first_B[:, None]) & (place_S < progress.at)
        seen_BV = seen_tokens(progress.tokens_BS, real_BS, logits_BV.shape[1])
        logits_BV = penalise(logits_BV, seen_BV, choice.repetition_penalty_B)
    best_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)
    if choice.temperature_B is None:
        return best_B
    n, V = progress.at - progress.start, logits_BV.shape[1]

    def noise(seed: Any) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), n), (V,))

    drawn_B = jnp.argmax(filtered(logits_BV, choice) + jax.vmap(noise)(choice.seed_B), -1)  # Gumbel's trick
    return jnp.where(choice.temperature_B > 0, drawn_B, best_B).astype(jnp.int32)


def seen_tokens(tokens_BS: Array, real_BS: Array, vocab_size: int) -> jax.Array:
    """bool[B,V]: which entries of the vocabulary are among the real ones of these tokens."""
    rows_B1 = jnp.arange(len(tokens_BS))[:, None]
    return jnp.zeros((len(tokens_BS), vocab_size), bool).at[rows_B1, tokens_BS].max(real_BS)


def penalise(logits_BV: jax.Array, seen_BV: Array, penalty_B: Array) -> jax.Array:
    """The repetition penalty; see ``Choice``."""
    penalty_B1 = penalty_B[:, None]
    return jnp.where(seen_BV, jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1), logits_BV)


def filtered(logits_BV: jax.Array, choice: Choice) -> jax.Array:
    """Logits over the temperature; -inf where top-k, top-p or min-p leave a token out."""
    assert choice.temperature_B is not None
    temperature_B1 = choice.temperature_B[:, None]
    logits_BV = logits_BV / jnp.where(temperature_B1 > 0, temperature_B1, 1.0)
    if choice.top_k_B is not None:
        k_B = jnp.where(choice.top_k_B > 0, choice.top_k_B, logits_BV.shape[1])
        logits_BV = _best(logits_BV, lambda kept_BV: jnp.sum(kept_BV, -1) >= k_B)
    if choice.top_p_B is not None:
        p_B, probability_BV = choice.top_p_B, jax.nn.softmax(logits_BV)
        some_BV = _best(logits_BV, lambda kept_BV: jnp.sum(jnp.where(kept_BV, probability_BV, 0), -1) >= p_B)
        logits_BV = jnp.where(p_B[:, None] < 1, some_BV, logits_BV)  # whose sum may round to 1 too early
    if choice.min_p_B is not None:
        share_BV = jnp.exp(logits_BV - jnp.max(logits_BV, -1, keepdims=True))
        logits_BV = jnp.where(share_BV < choice.min_p_B[:, None], -jnp.inf, logits_BV)
    return logits_BV


def _best(logits_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The fewest of the greatest logits that are ``enough`` (at least one), and -inf for the others.

    The threshold is found by bisection over the order of float32's bits: 32 passes, where sorting a vocabulary takes
    ten times as long on a CPU.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV.astype(jnp.float32), jnp.int32)
    order_BV = bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)  # integers in the order of the floats

    def halve(_: int, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
        low_B, high_B = bounds
        middle_B = (low_B | high_B) - ((low_B ^ high_B) >> 1)  # rounded up, without overflow
        fits_B = enough(order_BV >= middle_B[:, None])
        return jnp.where(fits_B, middle_B, low_B), jnp.where(fits_B, high_B, middle_B - 1)

    bounds = jnp.min(order_BV, -1), jnp.max(order_BV, -1)
    low_B, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where(order_BV >= low_B[:, None], logits_BV, -jnp.inf)


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
