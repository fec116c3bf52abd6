"""Runs side by side, from their folders alone; no checkpoint, no data and no device is needed.

``runs`` finds and reads them and groups those that differ by their seeds; ``scores`` reads what evaluations kept of
single examples; ``statistics`` tells differences from chance; ``comparison`` holds the results; ``importance`` says
which settings of a sweep matter; ``tables`` shows everything on a terminal and as CSV; its page is in ``pages``.
"""

from __future__ import annotations

from collections.abc import Sequence

from bigbase_jax.compare.comparison import (
    Comparison,
    Examples,
    Measured,
    Pair,
    meanings,
    measure,
    metric_names,
    pair_up,
    said_once,
)
from bigbase_jax.compare.importance import Importance, weigh
from bigbase_jax.compare.runs import Goal, Group, choose_split, differences, goal_of, group, load
from bigbase_jax.compare.statistics import RESAMPLES
from bigbase_jax.compare.tables import csv_files, show, summary

__all__ = ["Comparison", "compare", "csv_files", "said_once", "show", "summary"]


def compare(
    workdirs: Sequence[str],
    split: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    storage: str | None = None,
) -> Comparison:
    """Compares runs.

    Args:
      workdirs: run folders, folders of runs (a sweep), or patterns of either. The first run is the baseline that the
        others are tested against; of one sweep, the run that is best on the validation split.
      split: of the evaluations; None: test, or what most runs were evaluated on.
      resamples, seed: of the bootstrap.
      storage: where the study of a sweep is, if not in its folder; None: it is not read.

    Raises:
      UserError: no run at all, or none evaluated on ``split``.
    """
    runs, sweeps, notes = load(workdirs, storage)
    split = choose_split(runs, split)
    goal = goal_of(runs, sweeps)
    by_rank = len(sweeps) == 1 and all(run.sweep is not None for run in runs)
    groups = _ranked(group(runs), goal) if by_rank and goal else group(runs)
    differing = differences(groups)
    known = meanings(runs)
    metrics = metric_names(groups, split, goal, known) if split else []
    measured: dict[tuple[str, str], Measured] = {}
    pairs: list[Pair] = []
    if split:
        examples = Examples(runs, split, resamples, seed)
        for g in groups:
            for metric in metrics:
                if (found := measure(g, split, metric, examples)) is not None:
                    measured[g.name, metric] = found
        if len(groups) > 1:
            pairs, reasons = pair_up(groups, split, metrics, examples, known)
            notes += [f"No paired test: {reason}" for reason in dict.fromkeys(reasons)]
    matters: Importance | str | None = None
    if len(groups) > 2 and goal is not None:
        varied = [path for part, rows in differing.items() if part != "origin" for path in rows]
        trials = [
            ({path: run.shown.get(path) for path in varied}, value)
            for run in runs
            if run.finished and (value := goal.value(run)) is not None
        ]
        matters = weigh(trials, sweeps, storage)
    return Comparison(groups, by_rank, split, metrics, known, measured, pairs, differing, goal, matters, notes)


def _ranked(groups: Sequence[Group], goal: Goal) -> list[Group]:
    """The best on the validation split first, those without a value last."""

    def place(item: Group) -> tuple[bool, bool, float]:
        mean, unfinished = goal.mean(item), not any(run.finished for run in item.runs)
        return (mean is None, unfinished, (mean or 0.0) * (1 if goal.lower else -1))

    return sorted(groups, key=place)
