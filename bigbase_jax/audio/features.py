"""Log-mel features as published: those of Whisper and of vocoders, and Kaldi's filter banks.

Everything before the squares is linear in the samples: cutting frames, taking off the mean, pre-emphasis, the window
and the Fourier transform are one matrix, and a spectrogram is a product with it. Samples lie in rows of one hop each,
so that overlapping frames are never written out: a frame's product is the sum of those of the hops it reaches over.

Legend: B recordings, T samples, F frames, W samples of a window, N frequency bins, M mel bands.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft

Array = jax.Array | np.ndarray
_ROWS = 256  # frames at once, on the host
_GROUPS = 5  # of bands, each multiplied with the bins that it reaches over alone


@dataclasses.dataclass(frozen=True)
class LogMel:
    """Samples, f32[B,T] in -1..1 or i16[B,T], -> f32[B,F,M].

    Attributes:
      rate: samples per second.
      mels: M.
      window, hop, fft: samples of a frame, from a frame to the next, and of the Fourier transform (zeros behind the
        window), W at least.
      window_kind: "hann" (periodic) or "povey" (a symmetric Hann window to the power of 0.85).
      centred: whether frame f is around sample ``f * hop`` of the recording, which is mirrored at its ends, and the
        last frame is dropped (Whisper); otherwise frame f begins there, and only whole frames count.
      same: whether a centred frame is around the middle of its hop instead, so that F frames are of F hops, and as many
        samples can be made of them again (HiFi-GAN, Vocos).
      magnitude: whether bands are of the magnitudes of the spectrum, and not of their squares.
      preemphasis: 0 for none; the mean of each frame is taken off where there is some.
      scale: of the samples, before all else.
      mel_scale: "slaney", with bands of equal area, or "htk", with bands that are triangles in mel.
      low, high: of the bands, Hz; None: half the rate.
      whisper: log10, at most 8 below the recording's largest, plus 4, over 4 (Radford et al. 2022, their code);
        otherwise the natural logarithm.
      floor: below which power, or magnitude, is not told apart.
    """

    rate: int = 16_000
    mels: int = 80
    window: int = 400
    hop: int = 160
    fft: int = 400
    window_kind: str = "hann"
    centred: bool = True
    same: bool = False
    magnitude: bool = False
    preemphasis: float = 0.0
    scale: float = 1.0
    mel_scale: str = "slaney"
    low: float = 0.0
    high: float | None = None
    whisper: bool = True
    floor: float = 1e-10

    def frames(self, samples: Any) -> Any:
        """F of so many samples."""
        if self.centred:
            return samples // self.hop
        return (samples >= self.window) * ((samples - self.window) // self.hop + 1)

    @property
    def shape(self) -> np.ndarray:
        """f64[W]: the window."""
        n = np.arange(self.window)
        if self.window_kind == "povey":
            return (0.5 - 0.5 * np.cos(2 * np.pi * n / (self.window - 1))) ** 0.85
        return 0.5 - 0.5 * np.cos(2 * np.pi * n / self.window)

    @functools.cached_property
    def transform(self) -> np.ndarray:
        """f32[hops * hop, 2N]: from a frame's samples to the real and the imaginary part of its spectrum."""
        n, window = np.arange(self.window), self.shape
        angle = 2 * np.pi * np.outer(n, np.arange(self.fft // 2 + 1)) / self.fft
        matrix = window[:, None] * np.concatenate([np.cos(angle), -np.sin(angle)], 1)
        if self.preemphasis:
            emphasised = np.eye(self.window) - self.preemphasis * np.eye(self.window, k=-1)
            emphasised[0, 0] -= self.preemphasis  # the sample before the first is as the first
            centred = np.eye(self.window) - 1 / self.window
            matrix = centred @ emphasised.T @ matrix
        hops = -(-self.window // self.hop)
        padded = np.pad(self.scale * matrix, ((0, hops * self.hop - self.window), (0, 0)))
        return padded.astype(np.float32)

    @functools.cached_property
    def filters(self) -> np.ndarray:
        """f32[N,M]: the triangular bands."""
        bins = np.linspace(0, self.rate / 2, self.fft // 2 + 1)
        to_mel, from_mel = _SCALES[self.mel_scale]
        high = self.rate / 2 if self.high is None else self.high
        edges = np.linspace(to_mel(np.array(self.low)), to_mel(np.array(high)), self.mels + 2)
        if self.mel_scale == "htk":
            at, points = to_mel(bins), edges
        else:
            at, points = bins, from_mel(edges)
        left, centre, right = points[:-2], points[1:-1], points[2:]
        up, down = (at[:, None] - left) / (centre - left), (right - at[:, None]) / (right - centre)
        triangles = np.maximum(0, np.minimum(up, down))
        if self.mel_scale == "slaney":
            triangles = triangles * 2 / (right - left)
        return triangles.astype(np.float32)

    @functools.cached_property
    def _groups(self) -> list[tuple[slice, slice, np.ndarray]]:
        """Bins and bands of each group, and its part of ``filters``: of a band, most bins are 0."""
        found = []
        for bands in np.array_split(np.arange(self.mels), min(_GROUPS, self.mels)):
            bins = np.nonzero(self.filters[:, bands].any(1))[0]
            rows = slice(bins[0], bins[-1] + 1) if len(bins) else slice(0, 1)
            columns = slice(bands[0], bands[-1] + 1)
            found.append((rows, columns, np.ascontiguousarray(self.filters[rows, columns])))
        return found

    def __call__(self, x_BT: Array, xp: Any = jnp) -> Any:
        """``xp`` is ``jax.numpy``, or ``numpy`` for the same on the host."""
        x_BT = scaled(x_BT, xp)
        frames, hops = self.frames(x_BT.shape[1]), len(self.transform) // self.hop
        if self.centred:
            edge = (self.fft - self.hop * self.same) // 2
            x_BT = xp.pad(x_BT, ((0, 0), (edge, edge)), mode="reflect")
        if xp is np:
            return self._logarithm(np, self._host_bands(np.asarray(x_BT), frames))
        rows = frames + hops - 1
        x_BT = xp.pad(x_BT, ((0, 0), (0, max(rows * self.hop - x_BT.shape[1], 0))))[:, : rows * self.hop]
        x_BRH = x_BT.reshape(x_BT.shape[0], rows, self.hop)
        parts = self.transform.reshape(hops, self.hop, -1)
        y_BFN = sum(_product(xp, x_BRH[:, k : k + frames], parts[k]) for k in range(hops))
        bins = self.fft // 2 + 1
        spectrum_BFN = self._spectrum(xp, y_BFN[..., :bins] ** 2 + y_BFN[..., bins:] ** 2)
        return self._logarithm(xp, xp.maximum(_product(xp, spectrum_BFN, self.filters), self.floor))

    def _host_bands(self, x_BT: np.ndarray, frames: int) -> np.ndarray:
        """f32[B,F,M] by FFTs, of some frames at a time, which stay in the cache: a quarter of the product's time."""
        some = np.lib.stride_tricks.sliding_window_view(x_BT, self.window, axis=1)[:, :: self.hop][:, :frames]
        mel_BFM = np.empty((*some.shape[:2], self.mels), np.float32)
        window_W, scale = self.shape, np.float32(self.scale)
        for b, f in itertools.product(range(len(some)), range(0, frames, _ROWS)):
            x_FW = some[b, f : f + _ROWS]
            x_FW = x_FW if scale == 1 else scale * x_FW
            if self.preemphasis:
                x_FW = x_FW.astype(np.float64)  # what little is in a soft band would be lost in single precision
                x_FW -= x_FW.mean(1, keepdims=True)
                before_FW = np.concatenate([x_FW[:, :1], x_FW[:, :-1]], 1)
                x_FW -= self.preemphasis * before_FW
            y_FN = scipy.fft.rfft(x_FW * window_W.astype(x_FW.dtype), self.fft)
            spectrum_FN = self._spectrum(np, (y_FN.real**2 + y_FN.imag**2).astype(np.float32, copy=False))
            for bins, bands, part in self._groups:
                np.matmul(spectrum_FN[:, bins], part, out=mel_BFM[b, f : f + _ROWS, bands])
        return np.maximum(mel_BFM, self.floor, out=mel_BFM)

    def _spectrum(self, xp: Any, power_BFN: Any) -> Any:
        return xp.sqrt(power_BFN + 1e-9) if self.magnitude else power_BFN  # HiFi-GAN's own, with a gradient at 0

    def _logarithm(self, xp: Any, mel_BFM: Any) -> Any:
        if not self.whisper:
            return xp.log(mel_BFM)
        log_BFM = xp.log10(mel_BFM)
        return (xp.maximum(log_BFM, log_BFM.max((1, 2), keepdims=True) - 8.0) + 4.0) / 4.0


def scaled(x: Array, xp: Any = jnp) -> Any:
    """Samples as f32 in -1..1: those of 16 bits are divided, others are so already."""
    x = xp.asarray(x)
    if x.dtype == np.int16:
        return x.astype(xp.float32) / 32768
    return x if x.dtype == np.float32 else x.astype(xp.float32)


def in_blocks(features: LogMel, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """f32[F,M], frame by frame what ``features`` (centred, W = fft) makes of the recording that the blocks are of,
    before Whisper's compression (``compressed``): the logarithm to the base 10, on the host."""
    plain = dataclasses.replace(features, centred=False, whisper=False)
    half, left = features.fft // 2, None
    total = done = 0
    rest: np.ndarray = np.zeros(0, np.float32)
    for block in itertools.chain(blocks, [None]):
        if block is not None:
            total, rest = total + len(block), np.concatenate([rest, block])
        if left is None and (block is None or len(rest) > half):  # mirrored at both ends
            left = rest = np.pad(rest, (half, 0), mode="reflect")
        if block is None:
            rest = np.pad(rest, (0, half), mode="reflect")
        frames = min(max(plain.frames(len(rest)), 0), total // features.hop - done) if left is not None else 0
        if frames > 0:
            used = (frames - 1) * features.hop + features.window
            yield np.asarray(plain(rest[None, :used], np))[0] / np.float32(np.log(10))
            rest, done = rest[frames * features.hop :], done + frames


def compressed(log_FM: np.ndarray, top: float) -> np.ndarray:
    """Whisper's range of ``in_blocks``, whose largest number in all of the recording is ``top``."""
    return (np.maximum(log_FM, np.float32(top - 8.0)) + np.float32(4.0)) / np.float32(4.0)


def whisper(mels: int = 80) -> LogMel:
    """Whisper's (Radford et al. 2022): 16 kHz, 25 ms every 10 ms; 80 bands, or 128 from large-v3 on."""
    return LogMel(mels=mels)


def fbank(mels: int = 80, rate: int = 16_000, low: float = 20.0, high: float | None = None) -> LogMel:
    """Kaldi's ``compute-fbank-feats`` without dither, of samples as 16-bit numbers: 25 ms every 10 ms."""
    window = rate // 40
    return LogMel(
        rate=rate,
        mels=mels,
        window=window,
        hop=rate // 100,
        fft=1 << (window - 1).bit_length(),
        window_kind="povey",
        centred=False,
        preemphasis=0.97,
        scale=32768.0,
        mel_scale="htk",
        low=low,
        high=high,
        whisper=False,
        floor=float(np.finfo(np.float32).eps),
    )


def vocoder_mel(rate: int, mels: int = 80) -> LogMel:
    """What vocoders read and acoustic models say: HiFi-GAN's (Kong et al. 2020, ``meldataset.py``), equal to theirs at
    22.05 kHz. The window is the power of 2 near 50 ms (1024 samples at 16, 22.05 and 24 kHz), four hops long."""
    fft = 1 << round(math.log2(rate / 20))
    return LogMel(
        rate=rate,
        mels=mels,
        window=fft,
        hop=fft // 4,
        fft=fft,
        same=True,
        magnitude=True,
        high=min(8000.0, rate / 2),
        whisper=False,
        floor=1e-5,
    )


def _product(xp: Any, x: Any, matrix: np.ndarray) -> Any:
    """In full float32, which accelerators would not do by themselves."""
    return jnp.matmul(x, matrix, precision="highest") if xp is jnp else x @ matrix


def _slaney(hz: np.ndarray) -> np.ndarray:  # Slaney 1998, Auditory Toolbox: linear up to 1 kHz, logarithmic beyond
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))


def _from_slaney(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


def _htk(hz: np.ndarray) -> np.ndarray:
    return 1127.0 * np.log(1 + hz / 700)


def _from_htk(mel: np.ndarray) -> np.ndarray:
    return 700 * (np.exp(mel / 1127.0) - 1)


_SCALES = {"slaney": (_slaney, _from_slaney), "htk": (_htk, _from_htk)}
