"""What a model of rows relies on: how much worse it gets without the order of one column.

Axes: B rows of a batch, N rows of a split, F features of an entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from bigbase_jax import parallel
from bigbase_jax.build import suggest
from bigbase_jax.core import Evaluated, Figure, Metric, Table, Task, UserError
from bigbase_jax.evaluate import collect, evaluate


def places(number_names: Any, category_names: Any) -> dict[str, list[tuple[str, int]]]:
    """By column of the table, where its values are in a batch: (entry, feature), in the order of the features."""
    found: dict[str, list[tuple[str, int]]] = {}
    for entry, names in (("numbers", number_names), ("categories", category_names)):
        for feature, name in enumerate(names or ()):
            found.setdefault(name, []).append((entry, feature))
    return found


@dataclasses.dataclass(frozen=True)
class Importance:
    """A ``core.Evaluator``: permutation importance (Breiman 2001; Fisher, Rudin & Dominici 2019).

    The values of a column are dealt anew among the rows, all features that it gives together; by how much a metric of
    the task gets worse is the column's importance, the mean over ``repeats``. Of columns that say the same, each may
    have little.

    Attributes:
      metric: of the task, as it measures a split.
      repeats: how often each column is dealt.
      split: of the rows.
      seed: of the permutations.
      number_names, category_names: the columns of ``numbers`` f32[B,F] and ``categories`` i32[B,F]; None: the data says
        them.
    """

    metric: str = "loss"
    repeats: int = 3
    split: str = "test"
    seed: int = 0
    number_names: tuple[str, ...] | None = None
    category_names: tuple[str, ...] | None = None
    final: bool = True

    metrics: ClassVar[Mapping[str, Metric]] = {}

    def run(self, task: Task, variables: Any, data: Any, mesh: Any) -> Evaluated:
        """See ``core.Evaluator``. ``importance`` and ``deviation`` (over the repeats) by column, the first first.

        Raises:
          UserError: there is no such metric.
        """
        if (known := task.metrics.get(self.metric)) is None or known.better is None:
            raise UserError(f"there is no metric {self.metric!r}.{suggest(self.metric, task.metrics, 'metric')}")
        sign, step = 1 if known.better == "min" else -1, parallel.eval_step(task, mesh)

        def batches() -> Iterator[dict[str, np.ndarray]]:
            return iter(data.eval_batches(self.split, parallel.host(mesh)))

        def measured(column: Sequence[tuple[str, int]] = (), order_N: Any = None) -> float:
            def dealt(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                changed = {entry: batch[entry].copy() for entry, _ in column}
                for entry, f in column:
                    changed[entry][:, f] = values[entry][order_N[batch["index"]], f]
                return {**batch, **changed}

            return float(evaluate(task, step, variables, map(dealt, batches()), mesh, keep=False).metrics[self.metric])

        values = collect(lambda _, batch: {name: batch[name] for name in task.inputs}, variables, batches(), mesh)
        rng, before, found = np.random.default_rng(self.seed), measured(), {}
        for name, column in places(self.number_names, self.category_names).items():
            orders = [rng.permutation(data.num_examples(self.split)) for _ in range(self.repeats)]
            worse = [sign * (measured(column, order_N) - before) for order_N in orders]
            found[name] = {"importance": float(np.mean(worse)), "deviation": float(np.std(worse))}
        first = sorted(found, key=lambda name: -found[name]["importance"])
        return Evaluated(self.split, {"importance": {name: found[name] for name in first}, "metric": self.metric})

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """The columns, the most important first."""
        rows = [(name, *scores.values()) for name, scores in evaluated.metrics["importance"].items()]
        note = (
            f"By how much {self.metric} on {self.split} gets worse when the column's values are dealt anew among rows."
        )
        yield Table("Importance of columns", ("Column", "Importance", "Deviation"), rows, note)
