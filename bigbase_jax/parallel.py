"""Devices: the mesh, where arrays live on it, and the compiled steps. The only file that names mesh axes.

Two forms of the training step compute the same thing: ``jit`` (default), where the compiler partitions the global
program, and ``shard_map``, where each device runs the step on its own rows and the collectives are written out.
Losses cross devices and microbatches as ``Sum``s and are divided once, at the end.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bigbase_jax.core import Batch, PyTree, Sum, Task, TrainState, UserError, add, flatten

DATA = "data"
REPLICATED = ((".*", ()),)
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Sum]]]


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh over all devices, or over the first ``devices`` of them, along the ``data`` axis.

    Raises:
      UserError: there are fewer devices.
    """
    there = jax.devices()
    count = len(there) if devices is None else devices
    if not 1 <= count <= len(there):
        raise UserError(f"config.train.devices is {count}, but this machine has {len(there)} ({there[0].device_kind}).")
    return jax.make_mesh((count,), (DATA,), axis_types=(AxisType.Auto,), devices=there[:count])


def check_batch(batch_size: int, mesh: Mesh, microbatches: int = 1, what: str = "config.data.batch_size") -> None:
    """
    Raises:
      UserError: the batch does not divide over the devices and microbatches; names sizes that do.
    """
    parts = mesh.shape[DATA] * microbatches
    if batch_size % parts or batch_size < 1:
        below = batch_size // parts * parts
        fits = " or ".join(str(n) for n in (below, below + parts) if n)
        over = f"{mesh.shape[DATA]} devices" + (f" x {microbatches} microbatches" if microbatches > 1 else "")
        raise UserError(f"{what} {batch_size} does not divide over {over}; use {fits}.")


def host() -> tuple[int, int]:
    """(i, n): this process is number i of n, and reads its rows of each batch."""
    return jax.process_index(), jax.process_count()


def shardings(tree: PyTree, mesh: Mesh, rules: tuple[tuple[str, tuple], ...] = REPLICATED) -> PyTree:
    """A ``NamedSharding`` per leaf: the first rule (path regex, partition spec) whose regex is found in its path.

    Raises:
      UserError: a leaf that no rule covers.
    """

    def of(name: str) -> NamedSharding:
        for pattern, spec in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, PartitionSpec(*spec))
        raise UserError(f"no sharding rule covers the parameter {name!r}; add ('.*', ()) to replicate the rest.")

    return jax.tree.unflatten(jax.tree.structure(tree), [of(name) for name in flatten(tree)])


def placed(shapes: PyTree, homes: PyTree) -> PyTree:
    """Shapes (of ``jax.eval_shape``) with the sharding of each leaf, as restoring and compiling ask for them."""
    return jax.tree.map(lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), shapes, homes)


def put(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch, rows spread over the ``data`` axis, from this process's rows of it. Returns at once."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(x)) for name, x in batch.items()}


def prefetch(
    batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh, depth: int = 2
) -> Generator[dict[str, jax.Array], None, None]:
    """``put`` applied ``depth`` batches ahead, so that the copy to the device runs while it computes."""
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()
    try:
        for batch in batches:
            queue.append(put(batch, mesh))
            if len(queue) > depth:
                yield queue.popleft()
        yield from queue
    finally:
        if hasattr(batches, "close"):
            batches.close()


def init_state(task: Task, tx: optax.GradientTransformation, batch: Batch, seed: int, ema: bool) -> TrainState:
    """A fresh state; trace it under ``jax.jit`` with ``out_shardings`` so that it is born where it lives."""
    init_key, key = jax.random.split(jax.random.key(seed))
    variables = dict(task.init(init_key, batch))
    params = variables.pop("params")
    average = jax.tree.map(jnp.copy, {"params": params, **variables}) if ema else None
    return TrainState(jnp.int32(0), params, variables, tx.init(params), average, key)


def loss_and_grads(
    task: Task, state: TrainState, batch: Batch, key: jax.Array, microbatches: int
) -> tuple[Sum, PyTree, PyTree]:
    """The loss ``Sum``, the gradient of its total, and the new model state, in ``microbatches`` equal slices.

    The gradient is that of the total, not of the mean: totals and weights add up exactly over slices and devices.
    """

    def total(params: PyTree, model_state: PyTree, rows: Batch, key: jax.Array) -> tuple[jax.Array, tuple[Sum, PyTree]]:
        loss, new = task.loss({"params": params, **model_state}, rows, key)
        return jnp.sum(loss.total), (loss, new)

    gradient = jax.grad(total, has_aux=True)
    if microbatches == 1:
        grads, (loss, model_state) = gradient(state.params, state.model_state, batch, key)
        return loss, grads, model_state

    def body(
        carry: tuple[Sum, PyTree, PyTree], slice_: tuple[Batch, jax.Array]
    ) -> tuple[tuple[Sum, PyTree, PyTree], None]:
        loss, grads, model_state = carry
        rows, slice_key = slice_
        more, (more_loss, model_state) = gradient(state.params, model_state, rows, slice_key)
        return (add(loss, more_loss), add(grads, more), model_state), None

    # Slice m takes rows m, m + M, m + 2M, ...: every device keeps its own rows, and nothing moves between devices.
    split = {name: jnp.swapaxes(x.reshape(-1, microbatches, *x.shape[1:]), 0, 1) for name, x in batch.items()}
    zero = Sum(jnp.float32(0), jnp.float32(0))
    carry = (zero, jax.tree.map(jnp.zeros_like, state.params), state.model_state)
    (loss, grads, model_state), _ = jax.lax.scan(body, carry, (split, jax.random.split(key, microbatches)))
    return loss, grads, model_state


def apply_gradients(
    state: TrainState,
    tx: optax.GradientTransformation,
    loss: Sum,
    grads: PyTree,
    model_state: PyTree,
    ema_decay: float | None,
    rate: optax.Schedule | None,
) -> tuple[TrainState, dict[str, Sum]]:
    """Divides by the weight, updates parameters and moving average; returns the new state and what to log.

    The average's decay is warmed up as ``min(decay, (1 + t) / (10 + t))``, so that the random start is forgotten.
    """
    weight = jnp.sum(loss.weight)
    scale = 1.0 / jnp.where(weight == 0, 1.0, weight)
    norm = scale * optax.global_norm(grads)  # of the total's gradient: so the scaled one is never written to memory
    grads = jax.tree.map(lambda g: g * scale, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay is not None:
        t = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1 + t) / (10 + t))
        ema = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, {"params": params, **model_state})
    one = jnp.float32(1)
    sums = {"loss": Sum(jnp.sum(loss.total), weight), "grad_norm": Sum(norm, one)}
    if rate is not None:
        sums["learning_rate"] = Sum(jnp.asarray(rate(state.step), jnp.float32), one)
    return TrainState(state.step + 1, params, model_state, opt_state, ema, state.key), sums


def train_step(
    task: Task,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    state_shardings: TrainState,
    mode: str = "jit",
    microbatches: int = 1,
    ema_decay: float | None = None,
    rate: optax.Schedule | None = None,
) -> Step:
    """The compiled training step ``(state, batch) -> (state, sums)``; the state's buffers are donated.

    Args:
      mode: "jit" or "shard_map". In the second the task sees one device's rows at a time, so BatchNorm must be told
        the axis name ("data") to synchronise, and random masks differ from those of "jit".
      microbatches: slices of the batch whose gradients are accumulated before the update.
      ema_decay: decay of the moving average of the parameters; None: the state has none.
      rate: the learning-rate schedule, only to be logged.

    Raises:
      UserError: the loss couples examples of a batch, which neither slicing nor shard_map can honour.
    """
    if task.batch_coupled and (microbatches > 1 or mode == "shard_map"):
        how = f"config.train.microbatches={microbatches}" if microbatches > 1 else "config.train.parallel='shard_map'"
        raise UserError(
            f"this task's loss compares the examples of a batch with each other, and {how} would split them."
        )

    def global_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Sum]]:
        key = jax.random.fold_in(state.key, state.step)
        loss, grads, model_state = loss_and_grads(task, state, batch, key, microbatches)
        return apply_gradients(state, tx, loss, grads, model_state, ema_decay, rate)

    def local_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Sum]]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), jax.lax.axis_index(DATA))
        loss, grads, model_state = loss_and_grads(task, state, batch, key, microbatches)
        loss, grads = jax.lax.psum((loss, grads), DATA)
        model_state = jax.lax.pmean(model_state, DATA)
        return apply_gradients(state, tx, loss, grads, model_state, ema_decay, rate)

    everywhere = NamedSharding(mesh, PartitionSpec())
    out = (state_shardings, everywhere)
    if mode == "jit":
        return jax.jit(global_step, donate_argnums=0, in_shardings=(state_shardings, None), out_shardings=out)
    if mode == "shard_map":
        spec = jax.tree.map(lambda s: s.spec, state_shardings)
        inputs, outputs = (spec, PartitionSpec(DATA)), (spec, PartitionSpec())
        # Without the check of varying axes, gradients stay local until the one psum above.
        step = jax.shard_map(local_step, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
        return jax.jit(step, donate_argnums=0, out_shardings=out)
    raise UserError(f"config.train.parallel is {mode!r}; it is 'jit' or 'shard_map'.")


def eval_step(task: Task, mesh: Mesh) -> Callable[[PyTree, Batch], tuple[dict[str, Any], dict[str, Sum]]]:
    """The compiled evaluation step ``(variables, batch) -> (examples, sums)``.

    ``examples`` holds the outputs of ``predict`` and the batch's non-input entries, whole on every host.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def step(variables: PyTree, batch: Batch) -> tuple[dict[str, Any], dict[str, Sum]]:
        outputs = task.predict(variables, {name: batch[name] for name in task.inputs})
        labels = {name: x for name, x in batch.items() if name not in task.inputs}
        return {**labels, **outputs}, dict(task.metrics(outputs, batch))

    return jax.jit(step, out_shardings=(everywhere, everywhere))


@jax.jit
def all_finite(tree: PyTree) -> jax.Array:
    """bool[]: no NaN or infinity in any floating-point leaf."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def flops(compiled: jax.stages.Compiled | jax.stages.Lowered) -> float:
    """Floating-point operations of one call on one device, as the compiler counts them; 0 where it does not say."""
    try:
        analysis = compiled.cost_analysis()
    except NotImplementedError:
        return 0.0
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return float((analysis or {}).get("flops", 0.0))
