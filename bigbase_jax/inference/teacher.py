"""A trained model that another one learns from (``wrappers.distil``): a run of ours, or a published folder."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from bigbase_jax import pretrained
from bigbase_jax.build import build
from bigbase_jax.core import Task, UserError, Variables
from bigbase_jax.inference import published
from bigbase_jax.pretrained.start import is_run
from bigbase_jax.runtime.checkpoint import Checkpoints
from bigbase_jax.runtime.restored import batch_spec, dataset_info, restore
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.wrappers.distil import Distil
from bigbase_jax.wrappers.mix import Mix
from bigbase_jax.wrappers.wrapper import Wrapper


class _Opened(NamedTuple):
    """A teacher's task, shapes of its variables as that takes them, and of its inputs without axis B."""

    task: Task
    shapes: Variables
    spec: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A ``core.Given``: nothing is read before it is asked for.

    Adapters are merged into its model; what else was around its task in training alone is left out.

    Attributes:
      path: the folder of a run, whose best or else last checkpoint it is, or of published weights.
      fingerprint: see ``signature``; ``pretrained.resolve`` fills it in, so that a run goes on with the same one only.
    """

    path: str | None = None
    fingerprint: str | None = None

    @property
    def _folder(self) -> str:
        return os.path.expanduser(self.path or "")

    @property
    def there(self) -> bool:
        """Whether there is such a folder."""
        return os.path.isdir(self._folder)

    @property
    def task(self) -> Task:
        return self._opened.task

    @property
    def shapes(self) -> Variables:
        return self._opened.shapes

    @property
    def spec(self) -> Mapping[str, Any]:
        return self._opened.spec

    @functools.cached_property
    def _opened(self) -> _Opened:
        """
        Raises:
          UserError: there is no such folder, or what is in it answers no inputs.
        """
        if not self.there:
            raise UserError(f"the teacher {self.path} is not there; training needs it, put it back.")
        task: Any
        if is_run(self._folder):
            run = RunDir(self._folder)
            spec = batch_spec(run)
            whole: Any = build(run.config().task, dataset_info(run), _path="config.task")
            shapes = jax.eval_shape(whole.init, jax.random.key(0), spec)
            inputs = {key: jax.ShapeDtypeStruct(spec[key].shape[1:], spec[key].dtype) for key in whole.inputs}
            task, shapes = _plain(whole), jax.eval_shape(functools.partial(_unwrapped, whole), shapes)
        else:
            found = published.opened(self._folder, pretrained.shapes_of)
            task, shapes, inputs = found.task, found.variables, dict(found.spec)
        if getattr(task, "flip_test", False):  # the student sees the picture once
            task = dataclasses.replace(task, flip_test=False)
        if getattr(getattr(task, "model", None), "remat", False):  # for a gradient, of which a teacher has none
            task = dataclasses.replace(task, model=task.model.clone(remat=False))
        return _Opened(task, shapes, inputs)

    def read(self, like: Variables) -> Variables:
        """See ``core.Given``."""
        if not is_run(self._folder):
            return pretrained.load(self._folder, like=like)[1]
        run = RunDir(self._folder)
        mesh = jax.tree.leaves(like)[0].sharding.mesh
        whole, variables, _ = restore(run, run.config(), mesh)
        where = jax.tree.map(lambda x: x.sharding, like)
        if _plain(whole) is whole:
            return jax.device_put(variables, where)
        found: Variables = jax.jit(functools.partial(_unwrapped, whole), out_shardings=where)(variables)
        return found

    def signature(self) -> str:
        """A digest of the weights' files, and of what the model is.

        Raises:
          UserError: there are none.
        """
        digest = hashlib.sha256()
        if is_run(self._folder):
            run = RunDir(self._folder)
            digest.update(json.dumps(run.config_json()["task"], sort_keys=True).encode())
            digest.update(Checkpoints(run.checkpoints, read_only=True).signature().encode())
        else:
            folder = pathlib.Path(self._folder)
            for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]


def _plain(task: Any) -> Any:
    """The task without what was around it in training alone; what computes otherwise stays."""
    while isinstance(task, Wrapper | Mix | Distil):
        task = task.task
    return task


def _unwrapped(task: Any, variables: Variables) -> Variables:
    while isinstance(task, Wrapper | Mix | Distil):
        if hasattr(type(task), "unwrap"):
            variables = task.unwrap(variables)
        task = task.task
    return variables
