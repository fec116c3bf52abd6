"""Which query is which object: the assignment of least cost, on the device and by SciPy on the host.

Axes: B problems, M objects, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

_MOST = 1e6  # a cost that is none, or greater


class _State(NamedTuple):
    """Of one problem: duals ``row_M`` and ``column_Q``, and the object of each query (-1: none)."""

    row_M: jax.Array
    column_Q: jax.Array
    object_Q: jax.Array


def on_device(cost_BMQ: jax.Array, mask_BM: jax.Array) -> jax.Array:
    """i32[B, M]: the query of each object, such that the sum of their costs is the least; 0 where the mask is.

    By shortest augmenting paths (Jonker & Volgenant 1987, as Crouse 2016 has it and SciPy computes it): objects come
    one by one, and each takes the cheapest way of moving those before it. All problems go in step.

    Raises:
      ValueError: there are more objects than queries.
    """
    _check(cost_BMQ)
    return jax.vmap(_assigned)(_finite(cost_BMQ), mask_BM > 0)


def _assigned(cost_MQ: jax.Array, real_M: jax.Array) -> jax.Array:
    M, Q = cost_MQ.shape
    row, queries = jnp.arange(M), jnp.arange(Q)

    def add(m: Any, state: _State) -> _State:
        def search(carry: Any) -> Any:
            last, least, length_Q, from_Q, seen_Q, _ = carry
            reduced_Q = least + cost_MQ[last] - state.row_M[last] - state.column_Q
            nearer_Q = ~seen_Q & (reduced_Q < length_Q)
            length_Q, from_Q = jnp.where(nearer_Q, reduced_Q, length_Q), jnp.where(nearer_Q, last, from_Q)
            q = jnp.argmin(jnp.where(seen_Q, jnp.inf, length_Q))
            return state.object_Q[q], length_Q[q], length_Q, from_Q, seen_Q | (queries == q), q

        first = (m, jnp.float32(0), jnp.full(Q, jnp.inf), jnp.full(Q, -1), jnp.zeros(Q, bool), jnp.int32(0))
        first = (jnp.where(real_M[m], m, -1), *first[1:])
        _, least, length_Q, from_Q, seen_Q, end = jax.lax.while_loop(lambda carry: carry[0] >= 0, search, first)
        passed_Q = jnp.where(seen_Q, least - length_Q, 0.0)
        by_M = jnp.zeros(M).at[jnp.where(seen_Q, state.object_Q, M)].add(passed_Q, mode="drop")  # end has no object
        row_M = state.row_M + by_M + jnp.where(row == m, least, 0.0)

        def turn(carry: Any) -> Any:  # back along the path, each query gets the object before it
            q, object_Q, _ = carry
            found = from_Q[q]
            before = jnp.argmax(object_Q == found)
            return before, object_Q.at[q].set(found), found != m

        _, object_Q, _ = jax.lax.while_loop(lambda carry: carry[2], turn, (end, state.object_Q, real_M[m]))
        return _State(row_M, state.column_Q - passed_Q, object_Q)

    start = _State(jnp.zeros(M), jnp.zeros(Q), jnp.full(Q, -1))
    object_Q = jax.lax.fori_loop(0, M, add, start).object_Q
    return jnp.argmax(object_Q == row[:, None], -1).astype(jnp.int32)


def on_host(cost_BMQ: jax.Array, mask_BM: jax.Array) -> jax.Array:
    """``on_device`` by ``scipy.optimize.linear_sum_assignment``: the costs go to the host, and the step waits.

    Raises:
      ValueError: there are more objects than queries.
    """
    _check(cost_BMQ)

    def solve(cost_BMQ: Any, mask_BM: Any) -> np.ndarray:
        cost_BMQ, real_BM = np.asarray(cost_BMQ), np.asarray(mask_BM) > 0
        found_BM = np.zeros(real_BM.shape, np.int32)
        for found_M, cost_MQ, real_M in zip(found_BM, cost_BMQ, real_BM, strict=True):
            found_M[real_M] = scipy.optimize.linear_sum_assignment(cost_MQ[real_M])[1]
        return found_BM

    shape = jax.ShapeDtypeStruct(mask_BM.shape, np.int32)
    found: jax.Array = jax.pure_callback(solve, shape, _finite(cost_BMQ), mask_BM)
    return found


MATCHERS: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"device": on_device, "host": on_host}


def _finite(cost_BMQ: jax.Array) -> jax.Array:
    """What is no number costs more than anything: a run that diverges ends by its loss, and not in a loop."""
    finite = jnp.nan_to_num(cost_BMQ.astype(jnp.float32), nan=_MOST, posinf=_MOST, neginf=-_MOST)
    return jnp.clip(finite, -_MOST, _MOST)


def _check(cost_BMQ: jax.Array) -> None:
    M, Q = cost_BMQ.shape[1:]
    if M > Q:
        raise ValueError(f"{M} objects do not find a query each among {Q}")
