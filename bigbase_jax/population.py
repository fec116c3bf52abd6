"""Several runs of one small model as one program: the initialisation and the step of a task under ``jax.vmap``.

Members differ in their seed and, where asked for, in numbers of the optimizer; all see the same batches, as runs do
that differ in ``config.seed``. A step of a small model is mostly the cost of starting its operations, which all members
then share. Each member is what its own run would be, up to the rounding of sums.

The first axis of every array of a population's state is S: its members.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from bigbase_jax import parallel
from bigbase_jax.build import build
from bigbase_jax.core import Batch, PyTree, Sum, Task, TrainState, UserError
from bigbase_jax.data.pipeline import Prepared
from bigbase_jax.evaluate import evaluate
from bigbase_jax.log import say
from bigbase_jax.optim import Optimizer

_NUMBERS = ("learning_rate", "weight_decay", "clip_norm")
"""What of an optimizer may differ between members: none of it changes the program."""
Transform = Callable[[Mapping[str, Any]], optax.GradientTransformation]


def program(
    task: Task,
    transform: Transform,
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
      transform: a member's numbers, each f32[], to its optax transformation.
      seeds: of each member.
      numbers: name -> one value for each member.
      microbatches, ema_decay: as in ``parallel.program``.
      at_once: how many members a step computes side by side, the rest after them in the same program; None: all. A
        processor, whose caches are small, is fastest with 1.

    Returns:
      Functions of states and sums whose every array has a leading axis S; the step donates the state's buffers.
    """
    own = {name: jnp.asarray(values, jnp.float32) for name, values in (numbers or {}).items()}
    each = jnp.asarray(seeds, jnp.int32)

    def init(seed: jax.Array, own: Mapping[str, jax.Array], batch: Batch) -> TrainState:
        return parallel.init_state(task, transform(own), batch, seed, ema_decay is not None)  # type: ignore[arg-type]

    def step(state: TrainState, own: Mapping[str, jax.Array], batch: Batch) -> tuple[TrainState, dict[str, Sum]]:
        key = jax.random.fold_in(state.key, state.step)
        loss, grads, model_state = parallel.loss_and_grads(task, state, batch, key, microbatches)
        return parallel.apply_gradients(state, transform(own), loss, grads, model_state, ema_decay, None)

    def all_steps(state: TrainState, own: Mapping[str, jax.Array], batch: Batch) -> Any:
        if at_once is None or at_once >= len(seeds):
            return jax.vmap(step, in_axes=(0, 0, None))(state, own, batch)
        one = functools.partial(_spread, step, batch)
        return jax.lax.map(one, (state, own), batch_size=at_once if at_once > 1 else None)

    all_init = jax.jit(jax.vmap(init, in_axes=(0, 0, None)))
    all_step = jax.jit(all_steps, donate_argnums=0)
    return lambda batch: all_init(each, own, batch), lambda state, batch: all_step(state, own, batch)


def _spread(step: Callable[..., Any], batch: Batch, one: tuple[TrainState, Mapping[str, jax.Array]]) -> Any:
    return step(*one, batch)


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
      UserError: numbers that are no optimizer's or are not as many as seeds, or a recipe that starts from weights.
    """
    for name, values in (numbers or {}).items():
        if name not in _NUMBERS:
            raise UserError(f"members of a population may differ in {', '.join(_NUMBERS)}, not in {name!r}.")
        if len(values) != len(seeds):
            raise UserError(f"a population of {len(seeds)} seeds needs as many values of {name}, not {len(values)}.")
    if config.get("init_from"):
        raise UserError("a population starts from random weights; this recipe has config.init_from.")
    loop = build(config.train, _path="config.train")
    optimizer: Optimizer = build(config.optim, _path="config.optim")
    data: Prepared = build(config.data, _path="config.data").prepare(say)
    task: Task = build(config.task, data.facts, _path="config.task")
    mesh = parallel.make_mesh(1)
    total = loop.total_steps(data.steps_per_epoch)
    with contextlib.closing(data.train_batches(0, parallel.host(mesh))) as batches:
        first = next(batches)
    shapes: PyTree = jax.eval_shape(task.init, jax.random.key(0), first)["params"]

    def transform(own: Mapping[str, Any]) -> optax.GradientTransformation:
        return dataclasses.replace(optimizer, **own).transform(shapes, total)

    if at_once is None and jax.default_backend() == "cpu":
        at_once = 1
    how = {"microbatches": loop.microbatches, "ema_decay": loop.ema_decay, "at_once": at_once}
    init, step = program(task, transform, seeds, numbers, **how)
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
        split = "val" if "val" in data.splits else "train"
        eval_step = parallel.eval_step(task, mesh)
        for index in range(len(seeds)):
            batches = data.eval_batches(split, parallel.host(mesh))
            metrics.append(evaluate(task, eval_step, member(state, index).variables(), batches, mesh).metrics)
    return Trained(state, metrics, seconds)
