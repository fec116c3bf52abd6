"""Evaluation: every example of a split exactly once, padded and masked, summed exactly; then what does not add up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from bigbase_jax import parallel
from bigbase_jax.core import PyTree, Task


class Evaluation(NamedTuple):
    """What an evaluation found.

    Attributes:
      metrics: floats by name, and JSON-able nests of them (``per_class``).
      examples: outputs and labels of all examples, [N, ...] each, in the order of the split.
    """

    metrics: dict[str, Any]
    examples: dict[str, np.ndarray]


def evaluate(
    task: Task,
    step: Callable[..., Any],
    variables: PyTree,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
) -> Evaluation:
    """Runs ``step`` (of ``parallel.eval_step``) over the batches of a split.

    Sums are added in float64 on the host, and batch n is read after batch n + 1 is dispatched.
    """
    totals: dict[str, tuple[Any, Any]] = {}
    kept: dict[str, list[np.ndarray]] = {}

    def read(pending: tuple[Any, Any]) -> None:
        examples, sums = jax.device_get(pending)
        for name, (total, weight) in sums.items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + np.asarray(total, np.float64), before[1] + np.asarray(weight, np.float64))
        real = examples.pop("mask") > 0
        for name, x in examples.items():
            kept.setdefault(name, []).append(np.asarray(x)[real])

    pending = None
    for batch in parallel.prefetch(iter(batches), mesh):
        dispatched = step(variables, batch)
        if pending is not None:
            read(pending)
        pending = dispatched
    if pending is not None:
        read(pending)
    padding = getattr(task, "padding", {})
    examples = {name: _joined(parts, padding.get(name, 0)) for name, parts in kept.items()}
    order = np.argsort(examples["index"], kind="stable")
    examples = {name: x[order] for name, x in examples.items()}
    metrics: dict[str, Any] = {
        name: np.divide(total, weight, out=np.zeros_like(total + weight), where=weight != 0).tolist()
        for name, (total, weight) in totals.items()
    }
    report = task.report(examples)
    assert not set(report) & set(metrics), f"task.report repeats {set(report) & set(metrics)}"
    return Evaluation({**metrics, **report}, examples)


def _joined(parts: list[np.ndarray], fill: Any) -> np.ndarray:
    """Arrays [n, ...] one after another, those that are shorter in other axes filled up."""
    most = np.max([part.shape[1:] for part in parts], axis=0)
    missing = [[(0, 0), *((0, m - n) for m, n in zip(most, part.shape[1:], strict=True))] for part in parts]
    return np.concatenate(
        [np.pad(p, m, constant_values=fill) if np.any(m) else p for p, m in zip(parts, missing, strict=True)]
    )
