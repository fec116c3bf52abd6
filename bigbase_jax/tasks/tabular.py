"""Classes and numbers predicted from rows of a table.

Axes: B rows of a batch, N rows of a split, F numbers, C categories, K classes, Q quantiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import (
    Batch,
    Evaluated,
    Example,
    Figure,
    Loss,
    Meter,
    Metric,
    Plot,
    Sum,
    Table,
    UserError,
    Variables,
)
from bigbase_jax.evaluate import Totals
from bigbase_jax.tasks import figures
from bigbase_jax.tasks.classification import Classifier, applied_in_training, init_logits
from bigbase_jax.tasks.errors import model_errors

LOSSES = ("squared", "absolute", "pinball")
ENTRIES = ("numbers", "categories")
_SHOWN = 2000  # points of a figure


def entries_of(cardinalities: tuple[int, ...] | None, number_names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The entries of a batch that a model of these columns reads: none that is empty."""
    there = (number_names is None or number_names, cardinalities is None or cardinalities)
    return tuple(name for name, some in zip(ENTRIES, there, strict=True) if some) or ENTRIES


def rows_of(inputs: Batch) -> tuple[jax.Array, jax.Array]:
    """``numbers`` f32[B,F] and ``categories`` i32[B,C] of a batch, which may lack one of them."""
    B = next(inputs[name] for name in ENTRIES if name in inputs).shape[0]
    numbers = inputs.get("numbers", jnp.zeros((B, 0), jnp.float32))
    return jnp.asarray(numbers), jnp.asarray(inputs.get("categories", jnp.zeros((B, 0), jnp.int32)))


def applied(model: nn.Module, variables: Variables, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Variables]:
    """f32[B,K] of a model of rows, and its state after it; ``key`` None: not in training."""
    if key is not None:
        return applied_in_training(model, variables, key, *rows_of(batch))
    with model_errors():
        found: Any = model.apply(variables, *rows_of(batch))
    return found, {}


@dataclasses.dataclass(frozen=True)
class TabularClassification(Classifier):
    """Classification of rows.

    A batch holds ``numbers`` f32[B,F] and ``categories`` i32[B,C]; and what ``Classifier`` says, whose attributes and
    errors these are too:

    Attributes:
      model: a Linen module ``(numbers, categories, train) -> logits`` f32[B,K].
      cardinalities, number_names: what the data says of its columns: entries of none are not among ``inputs``.
    """

    cardinalities: tuple[int, ...] | None = None
    number_names: tuple[str, ...] | None = None

    merge: ClassVar[None] = None  # type: ignore[assignment]  # several rows have an answer each

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        return entries_of(self.cardinalities, self.number_names)

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the columns or the number of classes.
        """
        one = {name: jnp.zeros((1, *x.shape[1:]), x.dtype) for name, x in batch.items() if name in ENTRIES}
        return init_logits(self.model, self.num_classes, key, *rows_of(one))

    def train_logits(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[jax.Array, Variables]:
        return applied(self.model, variables, batch, key)

    def logits(self, variables: Variables, inputs: Batch) -> jax.Array:
        return applied(self.model, variables, inputs, None)[0]

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """As ``Classifier`` says; and ``group``, where the data has it."""
        arrays, sums = super().evaluate(variables, batch)
        return {**arrays, **({"group": jnp.asarray(batch["group"])} if "group" in batch else {})}, sums

    def examples_shown(
        self, p_NK: np.ndarray, label_N: np.ndarray, index_N: np.ndarray, examples: Mapping[str, np.ndarray]
    ) -> Figure:
        """The rows whose class was given the least probability."""
        names, p_N = self._names(p_NK.shape[-1]), p_NK[np.arange(len(p_NK)), label_N]
        rows = [
            (int(index_N[n]) + 1, names[label_N[n]], names[int(p_NK[n].argmax())], float(p_N[n]))
            for n in np.argsort(p_N, kind="stable")[: figures.SHOWN]
        ]
        columns = ("Row of the split", "Is", "Said", "Probability of what it is")
        return Table("Hardest rows", columns, rows, shares=columns[-1:])


@dataclasses.dataclass(frozen=True)
class TabularRegression:
    """A number predicted from rows, with quantiles where the loss is "pinball".

    A batch holds ``numbers`` f32[B,F], ``categories`` i32[B,C], ``target`` f32[B] and ``mask`` f32[B].

    Attributes:
      model: a Linen module ``(numbers, categories, train) -> f32[B,K]``, K as ``outputs_of`` says.
      target_mean, target_std: by which the target is scaled, for the model and in the loss; None in a config: taken
        from the data.
      loss_kind: "squared"; "absolute", whose optimum is the median; or "pinball" of each quantile (Koenker & Bassett
        1978), the sum over them: the answer is then the median.
      quantiles: ascending, 0.5 among them. What the model gives is sorted, so that they do not cross (Chernozhukov,
        Fernandez-Val & Galichon 2010).
      target_name: of the answer.
      cardinalities, number_names: see ``TabularClassification``.

    Raises:
      UserError: a value out of its range.
    """

    model: nn.Module
    target_mean: float | None = None
    target_std: float | None = None
    loss_kind: str = "squared"
    quantiles: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)
    target_name: str | None = None
    cardinalities: tuple[int, ...] | None = None
    number_names: tuple[str, ...] | None = None

    batch_coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.loss_kind not in LOSSES:
            raise UserError(f"there is no loss_kind {self.loss_kind!r}.{suggest(self.loss_kind, LOSSES, 'loss')}")
        q = tuple(self.quantiles)
        if 0.5 not in q or list(q) != sorted(set(q)) or not 0 < q[0] <= q[-1] < 1:
            raise UserError(f"quantiles are {q}; they ascend, lie between 0 and 1, and 0.5 is one of them.")
        if self.target_mean is None or self.target_std is None:
            raise UserError(
                "the task does not know target_mean and target_std; data without them has no numbers to predict."
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        return entries_of(self.cardinalities, self.number_names)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """See ``core.Task``; all but ``loss`` and ``r2`` are in the target's unit."""
        of_quantiles = {
            "pinball": Metric("min", title="Pinball loss"),
            "coverage": Metric(None, "%", f"Coverage of the {self._share:.0%} interval"),
            "interval_width": Metric("min", title="Width of the interval"),
        }
        return {
            "rmse": Metric("min", title="RMSE"),
            "mae": Metric("min", title="MAE"),
            "r2": Metric("max", title="R2"),
            "loss": Metric("min"),
            **(of_quantiles if self.loss_kind == "pinball" else {}),
        }

    @property
    def _share(self) -> float:
        return self.quantiles[-1] - self.quantiles[0]

    @property
    def _scale(self) -> tuple[float, float]:
        return self.target_mean or 0.0, self.target_std or 1.0

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the columns, or gives another number of outputs.
        """
        one = {name: jnp.zeros((1, *x.shape[1:]), x.dtype) for name, x in batch.items() if name in ENTRIES}
        with model_errors():
            found, variables = self.model.init_with_output(key, *rows_of(one))
        wanted = outputs_of(self.loss_kind, self.quantiles)
        if found.shape != (1, wanted):
            raise UserError(f"the model gives {found.shape[1:]} outputs; set its num_classes to {wanted}.")
        return variables

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        scaled_BQ, state = applied(self.model, variables, batch, key)
        return Loss({"loss": self._mean(self._loss(scaled_BQ, batch), batch)}), state

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``value`` f32[B], in the target's unit; and of the loss "pinball" ``quantiles`` f32[B,Q]."""
        return self._told(applied(self.model, variables, inputs, None)[0])

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """What ``predict`` gives, and ``target``."""
        found, target_B = self.predict(variables, batch), jnp.asarray(batch["target"])
        mean, std = self._scale
        y_BQ = found["quantiles"] if self.loss_kind == "pinball" else found["value"][:, None]
        values = {"mae": jnp.abs(found["value"] - target_B), "loss": self._loss((y_BQ - mean) / std, batch)}
        if self.loss_kind == "pinball":
            values["pinball"] = jnp.mean(pinball(y_BQ, target_B, self.quantiles), -1)
            values["coverage"] = (y_BQ[:, 0] <= target_B) & (target_B <= y_BQ[:, -1])
            values["interval_width"] = y_BQ[:, -1] - y_BQ[:, 0]
        sums = {name: self._mean(value_B, batch) for name, value_B in values.items()}
        return {**found, "target": target_B}, sums

    def _told(self, scaled_BQ: jax.Array) -> dict[str, jax.Array]:
        mean, std = self._scale
        y_BQ = jnp.sort(scaled_BQ, -1) * std + mean
        if self.loss_kind != "pinball":
            return {"value": y_BQ[:, 0]}
        return {"value": y_BQ[:, self.quantiles.index(0.5)], "quantiles": y_BQ}

    def _loss(self, scaled_BQ: jax.Array, batch: Batch) -> jax.Array:
        """f32[B], in units of the target's deviation."""
        mean, std = self._scale
        wanted_B = (jnp.asarray(batch["target"]) - mean) / std
        if self.loss_kind == "pinball":
            return jnp.sum(pinball(scaled_BQ, wanted_B, self.quantiles), -1)
        error_B = scaled_BQ[:, 0] - wanted_B
        return error_B**2 if self.loss_kind == "squared" else jnp.abs(error_B)

    def _mean(self, value_B: jax.Array, batch: Batch) -> Sum:
        return Sum(jnp.sum(batch["mask"] * value_B), jnp.sum(batch["mask"]))

    # -- on the host -----------------------------------------------------------------------------------------------

    def meters(self) -> Mapping[str, Meter]:
        """``rmse``, and ``r2``: the share of the target's variance that is explained."""
        return {"squares": Totals(self._squares, _explained)}

    def _squares(self, examples: Mapping[str, np.ndarray]) -> dict[str, Any]:
        target_N, value_N = (np.asarray(examples[name], np.float64) for name in ("target", "value"))
        y_N, error_N = target_N - self._scale[0], value_N - target_N  # small, so that squares do not cancel
        return {"n": len(y_N), "y": y_N.sum(), "yy": (y_N**2).sum(), "ee": (error_N**2).sum()}

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """``{target: number}``, and of quantiles ``{"quantiles": {"0.05": number, ...}}``."""
        found: dict[str, Any] = {self.target_name or "value": float(output["value"])}
        if "quantiles" in output:
            found["quantiles"] = {f"{q:g}": float(y) for q, y in zip(self.quantiles, output["quantiles"], strict=True)}
        return found

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """What was said against what is, and the rows that were furthest off."""
        if "target" not in evaluated.examples:
            return
        target_N, value_N = evaluated.examples["target"], evaluated.examples["value"]
        index_N = evaluated.examples.get("index", np.arange(len(target_N)))
        some = np.argsort(target_N, kind="stable")[:: max(1, len(target_N) // _SHOWN)]
        name = self.target_name or "target"
        series = {"said": (target_N[some].tolist(), value_N[some].tolist())}
        if "quantiles" in evaluated.examples:
            y_NQ = evaluated.examples["quantiles"][some]
            series |= {f"{q:g}": (target_N[some].tolist(), y_NQ[:, i].tolist()) for i, q in enumerate(self.quantiles)}
        yield Plot("Said and true", series, f"true {name}", f"said {name}", diagonal=True)
        order = np.argsort(-np.abs(value_N - target_N), kind="stable")[: figures.SHOWN]
        rows = [(int(index_N[n]) + 1, float(target_N[n]), float(value_N[n])) for n in order]
        yield Table("Furthest off", ("Row of the split", "Is", "Said"), rows)


def outputs_of(loss_kind: str, quantiles: tuple[float, ...]) -> int:
    """How many numbers a model of ``TabularRegression`` gives for a row."""
    return len(quantiles) if loss_kind == "pinball" else 1


def pinball(y_BQ: jax.Array, target_B: jax.Array, quantiles: tuple[float, ...]) -> jax.Array:
    """f32[...,Q]: ``q`` of what a quantile is too low by, ``1 - q`` of what it is too high by."""
    below_BQ = target_B[..., None] - y_BQ
    q_Q = jnp.asarray(quantiles, jnp.float32)
    return jnp.maximum(q_Q * below_BQ, (q_Q - 1) * below_BQ)


def _explained(sums: Mapping[str, Any]) -> dict[str, float]:
    n, y, yy, ee = (float(sums[name]) for name in ("n", "y", "yy", "ee"))
    variance = yy / n - (y / n) ** 2
    return {"rmse": (ee / n) ** 0.5, "r2": 1 - ee / n / variance if variance > 0 else float("nan")}
