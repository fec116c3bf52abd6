"""Recordings of any length, transcribed window by window (Radford et al. 2022, section 4.5).

Axes: T samples of a window, F frames, M mel bands, S places of the encoder, D its width, L tokens of a prompt.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.audio.features import compressed, in_blocks
from bigbase_jax.audio.files import blocks
from bigbase_jax.core import Codec, Example, Fields, UserError
from bigbase_jax.data.sources.audio.audio import COLUMNS
from bigbase_jax.inference.predictor import Output, Predictor, Reading
from bigbase_jax.inference.windowed import first_window
from bigbase_jax.tasks.transcription import ANY, RATE, STEP, Transcription

_COLD = 0.5  # what was written at a higher temperature is not read again
_MOST_TOKENS = 1 << 20  # of a recording; more are a model that does not come on


@dataclasses.dataclass(frozen=True)
class RecordingCodec(Codec):
    """A user's recording, as its first window; the rest is read where its turn comes.

    Attributes:
      task: what transcribes.
    """

    task: Transcription

    fields = Fields({"audio": [(name,) for name in COLUMNS]}, files=True, options=("language",))

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """``audio`` i16[T], ``audio_length`` i32[], ``language`` i32[]; ``recording`` where there is more of it.

        Raises:
          UserError: it does not decode, or the model does not know the language.
        """
        asked = given.get("language") if isinstance(given, Mapping) else None
        found = first_window(given, RATE, self.task.window)
        if not len(found["audio"]):
            raise UserError("the recording has no samples.")
        audio = np.pad(found["audio"], (0, self.task.window - len(found["audio"])))
        language = np.int32(self.task.token_of(str(asked).lower()) if asked else ANY)
        return [{**found, "audio": audio, "language": language}]


@dataclasses.dataclass(eq=False)
class Recogniser(Predictor):
    """A predictor of a ``Transcription``: of what is written at first, it keeps what is good enough, and goes on."""

    def __post_init__(self) -> None:
        task: Any = self.task
        self.spec = {"audio": jax.ShapeDtypeStruct((task.window,), np.int16)}
        if "language" in task.inputs:
            self.spec["language"] = jax.ShapeDtypeStruct((), np.int32)
        self.read = lambda: Reading(RecordingCodec(task))
        self._encode, self._write, self._heard = map(jax.jit, (task.encode, task.write, task.heard))

    def said(self, found: Sequence[tuple[Example, Output]]) -> list[dict[str, Any]]:
        """As ``Predictor.said``, of whole recordings."""
        return [self._transcribed(example, output) for example, output in found]

    def _transcribed(self, example: Example, output: Output) -> dict[str, Any]:
        task: Any = self.task
        hop, most = task.features.hop, task.window // task.features.hop
        language, recording = int(output["language"]), example.get("recording")
        if recording is None:
            frames, samples = int(example["audio_length"]) // hop, int(example["audio_length"])
            whole_FM = np.asarray(self._heard(example["audio"][None]))[0][:frames]
            windows: _Windows = _Windows(iter([whole_FM]), None)
        else:
            top, frames = -np.inf, 0
            samples = 0

            def counted() -> Iterator[np.ndarray]:
                nonlocal samples
                for block in blocks(recording, RATE):
                    samples += len(block)
                    yield block

            for log_FM in in_blocks(task.features, counted()):
                top, frames = max(top, float(log_FM.max())), frames + len(log_FM)
            windows = _Windows(in_blocks(task.features, blocks(recording, RATE)), top)
        parts: list[tuple[float, float, np.ndarray]] = []
        previous: list[int] = []
        written, seek = 0, 0
        while seek < frames:
            here = min(most, frames - seek)
            window_FM = windows.at(seek, here)
            first = output if seek == 0 and recording is None else None
            tokens, cold = self._best(window_FM, most, language, previous if task.condition else [], first, seek)
            if tokens is None:  # no speech
                seek += here
                continue
            found, done = task.segments(tokens, here)
            parts += [(a + seek * STEP / 2, b + seek * STEP / 2, part) for a, b, part in found]
            previous = [*previous, *(int(t) for *_, part in found for t in part)] if cold else []
            written, seek = written + len(tokens), seek + max(done, 1)
            if written > _MOST_TOKENS:
                raise UserError(f"the model wrote {written:,} tokens and did not come to an end.")
        return task.answer(parts, samples / RATE, language)

    def _best(
        self, window_FM: np.ndarray, most: int, language: int, previous: list[int], first: Output | None, seek: int
    ) -> tuple[np.ndarray | None, bool]:
        """(what is written of a window, without its end, or None where nothing is said; whether at a low temperature):
        at the first temperature at which it is good enough, or at the last."""
        task: Any = self.task
        memory: Any = None
        for i, temperature in enumerate(task.temperatures):
            if i or first is None or temperature:
                if memory is None:
                    padded_FM = np.pad(window_FM, ((0, most - len(window_FM)), (0, 0)))
                    memory = self._encode(self.variables, padded_FM[None])
                prompt_1L, length, start = self._prompt(language, previous)
                arrays = (jnp.array([x], jnp.int32) for x in (length, start))
                seed = (seek * 31 + i) % (1 << 31)
                found = self._write(self.variables, memory, prompt_1L, *arrays, np.float32(temperature), seed)
                output = {name: np.asarray(x)[0] for name, x in found.items()}
            else:
                output = first
            count = int(output["count"])
            tokens = np.asarray(output["tokens"])[:count]
            mean = float(output["log_p"]) / max(count, 1)
            unlikely = task.log_p is not None and mean < task.log_p
            if unlikely and task.no_speech is not None and float(output["no_speech"]) > task.no_speech:
                return None, temperature < _COLD
            tokens = tokens[tokens != task.format.end]
            if not unlikely and not self._repeats(tokens):
                break
        return tokens, temperature < _COLD

    def _repeats(self, tokens: np.ndarray) -> bool:
        task: Any = self.task
        text = task.text(tokens).strip().encode()
        return task.compression is not None and len(text) > task.compression * len(zlib.compress(text))

    def _prompt(self, language: int, previous: list[int]) -> tuple[np.ndarray, int, int]:
        """(i32[1,L], its tokens, the place of the start token): the last of what was written before is in front."""
        task: Any = self.task
        marks = np.asarray(task.prompt(np.array([language]), task.rules.timestamps))[0]
        if not previous or task.format.previous is None:
            return marks[None], len(marks), 0
        room = task.places // 2 - 1
        kept = [task.format.previous, *previous[-room:], *marks.tolist()]
        start = len(kept) - len(marks)
        size = room + 1 + len(marks)  # one program for all of them
        return np.pad(np.array(kept, np.int32), (0, size - len(kept)))[None], len(kept), start


class _Windows:
    """Frames of a recording from any place on that is not before those given last."""

    def __init__(self, parts: Iterator[np.ndarray], top: float | None):
        """``parts``: in order; ``top``: see ``features.compressed``; None: they are."""
        self._parts, self._top, self._start = parts, top, 0
        self._kept: np.ndarray | None = None

    def at(self, start: int, count: int) -> np.ndarray:
        """f32[F,M]: so many of them."""
        while self._kept is None or self._start + len(self._kept) < start + count:
            part = next(self._parts)
            if self._top is not None:
                part = compressed(part, self._top)
            self._kept = part if self._kept is None else np.concatenate([self._kept, part])
            drop = min(max(start - self._start, 0), len(self._kept))
            self._kept, self._start = self._kept[drop:], self._start + drop
        first = start - self._start
        return self._kept[first : first + count]
