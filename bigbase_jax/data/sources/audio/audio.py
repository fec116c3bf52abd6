"""Recordings as examples: one way to read them for every data set and for prediction.

Samples are kept as 16-bit numbers, as most files have them, in a quarter of the memory of two float channels; the task
scales them inside the compiled step.

Legend: T samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.audio.files import SUFFIXES, decode, length, pcm16
from bigbase_jax.build import suggest
from bigbase_jax.core import Codec, Example, Fields, UserError
from bigbase_jax.data.files import File, given_file, kind_of, open_file, walk

COLUMNS = ("audio", "path", "file", "file_name", "filename", "audio_path", "wav")


def read(
    file: File, rate: int, offset: float = 0.0, duration: float | None = None, folder: str | None = None
) -> np.ndarray:
    """f32[T] of a file, or of an archive's; see ``audio.files.decode`` for the arguments and for what is raised."""
    if not file.member:
        return decode(file.path, rate, offset, duration, folder=folder)
    with open_file(file) as opened:
        return decode(opened.read(), rate, offset, duration)


def recordings(folder: str) -> Iterator[tuple[str, str]]:
    """(name relative to the folder, path) of every recording below it."""
    return ((name, path) for name, path in walk(folder) if kind_of(name) in SUFFIXES)


def column(where: str, values: Mapping[str, Any], given: str | None, usual: Sequence[str], what: str) -> str:
    """The column that is meant: the given one, or the first of the usual ones.

    Raises:
      UserError: there is none.
    """
    name = given or next((name for name in usual if name in values), None)
    if name is None or name not in values:
        wrong = f"{given!r}.{suggest(given, values, 'column')}" if given else f"{what} (such as {usual[0]})"
        raise UserError(f"{where} has no column {wrong}; its columns are {', '.join(map(repr, list(values)[:8]))}.")
    return name


@dataclasses.dataclass(frozen=True)
class AudioCodec(Codec):
    """A user's recording: a file, its bytes, or a row whose ``audio`` is these in base64; a table names files.

    Attributes:
      rate: samples per second that the model was trained on.
      window, hop: seconds; where set, a recording that is longer than ``window`` is read as windows of so long, one
        of which begins every ``hop``: a sequence that decodes what is asked for, so that hours take no memory.
    """

    rate: int
    window: float | None = None
    hop: float | None = None

    fields = Fields({"audio": [(name,) for name in COLUMNS]}, files=True)

    def decode(self, given: bytes | str | Mapping[str, Any]) -> Sequence[Example]:
        """``audio`` i16[T].

        Raises:
          UserError: it does not decode.
        """
        file = given_file(given, "audio", "sound")
        if self.window and self.hop and (seconds := length(file)) > self.window:
            return Windows(file, self.rate, seconds, self.window, self.hop)
        return [{"audio": pcm16(decode(file, self.rate))}]


class Windows(Sequence[Example]):
    """``audio`` i16[T] of each window of a recording, the last one filled up with silence.

    Args:
      file: its path or its bytes, of so many ``seconds``.
      rate: of the samples that are given.
      window, hop: seconds.
    """

    def __init__(self, file: bytes | str, rate: int, seconds: float, window: float, hop: float):
        self._file, self._rate = file, rate
        self._samples, self._hop = round(window * rate), max(round(hop * rate), 1)
        self._size = 1 + max(math.ceil((seconds * rate - self._samples) / self._hop), 0)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        """A window, or, for a slice, a list of some, which are decoded together.

        Raises:
          UserError: that part does not decode.
        """
        if not isinstance(index, slice):
            at = range(self._size)[index]
            return self[at : at + 1][0]
        chosen = range(self._size)[index]
        if not chosen:
            return []
        first, samples = min(chosen), (max(chosen) - min(chosen)) * self._hop + self._samples
        x_T = decode(self._file, self._rate, first * self._hop / self._rate, samples / self._rate)
        x_T = pcm16(np.pad(x_T[:samples], (0, max(samples - len(x_T), 0))))
        return [{"audio": x_T[(k - first) * self._hop :][: self._samples]} for k in chosen]
