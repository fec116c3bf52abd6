"""Regression: a number predicted from numbers, by least squares.

Axes: B examples of a batch, N examples of a split, F features.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Batch, Example, Loss, Meter, Metric, Sum, Variables
from bigbase_jax.evaluate import Totals


def moments(examples: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What ``explained`` needs of a batch, as sums: all examples need not be kept."""
    y_N = np.float64(examples["target"])
    error_N = y_N - examples["value"]
    return {"n": len(y_N), "y": y_N.sum(), "yy": (y_N**2).sum(), "e": error_N.sum(), "ee": (error_N**2).sum()}


def explained(sums: Mapping[str, Any]) -> dict[str, float]:
    """``r2``: the share of the target's variance that is explained."""
    n, y, yy, e, ee = (float(sums[name]) for name in ("n", "y", "yy", "e", "ee"))
    return {"r2": 1 - (ee / n - (e / n) ** 2) / max(yy / n - (y / n) ** 2, 1e-12)}


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
    metrics: ClassVar[Mapping[str, Metric]] = {
        "loss": Metric("min"),
        "mean_absolute_error": Metric("min"),
        "r2": Metric("max", "%", "Explained variance"),
    }

    def _scaled(self, batch: Batch) -> jax.Array:
        return (batch["features"] - jnp.array(self.feature_mean)) / jnp.array(self.feature_std)

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        return self.model.init(key, self._scaled(batch))

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """The squared error in units of the target's variance."""
        value_B = self.model.apply(variables, self._scaled(batch), train=True, rngs={"dropout": key})[:, 0]
        wanted_B = (batch["target"] - self.target_mean) / self.target_std
        return Loss({"loss": self._sum((value_B - wanted_B) ** 2, batch)}), {}

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``value`` f32[B], in the target's own unit."""
        return {"value": self.model.apply(variables, self._scaled(inputs))[:, 0] * self.target_std + self.target_mean}

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """``value`` and ``target``; ``mean_absolute_error`` in the target's unit, and ``loss`` as in training."""
        value_B, target_B = self.predict(variables, batch)["value"], jnp.asarray(batch["target"])
        error_B = value_B - target_B
        sums = {
            "mean_absolute_error": self._sum(jnp.abs(error_B), batch),
            "loss": self._sum((error_B / self.target_std) ** 2, batch),
        }
        return {"value": value_B, "target": target_B}, sums

    def meters(self) -> Mapping[str, Meter]:
        return {"explained": Totals(moments, explained)}

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """``{"value": number}`` of a row."""
        return {"value": float(output["value"])}

    def _sum(self, value_B: jax.Array, batch: Batch) -> Sum:
        return Sum(jnp.sum(batch["mask"] * value_B), jnp.sum(batch["mask"]))
