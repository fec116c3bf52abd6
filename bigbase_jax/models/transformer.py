"""The pre-norm transformer encoder that pictures and text share.

Axes: B examples, L length, D model width, H heads, K head width, M width of the hidden layer.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bigbase_jax.models.layers import DTYPES, ModelError

EPSILON = 1e-6
kernel_init = nn.initializers.xavier_uniform()


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention of a sequence to itself (Vaswani et al. 2017); softmax in float32.

    Attributes:
      heads: H; must divide D.
      causal: let position i see positions up to i only.
      dtype: of the computation.
    """

    heads: int
    causal: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], mask: Bool[Array, "B _ _ L"] | None = None
    ) -> Float[Array, "B L D"]:
        """``mask`` is True where the query (third axis) may see the key (last axis)."""
        D, dtype = x_BLD.shape[-1], DTYPES[self.dtype]
        if D % self.heads:
            raise ModelError(f"a width of {D} does not divide over {self.heads} heads.")

        def project(name: str) -> Float[Array, "B L H K"]:
            shape = (self.heads, D // self.heads)
            return nn.DenseGeneral(shape, dtype=dtype, kernel_init=kernel_init, name=name)(x_BLD)

        y_BLHK = jax.nn.dot_product_attention(
            project("query"), project("key"), project("value"), mask=mask, is_causal=self.causal
        )
        return nn.DenseGeneral(D, axis=(-2, -1), dtype=dtype, kernel_init=kernel_init, name="out")(y_BLHK)


class FeedForward(nn.Module):
    """Dense, GELU (exact), dense.

    Attributes:
      mlp_dim: M.
      dropout: rate after the GELU.
      dtype: of the computation.
    """

    mlp_dim: int
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"], train: bool = False) -> Float[Array, "B L D"]:
        dtype, bias_init = DTYPES[self.dtype], nn.initializers.normal(1e-6)
        h_BLM = nn.Dense(self.mlp_dim, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name="up")(x_BLD)
        h_BLM = nn.Dropout(self.dropout, deterministic=not train)(jax.nn.gelu(h_BLM, approximate=False))
        D = x_BLD.shape[-1]
        return nn.Dense(D, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name="down")(h_BLM)


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``.

    Attributes:
      dropout: rate after the GELU and on the output of each branch; attention weights are not dropped.
      drop_path: probability that a branch is left out for a whole example (stochastic depth, Huang et al. 2016); those
        kept are scaled by ``1 / (1 - drop_path)``.
    """

    heads: int
    mlp_dim: int
    causal: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], mask: Bool[Array, "B _ _ L"] | None = None, train: bool = False
    ) -> Float[Array, "B L D"]:
        dtype = DTYPES[self.dtype]

        def drop(y_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
            y_BLD = nn.Dropout(self.dropout, deterministic=not train)(y_BLD)
            return nn.Dropout(self.drop_path, broadcast_dims=(1, 2), deterministic=not train)(y_BLD)

        y_BLD = nn.LayerNorm(EPSILON, dtype=dtype, name="norm1")(x_BLD)
        x_BLD = x_BLD + drop(SelfAttention(self.heads, self.causal, self.dtype, name="attention")(y_BLD, mask))
        y_BLD = nn.LayerNorm(EPSILON, dtype=dtype, name="norm2")(x_BLD)
        return x_BLD + drop(FeedForward(self.mlp_dim, self.dropout, self.dtype, name="mlp")(y_BLD, train))


class Encoder(nn.Module):
    """A stack of blocks and a last LayerNorm.

    Attributes:
      depth, heads, mlp_dim: numbers of blocks, heads and hidden units.
      causal: let position i see positions up to i only.
      dropout: see ``Block``.
      drop_path: of the last block, growing linearly from 0 at the first.
      dtype: of the computation, "float32" or "bfloat16".
      remat: compute the blocks' activations again in the backward pass instead of keeping them.
    """

    depth: int
    heads: int
    mlp_dim: int
    causal: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: str = "float32"
    remat: bool = False

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], mask: Bool[Array, "B _ _ L"] | None = None, train: bool = False
    ) -> Float[Array, "B L D"]:
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        x_BLD = nn.Dropout(self.dropout, deterministic=not train)(x_BLD.astype(DTYPES[self.dtype]))
        for i in range(self.depth):
            drop_path = self.drop_path * i / max(1, self.depth - 1)
            x_BLD = block(
                self.heads, self.mlp_dim, self.causal, self.dropout, drop_path, self.dtype, name=f"block_{i}"
            )(x_BLD, mask, train)
        return nn.LayerNorm(EPSILON, dtype=DTYPES[self.dtype], name="norm")(x_BLD)


def sincos2d(h: int, w: int, width: int, temperature: float = 10_000.0) -> Float[Array, "L D"]:
    """Fixed positions of an h x w grid, row by row: sines and cosines of x, then of y (Chen et al. 2021, MoCo v3).

    Raises:
      ModelError: the width is not a multiple of 4.
    """
    if width % 4:
        raise ModelError(f"a width of {width} is not a multiple of 4, which sincos2d positions need.")
    y, x = jnp.mgrid[:h, :w]
    omega = temperature ** -jnp.linspace(0, 1, width // 4)
    angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]
    return jnp.concatenate([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=1)
