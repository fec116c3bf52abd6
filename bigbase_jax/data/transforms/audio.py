"""Transforms of recordings on the host: ``example["audio"]``, i16 [T]; those that compute with it give f32 in -1..1.

They return a new example and leave the given one alone. Masks over time and frequency are the task's, on the device
(``tasks.audio_classification``).

Legend: T samples; ``rng`` is the example's own generator.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np
import scipy.signal

from bigbase_jax.audio.features import scaled
from bigbase_jax.audio.files import SUFFIXES, decode, pcm16, resampled
from bigbase_jax.core import Example, UserError
from bigbase_jax.data.files import existing
from bigbase_jax.data.sources.audio.audio import recordings


def _floats(example: Example) -> np.ndarray:
    return scaled(example["audio"], np)


@dataclasses.dataclass(frozen=True)
class Floats:
    """Samples as f32 in -1..1, as they come from what computes with them: a model is compiled for one kind."""

    random: ClassVar[bool] = False

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return {**example, "audio": _floats(example)}


@dataclasses.dataclass(frozen=True)
class PadOrCrop:
    """Exactly so many samples: the middle of what is longer, silence on both sides of what is shorter.

    Attributes:
      samples: T of the result.
      shift: by so many samples at most, to either side, the place is moved; 0: the same each time.

    Raises:
      UserError: no samples.
    """

    samples: int
    shift: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.shift < 0:
            raise UserError(f"samples is {self.samples} and shift {self.shift}; use 1 or more, and 0 or more.")

    @property
    def random(self) -> bool:
        return self.shift > 0

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        x_T = example["audio"]
        start = (len(x_T) - self.samples) // 2
        if self.shift:
            start += int(rng.integers(-self.shift, self.shift + 1))
        out = np.zeros(self.samples, x_T.dtype)
        part = x_T[max(start, 0) : max(start + self.samples, 0)]
        out[max(-start, 0) : max(-start, 0) + len(part)] = part[: self.samples - max(-start, 0)]
        return {**example, "audio": out}


@dataclasses.dataclass(frozen=True)
class Piece:
    """So many samples from anywhere in the recording; of a shorter one, all, and silence behind it."""

    samples: int

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        x_T = example["audio"]
        start = int(rng.integers(0, max(len(x_T) - self.samples, 0) + 1))
        x_T = x_T[start : start + self.samples]
        return {**example, "audio": np.pad(x_T, (0, self.samples - len(x_T)))}


@dataclasses.dataclass(frozen=True)
class Speed:
    """Played faster or slower, pitch and all, by a factor from ``1 - most`` to ``1 + most`` (Ko et al. 2015).

    Raises:
      UserError: ``most`` is not in [0, 0.9].
    """

    most: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.most <= 0.9:
            raise UserError(f"speed changes by at most {self.most}; use a share from 0 to 0.9, such as 0.2.")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        factor = 1 + self.most * rng.uniform(-1, 1)
        return {**example, "audio": resampled(_floats(example), 8000, max(round(8000 / factor), 1))}


@dataclasses.dataclass(frozen=True)
class Gain:
    """Louder or softer, from ``-most`` to ``most`` decibels."""

    most: float = 10.0

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return {**example, "audio": _floats(example) * np.float32(10 ** (self.most * rng.uniform(-1, 1) / 20))}


class _Sometimes:
    """What is done with probability ``share``."""

    share: float

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        x_T = _floats(example)
        done = rng.random() < self.share and len(x_T)
        return {**example, "audio": self.changed(x_T, rng) if done else x_T}

    def changed(self, x_T: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        raise NotImplementedError


def _loudness(x_T: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x_T**2)))


@dataclasses.dataclass(frozen=True)
class Noise(_Sometimes):
    """Noise of a random colour, from white to brown, added with probability ``share``, ``snr`` decibels below the
    recording at least and at most; below -60 dB of full scale where that is silent."""

    snr: tuple[float, float] = (5.0, 40.0)
    share: float = 0.8

    def changed(self, x_T: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        noise_T = self.noise(len(x_T), rng)
        level = max(_loudness(x_T), 1e-3) * 10 ** (-rng.uniform(*self.snr) / 20)
        return x_T + np.float32(level / max(_loudness(noise_T), 1e-6)) * noise_T

    def noise(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """f32[size], as loud as it is."""
        colour = rng.uniform(0, 1)  # of amplitudes: 0 white, 1 brown
        spectrum = np.fft.rfft(rng.standard_normal(size, np.float32))
        return np.fft.irfft(spectrum / np.arange(1, len(spectrum) + 1) ** colour, size).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedNoise(Noise):
    """Noise from the recordings below ``folder``, a random stretch of one of them (again and again, if that is short),
    added as ``Noise`` is.

    Raises:
      UserError: there are no recordings, or one that does not decode.
    """

    folder: str
    rate: int

    def noise(self, size: int, rng: np.random.Generator) -> np.ndarray:
        noise_T = _one_of(self.folder, self.rate, rng)
        start = int(rng.integers(max(len(noise_T) - size, 0) + 1))
        return np.resize(noise_T[start : start + size], size)


@dataclasses.dataclass(frozen=True)
class RecordedRoom(_Sometimes):
    """Reverberation with probability ``share`` by an impulse response, one of the recordings below ``folder``; its
    largest sample is where the sound arrives, and the loudness stays.

    Raises:
      UserError: there are no recordings, or one that does not decode.
    """

    folder: str
    rate: int
    share: float = 0.3

    def changed(self, x_T: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        response = _one_of(self.folder, self.rate, rng)
        return _in_room(x_T, response[np.abs(response).argmax() :])


def _one_of(folder: str, rate: int, rng: np.random.Generator) -> np.ndarray:
    """f32[T] of one of the recordings below a folder, which are not silent all through."""
    found = _recordings(folder, rate)
    return found[int(rng.integers(len(found)))]


@functools.cache
def _recordings(folder: str, rate: int) -> tuple[np.ndarray, ...]:
    """All of them, in the order of their paths; minutes rather than hours, since they stay in memory."""
    paths = sorted(path for _, path in recordings(existing(folder)))
    found = tuple(x_T for x_T in (decode(path, rate) for path in paths) if np.any(x_T))
    if not found:
        raise UserError(f"{folder} has no recordings ({' '.join(sorted(SUFFIXES))}) to mix in.")
    return found


def _in_room(x_T: np.ndarray, response: np.ndarray) -> np.ndarray:
    """f32[T]: the convolution with an impulse response, as loud as before."""
    wet_T = scipy.signal.fftconvolve(x_T, response)[: len(x_T)]
    return (wet_T * (_loudness(x_T) / max(_loudness(wet_T), 1e-6))).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Room(_Sometimes):
    """Reverberation with probability ``share``: noise that fades by 60 dB within ``seconds`` at least and at most,
    behind the direct sound, at the loudness of before."""

    rate: int
    seconds: tuple[float, float] = (0.1, 0.6)
    share: float = 0.3

    def changed(self, x_T: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        seconds = rng.uniform(*self.seconds)
        t = np.arange(max(int(seconds * self.rate), 1)) / self.rate
        tail = rng.standard_normal(len(t)) * 10 ** (-3 * t / seconds)
        tail *= rng.uniform(0.2, 1.0) / np.sqrt(np.sum(tail**2))
        tail[0] = 1.0
        return _in_room(x_T, tail)


@dataclasses.dataclass(frozen=True)
class Padded:
    """Silence behind the end, up to so many samples, as 16-bit numbers; ``audio_length`` i32[] says where that begins.
    What is longer is cut.

    Attributes:
      samples: T of the result.
    """

    samples: int

    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples is {self.samples}; use 1 or more.")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        x_T = pcm16(example["audio"][: self.samples])
        padded_T = np.pad(x_T, (0, self.samples - len(x_T)))
        return {**example, "audio": padded_T, "audio_length": np.int32(len(x_T))}
