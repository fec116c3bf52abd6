"""MTCNN (Zhang et al. 2016): three small networks that propose, refine and settle where faces and their points are.

As facenet-pytorch has them, whose wheel carries weights: pictures are ``(x - 127.5) / 128``. The cascade around them is
``inference.faces``.

Axes: B examples, H height, W width, C channels, h and w: cells of 12 pixels at stride 2, D features.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from bigbase_jax.models.layers import Conv

Layer = tuple[int, int, tuple[int, int] | None]
"""Channels and kernel of a convolution, and window and stride of the max-pool after it."""
LAYERS: dict[str, tuple[tuple[Layer, ...], int]] = {
    "pnet": (((10, 3, (2, 2)), (16, 3, None), (32, 3, None)), 0),
    "rnet": (((28, 3, (3, 2)), (48, 3, (3, 2)), (64, 2, None)), 128),
    "onet": (((32, 3, (3, 2)), (64, 3, (3, 2)), (64, 3, (2, 2)), (128, 2, None)), 256),
}
"""The layers of each network, and the width of the dense one after them."""
HEADS: dict[str, tuple[tuple[str, int], ...]] = {
    "pnet": (("conv4_1", 2), ("conv4_2", 4)),
    "rnet": (("dense5_1", 2), ("dense5_2", 4)),
    "onet": (("dense6_1", 2), ("dense6_2", 4), ("dense6_3", 10)),
}
"""Face or none, what the box is off by in its own sides, and the points (all x, then all y) within it."""
SIDES = {"pnet": 12, "rnet": 24, "onet": 48}
"""Pixels of what each looks at."""


class Stage(nn.Module):
    """One of the three networks."""

    kind: str

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W 3"]) -> list[Float32[Array, "B *_ _"]]:
        """The probability of a face, and the other heads: [B,h,w,..] of the first network, [B,..] of the others."""
        layers, width = LAYERS[self.kind]
        x = x_BHWC
        for i, (channels, kernel, pool) in enumerate(layers, 1):
            x = Conv(channels, (kernel, kernel), padding="VALID", name=f"conv{i}")(x)
            x = self.prelu(x, f"prelu{i}")
            if pool is not None:
                spare = [max(-(-(n - pool[0]) // 2) * 2 + pool[0] - n, 0) for n in x.shape[1:3]]  # sizes round up
                x = nn.max_pool(x, (pool[0],) * 2, (2, 2), [(0, n) for n in spare])
        if width:
            x = x.swapaxes(1, 2).reshape(len(x), -1)  # column by column, as Caffe's weights had it
            x = self.prelu(nn.Dense(width, name=f"dense{len(layers) + 1}")(x), f"prelu{len(layers) + 1}")
        found = [
            nn.Dense(size, name=name)(x) if width else Conv(size, (1, 1), name=name)(x)
            for name, size in HEADS[self.kind]
        ]
        return [jax.nn.softmax(found[0])[..., 1:], *found[1:]]

    def prelu(self, x: Float[Array, "B *_ D"], name: str) -> Float[Array, "B *_ D"]:
        """A slope of its own for each channel below zero (He et al. 2015a)."""
        return jnp.where(x >= 0, x, x * self.param(name, nn.initializers.constant(0.25), (x.shape[-1],)))


class MTCNN(nn.Module):
    """The three networks; ``apply(..., method="pnet")`` and so on runs one of them."""

    def setup(self) -> None:
        self._pnet, self._rnet, self._onet = (Stage(kind, name=kind) for kind in LAYERS)

    def __call__(self, x_BHWC: Float[Array, "B 48 48 3"]) -> None:
        """Nothing: to make the parameters of all."""
        for kind, stage in zip(LAYERS, (self._pnet, self._rnet, self._onet), strict=True):
            stage(x_BHWC[:, : SIDES[kind], : SIDES[kind]])

    def pnet(self, x_BHWC: Float[Array, "B H W 3"]) -> list[Float32[Array, "B h w _"]]:
        return self._pnet(x_BHWC)

    def rnet(self, x_BHWC: Float[Array, "B 24 24 3"]) -> list[Float32[Array, "B _"]]:
        return self._rnet(x_BHWC)

    def onet(self, x_BHWC: Float[Array, "B 48 48 3"]) -> list[Float32[Array, "B _"]]:
        return self._onet(x_BHWC)
