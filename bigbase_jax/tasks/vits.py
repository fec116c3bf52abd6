"""Published voices: texts spoken by a VITS.

Legend: B texts, L tokens, F frames, C channels of a frame, T samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.audio.files import wav
from bigbase_jax.core import Array, Batch, Evaluated, Example, Loss, Meter, Metric, Rendered, Sum, UserError, Variables
from bigbase_jax.models.vits import FRAMES
from bigbase_jax.tasks.errors import model_errors

_PAUSE = 0.2  # seconds between sentences


@dataclasses.dataclass(frozen=True)
class PublishedVoice:
    """A voice that is not trained further: its noise is drawn by ``seed``, the same for each place of any text.

    A batch holds ``present`` i32[B,L], 1, and 0 for padding behind it, ``tokens`` i32[B,L], ``speaker`` i32[B] and
    ``rate`` f32[B], times the usual speed.

    Attributes:
      model: a ``models.vits.Vits``.
      seed: of the noise.
    """

    model: nn.Module
    seed: int = 0

    inputs: ClassVar[tuple[str, ...]] = ("present", "tokens", "speaker", "rate")
    batch_coupled: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = {}

    def _given(self, inputs: Batch) -> tuple[Array, ...]:
        B, L = inputs["tokens"].shape
        keys = jax.random.split(jax.random.key(self.seed))

        def noise(key: jax.Array, count: int, width: int) -> jax.Array:
            rows = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (width,)))(jnp.arange(count))
            return jnp.broadcast_to(rows, (B, count, width))

        named = (jnp.asarray(inputs[name]) for name in ("tokens", "present", "speaker", "rate"))
        return (*named, noise(keys[0], L, 2), noise(keys[1], FRAMES * L, self.model.flow_width))

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        return dict(self.model.init(key, *self._given(batch)))

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        raise UserError("a published VITS speaks, and is not trained here; train a voice with configs/voice.py.")

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``wave`` f32[B,T], ``samples`` i32[B], how many of them are sound, and ``cut`` bool[B]: whether there was no
        room for more."""
        with model_errors():
            found: Any = self.model.apply(variables, *self._given(inputs))
        wave_BT, samples_B = found
        return {"wave": wave_BT, "samples": samples_B, "cut": samples_B == wave_BT.shape[1]}

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        raise UserError("a published VITS has nothing to be measured by here.")

    def meters(self) -> Mapping[str, Meter]:
        return {}

    def figures(self, evaluated: Evaluated) -> tuple[()]:
        return ()

    # -- on the host -----------------------------------------------------------------------------------------------

    @property
    def rate(self) -> int:
        """Samples per second."""
        rate: int = self.model.samples
        return rate

    def merge(self, outputs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Sentences, with pauses between them."""
        pause = np.zeros(int(_PAUSE * self.rate), np.float32)
        parts = [part for found in outputs for part in (found["wave"][: found["samples"]], pause)]
        wave = np.concatenate(parts[:-1])
        cut = np.array([found["cut"] for found in outputs]).any()
        return {"wave": wave, "samples": np.array(len(wave)), "cut": np.array(cut)}

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        cut = {"cut": True} if output["cut"] else {}
        return {"duration": round(int(output["samples"]) / self.rate, 3), **cut}

    def rendered(self, output: Mapping[str, np.ndarray], example: Example) -> Rendered:
        """The sound.

        Raises:
          UserError: the weights are broken.
        """
        wave = output["wave"][: output["samples"]]
        if not np.isfinite(wave).all():
            raise UserError("the voice gives samples that are no numbers; its weights are broken.")
        return Rendered(".wav", "audio/wav", wav(wave, self.rate))
