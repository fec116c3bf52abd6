"""FCOS: a detector of one stage without anchors (Tian et al. 2019, "FCOS: Fully Convolutional One-Stage Object
Detection").

Each place of each map of a feature pyramid says for each class whether it lies in an object, how far the sides of that
object's box are, and how near it is to its middle.

Axes: B examples, H height, W width, N places of all maps, C classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.fpn import FeaturePyramid
from bigbase_jax.models.layers import DTYPES, Conv, ModelError, classes


class Dense(NamedTuple):
    """What a detector says at all places of a picture.

    Attributes:
      logits: f32[B,N,C].
      boxes: f32[B,N,4], xyxy in pixels of the picture.
      centre: f32[B,N], logits of the nearness to the middle of an object.
      places: f32[N,2], the centres (x, y) of the places in pixels.
      strides: f32[N], pixels between neighbouring places of the same map.
    """

    logits: jax.Array
    boxes: jax.Array
    centre: jax.Array
    places: jax.Array
    strides: jax.Array


class FCOS(nn.Module):
    """A backbone, a feature pyramid and a head that all maps share.

    Attributes:
      num_classes: C.
      backbone: a module that gives maps with ``features=True``, the finest first, such as ``ResNet`` or ``ConvNet``.
      levels: how many of its last maps are read.
      coarser: how many maps of half the size are added.
      width: channels of the pyramid and the head; 256 in the paper.
      depth: convolutions of each of the head's two towers; 4 in the paper.
      groups: of GroupNorm in these; 32 in the paper.
      prior: of an object at a place when training begins (Lin et al. 2017b, section 4.1).
      dropout: rate before the last layers.
      dtype: of the pyramid and the head, "float32" or "bfloat16"; what they give is float32.

    Raises:
      ModelError: a backbone with fewer maps, or groups that do not divide the width.
    """

    backbone: nn.Module
    num_classes: int | None = None
    levels: int = 3
    coarser: int = 0
    width: int = 256
    depth: int = 4
    groups: int = 32
    prior: float = 0.01
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"], train: bool = False) -> Dense:
        if self.width % self.groups:
            raise ModelError(f"width {self.width} does not divide into {self.groups} groups.")
        maps = self.backbone(x_BHWC, train, features=True)
        if len(maps) < self.levels:
            raise ModelError(f"the backbone gives {len(maps)} maps, fewer than levels={self.levels}.")
        maps = FeaturePyramid(self.width, self.coarser, self.dtype, name="pyramid")(maps[-self.levels :])
        told = (classes(self.num_classes), self.width, self.depth, self.groups, self.prior, self.dropout, self.dtype)
        head = Head(*told, name="head")
        parts = []
        for x in maps:
            step_y, step_x = x_BHWC.shape[1] / x.shape[1], x_BHWC.shape[2] / x.shape[2]
            stride = 2.0 ** round(math.log2(max(step_y, step_x)))  # a map of odd size has a place beyond the border
            logits_BhwC, sides_Bhw4, centre_Bhw = head(x, train)
            y, x = jnp.meshgrid(*((jnp.arange(n) + 0.5) * stride for n in x.shape[1:3]), indexing="ij")
            place_hw2 = jnp.stack([x, y], -1)
            sides_Bhw4 = sides_Bhw4 * stride
            boxes_Bhw4 = jnp.concatenate([place_hw2 - sides_Bhw4[..., :2], place_hw2 + sides_Bhw4[..., 2:]], -1)
            B, N, C = x_BHWC.shape[0], y.size, logits_BhwC.shape[-1]  # B is free in exports
            parts.append(
                Dense(
                    logits_BhwC.reshape(B, N, C),
                    boxes_Bhw4.reshape(B, N, 4),
                    centre_Bhw.reshape(B, N),
                    place_hw2.reshape(N, 2),
                    jnp.full(N, stride),
                )
            )
        axes = (1, 1, 1, 0, 0)
        return Dense(*(jnp.concatenate(some, axis) for some, axis in zip(zip(*parts, strict=True), axes, strict=True)))


class Head(nn.Module):
    """Two towers of convolutions: one says the class, the other the box and how near the middle is.

    Attributes:
      num_classes: C.
      width, depth, groups, prior, dropout, dtype: see ``FCOS``.
    """

    num_classes: int
    width: int
    depth: int
    groups: int
    prior: float
    dropout: float
    dtype: str

    @nn.compact
    def __call__(
        self, x_BhwD: Float[Array, "B h w D"], train: bool
    ) -> tuple[Float32[Array, "B h w C"], Float32[Array, "B h w 4"], Float32[Array, "B h w"]]:
        """Logits of classes, distances of the sides in strides (left, top, right, bottom), and the centre's logits."""
        towers = []
        for tower in ("class", "box"):
            x = x_BhwD
            for i in range(self.depth):
                x = Conv(self.width, (3, 3), use_bias=False, dtype=DTYPES[self.dtype], name=f"{tower}_conv{i}")(x)
                x = jax.nn.relu(nn.GroupNorm(self.groups, dtype=DTYPES[self.dtype], name=f"{tower}_norm{i}")(x))
            towers.append(Dropout(self.dropout, deterministic=not train)(x).astype(jnp.float32))
        small, bias = nn.initializers.normal(0.01), math.log(self.prior / (1 - self.prior))
        logits = Conv(
            self.num_classes,
            (3, 3),
            kernel_init=small,
            bias_init=nn.initializers.constant(bias),
            name="class_logits",
        )(towers[0])
        sides = Conv(4, (3, 3), kernel_init=small, bias_init=nn.initializers.ones, name="box_sides")(towers[1])
        centre = Conv(1, (3, 3), kernel_init=small, name="centre")(towers[1])
        return logits, jax.nn.softplus(2 * sides), centre[..., 0]
