"""ONNX: a model as graphs that onnxruntime computes on any machine, without JAX.

``model.onnx`` is ``Task.predict``: uint8 pictures or tokens in, with a free batch axis, and a free length where the
model allows it. A model that writes has ``step.onnx`` too, which reads tokens into its cache and gives the logits after
them (prefill and decode are one graph), and one that reads a source has ``source.onnx``, which gives that part of the
cache that is the source's.

jax2onnx writes the graphs. What it is given is the plain program of the model: nested functions are spelled out, what
depends on weights alone is computed, and primitives that it does not know, or gets wrong where a size is free, are
written with others. Norms, GELU and attention are one operation of onnxruntime each (``_Fused``).

Axes: B examples, L length, T tokens that a step reads, S places of the cache, M length of a source, V vocabulary.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
import pathlib
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import export as shapes
from jax.extend.core import ClosedJaxpr, Literal, Primitive, jaxpr_as_fun
from jax.sharding import AbstractDevice, AbstractMesh

from bigbase_jax.core import Task, UserError, Variables, flatten
from bigbase_jax.decoding import sampling
from bigbase_jax.inference import engines
from bigbase_jax.inference.engines import CACHE, FILE, OUT, SOURCE, STEP
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.models import bc_resnet, cnn, resnet
from bigbase_jax.models.attention import UNSEEN
from bigbase_jax.models.layers import ACTIVATIONS
from bigbase_jax.models.transformer import unstack_blocks
from bigbase_jax.pretrained.start import chain, merged

_ORT = "com.microsoft"
"""The domain of what onnxruntime has beside ONNX."""
OPSET = 21
"""Of 2024: onnxruntime has it since 1.20."""
MOST_INSIDE = 1 << 30
"""Bytes of weights in the file of a graph; more are beside it, as protobuf ends at 2 GB."""
Graph = tuple[Callable[[dict[str, Any]], Mapping[str, Any]], dict[str, jax.ShapeDtypeStruct]]
"""A function of arrays by name, and their shapes and dtypes; free axes have names."""


def write(
    predictor: Predictor,
    folder: pathlib.Path,
    quantize: str | None = None,
    batches: Sequence[Mapping[str, np.ndarray]] = (),
) -> dict[str, Any]:
    """Writes the graphs of a model into a folder that is there; returns what the manifest says of them.

    Args:
      quantize: "int8": weights and products in eight bits; None: float32.
      batches: of ``Task.inputs``, for the ranges of activations; see ``_quantised``.

    Raises:
      UserError: the extra is missing, the model cannot be written so, or there is nothing to calibrate with.
    """
    try:
        import jax2onnx  # noqa: F401
        import onnx
    except ImportError as error:
        raise UserError(f"--to=onnx needs the extra: pip install -e '.[export]' ({error}).") from error
    if quantize not in (None, "int8"):
        raise UserError(f"--to=onnx takes --quantize=int8, not {quantize!r}.")
    about = {"task": type([*chain(predictor.task)][-1]).__name__, "step": str(predictor.step)}
    if names := predictor.dataset_info.get("class_names"):
        about["class_names"] = json.dumps(names, ensure_ascii=False)
    found: dict[str, Any] = {}
    for name, (function, inputs) in graphs(predictor.task, predictor.variables, predictor.spec).items():
        model = converted(function, inputs)
        _tie(model.graph)
        model.graph.name, model.producer_name = name.partition(".")[0], "bigbase_jax"
        path = folder / name
        with _quiet():
            props = {**about, **({"cache": engines.IN_PLACE} if name == STEP else {})}
            onnx.helper.set_model_props(model, props)
            large = model.ByteSize() > MOST_INSIDE
            onnx.save(model, path, save_as_external_data=large, location=f"{name}.data")
            onnx.checker.check_model(path, full_check=True)
        if quantize is not None:
            _quantised(path, props, any(node.op_type == "Conv" for node in model.graph.node), batches)
        shapes = {
            key: [str(dim).partition("<=")[0] if isinstance(dim, str) else dim for dim in x.shape]
            for key, x in inputs.items()
        }
        found[name] = {key: {"shape": shape, "dtype": str(inputs[key].dtype)} for key, shape in shapes.items()}
    return {"inputs": found[FILE], "graphs": found, "opset": OPSET, "quantize": quantize}


def opened(folder: pathlib.Path, predictor: Predictor) -> Predictor:
    """The predictor whose model the graphs of a folder compute.

    Raises:
      UserError: they cannot be read.
    """
    task, compute, _ = engines.opened(folder, predictor.task, predictor.spec)
    return dataclasses.replace(predictor, task=task, variables=engines.VARIABLES, compute=compute)


def graphs(task: Task, variables: Variables, spec: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Graph]:
    """The graphs of a task by file; ``spec`` is of its inputs, without axis B."""
    task, variables = _float32(task, variables)
    for name, value in (("logit_chunks", 1), ("generate", False)):  # one part; and what is written, step by step
        if name in vars(task):
            task = dataclasses.replace(task, **{name: value})  # type: ignore[type-var]

    def predict(inputs: dict[str, Any]) -> Mapping[str, Any]:
        return task.predict(variables, inputs)

    rows = {name: jax.ShapeDtypeStruct(("B", *x.shape), x.dtype) for name, x in spec.items()}
    found: dict[str, Graph] = {FILE: (predict, _free_length(predict, rows))}
    model: Any = vars(task).get("model")
    if not hasattr(model, "decode") or not (hasattr(task, "translate") or "targets" in task.inputs):
        return found
    reads = hasattr(task, "translate")
    i32 = np.dtype(np.int32)
    sizes = ("B", "S", "M") if reads else ("B", "S")

    like = jax.eval_shape(lambda: model.cache(*([1] * len(sizes))))
    marked = jax.eval_shape(lambda: model.cache(*[2, 3, 5][: len(sizes)]))
    letters = {2: "B", 3: "S", 5: "M"}
    flat = {
        f"{CACHE}{name}": jax.ShapeDtypeStruct(
            tuple(letters[b] if a != b else a for a, b in zip(one.shape, more.shape, strict=True)), one.dtype
        )
        for (name, one), more in zip(flatten(like).items(), jax.tree.leaves(marked), strict=True)
    }

    def step(inputs: dict[str, Any]) -> Mapping[str, Any]:
        cache = jax.tree.unflatten(jax.tree.structure(like), [inputs[name] for name in flat])
        words = inputs["tokens"], inputs["position"], inputs["last"]
        logits_BV, kept = sampling.prefill(model, variables, cache, *words)
        new = {f"{CACHE}{name}": x for name, x in flatten(kept).items()}
        return {"logits": logits_BV, **{name: x for name, x in new.items() if not _of_source(name)}}

    def source(inputs: dict[str, Any]) -> Mapping[str, Any]:
        B, M = inputs["source"].shape
        first_B1, zero_B = jnp.zeros((B, 1), i32), jnp.zeros(B, i32)
        size = {"B": B, "S": 1, "M": M}
        zeros = [jnp.zeros([size.get(dim, dim) for dim in x.shape], x.dtype) for x in flat.values()]
        state = {**variables, "cache": jax.tree.unflatten(jax.tree.structure(like), zeros)}
        words = first_B1, zero_B, inputs["source"], inputs["source_segments"]
        _, kept = model.apply(state, *words, method="decode", mutable=["cache"])
        new = {f"{CACHE}{name}": x for name, x in flatten(kept["cache"]).items()}
        return {name: x for name, x in new.items() if _of_source(name)}

    one = jax.ShapeDtypeStruct(("B",), i32)
    found[STEP] = step, {"tokens": jax.ShapeDtypeStruct(("B", "T<=S"), i32), "position": one, "last": one, **flat}
    if reads:
        words = {name: jax.ShapeDtypeStruct(("B", "M"), i32) for name in ("source", "source_segments")}
        if not _traces(source, words):  # positions that are computed for a length that is known
            words = {name: jax.ShapeDtypeStruct(("B", *spec[name].shape), i32) for name in words}
        found[SOURCE] = source, words
    return found


def _of_source(name: str) -> bool:
    """Whether an array of the cache is the source's, which a step reads and does not write."""
    return ".cross_attention." in name or name == f"{CACHE}seen"


def _float32(task: Task, variables: Variables) -> tuple[Any, Variables]:
    """The task of the bare model where its wrappers can be undone, its blocks by themselves, computing in float32."""
    if all(hasattr(type(outer), "unwrap") for outer in [*chain(task)][:-1]):
        task, variables = [*chain(task)][-1], merged(task, variables)
        model: Any = vars(task).get("model")
        words: dict[str, Any] = {"dtype": "float32"} if hasattr(model, "dtype") else {}
        if getattr(model, "scan", False):
            words["scan"] = False
            variables = {**variables, "params": unstack_blocks(variables["params"])}
        if words:
            task = dataclasses.replace(task, model=model.clone(**words))  # type: ignore[type-var]
    return task, jax.tree.map(jnp.asarray, jax.device_get(variables))


def _free_length(function: Any, rows: dict[str, Any]) -> dict[str, Any]:
    """The inputs with a free second axis L where they all have that axis alike and the function can be traced so."""
    whole = [x for x in rows.values() if len(x.shape) >= 2 and np.issubdtype(x.dtype, np.integer)]
    lengths = {x.shape[1] for x in whole if x.dtype != np.uint8}
    if len(lengths) != 1 or len(whole) < len(rows):
        return rows
    (length,) = lengths
    free = {name: jax.ShapeDtypeStruct(("B", f"L<={length}", *x.shape[2:]), x.dtype) for name, x in rows.items()}
    return free if _traces(function, free) else rows


def _traces(function: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether a function takes the free axes of these inputs."""
    try:
        traced(function, inputs)
    except Exception:  # whatever a model does with a size that it takes for a number
        return False
    return True


# ----------------------------------------------------------------------------------------------------------- eight bits


def _quantised(
    path: pathlib.Path, about: Mapping[str, str], convolves: bool, batches: Sequence[Mapping[str, np.ndarray]]
) -> None:
    """The graph in the file, with weights of eight bits for each channel.

    Convolutions have activations of eight bits too, whose ranges are what calibration batches gave; the layers after
    them stay as they are. Products of matrices measure their own range, input by input: those of transformers have
    outliers that a fixed range would cut off. Weights have seven bits, which processors without VNNI add up without
    overflow.
    """
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes import common as passes
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if convolves and not batches:
        raise UserError("int8 for convolutions is calibrated, and there are no examples: the run's data is not there.")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> Any:
            return next(self.left, None)

    ready = path.with_suffix(".ready.onnx")
    words = {"per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8}
    large = path.with_suffix(".onnx.data").exists()
    with _quiet():
        quant_pre_process(
            path, ready, skip_symbolic_shape=True, save_as_external_data=large, all_tensors_to_one_file=True
        )
        path.with_suffix(".onnx.data").unlink(missing_ok=True)
        if convolves:
            kinds = {"op_types_to_quantize": ["Conv"], "activation_type": QuantType.QUInt8}
            quantize_static(ready, path, Reader(), **kinds, **words)
        else:
            kinds = {"op_types_to_quantize": ["MatMul", "Gemm", "Gather"], "use_external_data_format": large}
            quantize_dynamic(ready, path, **kinds, **words)
        # a layer that is called twice is quantised at each call
        quantised = ir.to_proto(passes.DeduplicateHashedInitializersPass()(ir.load(path)).model)
        del quantised.graph.value_info[:]  # shapes between operations, which whoever opens it infers
        onnx.helper.set_model_props(quantised, dict(about))
        path.write_bytes(quantised.SerializeToString())
    for left in path.parent.glob(f"{ready.name}*"):
        left.unlink()


def _tie(graph: Any) -> None:
    """Lets a table of tokens that is transposed for the logits stand once; onnxruntime transposes it when it opens the
    graph."""
    import onnx

    kept: dict[tuple[Any, ...], str] = {}
    for tensor in [x for x in graph.initializer if len(x.dims) == 2 and min(x.dims) > 1]:
        x = onnx.numpy_helper.to_array(tensor)
        first = kept.get((x.T.shape, x.dtype, hashlib.sha256(x.T.tobytes()).digest()))
        if first is None:
            kept[x.shape, x.dtype, hashlib.sha256(x.tobytes()).digest()] = tensor.name
            continue
        graph.node.insert(0, onnx.helper.make_node("Transpose", [first], [tensor.name], perm=[1, 0]))
        graph.initializer.remove(tensor)


# ---------------------------------------------------------------------------------------------------- the plain program


def converted(function: Callable[[dict[str, Any]], Mapping[str, Any]], inputs: Mapping[str, Any]) -> Any:
    """The ``onnx.ModelProto`` of a function of arrays by name. An output of an input's name has ``OUT`` before it.

    Raises:
      UserError: it cannot be written.
    """
    import jax2onnx
    from jax2onnx.plugins import plugin_system

    with _quiet():
        plugin_system.import_all_plugins()
    plugin_system.PLUGIN_REGISTRY[_node_p.name] = types.SimpleNamespace(lower=_lower)
    closed, specs, outputs = traced(function, inputs)
    try:
        with _quiet():
            return _unexpanded(
                jax2onnx.to_onnx(
                    jaxpr_as_fun(closed),
                    specs,
                    opset=OPSET,
                    input_names=list(inputs),
                    output_names=[f"{OUT}{name}" if name in inputs else name for name in outputs],
                )
            )
    except NotImplementedError as error:
        raise UserError(f"this model cannot be written as ONNX: {error}; --to=stablehlo takes every model.") from error


def traced(
    function: Callable[[dict[str, Any]], Mapping[str, Any]], inputs: Mapping[str, Any]
) -> tuple[ClosedJaxpr, list[Any], list[str]]:
    """The plain program of a function, the shapes of its inputs, and the names of its outputs."""
    limits = {dim for x in inputs.values() for dim in x.shape if isinstance(dim, str) and "<=" in dim}
    scope = shapes.SymbolicScope(sorted(dim.replace("<=", " <= ") for dim in limits))

    def axes(x: Any) -> Any:
        text = ",".join(str(dim).partition("<=")[0] for dim in x.shape)
        return jax.ShapeDtypeStruct(shapes.symbolic_shape(text, scope=scope) if x.shape else (), x.dtype)

    specs = [axes(x) for x in inputs.values()]
    outputs: list[str] = []

    def listed(*arrays: Any) -> list[Any]:
        found = function(dict(zip(inputs, arrays, strict=True)))
        outputs[:] = found
        return [jnp.array(x) if any(x is y for y in arrays) else x for x in map(found.get, outputs)]

    # Not a CPU's program, which has no library's convolutions and writes a cache row by row.
    device = AbstractDevice(device_kind="onnx", num_cores=1, platform="onnx")
    fused = _Fused()
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)),
        nn.intercept_methods(fused.module),
        mock.patch.object(jax.nn, "dot_product_attention", fused.attention),
        mock.patch.object(cnn, "max_pool_2x2", functools.partial(_max_pool, 2, 0)),
        mock.patch.object(bc_resnet, "convolved", _depthwise),
        mock.patch.object(resnet, "max_pool_3x3", functools.partial(_max_pool, 3, 1)),
        mock.patch.dict(ACTIVATIONS, {"gelu": _gelu("none"), "gelu_tanh": _gelu("tanh")}),
    ):
        closed = jax.make_jaxpr(listed)(*specs)
        for instead in (_INSTEAD, _AGAIN):
            computed = functools.partial(_computed, instead, closed.jaxpr, closed.consts)
            closed = jax.make_jaxpr(computed)(*specs)
    return closed, specs, outputs


def _computed(instead: Mapping[str, Callable[..., Any]], jaxpr: Any, consts: Sequence[Any], *arrays: Any) -> list[Any]:
    """A program computed anew: without nested functions, with others for some primitives, and what is known folded."""
    known: dict[Any, Any] = {}

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else known[var]

    known.update(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, arrays, strict=True))
    for equation in jaxpr.eqns:
        given, words, primitive = [read(var) for var in equation.invars], equation.params, equation.primitive
        inner = next((words[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in words), None)
        sized = all(isinstance(dim, int) for var in equation.outvars for dim in var.aval.shape)
        smaller = sum(var.aval.size for var in equation.outvars) <= sum(map(np.size, given)) if sized else False
        folds = smaller and not any(isinstance(x, jax.core.Tracer) for x in given)
        with jax.ensure_compile_time_eval() if folds else contextlib.nullcontext():
            if primitive.name in instead:
                found = instead[primitive.name](*given, **words)
            elif primitive.name in _NESTED:
                found = _computed(instead, getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), *given)
            else:
                found = primitive.bind(*given, **words)
        known.update(zip(equation.outvars, found if isinstance(found, (list, tuple)) else [found], strict=True))
    return [read(var) for var in jaxpr.outvars]


_NESTED = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
)


def _same(x: Any, **_: Any) -> Any:
    return x


def _sub(x: Any, y: Any) -> Any:
    """Of weights, the sum with the negative, which onnxruntime adds to a convolution's bias."""
    if isinstance(y, jax.core.Tracer) or not jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.sub_p.bind(x, y)
    return jax.lax.add_p.bind(x, -np.asarray(y))


def _pad(x: Any, value: Any, padding_config: Sequence[tuple[int, int, int]]) -> Any:
    """Concatenated borders: jax2onnx pads only where all sizes are known."""
    if any(inner for _, _, inner in padding_config):
        return jax.lax.pad_p.bind(x, value, padding_config=padding_config)
    for axis, (before, after, _) in enumerate(padding_config):
        x = jax.lax.slice_in_dim(x, max(-before, 0), x.shape[axis] - max(-after, 0), axis=axis)

        def border(width: int, axis: int = axis, x: Any = x) -> list[Any]:
            shape = (*x.shape[:axis], width, *x.shape[axis + 1 :])
            return [jnp.broadcast_to(value, shape)] if width > 0 else []

        parts = [*border(before), x, *border(after)]
        x = jax.lax.concatenate(parts, axis) if len(parts) > 1 else x
    return x


def _stack(*parts: Any, axis: int = 0, **_: Any) -> Any:
    return jax.lax.concatenate([jax.lax.expand_dims(x, [axis]) for x in parts], axis)


def _select(which: Any, *cases: Any) -> Any:
    """onnxruntime's Where takes no truth values."""
    if cases[0].dtype == bool and which.dtype == bool and len(cases) == 2:
        return (which & cases[1]) | (~which & cases[0])
    return jax.lax.select_n_p.bind(which, *cases)


def _dot(x: Any, y: Any, dimension_numbers: Any, **_: Any) -> Any:
    """Products of matrices, which become MatMul: its weights can be quantised, and onnxruntime has it by hand."""
    (sum_x, sum_y), (batch_x, batch_y) = dimension_numbers
    free_x = [axis for axis in range(x.ndim) if axis not in (*sum_x, *batch_x)]
    free_y = [axis for axis in range(y.ndim) if axis not in (*sum_y, *batch_y)]
    if len(sum_x) == 0:
        x, y = jnp.transpose(x, (*batch_x, *free_x)), jnp.transpose(y, (*batch_y, *free_y))
        ones_x = range(x.ndim, x.ndim + len(free_y))
        ones_y = range(len(batch_y), len(batch_y) + len(free_x))
        return jnp.expand_dims(x, tuple(ones_x)) * jnp.expand_dims(y, tuple(ones_y))
    with _folding(y):
        y = jnp.transpose(y, (*batch_y, *sum_y, *free_y))
        inner, outer = _size(y.shape[len(batch_y) : len(batch_y) + len(sum_y)]), y.shape[len(batch_y) + len(sum_y) :]
        y = y.reshape(*y.shape[: len(batch_y)], inner, _size(outer))
    x = jnp.transpose(x, (*batch_x, *free_x, *sum_x))
    batch, rows = x.shape[: len(batch_x)], x.shape[len(batch_x) : x.ndim - len(sum_x)]
    if len(sum_x) != 1 or (batch and len(rows) != 1):
        x = x.reshape(*batch, *([_size(rows)] if batch else rows), inner)
    (found,) = _node("MatMul", [x, y], jax.ShapeDtypeStruct((*x.shape[:-1], y.shape[-1]), x.dtype))
    return found.reshape(*batch, *rows, *outer)


def _size(sizes: Sequence[Any]) -> Any:
    product: Any = 1
    for size in sizes:
        product = product * size
    return product


def _folding(x: Any) -> Any:
    return contextlib.nullcontext() if isinstance(x, jax.core.Tracer) else jax.ensure_compile_time_eval()


def _gather(x: Any, at: Any, dimension_numbers: Any, slice_sizes: Any, **words: Any) -> Any:
    """JAX takes places that there are not (of padding) for the last one; onnxruntime would stop."""
    last = [x.shape[axis] - slice_sizes[axis] for axis in dimension_numbers.start_index_map]
    if all(isinstance(size, int) for size in last):
        at = jnp.minimum(jnp.maximum(at, 0), jnp.array(last, at.dtype))
    d, rest = dimension_numbers, x.shape[1:]
    rows = d.collapsed_slice_dims == d.start_index_map == (0,) and d.offset_dims == (
        *range(at.ndim - 1, at.ndim - 1 + len(rest)),
    )
    if rows and (*slice_sizes[1:],) == rest:  # of a table
        at = at.reshape(at.shape[:-1])
        return _node("Gather", [x, at], jax.ShapeDtypeStruct((*at.shape, *rest), x.dtype), axis=0)[0]
    words = {**words, "mode": jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS}
    return jax.lax.gather_p.bind(x, at, dimension_numbers=dimension_numbers, slice_sizes=slice_sizes, **words)


def _broadcast(x: Any, *sizes: Any, shape: Any, broadcast_dimensions: Any, **words: Any) -> Any:
    """New axes of size 1 first, which are often all that is needed."""
    new = [axis for axis in range(len(shape)) if axis not in broadcast_dimensions]
    if isinstance(x, jax.core.Tracer) and new and not all(isinstance(size, int) for size in shape):
        wide = [1] * len(shape)
        for axis, size in zip(broadcast_dimensions, x.shape, strict=True):
            wide[axis] = size
        (x,) = _node("Unsqueeze", [x, new], jax.ShapeDtypeStruct(wide, x.dtype))
        if x.shape == tuple(shape):
            return x
        broadcast_dimensions = tuple(range(len(shape)))
    return jax.lax.broadcast_in_dim_p.bind(x, *sizes, shape=shape, broadcast_dimensions=broadcast_dimensions, **words)


def _reshape(x: Any, new_sizes: Sequence[Any], dimensions: Any = None, sharding: Any = None) -> Any:
    """With a free size copied, or left to be found, where one can be; a graph would compute it from the input's."""
    if isinstance(x, jax.core.Tracer):
        dims = [
            size if isinstance(size, int) else 0 if axis < x.ndim and x.shape[axis] == size else -1
            for axis, size in enumerate(new_sizes)
        ]
        if not all(isinstance(size, int) for size in new_sizes) and dims.count(-1) <= 1 and 0 not in new_sizes:
            (found,) = _node("Reshape", [x, dims], jax.ShapeDtypeStruct(new_sizes, x.dtype))
            return found
    return jax.lax.reshape_p.bind(x, new_sizes=new_sizes, dimensions=dimensions, sharding=sharding)


_INSTEAD: Mapping[str, Callable[..., Any]] = {
    "reshard": _same,
    "sharding_constraint": _same,
    "stop_gradient": _same,
    "optimization_barrier": lambda *x, **_: list(x),
    "clamp": lambda low, x, high: jnp.minimum(jnp.maximum(x, low), high),
    "sub": _sub,
    "max": lambda x, y: _max(x, y),
    "pad": _pad,
    "stack": _stack,
    "select_n": _select,
    "dot_general": _dot,
    "gather": _gather,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
}


_AGAIN = {name: rule for name, rule in _INSTEAD.items() if name not in ("gather", "dot_general")}
"""For what these are made of, which has nested functions again."""


# --------------------------------------------------------------------------------------------------- fused operations

_node_p = Primitive("onnx_node")
_node_p.multiple_results = True
_node_p.def_abstract_eval(lambda *_, outputs, **__: [jax.core.ShapedArray(x.shape, x.dtype) for x in outputs])


def _node(op: str, inputs: Sequence[Any], *outputs: Any, domain: str = "", **attributes: Any) -> list[Any]:
    """An operation of onnxruntime by its name.

    Args:
      inputs: arrays, None for one that is left out, or a list of whole numbers for a constant i64[N].
      outputs: their shapes and dtypes.
    """
    like = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs)
    how = tuple(tuple(x) if isinstance(x, list) else x is not None for x in inputs)
    given = [x for x in inputs if x is not None and not isinstance(x, list)]
    return _node_p.bind(*given, op=op, domain=domain, how=how, outputs=like, attributes=tuple(attributes.items()))


def _lower(ctx: Any, equation: Any) -> None:
    """Writes what ``_node`` is."""
    import onnx_ir as ir

    words = equation.params
    given = iter([ctx.get_value_for_var(x, name_hint=ctx.fresh_name("x")) for x in equation.invars])
    outputs = [ctx.get_value_for_var(x, name_hint=ctx.fresh_name("y")) for x in equation.outvars]
    inputs = [
        ctx.builder.const_i64(ctx.fresh_name("sizes"), x) if isinstance(x, tuple) else next(given) if x else None
        for x in words["how"]
    ]
    if words["domain"]:
        ctx.builder.graph.opset_imports[words["domain"]] = 1
    attributes = ir.convenience.convert_attributes(dict(words["attributes"]))
    ctx.builder.add_node_obj(ir.Node(words["domain"], words["op"], inputs, attributes, outputs=outputs))


def _gelu(approximate: str) -> Callable[[Any], Any]:
    return lambda x: _node("Gelu", [x], x, approximate=approximate)[0]


def _max_pool(size: int, pad: int, x_BHWC: Any) -> Any:
    """At stride 2; models write it otherwise, for the gradient."""
    B, H, W, C = x_BHWC.shape
    small = jax.ShapeDtypeStruct((B, C, *((n + 2 * pad - size) // 2 + 1 for n in (H, W))), x_BHWC.dtype)
    words: dict[str, Any] = {"kernel_shape": (size, size), "strides": (2, 2), "pads": (pad,) * 4}
    (y_BCHW,) = _node("MaxPool", [jnp.transpose(x_BHWC, (0, 3, 1, 2))], small, **words)
    return jnp.transpose(y_BCHW, (0, 2, 3, 1))


def _depthwise(x_BFTC: Any, kernel_KC: Any, axis: int, dilation: int) -> Any:
    """As one convolution along an axis; BC-ResNet is written as a sum of slices, which is dozens of operations here."""
    along = 2 - axis, axis - 1  # (0, 1) of the frames, (1, 0) of the bands
    kernel = jnp.expand_dims(kernel_KC, (2 - axis, 2))
    channels, reach = x_BFTC.shape[-1], dilation * (len(kernel_KC) // 2)
    return jax.lax.conv_general_dilated(
        x_BFTC,
        kernel,
        (1, 1),
        [(reach * n, reach * n) for n in along],
        rhs_dilation=[dilation if n else 1 for n in along],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )


def _max(x: Any, y: Any) -> Any:
    if not isinstance(y, jax.core.Tracer) and np.ndim(y) == 0 and y == 0 and jnp.issubdtype(x.dtype, jnp.floating):
        return _node("Relu", [x], x)[0]
    return jax.lax.max_p.bind(x, y)


class _Fused:
    """What of a model becomes one operation of onnxruntime each: norms and attention, with its cache."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    def module(self, method: Any, args: Any, words: Any, context: Any) -> Any:
        """In the place of a module's method, as ``flax.linen.intercept_methods`` has it."""
        module: Any = context.module
        if (
            isinstance(module, nn.LayerNorm)
            and context.method_name == "__call__"
            and module.has_variable("params", "scale")
        ):
            weights: Any = [module.get_variable("params", name) for name in ("scale", "bias")]
            return _node("LayerNormalization", [args[0], *weights], args[0], axis=-1, epsilon=module.epsilon)[0]
        if context.method_name == "_keep" and args[2] is not None:
            name, new_BTGK, position_B = args
            self._kept[name] = module, new_BTGK, position_B
            return jnp.swapaxes(module.get_variable("cache", name), 1, 2)
        return method(*args, **words)

    def attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        bias: Any = None,
        mask: Any = None,
        is_causal: bool = False,
        local_window_size: Any = None,
    ) -> Any:
        """``jax.nn.dot_product_attention``."""
        (B, L, H, K), (S, G) = q.shape, k.shape[1:3]
        flat, same = (lambda x: x.reshape(*x.shape[:2], -1)), jax.ShapeDtypeStruct((B, L, H * K), q.dtype)
        if self._kept:
            (module, k, position_B), (_, v, _) = self._kept.pop("keys"), self._kept.pop("values")
            old = [module.get_variable("cache", name) for name in ("keys", "values")]
            total = jnp.max(position_B) + L
            if bias is not None:
                (bias,) = _node("Slice", [bias, jnp.zeros(1, jnp.int32), total[None], jnp.full(1, 3, jnp.int32)], bias)
            inputs = [*map(flat, (q, k, v)), *old, position_B + (L - 1), total, None, None, None, bias]
            window = {} if module.style.window is None else {"local_window_size": module.style.window}
            y, *new = _node(
                "GroupQueryAttention", inputs, same, *old, domain=_ORT, num_heads=H, kv_num_heads=G, **window
            )
            for name, x in zip(("keys", "values"), new, strict=True):
                module.put_variable("cache", name, x)
            return y.reshape(q.shape)
        if local_window_size is not None:
            ago_LS = jnp.arange(L)[:, None] - jnp.arange(S)
            near = (ago_LS >= 0) & (ago_LS <= local_window_size[0])
            mask, is_causal = near[None, None] if mask is None else near & mask, False
        padding = None
        if mask is not None and bias is None and mask.shape[1:3] == (1, 1):
            padding = mask[:, 0, 0].astype(jnp.int32)
        elif mask is not None:
            bias = jnp.where(mask, 0.0 if bias is None else bias, UNSEEN)
        if G != H:
            k, v = (jnp.repeat(x, H // G, 2) for x in (k, v))
        inputs = [*map(flat, (q, k, v)), None, padding, bias]
        return _node(
            "MultiHeadAttention",
            inputs,
            same,
            domain=_ORT,
            num_heads=H,
            mask_filter_value=UNSEEN,
            unidirectional=int(is_causal),
        )[0].reshape(q.shape)


_BROADCASTS = {"Add", "Sub", "Mul", "Div", "Max", "Min", "And", "Or", "Where"}
_BROADCASTS |= {"Less", "Greater", "Equal", "LessOrEqual", "GreaterOrEqual"}


def _unexpanded(model: Any) -> Any:
    """The graph without what spreads an array to the shape of another one, where the operation on both does that.

    A free size would have to be computed for each, and onnxruntime would not know a bias for one.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common as passes

    nodes = model.graph.node
    spread = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Expand"}
    known = {x.name for x in model.graph.initializer}
    for node in nodes:
        if node.op_type in _BROADCASTS:
            pair = list(node.input)[-2:]
            shaped = [name for name in pair if name not in known and name not in spread] or pair[:1]
            for i, name in enumerate(node.input):
                if name in spread and (i < len(node.input) - 2 or name != shaped[0]) and shaped[0] not in known:
                    node.input[i] = spread[name]
    _with_biases(model.graph)
    return ir.to_proto(passes.RemoveUnusedNodesPass()(ir.from_proto(model)).model)


def _with_biases(graph: Any) -> None:
    """A convolution takes the bias that is added after it; what is added to a product is so before it is reshaped."""
    made: dict[str, Any] = {node.output[0]: node for node in graph.node}
    reshaped = set()
    read = collections.Counter(name for node in graph.node for name in node.input)
    weights = {x.name: x for x in graph.initializer}
    for add in [node for node in graph.node if node.op_type == "Add"]:
        bias, after = weights.get(add.input[1]), made.get(add.input[0])
        before = made.get(after.input[0]) if after is not None else None
        if (
            bias is None
            or after is None
            or before is None
            or {read[x] for x in (bias.name, *after.output, *before.output)} != {1}
        ):
            continue
        count, both = math.prod(bias.dims), (before.op_type, after.op_type)
        if both == ("Conv", "Transpose") and 1 < count == bias.dims[-1] and len(before.input) == 2:
            bias.dims[:] = [count]
            before.input.append(bias.name)
            reshaped.add(bias.name)
            after.output[0] = add.output[0]
            graph.node.remove(add)
        elif both == ("MatMul", "Reshape") and [*getattr(weights.get(before.input[1]), "dims", ())][1:] == [count]:
            bias.dims[:] = [count]
            reshaped |= {bias.name, after.output[0]}
            after.op_type, add.op_type, after.input[1], add.input[1] = "Add", "Reshape", bias.name, after.input[1]
    for x in [x for x in graph.value_info if x.name in reshaped]:
        graph.value_info.remove(x)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """jax2onnx, onnx_ir and onnxruntime's quantisation print and log what is theirs to know."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
