"""YOLOS: a vision transformer whose learned tokens beside the patches become boxes.

Axes: B examples, H height, W width, C channels, D model width, h and w: patches, Q detection tokens, y and x: patches
of the learned positions, N sets of those.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bigbase_jax.models.detr import PredictionHead, Predictions, inside
from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.layers import DTYPES, ModelError, classes, constrain
from bigbase_jax.models.transformer import Block, Style, Transformer
from bigbase_jax.models.vit import bicubic


class YOLOS(Transformer):
    """YOLOS (Fang et al. 2021): a ViT with detection tokens in the place of a decoder.

    Attributes:
      num_classes: of objects; the logits have one more.
      patch: side of the square patches in pixels.
      width, depth, heads, mlp_dim: of the ViT.
      grid: rows and columns of patches that the learned positions are of; other pictures have them resized.
      queries: Q, the objects that it can find at most.
      mid_positions: positions are added behind each block but the last as well.
      style, dropout, dtype: see ``Transformer``. Its blocks are never stacked.

    Raises:
      ModelError: a width that the heads do not divide, or a picture that the patches do not fill.
    """

    num_classes: int | None = None
    patch: int = 16
    width: int = 192
    depth: int = 12
    heads: int = 3
    mlp_dim: int | None = None
    grid: tuple[int, int] = (50, 83)
    queries: int = 100
    mid_positions: bool = False
    style: Style = dataclasses.field(default=Style(epsilon=1e-12), kw_only=True)

    SOFTMAX = True

    def __post_init__(self) -> None:
        self.style.sizes(self.width, self.heads)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x_BHWC: Float[Array, "B H W C"], valid_B2: Int[Array, "B 2"] | None = None, train: bool = False
    ) -> Predictions:
        """``valid_B2``: height and width of the real part of padded pictures, in the upper left corner; None: all."""
        B, H, W, _ = x_BHWC.shape
        P, D, Q, dtype = self.patch, self.width, self.queries, DTYPES[self.dtype]
        if H % P or W % P:
            raise ModelError(f"a picture of {H}x{W} does not divide into patches of {P}x{P}; resize or pad it.")
        (h, w), (y, x) = (H // P, W // P), self.grid
        embed = nn.Conv(D, (P, P), P, "VALID", dtype=dtype, name="embedding")
        x_BLD = embed(x_BHWC.astype(dtype)).reshape(B, -1, D)
        first_11D = self.param("cls", nn.initializers.zeros, (1, 1, D))
        tokens_1QD = self.param("tokens", nn.initializers.truncated_normal(0.02), (1, Q, D))
        first, last = (jnp.broadcast_to(t.astype(dtype), (B, *t.shape[1:])) for t in (first_11D, tokens_1QD))
        x_BLD = constrain(jnp.concatenate([first, x_BLD, last], 1), "batch", "length", "width")

        mask, wanted = None, (None, None)
        if valid_B2 is not None:
            patches_B2 = valid_B2 // P
            wanted = tuple(patches_B2.T)
            seen_BL = inside(patches_B2, (h, w), (h, w)).reshape(B, -1)
            mask = jnp.pad(seen_BL, ((0, 0), (1, Q)), constant_values=True)[:, None, None]
        rows, columns = (bicubic(n, size, k) for n, size, k in zip((y, x), (h, w), wanted, strict=True))

        def positions(name: str, sets: int) -> Any:
            shape = (sets, 1 + y * x + Q, D)
            learned = self.param(name, nn.initializers.truncated_normal(0.02), shape)
            grid = learned[:, 1 : 1 + y * x].reshape(sets, y, x, D)
            resized = jnp.einsum("...hy,...wx,nyxd->n...hwd", rows, columns, grid)
            resized = resized.reshape(sets, -1, h * w, D)
            first, last = (
                jnp.broadcast_to(p[:, None], (*resized.shape[:2], *p.shape[1:]))
                for p in (learned[:, :1], learned[:, 1 + y * x :])
            )
            return jnp.concatenate([first, resized, last], 2).astype(dtype)

        x_BLD = x_BLD + positions("position", 1)[0]
        x_BLD = Dropout(self.dropout, deterministic=not train)(x_BLD)
        middle = positions("mid_position", self.depth - 1) if self.mid_positions and self.depth > 1 else None
        for i in range(self.depth):
            words: Any = {"dropout": self.dropout, "dtype": self.dtype, "style": self.style}
            x_BLD = Block(self.heads, self.mlp_dim, **words, name=f"block_{i}")(x_BLD, mask, train)
            if middle is not None and i < self.depth - 1:
                x_BLD = x_BLD + middle[i]
        y_1BQD = self.style.normaliser(self.dtype, "norm")(x_BLD)[None, :, -Q:].astype(jnp.float32)
        logits = PredictionHead(classes(self.num_classes) + 1, name="head")(y_1BQD)
        return Predictions(logits, jax.nn.sigmoid(PredictionHead(4, name="box_head")(y_1BQD)))
