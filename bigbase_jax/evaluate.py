"""Evaluation: every example of a split exactly once, padded and masked, summed exactly; then what does not add up."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from bigbase_jax import parallel
from bigbase_jax.build import suggest
from bigbase_jax.core import Evaluated, Evaluator, Meter, Metric, PyTree, Task, UserError

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
        found = self.state()
        order = np.argsort(found["index"], kind="stable") if "index" in found else slice(None)
        return self._measure({name: x[order] for name, x in found.items()})


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


@dataclasses.dataclass
class Split:
    """A ``core.Evaluator`` of all examples of one split by what the task measures: how val and test are evaluated.

    Attributes:
      split: its name.
      final: see ``core.Evaluator``.
      keep: whether the arrays of all examples are wanted too.
      step: of ``parallel.eval_step``, where several evaluators share it; None: compiled once, for the first task.
    """

    split: str
    final: bool = False
    keep: bool = True
    step: Callable[..., Any] | None = None

    metrics: ClassVar[Mapping[str, Metric]] = {}

    def run(self, task: Task, variables: PyTree, data: Any, mesh: Mesh) -> Evaluated:
        self.step = self.step or parallel.eval_step(task, mesh)
        batches = data.eval_batches(self.split, parallel.host(mesh))
        return evaluate(task, self.step, variables, batches, mesh, self.split, self.keep)


class Evaluators(NamedTuple):
    """Those of a run, by name.

    Attributes:
      during: run each ``train.eval_every``: ``val``, where there is that split, and the run's own that are not final.
      final: run on the checkpoint that a run ends with: ``test`` (or else ``val``, or else ``train``) and all its own.
      metrics: what they and the task measure.
    """

    during: dict[str, Evaluator]
    final: dict[str, Evaluator]
    metrics: dict[str, Metric]


def evaluators(task: Task, mesh: Mesh, splits: Collection[str], own: Mapping[str, Evaluator]) -> Evaluators:
    """Those that every run has, and its own.

    Args:
      splits: of its data.
      own: of ``config.evaluators``, built.

    Raises:
      UserError: an evaluator needs a split that is not there.
    """
    check_splits(own, splits)
    step = parallel.eval_step(task, mesh)
    last = next(name for name in ("test", "val", "train") if name in splits)
    during: dict[str, Evaluator] = {"val": Split("val", keep=False, step=step)} if "val" in splits else {}
    during |= {name: evaluator for name, evaluator in own.items() if not evaluator.final}
    metrics = dict(task.metrics)
    for evaluator in own.values():
        metrics |= evaluator.metrics
    return Evaluators(during, {last: Split(last, step=step), **own}, metrics)


def check_splits(own: Mapping[str, Evaluator], splits: Collection[str]) -> None:
    """
    Raises:
      UserError: one of ``config.evaluators`` needs a split that is not there.
    """
    for name, evaluator in own.items():
        for split in getattr(evaluator, "needs", filter(None, [getattr(evaluator, "split", None)])):
            if split not in splits:
                raise UserError(f"config.evaluators.{name} needs the split {split!r}.{suggest(split, splits, 'split')}")


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

    Args:
      split: its name.
      keep: whether the arrays of all examples are wanted too.
    """

    def make() -> dict[str, Meter]:
        return {**task.meters(), **({"": CollectAll(dict)} if keep else {})}

    meters, totals = _fed(step, variables, batches, mesh, make)
    examples = meters.pop("").result() if keep else {}
    metrics: dict[str, Any] = {
        name: np.divide(total, weight, out=np.zeros_like(total + weight), where=weight != 0).tolist()
        for name, (total, weight) in totals.items()
        if np.any(weight)  # of nothing, such as classes that no example of the split has, there is no mean
    }
    for name, meter in meters.items():
        found = meter.result()
        assert not set(found) & set(metrics), f"the meter {name!r} repeats {set(found) & set(metrics)}"
        metrics |= found
    return Evaluated(split, metrics, examples)


def answered_step(task: Task, compute: Callable[[PyTree, Arrays], Mapping[str, Any]], mesh: Mesh) -> Callable[..., Any]:
    """A step as ``parallel.eval_step`` gives it, of outputs that another engine computes.

    Args:
      task: the innermost one, whose ``evaluate`` measures what its ``predict`` gives.
      compute: takes variables and the arrays of ``Task.inputs``, and gives what ``Task.predict`` does.
    """

    def told(outputs: Any, batch: Any) -> Any:
        answered = copy.copy(task)
        object.__setattr__(answered, "predict", lambda variables, inputs: outputs)
        return answered.evaluate({}, batch)

    measure = parallel.rows_step(told, mesh)

    def step(variables: PyTree, batch: Mapping[str, Any]) -> Any:
        return measure(dict(compute(variables, {name: np.asarray(batch[name]) for name in task.inputs})), batch)

    return step


def collect(
    of_batch: Callable[[PyTree, Mapping[str, Any]], Mapping[str, Any]],
    variables: PyTree,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
) -> dict[str, np.ndarray]:
    """What a pure function of variables and a batch makes of all examples of a split: arrays [N, ...] in its order.

    Args:
      of_batch: gives arrays [B, ...] by name, such as ``Task.predict``.
      batches: of ``data.eval_batches``.
    """
    step = parallel.rows_step(lambda variables, batch: (of_batch(variables, batch), {}), mesh)
    meters, _ = _fed(step, variables, batches, mesh, lambda: {"": CollectAll(dict)})
    return dict(meters[""].result())


def _fed(
    step: Callable[..., Any],
    variables: PyTree,
    batches: Iterable[Any],
    mesh: Mesh,
    make: Callable[[], dict[str, Meter]],
) -> tuple[dict[str, Meter], dict[str, tuple[Any, Any]]]:
    """The meters that ``make`` makes, which have seen all examples, and the total and the weight of each ``Sum``.

    Sums are added in float64 on the host, and batch n is read after batch n + 1 is dispatched. Each host's meters see
    its own rows; fresh ones then take what those of each host have seen, in one order, so that all hosts read the same
    numbers to the bit.
    """
    meters = make()
    totals: dict[str, tuple[Any, Any]] = {}

    def read(pending: tuple[Any, Any]) -> None:
        examples, sums = pending
        for name, (total, weight) in jax.device_get(sums).items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + np.asarray(total, np.float64), before[1] + np.asarray(weight, np.float64))
        here = {name: parallel.rows_here(x) for name, x in examples.items()}
        real = here.pop("mask") > 0
        for meter in meters.values():
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
        own, meters = meters, make()
        for name, meter in meters.items():
            for state in _of_all(own[name].state(), mesh):
                meter.merge(state)
    return meters, totals


def _of_all(state: Arrays, mesh: Mesh) -> list[Arrays]:
    """The states of all processes, of one of those each that hold the same rows, in the order of these.

    They go as bytes of an npz file, each process's filled up to the longest.
    """
    file = io.BytesIO()
    np.savez(file, **state)  # type: ignore[arg-type]
    own = np.frombuffer(file.getvalue(), np.uint8)
    piece, _ = parallel.host(mesh)
    places = multihost_utils.process_allgather(np.array([piece, len(own)]))
    padded = np.pad(own, (0, int(places[:, 1].max()) - len(own)))
    rows = multihost_utils.process_allgather(padded)
    data = {int(place): row[:size].tobytes() for (place, size), row in zip(places, rows, strict=True)}
    return [dict(np.load(io.BytesIO(data[place]), allow_pickle=False)) for place in sorted(data)]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Arrays [n, ...] one after another, those that are shorter in other axes filled up."""
    most = np.max([part.shape[1:] for part in parts], axis=0)
    missing = [[(0, 0), *((0, m - n) for m, n in zip(most, part.shape[1:], strict=True))] for part in parts]
    fill = -1 if np.issubdtype(parts[0].dtype, np.signedinteger) else 0
    return np.concatenate(
        [np.pad(p, m, constant_values=fill) if np.any(m) else p for p, m in zip(parts, missing, strict=True)]
    )
