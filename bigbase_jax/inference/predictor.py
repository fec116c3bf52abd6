"""A trained model that answers inputs one by one: opened from the folder of its run."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigbase_jax import parallel
from bigbase_jax.build import build, locate
from bigbase_jax.core import Array, Batch, Codec, Example, UserError, Variables
from bigbase_jax.data.files import limits_of
from bigbase_jax.data.pipeline import apply_eval
from bigbase_jax.inference import published
from bigbase_jax.inference.inputs import Input
from bigbase_jax.inference.published import Opened
from bigbase_jax.runtime.restored import dataset_info, restore
from bigbase_jax.runtime.rundir import RunDir

ROWS = 32
"""Inputs that are answered at once, and examples of a batch; where all inputs are fewer, a power of two is enough."""
Output = dict[str, np.ndarray]
"""What the model gives of one example, without a batch axis."""
Compute = Callable[[Variables, Batch], Mapping[str, Array]]
"""What is compiled: variables and a batch -> arrays with a leading axis B."""


class Predictor:
    """A model and all that comes before and after it: what reads inputs, the evaluation transforms, the answer.

    Attributes:
      task: the model and what it predicts.
      variables: its trained variables, on one device.
      codec: what reads inputs.
      limits: of reading a file.
      dataset_info: what it knows of its data, the encoding of texts among it.
      step: the checkpoint.
    """

    def __init__(self, workdir: str | os.PathLike, step: int | None = None):
        """Opens a run, ``step`` as in ``restored.restore``, or a published folder.

        Raises:
          UserError: there is neither, or no such checkpoint.
        """
        run = RunDir(workdir)
        opened = _run(run, step) if "task" in run.config_json() else published.opened(str(workdir))
        self.task, self.variables, self.step, self.dataset_info, self._shapes, self._transforms = opened[:6]
        self._seed, dataset, node = opened[6:]
        self.limits = limits_of(node)
        if not hasattr(dataset, "codec"):
            self.codec: Codec = _Reads(dataset, node, self.dataset_info)
        elif isinstance(inspect.getattr_static(dataset, "codec"), staticmethod):
            self.codec = dataset.codec(node, self.dataset_info)
        else:
            self.codec = build(node, _path="config.data.dataset").codec(node, self.dataset_info)
        if self.codec.fields is not None:
            self.dataset_info = {**self.dataset_info, "encoding": self.codec.fields.encoding}

    def examples(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """What the model reads of a file, its bytes or a row by entry: one example or several, in order, with all of
        ``Task.inputs``.

        Raises:
          UserError: it cannot be read.
        """
        examples = self.codec.decode(given)
        if not examples:
            raise UserError("there is nothing in it that the model could read.")
        return [self._ready(apply_eval(self._transforms, example, self._seed)) for example in examples]

    def _ready(self, example: Example) -> Example:
        fitted = self.codec.fit(example, self._shapes)
        ready = {key: np.asarray(fitted[key]) for key in self.task.inputs}
        for key, x in ready.items():
            if x.shape != self._shapes[key]:
                raise UserError(f"its {key} has the shape {x.shape}, and the model was trained on {self._shapes[key]}.")
        return {**fitted, **ready}

    def outputs(
        self, inputs: Iterable[Input], compute: Compute | None = None
    ) -> Iterator[tuple[Input, list[tuple[Example, Output]] | UserError]]:
        """Each input, lazily and in order, with its examples and the outputs of each, or why there are none.

        Args:
          compute: what to compute of the examples; None: ``Task.predict``.
        """
        compiled = jax.jit(compute or self.task.predict)
        waiting, rows = iter(inputs), 0
        while some := list(itertools.islice(waiting, ROWS)):
            read: list[list[Example] | UserError] = []
            for item in some:
                try:
                    read.append(UserError(item.error) if item.error else self.examples(item.given))
                except UserError as error:
                    read.append(error)
            examples = [example for found in read if isinstance(found, list) for example in found]
            if not rows:
                rows = ROWS if len(some) == ROWS else min(ROWS, 1 << max(len(examples) - 1, 0).bit_length())
            computed = self._compute(compiled, examples, rows)
            for item, found in zip(some, read, strict=True):
                yield item, found if isinstance(found, UserError) else [(example, next(computed)) for example in found]

    def answers(self, inputs: Iterable[Input]) -> Iterator[tuple[Input, dict[str, Any]]]:
        """Each input, lazily and in order, with ``Task.postprocess`` of it, or ``{"error": why there is no answer}``.

        An input that was read as several examples has one answer where the task can merge their outputs
        (``Task.merge``), and else one for each of them, with its number as ``part``.
        """
        merge = getattr(self.task, "merge", None)
        for item, found in self.outputs(inputs):
            if isinstance(found, UserError):
                yield item, {"error": str(found)}
                continue
            whole = found
            if len(found) > 1 and merge is not None:
                whole = [(found[0][0], merge([output for _, output in found]))]
            for part, (example, output) in enumerate(whole):
                number = {"part": part} if len(whole) > 1 else {}
                yield item, {**number, **self.task.postprocess(output, example)}

    def _compute(self, compiled: Any, examples: Sequence[Example], rows: int) -> Iterator[Output]:
        """The outputs of examples, in order, by batches of so many rows: one shape, and so one compiled program."""
        for start in range(0, len(examples), rows):
            some = examples[start : start + rows]
            padded = [*some, *[some[-1]] * (rows - len(some))]
            batch = {key: np.stack([example[key] for example in padded]) for key in self.task.inputs}
            computed = jax.device_get(compiled(self.variables, batch))
            for i in range(len(some)):
                yield {key: x[i] for key, x in computed.items()}


class _Reads(Codec):
    """The codec of a data set class that has the methods ``fields`` and ``read`` in the place of ``codec``."""

    def __init__(self, dataset: Any, config: Any, dataset_info: Mapping[str, Any]):
        self.fields = dataset.fields(config, dataset_info) if hasattr(dataset, "fields") else None
        encoding = {"encoding": self.fields.encoding} if self.fields else {}
        known = {"dataset_info": {**dataset_info, **encoding}, "limits": limits_of(config)}
        if isinstance(inspect.getattr_static(dataset, "read"), staticmethod):
            wanted = inspect.signature(dataset.read).parameters
            self._read = functools.partial(dataset.read, **{name: known[name] for name in known if name in wanted})
        else:
            self._read = build(config, _path="config.data.dataset").read

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        found = self._read(given)
        return [dict(found)] if isinstance(found, Mapping) else found


def _run(run: RunDir, step: int | None) -> Opened:
    config, known = run.config(), dataset_info(run)
    task, variables, step = restore(run, config, parallel.make_mesh(1), step)
    shapes = {key: tuple(shape[1:]) for key, (shape, _) in run.data_json()["batch"].items()}
    transforms = build(config.data.eval_transforms, _path="config.data.eval_transforms")
    node = config.data.dataset
    dataset = locate(node.target, "config.data.dataset.target")
    return Opened(task, variables, step, known, shapes, transforms, config.data.seed, dataset, node)
