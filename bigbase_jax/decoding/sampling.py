"""Sampling: the tokens that follow prompts, the most probable ones or drawn; pure functions, to be compiled.

A model that decodes has three methods: ``cache(batch_size, length)``, an empty variable collection "cache", all arrays
of which have a leading axis B; ``decode(tokens_BL, position_B)``, which reads the tokens at the positions from
``position_B`` on of each sequence, keeps what it must in the cache and returns what ``logits`` takes (see
``models.decoder``); and ``logits``. One that also reads a source has ``cache(batch_size, length, source_length)`` and,
for the first time, ``decode(tokens_BL, position_B, source_BS)``: what later tokens need of the source is in the cache.

Every sequence has a position of its own, so that one compiled step serves sequences of different age. Shorter prompts
are padded on the right: what stands behind a prompt is overwritten by its new tokens before any of them can see it.

Axes: B sequences, L length of the prompts, M of the source, S places of the cache, T new tokens, V entries of the
vocabulary, E tokens that end a sequence.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Array, PyTree, UserError, Variables


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a model continues a prompt.

    In this order, as transformers does: the repetition penalty, the temperature, top-k, top-p, min-p; then a token is
    drawn.

    Attributes:
      max_new_tokens: of each prompt; None: as many as the model's length leaves room for, and 16,384 at most.
      temperature: logits are divided by it; 0: always the most probable token.
      top_k: only the k most probable tokens (and those as probable as the last of them); 0: all.
      top_p: only the most probable tokens that together have this probability (Holtzman et al. 2020); 1: all.
      min_p: only tokens of this probability times that of the most probable (Nguyen et al. 2024); 0: all.
      repetition_penalty: logits of tokens in the prompt or written since are divided by it if they are positive, else
        multiplied (Keskar et al. 2019); 1: nothing is done.
      seed: the same seed and prompt give the same tokens, whatever else is in the batch.
      stop: texts at which to stop; they are not part of what is written.
      beams: sequences of a beam search (``beams.beam_tokens``); 1: no such search.
      length_penalty: of a beam search.

    Raises:
      UserError: a value out of range, or a beam search and sampling at once.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 <= self.top_p <= 1, "between 0 and 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0"),
            ("seed", 0 <= self.seed < 2**32, "between 0 and 2^32 - 1"),
            ("stop", "" not in self.stop, "not empty"),
            ("beams", self.beams >= 1, "at least 1"),
        ):
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be {wanted}.")
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.min_p):
            raise UserError("top_k, top_p and min_p choose among tokens that are drawn; set temperature (try 1).")
        if self.beams > 1 and (self.temperature > 0 or self.repetition_penalty != 1 or self.stop):
            raise UserError("a beam search takes no temperature, repetition_penalty or stop; leave out beams.")


class SamplingArrays(NamedTuple):
    """``SamplingParams`` of every sequence, inside a program; None where no sequence uses one, which then costs
    nothing. Seeds are u32[B], ``top_k_B`` is i32[B], the others f32[B].
    """

    seed_B: Array | None = None
    temperature_B: Array | None = None
    top_k_B: Array | None = None
    top_p_B: Array | None = None
    min_p_B: Array | None = None
    repetition_penalty_B: Array | None = None

    @classmethod
    def of(cls, params: Sequence[SamplingParams], B: int, few: bool = False) -> SamplingArrays:
        """Those of the first sequences of B; the others are greedy.

        Args:
          few: make none of the arrays, the first two or all of them: three programs serve every mixture.
        """
        every = [*params, *[SamplingParams()] * (B - len(params))]
        filters = ("top_k", "top_p", "min_p", "repetition_penalty")
        whole = few and any(getattr(p, name) != getattr(SamplingParams, name) for p in every for name in filters)

        def column(name: str, dtype: Any) -> jax.Array | None:
            unused, values = getattr(SamplingParams, name), [getattr(p, name) for p in every]
            return None if not whole and all(value == unused for value in values) else jnp.asarray(values, dtype)

        temperature_B = column("temperature", jnp.float32)
        seed_B = None if temperature_B is None else jnp.asarray(np.array([p.seed for p in every], np.uint32))
        top_k_B, *others_B = (column(name, jnp.float32 if i else jnp.int32) for i, name in enumerate(filters))
        return cls(seed_B, temperature_B, top_k_B, *others_B)


class State(NamedTuple):
    """Sequences that are being written.

    Attributes:
      cache: of the tokens before the last one.
      tokens_BS: i32[B,S], the prompts and what follows; the token at place p has the position p.
      length_B: i32[B], of the prompts.
      position_B: i32[B], that of the next token: so many there are.
      limit_B: i32[B], how many new tokens each may have.
      done_B: bool[B], which sequences have ended; nothing changes about these.
    """

    cache: PyTree
    tokens_BS: Array
    length_B: Array
    position_B: Array
    limit_B: Array
    done_B: Array


def prefill(
    model: Any,
    variables: Variables,
    cache: PyTree,
    tokens_BL: Array,
    position_B: Array,
    last_B: Array | None = None,
    *source: Array,
) -> tuple[jax.Array, PyTree]:
    """Reads tokens, which stand at the positions from ``position_B`` on, into the cache.

    Args:
      last_B: after which of the L tokens the logits are wanted; None: after the last one.

    Returns:
      (logits f32[B,V], the cache with all of the tokens in it).
    """
    if hasattr(model, "prefill"):  # of another engine, which does all of it at once
        last_B = jnp.full(tokens_BL.shape[0], tokens_BL.shape[1] - 1) if last_B is None else last_B
        found: tuple[jax.Array, PyTree] = model.prefill(cache, tokens_BL, position_B, last_B)
        return found
    y_BLD, kept = model.apply(
        {**variables, "cache": cache}, tokens_BL, position_B, *source, method="decode", mutable=["cache"]
    )
    y_B1D = y_BLD[:, -1:] if last_B is None else jnp.take_along_axis(y_BLD, last_B[:, None, None], 1)
    return model.apply(variables, y_B1D, method="logits")[:, 0], kept["cache"]


def init(
    logits_BV: jax.Array,
    cache: PyTree,
    tokens_BL: Array,
    length_B: Array,
    limit_B: Array,
    places: int,
    params: SamplingArrays,
    ends_E: Array,
) -> State:
    """The first new token after the prompts, which the cache holds and these logits follow; ``places`` is S."""
    B, L = tokens_BL.shape
    tokens_BS = jnp.zeros((B, places), jnp.int32).at[:, :L].set(tokens_BL)
    state = State(cache, tokens_BS, length_B, length_B, limit_B, limit_B <= 0)
    return _written(state, logits_BV, params, ends_E)


def decode(model: Any, variables: Variables, state: State, params: SamplingArrays, ends_E: Array, steps: Any) -> State:
    """So many more tokens of every sequence, or fewer where all have ended."""

    def more(carry: tuple[Any, State]) -> Any:
        step, state = carry
        return (step < steps) & ~jnp.all(state.done_B)

    def one(carry: tuple[Any, State]) -> tuple[Any, State]:
        step, state = carry
        logits_BV, cache = prefill(
            model, variables, state.cache, _last(state._replace(cache=None)), state.position_B - 1
        )
        return step + 1, _written(state._replace(cache=cache), logits_BV, params, ends_E)

    carry = jnp.int32(0), state
    if hasattr(model, "prefill") and not isinstance(state.position_B, jax.core.Tracer):  # no program's part
        while more(carry):
            carry = one(carry)
        return carry[1]
    return jax.lax.while_loop(more, one, carry)[1]


def _written(state: State, logits_BV: jax.Array, params: SamplingArrays, ends_E: Array) -> State:
    """One more token for each sequence that has not ended, which these logits follow."""
    return _append(state._replace(cache=None), logits_BV, params, ends_E)._replace(cache=state.cache)


@functools.partial(jax.jit, inline=True)
def _last(state: State) -> jax.Array:
    """The last token of each sequence, i32[B,1]."""
    return jnp.take_along_axis(state.tokens_BS, state.position_B[:, None] - 1, 1)


@functools.partial(jax.jit, inline=True)
def _append(state: State, logits_BV: jax.Array, params: SamplingArrays, ends_E: Array) -> State:
    token_B = choose(logits_BV, state, params)
    goes_on_B = ~state.done_B
    here_BS = (jnp.arange(state.tokens_BS.shape[1]) == state.position_B[:, None]) & goes_on_B[:, None]
    position_B = state.position_B + goes_on_B
    ended_B = jnp.any(token_B[:, None] == ends_E, -1) | (position_B - state.length_B >= state.limit_B)
    tokens_BS = jnp.where(here_BS, token_B[:, None], state.tokens_BS)
    return state._replace(tokens_BS=tokens_BS, position_B=position_B, done_B=state.done_B | ended_B)


def end_tokens(end: int | Sequence[int] | None) -> jax.Array:
    """i32[E] of the tokens that end a sequence; [-1], which no token is, where there are none."""
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    return jnp.array(ends or [-1], jnp.int32)


def greedy_tokens(
    model: Any,
    variables: Variables,
    tokens_BL: Array,
    length_B: Array | None = None,
    *,
    max_new_tokens: int,
    end: int | None = None,
    source_BS: Array | None = None,
) -> jax.Array:
    """The most probable token, again and again: i32[B,T], T being ``max_new_tokens``.

    Args:
      tokens_BL: prompts of at least one token, shorter ones padded on the right; a decoder's start token.
      length_B: of each prompt; None: L.
      end: the token that ends a sequence; it is the last one, and fills what is left. None: there is none.
      source_BS: what the model translates.
    """
    (B, L), T, ends_E = tokens_BL.shape, max_new_tokens, end_tokens(end)
    logits_BV, cache, length_B = read_prompts(model, variables, tokens_BL, length_B, L + T, source_BS)
    limit_B = jnp.full(B, T, jnp.int32)
    state = init(logits_BV, cache, tokens_BL, length_B, limit_B, L + T, SamplingArrays(), ends_E)
    state = decode(model, variables, state, SamplingArrays(), ends_E, T)
    place_BT = length_B[:, None] + jnp.arange(T)
    tokens_BT = jnp.take_along_axis(state.tokens_BS, place_BT, 1)
    return jnp.where(place_BT < state.position_B[:, None], tokens_BT, 0 if end is None else end)


def read_prompts(
    model: Any,
    variables: Variables,
    tokens_BL: Array,
    length_B: Array | None,
    places: int,
    source_BS: Array | None,
) -> tuple[jax.Array, PyTree, jax.Array]:
    """(logits f32[B,V] of the token after each whole prompt, a cache of so many places, lengths i32[B])."""
    B, L = tokens_BL.shape
    length_B = jnp.full(B, L, jnp.int32) if length_B is None else jnp.asarray(length_B, jnp.int32)
    source = () if source_BS is None else (source_BS,)
    cache = model.cache(B, places, *(x.shape[1] for x in source))
    start_B = jnp.zeros(B, jnp.int32)
    tokens_BL = jnp.asarray(tokens_BL, jnp.int32)
    logits_BV, cache = prefill(model, variables, cache, tokens_BL, start_B, length_B - 1, *source)
    return logits_BV, cache, length_B


def choose(logits_BV: jax.Array, state: State, params: SamplingArrays) -> jax.Array:
    """The next token i32[B] of each sequence, from its logits f32[B,V].

    The randomness of the n-th new token depends on the sequence's seed and n alone.
    """
    if params.repetition_penalty_B is not None:
        real_BS = jnp.arange(state.tokens_BS.shape[1]) < state.position_B[:, None]
        seen_BV = seen_tokens(state.tokens_BS, real_BS, logits_BV.shape[1])
        logits_BV = penalise(logits_BV, seen_BV, params.repetition_penalty_B)
    best_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)
    if params.temperature_B is None:
        return best_B

    def noise(seed: Any, n: Any) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), n), logits_BV.shape[1:])

    noise_BV = jax.vmap(noise)(params.seed_B, state.position_B - state.length_B)
    drawn_B = jnp.argmax(filtered(logits_BV, params) + noise_BV, -1)  # Gumbel's trick
    return jnp.where(params.temperature_B > 0, drawn_B, best_B).astype(jnp.int32)


def seen_tokens(tokens_BS: Array, real_BS: Array, vocab_size: int) -> jax.Array:
    """bool[B,V]: which entries of the vocabulary are among the real ones of these tokens."""
    rows_B1 = jnp.arange(len(tokens_BS))[:, None]
    return jnp.zeros((len(tokens_BS), vocab_size), bool).at[rows_B1, tokens_BS].max(real_BS)


def penalise(logits_BV: jax.Array, seen_BV: Array, penalty_B: Array) -> jax.Array:
    """The repetition penalty; see ``SamplingParams``."""
    penalty_B1 = penalty_B[:, None]
    return jnp.where(seen_BV, jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1), logits_BV)


def filtered(logits_BV: jax.Array, params: SamplingArrays) -> jax.Array:
    """Logits over the temperature; -inf where top-k, top-p or min-p leave a token out."""
    assert params.temperature_B is not None
    temperature_B1 = params.temperature_B[:, None]
    logits_BV = logits_BV / jnp.where(temperature_B1 > 0, temperature_B1, 1.0)
    if params.top_k_B is not None:
        k_B = jnp.where(params.top_k_B > 0, params.top_k_B, logits_BV.shape[1])
        logits_BV = _best(logits_BV, lambda kept_BV: jnp.sum(kept_BV, -1) >= k_B)
    if params.top_p_B is not None:
        p_B, probability_BV = params.top_p_B, jax.nn.softmax(logits_BV)
        some_BV = _best(logits_BV, lambda kept_BV: jnp.sum(jnp.where(kept_BV, probability_BV, 0), -1) >= p_B)
        logits_BV = jnp.where(p_B[:, None] < 1, some_BV, logits_BV)  # whose sum may round to 1 too early
    if params.min_p_B is not None:
        share_BV = jnp.exp(logits_BV - jnp.max(logits_BV, -1, keepdims=True))
        logits_BV = jnp.where(share_BV < params.min_p_B[:, None], -jnp.inf, logits_BV)
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
