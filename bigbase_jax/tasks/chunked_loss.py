"""What tasks compute from logits, some positions at a time, so that B x L x V logits never exist.

Axes: B examples, L length, C chunks, l = L / C positions of one of them, D model width.
"""

from __future__ import annotations

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
