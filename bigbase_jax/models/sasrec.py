"""SASRec: a causal transformer over the items that a user has chosen, which gives the next one.

Axes: B examples, L length, D model width, V items of the catalogue, from 1, R rows of
their table: V + 1, as item 0 is padding.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from bigbase_jax.models.layers import DTYPES, ModelError, constrain
from bigbase_jax.models.transformer import Context, Style, Transformer

_init = nn.initializers.normal(0.02)


class SASRec(Transformer):
    """Self-attentive sequential recommendation (Kang & McAuley 2018), by the formulas of the paper, section III.

    Blocks are ``x + dropout(g(norm(x)))`` of attention and of a hidden layer of the model's own width with ReLU, and an
    item's score is its embedding times the last vector of the history. As in the authors' code, which the paper does
    not mention, embedded items are multiplied by the square root of D; unlike there, attention weights are not dropped.

    Padding may be before the items or behind them: positions count back from the last item.

    Attributes:
      num_items: V.
      length: the longest history.
      width, depth, heads: D, blocks, heads.
      mlp_dim: of the hidden layers; None: the width.
      style, dropout, dtype, remat, remat_policy, scan, sequence_attention, pipeline_microbatches: see ``Transformer``.

    Raises:
      ModelError: an unknown word among the attributes, sizes that are missing or do not divide, or a history that is
        too long.
    """

    num_items: int | None = None
    length: int | None = None
    width: int = 64
    depth: int = 2
    heads: int = 1
    mlp_dim: int | None = None
    style: Style = Style(activation="relu")
    causal = True

    def __post_init__(self) -> None:
        self.style.sizes(self.width, self.heads)
        super().__post_init__()

    def setup(self) -> None:
        self.check_given("num_items", "length")
        self.embedding = self.param("embedding", _init, ((self.num_items or 0) + 1, self.width))
        self.position = self.param("position", _init, (self.length, self.width))
        self.encoder = self.stack(self.depth, self.heads, self.mlp_dim or self.width, causal=True)

    def __call__(self, history_BL: Int[Array, "B L"], train: bool = False) -> Float32[Array, "B L R"]:
        """Scores of all items, 0 included, to come after each place of the history; summed in float32."""
        y_BLD = self.hidden(history_BL, train)
        table_RD = self.items().astype(y_BLD.dtype)
        return jnp.einsum("bld,rd->blr", y_BLD, table_RD, preferred_element_type=jnp.float32)

    def hidden(self, history_BL: Int[Array, "B L"], train: bool = False) -> Float[Array, "B L D"]:
        """What scores are computed from; at padding, nothing that could be used."""
        if history_BL.shape[1] > (self.length or 0):
            raise ModelError(f"a history of {history_BL.shape[1]} items is longer than the {self.length} of the model.")
        real_BL = (history_BL > 0).astype(jnp.int32)
        left_BL = jnp.cumsum(real_BL[:, ::-1], axis=1)[:, ::-1]  # items from here on: 1 at the last
        x_BLD: Any = self.embedding[history_BL] * self.width**0.5
        x_BLD = x_BLD + self.position[(self.length or 0) - jnp.maximum(left_BL, 1)]
        x_BLD = constrain(x_BLD.astype(DTYPES[self.dtype]), "batch", "length", "width")
        return self.encoder(x_BLD, train=train, context=Context(segment_ids=real_BL))

    def items(self, items: Int[Array, "*I"] | None = None) -> Float32[Array, "*_ D"]:
        """Vectors of these items, or of all, 0 included: their products with what ``hidden`` gives are scores."""
        return self.embedding if items is None else self.embedding[items]
