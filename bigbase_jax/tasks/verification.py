"""Verification: a classifier of those it trains on, of which the vector before the classes is used, for anybody.

Axes: B examples, D of a vector, K classes of the training.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Batch, Evaluated, Example, Figure, Loss, Meter, Metric, Sum, UserError, Variables
from bigbase_jax.models.margin import CosineHead, cosines, sampled, unit, with_margin
from bigbase_jax.tasks.audio_classification import AudioClassification
from bigbase_jax.tasks.classification import Classification, Classifier


@dataclasses.dataclass(frozen=True)
class Embedded(Classifier):
    """A classifier trained with an angular margin (``models.margin``) that predicts vectors; mixed into one that says
    what it reads. Examples of classes that the training did not have are measured by ``evaluators.verification`` alone.

    Attributes:
      model: a ``CosineHead``.
      margin, scale: of the logits, in radians and as a factor.
      sampled: the share of the classes that a step of the training compares with: those of the batch, and others that
        are drawn anew each time (partial FC). Below 1, a loss depends on the whole batch.

    Raises:
      UserError: another model, or a share that is none.
    """

    margin: float = 0.2
    scale: float = 30.0
    sampled: float = 1.0

    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.model, CosineHead):
            raise UserError(
                f"a margin is one of angles: use CosineHead({type(self.model).__name__}(...)) as the model."
            )
        if not 0 < self.sampled <= 1:
            raise UserError(f"sampled is {self.sampled}; it is a share of the classes, such as 0.1, or 1 for all.")

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """See ``core.Task``."""
        return {"accuracy": Metric("max", "%"), "loss": Metric("min", "nats")}

    @property
    def batch_coupled(self) -> bool:  # type: ignore[override]
        return self.sampled < 1

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """
        Raises:
          UserError: a batch may have more classes than are sampled.
        """
        if self.sampled == 1:
            return super().loss(variables, batch, key)
        model_key, class_key = jax.random.split(key)
        classes_DK = variables["params"]["classes"]
        total, label_B = classes_DK.shape[1], jnp.asarray(batch["label"])
        size = round(self.sampled * total)
        if size < min(len(label_B), total):
            raise UserError(
                f"sampled={self.sampled} of {total} classes are {size}, and a batch may have {len(label_B)}; sample "
                "more, or make batches smaller."
            )
        body, of_body = self._of_body(variables)
        vector_BD, state = body.train_logits(of_body, batch, model_key)
        class_S, place_B = sampled(class_key, label_B, total, size)
        cosine_BS = cosines(unit(vector_BD.astype(jnp.float32)), jnp.take(classes_DK, class_S, 1))
        loss = self.loss_from(cosine_BS, {**batch, "label": place_B})
        return loss, {name: {"body": tree} for name, tree in state.items()}

    def _of_body(self, variables: Variables) -> tuple[Any, Variables]:
        """The task whose logits are the vectors, and its variables."""
        body = copy.copy(self)
        object.__setattr__(body, "model", self.model.body)
        return body, {name: tree["body"] for name, tree in variables.items() if "body" in tree}

    def loss_from(self, logits_BK: jax.Array, batch: Batch) -> Loss:
        """The training loss of cosines."""
        y_BK = self.one_hot(batch["label"], logits_BK.shape[-1])
        return super().loss_from(with_margin(logits_BK, y_BK, self.margin, self.scale), batch)

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``vector``, f32[B,D] of length 1."""
        body, of_body = self._of_body(variables)
        found = body.logits(of_body, inputs)
        return {"vector": unit(found.astype(jnp.float32))}

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """``vector`` and ``label``; ``accuracy`` and ``loss`` (without margin) of the classes of the training."""
        outputs = self.predict(variables, batch)
        cosine_BK = outputs["vector"] @ unit(variables["params"]["classes"], 0)
        label_B = jnp.asarray(batch["label"])
        weight_B = batch["mask"] * (label_B < cosine_BK.shape[-1])
        loss_B = self.loss_of(self.scale * cosine_BK, self.one_hot(label_B, cosine_BK.shape[-1]))
        values = {"accuracy": jnp.argmax(cosine_BK, -1) == label_B, "loss": loss_B}
        sums = {name: Sum(jnp.sum(weight_B * value_B), jnp.sum(weight_B)) for name, value_B in values.items()}
        return {**outputs, "label": label_B}, sums

    def meters(self) -> Mapping[str, Meter]:
        return {}

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """``{"vector": [...]}``: the cosine of two, which have length 1, is their score."""
        return {"vector": [float(x) for x in output["vector"]]}

    def merge(self, outputs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The direction of the mean."""
        mean = np.mean([output["vector"] for output in outputs], axis=0)
        return {"vector": mean / max(float(np.linalg.norm(mean)), 1e-9)}

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """None; see ``evaluators.verification``."""
        return iter(())


@dataclasses.dataclass(frozen=True)
class SpeakerVerification(Embedded, AudioClassification):
    """Vectors of voices."""


@dataclasses.dataclass(frozen=True)
class FaceVerification(Embedded, Classification):
    """Vectors of faces."""
