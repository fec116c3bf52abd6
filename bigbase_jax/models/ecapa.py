"""ECAPA-TDNN: a voice as a vector (Desplanques et al. 2020).

Axes: B recordings, T frames, M mel bands, C channels, S channels of a part, D of the vector.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bigbase_jax.models.bc_resnet import batch_norm
from bigbase_jax.models.layers import ModelError


class SERes2Block(nn.Module):
    """Frames of all channels, then parts of the channels that each see the one before, then squeeze and excitation.

    Attributes:
      dilation: of the parts' convolutions of 3 frames.
      parts: that the channels are cut into.
      squeeze: channels of the bottleneck.
    """

    dilation: int
    parts: int = 8
    squeeze: int = 128

    @nn.compact
    def __call__(self, x_BTC: Float[Array, "B T C"], train: bool) -> Float[Array, "B T C"]:
        C = x_BTC.shape[-1]
        if C % self.parts:
            raise ModelError(f"{C} channels do not divide into {self.parts} parts.")
        h = batch_norm(train, "bn_in")(jax.nn.relu(nn.Dense(C, name="in")(x_BTC)))
        first, *rest = jnp.split(h, self.parts, -1)
        done, last = [first], jnp.zeros_like(first)
        for i, part_BTS in enumerate(rest):
            conv = nn.Conv(C // self.parts, (3,), kernel_dilation=self.dilation, name=f"part_{i}")
            last = batch_norm(train, f"bn_part_{i}")(jax.nn.relu(conv(part_BTS + last)))
            done.append(last)
        h = batch_norm(train, "bn_out")(jax.nn.relu(nn.Dense(C, name="out")(jnp.concatenate(done, -1))))
        gate = jax.nn.relu(nn.Dense(self.squeeze, name="squeeze")(jnp.mean(h, 1, keepdims=True)))
        return x_BTC + h * jax.nn.sigmoid(nn.Dense(C, name="excite")(gate))


class ECAPA(nn.Module):
    """Log-mel bands -> a vector: three blocks, their outputs together, attentive statistics, a layer.

    Each band's mean over the recording is taken off first, and with it the colour of the microphone.

    Attributes:
      channels: C; 512 or 1024 as published.
      dim: D; 192 as published.
      parts, squeeze: see ``SERes2Block``; ``squeeze`` is also the attention's bottleneck.
      pooled: channels before the statistics; None: 3 x C.
    """

    channels: int = 512
    dim: int = 192
    parts: int = 8
    squeeze: int = 128
    pooled: int | None = None

    @nn.compact
    def __call__(self, x_BTM1: Float[Array, "B T M 1"], train: bool = False) -> Float[Array, "B D"]:
        x = x_BTM1[..., 0]
        x = x - jnp.mean(x, 1, keepdims=True)
        x = batch_norm(train, "bn_in")(jax.nn.relu(nn.Conv(self.channels, (5,), name="in")(x)))
        found = []
        for i in range(3):
            x = SERes2Block(i + 2, self.parts, self.squeeze, name=f"block_{i}")(x, train)
            found.append(x)
        x = jax.nn.relu(nn.Dense(self.pooled or 3 * self.channels, name="mix")(jnp.concatenate(found, -1)))
        mean, std = _statistics(x, jnp.full((), 1 / x.shape[1]))
        around = jnp.broadcast_to(jnp.concatenate([mean, std], -1)[:, None], (*x.shape[:2], 2 * x.shape[-1]))
        h = nn.Dense(self.squeeze, name="attend")(jnp.concatenate([x, around], -1))
        h = jnp.tanh(batch_norm(train, "bn_attend")(jax.nn.relu(h)))
        weight = jax.nn.softmax(nn.Dense(x.shape[-1], name="weigh")(h), 1)
        pooled = batch_norm(train, "bn_pooled")(jnp.concatenate(_statistics(x, weight), -1))
        return batch_norm(train, "bn")(nn.Dense(self.dim, name="vector")(pooled))


def _statistics(x_BTC: Array, weight_BTC: Array) -> tuple[Array, Array]:
    """Mean and standard deviation over the frames, [B,C] each, of weights that sum to 1."""
    mean = jnp.sum(x_BTC * weight_BTC, 1)
    return mean, jnp.sqrt(jnp.maximum(jnp.sum((x_BTC - mean[:, None]) ** 2 * weight_BTC, 1), 1e-5))
