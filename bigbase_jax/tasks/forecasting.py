"""Forecasting: what a series will be, as points or as quantiles, and how it is measured.

Values are standardised by the training split (``data.sources.table.series``); answers are in the data's own units.

Axes: B examples of a batch, N windows of a split, L steps of history, H steps ahead, S = L + H, C channels (series),
K covariates, Q quantiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

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
from bigbase_jax.tasks.classification import applied_in_training
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.tasks.tabular import pinball

LOSSES = ("squared", "absolute")


@dataclasses.dataclass(frozen=True)
class Forecasting:
    """A forecaster, trained on windows of series.

    A batch holds ``history`` f32[B,L,C], where there are covariates ``covariates`` f32[B,S,K], and as labels ``future``
    f32[B,H,C] and ``observed`` bool[B,H,C]: which of it is known.

    Attributes:
      model: a Linen module ``(history, covariates or None, train) -> f32[B,H,C,Q]``.
      quantiles: levels that it forecasts, ascending, 0.5 among them, trained by the quantile loss (Koenker & Bassett
        1978); empty: one point.
      loss_kind: of points: "squared" or "absolute".
      channels: C names.
      covariate_names: K names; empty: there are none.
      mean, std: of each channel in its own units.
      naive_error: mean absolute error of each channel's seasonal naive forecast in training, standardised.

    Raises:
      UserError: a value out of its range.
    """

    model: nn.Module
    quantiles: tuple[float, ...] = ()
    loss_kind: str = "squared"
    channels: tuple[str, ...] | None = None
    covariate_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    naive_error: tuple[float, ...] | None = None

    batch_coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        levels = tuple(float(q) for q in self.quantiles)
        object.__setattr__(self, "quantiles", levels)
        if levels and not (min(levels) > 0 and max(levels) < 1 and sorted({*levels, 0.5}) == list(levels)):
            raise UserError(f"quantiles is {levels}; it holds 0.5 and rises within 0 and 1, such as (0.1, 0.5, 0.9).")
        if self.loss_kind not in LOSSES:
            raise UserError(f"loss_kind is {self.loss_kind!r}; it is {' or '.join(map(repr, LOSSES))}.")

    @property
    def inputs(self) -> tuple[str, ...]:
        """See ``core.Task``."""
        return ("history", "covariates") if self.covariate_names else ("history",)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """See ``core.Task``; of standardised values."""
        points = {
            "mse": Metric("min", title="MSE"),
            "mae": Metric("min", title="MAE"),
            "mase": Metric("min", title="MASE"),
            "loss": Metric("min"),
        }
        if not self.quantiles:
            return points
        inside = f"{100 * (self.quantiles[-1] - self.quantiles[0]):.4g} %"
        spread = {
            "crps": Metric("min", title="CRPS"),
            "coverage": Metric(None, "%", f"Coverage of the interval of {inside}"),
            "interval_width": Metric("min", title=f"Width of the interval of {inside}"),
        }
        return {**spread, **points}

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the series or the quantiles.
        """
        inputs = [jnp.zeros((1, *batch[name].shape[1:])) for name in self.inputs]
        with model_errors():
            y_1HCQ, variables = self.model.init_with_output(key, *inputs)
        if y_1HCQ.shape[2:] != (wanted := (batch["history"].shape[2], len(self.quantiles) or 1)):
            raise UserError(f"the model forecasts {y_1HCQ.shape[2:]} (channels, outputs), not {wanted}.")
        return {"params": {}, **variables}

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """The mean over all observed values."""
        y_BHCQ, state = applied_in_training(self.model, variables, key, *(batch[name] for name in self.inputs))
        return Loss({"loss": _summed(self._losses(y_BHCQ, batch), _weights(batch))}), state

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``forecast`` f32[B,H,C], the median where there are quantiles, and then ``quantiles`` f32[B,H,C,Q], rising;
        standardised."""
        with model_errors():
            y_BHCQ: Any = self.model.apply(dict(variables), *(jnp.asarray(inputs[name]) for name in self.inputs))
        if not self.quantiles:
            return {"forecast": y_BHCQ[..., 0]}
        y_BHCQ = jnp.sort(y_BHCQ, -1)
        return {"forecast": y_BHCQ[..., self.quantiles.index(0.5)], "quantiles": y_BHCQ}

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """Of each window, over what is observed: sums of squared and absolute errors by step, ``squared_error_step``
        f32[B,H] and so on, and by channel [B,C], with how many they are, ``observed_step`` and ``observed_channel``."""
        found = self.predict(variables, batch)
        weight_BHC = _weights(batch)
        future_BHC, observed_BHC = jnp.asarray(batch["future"]), jnp.asarray(batch["observed"])
        errors = {"squared_error": (found["forecast"] - future_BHC) ** 2}
        errors["absolute_error"] = jnp.abs(found["forecast"] - future_BHC)
        errors["observed"] = jnp.ones_like(future_BHC)
        arrays = {
            f"{name}_{by}": jnp.sum(x_BHC * observed_BHC, axis)
            for name, x_BHC in errors.items()
            for by, axis in (("step", 2), ("channel", 1))
        }
        naive_C = jnp.asarray(self.naive_error or (1.0,), jnp.float32)
        values = {
            "mse": errors["squared_error"],
            "mae": errors["absolute_error"],
            "mase": errors["absolute_error"] / naive_C,
        }
        values["loss"] = values["mae"] if self.loss_kind == "absolute" else values["mse"]
        if self.quantiles:
            y_BHCQ = found["quantiles"]
            low_BHC, high_BHC = y_BHCQ[..., 0], y_BHCQ[..., -1]
            values["loss"] = self._losses(y_BHCQ, batch)
            values["crps"] = 2 * values["loss"]  # the mean quantile loss, twice (Gneiting & Ranjan 2011)
            values["coverage"] = (low_BHC <= future_BHC) & (future_BHC <= high_BHC)
            values["interval_width"] = high_BHC - low_BHC
        return arrays, {name: _summed(x_BHC, weight_BHC) for name, x_BHC in values.items()}

    def _losses(self, y_BHCQ: jax.Array, batch: Batch) -> jax.Array:
        """f32[B,H,C]: the training loss of each value."""
        if y_BHCQ.shape[1] != (horizon := batch["future"].shape[1]):
            raise UserError(f"the model forecasts {y_BHCQ.shape[1]} steps, and the data has windows of {horizon}.")
        future_BHC = jnp.asarray(batch["future"])
        if self.quantiles:
            return jnp.mean(pinball(y_BHCQ, future_BHC, self.quantiles), -1)
        error_BHC = future_BHC - y_BHCQ[..., 0]
        return jnp.abs(error_BHC) if self.loss_kind == "absolute" else error_BHC**2

    # -- on the host -----------------------------------------------------------------------------------------------

    def meters(self) -> Mapping[str, Meter]:
        """``per_channel``: ``mse`` and ``mae`` of each channel by name, and ``mae_in_units`` and ``rmse_in_units``."""

        def measure(sums: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
            mse_C, mae_C = _means(sums, "channel")
            std_C = np.asarray(self.std or np.ones(len(mse_C)))
            rows = zip(self._channels(len(mse_C)), mse_C, mae_C, std_C * mae_C, std_C * np.sqrt(mse_C), strict=True)
            columns = ("mse", "mae", "mae_in_units", "rmse_in_units")
            return {"per_channel": {name: dict(zip(columns, map(float, row), strict=True)) for name, *row in rows}}

        return {"errors": Totals(lambda examples: _totals(examples, "channel"), measure)}

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """``forecast``: for each step ahead its ``time`` (UTC), each channel's value in its own units, and where there
        are quantiles each of these, as ``NAME_10`` for 10 %."""
        C = np.asarray(output["forecast"]).shape[-1]
        mean_C, std_C = np.asarray(self.mean or np.zeros(C)), np.asarray(self.std or np.ones(C))
        forecasts = {"": output["forecast"]}
        forecasts |= {f"_{100 * level:g}": output["quantiles"][..., q] for q, level in enumerate(self.quantiles)}
        columns = {
            f"{name}{of}": np.asarray(y_HC[:, c], np.float64) * std_C[c] + mean_C[c]
            for of, y_HC in forecasts.items()
            for c, name in enumerate(self._channels(C))
        }
        times = example.get("times", np.arange(1, len(output["forecast"]) + 1))
        rows = zip(np.asarray(times).astype(str).tolist(), *(y_H.tolist() for y_H in columns.values()), strict=True)
        return {"forecast": [dict(zip(("time", *columns), row, strict=True)) for row in rows]}

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """The error by step ahead, and of each channel."""
        if "observed_step" in evaluated.examples:
            errors = zip(("MSE", "MAE"), _means(_totals(evaluated.examples, "step"), "step"), strict=True)
            series = {name: (list(range(1, len(error_H) + 1)), error_H.tolist()) for name, error_H in errors}
            yield Plot("Error by step ahead", series, "steps ahead", "standardised")
        if rows := evaluated.metrics.get("per_channel"):
            columns = ("Channel", "MSE", "MAE", "MAE in its units", "RMSE in its units")
            yield Table("Channels", columns, [(name, *row.values()) for name, row in rows.items()])

    def _channels(self, count: int) -> tuple[str, ...]:
        return (self.channels or tuple(f"channel {c}" for c in range(count)))[:count]


def _totals(examples: Mapping[str, np.ndarray], by: str) -> dict[str, np.ndarray]:
    """Sums over windows of what ``Forecasting.evaluate`` gives by "step" or by "channel"."""
    names = [f"{kind}_{by}" for kind in ("squared_error", "absolute_error", "observed")]
    return {name: np.asarray(np.sum(examples[name], 0, np.float64)) for name in names}


def _means(sums: Mapping[str, np.ndarray], by: str) -> tuple[np.ndarray, np.ndarray]:
    """(MSE, MAE) by step or channel."""
    squared, absolute, count = (sums[f"{kind}_{by}"] for kind in ("squared_error", "absolute_error", "observed"))
    return squared / np.maximum(count, 1), absolute / np.maximum(count, 1)


def _weights(batch: Batch) -> jax.Array:
    """f32[B,H,C]: 1 for a value that counts."""
    return jnp.asarray(batch["observed"]) * jnp.asarray(batch["mask"])[:, None, None]


def _summed(x_BHC: jax.Array, weight_BHC: jax.Array) -> Sum:
    return Sum(jnp.sum(x_BHC * weight_BHC), jnp.sum(weight_BHC))
