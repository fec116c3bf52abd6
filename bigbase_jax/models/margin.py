"""A head whose logits are cosines, and the margin that its loss asks for: ArcFace, or AAM-softmax.

The vectors of classes are a parameter of D times K, which a mesh spreads by classes over its ``tensor`` axis
(``parallel.TENSOR_RULES``), logits and softmax with them: partial FC (An et al. 2021), for any number of people.

Axes: B examples, D of a vector, K classes, S classes of a sample.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from bigbase_jax.models.layers import classes, constrain


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
        return cosines(vector_BD, self.param("classes", nn.initializers.xavier_normal(), shape))


def cosines(vector_BD: Array, classes_DK: Array) -> Float32[Array, "B K"]:
    """Of vectors of length 1 and those of classes, which need not be."""
    return constrain(vector_BD @ unit(classes_DK, 0), "batch", "vocab")


def sampled(key: Array, label_B: Array, num_classes: int, size: int) -> tuple[Array, Array]:
    """Some classes, all of a batch among them and others drawn (An et al. 2021, section 3.2).

    Args:
      size: S, at least the number of different labels.

    Returns:
      which classes, i32[S], and where among them each label is, i32[B].
    """
    score_K = jax.random.uniform(key, (num_classes,)).at[label_B].add(1.0, mode="drop")
    class_S = jnp.sort(jax.lax.top_k(score_K, size)[1])
    return class_S, jnp.searchsorted(class_S, label_B)


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
