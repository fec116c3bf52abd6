"""A transcript that grows: frames of a CTC model come, and what ends in a pause is read for good.

Legend: S frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class Parts:
    """The frames of what has not ended yet, of a task such as ``tasks.recognition``.

    A part is ``{"text", "words", "segments", "start", "end"}``, with seconds from the beginning of the recording.

    Attributes:
      frames: that are kept.
    """

    def __init__(self, task: Any, pause: float, longest: float):
        """
        Args:
          pause: seconds without a token behind which a part has ended.
          longest: seconds of a part, which then ends before its last word.
        """
        self._task = task
        self._pause, self._longest = (round(seconds / task.frame_seconds) for seconds in (pause, longest))
        self._first = 0  # of the frames that are kept
        self._kept: dict[str, np.ndarray] = {}

    @property
    def frames(self) -> int:
        return len(self._kept.get("path", ()))

    def add(self, outputs: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """The next frames, [S] and [S,K] by name; the parts that end in them."""
        for name, x in outputs.items():
            self._kept[name] = np.concatenate([self._kept[name], x]) if name in self._kept else x
        said = np.flatnonzero(self._kept["path"] != self._task.blank)
        if not len(said):  # silence before the first token
            self._drop(self.frames)
        elif self.frames - said[-1] > self._pause:
            return self.cut(self.frames)
        elif self.frames > self._longest:
            words = self.said(self.frames, final=False)["words"]
            last = round((words[-1]["start"] if words else 0.0) / self._task.frame_seconds) - self._first
            return self.cut(last if len(words) > 1 and last > 0 else self.frames)
        return []

    def cut(self, frames: int) -> list[dict[str, Any]]:
        """What is said in the first frames that are kept, if anything, for good."""
        if not frames:
            return []
        part = self.said(frames, final=True)
        self._drop(frames)
        words = part["words"]
        return [{**part, "start": words[0]["start"], "end": words[-1]["end"]}] if words else []

    def _drop(self, frames: int) -> None:
        self._first += frames
        self._kept = {name: x[frames:] for name, x in self._kept.items()}

    def said(self, frames: int, final: bool) -> dict[str, Any]:
        """``text``, ``words`` and ``segments``: by a search where that is final, else by the likeliest token of each
        frame."""
        if not frames:
            return {"text": "", "words": [], "segments": []}
        names = self._kept if final else ("path",)
        seconds = np.float32(frames * self._task.frame_seconds)
        found = self._task.postprocess({**{name: self._kept[name][:frames] for name in names}, "seconds": seconds}, {})
        start = self._first * self._task.frame_seconds

        def later(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{**part, **{key: round(part[key] + start, 3) for key in ("start", "end")}} for part in parts]

        return {"text": found["text"], "words": later(found["words"]), "segments": later(found["segments"])}
