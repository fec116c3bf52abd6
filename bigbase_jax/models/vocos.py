"""Vocos (Siuzdak 2023): a vocoder that says a spectrum, of which the inverse Fourier transform makes sound; and what
judges its sounds in training.

Axes: B examples, F frames, M mel bands, N frequency bins, D width, T = F * hop samples, C channels.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from bigbase_jax.models.bc_resnet import Depthwise
from bigbase_jax.models.spectra import istft, stft


class Block(nn.Module):
    """ConvNeXt's (Liu et al. 2022) over time.

    Attributes:
      hidden: width between the two products.
      scale: of the branch at the start.
    """

    hidden: int
    scale: float

    @nn.compact
    def __call__(self, x_BFD: Float[Array, "B F D"]) -> Float[Array, "B F D"]:
        width = x_BFD.shape[-1]
        y = Depthwise(2, taps=7, name="depthwise")(x_BFD[:, None])[:, 0]
        y = nn.LayerNorm(1e-6, name="norm")(y)
        y = nn.Dense(width, name="down")(jax.nn.gelu(nn.Dense(self.hidden, name="up")(y)))
        gamma_D = self.param("gamma", nn.initializers.constant(self.scale), (width,))
        return x_BFD + gamma_D * y


class Vocos(nn.Module):
    """f32[B,F,M] natural logarithms of mel bands (``audio.features.vocoder_mel``) -> f32[B,T] samples.

    Attributes:
      width, depth, hidden: D, blocks, and the width within a block; published ones have 512, 8 and 1536.
      fft, hop: of the bands.
    """

    width: int = 256
    depth: int = 6
    hidden: int = 768
    fft: int = 1024
    hop: int = 256

    @nn.compact
    def __call__(self, mel_BFM: Float[Array, "B F M"]) -> Float32[Array, "B T"]:
        x = nn.Conv(self.width, (7,), name="embed")(mel_BFM)
        x = nn.LayerNorm(1e-6, name="norm_in")(x)
        for i in range(self.depth):
            x = Block(self.hidden, 1 / self.depth, name=f"block_{i}")(x)
        x = nn.Dense(self.fft + 2, name="head")(nn.LayerNorm(1e-6, name="norm")(x)).astype(jnp.float32)
        log_BFN, phase_BFN = jnp.split(x, 2, -1)
        size_BFN = jnp.exp(jnp.minimum(log_BFN, 4.6))  # 100 at most, as they have it
        return istft(size_BFN * jax.lax.complex(jnp.cos(phase_BFN), jnp.sin(phase_BFN)), self.fft, self.hop)


class Judge(nn.Module):
    """One discriminator: convolutions over time, of one row of samples each or of spectra.

    Attributes:
      period: samples ``period`` apart are the rows (Kong et al. 2020); 0: complex spectra are read instead.
      fft: of these, with a quarter as hop.
      widths: of the layers; of rows, each has a third of the places of the one before.
    """

    period: int = 0
    fft: int = 0
    widths: tuple[int, ...] = (16, 64, 128)

    @nn.compact
    def __call__(self, x_BT: Float[Array, "B T"]) -> tuple[Array, list[Array]]:
        """The judgement of each place, above 0 for a recording, and what the layers make of it."""
        if self.period:
            rows = x_BT.shape[1] // self.period
            x = x_BT[:, : rows * self.period].reshape(-1, rows, self.period).swapaxes(1, 2)
            x = x.reshape(-1, rows, 1)
        else:
            y_BFN = stft(x_BT, self.fft, self.fft // 4)
            x = jnp.concatenate([y_BFN.real, y_BFN.imag], -1)
        layers = []
        for i, width in enumerate(self.widths):
            kernel, stride = ((5,), (3,)) if self.period else ((3,), (1,))
            x = jax.nn.leaky_relu(nn.Conv(width, kernel, stride, name=f"conv_{i}")(x), 0.1)
            layers.append(x)
        return nn.Conv(1, (3,), name="head")(x), layers


class Judges(nn.Module):
    """Multi-period (HiFi-GAN) and multi-resolution discriminators, but small; of spectra, bins are channels.

    Attributes:
      periods, ffts: see ``Judge``.
      width: of the widest layer.
    """

    periods: tuple[int, ...] = (2, 3, 5, 7)
    ffts: tuple[int, ...] = (512, 1024)
    width: int = 128

    @nn.compact
    def __call__(self, x_BT: Float[Array, "B T"]) -> tuple[list[Array], list[Array]]:
        """Judgements of all, and all their layers."""
        found = [
            *(
                Judge(period=p, widths=(self.width // 8, self.width // 2, self.width), name=f"period_{p}")(x_BT)
                for p in self.periods
            ),
            *(Judge(fft=n, widths=(self.width,) * 3, name=f"spectrum_{n}")(x_BT) for n in self.ffts),
        ]
        return [score for score, _ in found], [layer for _, layers in found for layer in layers]
