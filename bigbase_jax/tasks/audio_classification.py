"""Classification of recordings: commands, speakers, kinds of sound.

Axes: B examples, T samples, F frames, M mel bands, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.audio.features import LogMel, fbank
from bigbase_jax.core import Array, Batch, Figure, Table, UserError, Variables
from bigbase_jax.tasks import figures
from bigbase_jax.tasks.classification import Classifier, applied_in_training, init_logits
from bigbase_jax.tasks.errors import model_errors


@dataclasses.dataclass(frozen=True)
class AudioClassification(Classifier):
    """A model of pictures over log-mel bands, which are computed within the compiled step.

    A batch holds ``audio``: i16[B,T], or f32 in -1..1; and what ``Classifier`` says, whose attributes and errors these
    are too:

    Attributes:
      model: a Linen module ``(f32[B,F,M,1], train) -> logits``, f32[B,K].
      rate: samples per second; None: the data's.
      mels: M.
      mean, std: of the features, which become ``(x - mean) / std``.
      time_masks, frequency_masks: SpecAugment (Park et al. 2019) in training: (how many, the most frames or bands each
        is wide); what they cover becomes the mean.
    """

    rate: int | None = None
    mels: int = 40
    mean: float = 12.0
    std: float = 5.0
    time_masks: tuple[int, int] = (0, 0)
    frequency_masks: tuple[int, int] = (0, 0)

    inputs: ClassVar[tuple[str, ...]] = ("audio",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("time_masks", "frequency_masks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.rate is None:
            raise UserError("the task does not know the samples per second; set rate.")

    @property
    def features(self) -> LogMel:
        """What the model reads: Kaldi's filter banks."""
        return fbank(self.mels, self.rate or 0)

    def bands(self, audio_BT: Array) -> jax.Array:
        """f32[B,F,M,1]."""
        y_BFM: jax.Array = (self.features(audio_BT) - self.mean) / self.std
        return y_BFM[..., None]

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the recordings or the number of classes.
        """
        return init_logits(self.model, self.num_classes, key, self.bands(jnp.zeros((1, *batch["audio"].shape[1:]))))

    def train_logits(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[jax.Array, Variables]:
        mask_key, dropout_key = jax.random.split(key)
        x_BFM1 = spec_augment(mask_key, self.bands(batch["audio"]), self.time_masks, self.frequency_masks)
        return applied_in_training(self.model, variables, dropout_key, x_BFM1)

    def logits(self, variables: Variables, inputs: Batch) -> jax.Array:
        with model_errors():
            logits_BK: jax.Array = self.model.apply(variables, self.bands(inputs["audio"]))  # type: ignore[assignment]
        return logits_BK

    # -- on the host -----------------------------------------------------------------------------------------------

    def examples_shown(
        self, p_NK: np.ndarray, label_N: np.ndarray, index_N: np.ndarray, examples: Mapping[str, np.ndarray]
    ) -> Figure:
        """The recordings whose class was given the least probability."""
        names, rows = self._names(p_NK.shape[-1]), np.arange(len(label_N))
        worst = np.argsort(p_NK[rows, label_N], kind="stable")[: figures.SHOWN]
        cells = [
            (
                int(index_N[n]),
                names[label_N[n]],
                names[p_NK[n].argmax()],
                float(p_NK[n].max()),
                float(p_NK[n, label_N[n]]),
            )
            for n in worst
        ]
        columns = ("Recording", "Is", "Said", "Sure of that", "Of what it is")
        return Table("Hardest recordings", columns, cells, shares=("Sure of that", "Of what it is"))


def spec_augment(
    key: jax.Array,
    x_BFM1: jax.Array,
    time_masks: tuple[int, float],
    frequency_masks: tuple[int, float],
    frames_B: jax.Array | None = None,
) -> jax.Array:
    """SpecAugment (Park et al. 2019): masks over time, of ``frames_B`` where recordings are padded, and frequency."""
    for axis, (count, most) in ((1, time_masks), (2, frequency_masks)):
        for i in range(int(count)):
            x_BFM1 = masked(
                jax.random.fold_in(key, 100 * axis + i), x_BFM1, axis, most, frames_B if axis == 1 else None
            )
    return x_BFM1


def masked(key: jax.Array, x_BFM1: jax.Array, axis: int, most: float, within_B: jax.Array | None = None) -> jax.Array:
    """Zeros over a stretch of an axis, at a place and of a width up to ``most`` of each example's own; with
    ``within_B``, among so many first places, of which ``most`` is a share."""
    size = x_BFM1.shape[axis]
    width_key, place_key = jax.random.split(key)
    among = size if within_B is None else within_B
    width_B = jax.random.uniform(width_key, (len(x_BFM1),)) * (
        min(most, size) + 1 if within_B is None else most * within_B + 1
    )
    start_B = jax.random.uniform(place_key, (len(x_BFM1),)) * (among - jnp.floor(width_B))
    at = jnp.arange(size)
    covered_BS = (at >= jnp.floor(start_B)[:, None]) & (at < (jnp.floor(start_B) + jnp.floor(width_B))[:, None])
    return jnp.where(jnp.expand_dims(covered_BS, (3 - axis, 3)), 0.0, x_BFM1)
