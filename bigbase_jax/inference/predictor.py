"""A trained model that answers inputs one by one: what predict, embed, generate, eval and export work with."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bigbase_jax import parallel
from bigbase_jax.build import build, locate
from bigbase_jax.core import Array, Batch, Codec, Example, Rendered, Task, UserError, Variables
from bigbase_jax.data.files import LIMITS, Limits, limits_of
from bigbase_jax.data.pipeline import apply_eval
from bigbase_jax.inference.inputs import Input
from bigbase_jax.pretrained.start import chain, merged
from bigbase_jax.runtime.restored import answering, batch_spec, dataset_info, restore
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.wrappers import adapter as adapters
from bigbase_jax.wrappers.wrapper import Around, Wrapper

ROWS = 32
LEAST = 16
"""Places that the padded entries of a batch have at least."""
Output = dict[str, np.ndarray]
"""What the model gives of one example, without a batch axis."""
Compute = Callable[[Variables, Batch], Mapping[str, Array]]
"""What is compiled: variables and a batch -> arrays with a leading axis B."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How what a user gives becomes examples.

    Attributes:
      codec: what reads it.
      transforms: what comes between that and the model.
      seed: of the transforms.
      limits: of reading a file.
    """

    codec: Codec
    transforms: tuple[Any, ...] = ()
    seed: int = 0
    limits: Limits = LIMITS


@dataclasses.dataclass(eq=False)
class Predictor:
    """A model and all that comes before and after it: what reads inputs, the evaluation transforms, the answer.

    Attributes:
      task: the model and what it predicts.
      variables: its trained variables.
      dataset_info: what it knows of its data.
      spec: shapes and dtypes of ``Task.inputs``, without axis B.
      read: gives ``reading``, at its first use; raises UserError where the model answers no inputs.
      step: the checkpoint; 0 of a folder that has none.
      run: the run that it is of; None: it is of a published folder.
      config: the run's.
      mesh: what the variables are spread over.
      rows: inputs that are answered at once, and examples of a batch; where they are fewer, a power of two is enough.
      compute: what computes ``Task.predict`` in another engine; None: JAX does.
    """

    task: Task
    variables: Variables
    dataset_info: Mapping[str, Any]
    spec: Mapping[str, jax.ShapeDtypeStruct]
    read: Callable[[], Reading]
    step: int = 0
    run: RunDir | None = None
    config: ConfigDict | None = None
    mesh: Any = None
    rows: int = ROWS
    compute: Compute | None = None

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        step: int | None = None,
        adapter: str | None = None,
        spread: bool = False,
        engine: str = "jax",
        answers_of: Sequence[str] = (),
        top: int | None = None,
        threads: int = 0,
    ) -> Predictor:
        """Opens a run, ``step`` as in ``restored.restore``, or a published folder.

        Args:
          adapter: the folder of an adapter of this model (``wrappers.adapter``), which is then around it.
          spread: over the run's own mesh, where it fits the devices here, or else over all of them; not on one alone.
          engine: "jax", or "onnxruntime" for what the run's folder has in ``export/onnx``.
          answers_of: evaluators of the run that have a say in its answers; see ``core.Evaluator``.
          top: how many of what a model ranks an answer holds; None: as its config says.
          threads: that share a batch, of an engine other than JAX; 0: as many as there are cores.

        Raises:
          UserError: there is neither, no such checkpoint, the adapter is another model's, or there is no such engine
            or nothing exported for it.
        """
        from bigbase_jax.inference import (
            engines,
            published,
            recogniser,
            retrieval,
            windowed,
            zero_shot,
        )  # which give what is defined here

        run = RunDir(folder)
        if "task" in run.config_json():
            config = run.config()
            mesh = _mesh_of(config) if spread and engine == "jax" else parallel.make_mesh(1)
            known, spec = dataset_info(run), batch_spec(run)
            compute: Compute | None = None
            if engine == "jax":
                task, variables, step = restore(run, config, mesh, step)
            else:
                task, variables, compute, step = engines.restored(engine, run, config, step, threads)
            task = task if top is None else _with_top(task, top)
            for name in answers_of:
                task = answering(run, name, task)
            inputs = {key: jax.ShapeDtypeStruct(spec[key].shape[1:], spec[key].dtype) for key in task.inputs}
            kind = retrieval.Retriever if getattr(task, "indexed", False) else cls
            kind = zero_shot.Matcher if getattr(task, "zero_shot", False) else kind
            kind = windowed.Windowed if getattr(task, "overlaps", False) else kind
            kind = recogniser.Recogniser if getattr(task, "windowed", False) else kind
            found = kind(task, variables, known, inputs, lambda: _reading(config, known), step, run, config, mesh)
            found.compute = compute
        elif top is not None:
            raise UserError(f"--top is for runs of ours that rank, and {folder} is none; leave it out.")
        elif answers_of:
            raise UserError(f"--answers names evaluators of runs of ours, and {folder} is none; leave it out.")
        elif engine != "jax":
            raise UserError(f"--engine={engine} computes runs of ours, and {folder} is none; leave it out.")
        else:
            found = published.opened(str(folder))
        return found if adapter is None else found.with_adapter(adapter)

    def with_adapter(self, folder: str) -> Predictor:
        """The same with an adapter of this model around it, whose arrays it shares.

        Raises:
          UserError: there is no adapter in the folder, it is another model's, or another engine computes.
        """
        if self.compute is not None:
            raise UserError("--engine computes what was exported, and no --adapter on it; export a run that has it.")
        batch = {key: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for key, x in self.spec.items()}
        inner: Any = next(task for task in chain(self.task) if not isinstance(task, Wrapper))
        wrapper: Any
        wrapper, variables = adapters.wrapped(folder, inner, merged(self.task, self.variables), batch)
        return dataclasses.replace(self, task=wrapper, variables=variables)

    @functools.cached_property
    def reading(self) -> Reading:
        """How inputs are read."""
        return self.read()

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """The places that the padded entries of a batch may be cut to, up to all; empty: nothing is padded."""
        padded = getattr(self.reading.codec, "padded", ())
        most = max((self.spec[name].shape[0] for name in padded if name in self.spec), default=0)
        return sizes(min(getattr(self.reading.codec, "least", LEAST), most), most) if most else ()

    def cut(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Examples without most of the padding that all of them have: to the first of ``lengths`` that is enough."""
        if not self.lengths or not examples:
            return examples
        codec: Any = self.reading.codec
        if said := getattr(codec, "length", None):
            needed = [int(example[said]) for example in examples]
        else:
            needed = [int(np.count_nonzero(example[codec.padded[0]] > 0)) for example in examples]
        size = fitting(self.lengths, max(needed))
        return [self._cut(example, size) for example in examples]

    def _cut(self, example: Example, size: int) -> Example:
        padded = self.reading.codec.padded  # type: ignore[attr-defined]
        return {name: x[:size] if name in padded else x for name, x in example.items()}

    def blanks(self) -> list[Example]:
        """An example of zeros in each of the shapes that those which are ``cut`` have."""
        whole = {name: np.zeros(x.shape, x.dtype) for name, x in self.spec.items()}
        return [self._cut(whole, size) for size in self.lengths] or [whole]

    @functools.cached_property
    def program(self) -> Compute:
        """What computes ``Task.predict``."""
        return self.compute or jax.jit(self.task.predict)

    def examples(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """What the model reads of a file, its bytes or a row by entry: one example or several, in order. They have what
        the transforms leave, and ``Task.inputs`` among it as the model takes them.

        Raises:
          UserError: it cannot be read.
        """
        return self._fitted_all(self._decoded(given))

    def _decoded(self, given: bytes | str | Mapping[str, Any]) -> Sequence[Example]:
        examples = self.reading.codec.decode(given)
        if not len(examples):
            raise UserError("there is nothing in it that the model could read.")
        return examples

    def _fitted_all(self, examples: Sequence[Example]) -> list[Example]:
        reading = self.reading
        return [self._fitted(apply_eval(reading.transforms, example, reading.seed)) for example in examples]

    def _streamed(self, examples: Sequence[Example], compiled: Compute) -> list[tuple[Example, Output]]:
        """The first of many examples that are read as they are asked for, and what ``Task.merge`` makes of the outputs
        of all."""
        outputs: list[Output] = []
        for start in range(0, len(examples), self.rows):
            some = self._fitted_all(examples[start : start + self.rows])
            outputs += self.computed(self.cut(some), self.rows, compiled)
        return [(self._fitted_all(examples[:1])[0], self.task.merge(outputs))]  # type: ignore[attr-defined]

    def _fitted(self, example: Example) -> Example:
        shapes = {key: x.shape for key, x in self.spec.items()}
        fitted = self.reading.codec.fit(example, shapes)
        ready = {key: np.asarray(fitted[key]) for key in self.task.inputs}
        for key, x in ready.items():
            if x.shape != shapes[key]:
                raise UserError(f"its {key} has the shape {x.shape}, and the model was trained on {shapes[key]}.")
        return {**fitted, **ready}

    def outputs(
        self, inputs: Iterable[Input], compute: Compute | None = None
    ) -> Iterator[tuple[Input, list[tuple[Example, Output]] | UserError]]:
        """Each input, lazily and in order, with its examples and the outputs of each, or why there are none.

        Args:
          compute: what to compute of the examples; None: ``Task.predict``.
        """
        compiled = self.program if compute is None else jax.jit(compute)
        waiting, rows = iter(inputs), 0
        while some := list(itertools.islice(waiting, self.rows)):
            read: list[Sequence[Example] | UserError] = []
            for item in some:
                try:
                    decoded = UserError(item.error) if item.error else self._decoded(item.given)
                    read.append(self._fitted_all(decoded) if isinstance(decoded, list) else decoded)
                except UserError as error:
                    read.append(error)
            examples = [example for found in read if isinstance(found, list) for example in found]
            if not rows:
                rows = self.rows if len(some) == self.rows else self._rows(len(examples))
            computed = self.computed(self.cut(examples), rows, compiled)
            for item, found in zip(some, read, strict=True):
                if isinstance(found, UserError):
                    yield item, found
                elif not isinstance(found, list):
                    try:
                        yield item, self._streamed(found, compiled)
                    except UserError as error:
                        yield item, error
                else:
                    yield item, list(zip(found, itertools.islice(computed, len(found)), strict=True))

    def answers(self, inputs: Iterable[Input]) -> Iterator[tuple[Input, dict[str, Any]]]:
        """Each input, lazily and in order, with each ``answer`` of it, or ``{"error": why there is none}``."""
        for item, found in self.outputs(inputs):
            if isinstance(found, UserError):
                yield item, {"error": str(found)}
            else:
                for said in self.said(found):
                    yield item, said

    def files(self, inputs: Iterable[Input]) -> Iterator[tuple[Input, dict[str, Any], Rendered | None]]:
        """``answers``, each with the file that ``Task.rendered`` makes of it; None: there is an error instead.

        Raises:
          UserError: the model makes none.
        """
        if not self.renders:
            raise UserError(
                f"--output is a folder, and {type(self.task).__name__} makes no files; name a table to write."
            )
        for item, found in self.outputs(inputs):
            if isinstance(found, UserError):
                yield item, {"error": str(found)}, None
            else:
                for said, made in self.rendered(found):
                    yield item, said, made

    @property
    def renders(self) -> bool:
        """Whether the model makes a file of an input."""
        return hasattr(self.task, "rendered")

    def answer(self, given: bytes | str | Mapping[str, Any]) -> list[dict[str, Any]]:
        """``Task.postprocess`` of a file, its bytes or a row by entry.

        Where that was read as several examples, there is one answer, of what ``Task.merge`` makes of theirs; or,
        where the task has no such rule, one for each of them, with its number as ``part``.

        Raises:
          UserError: it cannot be read.
        """
        decoded = self._decoded(given)
        if not isinstance(decoded, list):
            return self.said(self._streamed(decoded, self.program))
        examples = self._fitted_all(decoded)
        computed = self.computed(self.cut(examples), self._rows(len(examples)))
        return self.said(list(zip(examples, computed, strict=True)))

    def said(self, found: Sequence[tuple[Example, Output]]) -> list[dict[str, Any]]:
        """``answer`` of an input, from its examples and the outputs of each."""
        return [{**part, **self.task.postprocess(output, example)} for part, example, output in self._merged(found)]

    def rendered(self, found: Sequence[tuple[Example, Output]]) -> list[tuple[dict[str, Any], Rendered]]:
        """What ``said`` gives, and the file that ``Task.rendered`` makes beside each."""
        task: Any = self.task
        return [
            ({**part, **task.postprocess(output, example)}, task.rendered(output, example))
            for part, example, output in self._merged(found)
        ]

    def _merged(self, found: Sequence[tuple[Example, Output]]) -> Iterator[tuple[dict[str, int], Example, Output]]:
        """What there is to answer, and which ``part`` of the input that is."""
        merge = getattr(self.task, "merge", None)
        if merge is not None and len(found) > 1:
            found = [(found[0][0], merge([output for _, output in found]))]
        for number, (example, output) in enumerate(found):
            yield {"part": number} if len(found) > 1 else {}, example, output

    def _rows(self, count: int) -> int:
        """Rows of a batch for so few examples."""
        return self.rows if count > self.rows else fitting(sizes(1, self.rows), count)

    def computed(self, examples: Sequence[Example], rows: int, compiled: Compute | None = None) -> Iterator[Output]:
        """The outputs of examples of one shape, in order, by batches of so many rows: by one compiled program.

        Args:
          compiled: what computes; None: ``program``.
        """
        compiled = compiled or self.program
        for start in range(0, len(examples), rows):
            some = examples[start : start + rows]
            padded = [*some, *[some[-1]] * (rows - len(some))]
            batch = {key: np.stack([example[key] for example in padded]) for key in self.task.inputs}
            computed = jax.device_get(compiled(self.variables, batch))
            for i in range(len(some)):
                yield {key: x[i] for key, x in computed.items()}


def _with_top(task: Any, top: int) -> Any:
    """The task with so many answers to a question, where it ranks them."""
    if isinstance(task, Around):
        return dataclasses.replace(task, task=_with_top(task.task, top))
    if not hasattr(task, "top"):
        raise UserError(f"--top={top}: {type(task).__name__} ranks nothing; leave it out.")
    return dataclasses.replace(task, top=top)


def sizes(least: int, most: int, factor: int = 2) -> tuple[int, ...]:
    """From ``least`` on by ``factor``, up to ``most``: few, so that few programs are compiled."""
    found = []
    while least < most:
        found.append(least)
        least *= factor
    return (*found, most)


def fitting(sizes: Sequence[int], n: int) -> int:
    """The first of growing sizes that is not below n."""
    return next(size for size in sizes if size >= n)


def _mesh_of(config: ConfigDict) -> Any:
    """The run's own mesh where it fits the devices here, else all of them along ``data``: a run opens anywhere."""
    shape = build(config.train.mesh, _path="config.train.mesh")
    try:
        return parallel.make_mesh(config.train.devices, shape)
    except UserError:
        return parallel.make_mesh()


def _reading(config: ConfigDict, known: Mapping[str, Any]) -> Reading:
    """What the config of a run says of reading, ``known`` being its ``dataset_info``."""
    transforms = build(config.data.eval_transforms, _path="config.data.eval_transforms")
    node, where = config.data.dataset, "config.data.dataset"
    dataset: Any = locate(node.target, f"{where}.target")
    if not isinstance(inspect.getattr_static(dataset, "codec"), staticmethod):
        dataset = build(node, _path=where)  # its codec takes a look at the data
    return Reading(dataset.codec(node, known), transforms, config.data.seed, limits_of(node))
