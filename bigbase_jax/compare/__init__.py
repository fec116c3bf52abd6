"""``--mode=compare``: runs side by side, from their folders alone; no model, no data and no device is needed.

``runs`` finds and reads them and groups those that differ by their seeds; ``scores`` reads what evaluations kept of
single examples; ``statistics`` tells differences from chance; ``comparison`` holds the results; ``importance`` says
which settings of a sweep matter; ``tables`` and ``page`` show everything.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from bigbase_jax.compare import tables
from bigbase_jax.compare.comparison import (
    Comparison,
    Examples,
    Measured,
    Pair,
    measure,
    metric_names,
    pair_up,
    said_once,
)
from bigbase_jax.compare.importance import Importance, weigh
from bigbase_jax.compare.runs import Goal, Group, choose_split, differences, goal_of, group, load
from bigbase_jax.compare.statistics import RESAMPLES
from bigbase_jax.core import UserError
from bigbase_jax.pages import comparison as page
from bigbase_jax.pages.page import write
from bigbase_jax.runtime.log import say

OUTPUT = "comparison"
"""The default folder, below the current one."""


def run(
    workdirs: Sequence[str], output: str | None = None, split: str | None = None, storage: str | None = None
) -> dict[str, Any]:
    """Compares runs, prints the tables on stdout, and writes ``comparison.html`` and three CSV files.

    Args:
      workdirs: run folders, folders of runs (a sweep), or patterns of either. The first run is the baseline that the
        others are tested against; of one sweep, the run that is best on the validation split.
      output: the folder to write; None: ``comparison`` in the current one.
      split: of the evaluations; None: test, or what most runs were evaluated on.
      storage: where the study of a sweep is, if not in its folder; None: it is not read.

    Returns:
      Where the files are, and the tests in short.

    Raises:
      UserError: no run at all, none evaluated on ``split``, or a folder that cannot be written.
    """
    found = compare(workdirs, split, storage=storage)
    for note in said_once(found.notes):
        say(note)
    folder = pathlib.Path(output or OUTPUT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}.") from error
    write(folder / "comparison.html", page.render(found))
    for name, text in tables.csv_files(found).items():
        write(folder / name, text)
    tables.show(found)
    say(f"comparison: {folder / 'comparison.html'}")
    return {"comparison": str(folder / "comparison.html"), **tables.summary(found)}


def compare(
    workdirs: Sequence[str],
    split: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    storage: str | None = None,
) -> Comparison:
    """What ``run`` shows."""
    runs, sweeps, notes = load(workdirs, storage)
    split = choose_split(runs, split)
    goal = goal_of(runs, sweeps)
    by_rank = len(sweeps) == 1 and all(run.sweep is not None for run in runs)
    groups = _ranked(group(runs), goal) if by_rank and goal else group(runs)
    differing = differences(groups)
    metrics = metric_names(groups, split, goal) if split else []
    measured: dict[tuple[str, str], Measured] = {}
    pairs: list[Pair] = []
    if split:
        examples = Examples(runs, split, resamples, seed)
        for g in groups:
            for metric in metrics:
                if (found := measure(g, split, metric, examples)) is not None:
                    measured[g.name, metric] = found
        if len(groups) > 1:
            pairs, reasons = pair_up(groups, split, metrics, examples)
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
    return Comparison(groups, by_rank, split, metrics, measured, pairs, differing, goal, matters, notes)


def _ranked(groups: Sequence[Group], goal: Goal) -> list[Group]:
    """The best on the validation split first, those without a value last."""

    def place(item: Group) -> tuple[bool, bool, float]:
        values = [value for run in item.runs if (value := goal.value(run)) is not None]
        mean = sum(values) / len(values) if values else 0.0
        unfinished = not any(run.finished for run in item.runs)
        return (not values, unfinished, mean if goal.lower else -mean)

    return sorted(groups, key=place)
