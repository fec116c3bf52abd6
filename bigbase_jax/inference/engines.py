"""Another engine: a run's exported graphs, computed by onnxruntime in the place of the model.

``opened`` gives a task that is the run's own, with its evaluation and answers, whose ``predict`` is the graph's, and
whose model, where it writes, reads tokens into its cache by a graph too; what chooses tokens stays JAX's.

Axes: B examples, T tokens of a step, V entries of the vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bigbase_jax.build import build, suggest
from bigbase_jax.core import Array, Batch, PyTree, Task, UserError, Variables, flatten
from bigbase_jax.inference.predictor import Compute
from bigbase_jax.pretrained.start import chain
from bigbase_jax.runtime.restored import batch_spec, dataset_info
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.runtime.untrusted import open_regular

ENGINES = ("jax", "onnxruntime")
FILE, STEP, SOURCE = "model.onnx", "step.onnx", "source.onnx"
OUT = "out."
"""Before an output's name that is an input's too."""
CACHE = "cache."
IN_PLACE = "in place"
"""What ``cache`` of a graph's metadata is where an array of the cache may be read from and written to one place."""
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Whose operations onnxruntime has by itself."""
VARIABLES: Variables = {"params": {}}
"""Of a model that graphs compute: theirs are in the files."""
_MOST_GRAPH = 1 << 31  # bytes, protobuf's own limit


class Session:
    """A graph that onnxruntime computes: arrays by name -> arrays by name.

    The file is looked at first: a graph whose weights lie outside of its folder, or whose operations onnxruntime does
    not have by itself, is refused. No library is loaded, and weights beside it are mapped into memory.

    Args:
      threads: that share a call; 0: as many as there are cores.

    Raises:
      UserError: it cannot be read.
    """

    def __init__(self, path: pathlib.Path, threads: int = 0):
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise UserError(f"--engine=onnxruntime needs the extra: pip install -e '.[export]' ({error}).") from error
        from google.protobuf.message import DecodeError

        try:
            with open_regular(path, path.parent) as file:
                if os.fstat(file.fileno()).st_size >= _MOST_GRAPH:
                    raise UserError(f"{path} is larger than a graph can be; large weights are beside it.")
                data = file.read()
            model = onnx.load_model_from_string(data)
        except (OSError, DecodeError) as error:
            raise UserError(f"{path} is damaged or was not copied whole; export the model again ({error}).") from error
        _check(model, path)
        del model
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls, when JAX computes
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        slow = ["SkipLayerNormFusion"]  # which takes six times as long as the two operations that it fuses
        try:
            self._session = onnxruntime.InferenceSession(
                data, options, providers=["CPUExecutionProvider"], disabled_optimizers=slow
            )
        except Exception as error:  # of classes of its own
            said = str(error).partition("\n")[0]
            raise UserError(f"onnxruntime does not take {path}: {said}.") from error
        about = self._session.get_modelmeta().custom_metadata_map
        self.step = int(step) if (step := about.get("step", "")).isdecimal() else 0
        self.in_place = about.get("cache") == IN_PLACE
        self.shapes = {x.name: x.shape for x in self._session.get_inputs()}
        self.inputs = [*self.shapes]
        self.outputs = [x.name for x in self._session.get_outputs()]

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
        """What the graph gives of these; those that it does not read are left out."""
        given = {name: np.ascontiguousarray(arrays[name]) for name in self.inputs}
        found = self._session.run(self.outputs, given)
        return {name.removeprefix(OUT): x for name, x in zip(self.outputs, found, strict=True)}

    def update(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same, where the graph writes the new entries of a cache into the arrays that are given."""
        binding, given = self._session.io_binding(), {name: np.ascontiguousarray(arrays[name]) for name in self.inputs}
        kept = {f"{OUT}{name}": x for name, x in given.items() if self.in_place and name.startswith(CACHE)}

        def place(x: np.ndarray) -> tuple[Any, ...]:
            return "cpu", 0, x.dtype.type, x.shape, x.ctypes.data

        for name, x in given.items():
            binding.bind_input(name, *place(x))
        for name in self.outputs:
            binding.bind_output(name, *(place(kept[name]) if name in kept else ()))
        self._session.run_with_iobinding(binding)
        found = zip(self.outputs, binding.get_outputs(), strict=True)
        return {name.removeprefix(OUT): kept[name] if name in kept else x.numpy() for name, x in found}


def _check(model: Any, path: pathlib.Path) -> None:
    """Raises UserError where a graph has weights elsewhere, or fewer than it says, or foreign operations."""
    graphs = [*_graphs(model.graph)]
    for node in (node for part in (*graphs, *model.functions) for node in part.node):
        if node.domain not in _DOMAINS:
            raise UserError(f"{path} uses operations of {node.domain!r}, which only its maker's library has.")
    if not model.graph.output:
        raise UserError(f"{path} holds no graph; export the model again.")
    for tensor in (tensor for graph in graphs for tensor in _tensors(graph)):
        place = {entry.key: entry.value for entry in tensor.external_data}
        bits = math.prod(tensor.dims) * _WIDTHS.get(tensor.data_type, 8)
        if not place and tensor.data_location != 1:
            if bits // 8 > tensor.ByteSize() * 8 or min(tensor.dims, default=0) < 0:  # small numbers may be packed
                raise UserError(f"{path}: {tensor.name} holds fewer numbers than it says; export the model again.")
            continue
        name = place.get("location", "")
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise UserError(f"{path} has weights in {name!r}, which is outside of its folder.")
        try:
            with open_regular(path.parent / name, path.parent) as file:
                there = os.fstat(file.fileno()).st_size
            needs = int(place.get("offset", 0)) + max(bits // 8, int(place.get("length", 0)))
        except OSError as error:
            raise UserError(f"{path} has weights in {name}, which is not there ({error.strerror}).") from error
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); export the model again.") from error
        if min(tensor.dims, default=0) < 0 or needs > there:
            raise UserError(f"{name} holds {there:,} bytes, and {path.name} asks for {needs:,}; copy it whole.")


_WIDTHS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 16: 16, 21: 4, 22: 4}
"""Bits of a number, by ``TensorProto.DataType``."""


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph, and the graphs inside."""
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            yield from _graphs(inner)


def _tensors(graph: Any) -> Iterator[Any]:
    """The constants of a graph."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from ([attribute.t] if attribute.HasField("t") else [])
        yield from attribute.tensors


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """A model that writes, as ``decoding`` sees it: its cache and logits are a graph's.

    Attributes:
      module: the model itself, for its sizes.
      step: reads tokens into the cache, and gives the logits after them.
      source: gives the part of the cache that a source is read into.
    """

    module: Any
    step: Session
    source: Session | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "module":
            raise AttributeError(name)
        return getattr(self.module, name)

    def cache(self, *sizes: int) -> PyTree:
        """See ``decoding.sampling``."""
        return self.module.cache(*sizes)

    def prefill(
        self, cache: PyTree, tokens_BT: Array, position_B: Array, last_B: Array, *source: Array
    ) -> tuple[Array, PyTree]:
        """See ``decoding.sampling.prefill``. Outside of programs the cache is numpy's, and written in place."""
        if not source and not any(isinstance(x, jax.core.Tracer) for x in (tokens_BT, position_B, last_B)):
            return self._updated(cache, tokens_BT, position_B, last_B)
        shapes = jax.eval_shape(lambda x: x, cache)
        if source and self.source is not None:
            words = dict(zip(("source", "source_segments"), source, strict=False))
            words.setdefault("source_segments", jnp.asarray(source[0]) != self.module.pad_id)
            words = {name: jnp.asarray(x, jnp.int32) for name, x in words.items()}
            cache = self._read(self.source, words, cache, shapes)
        words = {"tokens": tokens_BT, "position": position_B, "last": last_B}
        flat = {f"{CACHE}{name}": x for name, x in flatten(cache).items()}
        words = {**{name: jnp.asarray(x, jnp.int32) for name, x in words.items()}, **flat}
        logits = jax.ShapeDtypeStruct((tokens_BT.shape[0], self.module.vocab_size), jnp.float32)
        found = _called(self.step, words, {"logits": logits, **self._written(self.step, shapes)})
        return found.pop("logits"), self._with(cache, found)

    def _updated(self, cache: PyTree, *words: Array) -> tuple[Array, PyTree]:
        flat = {f"{CACHE}{name}": np.require(x, requirements=("C", "W")) for name, x in flatten(cache).items()}
        named = zip(("tokens", "position", "last"), words, strict=True)
        found = self.step.update({**{name: np.asarray(x, np.int32) for name, x in named}, **flat})
        return found.pop("logits"), self._with(cache, {**flat, **found})

    def apply(self, variables: Any, *args: Array, method: str, mutable: Sequence[str] = ()) -> Any:
        """``decode`` of one token, and ``logits`` of what that gave."""
        if method == "logits":
            return args[0]
        cache = variables["cache"]
        tokens_B1, position_B, *source = args
        logits_BV, cache = self.prefill(cache, tokens_B1, position_B, jnp.zeros_like(position_B), *source)
        return logits_BV[:, None], {"cache": cache}

    def _read(self, session: Session, words: Any, cache: PyTree, shapes: PyTree) -> PyTree:
        return self._with(cache, _called(session, words, self._written(session, shapes)))

    def _written(self, session: Session, shapes: PyTree) -> dict[str, Any]:
        named = {f"{CACHE}{name}": x for name, x in flatten(shapes).items()}
        return {name: x for name, x in named.items() if name in session.outputs or f"{OUT}{name}" in session.outputs}

    def _with(self, cache: PyTree, new: Mapping[str, Array]) -> PyTree:
        leaves = [new.get(f"{CACHE}{name}", x) for name, x in flatten(cache).items()]
        return jax.tree.unflatten(jax.tree.structure(cache), leaves)


def _filled(x: Array, shape: Sequence[Any]) -> np.ndarray:
    """An array with zeros, which are padding, up to the sizes that a graph has not left free."""
    more = [(0, m - n if isinstance(m, int) else 0) for n, m in zip(x.shape, shape, strict=False)]
    return np.pad(np.asarray(x), more) if any(after > 0 for _, after in more) else np.asarray(x)


def _called(session: Session, arrays: Mapping[str, Any], shapes: dict[str, Any]) -> dict[str, Any]:
    """What a graph gives, inside a compiled program."""

    def call(given: Any) -> dict[str, np.ndarray]:
        found = session({name: np.asarray(x) for name, x in given.items()})
        return {name: found[name] for name in shapes}

    found: dict[str, Any] = jax.pure_callback(call, shapes, dict(arrays))
    return found


def restored(
    engine: str, run: RunDir, config: ConfigDict, step: int | None, threads: int = 0
) -> tuple[Task, Variables, Compute, int]:
    """What ``runtime.restored.restore`` gives, of what was exported to ``export/onnx`` in the run's folder; and what
    computes it, a batch with so many ``threads``.

    Raises:
      UserError: there is no such engine, nothing exported, or what was exported is of another step.
    """
    if engine not in ENGINES:
        raise UserError(f"there is no --engine={engine}.{suggest(engine, ENGINES, 'engine')}")
    native: Any = build(config.task, dataset_info(run), _path="config.task")
    spec = batch_spec(run)
    inputs = {name: jax.ShapeDtypeStruct(spec[name].shape[1:], spec[name].dtype) for name in native.inputs}
    folder = run.path / "export" / "onnx"
    task, compute, session = opened(folder, native, inputs, threads)
    has = session.step
    if step not in (None, has):
        raise UserError(f"{folder} holds step {has}, and --step is {step}; export that one, or leave --step out.")
    return task, VARIABLES, compute, has


def opened(
    folder: pathlib.Path, task: Task, spec: Mapping[str, jax.ShapeDtypeStruct], threads: int = 0
) -> tuple[Any, Compute, Session]:
    """The task whose model the graphs of a folder compute, its variables being ``VARIABLES``; what computes its
    ``predict`` outside of compiled programs; and the graph of it.

    Args:
      task: the run's.
      spec: of its inputs, without axis B.
      threads: that share a batch; a step of what writes has as many as there are cores.

    Raises:
      UserError: the folder has no graphs, or they cannot be read.
    """
    if not (folder / FILE).is_file():
        raise UserError(f"there is no {folder / FILE}; --mode=export --to=onnx makes it.")
    native: Any = [*chain(task)][-1]
    inner, session = copy.copy(native), Session(folder / FILE, threads)
    if lost := sorted(set(session.inputs) - set(spec)):
        raise UserError(f"{folder / FILE} reads {', '.join(lost)}, which is none of this run's; export it again.")
    if (folder / STEP).exists():
        source = Session(folder / SOURCE) if (folder / SOURCE).exists() else None
        model = Written(native.model.clone(dtype="float32", scan=False), Session(folder / STEP), source)
        object.__setattr__(inner, "model", model)
    writes = getattr(native, "generate", False)
    plain: Any = dataclasses.replace(native, generate=False) if writes else native
    one = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in spec.items()}
    variables = jax.eval_shape(native.init, jax.random.key(0), one)
    translate = jax.jit(lambda inputs: inner.translate(VARIABLES, inputs)[:, None])

    def predict(_: Any, batch: Batch) -> dict[str, Any]:
        given = {name: jnp.asarray(batch[name]) for name in native.inputs}
        found = _called(session, given, dict(jax.eval_shape(plain.predict, variables, given)))
        return {**found, "tokens": translate(given)} if writes else found

    def compute(_: Any, batch: Batch) -> dict[str, Any]:
        found = session({name: _filled(x, session.shapes.get(name, ())) for name, x in batch.items()})
        return {**found, "tokens": translate({name: batch[name] for name in native.inputs})} if writes else found

    object.__setattr__(inner, "predict", predict)
    return inner, compute, session
