"""Regression: a number predicted from numbers, by least squares.

Axes: B examples of a batch, N examples of a split, F features.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Batch, Sum, UserError, Variables


@dataclasses.dataclass(frozen=True)
class Regression:
    """A batch holds ``features`` f32[B,F], ``target`` f32[B] and ``mask`` f32[B].

    Attributes:
      model: a Linen module ``(features, train) -> f32[B,1]``.
      feature_mean, feature_std, target_mean, target_std: to scale by; None in a config: taken from the data.
    """

    model: nn.Module
    feature_mean: tuple[float, ...] | None = None
    feature_std: tuple[float, ...] | None = None
    target_mean: float | None = None
    target_std: float | None = None

    inputs: ClassVar[tuple[str, ...]] = ("features",)
    batch_coupled: ClassVar[bool] = False

    def _scaled(self, batch: Batch) -> jax.Array:
        return (batch["features"] - jnp.array(self.feature_mean)) / jnp.array(self.feature_std)

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        return self.model.init(key, self._scaled(batch))

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Sum, Variables]:
        """The squared error in units of the target's variance."""
        value_B = self.model.apply(variables, self._scaled(batch), train=True, rngs={"dropout": key})[:, 0]
        wanted_B = (batch["target"] - self.target_mean) / self.target_std
        return Sum(jnp.sum(batch["mask"] * (value_B - wanted_B) ** 2), jnp.sum(batch["mask"])), {}

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``value`` f32[B], in the target's own unit."""
        return {"value": self.model.apply(variables, self._scaled(inputs))[:, 0] * self.target_std + self.target_mean}

    def metrics(self, outputs: Mapping[str, jax.Array], batch: Batch) -> Mapping[str, Sum]:
        """``mean_absolute_error`` in the target's unit, and ``loss`` as in training."""
        error_B, weight = outputs["value"] - batch["target"], jnp.sum(batch["mask"])
        return {
            "mean_absolute_error": Sum(jnp.sum(batch["mask"] * jnp.abs(error_B)), weight),
            "loss": Sum(jnp.sum(batch["mask"] * (error_B / self.target_std) ** 2), weight),
        }

    def report(self, examples: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        """``r2``: the share of the target's variance that is explained."""
        residual_N = examples["target"] - examples["value"]
        return {"r2": float(1 - residual_N.var() / max(examples["target"].var(), 1e-12))}

    def present(self, output: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {"value": float(output["value"])}

    def join(self, parts: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        raise UserError("an input of a regression is one row.")
