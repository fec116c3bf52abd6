"""What is known of the runs together: each group's metrics with their intervals, and each group against the first.

Axes: N = examples, R = resamples, C = columns.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bigbase_jax.compare import scores as score_file
from bigbase_jax.compare import statistics
from bigbase_jax.compare.importance import Importance
from bigbase_jax.compare.numbers import Metrics
from bigbase_jax.compare.runs import Goal, Group, Run
from bigbase_jax.compare.scores import Scored

SIGNIFICANT = 0.05
LOG_LOSS = "log_loss"
_SAID = 4  # how many sentences of a kind are given in full


@dataclasses.dataclass(frozen=True)
class Measured:
    """A metric of a group on the split.

    Attributes:
      values: of its runs.
      mean: of the values.
      deviation: their standard deviation; None for one run.
      low, high: the 95 % interval; None where it is not known.
      over: what the interval is over: "seeds", "examples", or "" where there is none.
    """

    values: list[float]
    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    over: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """A group against the baseline, in one metric.

    Attributes:
      a, b: the metric of the baseline and of the group.
      best: "max" or "min"; None: more is neither better nor worse.
      examples: N; 0 where the two are not of the same examples.
      low, high: the 95 % interval of ``b - a`` by the paired bootstrap over examples.
      p, p_holm: of no difference on such examples, by the bootstrap; and as one of all groups' tests.
      mcnemar, mcnemar_holm: the exact test of two classifiers, each a single run.
      p_seeds, p_seeds_holm: of no difference between the means over seeds, by Welch's t-test.
      verdict: all of it in words.
    """

    baseline: str
    other: str
    metric: str
    a: float
    b: float
    best: str | None = None
    examples: int = 0
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    mcnemar: statistics.McNemar | None = None
    mcnemar_holm: float | None = None
    p_seeds: float | None = None
    p_seeds_holm: float | None = None

    @property
    def difference(self) -> float:
        return self.b - self.a

    @property
    def verdict(self) -> str:
        word = "better" if (self.difference < 0) == (self.best == "min") else "worse"
        word = word if self.best else "differs"
        examples = self.mcnemar_holm if self.mcnemar_holm is not None else self.p_holm
        if examples is None and self.p_seeds_holm is None:
            return "not tested"
        if self.difference == 0 or (examples is not None and examples >= SIGNIFICANT):
            return "no difference shown"
        if self.p_seeds_holm is not None and self.p_seeds_holm >= SIGNIFICANT:
            return "no difference shown" if examples is None else f"{word}, but not beyond its seeds"
        return word


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything that the tables and the page show.

    Attributes:
      groups: the baseline first.
      by_rank: whether the rest are in the order of ``goal``, as of a sweep, rather than as they were given.
      split: that the metrics are of; None where no run has been evaluated.
      metrics: names: the goal first, then as the tasks order them.
      known: what they mean.
      measured: by group's and metric's name.
      pairs: each group against the first, metric by metric.
      differences: see ``runs.differences``.
      goal: what is tuned for on the validation split.
      importance: of the settings for it; None, or a sentence, where it is not known.
      notes: sentences on what could not be used.
    """

    groups: list[Group]
    by_rank: bool
    split: str | None
    metrics: list[str]
    known: Metrics
    measured: dict[tuple[str, str], Measured]
    pairs: list[Pair]
    differences: dict[str, dict[str, list[Any]]]
    goal: Goal | None
    importance: Importance | str | None
    notes: list[str]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @property
    def models(self) -> dict[str, str]:
        """The class of each group's model, by the group's name, where they differ."""
        found = {group.name: group.model or "" for group in self.groups}
        return found if len(set(found.values())) > 1 else {}

    @property
    def against(self) -> str:
        """The title of the paired tests: ``"Against NAME"``, or ``"Bert against BagOfWords"`` of two unlike models."""
        first, *others = self.groups
        if not self.models:
            return f"Against {first.name}"
        base = self.models[first.name]
        return f"{self.models[others[0].name]} against {base}" if len(others) == 1 else f"Against {first.name} ({base})"

    @property
    def varied(self) -> dict[str, list[Any]]:
        """The settings among ``differences``."""
        parts = [rows for part, rows in self.differences.items() if part != "origin"]
        return {path: values for rows in parts for path, values in rows.items()}


def metric_names(groups: Sequence[Group], split: str, goal: Goal | None, known: Metrics) -> list[str]:
    """Of all metrics that are numbers: the goal first, then as the tasks order them."""
    found = {name: None for group in groups for run in group.runs for name in run.scalars(split)}
    order = {name: i for i, name in enumerate(([goal.metric] if goal else []) + list(known))}
    return sorted(found, key=lambda name: order.get(name, len(order)))


def meanings(runs: Sequence[Run]) -> Metrics:
    """What the metrics of all runs mean; each kind of task is asked once."""
    kinds = {json.dumps([v for k, v in run.settings.items() if k.endswith("task.target")]): run for run in runs}
    return Metrics(*(run.metrics for run in kinds.values()), score_file.METRICS)


class Examples:
    """The kept predictions of all runs on a split, resampled together where they are of the same examples.

    Args:
      runs: all of them.
      split: of the evaluation.
      resamples: R.
      seed: of the resampling.
    """

    def __init__(self, runs: Sequence[Run], split: str, resamples: int, seed: int):
        self.scored: dict[str, Scored] = {}
        self.why: dict[str, str] = {}
        for run in runs:
            if split not in run.evals:
                continue
            found = score_file.read(run, split)
            if isinstance(found, str):
                self.why[run.name] = found
            else:
                self.scored[run.name] = found
        self._call_it_loss(runs, split)
        self._resampled_R: dict[tuple[str, str], np.ndarray] = {}
        sets: dict[Any, list[tuple[str, str]]] = {}
        for name, scored in self.scored.items():
            if scored.number:
                sets.setdefault(scored.same_as, []).extend((name, metric) for metric in scored.scores)
        for columns in sets.values():
            samples = [self.scored[name].scores[metric].sample for name, metric in columns]
            value_RC = statistics.resampled(samples, self.scored[columns[0][0]].number, resamples, seed)
            self._resampled_R |= {column: value_RC[:, i] for i, column in enumerate(columns)}

    def _call_it_loss(self, runs: Sequence[Run], split: str) -> None:
        """Where the log loss is what all these runs call their loss, it goes by that name."""
        loss = {run.name: run.scalars(split).get("loss") for run in runs}
        kept = {name: scored for name, scored in self.scored.items() if LOG_LOSS in scored.scores}
        if all(_close(scored.mean(LOG_LOSS), loss[name]) for name, scored in kept.items()):
            for name, scored in kept.items():
                scores = {{LOG_LOSS: "loss"}.get(metric, metric): score for metric, score in scored.scores.items()}
                self.scored[name] = dataclasses.replace(scored, scores=scores)

    def value(self, runs: Sequence[Run], metric: str) -> float:
        """Mean over runs."""
        return float(np.mean([self.scored[run.name].mean(metric) for run in runs]))

    def resampled(self, runs: Sequence[Run], metric: str) -> np.ndarray:
        """f64[R]: ``value`` in each resample."""
        return np.mean([self._resampled_R[run.name, metric] for run in runs], 0)


def _close(a: float, b: float | None) -> bool:
    """The same, but for the rounding of 32 bits."""
    return b is not None and abs(a - b) <= 1e-4 * max(abs(b), 1e-2)


def measure(group: Group, split: str, metric: str, examples: Examples) -> Measured | None:
    """A group's metric; its interval over seeds where there are several, else over the examples where they are kept."""
    values = group.values(split, metric)
    if not values:
        return None
    found = statistics.spread(values)
    if len(values) > 1:
        return Measured(values, *found, "seeds")
    run = next(run for run in group.runs if metric in run.scalars(split))
    scored = examples.scored.get(run.name)
    for name in (metric, LOG_LOSS) if metric == "loss" else (metric,):
        if scored is None or name not in scored.scores or not scored.number:
            continue
        if not _close(scored.mean(name), values[0]):
            continue  # the predictions are of another evaluation, or the loss of another kind
        if (right_N := scored.scores[name].right_N) is not None:
            low, high = statistics.wilson(int(right_N.sum()), scored.number)
        else:
            low, high = statistics.percentiles(examples.resampled([run], name))
        return Measured(values, found.mean, None, low, high, "examples")
    return Measured(values, *found, "")


def pair_up(
    groups: Sequence[Group], split: str, metrics: Sequence[str], examples: Examples, known: Metrics
) -> tuple[list[Pair], list[str]]:
    """Each group against the first, in the metrics that examples have scores of, or that several seeds have.

    Returns:
      The pairs, and sentences on groups that cannot be paired.
    """
    baseline, *others = groups
    pairs: list[Pair] = []
    reasons: list[str] = []
    for other in others:
        reason, shared = _shared(baseline, other, split, examples)
        reasons += [reason] if reason else []
        for metric in shared:
            pairs.append(_on_examples(baseline, other, metric, known[metric].better, split, examples))
        for metric in metrics[:4]:
            a, b = baseline.values(split, metric), other.values(split, metric)
            p_seeds = statistics.welch(a, b)
            if metric not in shared and p_seeds is not None:
                means = float(np.mean(a)), float(np.mean(b))
                best = known[metric].better
                pairs.append(Pair(baseline.name, other.name, metric, *means, best, p_seeds=p_seeds))
    return _corrected(pairs), reasons


def _shared(baseline: Group, other: Group, split: str, examples: Examples) -> tuple[str | None, list[str]]:
    """The scores that both have of the same examples, or the sentence why there are none."""
    sides = [[run for run in group.runs if split in run.evals] for group in (baseline, other)]
    for group, runs in zip((baseline, other), sides, strict=True):
        if not runs:  # a group without any evaluation has been mentioned already
            other_splits = any(run.evals for run in group.runs)
            return (f"{group.name} was not evaluated on {split}." if other_splits else None), []
    for run in (*sides[0], *sides[1]):
        if run.name in examples.why:
            return examples.why[run.name], []
    first = sides[0][0]
    for run in (*sides[0][1:], *sides[1]):
        scored = examples.scored[first.name], examples.scored[run.name]
        if why := score_file.why_not_the_same(first, run, *scored):
            return why, []
    if not examples.scored[first.name].number:
        return f"{first.name} was evaluated on no example.", []
    return None, [
        metric
        for metric in examples.scored[first.name].scores
        if all(metric in examples.scored[run.name].scores for run in (*sides[0], *sides[1]))
    ]


def _on_examples(baseline: Group, other: Group, metric: str, best: str | None, split: str, examples: Examples) -> Pair:
    a, b = ([run for run in group.runs if split in run.evals] for group in (baseline, other))
    difference_R = examples.resampled(b, metric) - examples.resampled(a, metric)
    low, high = statistics.percentiles(difference_R)
    mcnemar: statistics.McNemar | None = None
    if len(a) == len(b) == 1:
        right_N, other_N = (examples.scored[run.name].scores[metric].right_N for run in (*a, *b))
        mcnemar = None if right_N is None or other_N is None else statistics.mcnemar(right_N, other_N)
    return Pair(
        baseline.name,
        other.name,
        metric,
        examples.value(a, metric),
        examples.value(b, metric),
        best,
        examples=examples.scored[a[0].name].number,
        low=low,
        high=high,
        p=statistics.bootstrap_p(difference_R),
        mcnemar=mcnemar,
        p_seeds=statistics.welch(*([examples.value([run], metric) for run in runs] for runs in (a, b))),
    )


def _corrected(pairs: Sequence[Pair]) -> list[Pair]:
    """Holm's correction over the groups, for each metric and test."""
    found = list(pairs)
    tests: dict[str, Callable[[Pair], float | None]] = {
        "p_holm": lambda pair: pair.p,
        "mcnemar_holm": lambda pair: None if pair.mcnemar is None else pair.mcnemar.p,
        "p_seeds_holm": lambda pair: pair.p_seeds,
    }
    for name, p_of in tests.items():
        for metric in {pair.metric for pair in pairs}:
            family = {i: p_of(pair) for i, pair in enumerate(pairs) if pair.metric == metric}
            for i, p in statistics.holm(family).items():
                found[i] = dataclasses.replace(found[i], **{name: p})  # type: ignore[arg-type]
    return found


def said_once(sentences: Sequence[str]) -> list[str]:
    """Without repetitions, and without more than a few of many."""
    found = list(dict.fromkeys(sentences))
    if len(found) <= _SAID + 1:
        return found
    return [*found[:_SAID], f"… and {len(found) - _SAID} more such sentences on the page."]
