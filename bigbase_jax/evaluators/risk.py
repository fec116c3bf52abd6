"""Decisions between two classes: probabilities that mean what they say, a threshold, what that costs and whom it meets.

Axes: N examples of a split, K = 2 classes, T thresholds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Evaluated, Example, Figure, Metric, Plot, Table, Task, UserError
from bigbase_jax.evaluate import Split
from bigbase_jax.tasks import figures
from bigbase_jax.tasks.metrics import classes, risk
from bigbase_jax.wrappers.wrapper import Around

THRESHOLDS = ("cheapest", "bayes")


@dataclasses.dataclass(frozen=True)
class Risk:
    """A ``core.Evaluator`` of a classifier of two classes, of which the second is the positive one.

    Calibration and threshold come from the split ``fit`` alone, all that is measured from ``split``. Both are kept in
    the run, so that ``--answers=NAME`` answers by them.

    Attributes:
      cost: what a decision costs: rows are the true classes, columns the decided ones, in the order of ``class_names``.
      calibration: "temperature", "isotonic" or "none" (``metrics.risk.Calibration``).
      threshold: "cheapest" on ``fit`` by the calibrated probabilities, or "bayes": what costs least if these are right.
      group: an entry of a batch, i32[B], an index into ``group_names`` or -1, by which the fairness of decisions is
        told; None: it is not.
      group_names: None: the data says them.
      fit, split: names of splits.
      class_names: None: the data says them.

    Raises:
      UserError: a value out of its range, or other than two classes.
    """

    cost: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 1.0), (1.0, 0.0))
    calibration: str = "temperature"
    threshold: str = "cheapest"
    group: str | None = None
    group_names: tuple[str, ...] | None = None
    fit: str = "val"
    split: str = "test"
    class_names: tuple[str, ...] | None = None
    final: bool = True

    def __post_init__(self) -> None:
        for name, known in (("calibration", risk.KINDS), ("threshold", THRESHOLDS)):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"there is no {name} {value!r}.{suggest(str(value), known, name)}")
        if self.class_names is not None and len(self.class_names) != 2:
            raise UserError(f"Risk decides between 2 classes, and this data has {len(self.class_names)}; leave it out.")
        cost = np.asarray(self.cost, np.float64)
        if (
            cost.shape != (2, 2)
            or not np.isfinite(cost).all()
            or not cost[0, 1] > cost[0, 0]
            or not cost[1, 0] > cost[1, 1]
        ):
            raise UserError(
                f"cost is {self.cost}; it has a row for each true class and a column for each decision, and a wrong one"
                " costs more than the right one: ((0, 1), (5, 0))."
            )

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """See ``core.Evaluator``."""
        return {
            "cost": Metric("min", title="Cost of a decision"),
            "auc": Metric("max", title="AUC"),
            "ks": Metric("max", title="KS statistic"),
            "log_loss": Metric("min", "nats"),
            "brier": Metric("min", title="Brier score"),
            "calibration_error": Metric("min"),
            "threshold": Metric(),
            "cost_at_half": Metric("min", title="Cost at 0.5"),
            "cost_of_one_answer": Metric("min", title="Cost of the cheaper class for all"),
            "demographic_parity_difference": Metric("min"),
            "equalized_odds_difference": Metric("min"),
        }

    @property
    def needs(self) -> tuple[str, ...]:
        """See ``core.Evaluator``."""
        return (self.fit, self.split)

    def run(self, task: Task, variables: Any, data: Any, mesh: Any) -> Evaluated:
        """See ``core.Evaluator``. Keeps ``probability``, calibrated and as it was, ``label`` and ``group``.

        Raises:
          UserError: there is no such group, or the task gives no probabilities of two classes.
        """
        of_split = Split(self.fit)
        fit = _told(of_split.run(task, variables, data, mesh).examples)
        of_split = dataclasses.replace(of_split, split=self.split)  # and its compiled step
        examples = of_split.run(task, variables, data, mesh).examples
        raw_N, positive_N = _told(examples)
        calibration = risk.calibrated(self.calibration, *fit)
        p_N = calibration(raw_N)
        if self.threshold == "bayes":
            threshold = risk.bayes_threshold(self.cost)
        else:
            threshold = risk.cheapest_threshold(calibration(fit[0]), fit[1], self.cost)
        decided_N = p_N >= threshold
        metrics = {
            **_scores(p_N, positive_N),
            "cost": risk.mean_cost(decided_N, positive_N, self.cost),
            "cost_at_half": risk.mean_cost(p_N >= 0.5, positive_N, self.cost),
            "cost_of_one_answer": min(risk.mean_cost(np.full(len(p_N), k), positive_N, self.cost) for k in (0, 1)),
            "threshold": threshold,
            "calibration": dataclasses.asdict(calibration),
            "uncalibrated": _scores(raw_N, positive_N),
        }
        kept = {"index": examples["index"], "probability": p_N, "uncalibrated": raw_N, "label": positive_N}
        if self.group is not None:
            if self.group not in examples or self.group_names is None:
                raise UserError(f"Risk needs the entry {self.group!r} and its group_names of each example.")
            kept["group"] = examples[self.group]
            metrics |= risk.fairness(decided_N, positive_N, kept["group"], self.group_names)
        return Evaluated(self.split, metrics, kept)

    def answering(self, task: Task, metrics: Mapping[str, Any]) -> Task:
        """See ``core.Evaluator``: the task with calibrated ``probabilities``, and a ``decision`` by the threshold."""
        calibration, threshold = metrics.get("calibration"), metrics.get("threshold")
        if not isinstance(calibration, dict) or not isinstance(threshold, float):
            raise UserError("this run has kept no calibration and no threshold; evaluate it again.")
        known = {name: calibration[name] for name in ("temperature", "x", "y") if name in calibration}
        return Decided(task, risk.Calibration(**known), threshold)

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """Costs, the decisions, reliability before and after calibration, the scores of both classes, and groups."""
        found = evaluated.metrics
        names = self.class_names or ("0", "1")
        yield Table(
            f"Decisions on {self.split}",
            ("Rule", "Mean cost"),
            [
                (f"{names[1]} from {found['threshold']:.4f}, chosen on {self.fit} ({self.threshold})", found["cost"]),
                (f"{names[1]} from 0.5", found["cost_at_half"]),
                ("the cheaper class for all", found["cost_of_one_answer"]),
            ],
            "; ".join(f"{names[k]} taken for {names[j]} costs {self.cost[k][j]:g}" for k, j in ((0, 1), (1, 0))),
        )
        if groups := found.get("groups"):
            note = (
                f"Demographic parity difference {_number(found['demographic_parity_difference'])}, equalised odds "
                f"difference {_number(found['equalized_odds_difference'])}: largest minus smallest of the groups, 0 "
                "being equal. Small groups vary by chance."
            )
            columns = {"examples": "Examples", "positive": f"Is {names[1]}", "selected": f"Decided {names[1]}"}
            columns |= {"true_positive": "True positive rate", "false_positive": "False positive rate"}
            rows = [(name, *(group[column] for column in columns)) for name, group in groups.items()]
            yield Table("Groups", ("Group", *columns.values()), rows, note, shares=[*columns.values()][1:])
        if not evaluated.examples:
            return
        p_N, positive_N = evaluated.examples["probability"], evaluated.examples["label"]
        yield figures.confusion(classes.confusion(_both(p_N >= found["threshold"]), positive_N), names)
        for title, p in (("not calibrated", evaluated.examples["uncalibrated"]), (self.calibration, p_N)):
            if title != "none":
                for plot in figures.calibration(_both(p), positive_N):
                    yield plot._replace(title=f"Calibration, {title}")
        threshold_T = np.linspace(0, 1, 101)
        cost_T = [risk.mean_cost(p_N >= t, positive_N, self.cost) for t in threshold_T]
        yield Plot("Cost by threshold", {"cost": (threshold_T.tolist(), cost_T)}, "threshold", "mean cost")
        below = {
            name: (threshold_T.tolist(), [100 * float(np.mean(p_N[positive_N == k] <= t)) for t in threshold_T])
            for k, name in enumerate(names)
            if np.any(positive_N == k)
        }
        note = f"The largest distance between the curves is the KS statistic, {_number(found['ks'])}."
        yield Plot("Scores of the classes", below, f"probability of {names[1]}", "have at most this, %", note)


@dataclasses.dataclass(frozen=True)
class Decided(Around):
    """A classifier of two classes whose answers have calibrated probabilities, and a ``decision``.

    Attributes:
      calibration: of the probability of the second class.
      threshold: from which on that class is decided for.
    """

    calibration: risk.Calibration
    threshold: float

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        p = self.calibration(np.asarray(output["probabilities"])[1:])
        answer = self.task.postprocess({**output, "probabilities": _both(p)[0]}, example)
        return {**answer, "decision": [*answer["probabilities"]][int(p[0] >= self.threshold)]}


def _told(examples: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """f64[N], the probability of class 1, and bool[N], whether it is right."""
    p_NK, label_N = examples.get("probabilities"), examples.get("label")
    if p_NK is None or label_N is None or p_NK.shape[1:] != (2,) or label_N.ndim != 1:
        raise UserError("Risk needs a task that gives probabilities of 2 classes, and labels; leave it out.")
    return p_NK[:, 1].astype(np.float64), label_N > 0


def _both(p_N: np.ndarray) -> np.ndarray:
    """f64[N,K]: of both classes, from those of class 1."""
    p_N = np.asarray(p_N, np.float64)
    return np.stack([1 - p_N, p_N], -1)


def _scores(p_N: np.ndarray, positive_N: np.ndarray) -> dict[str, float | None]:
    error = classes.calibration_error(_both(p_N), positive_N.astype(int))
    return {**risk.probability_scores(p_N, positive_N), "calibration_error": error}


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4f}"
