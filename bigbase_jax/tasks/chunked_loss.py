"""What tasks compute from logits, some positions at a time, so that B x L x V logits never exist.

Axes: B examples, L length, C chunks, l = L / C positions of one of them, D model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bigbase_jax.core import Array, PyTree, UserError

CHUNK_LOGITS = 2**22
"""How many logits of an example are held at once, where the number of chunks is left open: 16 MB in float32."""


def count(L: int, vocab_size: int | None, given: int | None = None) -> int:
    """C: what is given, or else as many as keep an example's logits of one part below ``CHUNK_LOGITS``.

    Raises:
      UserError: what is given does not divide L.
    """
    if given is not None:
        if L % given:
            raise UserError(f"logit_chunks {given} does not divide a length of {L}.")
        return given
    if L * (vocab_size or 1) <= CHUNK_LOGITS:  # also of any length up to one, in a program that is exported
        return 1
    wanted = L * (vocab_size or 1) / CHUNK_LOGITS
    return next(c for c in range(1, L + 1) if L % c == 0 and (c >= wanted or c == L))


def over_chunks(of_chunk: Callable[[Any, Any], PyTree], y_BLD: PyTree, targets_BL: Array, C: int) -> PyTree:
    """``of_chunk(y_BlD, targets_Bl)``, arrays [B, l, ...], one chunk after the other; its gradient computes it again.

    A chunk takes every C-th position: where devices share a sequence, each has its part of every chunk.

    Args:
      y_BLD: f32[B,L,D], or several such arrays.
    """
    if C == 1:
        return of_chunk(y_BLD, targets_BL)
    B, L = jnp.shape(targets_BL)
    given = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(B, L // C, C, *x.shape[2:]), 2, 0), (y_BLD, jnp.asarray(targets_BL))
    )
    found = jax.lax.map(lambda chunk: jax.checkpoint(of_chunk)(*chunk), given)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(B, L, *x.shape[3:]), found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def over_targets(
    of_some: Callable[[PyTree, Any, Any], Array], params: PyTree, y_ND: Array, target_N: Array, n: int
) -> Array:
    """The sum f32[] of ``of_some(params, y_nD, target_n)`` over all places that have a target, n of them at a time.

    Places without one (0) are neither computed nor kept, and the gradient is found in the same pass as the sum, so that
    no logits are kept or computed again.

    Args:
      of_some: f32[] of n places, those without a target among them counting nothing; it may read no other arrays.
    """
    return _in_parts(of_some, params, y_ND, target_N, n, False)[0]


def _in_parts(of_some: Any, params: PyTree, y_ND: Array, target_N: Array, n: int, grads: bool) -> tuple[Any, ...]:
    N, D = y_ND.shape
    order_N = jnp.argsort(target_N == 0, stable=True)
    fill = [(0, -N % n)]
    y_NnD = jnp.pad(y_ND[order_N], [*fill, (0, 0)]).reshape(-1, n, D)
    target_Nn = jnp.pad(target_N[order_N], fill).reshape(-1, n)

    def part(i: Array, before: tuple[Any, ...]) -> tuple[Any, ...]:
        given = params, y_NnD[i], target_Nn[i]
        if not grads:
            return (before[0] + of_some(*given),)
        total, (dparams, dy_nD) = jax.value_and_grad(of_some, (0, 1))(*given)
        return before[0] + total, jax.tree.map(jnp.add, before[1], dparams), before[2].at[i].set(dy_nD)

    start = (jnp.float32(0), *((jax.tree.map(jnp.zeros_like, params), jnp.zeros_like(y_NnD)) if grads else ()))
    found = jax.lax.fori_loop(0, (jnp.sum(target_N > 0) + n - 1) // n, part, start)
    if not grads:
        return found
    total, dparams, dy_NnD = found
    return total, dparams, jnp.zeros_like(y_ND).at[order_N].set(dy_NnD.reshape(-1, D)[:N])


def _sum_and_gradient(of_some: Any, params: PyTree, y_ND: Array, target_N: Array, n: int) -> tuple[Any, Any]:
    total, *gradient = _in_parts(of_some, params, y_ND, target_N, n, True)
    return total, gradient


def _scaled(of_some: Any, n: int, gradient: Any, by: Array) -> tuple[Any, Any, None]:
    dparams, dy_ND = jax.tree.map(lambda x: (by * x).astype(x.dtype), gradient)
    return dparams, dy_ND, None


over_targets.defvjp(_sum_and_gradient, _scaled)
