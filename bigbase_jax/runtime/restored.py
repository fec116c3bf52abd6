"""A model that a run has trained, read from its folder: what the verbs on a run, and runs that begin from one, go on
with."""

from __future__ import annotations

import os
from types import NoneType
from typing import Any

import jax
from ml_collections import ConfigDict

from bigbase_jax import parallel
from bigbase_jax.build import build, suggest
from bigbase_jax.core import Evaluator, Metric, Task, UserError, Variables
from bigbase_jax.runtime.checkpoint import Checkpoints
from bigbase_jax.runtime.rundir import RunDir


def dataset_info(run: RunDir) -> dict[str, Any]:
    """What the run has kept of ``Dataset.dataset_info``: numbers, texts and lists of them, for a config's arguments.

    Raises:
      UserError: there are none, or others.
    """
    found = run.data_json().get("dataset_info")
    if not isinstance(found, dict):
        raise UserError(f"{run.path / 'data.json'} has no dataset_info.")
    for key, value in found.items():
        if not all(isinstance(x, (str, int, float, NoneType)) for x in (value if isinstance(value, list) else [value])):
            raise UserError(
                f"{run.path / 'data.json'} has {key}={str(value)[:80]}; what is known of data is numbers and texts."
            )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def metrics(run: RunDir) -> dict[str, Metric]:
    """What every number means that a run measures; of a run of an earlier version, what its task says.

    Raises:
      UserError: there is no run here, or its task cannot be built.
    """
    kept = run.data_json().get("metrics")
    if kept is None:
        task: Task = build(run.config().task, dataset_info(run), _path="config.task")
        return dict(task.metrics)
    try:
        found = {str(name): Metric(**about) for name, about in kept.items()}
        if not all(isinstance(x, (str, NoneType)) for metric in found.values() for x in metric):
            raise TypeError("a metric is told in words")
        return found
    except (AttributeError, TypeError) as error:
        raise UserError(f"{run.path / 'data.json'} does not say what is measured ({error}).") from error


def evaluator(run: RunDir, name: str) -> Evaluator:
    """``config.evaluators.NAME`` of a run.

    Raises:
      UserError: it has no such evaluator, or it cannot be built.
    """
    own = run.config().get("evaluators") or {}
    if name not in own:
        raise UserError(f"{run.path} has no evaluator {name!r}.{suggest(name, own, 'evaluator')}")
    built: Evaluator = build(own[name], dataset_info(run), _path=f"config.evaluators.{name}")
    return built


def answering(run: RunDir, name: str, task: Task) -> Task:
    """The task as it answers by what an evaluator of the run has kept; see ``core.Evaluator``.

    Raises:
      UserError: there is no such evaluator, it adds nothing to answers, or it has kept nothing yet.
    """
    of: Any = evaluator(run, name)
    if not hasattr(of, "answering"):
        raise UserError(f"--answers={name}: {type(of).__name__} adds nothing to answers; leave it out.")
    missing = f"{run.path} has no eval-{name}.json yet; run --mode=eval --workdir={run.path} first"
    answers: Task = of.answering(task, run.read_json(f"eval-{name}.json", missing))
    return answers


def batch_spec(run: RunDir) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of the training.

    Raises:
      UserError: the run does not say them.
    """
    try:
        batch = run.data_json()["batch"].items()
        return {key: jax.ShapeDtypeStruct(tuple(map(int, shape)), dtype) for key, (shape, dtype) in batch}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.path / 'data.json'} does not say the shapes of a batch ({error}).") from error


def restore(run: RunDir, config: ConfigDict, mesh: Any, step: int | None = None) -> tuple[Task, Variables, int]:
    """The task of a run and the variables of one of its checkpoints, spread over ``mesh`` as ``train.sharding`` says.

    Where its rules do not fit this mesh, they are spread as its axes ask for; where that does not fit, they stay whole.

    Args:
      step: which; None: the best where the run tracked one, else the last.

    Raises:
      UserError: there is no (such) checkpoint, or it is of another model.
    """
    task: Task = build(config.task, dataset_info(run), _path="config.task")
    checkpoints = Checkpoints(run.checkpoints, read_only=True)
    variables = dict(jax.eval_shape(task.init, jax.random.key(0), batch_spec(run)))
    abstract = parallel.placed(variables, parallel.fitting_shardings(variables, mesh, config.train.sharding))
    if config.train.ema_decay is not None:
        wanted = {"ema": abstract}
    else:
        wanted = {"params": abstract.pop("params"), "model_state": abstract}
    if step is None:
        loaded, step = checkpoints.restore_best(wanted)
    else:
        loaded = checkpoints.restore(wanted, step)
    return task, loaded["ema"] if "ema" in wanted else {"params": loaded["params"], **loaded["model_state"]}, step


def opened(folder: str | os.PathLike[str]) -> tuple[Task, Variables]:
    """The task of a run and its best or last variables, on the first device; raises as ``restore``."""
    run = RunDir(folder)
    task, variables, _ = restore(run, run.config(), parallel.make_mesh(1))
    return task, variables
