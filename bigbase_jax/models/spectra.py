"""Short-time Fourier transforms with as many frames as a recording has hops, and their inverse.

Frame f is around the middle of hop f of the recording, which is mirrored at its ends: the frames of
``audio.features.vocoder_mel`` and of Vocos' "same" padding.

Legend: B recordings, T samples, F frames, W samples of a window (a multiple of the hop), N = W / 2 + 1 frequency bins.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np


def hann(size: int) -> np.ndarray:
    """f32[size], periodic."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)


def stft(x_BT: Any, fft: int, hop: int, xp: Any = jnp) -> Any:
    """f32[B,T] -> c64[B,F,N], F = T // hop; ``xp`` is ``jax.numpy``, or ``numpy`` for the same on the host."""
    frames, edge = x_BT.shape[1] // hop, (fft - hop) // 2
    x_BT = xp.pad(x_BT[:, : frames * hop], ((0, 0), (edge, edge)), mode="reflect")
    hops_BRH = x_BT[:, : (frames - 1) * hop + fft].reshape(x_BT.shape[0], -1, hop)
    x_BFW = xp.concatenate([hops_BRH[:, k : k + frames] for k in range(fft // hop)], -1)
    return xp.fft.rfft(x_BFW * hann(fft), axis=-1).astype(xp.complex64)


def istft(y_BFN: Any, fft: int, hop: int, xp: Any = jnp) -> Any:
    """c64[B,F,N] -> f32[B,F*hop]: the recording whose ``stft`` is nearest (Griffin & Lim 1984), and equal if one is."""
    frames, hops, edge = y_BFN.shape[1], fft // hop, (fft - hop) // 2
    x_BFW = xp.fft.irfft(y_BFN, fft, axis=-1).astype(xp.float32) * hann(fft)

    def overlapped(x_BFW: Any, xp: Any) -> Any:
        parts = x_BFW.reshape(x_BFW.shape[0], frames, hops, hop)
        rows = [xp.pad(parts[:, :, k], ((0, 0), (k, hops - 1 - k), (0, 0))) for k in range(hops)]
        return sum(rows).reshape(x_BFW.shape[0], -1)[:, edge : edge + frames * hop]

    return overlapped(x_BFW, xp) / overlapped(np.broadcast_to(hann(fft) ** 2, (1, frames, fft)), np)
