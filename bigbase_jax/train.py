"""The training loop: the only one. It knows the words of ``core.py`` and nothing of pictures, text or models.

Read top to bottom: set up -> restore or init -> compile -> loop -> final evaluation. Each step's metrics are read after
the next step is dispatched, so the host never waits for the device. What a step computes is in ``parallel.train_step``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from bigbase_jax import parallel, pretrained
from bigbase_jax.build import build
from bigbase_jax.core import Evaluated, Task, TrainState, UserError
from bigbase_jax.data.pipeline import Prepared
from bigbase_jax.evaluate import evaluators as all_evaluators
from bigbase_jax.optim import Optimizer
from bigbase_jax.parallel import MeshShape
from bigbase_jax.runtime import distributed
from bigbase_jax.runtime.checkpoint import Checkpoints
from bigbase_jax.runtime.log import Diverged, Log, environment_lines, model_table, say
from bigbase_jax.runtime.rundir import RunDir, as_json


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how to run (``config.train``).

    Attributes:
      epochs: passes over the training split; or give ``steps`` (one of the two; on the command line, it replaces the
        other). Learning-rate schedules span the steps that either gives.
      steps: optimizer updates.
      log_every: steps between log lines.
      eval_every: steps between evaluations on the validation split; None: once per epoch.
      checkpoint_every: steps between checkpoints; None: at every evaluation.
      keep: how many of the latest checkpoints stay.
      best_metric: a metric of ``val``, or ``NAME/METRIC`` of another evaluator; its best checkpoint stays too and is
        the one finally evaluated. None: the last.
      best_mode: "max" or "min".
      patience: stop after so many evaluations in a row without a better ``best_metric``; None: never.
      microbatches: slices of each batch whose gradients are accumulated before the update.
      ema_decay: decay per step of the moving average of the parameters that evaluation uses; None: no average.
      lazy_tables: update only the rows of embedding tables that a batch reads (``parallel.lazily``).
      parallel: form of the step, "jit" or "shard_map" (axes ``data`` and ``fsdp`` only).
      devices: how many devices; None: all.
      mesh: how many of them each axis has; ``mesh``, ``sharding`` and ``devices`` may change between starts of a run.
      sharding: where parameters live (``parallel.shardings``); empty: spread over the axes that are larger than 1.
      writers: besides metrics.jsonl: "tensorboard", "wandb", "mlflow".
      watchdog: seconds after which a step that has not ended is reported with the stacks of all threads; None: never.
    """

    epochs: float | None = None
    steps: int | None = None
    log_every: int = 50
    eval_every: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    best_metric: str | None = None
    best_mode: str = "max"
    patience: int | None = None
    microbatches: int = 1
    ema_decay: float | None = None
    lazy_tables: bool = False
    parallel: str = "jit"
    devices: int | None = None
    mesh: MeshShape = MeshShape()
    sharding: tuple[Any, ...] = ()
    writers: tuple[str, ...] = ("tensorboard",)
    watchdog: float | None = 600.0

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise UserError("give exactly one of config.train.epochs and config.train.steps; the other is None.")
        counted = ("epochs", "steps", "log_every", "eval_every", "checkpoint_every", "keep", "patience", "microbatches")
        for name in (*counted, "watchdog"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"config.train.{name} is {value}; it must be above 0.")
        if self.best_mode not in ("max", "min"):
            raise UserError(f"config.train.best_mode is {self.best_mode!r}; it is 'max' or 'min'.")
        if self.patience is not None and self.best_metric is None:
            raise UserError("config.train.patience needs config.train.best_metric to judge by.")

    def total_steps(self, steps_per_epoch: float) -> int:
        """Steps of the whole run."""
        return self.steps if self.steps is not None else max(1, math.ceil((self.epochs or 0) * steps_per_epoch))


Observe = Callable[[int, Mapping[str, Any]], str | None]
"""Takes the step and what is measured then: the metrics of ``val``, and those of other evaluators as ``NAME/METRIC``;
a reason ends the run after that step, resumably."""


def train(config: ConfigDict, workdir: str, name: str = "", observe: Observe | None = None) -> dict[str, Any]:
    """Trains, or continues, or only evaluates, the run in ``workdir``.

    Args:
      config: a recipe: ``seed``, ``data``, ``task``, ``optim``, ``train``.
      workdir: the run folder.
      name: the recipe's name, for the loggers.
      observe: see ``Observe``; it must answer alike in all processes.

    Returns:
      ``{"step", "split", every metric}`` of the final evaluation, and the same of each evaluator under its name; or
      ``{"step", "signal"}`` if a signal stopped it, or ``{"step", "stopped"}`` with the reason of ``observe``.

    Raises:
      UserError: whatever the user can mend.
    """
    # ------------------------------------------------------------------------------------------------- set up
    run = RunDir(workdir)
    run.refuse_other(config)
    loop: TrainConfig = build(config.train, _path="config.train")
    optimizer: Optimizer = build(config.optim, _path="config.optim")
    mesh = parallel.make_mesh(loop.devices, loop.mesh)
    data: Prepared = build(pretrained.data_of(run, config), _path="config.data").prepare(say)
    task: Task = build(config.task, data.dataset_info, _path="config.task")
    total = loop.total_steps(data.steps_per_epoch)
    if hasattr(task, "planned"):
        task, total = task.planned(data, loop, total)
    parallel.check_batch(data.batch_size, mesh, loop.microbatches)
    parallel.check_batch(data.eval_batch_size, mesh, what="config.data.eval_batch_size")
    own = build(config.get("evaluators", {}), data.dataset_info, _path="config.evaluators")
    evaluators = all_evaluators(task, mesh, data.splits, own)
    if loop.best_metric and not evaluators.during:
        raise UserError(
            f"config.train.best_metric={loop.best_metric!r} needs a validation split, and this data has none."
        )
    about = {**data.lineage(config.data.to_dict()), **getattr(task, "guarantee", {})}
    run.create(config, about["fingerprint"])
    pretrained.record_origin(run, config)
    shapes = data.train_shapes(parallel.host(mesh))
    specs = [parallel.global_spec(batch, mesh) for batch in shapes]
    first, spec = shapes[-1], specs[-1]
    batch_shapes = {name: [list(s.shape), str(s.dtype)] for name, s in spec.items()}
    about_metrics = {name: metric._asdict() for name, metric in evaluators.metrics.items()}
    run.keep_data({"dataset_info": data.dataset_info, "batch": batch_shapes, "metrics": about_metrics})
    eval_every = loop.eval_every or data.steps_per_epoch
    checkpoint_every = loop.checkpoint_every or eval_every
    checkpoints = Checkpoints(run.checkpoints, loop.keep, keep_best=loop.best_metric is not None)

    # ------------------------------------------------------------------------------------------------- restore or init
    abstract_params = jax.eval_shape(task.init, jax.random.key(0), spec)["params"]
    tx = optimizer.transform(abstract_params, total)
    program = parallel.program(
        task,
        tx,
        spec,
        mesh,
        seed=config.seed,
        numbers=optimizer.numbers(total),
        sharding=loop.sharding,
        mode=loop.parallel,
        microbatches=loop.microbatches,
        ema_decay=loop.ema_decay,
        lazy_tables=loop.lazy_tables,
    )
    state, progress = checkpoints.restore_latest(program.state)
    if state is None:
        state = program.init(parallel.put(first, mesh))
        if any(config.get(name) for name in ("init_from", "adapter", "init_parts")):
            begun = config.get("adapter"), config.get("init_parts")
            state = pretrained.initialise(config.init_from, state, task, spec, *begun)
    start = int(state.step)
    done = start >= total or progress.get("stopped", False)
    forward = jax.jit(task.predict).lower(program.state.variables(), {name: spec[name] for name in task.inputs})
    frozen = state.model_state.get(parallel.FROZEN)
    table = model_table(state.params, parallel.flops(forward) / data.batch_size, frozen=frozen)
    for line in [*environment_lines(), *data.summary(), table]:
        say(line)

    # ------------------------------------------------------------------------------------------------- compile
    reason: str | None = None
    if not done:
        began = time.perf_counter()
        step_fn = parallel.Steps(program, specs, mesh)
        compile_seconds = time.perf_counter() - began
        log = Log(
            str(run.path),
            total_steps=total,
            every=loop.log_every,
            start_step=start,
            interval=progress.get("interval"),
            steps_per_epoch=data.steps_per_epoch,
            batch_size=data.batch_size,
            writers=loop.writers,
            name=name,
            config=as_json(config),
            devices=mesh.size,
        )
        log.compiled(compile_seconds)

        # --------------------------------------------------------------------------------------------- loop
        stream = parallel.prefetch(data.train_batches(start, parallel.host(mesh)), mesh)
        closing = contextlib.closing
        recorded = run.training(start, mesh.size, about)
        with (
            recorded,
            distributed.Watch(loop.watchdog, start, say) as watch,
            closing(checkpoints),
            closing(log),
            closing(stream),
        ):
            for step in range(start + 1, total + 1):
                with log.data_wait():
                    batch = next(stream)
                state, sums = step_fn(state, batch)
                log.step(step, sums, step_fn.flops(batch))

                due = evaluators.during if _due(step, eval_every) or step == total else {}
                measured: dict[str, Any] = {}
                for where, evaluator in due.items():
                    with log.pause(), watch.pause():
                        log.check(step)
                        metrics = evaluator.run(task, state.variables(), data, mesh).metrics
                        log.metrics(step, where, metrics)
                    measured |= metrics if where == "val" else {f"{where}/{k}": v for k, v in metrics.items()}
                if measured:
                    progress = _judge(progress, step, measured, loop)
                    reason = observe(step, measured) if observe else None
                ends = watch.ends(step) or step == total or progress.get("stopped") or reason
                if ends or _due(step, checkpoint_every) or progress.get("best_step") == step:
                    with log.pause(), watch.pause():
                        _save(checkpoints, log, step, state, progress)
                if ends:
                    break
        if watch.signal and int(state.step) < total:
            by = signal.Signals(watch.signal).name
            say(f"stopped by {by} after step {int(state.step)}; the same command continues from there")
            run.ended(int(state.step), by)
            return {"step": int(state.step), "signal": int(watch.signal)}
        if reason and int(state.step) < total:
            say(f"stopped after step {int(state.step)}: {reason}")
            run.ended(int(state.step), reason)
            return {"step": int(state.step), "stopped": reason}
    run.ended(int(state.step), "finished", finished=True)

    # ------------------------------------------------------------------------------------------------- final evaluation
    step = int(state.step)
    if progress.get("best_step", step) != step:
        state, step = checkpoints.restore_best(program.state)
    results: dict[str, Any] = {}
    for where, evaluator in evaluators.final.items():
        found = evaluator.run(task, state.variables(), data, mesh)
        said = (f"{name} {value:.4g}" for name, value in found.metrics.items() if isinstance(value, float))
        say(f"{where} @ {step}: " + "  ".join(said))
        result = keep_evaluation(run, step, where, found)
        results = {**results, where: result} if results else result
    return results


def keep_evaluation(run: RunDir, step: int, name: str, found: Evaluated) -> dict[str, Any]:
    """Keeps an evaluation in the run folder; returns ``{"step", "split", every metric}``."""
    result = {"step": step, "split": name, **found.metrics}
    if found.examples:
        run.write_npz(f"predictions-{name}.npz", found.examples)
    run.write_json(f"eval-{name}.json", result)
    return result


def _due(step: int, every: float) -> bool:
    """Whether ``step`` is the first at or after a multiple of ``every``, which need not be whole (an epoch)."""
    return math.floor(step / every) > math.floor((step - 1) / every)


def _save(checkpoints: Checkpoints, log: Log, step: int, state: TrainState, progress: dict[str, Any]) -> None:
    """Saves a state that is known to be finite, and what the log holds up to it."""
    log.check(step, last=progress.get("stopped", False))
    if not bool(parallel.all_finite(state.params)):
        raise Diverged(step, "the parameters became infinite or NaN")
    progress = {**progress, "data_step": step, "interval": log.interval()}
    checkpoints.save(step, state, progress, best=progress.get("best_step") == step)


def _judge(progress: dict[str, Any], step: int, metrics: dict[str, Any], loop: TrainConfig) -> dict[str, Any]:
    """The progress after an evaluation: best value so far, evaluations without a better one, whether to stop."""
    if loop.best_metric is None:
        return progress
    if not isinstance(metrics.get(loop.best_metric), (int, float)):
        scalars = [name for name, value in metrics.items() if isinstance(value, (int, float))]
        raise UserError(
            f"config.train.best_metric {loop.best_metric!r} is not measured; there are {', '.join(scalars)}."
        )
    value = float(metrics[loop.best_metric])
    sign = 1 if loop.best_mode == "max" else -1
    if "best" not in progress or sign * value > sign * progress["best"]:
        return {**progress, "best": value, "best_step": step, "waited": 0}
    waited = progress["waited"] + 1
    return {**progress, "waited": waited, "stopped": loop.patience is not None and waited >= loop.patience}
