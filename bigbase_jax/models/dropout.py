"""Dropout whose random bits cost little: the compiler computes them in the loop that uses them.

Each element has 32 bits of its own, a hash of a key and of where the element is. So a mask depends neither on how the
array lies over devices, nor on ``jit``, ``vmap``, ``scan`` or recomputation; the first rows of a larger batch have the
masks of a smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)


class Dropout(nn.Module):
    """``nn.Dropout`` with cheaper bits: zeros with probability ``rate``, the rest scaled by ``1 / (1 - rate)``.

    Attributes:
      rate: probability of a zero, exact to 2^-32.
      broadcast_dims: axes along which the mask is the same.
      deterministic: return what is given.
    """

    rate: float
    broadcast_dims: Sequence[int] = ()
    deterministic: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*S"]) -> Float[Array, "*S"]:
        if self.deterministic or self.rate == 0:
            return x
        return dropout(self.make_rng("dropout"), x, self.rate, self.broadcast_dims)


def dropout(key: jax.Array, x: Any, rate: float, broadcast_dims: Sequence[int] = ()) -> Any:
    """``x``, with zeros at random; see ``Dropout``. Nothing else may be drawn from ``key``."""
    if rate == 1:  # 0 / 0
        return jnp.zeros_like(x)
    shape = [1 if axis in broadcast_dims else size for axis, size in enumerate(x.shape)]
    keep = random_bits(key, shape) < jnp.uint32(min(round((1 - rate) * 2**32), 2**32 - 1))
    return jnp.where(keep, (x.astype(jnp.float32) / (1 - rate)).astype(x.dtype), 0)


def random_bits(key: jax.Array, shape: Sequence[int]) -> UInt32[Array, "*S"]:
    """32 random bits per element, by 13 rounds of Threefry-2x32, those of the reduced variant of its library Random123.

    ``jax.random.bits`` takes 20 rounds, and on CPUs a loop over them that reads and writes the whole array in each:
    3 to 10 times the time of these, which become one pass over nothing but what is dropped. Salmon et al. 2011,
    "Parallel random numbers: as easy as 1, 2, 3". A key of another kind, such as "rbg", gives bits in its own way.
    """
    if str(jax.random.key_impl(key)) != "threefry2x32":
        return jax.random.bits(key, tuple(shape), jnp.uint32)
    k0, k1 = jax.random.key_data(key)
    return jnp.bitwise_xor(*_threefry(k0, k1, *_places(shape)))


def _places(shape: Sequence[int]) -> tuple[Any, Any]:
    """Two numbers that tell an element from all others: of its row, and within it (of up to 2^32 elements)."""
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(1, len(shape))):
        place += jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        stride *= shape[axis]
    return jax.lax.broadcasted_iota(jnp.uint32, shape, 0) if shape else place, place


def _threefry(k0: Any, k1: Any, x0: Any, x1: Any, rounds: int = 13) -> tuple[Any, Any]:
    """The hash of the words x under the key k, all uint32."""
    keys = k0, k1, k0 ^ k1 ^ jnp.uint32(0x1BD11BDA)
    x0, x1 = x0 + k0, x1 + k1
    for i in range(rounds):
        rotation = _ROTATIONS[i % 8]
        x0 = x0 + x1
        x1 = x0 ^ (x1 << rotation | x1 >> 32 - rotation)
        if i % 4 == 3:
            n = i // 4 + 1
            x0, x1 = x0 + keys[n % 3], x1 + keys[(n + 1) % 3] + jnp.uint32(n)
    return x0, x1
