"""Where somebody speaks: voice activity by energy above noise floors that adapt.

Legend: T samples, F frames of 10 ms, K bands.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import scipy.ndimage

from bigbase_jax.core import UserError

FRAMES = 100  # a second
BANDS = (150, 300, 500, 800, 1300, 2100, 3400)  # Hz, between which levels are measured: those of a telephone
SMOOTH = 7  # frames of a level
QUIET = -90.0  # dB of full scale in a band, below which all is silence


def speech(
    x_T: np.ndarray,
    rate: int,
    margin: float = 9.0,
    share: float = 0.3,
    memory: float = 10.0,
    shortest: float = 0.04,
    pause: float = 0.3,
    pad: float = 0.1,
) -> list[tuple[float, float]]:
    """The stretches that stand out of what is around them, with hysteresis and hangover.

    Each of six bands has a floor, its lowest level of 200 ms within ``memory``, as in minimum statistics (Martin 2001):
    noise of any colour may grow and fade. How much a moment stands out is the mean of the three largest distances of
    a band's level of 70 ms from its floor. A stretch stands out by ``margin`` decibels, and by ``share`` of what the
    loudest moment within ``memory`` does, somewhere, and by two thirds of that throughout. What does not vary within
    ``memory`` is noise.

    Args:
      x_T: f32[T] in -1..1, or i16[T].
      rate: samples per second.
      memory: seconds around a moment by which floor and peak are known.
      shortest: seconds, below which a stretch is a click.
      pause: seconds, up to which two stretches are one.
      pad: seconds that are added before and behind a stretch.

    Returns:
      (start, end) in seconds, ascending, apart, within the recording.

    Raises:
      UserError: more than one axis, or a rate below 1,000.
    """
    x_T = np.asarray(x_T)
    if x_T.ndim != 1 or rate < 1000:
        raise UserError(f"speech is found in one channel of at least 1,000 samples a second, not {x_T.shape}, {rate}.")
    hop = rate // FRAMES
    level_FK = _levels(x_T, rate, hop)
    if not len(level_FK):
        return []
    around = min(int(memory * FRAMES), 2 * len(level_FK)) | 1
    out_FK = np.empty_like(level_FK)
    for k, power_F in enumerate(level_FK.T):
        now_F, slow_F = (_decibels(scipy.ndimage.uniform_filter1d(power_F, n, mode="nearest")) for n in (SMOOTH, 20))
        out_FK[:, k] = now_F - scipy.ndimage.minimum_filter1d(slow_F, around, mode="nearest")
    out_F = np.sort(out_FK, 1)[:, -3:].mean(1)
    high_F = np.maximum(margin, share * scipy.ndimage.maximum_filter1d(out_F, around, mode="nearest"))
    found: list[list[int]] = []
    for start, end in _runs(out_F > high_F * 2 / 3).tolist():
        if end - start - SMOOTH < shortest * FRAMES or not (out_F > high_F)[start:end].any():
            continue
        if found and start - found[-1][1] <= pause * FRAMES:
            found[-1][1] = end
        else:
            found.append([start, end])
    pad = min(pad, pause / 2)  # so that stretches stay apart
    total, second = len(x_T) / rate, rate / hop
    return [(max(start / second - pad, 0.0), min(end / second + pad, total)) for start, end in found]


def _levels(x_T: np.ndarray, rate: int, hop: int) -> np.ndarray:
    """f32[F,6]: the power of each band, a minute after another, so that hours take little memory."""
    frames = max(len(x_T) // hop - 1, 0)
    edges = np.minimum(np.rint(np.array(BANDS) * 2 * hop / rate).astype(int), hop)
    window, found = np.hanning(2 * hop).astype(np.float32), [np.zeros((0, len(BANDS) - 1), np.float32)]
    for at in range(0, frames, 60 * FRAMES):
        count = min(60 * FRAMES, frames - at)
        part = x_T[at * hop : (at + count + 1) * hop]
        part = part.astype(np.float32) / 32768 if x_T.dtype == np.int16 else np.nan_to_num(part.astype(np.float32))
        rows = np.lib.stride_tricks.sliding_window_view(part, 2 * hop)[::hop]
        power = np.abs(scipy.fft.rfft(rows * window)) ** 2 / hop**2
        summed = np.cumsum(power, 1, dtype=np.float64)
        found.append(np.maximum(np.diff(summed[:, edges]), 0).astype(np.float32))
    return np.concatenate(found)


def _decibels(power_F: np.ndarray) -> np.ndarray:
    return 10 * np.log10(np.maximum(power_F, 10 ** (QUIET / 10)))


def _runs(on_F: np.ndarray) -> np.ndarray:
    """i64[n,2]: from where on, and before where, there are True values in a row."""
    return np.flatnonzero(np.diff(on_F.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
