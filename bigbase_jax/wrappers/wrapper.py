"""Training little of a model: tasks around tasks, which need nothing of the model but that it is a Linen module.

``lora.LoRA`` trains small products beside a model's kernels, ``frozen.Frozen`` some of its parameters. What is trained
lies in ``params``; the rest lies in the collection ``FROZEN`` of the model state, where the optimizer, weight decay and
clipping do not see it and no gradient is computed for it. So the loop, checkpoints and moving averages work as they
are. Both have, beside what every task has:

- ``unwrap(variables)``: the variables of the task inside, as if it had been trained by itself;
- ``place(path)``: where the inner task's parameter of this dotted path lives, as (collection, path) of the wrapped
  variables: ``("frozen", "encoder.norm.scale")``. A task without this method keeps it at ``("params", path)``. Whoever
  replaces the parameters of a fresh task by loaded ones asks for it.

A wrapper that changes a task's batches or loss (``Mix``) goes inside: ``LoRA(Mix(Classification(...)))``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from bigbase_jax.core import Batch, Loss, Task, UserError, Variables
from bigbase_jax.parallel import FROZEN

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Around:
    """A task that runs the methods of ``task`` in its own way, and has all else of it."""

    task: Task

    def unwrap(self, variables: Variables) -> Variables:
        """The variables of the task inside; the same, unless a subclass says otherwise."""
        return variables

    def _check_inside(self) -> None:
        """Raises UserError where the task has a teacher: that is around all others."""
        if hasattr(self.task, "given"):
            raise UserError(f"{type(self).__name__} goes inside: Distil({type(self).__name__}(task)).")

    def _run(self, method: Callable[..., Any], variables: Variables, /, *args: Any, **kwargs: Any) -> Any:
        """A method of the inner task on the wrapped variables."""
        return method(self.unwrap(variables), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """All else is the inner task's; a method whose first argument is ``variables`` takes the wrapped ones."""
        if name == "task" or name.startswith("__"):  # of an object that is being copied or unpickled
            raise AttributeError(name)
        found = getattr(self.task, name)
        method = inspect.ismethod(found) or isinstance(found, functools.partial)  # of a wrapper in turn
        if method and next(iter(inspect.signature(found).parameters), None) == "variables":
            return functools.wraps(found)(functools.partial(self._run, found))
        return found


@dataclasses.dataclass(frozen=True)
class Wrapper(Around):
    """A task around ``task`` that keeps some of its parameters in ``params`` and the others in ``FROZEN``."""

    def trains(self, path: str) -> bool:
        """Whether the inner task's parameter of this dotted path is trained itself."""
        raise NotImplementedError

    def place(self, path: str) -> tuple[str, str]:
        """(collection, path) in the wrapped variables of the inner task's parameter of this dotted path."""
        inner = getattr(self.task, "place", None)
        collection, path = inner(path) if inner else ("params", path)
        return (FROZEN if collection == "params" and not self.trains(path) else collection), path

    def unwrap(self, variables: Variables) -> Variables:
        rest = {name: x for name, x in variables.items() if name != FROZEN}
        return {
            **rest,
            "params": unflatten_dict({**flatten_dict(variables[FROZEN]), **flatten_dict(variables["params"])}),
        }

    def _init(self, key: jax.Array, batch: Batch) -> tuple[dict[Path, Any], dict[Path, Any], dict[str, Any]]:
        """The inner task's trained and frozen parameters by path, and its other collections."""
        self._check_inside()
        variables = dict(self.task.init(key, batch))
        if FROZEN in variables:
            raise UserError(
                f"{type(self).__name__} wraps {type(self.task).__name__}, which has frozen parameters already; "
                "wrap the task inside it."
            )
        params = flatten_dict(variables.pop("params"))
        trained = {path: x for path, x in params.items() if self.trains(".".join(path))}
        return trained, {path: x for path, x in params.items() if path not in trained}, variables

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        loss, state = self._run(self.task.loss, variables, batch, key)
        return loss, {**state, FROZEN: variables[FROZEN]}


def check_regex(what: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{what}={pattern!r} is not a regular expression ({error}).") from error


def some_paths(paths: Any, most: int = 5) -> str:
    """Some of the paths, dotted, spread over all of them."""
    names = [".".join(path) for path in paths]
    step = max(1, math.ceil(len(names) / most))
    shown = names[::step]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(map(repr, shown)) + more if names else "none"
