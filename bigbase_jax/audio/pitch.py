"""Fundamental frequency of recordings.

Legend: T samples, F frames, W samples of a window, K lags.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import scipy.ndimage

_CHUNK = 4096  # frames at once
_QUIET = 1e-3  # root mean square below which nothing has a pitch


def yin(
    x_T: np.ndarray,
    rate: int,
    hop: int,
    frames: int,
    low: float = 60.0,
    high: float = 500.0,
    threshold: float = 0.25,
) -> np.ndarray:
    """f32[F]: Hz around the middle of each hop, 0 where nothing is periodic (YIN, de Cheveigne & Kawahara 2002).

    Args:
      x_T: samples in -1..1.
      frames: F.
      low, high: of what is looked for, Hz.
      threshold: of the normalised difference (step 4 there), below which a lag is a period.
    """
    most, least = int(np.ceil(rate / low)) + 1, max(int(rate / high), 2)
    window = 2 * most
    size = 1 << (window + most).bit_length()
    padded = np.pad(np.asarray(x_T, np.float32), (most + window // 2, most + window // 2 + frames * hop))
    start_F = np.arange(frames) * hop + hop // 2 + most // 2
    found = [np.zeros(0)]
    for begin in range(0, frames, _CHUNK):
        at = start_F[begin : begin + _CHUNK, None] + np.arange(window + most)
        found.append(_of_frames(padded[at], window, most, least, size, rate, threshold))
    hz_F = np.concatenate(found)
    voiced_F, smooth_F = scipy.ndimage.median_filter(hz_F > 0, 3), scipy.ndimage.median_filter(hz_F, 5)
    return np.where(voiced_F, smooth_F, 0.0).astype(np.float32)


def _of_frames(
    x_FT: np.ndarray, window: int, most: int, least: int, size: int, rate: int, threshold: float
) -> np.ndarray:
    spectrum = scipy.fft.rfft(x_FT, size)
    product_FK = scipy.fft.irfft(spectrum * np.conj(scipy.fft.rfft(x_FT[:, :window], size)), size)[:, : most + 1]
    energy = np.concatenate([np.zeros((len(x_FT), 1)), np.cumsum(x_FT**2, 1, dtype=np.float64)], 1)
    shifted_FK = energy[:, window : window + most + 1] - energy[:, : most + 1]
    difference_FK = np.maximum(shifted_FK[:, :1] + shifted_FK - 2 * product_FK, 0.0)
    lags = np.arange(1, most + 1)
    normal_FK = np.ones_like(difference_FK)
    normal_FK[:, 1:] = difference_FK[:, 1:] * lags / np.maximum(np.cumsum(difference_FK[:, 1:], 1), 1e-12)
    inner = normal_FK[:, least:-1]
    valley = (inner < threshold) & (inner <= normal_FK[:, least + 1 :]) & (inner < normal_FK[:, least - 1 : -2])
    rows, lag_F = np.arange(len(x_FT)), valley.argmax(1) + least
    a, b, c = (normal_FK[rows, lag_F + i] for i in (-1, 0, 1))
    bend = a - 2 * b + c
    exact_F = lag_F + np.where(np.abs(bend) > 1e-12, 0.5 * (a - c) / np.where(bend == 0, 1.0, bend), 0.0)
    loud_F = np.sqrt(energy[:, window] / window) > _QUIET
    return np.where(valley.any(1) & loud_F, rate / exact_F, 0.0)
