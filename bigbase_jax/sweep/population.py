"""Several runs of one small model as one program: the initialisation and the step of a task under ``jax.vmap``.

Members differ in their seed and, where asked for, in numbers of the optimizer; all see the same batches, as runs do
that differ in ``config.seed``. A step of a small model is mostly the cost of starting its operations, which all members
then share. Each member is what its own run would be, up to the rounding of sums.

The first axis of every array of a population's state is S: its members.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from bigbase_jax import parallel
from bigbase_jax.build import build
from bigbase_jax.core import Batch, PyTree, Sum, Task, TrainState, UserError
from bigbase_jax.data.pipeline import Prepared
from bigbase_jax.evaluate import Split
from bigbase_jax.optim import Optimizer
from bigbase_jax.runtime.log import say

_NUMBERS = ("learning_rate", "weight_decay", "clip_norm")
"""What of an optimizer may differ between members."""


def program(
    task: Task,
    tx: optax.GradientTransformation,
    seeds: Sequence[int],
    numbers: Mapping[str, Sequence[float]] | None = None,
    *,
    microbatches: int = 1,
    ema_decay: float | None = None,
    at_once: int | None = None,
) -> tuple[Callable[[Batch], TrainState], Callable[[TrainState, Batch], tuple[TrainState, dict[str, Sum]]]]:
    """``batch -> state`` and ``(state, batch) -> (state, sums)`` for all members at once, compiled.

    Args:
      task: what is trained.
      tx: of ``optim.Optimizer.transform``.
      seeds: of each member.
      numbers: name, of ``optim.Optimizer.numbers``, -> one value for each member.
      microbatches, ema_decay: as in ``parallel.program``.
      at_once: how many members a step computes side by side, the rest after them in the same program; None: all. A
        processor, whose caches are small, is fastest with 1.

    Returns:
      Functions of states and sums whose every array has a leading axis S; the step donates the state's buffers.
    """
    own = {name: np.asarray(values, np.float32) for name, values in (numbers or {}).items()}
    each = np.asarray(seeds).astype(np.int32)

    def init(seed: jax.Array, own: Mapping[str, jax.Array], batch: Batch) -> TrainState:
        return parallel.init_state(task, tx, batch, seed, ema_decay is not None, own)

    step = parallel.plain_step(task, tx, microbatches, ema_decay)

    def all_steps(state: TrainState, batch: Batch) -> Any:
        def one(own: TrainState) -> Any:
            return step(own, batch)

        if at_once is None or at_once >= len(seeds):
            return jax.vmap(one)(state)
        return jax.lax.map(one, state, batch_size=at_once if at_once > 1 else None)

    all_init = jax.jit(jax.vmap(init, in_axes=(0, 0, None)))
    return lambda batch: all_init(each, own, batch), jax.jit(all_steps, donate_argnums=0)


def member(state: TrainState, index: int) -> TrainState:
    """The training state of one member, as its own run would have it."""
    return jax.tree.map(lambda x: x[index], state)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A population at the end of its training.

    Attributes:
      state: of all members.
      metrics: of each member, on the validation split, or else on the training split.
      seconds: of the steps alone, without compilation and evaluation.
    """

    state: TrainState
    metrics: list[dict[str, Any]]
    seconds: float


def train(
    config: ConfigDict,
    seeds: Sequence[int],
    numbers: Mapping[str, Sequence[float]] | None = None,
    evaluated: bool = True,
    at_once: int | None = None,
) -> Trained:
    """Trains a recipe once for each member, on one device, without a run folder.

    Args:
      config: the recipe's; ``train.best_metric`` and ``patience`` are not honoured: the last state counts.
      seeds: in place of ``config.seed``.
      numbers: ``learning_rate``, ``weight_decay`` or ``clip_norm`` -> one value for each member, in place of the
        recipe's.
      evaluated: False: ``metrics`` stays empty.
      at_once: see ``program``; None: all, but one on a processor.

    Raises:
      UserError: numbers that are no optimizer's, that its schedule does not allow to differ, or that are not as many as
        seeds, or a recipe that starts from weights.
    """
    for name, values in (numbers or {}).items():
        if name not in _NUMBERS:
            raise UserError(f"members of a population may differ in {', '.join(_NUMBERS)}, not in {name!r}.")
        if len(values) != len(seeds):
            raise UserError(f"a population of {len(seeds)} seeds needs as many values of {name}, not {len(values)}.")
    if config.get("init_from"):
        raise UserError("a population starts from random weights; this recipe has config.init_from.")
    loop = build(config.train, _path="config.train")
    if loop.lazy_tables:
        raise UserError("a population updates whole tables; set config.train.lazy_tables=False.")
    optimizer: Optimizer = build(config.optim, _path="config.optim")
    data: Prepared = build(config.data, _path="config.data").prepare(say)
    task: Task = build(config.task, data.dataset_info, _path="config.task")
    mesh = parallel.make_mesh(1)
    total = loop.total_steps(data.steps_per_epoch)
    with contextlib.closing(data.train_batches(0, parallel.host(mesh))) as batches:
        first = next(batches)
    shapes: PyTree = jax.eval_shape(task.init, jax.random.key(0), first)["params"]
    largest: dict[str, Any] = {name: max(values) for name, values in (numbers or {}).items()}
    optimizer = dataclasses.replace(optimizer, **largest)
    free = optimizer.numbers(total)
    own = {name: values for name, values in (numbers or {}).items() if name in free or len(set(values)) > 1}
    for name in own.keys() - free.keys():
        raise UserError(f"this recipe's config.optim.schedule does not allow members to differ in {name}.")

    if at_once is None and jax.default_backend() == "cpu":
        at_once = 1
    how = {"microbatches": loop.microbatches, "ema_decay": loop.ema_decay, "at_once": at_once}
    init, step = program(task, optimizer.transform(shapes, total), seeds, own, **how)
    state = init(first)
    stream = parallel.prefetch(data.train_batches(0, parallel.host(mesh)), mesh)
    with contextlib.closing(stream):
        began = time.perf_counter()
        for done in range(1, total + 1):
            state, _ = step(state, next(stream))
            if done % 2 == 0 or done in (1, total):
                jax.block_until_ready(state.step)  # the host does not run ahead
            if done == 1:
                began = time.perf_counter()  # the first step compiles
        seconds = (time.perf_counter() - began) * total / max(total - 1, 1)
    metrics = []
    if evaluated:
        evaluator = Split("val" if "val" in data.splits else "train", keep=False)
        members = (member(state, index).variables() for index in range(len(seeds)))
        metrics = [dict(evaluator.run(task, variables, data, mesh).metrics) for variables in members]
    return Trained(state, metrics, seconds)
