"""Transcripts: tokens of what is heard, with the rules that Whisper's are written by; pure functions, to be compiled.

The rules are those of the authors' code and of transformers: timestamps come in pairs but before the end, never fall,
the first stands at the beginning, and one is written wherever all of them together are likelier than any text.

Axes: B windows, L length of the prompts, S places of the encoder, D its width, T new tokens, V the vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Array, PyTree, Variables


@dataclasses.dataclass(frozen=True)
class Rules:
    """What may be written.

    Attributes:
      end: the token that ends a transcript.
      no_timestamps: the token that says that there are none, which those of times follow; None: the model has no times.
      timestamps: whether times are written.
      first: the latest time that the first one may have, as a number of timestamps; None: any.
      suppress, begin_suppress: tokens that are never written, and those that are not the first.
    """

    end: int
    no_timestamps: int | None = None
    timestamps: bool = False
    first: int | None = None
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()


class Written(NamedTuple):
    """What was written of each window.

    Attributes:
      tokens_BT: i32, filled with the end.
      count_B: i32, how many of these, the end included.
      log_p_B: f32, the sum of their log-probabilities at the temperature 1.
      no_speech_B: f32, the probability that there is no speech, after the start token; 0 where no token says it.
    """

    tokens_BT: Array
    count_B: Array
    log_p_B: Array
    no_speech_B: Array


class _State(NamedTuple):
    cache: PyTree
    logits_BV: Array
    tokens_BT: Array
    t: Array
    count_B: Array
    log_p_B: Array
    latest_B: Array  # the last timestamp
    done_B: Array


def allowed(logits_BV: Array, rules: Rules, t: Any, tokens_BT: Array, latest_B: Array) -> jax.Array:
    """The logits of the ``t``-th new token, -inf for those that the rules do not allow."""
    at_V = np.arange(logits_BV.shape[1])
    logits_BV = jnp.where((t == 0) & np.isin(at_V, rules.begin_suppress), -jnp.inf, logits_BV)
    logits_BV = jnp.where(np.isin(at_V, rules.suppress), -jnp.inf, logits_BV)
    if rules.no_timestamps is None or not rules.timestamps:
        return logits_BV
    begin = rules.no_timestamps + 1
    time_V = at_V >= begin
    last_B = tokens_BT[:, jnp.maximum(t - 1, 0)]
    last_is_time_B1 = ((t >= 1) & (last_B >= begin))[:, None]
    before_is_time_B1 = ((t < 2) | (tokens_BT[:, jnp.maximum(t - 2, 0)] >= begin))[:, None]
    pair_B1 = last_is_time_B1 & before_is_time_B1  # text has to follow
    single_B1 = last_is_time_B1 & ~before_is_time_B1  # the pair's second one, or the end
    least_B1 = latest_B[:, None] + ~single_B1
    least_B1 = jnp.where(latest_B[:, None] < 0, begin, least_B1)
    never = (at_V == rules.no_timestamps) | (pair_B1 & time_V) | (single_B1 & (at_V < rules.end))
    never |= time_V & (at_V < least_B1)
    never |= (t == 0) & ~time_V
    if rules.first is not None:
        never |= (t == 0) & (at_V > begin + rules.first)
    logits_BV = jnp.where(never, -jnp.inf, logits_BV)
    log_p_BV = jax.nn.log_softmax(logits_BV)
    times_B = jax.nn.logsumexp(log_p_BV[:, begin:], -1)
    rather_B1 = (times_B > jnp.max(log_p_BV[:, :begin], -1))[:, None]
    return jnp.where(rather_B1 & ~time_V, -jnp.inf, logits_BV)


def transcript_tokens(
    model: Any,
    variables: Variables,
    memory_BSD: Array,
    prompt_BL: Array,
    length_B: Array,
    start_B: Array,
    rules: Rules,
    *,
    places: int,
    temperature: Any = 0.0,
    seed: Any = 0,
    no_speech: int | None = None,
) -> Written:
    """What follows the prompts: the most probable tokens, or drawn ones.

    Args:
      model: has ``cache`` and ``decode``, whose source is the memory, and ``logits``; see ``sampling``.
      memory_BSD: the windows as its encoder gives them.
      prompt_BL, length_B: what is in front of each transcript, shorter ones padded on the right.
      start_B: the place of the start token in it.
      places: tokens of a prompt and its transcript together, at most.
      temperature: f32[]; 0: the most probable token.
      no_speech: the token whose probability after the start is given.
    """
    B = len(prompt_BL)
    cache = model.cache(B, places, memory_BSD.shape[1])
    zero_B = jnp.zeros(B, jnp.int32)

    def read(cache: PyTree, tokens_BL: Array, position_B: Array, *memory: Array) -> tuple[Any, PyTree]:
        y_BLD, kept = model.apply(
            {**variables, "cache": cache}, tokens_BL, position_B, *memory, method="decode", mutable=["cache"]
        )
        return y_BLD, kept["cache"]

    def logits_at(y_BLD: Array, place_B: Array) -> jax.Array:
        y_B1D = jnp.take_along_axis(y_BLD, place_B[:, None, None], 1)
        found: jax.Array = model.apply(variables, y_B1D, method="logits")[:, 0]
        return found

    y_BLD, cache = read(cache, jnp.asarray(prompt_BL, jnp.int32), zero_B, memory_BSD)
    no_speech_B = jnp.zeros(B)
    if no_speech is not None:
        no_speech_B = jax.nn.softmax(logits_at(y_BLD, start_B))[:, no_speech]
    T = places - 1
    state = _State(
        cache,
        logits_at(y_BLD, length_B - 1),
        jnp.full((B, T), rules.end, jnp.int32),
        jnp.int32(0),
        zero_B,
        jnp.zeros(B),
        zero_B - 1,
        length_B >= places,
    )

    def one(state: _State) -> _State:
        t = state.t
        logits_BV = allowed(state.logits_BV, rules, t, state.tokens_BT, state.latest_B)
        noise_BV = jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), t), logits_BV.shape)
        heat = jnp.asarray(temperature, jnp.float32)
        drawn_BV = logits_BV / jnp.where(heat > 0, heat, 1.0) + jnp.where(heat > 0, noise_BV, 0.0)
        token_B = jnp.argmax(drawn_BV, -1).astype(jnp.int32)
        log_p_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], 1)[:, 0]
        goes_on_B = ~state.done_B
        token_B = jnp.where(goes_on_B, token_B, rules.end)
        count_B = state.count_B + goes_on_B
        is_time_B = goes_on_B & (token_B > (rules.no_timestamps if rules.no_timestamps is not None else 1 << 30))
        done_B = state.done_B | (token_B == rules.end) | (length_B + count_B >= places)
        y_B1D, cache = read(state.cache, token_B[:, None], jnp.minimum(length_B + t, places - 1))
        return _State(
            cache,
            logits_at(y_B1D, zero_B),
            jax.lax.dynamic_update_slice_in_dim(state.tokens_BT, token_B[:, None], t, 1),
            t + 1,
            count_B,
            state.log_p_B + jnp.where(goes_on_B, log_p_B, 0.0),
            jnp.where(is_time_B, token_B, state.latest_B),
            done_B,
        )

    def more(state: _State) -> Any:
        return (state.t < T) & ~jnp.all(state.done_B)

    state = jax.lax.while_loop(more, one, state)
    return Written(state.tokens_BT, state.count_B, state.log_p_B, no_speech_B)
