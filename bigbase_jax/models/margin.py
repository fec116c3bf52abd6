"""A head whose logits are cosines, and the margin that its loss asks for: ArcFace, or AAM-softmax.

Axes: B examples, D of a vector, K classes.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from bigbase_jax.models.layers import classes


class CosineHead(nn.Module):
    """A model of vectors with a class vector each: the cosines between both.

    Attributes:
      body: ``(x, train) -> vectors``, [B,D].
      num_classes: K.
    """

    body: nn.Module
    num_classes: int | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Float32[Array, "B K"]:
        vector_BD = unit(self.body(x, train).astype(jnp.float32))
        shape = vector_BD.shape[-1], classes(self.num_classes)
        return vector_BD @ unit(self.param("classes", nn.initializers.xavier_normal(), shape), 0)


def unit(x: Array, axis: int = -1) -> Array:
    """Of length 1 along an axis; zeros stay, and have a gradient."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis, keepdims=True) + 1e-12)


def with_margin(
    cosine_BK: Float[Array, "B K"], y_BK: Float[Array, "B K"], margin: float, scale: float
) -> Float[Array, "B K"]:
    """Logits ``scale cos(angle + margin)`` of the right class, ``scale cos(angle)`` of the others (Deng et al. 2019).

    Where the angle plus the margin is beyond pi, the cosine less ``margin sin(margin)``, as in their code.
    """
    cosine = jnp.clip(cosine_BK, -1 + 1e-6, 1 - 1e-6)
    moved = cosine * jnp.cos(margin) - jnp.sqrt(1 - cosine**2) * jnp.sin(margin)
    moved = jnp.where(cosine > -jnp.cos(margin), moved, cosine - margin * jnp.sin(margin))
    return scale * (cosine + y_BK * (moved - cosine))
