"""Recordings from files: one decoder for every data set and for prediction.

Legend: T samples, C channels.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import wave
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.runtime.limits import SECONDS, limit, too_much
from bigbase_jax.runtime.untrusted import open_regular

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au"})
RATES = (4_000, 384_000)  # samples per second that a header may claim
CHANNELS = 64


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"reading recordings needs the package {name}: pip install 'bigbase_jax[speech]'.") from error


def decode(
    data: bytes | str | os.PathLike[str],
    rate: int,
    offset: float = 0.0,
    duration: float | None = None,
    seconds: float = SECONDS,
    folder: str | None = None,
) -> np.ndarray:
    """A recording (WAV, FLAC, Ogg Vorbis or Opus, MP3, AIFF, AU) as one channel of ``rate`` samples per second.

    Channels are averaged; those that are silent all through are left out, so that a dead one of two does not halve
    what is there. Samples that are no numbers are silence. Resampling is soxr's ("HQ").

    Args:
      data: a file's contents, or its path.
      rate: of the samples that are given back, Hz.
      offset: seconds before the part that is wanted.
      duration: its seconds; None: all that follows.
      seconds: how long it may be (times ``BIGBASE_LIMITS``); by its header, before anything is decoded.
      folder: that the path has to lie in, after all links; None: it may be anywhere.

    Returns:
      f32[T], -1..1 but where a file of floats goes beyond; T is 0 for a file without samples.

    Raises:
      UserError: unreadable, truncated, or beyond the limits. It names the path if given.
    """
    with _opened(data, folder) as opened:
        found = opened.samplerate
        start = min(round(offset * found), opened.frames)
        count = opened.frames - start if duration is None else min(round(duration * found), opened.frames - start)
        if count > limit(seconds) * found:
            raise too_much(f"{count / found:,.0f} seconds are too much at once", "give an offset and a duration")
        if start:
            opened.seek(start)
        x_TC = opened.read(count, dtype="float32", always_2d=True)
    x_TC = np.nan_to_num(x_TC, copy=False, nan=0.0, posinf=1.0, neginf=-1.0)
    return resampled(mono(x_TC), found, rate)


def blocks(data: bytes | str | os.PathLike[str], rate: int, seconds: float = 30.0) -> Iterator[np.ndarray]:
    """As ``decode``, of a recording of any length: about so many seconds at a time, of which only these are in memory.

    A channel is left out of a block in which it is silent.
    """
    with _opened(data, None) as opened:
        found = opened.samplerate
        stream = _library("soxr").ResampleStream(found, rate, 1, "float32", quality="HQ") if found != rate else None
        while len(x_TC := opened.read(round(seconds * found), dtype="float32", always_2d=True)):
            x_T = mono(np.nan_to_num(x_TC, copy=False, nan=0.0, posinf=1.0, neginf=-1.0))
            yield np.ascontiguousarray(x_T, np.float32) if stream is None else stream.resample_chunk(x_T)
        if stream is not None:
            yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def length(data: bytes | str | os.PathLike[str], folder: str | None = None) -> float:
    """The seconds of a recording, by its header; arguments and errors as of ``decode``."""
    with _opened(data, folder) as opened:
        return float(opened.frames / opened.samplerate)


@contextlib.contextmanager
def _opened(data: bytes | str | os.PathLike[str], folder: str | None) -> Iterator[Any]:
    """The recording as soundfile opens it; what is wrong with it, there or in the block, is the user's to mend."""
    if isinstance(data, bytes):
        if not data:
            raise UserError("the file is empty.")
        with _checked(io.BytesIO(data)) as opened:
            yield opened
        return
    try:
        with open_regular(data, folder) as file, _checked(file) as opened:
            yield opened
    except OSError as error:
        raise UserError(f"{os.fspath(data)} cannot be read: {error.strerror or error}.") from error
    except UserError as error:
        if os.fspath(data) in str(error):
            raise
        raise UserError(f"{os.fspath(data)}: {error}") from error


@contextlib.contextmanager
def _checked(file: Any) -> Iterator[Any]:
    soundfile = _library("soundfile")
    try:
        with soundfile.SoundFile(file) as opened:
            rate, channels = opened.samplerate, opened.channels
            if not RATES[0] <= rate <= RATES[1] or not 1 <= channels <= CHANNELS:
                raise UserError(f"its header says {channels} channels of {rate} samples a second, which no sound has.")
            yield opened
    except soundfile.LibsndfileError as error:
        reason = str(error.error_string).rstrip(".")
        raise UserError(f"this is no recording that can be read (WAV, FLAC, Ogg, MP3): {reason}.") from error


def wav(x_T: np.ndarray, rate: int) -> bytes:
    """A WAV file of 16 bits of samples in -1..1; what is louder is clipped."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(np.round(32767 * np.clip(x_T, -1, 1)).astype("<i2").tobytes())
    return file.getvalue()


def pcm16(x_T: np.ndarray) -> np.ndarray:
    """Samples in -1..1, clipped, as i16[T]; those of 16 bits as they are."""
    if x_T.dtype == np.int16:
        return x_T
    return np.rint(np.clip(x_T * 32768.0, -32768, 32767)).astype(np.int16)


def mono(x_TC: np.ndarray) -> np.ndarray:
    """The mean of the channels that are not silent all through, f32[T]."""
    if x_TC.shape[1] == 1:
        return x_TC[:, 0]
    loud = np.abs(x_TC).max(0, initial=0) > 0
    return x_TC[:, loud].mean(1) if loud.any() else x_TC[:, 0]


def resampled(x_T: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """f32[T] of ``rate`` samples a second as f32 of ``wanted``."""
    if rate == wanted or not len(x_T):
        return np.ascontiguousarray(x_T, np.float32)
    return np.asarray(_library("soxr").resample(x_T, rate, wanted, quality="HQ"), np.float32)


class Resampler:
    """``resampled`` for a recording that comes in parts: i16[T] of each, and with ``last`` all that is left."""

    def __init__(self, rate: int, wanted: int):
        """From ``rate`` to ``wanted`` samples a second."""
        same = rate == wanted
        self._stream = None if same else _library("soxr").ResampleStream(rate, wanted, 1, dtype="int16", quality="HQ")

    def __call__(self, audio_T: np.ndarray, last: bool = False) -> np.ndarray:
        """The samples that are there now, i16[T]."""
        return audio_T if self._stream is None else self._stream.resample_chunk(audio_T, last=last)


KINDS = {
    "wav": ("WAV", "PCM_16", "audio/wav"),
    "flac": ("FLAC", "PCM_16", "audio/flac"),
    "mp3": ("MP3", None, "audio/mpeg"),
    "opus": ("OGG", "OPUS", "audio/ogg"),
    "pcm": ("RAW", "PCM_16", "audio/pcm"),
}
"""Kinds of files that ``encoded`` writes: libsndfile's format and subtype, and what HTTP calls it."""
_PLACED = {
    "opus": (8_000, 12_000, 16_000, 24_000, 48_000),
    "mp3": (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000),
}


def encoded(files: Sequence[bytes], kind: str, rate: int | None = None) -> tuple[bytes, str]:
    """Recordings, one after the other, as a file of another kind, and its media type.

    Args:
      files: whose first says the samples per second of them all.
      kind: of ``KINDS``; "pcm" is samples alone, i16, the lower byte first.
      rate: of the result; None: that of the first, or the next that the kind can have.

    Raises:
      UserError: one cannot be read, or the installed libsndfile does not write the kind.
    """
    soundfile = _library("soundfile")
    with soundfile.SoundFile(io.BytesIO(files[0])) as opened:
        found = opened.samplerate
    x_T = np.concatenate([decode(file, found) for file in files])
    rate = rate or next((r for r in _PLACED.get(kind, (found,)) if r >= found), 48_000)
    form, subtype, media_type = KINDS[kind]
    out = io.BytesIO()
    try:
        soundfile.write(
            out,
            resampled(x_T, found, rate),
            rate,
            format=form,
            subtype=subtype,
            endian="LITTLE" if kind == "pcm" else None,
        )
    except (soundfile.LibsndfileError, ValueError) as error:
        raise UserError(f"{kind} cannot be written here ({error}); ask for wav.") from error
    return out.getvalue(), media_type
