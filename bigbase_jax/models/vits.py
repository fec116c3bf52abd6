"""VITS (Kim et al. 2021): from a text's tokens to samples, by a prior over frames, flows and HiFi-GAN; inference alone.

What lies behind a text's end, or its sound's, is 0 before every convolution, so that padding changes nothing.

Axes: B texts, L tokens, F frames, D width, H heads, K head width, R relative positions, T samples, C channels, S width
of a speaker's vector.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from bigbase_jax.models.bc_resnet import Depthwise
from bigbase_jax.models.layers import ACTIVATIONS, look_up

FRAMES = 8  # of a token, at most, on average over a text: so many frames there is room for
_CHUNK = 64  # frames that become samples at once


class WeightNorm(nn.Module):
    """A convolution over time whose kernel is a scale and a direction (Salimans & Kingma 2016)."""

    features: int
    taps: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x_BFC: Float[Array, "B F C"]) -> Float[Array, "B F c"]:
        shape = (self.taps, x_BFC.shape[-1], self.features)
        v = self.param("direction", nn.initializers.lecun_normal(), shape)
        g = self.param("scale", nn.initializers.ones, (self.features,))
        kernel = v * (g / jnp.sqrt(jnp.sum(v**2, (0, 1))))
        form = ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(
            x_BFC, kernel, (1,), "SAME", rhs_dilation=(self.dilation,), dimension_numbers=form
        )
        return y + self.param("bias", nn.initializers.zeros, (self.features,))


class Upsample(nn.Module):
    """A transposed convolution whose output has ``stride`` places for each of its input's: products, overlapped."""

    features: int
    taps: int
    stride: int

    @nn.compact
    def __call__(self, x_BFC: Float[Array, "B F C"]) -> Float[Array, "B f c"]:
        B, F, C = x_BFC.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.taps, C, self.features))
        parts = -(-self.taps // self.stride)
        padded = jnp.pad(kernel, ((0, parts * self.stride - self.taps), (0, 0), (0, 0)))
        y = jnp.einsum("bfc,kco->bfko", x_BFC, padded).reshape(B, F, parts, self.stride, self.features)
        rows = sum(jnp.pad(y[:, :, j], ((0, 0), (j, parts - 1 - j), (0, 0), (0, 0))) for j in range(parts))
        start = (self.taps - self.stride) // 2
        found = jnp.reshape(rows, (B, -1, self.features))[:, start : start + F * self.stride]
        return found + self.param("bias", nn.initializers.zeros, (self.features,))


class Attention(nn.Module):
    """Self-attention with vectors of its own for keys and values up to ``window`` places away (Shaw et al. 2018)."""

    heads: int
    window: int
    bias: bool

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"], mask_BL: Float[Array, "B L"]) -> Float[Array, "B L D"]:
        L, D = x_BLD.shape[1:]
        K, reach = D // self.heads, 2 * self.window + 1
        names = ("query", "key", "value")
        q, k, v = (nn.DenseGeneral((self.heads, K), use_bias=self.bias, name=name)(x_BLD) for name in names)
        init = nn.initializers.normal(K**-0.5)
        key_RK, value_RK = (self.param(f"relative_{name}", init, (reach, K)) for name in names[1:])
        place_LL = jnp.arange(L)[None] - jnp.arange(L)[:, None] + self.window
        near_LL = (place_LL >= 0) & (place_LL < reach)
        relative_BHLR = jnp.einsum("blhk,rk->bhlr", q, key_RK)
        index = jnp.broadcast_to(jnp.clip(place_LL, 0, reach - 1), (*relative_BHLR.shape[:3], L))
        logits = jnp.einsum("blhk,bmhk->bhlm", q, k) + jnp.take_along_axis(relative_BHLR, index, -1) * near_LL
        logits = jnp.where(mask_BL[:, None, None] > 0, logits * K**-0.5, -1e30)
        p_BHLM = jax.nn.softmax(logits, -1)
        there_LR = jnp.arange(L)[:, None] + jnp.arange(reach)[None] - self.window
        index = jnp.broadcast_to(jnp.clip(there_LR, 0, L - 1), (*p_BHLM.shape[:3], reach))
        p_BHLR = jnp.take_along_axis(p_BHLM, index, -1) * ((there_LR >= 0) & (there_LR < L))
        y_BLHK = jnp.einsum("bhlm,bmhk->blhk", p_BHLM, v) + jnp.einsum("bhlr,rk->blhk", p_BHLR, value_RK)
        return nn.DenseGeneral(D, axis=(-2, -1), use_bias=self.bias, name="out")(y_BLHK)


class Separable(nn.Module):
    """Depthwise convolutions of growing dilation, each before a product over channels."""

    layers: int
    taps: int

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"], mask_BL1: Float[Array, "B L 1"]) -> Float[Array, "B L D"]:
        width = x_BLD.shape[-1]
        for i in range(self.layers):
            y = (x_BLD * mask_BL1)[:, None]
            y = Depthwise(2, self.taps, self.taps**i, name=f"depthwise_{i}")(y)[:, 0]
            y = y + self.param(f"depthwise_bias_{i}", nn.initializers.zeros, (width,))
            y = jax.nn.gelu(nn.LayerNorm(1e-5, name=f"norm_a_{i}")(y), approximate=False)
            y = nn.LayerNorm(1e-5, name=f"norm_b_{i}")(nn.Dense(width, name=f"pointwise_{i}")(y))
            x_BLD = x_BLD + jax.nn.gelu(y, approximate=False)
        return x_BLD * mask_BL1


def inverse_spline(y: Array, shape: Array, bins: int, bound: float, width: int) -> Array:
    """The inverse of the rational quadratic spline (Durkan et al. 2019) that the last axis of ``shape`` says: the
    widths of ``bins`` bins, their heights, and the slopes between them; the identity beyond ``bound``."""
    least = 1e-3

    def edges(x: Array) -> Array:
        sizes = least + (1 - least * bins) * jax.nn.softmax(x / math.sqrt(width), -1)
        inner = 2 * bound * jnp.cumsum(sizes, axis=-1)[..., :-1] - bound
        ends = jnp.full((*inner.shape[:-1], 1), bound)
        return jnp.concatenate([-ends, inner, ends], -1)

    x_edges, y_edges = edges(shape[..., :bins]), edges(shape[..., bins : 2 * bins])
    slopes = jnp.pad(least + jax.nn.softplus(shape[..., 2 * bins :]), [(0, 0)] * (y.ndim) + [(1, 1)], constant_values=1)
    inside = jnp.clip(y, -bound, bound)
    bin_ = jnp.clip(jnp.sum(inside[..., None] >= y_edges, -1, keepdims=True) - 1, 0, bins - 1)

    def at(x: Array, further: int = 0) -> Array:
        return jnp.take_along_axis(x, bin_ + further, -1)[..., 0]

    x0, y0, dx, dy = at(x_edges), at(y_edges), at(x_edges, 1) - at(x_edges), at(y_edges, 1) - at(y_edges)
    d0, d1, delta = at(slopes), at(slopes, 1), dy / dx
    bend = (inside - y0) * (d0 + d1 - 2 * delta)
    a, b, c = dy * (delta - d0) + bend, dy * d0 - bend, -delta * (inside - y0)
    root = 2 * c / (-b - jnp.sqrt(jnp.maximum(b**2 - 4 * a * c, 0)))
    return jnp.where(jnp.abs(y) <= bound, root * dx + x0, y)


class WaveNet(nn.Module):
    """Gated convolutions with skips, for a speaker."""

    width: int
    layers: int
    taps: int
    dilation: int

    @nn.compact
    def __call__(self, x: Array, mask_BF1: Array, speaker_B1S: Array | None) -> Array:
        width, total = self.width, jnp.zeros_like(x)
        if speaker_B1S is not None:
            given = WeightNorm(2 * width * self.layers, name="speaker")(speaker_B1S)
        for i in range(self.layers):
            y = WeightNorm(2 * width, self.taps, self.dilation**i, name=f"in_{i}")(x)
            if speaker_B1S is not None:
                y = y + given[..., 2 * width * i : 2 * width * (i + 1)]
            y = jnp.tanh(y[..., :width]) * jax.nn.sigmoid(y[..., width:])
            last = i == self.layers - 1
            y = WeightNorm(width if last else 2 * width, name=f"out_{i}")(y)
            if not last:
                x = (x + y[..., :width]) * mask_BF1
            total = total + y[..., -width:]
        return total * mask_BF1


class HifiGan(nn.Module):
    """Kong et al. 2020's generator: transposed convolutions, each with residual blocks of several reaches."""

    width: int
    rates: tuple[int, ...]
    kernels: tuple[int, ...]
    block_kernels: tuple[int, ...]
    dilations: tuple[tuple[int, ...], ...]
    slope: float

    def reach(self) -> int:
        """Frames to either side that a sample hears."""
        found, rate = 4.0, 1
        for stride, kernel in zip(self.rates, self.kernels, strict=True):
            found += (kernel // stride + 1) / rate
            rate *= stride
            blocks = zip(self.block_kernels, self.dilations, strict=True)
            found += max((k // 2) * sum(d + 1 for d in dilations) for k, dilations in blocks) / rate
        return math.ceil(found + 3 / rate)

    @nn.compact
    def __call__(self, x: Array, mask_BF1: Array, speaker_B1S: Array | None) -> Array:
        x = nn.Conv(self.width, (7,), name="first")(x * mask_BF1)
        if speaker_B1S is not None:
            x = x + nn.Dense(self.width, name="speaker")(speaker_B1S)
        for i, (stride, kernel) in enumerate(zip(self.rates, self.kernels, strict=True)):
            width = self.width // 2 ** (i + 1)
            x = Upsample(width, kernel, stride, name=f"up_{i}")(jax.nn.leaky_relu(x, self.slope) * mask_BF1)
            mask_BF1 = jnp.repeat(mask_BF1, stride, 1)
            total = jnp.zeros_like(x)
            for j, (k, dilations) in enumerate(zip(self.block_kernels, self.dilations, strict=True)):
                y = x
                for n, dilation in enumerate(dilations):
                    z = jax.nn.leaky_relu(y, self.slope) * mask_BF1
                    z = nn.Conv(width, (k,), kernel_dilation=dilation, name=f"block_{i}_{j}_a_{n}")(z)
                    z = jax.nn.leaky_relu(z, self.slope) * mask_BF1
                    y = y + nn.Conv(width, (k,), name=f"block_{i}_{j}_b_{n}")(z)
                total = total + y
            x = total / len(self.block_kernels)
        x = nn.Conv(1, (7,), use_bias=False, name="last")(jax.nn.leaky_relu(x, 0.01) * mask_BF1)
        return jnp.tanh(x[..., 0]) * mask_BF1[..., 0]


class Vits(nn.Module):
    """Tokens -> samples.

    Attributes:
      vocab_size, width, depth, heads, hidden, window, kernel: of the text's encoder: tokens, D, blocks, H, the width
        within a block, how far relative positions go, and taps of its convolutions.
      act, bias, epsilon: its activation, whether attention has biases, of LayerNorm.
      flow_width, flows, layers, wave_kernel, dilation: of the prior's flows: channels of a frame, how many, layers of
        each WaveNet, their taps, and by what dilation grows.
      stochastic: whether durations are drawn, by flows of splines; else they are predicted.
      duration_flows, bins, bound, separable, duration_kernel, duration_hidden: of that.
      speakers, speaker_width: how many, and S; 0: one, without a vector.
      up_width, up_rates, up_kernels, block_kernels, block_dilations, slope: of ``HifiGan``.
      noise, duration_noise: standard deviations.
      rate, samples: speaking rate where nothing else is asked for, and samples per second.
    """

    vocab_size: int
    width: int = 192
    depth: int = 6
    heads: int = 2
    hidden: int = 768
    window: int = 4
    kernel: int = 3
    act: str = "relu"
    bias: bool = True
    epsilon: float = 1e-5
    flow_width: int = 192
    flows: int = 4
    layers: int = 4
    wave_kernel: int = 5
    dilation: int = 1
    stochastic: bool = True
    duration_flows: int = 4
    bins: int = 10
    bound: float = 5.0
    separable: int = 3
    duration_kernel: int = 3
    duration_hidden: int = 256
    speakers: int = 1
    speaker_width: int = 0
    up_width: int = 512
    up_rates: tuple[int, ...] = (8, 8, 2, 2)
    up_kernels: tuple[int, ...] = (16, 16, 4, 4)
    block_kernels: tuple[int, ...] = (3, 7, 11)
    block_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    slope: float = 0.1
    noise: float = 0.667
    duration_noise: float = 0.8
    rate: float = 1.0
    samples: int = 16_000

    @nn.compact
    def __call__(
        self,
        token_BL: Int[Array, "B L"],
        present_BL: Int[Array, "B L"],
        speaker_B: Int[Array, " B"],
        rate_B: Float[Array, " B"],
        duration_noise_BL2: Float[Array, "B L 2"],
        noise_BFC: Float[Array, "B F C"],
    ) -> tuple[Float32[Array, "B T"], Int[Array, " B"]]:
        """
        Args:
          present_BL: 1, and 0 for padding behind it.
          rate_B: times the usual speed.
          duration_noise_BL2, noise_BFC: standard normal; F says for how many frames there is room.

        Returns:
          samples, T = F * hop, 0 behind the end; and how many there are of each.
        """
        mask_BL = present_BL.astype(jnp.float32)
        mask_BL1 = mask_BL[..., None]
        vector_B1S = None
        if self.speaker_width:
            vector_B1S = nn.Embed(self.speakers, self.speaker_width, name="speaker")(speaker_B)[:, None]
        x_BLD = nn.Embed(self.vocab_size, self.width, name="embedding")(token_BL) * math.sqrt(self.width) * mask_BL1
        act = look_up(ACTIVATIONS, self.act, "act")
        for i in range(self.depth):
            y = Attention(self.heads, self.window, self.bias, name=f"block_{i}_attention")(x_BLD, mask_BL)
            x_BLD = nn.LayerNorm(self.epsilon, name=f"block_{i}_norm1")(x_BLD + y)
            y = nn.Conv(self.hidden, (self.kernel,), name=f"block_{i}_up")(x_BLD * mask_BL1)
            y = nn.Conv(self.width, (self.kernel,), name=f"block_{i}_down")(act(y) * mask_BL1)
            x_BLD = nn.LayerNorm(self.epsilon, name=f"block_{i}_norm2")(x_BLD + y * mask_BL1)
        x_BLD = x_BLD * mask_BL1
        mean_BLC, spread_BLC = jnp.split(nn.Dense(2 * self.flow_width, name="prior")(x_BLD) * mask_BL1, 2, -1)
        log_BL = self._durations(x_BLD, mask_BL1, vector_B1S, duration_noise_BL2 * self.duration_noise)
        ends_BL = jnp.cumsum(jnp.ceil(jnp.exp(log_BL) * mask_BL / rate_B[:, None]), axis=-1)

        F = noise_BFC.shape[1]
        frame_F = jnp.arange(F)
        token_BF1 = jnp.sum(ends_BL[:, None] <= frame_F[None, :, None], -1, keepdims=True)
        known_BF1 = token_BF1 < token_BL.shape[1]
        token_BF1 = jnp.minimum(token_BF1, token_BL.shape[1] - 1)
        frames_B = jnp.clip(ends_BL[:, -1], 1, F).astype(jnp.int32)
        mask_BF1 = (frame_F[None] < frames_B[:, None]).astype(jnp.float32)[..., None]
        mean_BFC, spread_BFC = (jnp.take_along_axis(x, token_BF1, 1) * known_BF1 for x in (mean_BLC, spread_BLC))
        z_BFC = mean_BFC + noise_BFC * jnp.exp(spread_BFC) * self.noise
        for i in reversed(range(self.flows)):
            first, second = jnp.split(z_BFC[..., ::-1], 2, -1)
            y = nn.Dense(self.width, name=f"flow_{i}_pre")(first) * mask_BF1
            wave = WaveNet(self.width, self.layers, self.wave_kernel, self.dilation, name=f"flow_{i}_wavenet")
            y = nn.Dense(first.shape[-1], name=f"flow_{i}_post")(wave(y, mask_BF1, vector_B1S)) * mask_BF1
            z_BFC = jnp.concatenate([first, (second - y) * mask_BF1], -1)
        wave_BT = self._samples(z_BFC * mask_BF1, mask_BF1, vector_B1S, jnp.max(frames_B))
        return wave_BT, frames_B * math.prod(self.up_rates)

    def _durations(self, x_BLD: Array, mask_BL1: Array, vector_B1S: Array | None, noise_BL2: Array) -> Array:
        """f32[B,L]: logarithms of frames."""
        width = x_BLD.shape[-1]
        given = 0.0 if vector_B1S is None else nn.Dense(width, name="duration_speaker")(vector_B1S)
        if not self.stochastic:
            x = x_BLD + given
            for i in (1, 2):
                x = nn.Conv(self.duration_hidden, (self.duration_kernel,), name=f"duration_conv_{i}")(x * mask_BL1)
                x = nn.LayerNorm(self.epsilon, name=f"duration_norm_{i}")(jax.nn.relu(x))
            return (nn.Dense(1, name="duration_out")(x * mask_BL1) * mask_BL1)[..., 0]
        x = nn.Dense(width, name="duration_pre")(x_BLD) + given
        x = Separable(self.separable, self.duration_kernel, name="duration_separable")(x, mask_BL1)
        x = nn.Dense(width, name="duration_out")(x) * mask_BL1
        z_BL2 = noise_BL2
        for i in range(self.duration_flows, 1, -1):  # the first is not used
            first, second = jnp.split(z_BL2[..., ::-1], 2, -1)
            y = nn.Dense(width, name=f"duration_flow_{i}_pre")(first) + x
            y = Separable(self.separable, self.duration_kernel, name=f"duration_flow_{i}_separable")(y, mask_BL1)
            y = nn.Dense(3 * self.bins - 1, name=f"duration_flow_{i}_out")(y) * mask_BL1
            second = inverse_spline(second, y[..., None, :], self.bins, self.bound, width)
            z_BL2 = jnp.concatenate([first, second], -1) * mask_BL1
        shift = self.param("duration_shift", nn.initializers.zeros, (2,))
        scale = self.param("duration_scale", nn.initializers.zeros, (2,))
        return ((z_BL2[..., ::-1] - shift) * jnp.exp(-scale) * mask_BL1)[..., 0]

    def _samples(self, z_BFC: Array, mask_BF1: Array, vector_B1S: Array | None, most: Array) -> Array:
        """f32[B,T]: by chunks, of which there are as many as the longest takes."""
        words = (self.block_kernels, self.block_dilations, self.slope)
        gan = HifiGan(self.up_width, self.up_rates, self.up_kernels, *words, name="decoder")
        F = z_BFC.shape[1]
        hop, reach = math.prod(self.up_rates), gan.reach()
        behind = -F % _CHUNK
        z, mask = (jnp.pad(x, ((0, 0), (reach, reach + behind), (0, 0))) for x in (z_BFC, mask_BF1))

        def made(gan: nn.Module, i: Array | int) -> Array:
            part, of = (jax.lax.dynamic_slice_in_dim(x, i * _CHUNK, _CHUNK + 2 * reach, 1) for x in (z, mask))
            found: Array = gan(part, of, vector_B1S)[:, reach * hop : (reach + _CHUNK) * hop]
            return found

        def more(gan: nn.Module, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            i, wave = carry
            return i + 1, jax.lax.dynamic_update_slice_in_dim(wave, made(gan, i), i * _CHUNK * hop, 1)

        empty_BT = jnp.zeros((len(z), (F + behind) * hop))
        if self.is_initializing():
            return made(gan, 0)[:, :1] + empty_BT[:, : F * hop]  # of this shape; a loop makes no parameters
        start = (jnp.int32(0), empty_BT)
        return nn.while_loop(lambda _, carry: carry[0] * _CHUNK < most, more, gan, start)[1][:, : F * hop]
