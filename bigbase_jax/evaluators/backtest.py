"""Forecasts from rolling origins: beside the last season again, plotted, and as a measure of what is an anomaly.

Axes: B windows of a batch, N origins, H steps ahead, C channels, Q quantiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from bigbase_jax import parallel
from bigbase_jax.core import Batch, Evaluated, Figure, Metric, Plot, Table, Task, Variables
from bigbase_jax.evaluate import collect

_KEPT = 8  # channels whose forecasts are kept
_ODD = 4.0  # a score from which on a value is called an anomaly


@dataclasses.dataclass(frozen=True)
class Backtest:
    """A ``core.Evaluator`` of a forecaster (``tasks.forecasting``).

    The anomaly score of a value is the error of its forecast, over 1.4826 times the median absolute error of that step
    ahead and that channel on ``calibrate``: of normal errors, their standard deviation.

    Attributes:
      split: whose windows.
      origins: how many, spread evenly over it.
      calibrate: the split that says how large errors are; where there is none, ``split`` does.
      season: steps of a season; None: the data says it.
      channels: names; None: the data says them.
    """

    split: str = "test"
    origins: int = 50
    calibrate: str = "val"
    season: int | None = None
    channels: tuple[str, ...] | None = None
    final: bool = True

    metrics: ClassVar[Mapping[str, Metric]] = {
        "skill": Metric("max", "%", "MAE below that of the last season again"),
        "naive_mae": Metric("min", title="MAE of the last season again"),
        "origins_won": Metric("max", "%", "Origins at which the last season again is worse"),
        "anomalies": Metric(None, "%", f"Values with an anomaly score above {_ODD:g}"),
    }

    def run(self, task: Task, variables: Variables, data: Any, mesh: Any) -> Evaluated:
        """See ``core.Evaluator``; keeps of each origin its time, ``origin``, and as MAE ``error`` and ``naive_error``
        f32[N]; of the first channels f32[N,.,C] ``history``, ``forecast``, ``truth`` and ``anomaly_score`` (NaN: not
        known), and where there are quantiles ``low`` and ``high``."""

        def of_batch(variables: Variables, batch: Batch) -> Mapping[str, Any]:
            found = task.predict(variables, {name: batch[name] for name in task.inputs})
            history_BLC, H = jnp.asarray(batch["history"]), batch["future"].shape[1]
            season = min(self.season or 1, history_BLC.shape[1])
            truth_BHC = jnp.where(jnp.asarray(batch["observed"]), jnp.asarray(batch["future"]), jnp.nan)
            kept = {"index": batch["index"], "truth": truth_BHC, "forecast": found["forecast"]}
            kept |= {"history": history_BLC[:, -2 * H :], "naive": history_BLC[:, -season:][:, np.arange(H) % season]}
            if "quantiles" in found:
                kept |= {"low": found["quantiles"][..., 0], "high": found["quantiles"][..., -1]}
            return kept

        def of_split(split: str, count: int) -> dict[str, np.ndarray]:
            return collect(of_batch, variables, data.eval_batches(split, parallel.host(mesh), count), mesh)

        found = of_split(self.split, self.origins)
        other = of_split(self.calibrate, 4 * self.origins) if self.calibrate in data.splits else found
        error_NHC, naive_NHC = (np.abs(found[name] - found["truth"]) for name in ("forecast", "naive"))
        scale_HC = 1.4826 * np.nanmedian(np.abs(other["forecast"] - other["truth"]), 0)
        found["anomaly_score"] = error_NHC / np.maximum(scale_HC, 1e-6)
        error_N, naive_N = np.nanmean(error_NHC, (1, 2)), np.nanmean(naive_NHC, (1, 2))
        metrics = {
            "mae": float(error_N.mean()),
            "naive_mae": float(naive_N.mean()),
            "skill": float(1 - error_N.mean() / max(float(naive_N.mean()), 1e-9)),
            "origins_won": float(np.mean(error_N < naive_N)),
            "anomalies": float(np.nanmean(found["anomaly_score"] > _ODD)),
        }
        index_N, source = found.pop("index"), data.source(self.split)
        kept = {name: x[..., :_KEPT] for name, x in found.items() if name != "naive"}
        kept |= {"error": error_N, "naive_error": naive_N, "index": index_N}
        return Evaluated(self.split, metrics, {**kept, "origin": np.array([source.name(int(i)) for i in index_N])})

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """Forecasts of the first two channels beside their history and what came; the error of each origin; and what is
        most of an anomaly."""
        found = evaluated.examples
        if "truth" not in found:
            return
        N, H, C = found["truth"].shape
        names, origin_N = self.channels or tuple(f"channel {c}" for c in range(C)), found["origin"]
        past, ahead = np.arange(-found["history"].shape[1], 0) + 1, np.arange(1, H + 1)
        for n in sorted({0, N // 2, N - 1}):
            for c in range(min(C, 2)):
                series = {"history": (past, found["history"][n, :, c]), "truth": (ahead, found["truth"][n, :, c])}
                series["forecast"] = (ahead, found["forecast"][n, :, c])
                if "low" in found:  # an outline, there and back
                    edge = np.concatenate([found["low"][n, :, c], found["high"][n, ::-1, c]])
                    series["interval"] = (np.concatenate([ahead, ahead[::-1]]), edge)
                shown = {k: (x[np.isfinite(y)].tolist(), y[np.isfinite(y)].tolist()) for k, (x, y) in series.items()}
                yield Plot(f"{names[c]} from {origin_N[n]}", shown, "steps from the origin", "standardised")
        errors = {"model": found["error"], "last season again": found["naive_error"]}
        curves = {name: (list(range(1, N + 1)), error_N.tolist()) for name, error_N in errors.items()}
        yield Plot("MAE of each origin", curves, f"origins from {origin_N[0]} to {origin_N[-1]}", "standardised")
        score_NHC = np.nan_to_num(found["anomaly_score"])
        worst = [np.unravel_index(i, score_NHC.shape) for i in np.argsort(-score_NHC, axis=None, kind="stable")[:12]]
        said = ("anomaly_score", "truth", "forecast")
        rows = [
            (str(origin_N[n]), int(h) + 1, names[c], *(float(found[k][n, h, c]) for k in said)) for n, h, c in worst
        ]
        columns = ("Origin", "Steps ahead", "Channel", "Score", "Truth", "Forecast")
        yield Table("What is most of an anomaly", columns, rows, "Truth and forecast are standardised.")
