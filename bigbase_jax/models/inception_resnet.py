"""Inception-ResNet v1 (Szegedy et al. 2016) as FaceNet's published networks have it: faces of 160x160 to 512 numbers.

facenet-pytorch has weights for it, trained on VGGFace2 and CASIA-WebFace. Pictures are ``(x - 127.5) / 128``.

Axes: B examples, H height, W width, C channels, D width of the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.layers import Conv, ModelError

Shape = tuple[int, tuple[int, int], int, bool]
"""A convolution: channels, kernel, stride, and whether zeros around keep the size at stride 1."""
REPEATS = (5, 10, 5)
"""How many blocks each of the three stages has."""
LEAST = 75
"""Pixels of a side from which on the last stage has any left."""


def _of(channels: int, kernel: int | tuple[int, int] = 1, stride: int = 1, pad: bool | None = None) -> Shape:
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    return channels, sides, stride, stride == 1 if pad is None else pad


STEM = (
    ("conv2d_1a", _of(32, 3, 2)),
    ("conv2d_2a", _of(32, 3, pad=False)),
    ("conv2d_2b", _of(64, 3)),
    ("maxpool_3a", None),
    ("conv2d_3b", _of(80)),
    ("conv2d_4a", _of(192, 3, pad=False)),
    ("conv2d_4b", _of(256, 3, 2)),
)
BRANCHES: dict[str, tuple[tuple[Shape, ...], ...]] = {
    "repeat_1": ((_of(32),), (_of(32), _of(32, 3)), (_of(32), _of(32, 3), _of(32, 3))),
    "mixed_6a": ((_of(384, 3, 2),), (_of(192), _of(192, 3), _of(256, 3, 2))),
    "repeat_2": ((_of(128),), (_of(128), _of(128, (1, 7)), _of(128, (7, 1)))),
    "mixed_7a": (
        (_of(256), _of(384, 3, 2)),
        (_of(256), _of(256, 3, 2)),
        (_of(256), _of(256, 3), _of(256, 3, 2)),
    ),
    "repeat_3": ((_of(192),), (_of(192), _of(192, (1, 3)), _of(192, (3, 1)))),
}
"""The convolutions of each branch. Where the size is halved ("mixed"), there is a max-pool beside them."""
SCALES = {"repeat_1": 0.17, "repeat_2": 0.10, "repeat_3": 0.20}


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, ReLU."""

    shape: Shape

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        channels, kernel, stride, pad = self.shape
        sides = [((side - 1) // 2,) * 2 if pad else (0, 0) for side in kernel]
        x = Conv(channels, kernel, stride, sides, use_bias=False, name="conv")(x_BHWC)
        return jax.nn.relu(nn.BatchNorm(not train, momentum=0.9, epsilon=1e-3, name="bn")(x))


def branches(
    shapes: Sequence[Sequence[Shape]], x_BHWC: Float[Array, "B H W C"], train: bool
) -> list[Float[Array, "B h w _"]]:
    """What each branch makes of the input; to be called inside a compact module."""
    found = []
    for b, branch in enumerate(shapes):
        y = x_BHWC
        for i, shape in enumerate(branch):
            y = ConvNorm(shape, name=f"branch{b}_{i}" if len(branch) > 1 else f"branch{b}")(y, train)
        found.append(y)
    return found


class Reduction(nn.Module):
    """Branches at stride 2, and a max-pool beside them."""

    shapes: tuple[tuple[Shape, ...], ...]

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        pooled = nn.max_pool(x_BHWC, (3, 3), (2, 2))
        return jnp.concatenate([*branches(self.shapes, x_BHWC, train), pooled], -1)


class Residual(nn.Module):
    """Branches, a 1x1 convolution of all of them, and its sum with the input."""

    shapes: tuple[tuple[Shape, ...], ...]
    scale: float
    relu: bool = True

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        y = jnp.concatenate(branches(self.shapes, x_BHWC, train), -1)
        y = x_BHWC + self.scale * Conv(x_BHWC.shape[-1], (1, 1), name="conv2d")(y)
        return jax.nn.relu(y) if self.relu else y


class InceptionResNetV1(nn.Module):
    """Vectors of faces; a ``CosineHead`` or ``margin.unit`` makes them of length 1.

    Attributes:
      dim: D.
      dropout: rate before the last layer.

    Raises:
      ModelError: a picture that is too small.
    """

    dim: int = 512
    dropout: float = 0.6

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"], train: bool = False) -> Float32[Array, "B D"]:
        if min(x_BHWC.shape[1:3]) < LEAST:
            raise ModelError(f"a picture of {x_BHWC.shape[1]}x{x_BHWC.shape[2]} is too small; {LEAST} is the least.")
        x = x_BHWC.astype(jnp.float32)
        for name, shape in STEM:
            x = ConvNorm(shape, name=name)(x, train) if shape else nn.max_pool(x, (3, 3), (2, 2))
        for stage, count in enumerate(REPEATS, 1):
            if stage > 1:
                name = f"mixed_{stage + 4}a"
                x = Reduction(BRANCHES[name], name=name)(x, train)
            name = f"repeat_{stage}"
            for i in range(count):
                x = Residual(BRANCHES[name], SCALES[name], name=f"{name}_{i}")(x, train)
        x = Residual(BRANCHES["repeat_3"], 1.0, relu=False, name="block8")(x, train)
        x_BC = Dropout(self.dropout, deterministic=not train)(jnp.mean(x, (1, 2)))
        x_BD = nn.Dense(self.dim, use_bias=False, name="last_linear")(x_BC)
        return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-3, name="last_bn")(x_BD)
