"""Recordings that are longer than what a recogniser reads at once: windows that overlap, and where they are joined.

Two windows see the frames of their overlap alike but near their ends. They are joined at the frame nearest to its
middle in which both say nothing, so that no token is said twice or never; or in the middle where there is none. The
file is read block by block and text is made part by part: memory does not grow with the recording.

Legend: T samples, S frames.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.audio.files import blocks, pcm16
from bigbase_jax.core import Codec, Example, UserError
from bigbase_jax.data.files import given_file
from bigbase_jax.inference.parts import Parts
from bigbase_jax.inference.predictor import Output, Predictor

_OVERLAP = 1 / 3  # of a window and the next
_WINDOWS = 8  # that are computed at once
_PAUSE, _LONGEST = 1.0, 30.0  # seconds; see ``Parts``


def first_window(given: bytes | str | Mapping[str, Any], rate: int, window: int) -> Example:
    """A user's recording, as its first ``window`` samples; the rest is read where its turn comes.

    Returns:
      ``audio`` i16[T], ``audio_length`` i32[]; ``recording``, the file, where there is more of it.

    Raises:
      UserError: it does not decode.
    """
    data, first = given_file(given, "audio", "sound"), np.zeros(0, np.float32)
    for block in blocks(data, rate):
        first = np.concatenate([first, block])
        if len(first) > window:
            break
    x_T = pcm16(first[:window])
    return {"audio": x_T, "audio_length": np.int32(len(x_T)), **({"recording": data} if len(first) > window else {})}


@dataclasses.dataclass(frozen=True)
class RecordingCodec(Codec):
    """What the codec of the data set reads, by its first window of so many samples."""

    codec: Any
    window: int

    @property
    def fields(self) -> Any:  # type: ignore[override]
        return self.codec.fields

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """See ``first_window``."""
        return [first_window(given, self.codec.rate, self.window)]

    def fit(self, example: Example, shapes: Mapping[str, tuple[int, ...]]) -> Example:
        found: Example = self.codec.fit(example, shapes)
        return found


@dataclasses.dataclass(eq=False)
class Windowed(Predictor):
    """A predictor of a task such as ``tasks.recognition``, for recordings of any length."""

    def __post_init__(self) -> None:
        read, window = self.read, self.spec["audio"].shape[0]

        def windowed() -> Any:
            reading = read()
            return dataclasses.replace(reading, codec=RecordingCodec(reading.codec, window))

        self.read = windowed

    def said(self, found: Sequence[tuple[Example, Output]]) -> list[dict[str, Any]]:
        """As ``Predictor.said``, of whole recordings."""
        short = super().said
        return [
            self._long(example) if "recording" in example else short([(example, output)])[0]
            for example, output in found
        ]

    def _long(self, example: Example) -> dict[str, Any]:
        task: Any = self.task
        window, frame = len(example["audio"]), round(task.frame_seconds * task.rate)
        step = int(window * (1 - _OVERLAP)) // frame * frame
        if not step:
            raise UserError(
                f"the model reads {window / task.rate:.2f} seconds at once, too few for a longer recording."
            )
        parts, found, duration = Parts(task, _PAUSE, _LONGEST), [], 0.0
        for samples, outputs in joined(self._windows(example["recording"], window, step), step // frame, task.blank):
            found += parts.add(outputs)
            duration = samples / task.rate
        found += parts.cut(parts.frames)
        between = "" if task.normalisation == "characters" else " "
        return {
            "text": between.join(part["text"] for part in found),
            **{name: [x for part in found for x in part[name]] for name in ("words", "segments")},
            "duration": round(duration, 3),
        }

    def _windows(self, recording: Any, window: int, step: int) -> Iterator[tuple[int, Output]]:
        """(samples up to the end of a window, what the model gives of each of its real frames), in order."""
        task: Any = self.task
        cut = cuts(blocks(recording, task.rate), window, step)
        while some := list(itertools.islice(cut, _WINDOWS)):
            examples = [
                {"audio": np.pad(x_T, (0, window - len(x_T))), "audio_length": np.int32(len(x_T))} for _, x_T in some
            ]
            for (end, _), output in zip(some, self.computed(examples, _WINDOWS), strict=True):
                real_S = output["path"] >= 0
                yield end, {name: output[name][real_S] for name in ("path", "candidates", "log_p") if name in output}


def cuts(parts: Iterator[np.ndarray], window: int, step: int) -> Iterator[tuple[int, np.ndarray]]:
    """(samples up to its end, i16[T]) of each window, of blocks f32[T]; the last one is shorter or as long."""
    waiting, start = np.zeros(0, np.int16), 0
    for block in parts:
        waiting = np.concatenate([waiting, pcm16(block)])
        while len(waiting) > window:
            yield start + window, waiting[:window]
            waiting, start = waiting[step:], start + step
    if len(waiting):
        yield start + len(waiting), waiting


def joined(windows: Iterator[tuple[int, Output]], step: int, blank: int) -> Iterator[tuple[int, Output]]:
    """(samples so far, the next frames) of windows of which each begins ``step`` frames behind the one before."""
    kept: Output = {}
    first, end = 0, 0
    for end, output in windows:
        at = 0
        if kept:
            known, new = kept["path"][step:], output["path"]
            shared = min(len(known), len(new))
            quiet = np.flatnonzero((known[:shared] == blank) & (new[:shared] == blank))
            at = int(quiet[np.argmin(np.abs(quiet - shared // 2))]) if len(quiet) else shared // 2
            yield end, {name: x[first : step + at] for name, x in kept.items()}
        kept, first = output, at
    yield end, {name: x[first:] for name, x in kept.items()}
