"""Evaluation: every example of a split exactly once, padded and masked, summed exactly; then what does not add up."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from bigbase_jax import parallel
from bigbase_jax.core import Evaluated, PyTree, Task

Arrays = Mapping[str, np.ndarray]


class CollectAll:
    """A ``core.Meter`` that keeps all examples, and measures them at the end.

    Arrays that are longer in some batches than in others (``data.buckets``) are filled up with -1 where they hold
    integers, and else with 0.

    Args:
      measure: from arrays [N, ...], in the order of the split, to the metrics.
      names: of the arrays that it reads; None: all.
    """

    def __init__(self, measure: Callable[[Arrays], Mapping[str, Any]], names: Sequence[str] | None = None):
        self._measure, self._names = measure, names
        self._kept: dict[str, list[np.ndarray]] = {}

    def update(self, examples: Arrays) -> None:
        for name in examples if self._names is None else {*self._names, "index"} & examples.keys():
            self._kept.setdefault(name, []).append(np.asarray(examples[name]))

    def state(self) -> Arrays:
        return {name: _joined(parts) for name, parts in self._kept.items()}

    def merge(self, state: Arrays) -> None:
        self.update(state)

    def result(self) -> Mapping[str, Any]:
        return self._measure(self.examples())

    def examples(self) -> dict[str, np.ndarray]:
        """All of them, in the order of the split."""
        found = self.state()
        order = np.argsort(found["index"], kind="stable") if "index" in found else slice(None)
        return {name: x[order] for name, x in found.items()}


class Totals:
    """A ``core.Meter`` of sums over examples, of which it measures what is no mean: an exponential, a ratio.

    Args:
      count: from the arrays of a batch [n, ...] to what is summed, arrays by name; names may come and go.
      measure: from the sums, in float64, to the metrics.
    """

    def __init__(self, count: Callable[[Arrays], Mapping[str, Any]], measure: Callable[[Arrays], Mapping[str, Any]]):
        self._count, self._measure = count, measure
        self._sums: dict[str, np.ndarray] = {}

    def update(self, examples: Arrays) -> None:
        self.merge(self._count(examples))

    def state(self) -> Arrays:
        return self._sums

    def merge(self, state: Mapping[str, Any]) -> None:
        for name, x in state.items():
            self._sums[name] = self._sums.get(name, 0.0) + np.asarray(x, np.float64)

    def result(self) -> Mapping[str, Any]:
        return self._measure(self._sums)


def evaluate(
    task: Task,
    step: Callable[..., Any],
    variables: PyTree,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
    split: str = "",
    keep: bool = True,
) -> Evaluated:
    """Runs ``step`` (of ``parallel.eval_step``) over the batches of a split.

    Sums are added in float64 on the host, and batch n is read after batch n + 1 is dispatched. Each host's meters see
    its own rows, and take what those of the other hosts have seen before they are read, so that all read the same.

    Args:
      split: its name.
      keep: whether the arrays of all examples are wanted too.
    """
    totals: dict[str, tuple[Any, Any]] = {}
    meters = task.meters()
    kept = CollectAll(lambda examples: {})
    fed = [*meters.values(), kept] if keep else list(meters.values())

    def read(pending: tuple[Any, Any]) -> None:
        examples, sums = pending
        for name, (total, weight) in jax.device_get(sums).items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + np.asarray(total, np.float64), before[1] + np.asarray(weight, np.float64))
        here = {name: parallel.rows_here(x) for name, x in examples.items()}
        real = here.pop("mask") > 0
        for meter in fed:
            meter.update({name: x[real] for name, x in here.items()})

    pending = None
    for batch in parallel.prefetch(iter(batches), mesh):
        dispatched = step(variables, batch)
        if pending is not None:
            read(pending)
        pending = dispatched
    if pending is not None:
        read(pending)
    if jax.process_count() > 1:
        for meter in fed:
            for state in _of_the_others(meter.state(), mesh):
                meter.merge(state)
    metrics: dict[str, Any] = {
        name: np.divide(total, weight, out=np.zeros_like(total + weight), where=weight != 0).tolist()
        for name, (total, weight) in totals.items()
    }
    for name, meter in meters.items():
        found = meter.result()
        assert not set(found) & set(metrics), f"the meter {name!r} repeats {set(found) & set(metrics)}"
        metrics |= found
    return Evaluated(split, metrics, kept.examples())


def _of_the_others(state: Arrays, mesh: Mesh) -> list[Arrays]:
    """The states that other processes have, of one of those each that hold the same rows.

    They go as bytes of an npz file, each process's filled up to the longest.
    """
    file = io.BytesIO()
    np.savez(file, **state)  # type: ignore[arg-type]
    own = np.frombuffer(file.getvalue(), np.uint8)
    piece, _ = parallel.host(mesh)
    places = multihost_utils.process_allgather(np.array([piece, len(own)]))
    padded = np.pad(own, (0, int(places[:, 1].max()) - len(own)))
    rows = multihost_utils.process_allgather(padded)
    others = {int(place): row[:size].tobytes() for (place, size), row in zip(places, rows, strict=True)}
    del others[piece]
    return [dict(np.load(io.BytesIO(data), allow_pickle=False)) for _, data in sorted(others.items())]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Arrays [n, ...] one after another, those that are shorter in other axes filled up."""
    most = np.max([part.shape[1:] for part in parts], axis=0)
    missing = [[(0, 0), *((0, m - n) for m, n in zip(most, part.shape[1:], strict=True))] for part in parts]
    fill = -1 if np.issubdtype(parts[0].dtype, np.signedinteger) else 0
    return np.concatenate(
        [np.pad(p, m, constant_values=fill) if np.any(m) else p for p, m in zip(parts, missing, strict=True)]
    )
