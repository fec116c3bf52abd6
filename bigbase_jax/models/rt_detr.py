"""RT-DETR: DETR in real time, from three maps of a backbone.

Axes: B examples, H height, W width, C channels, D model width, h and w: of a feature map, S places of all maps, Q
queries, K classes, G heads, E head width, R maps ("levels"), P points that a head looks at on each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bigbase_jax.models.detr import PredictionHead, Predictions
from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.layers import ACTIVATIONS, DTYPES, Conv, ModelError, classes
from bigbase_jax.models.resnet import ResNet
from bigbase_jax.models.transformer import KERNEL_INITS, Attention, Context, Encoder, FeedForward, Style, Transformer

_STYLE = Style(epsilon=1e-5, post_norm=True, activation="relu")
_zeros, _xavier = nn.initializers.zeros, KERNEL_INITS["xavier"]


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, activation (None: none)."""

    width: int
    kernel: int = 1
    stride: int = 1
    activation: str | None = None
    epsilon: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BhwC: Float[Array, "B h w C"], train: bool = False) -> Float[Array, "B _ _ D"]:
        k, pad, dtype = self.kernel, (self.kernel - 1) // 2, DTYPES[self.dtype]
        borders = [(pad, pad), (pad, pad)]
        x = Conv(self.width, (k, k), self.stride, borders, use_bias=False, dtype=dtype, name="conv")(x_BhwC)
        x = nn.BatchNorm(not train, momentum=0.9, epsilon=self.epsilon, dtype=dtype, name="norm")(x)
        return x if self.activation is None else ACTIVATIONS[self.activation](x)


class FusionBlock(nn.Module):
    """Two branches of a pair of maps, one through three RepVGG blocks (Ding et al. 2021), added (section 4.2).

    Attributes:
      width: of the result.
      hidden: of the branches; where it is another, a last convolution is behind them.
    """

    width: int
    hidden: int
    activation: str = "silu"
    epsilon: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BhwC: Float[Array, "B h w C"], train: bool = False) -> Float[Array, "B h w D"]:
        def conv(name: str, width: int, kernel: int, activation: str | None, x: Any) -> Any:
            return ConvNorm(width, kernel, 1, activation, self.epsilon, self.dtype, name=name)(x, train)

        act = self.activation
        y = conv("conv1", self.hidden, 1, act, x_BhwC)
        for i in range(3):
            wide, narrow = (conv(f"rep_{i}_conv{n}", self.hidden, k, None, y) for n, k in ((1, 3), (2, 1)))
            y = ACTIVATIONS[act](wide + narrow)
        y = y + conv("conv2", self.hidden, 1, act, x_BhwC)
        return y if self.hidden == self.width else conv("conv3", self.width, 1, act, y)


def sampled(
    value_BSGE: Float[Array, "B S G E"],
    shapes: Sequence[tuple[int, int]],
    at_BQGRP2: Float[Array, "B Q G R P 2"],
    share_BQGRP: Float[Array, "B Q G R P"],
) -> Float[Array, "B Q G E"]:
    """Bilinear samples of the maps, weighted and summed over maps and points (Zhu et al. 2020, equation 3).

    Each of the four neighbours of a point is gathered from the maps' places in one row, so that this is one gather and
    one product; what lies beyond a map counts as 0.

    Args:
      value_BSGE: the places of all maps, one map behind the other, each row by row.
      shapes: (h, w) of each map.
      at_BQGRP2: (x, y) of the points, in 0..1 of a map's sides.
      share_BQGRP: their weights.
    """
    B, _, G, E = value_BSGE.shape
    Q = at_BQGRP2.shape[1]
    sizes = np.array(shapes)
    starts_R1 = np.concatenate([[0], np.cumsum(sizes.prod(1))])[:-1, None]
    h_R1, w_R1 = sizes[:, :1], sizes[:, 1:]
    x = at_BQGRP2[..., 0] * w_R1 - 0.5
    y = at_BQGRP2[..., 1] * h_R1 - 0.5
    x0, y0 = jnp.floor(x), jnp.floor(y)
    places, weights = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = x0 + dx, y0 + dy
            weight = (1 - jnp.abs(x - column)) * (1 - jnp.abs(y - row)) * share_BQGRP
            there = (column >= 0) & (column < w_R1) & (row >= 0) & (row < h_R1)
            place = jnp.clip(row, 0, h_R1 - 1) * w_R1 + jnp.clip(column, 0, w_R1 - 1) + starts_R1
            places.append(place.astype(jnp.int32))
            weights.append(jnp.where(there, weight, 0))
    place_BQGN, weight_BQGN = (jnp.stack(x, -1).reshape(B, Q, G, -1) for x in (places, weights))
    place_BGN1 = jnp.moveaxis(place_BQGN, 1, 2).reshape(B, G, -1, 1)
    found_BGNE = jnp.take_along_axis(jnp.moveaxis(value_BSGE, 1, 2), place_BGN1, 2)
    found_BGQNE = found_BGNE.reshape(B, G, Q, -1, E)
    return jnp.einsum("bgqne,bqgn->bqge", found_BGQNE, weight_BQGN.astype(value_BSGE.dtype))


def _star(heads: int, levels: int, points: int) -> np.ndarray:
    """f32[G x R x P x 2]: where fresh heads look, each in a direction of its own and the further the later the point
    (Zhu et al. 2020, appendix A.3)."""
    theta_G = np.arange(heads) * 2 * math.pi / heads
    ray_G2 = np.stack([np.cos(theta_G), np.sin(theta_G)], -1)
    ray_G2 /= np.abs(ray_G2).max(-1, keepdims=True)
    steps_P1 = np.arange(1, points + 1)[:, None]
    return np.broadcast_to(ray_G2[:, None, None] * steps_P1, (heads, levels, points, 2)).reshape(-1).astype(np.float32)


class DeformableAttention(nn.Module):
    """Each query's heads look at a few points around its box, on all maps (Zhu et al. 2020).

    Attributes:
      heads: G.
      points: P.
      dtype: of the computation; places and weights are float32.
    """

    heads: int
    points: int = 4
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x_BQD: Float[Array, "B Q D"],
        box_BQ4: Float[Array, "B Q 4"],
        memory_BSD: Float[Array, "B S D"],
        shapes: Sequence[tuple[int, int]],
    ) -> Float[Array, "B Q D"]:
        """``box_BQ4``: centre and size, in 0..1; ``shapes``: of the maps whose places ``memory_BSD`` has."""
        B, Q, D = x_BQD.shape
        G, R, P, dtype = self.heads, len(shapes), self.points, DTYPES[self.dtype]
        value_BSGE = nn.Dense(D, dtype=dtype, kernel_init=_xavier, name="value")(memory_BSD).reshape(B, -1, G, D // G)
        star = _star(G, R, P)
        offset = nn.Dense(
            star.size, kernel_init=_zeros, bias_init=lambda key, shape, dtype=None: jnp.asarray(star), name="offset"
        )(x_BQD.astype(jnp.float32)).reshape(B, Q, G, R, P, 2)
        share = nn.Dense(G * R * P, kernel_init=_zeros, name="share")(x_BQD.astype(jnp.float32))
        share = jax.nn.softmax(share.reshape(B, Q, G, -1)).reshape(B, Q, G, R, P)
        centre, size = (x[:, :, None, None, None] for x in (box_BQ4[..., :2], box_BQ4[..., 2:]))
        found = sampled(value_BSGE, shapes, centre + offset / P * size * 0.5, share)
        return nn.Dense(D, dtype=dtype, kernel_init=_xavier, name="out")(found.reshape(B, Q, D))


class DecoderBlock(nn.Module):
    """A block of DETR's decoder with deformable attention across; normalised after each branch."""

    heads: int
    mlp_dim: int
    points: int
    dropout: float = 0.0
    dtype: str = "float32"
    style: Style = _STYLE

    @nn.compact
    def __call__(
        self, x_BQD: Any, position_BQD: Any, box_BQ4: Any, memory_BSD: Any, shapes: Any, train: bool = False
    ) -> Float[Array, "B Q D"]:
        def add(x: Any, name: str, y: Any) -> Any:
            return self.style.normaliser(self.dtype, name)(x + Dropout(self.dropout, deterministic=not train)(y))

        attend = Attention(self.heads, dtype=self.dtype, style=self.style, name="attention")
        x_BQD = add(x_BQD, "norm1", attend(x_BQD, None, Context(position=position_BQD)))
        across = DeformableAttention(self.heads, self.points, self.dtype, name="cross_attention")
        x_BQD = add(x_BQD, "norm_cross", across(x_BQD + position_BQD, box_BQ4, memory_BSD, shapes))
        feed = FeedForward(self.mlp_dim, self.dropout, self.dtype, self.style, name="mlp")
        return add(x_BQD, "norm2", feed(x_BQD, train))


def inverse_sigmoid(x: Any, epsilon: float = 1e-5) -> Any:
    """The logit of what lies in 0..1, both it and its complement being at least ``epsilon``."""
    x = jnp.clip(x, 0, 1)
    return jnp.log(jnp.maximum(x, epsilon) / jnp.maximum(1 - x, epsilon))


def anchors(shapes: Sequence[tuple[int, int]], size: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a box on each place of the maps, f32[S,4], twice as large on each map; and whether it lies well inside
    of the picture, bool[S,1]; others are at the largest float."""
    found = []
    for level, (h, w) in enumerate(shapes):
        y, x = np.mgrid[:h, :w].astype(np.float32) + 0.5
        side = np.full(x.shape, size * 2.0**level)
        found.append(np.stack([x / w, y / h, side, side], -1).reshape(-1, 4))
    box_S4 = np.concatenate(found).astype(np.float32)
    inside_S1 = np.all((box_S4 > 0.01) & (box_S4 < 0.99), -1, keepdims=True)
    safe_S4 = np.where(inside_S1, box_S4, 0.5)
    return np.where(inside_S1, np.log(safe_S4 / (1 - safe_S4)), np.finfo(np.float32).max), inside_S1


class RTDETR(Transformer):
    """RT-DETR (Zhao et al. 2023): a hybrid encoder, the likeliest places as queries, boxes refined block by block.

    The last map goes through a transformer, and all of them up and down a pyramid; of the places of all, those with the
    best class score are the queries. Classes are scored each by its own sigmoid.

    Attributes:
      num_classes: K.
      backbone: what gives the maps: a model that is called with ``features``, whose last three are read.
      width: D, of the decoder.
      encoder_width: of the hybrid encoder; None: D.
      depth, encoder_heads, encoder_mlp_dim: of the transformer on the last map.
      expansion: width of the branches of the pyramid's blocks, as a share of the encoder's.
      decoder_depth, heads, mlp_dim, points: of the decoder; ``points`` on each map for each head.
      queries: Q.
      activation: of the convolutions.
      encoder_activation: of the transformer on the last map.
      epsilon: of the encoder's BatchNorms.
      style, dropout, dtype, remat, ...: see ``Transformer``; ``style`` is the decoder's.

    Raises:
      ModelError: a width that does not divide over the heads, or a picture that is no multiple of 32.
    """

    num_classes: int | None = None
    backbone: Any = dataclasses.field(default=ResNet(depth=50, stem="deep", frozen=True), kw_only=True)
    width: int = 256
    encoder_width: int | None = None
    depth: int = 1
    encoder_heads: int = 8
    encoder_mlp_dim: int = 1024
    expansion: float = 1.0
    decoder_depth: int = 6
    heads: int = 8
    mlp_dim: int = 1024
    points: int = 4
    queries: int = 300
    activation: str = "silu"
    encoder_activation: str = "gelu"
    epsilon: float = 1e-5
    style: Style = dataclasses.field(default=_STYLE, kw_only=True)

    SOFTMAX = False

    def __post_init__(self) -> None:
        self.style.sizes(self.width, self.heads)
        width = self.encoder_width or self.width
        self.style.sizes(width, self.encoder_heads)
        if width % 4:
            raise ModelError(f"an encoder width of {width} is not a multiple of 4, which its positions need.")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x_BHWC: Float[Array, "B H W C"], valid_B2: Int[Array, "B 2"] | None = None, train: bool = False
    ) -> Predictions:
        """``valid_B2`` is not read: pictures are stretched to one size, or padded with a colour. In training the first
        predictions are those of the chosen places themselves."""
        H, W = x_BHWC.shape[1:3]
        if H % 32 or W % 32:
            raise ModelError(f"a picture of {H}x{W} is not a multiple of 32 on both sides, which RT-DETR's maps need.")
        maps = self._encoded(self.backbone(x_BHWC, train, features=True)[-3:], train)
        shapes = [x.shape[1:3] for x in maps]
        D, K = self.width, classes(self.num_classes)
        flat = []
        for i, x in enumerate(maps):
            x = ConvNorm(D, epsilon=self.epsilon, dtype=self.dtype, name=f"memory_{i}")(x, train)
            flat.append(x.reshape(len(x), -1, D))
        memory_BSD = jnp.concatenate(flat, 1)

        anchor_S4, inside_S1 = anchors(shapes)
        prior = nn.initializers.constant(-math.log(K))  # a probability of 1 / (K + 1)
        y_BSD = nn.Dense(D, dtype=DTYPES[self.dtype], name="place")(memory_BSD * inside_S1)
        y_BSD = self.style.normaliser(self.dtype, "place_norm")(y_BSD)
        score_BSK = nn.Dense(K, kernel_init=_xavier, bias_init=prior, name="place_head")(y_BSD.astype(jnp.float32))
        _, best_BQ = jax.lax.top_k(jnp.max(score_BSK, -1), min(self.queries, score_BSK.shape[1]))

        def chosen(x: Any) -> Any:
            return jnp.take_along_axis(x, best_BQ[..., None], 1)

        y_BQD = chosen(y_BSD)
        box_head = PredictionHead(4, last_init=_zeros, name="place_box_head")
        box_BQ4 = jax.nn.sigmoid(box_head(y_BQD.astype(jnp.float32)) + jnp.asarray(anchor_S4)[best_BQ])
        logits, boxes = [chosen(score_BSK)], [box_BQ4]
        y_BQD, box_BQ4 = jax.lax.stop_gradient((y_BQD, box_BQ4))
        positions = PredictionHead(D, 2, 2 * D, name="query_position")
        block = nn.remat(DecoderBlock, static_argnums=(5, 6)) if self.remat else DecoderBlock
        for i in range(self.decoder_depth):
            position_BQD = positions(box_BQ4).astype(y_BQD.dtype)
            words = (self.heads, self.mlp_dim, self.points, self.dropout, self.dtype, self.style)
            y_BQD = block(*words, name=f"decoder_{i}")(y_BQD, position_BQD, box_BQ4, memory_BSD, tuple(shapes), train)
            y = y_BQD.astype(jnp.float32)
            moved = PredictionHead(4, last_init=_zeros, name=f"box_head_{i}")(y)
            new_BQ4 = jax.nn.sigmoid(moved + inverse_sigmoid(box_BQ4))
            logits.append(nn.Dense(K, kernel_init=_xavier, bias_init=prior, name=f"head_{i}")(y))
            boxes.append(new_BQ4)
            box_BQ4 = jax.lax.stop_gradient(new_BQ4)
        first = 0 if train else -1
        return Predictions(jnp.stack(logits[first:]), jnp.stack(boxes[first:]))

    def _encoded(self, maps: list[Any], train: bool) -> list[Any]:
        """The hybrid encoder: the maps, from the largest on, each of the encoder's width."""
        W, act = self.encoder_width or self.width, self.activation

        def conv(name: str, kernel: int, stride: int, activation: str | None, epsilon: float, x: Any) -> Any:
            return ConvNorm(W, kernel, stride, activation, epsilon, self.dtype, name=name)(x, train)

        def fused(name: str, *pair: Any) -> Any:
            words = (W, int(W * self.expansion), act, self.epsilon, self.dtype)
            return FusionBlock(*words, name=name)(jnp.concatenate(pair, -1), train)

        maps = [conv(f"projection_{i}", 1, 1, None, 1e-5, x) for i, x in enumerate(maps)]
        B, h, w, _ = maps[-1].shape
        style = dataclasses.replace(self.style, activation=self.encoder_activation)
        encoder = Encoder(
            self.depth,
            self.encoder_heads,
            self.encoder_mlp_dim,
            style=style,
            dropout=self.dropout,
            dtype=self.dtype,
            name="encoder",
        )
        context = Context(position=jnp.asarray(_sincos(h, w, W))[None])
        maps[-1] = encoder(maps[-1].reshape(B, -1, W), None, train, context).reshape(maps[-1].shape)
        down = [maps[-1]]
        for i, x in enumerate(reversed(maps[:-1])):
            down[-1] = conv(f"lateral_{i}", 1, 1, act, self.epsilon, down[-1])
            wide = jnp.repeat(jnp.repeat(down[-1], 2, 1), 2, 2)
            down.append(fused(f"down_{i}", wide, x))
        up = [down[-1]]
        for i, x in enumerate(reversed(down[:-1])):
            up.append(fused(f"up_{i}", conv(f"stride_{i}", 3, 2, act, self.epsilon, up[-1]), x))
        return up


def _sincos(h: int, w: int, width: int) -> np.ndarray:
    """f32[L, D]: sines and cosines of the row, then of the column, at growing wavelengths."""
    k = width // 4
    omega_k = 10_000.0 ** -(np.arange(k) / k)
    rows, columns = (axis.reshape(-1, 1) * omega_k for axis in np.mgrid[:h, :w])
    found = [f(angle) for angle in (rows, columns) for f in (np.sin, np.cos)]
    return np.concatenate(found, 1).astype(np.float32)
