"""Broadcasted residual networks for keyword spotting.

Axes: B examples, F frequency bands, T frames, C channels, D channels out, K classes, S sub-bands.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.layers import Conv, ModelError, classes

SUB_BANDS = 5


class Depthwise(nn.Module):
    """A kernel of its own for each channel, along one axis: a sum of shifted products, which fuses.

    Attributes:
      axis: 1 or 2.
      taps: of the kernel; the output is as long as the input.
      dilation: from tap to tap.
    """

    axis: int
    taps: int = 3
    dilation: int = 1

    @nn.compact
    def __call__(self, x_BFTC: Float[Array, "B F T C"]) -> Float[Array, "B F T C"]:
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal", in_axis=0, out_axis=(), batch_axis=1)
        kernel = self.param("kernel", init, (self.taps, x_BFTC.shape[-1]))
        return convolved(x_BFTC, kernel, self.axis, self.dilation)


def convolved(x_BFTC: Array, kernel_KC: Array, axis: int, dilation: int) -> Array:
    """``Depthwise``."""
    size, reach = x_BFTC.shape[axis], dilation * (len(kernel_KC) // 2)
    padded = jnp.pad(x_BFTC, [(reach, reach) if i == axis else (0, 0) for i in range(4)])
    starts = [i * dilation for i in range(len(kernel_KC))]
    parts = [jax.lax.slice_in_dim(padded, start, start + size, axis=axis) for start in starts]
    total = parts[0] * kernel_KC[0]
    for part, weight_C in zip(parts[1:], kernel_KC[1:], strict=True):
        total = total + part * weight_C
    return total


class SubSpectralNorm(nn.Module):
    """BatchNorm of each of S groups of neighbouring bands by itself (Chang et al. 2021)."""

    @nn.compact
    def __call__(self, x_BFTC: Float[Array, "B F T C"], train: bool) -> Float[Array, "B F T C"]:
        B, F, T, C = x_BFTC.shape
        x = x_BFTC.reshape(B, SUB_BANDS, F // SUB_BANDS, T, C)
        axis: Any = (1, -1)
        return nn.BatchNorm(not train, momentum=0.9, axis=axis, name="bn")(x).reshape(B, F, T, C)


def batch_norm(train: bool, name: str) -> nn.BatchNorm:
    """Over all but the channels, with running statistics of ten steps."""
    return nn.BatchNorm(not train, momentum=0.9, name=name)


class Block(nn.Module):
    """What is told from frequency and time, and from time alone, broadcast over frequency (Kim et al. 2021, figure 2).

    Attributes:
      features: D; where C is another, a 1x1 convolution comes first and there is no shortcut around all.
      stride: over frequency.
      dilation: over time.
      dropout: of whole channels, before they are broadcast.
    """

    features: int
    stride: int
    dilation: int
    dropout: float

    @nn.compact
    def __call__(self, x_BFTC: Float[Array, "B F T C"], train: bool) -> Float[Array, "B f T D"]:
        same, x = x_BFTC.shape[-1] == self.features, x_BFTC
        if not same:
            x = Conv(self.features, (1, 1), use_bias=False, name="expand")(x)
            x = jax.nn.relu(batch_norm(train, "bn_expand")(x))
        x = Depthwise(1, name="frequency")(x)[:, :: self.stride]
        x = SubSpectralNorm(name="ssn")(x, train)
        y_B1TD = jnp.mean(x, 1, keepdims=True)
        y_B1TD = Depthwise(2, dilation=self.dilation, name="time")(y_B1TD)
        y_B1TD = jax.nn.silu(batch_norm(train, "bn_time")(y_B1TD))
        y_B1TD = Conv(self.features, (1, 1), use_bias=False, name="mix")(y_B1TD)
        y_B1TD = Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(y_B1TD)
        x = x + y_B1TD
        return jax.nn.relu(x + x_BFTC if same and self.stride == 1 else x)


class BCResNet(nn.Module):
    """BC-ResNet-tau (Kim et al. 2021, table 1): log-mel bands as a picture of one channel -> logits.

    Attributes:
      num_classes: K.
      tau: 1 (9 thousand parameters) to 8 (321 thousand).
      dropout: see ``Block``.
      depths: blocks of each of the four stages.
      stride: over time, of the first convolution; 1 as published, 2 for half the work.

    Raises:
      ModelError: a number of bands that is not a multiple of 20.
    """

    num_classes: int | None = None
    tau: float = 1.0
    dropout: float = 0.1
    depths: tuple[int, ...] = (2, 2, 4, 4)
    stride: int = 1

    @nn.compact
    def __call__(self, x_BFTC: Float[Array, "B T F 1"], train: bool = False) -> Float32[Array, "B K"]:
        x = jnp.swapaxes(x_BFTC, 1, 2)
        if x.shape[1] % (4 * SUB_BANDS):
            raise ModelError(f"{x.shape[1]} bands do not divide into {SUB_BANDS} sub-bands at a quarter; use 40 or 80.")
        base = round(8 * self.tau)
        x = Conv(2 * base, (5, 5), (2, self.stride), padding=[(2, 2), (2, 2)], use_bias=False, name="stem")(x)
        x = jax.nn.relu(batch_norm(train, "bn_stem")(x))
        stages = ((base, 1), (3 * base // 2, 2), (2 * base, 2), (5 * base // 2, 1))
        for i, (features, stride) in enumerate(stages):
            for j in range(self.depths[i]):
                block = Block(features, 1 if j else stride, 2**i, self.dropout, name=f"stage_{i}_block_{j}")
                x = block(x, train)
        kernel = self.param("collapse", nn.initializers.he_normal(), (x.shape[1], 5, x.shape[-1]))
        padded, frames = jnp.pad(x, ((0, 0), (0, 0), (2, 2), (0, 0))), x.shape[2]
        x_BTC = sum(jnp.sum(padded[:, :, j : j + frames] * kernel[:, None, j], 1) for j in range(5))
        x_BTC = nn.Dense(4 * base, use_bias=False, name="widen")(x_BTC)
        x_BTC = jax.nn.relu(batch_norm(train, "bn_widen")(x_BTC))
        return nn.Dense(classes(self.num_classes), name="head")(jnp.mean(x_BTC, 1).astype(jnp.float32))
