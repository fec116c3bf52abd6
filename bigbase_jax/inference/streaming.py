"""Recognition of speech as it comes: samples in, what has been said so far out.

The encoder's state goes from chunk to chunk, so that what is heard is what the whole recording at once would give
(``models.conformer``). Likeliest tokens are shown at once and may change; at a pause they are searched again, with the
language model where the task has one, and are final. Memory does not grow with the recording.

Axes: B = 1 recording, T samples, S frames of the encoder, D width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.audio.files import pcm16
from bigbase_jax.core import UserError, Variables
from bigbase_jax.inference.parts import Parts
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.pretrained.start import chain, merged
from bigbase_jax.wrappers.wrapper import Wrapper


class Stream:
    """One recording that is being heard; not for several threads at once.

    ``feed`` and ``finish`` answer ``{"text": str, "final": [...], "words": [...]}``: what has been heard since the last
    final part, and may still change, with its ``words``; and the parts that are now final, each with ``text``,
    ``words``, ``segments``, ``start`` and ``end``. Times are seconds from the beginning of the recording.

    Attributes:
      rate: samples per second that ``feed`` takes.
      latency: seconds from a sound to the chunk that says it, at most, computing aside.
    """

    def __init__(
        self, model: Predictor | Any, variables: Variables | None = None, pause: float = 0.6, longest: float = 15.0
    ):
        """
        Args:
          model: a run or a folder that is open, or a task and its ``variables``.
          pause: seconds without a token behind which a part is final.
          longest: seconds of a part, which then ends before its last word.

        Raises:
          UserError: the model does not hear recordings, or only whole ones.
        """
        task, variables = (model.task, model.variables) if isinstance(model, Predictor) else (model, variables)
        inner: Any = next(some for some in chain(task) if not isinstance(some, Wrapper))
        encoder: Any = getattr(getattr(inner, "model", None), "encoder", None)
        if not hasattr(encoder, "encode_chunk") or encoder.chunk is None:
            raise UserError("the model hears whole recordings only; train one with a chunk (a Conformer's chunk=).")
        if inner.whole:
            raise UserError("the model's features depend on the whole recording; train with task.whole=False.")
        self._task, self._variables = inner, merged(task, variables or {})
        features, chunk = inner.features, encoder.chunk
        self._hop = 4 * chunk * features.hop
        self._size = (4 * (chunk + encoder.right) - 1) * features.hop + features.window
        self.rate, self.latency = int(inner.rate), self._size / inner.rate
        self._state = encoder.state(1, inner.mels)
        self._waiting = np.zeros(0, np.int16)
        self._parts = Parts(inner, pause, longest)

    def feed(self, audio_T: np.ndarray) -> dict[str, Any]:
        """The next samples, as many as there are: i16[T], or f32[T] in -1..1.

        Raises:
          UserError: other arrays.
        """
        audio_T = np.asarray(audio_T)
        if audio_T.ndim != 1 or audio_T.dtype not in (np.int16, np.float32):
            raise UserError(f"a stream takes i16[T] or f32[T], not {audio_T.dtype}{list(audio_T.shape)}.")
        self._waiting, final = np.concatenate([self._waiting, pcm16(np.nan_to_num(audio_T))]), []
        while len(self._waiting) >= self._size:
            final += self._hear(self._size)
        return self._answer(final)

    def finish(self) -> dict[str, Any]:
        """The end of the recording: what was still open is final."""
        final = []
        while self._task.features.frames(len(self._waiting)) > 0:
            final += self._hear(min(len(self._waiting), self._size))
        self._waiting = self._waiting[:0]
        return self._answer(final + self._parts.cut(self._parts.frames))

    def _hear(self, samples: int) -> list[dict[str, Any]]:
        """One chunk, of which so many samples are there, with those behind it; the parts that end in it."""
        window = np.zeros((1, self._size), np.int16)
        window[0, :samples] = self._waiting[:samples]
        self._waiting = self._waiting[self._hop :]
        self._state, outputs = _heard(self._task, self._variables, self._state, window, np.array([samples], np.int32))
        outputs = jax.device_get(outputs)
        real_S = outputs["path"][0] >= 0  # before the end of the recording
        return self._parts.add({name: x[0][real_S] for name, x in outputs.items() if x.ndim > 1})

    def _answer(self, final: list[dict[str, Any]]) -> dict[str, Any]:
        said = self._parts.said(self._parts.frames, final=False)
        return {"final": final, "text": said["text"], "words": said["words"]}


@functools.partial(jax.jit, static_argnums=0)
def _heard(task: Any, variables: Variables, state: Any, audio_BT: Any, samples_B: Any) -> tuple[Any, Any]:
    """(the encoder's state behind a chunk, what ``task`` gives of its frames)."""
    inputs = {"audio": audio_BT, "audio_length": samples_B}
    x_BFM, left_B = task.bands(inputs)
    within = {name: tree["encoder"] for name, tree in variables.items() if "encoder" in tree}
    h_BCD, state = task.model.encoder.apply(within, state, x_BFM, left_B, method="encode_chunk")
    head = variables["params"]["head"]
    logits_BCV = (h_BCD @ head["kernel"] + head["bias"]).astype(jnp.float32)
    frames_B = jnp.clip(-(-left_B // 4), 0, h_BCD.shape[1])
    return state, task.outputs(logits_BCV, frames_B, inputs)
