"""Recordings as examples: one way to read them for every data set and for prediction.

Samples are kept as 16-bit numbers, as most files have them, in a quarter of the memory of two float channels; the task
scales them inside the compiled step.

Legend: T samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from bigbase_jax.audio.files import SUFFIXES, decode
from bigbase_jax.core import Codec, Example, Fields
from bigbase_jax.data.files import given_file

COLUMNS = ("audio", "path", "file", "file_name", "filename", "audio_path", "wav")
__all__ = ["COLUMNS", "SUFFIXES", "AudioCodec", "pcm16"]


def pcm16(x_T: np.ndarray) -> np.ndarray:
    """f32[T] in -1..1, clipped, as i16[T]."""
    return np.rint(np.clip(x_T * 32768.0, -32768, 32767)).astype(np.int16)


@dataclasses.dataclass(frozen=True)
class AudioCodec(Codec):
    """A user's recording: a file, its bytes, or a row whose ``audio`` is these in base64; a table names files.

    Attributes:
      rate: samples per second that the model was trained on.
    """

    rate: int

    fields = Fields({"audio": [(name,) for name in COLUMNS]}, files=True)

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """``audio`` i16[T].

        Raises:
          UserError: it does not decode.
        """
        return [{"audio": pcm16(decode(given_file(given, "audio", "sound"), self.rate))}]
