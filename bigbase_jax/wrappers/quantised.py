"""Quantisation around a task: pretended while it trains (``Quantised``), real in a run that ``--mode=compress`` writes.

No model knows of it. The calls of ``nn.Dense``, ``nn.DenseGeneral`` and ``nn.Conv`` are intercepted; tables of tokens
(``embedding``, ``head``) are replaced before the model sees them. The arithmetic is qwix's.

A kernel [*in, *out] is taken as a matrix [M, N]. Each group of its inputs has a scale for each output: f32[G, N]. A
table [V, D] has one for each token, [V, 1].

Axes: B sequences, L length, S places of a cache, G heads of keys (of kernels: groups), K head width.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bigbase_jax.build import suggest
from bigbase_jax.core import Batch, Loss, UserError, Variables
from bigbase_jax.models.layers import platform
from bigbase_jax.parallel import FROZEN
from bigbase_jax.wrappers.layers import KERNEL, STACKED, beside, each, inputs_of, layers_of, path_of
from bigbase_jax.wrappers.wrapper import Around, Path, check_regex, some_paths

TABLES = ("embedding", "head")
SCALE, INPUT = "_scale", "input_scale"
_MARK = "~layer"
_GROUP = 64  # inputs that share a scale in 4 bits, where nobody says how many


class Scheme(NamedTuple):
    """Types of weights and, where they are quantised too, of the inputs of layers."""

    weights: Any
    inputs: Any = None

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 4 if self.weights == jnp.int4 else 8


SCHEMES: Mapping[str, Scheme] = {
    "int8_weights": Scheme(jnp.int8),
    "int4": Scheme(jnp.int4),
    "int8": Scheme(jnp.int8, jnp.int8),
    "fp8": Scheme(jnp.float8_e4m3fn, jnp.float8_e4m3fn),
}


def qwix() -> Any:
    """The library.

    Raises:
      UserError: it is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise UserError("quantisation needs qwix; pip install -e '.[compress]'") from error
    return qwix


@dataclasses.dataclass(frozen=True)
class Quantised(Around):
    """A task whose layers compute as if their weights, and inputs where the scheme has a type for them, had few bits.

    In training the weights stay float32 and are rounded at each use; gradients pass the rounding as if it were not
    there (Bengio et al. 2013; Jacob et al. 2018). What is trained so loses less when it is quantised. With ``stored``
    the small types are what the variables hold, in the collection ``FROZEN``, and nothing is trained.

    Attributes:
      task: the task.
      quantize: the scheme, a name of ``SCHEMES``. Tables of tokens have 8 bits under each.
      only: a regex over the paths of layers (``"encoder.block_0.attention.query"``) and tables (``"embedding"``),
        searched for: these alone are quantised; None: all.
      skip: those that are not; None: none.
      group: inputs of a layer that share a scale; None: all of them, and in 4 bits at most 64.
      dynamic: each row of a layer's inputs is scaled by its own largest value, not by what calibration found. Training
        always does that.
      cache: "int8": keys and values of a model that writes are kept so; None: as the model computes.
      stored: see above.

    Raises:
      UserError: a value out of range, or (from ``init``) a regex that matches nothing, or groups that do not divide.
    """

    quantize: str = "int8"
    only: str | None = None
    skip: str | None = None
    group: int | None = None
    dynamic: bool = False
    cache: str | None = None
    stored: bool = False

    def __post_init__(self) -> None:
        if self.quantize not in SCHEMES:
            raise UserError(f"there is no quantize={self.quantize}.{suggest(str(self.quantize), SCHEMES, 'scheme')}")
        check_regex("only", self.only or "")
        check_regex("except", self.skip or "")
        if self.group is not None and self.group < 2:
            raise UserError(f"group={self.group} shares no scale; take 32, 64 or 128.")
        if self.cache not in (None, "int8"):
            raise UserError(f"cache={self.cache!r}: keys and values are kept in 'int8', or as the model computes.")
        qwix()

    @property
    def scheme(self) -> Scheme:
        return SCHEMES[self.quantize]

    @property
    def calibrated(self) -> bool:
        """Whether layers have scales of their inputs."""
        return self.stored and self.scheme.inputs is not None and not self.dynamic

    # -- variables -------------------------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """The inner task's, quantised where ``stored``.

        Raises:
          UserError: it has frozen parameters or a teacher already, or see the class.
        """
        self._check_inside()
        variables = self.task.init(key, batch)
        if FROZEN in variables:
            name = type(self.task).__name__
            raise UserError(f"Quantised wraps {name}, which has frozen parameters already; wrap the task inside it.")
        if self.stored:
            return self.store(variables, self.chosen(variables, batch))
        self._matching([*_kernels(variables), *_tables(variables)])
        return variables

    def chosen(self, variables: Variables, batch: Mapping[str, Any]) -> dict[Path, int]:
        """The kernels and tables that are quantised, and the number of outputs of each; of a table, 0.

        Args:
          variables: of the inner task; shapes are enough.
          batch: has ``Task.inputs``; shapes are enough.

        Raises:
          UserError: a regex matches nothing, or layers are stacked.
        """
        kernels = _kernels(variables)
        if any(_stack(path) for path in kernels):
            raise UserError("layers of a stack cannot be stored in few bits; set scan=False.")
        inputs = layers_of(self.task.predict, variables, {name: batch[name] for name in self.task.inputs})
        params = flatten_dict(variables["params"])
        outputs = {path: math.prod(params[path].shape[inputs[path] :]) for path in kernels if path in inputs}
        outputs |= dict.fromkeys(_tables(variables), 0)
        return {path: outputs[path] for path in self._matching(list(outputs))}

    def _matching(self, paths: Sequence[Path]) -> list[Path]:
        names, found = [layer_name(path) for path in paths], list(paths)
        for word, regex in (("only", self.only), ("except", self.skip)):
            if regex and not any(re.search(regex, name) for name in names):
                near = suggest(regex, names, "layer")
                near = near if "mean" in near else f" There are {some_paths((name,) for name in names)}."
                raise UserError(f"{word}={regex} matches no layer that can be quantised.{near}")
            if regex:
                found = [path for path in found if bool(re.search(regex, layer_name(path))) == (word == "only")]
        if not found:
            raise UserError(f"only={self.only} and except={self.skip} leave no layer to quantise.")
        return found

    def store(
        self,
        variables: Variables,
        outputs: Mapping[Path, int],
        inputs: Mapping[Path, Any] | None = None,
        solve: Callable[[Path, jax.Array, Any, int], Any] | None = None,
    ) -> Variables:
        """The inner task's variables, with these kernels and tables in few bits.

        Args:
          outputs: of ``chosen``.
          inputs: the scale f32[] of each layer's inputs, where they are calibrated; None: 1.
          solve: from a kernel's path, matrix [M, N], type and group to a ``QArray``; None: the nearest values.

        Raises:
          UserError: ``group`` does not divide a layer's inputs.
        """
        params, frozen = flatten_dict(variables["params"]), {}
        for path, N in outputs.items():
            small = self.rounded(path, params.pop(path), N, solve)
            frozen[path] = _packed(small.qvalue, N)
            frozen[_beside(path, path[-1] + SCALE)] = small.scale
            if N and self.calibrated:
                frozen[_beside(path, INPUT)] = jnp.float32(1 if inputs is None else inputs[path])
        return {**variables, "params": unflatten_dict(params), FROZEN: unflatten_dict(frozen)}

    def rounded(self, path: Path, x: Any, N: int, solve: Any = None) -> Any:
        """A kernel of so many outputs, or a table, as a ``QArray`` whose values have its shape, and scales two axes."""
        if not N:
            return qwix().quantize(jnp.asarray(x, jnp.float32), jnp.int8, channelwise_axes=[int(path[-1] == "head")])
        x_MN = jnp.asarray(x, jnp.float32).reshape(-1, N)
        group = self._group(path, len(x_MN))
        small = (solve or nearest)(path, x_MN, self.scheme.weights, group)
        return dataclasses.replace(small, qvalue=small.qvalue.reshape(x.shape))

    def _group(self, path: Path, M: int) -> int:
        """How many of M inputs share a scale."""
        divisors = [n for n in range(1, M + 1) if M % n == 0]
        if self.group is not None:
            if M % self.group:
                some = [n for n in divisors if n >= 8][-4:] or divisors[-1:]
                raise UserError(
                    f"group={self.group} does not divide the {M} inputs of {layer_name(path)!r}; take"
                    f" {', '.join(map(str, some))}, or leave the layer out with except=."
                )
            return self.group
        small = max(n for n in divisors if n <= _GROUP)
        return small if self.scheme.weights == jnp.int4 and small >= _GROUP // 4 else M

    def unwrap(self, variables: Variables) -> Variables:
        """The inner task's variables, in float32."""
        if not self.stored:
            return variables
        rest = {name: x for name, x in variables.items() if name != FROZEN}
        frozen, params = flatten_dict(variables[FROZEN]), flatten_dict(variables["params"])
        for path, x in frozen.items():
            if (scale := frozen.get(_beside(path, path[-1] + SCALE))) is not None:
                params[path] = dequantised(x, scale)
        return {**rest, "params": unflatten_dict(params)}

    # -- computation -----------------------------------------------------------------------------------------------

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        if self.stored:
            raise UserError(
                "weights that are stored in few bits have no gradient; train a recipe with quantize=... and"
                " --config.init_from=RUN, and compress that."
            )
        found: tuple[Loss, Variables] = self._run(self.task.loss, variables, batch, key)
        return found

    def runnable(self, model: Any) -> Any:
        """The inner task's model, as ``inference.generation`` takes one, with this arithmetic and on the variables of
        this task."""
        return _Model(model, self)

    def _run(self, method: Callable[..., Any], variables: Variables, /, *args: Any, **kwargs: Any) -> Any:
        if self.stored:
            rest = {name: x for name, x in variables.items() if name != FROZEN}
            params = {**flatten_dict(variables["params"]), **flatten_dict(variables[FROZEN])}
            for path in [path for path in params if path[-1] in TABLES and _beside(path, path[-1] + SCALE) in params]:
                params[path] = dequantised(params[path], params.pop(_beside(path, path[-1] + SCALE)))
            given: Variables = {**rest, "params": unflatten_dict(params)}
        else:
            tables = self._matching([*_kernels(variables), *_tables(variables)])
            params = flatten_dict(variables["params"])
            for path in (path for path in tables if path[-1] != KERNEL):
                params[path] = _through(params[path], self.rounded(path, params[path], 0))
            kernels = [path for path in tables if path[-1] == KERNEL]
            given = _marked({**variables, "params": unflatten_dict(params)}, kernels)
        with nn.intercept_methods(each(self._layer)), nn.intercept_methods(_small_keys):
            return method(given, *args, **kwargs)

    def _layer(self, layer: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if layer.has_variable("params", KERNEL + SCALE):
            return self._small(layer, *args, **kwargs)
        return self._fake(layer, *args, **kwargs) if beside(layer, _MARK) else call(*args, **kwargs)

    def _fake(self, layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer with what it reads rounded, and gradients that do not see it."""
        own = {name: x for name, x in layer.variables["params"].items() if name != _MARK}
        kernel, inputs = own[KERNEL], inputs_of(layer)
        if inputs is not None:
            own[KERNEL] = _through(kernel, self.rounded(path_of(layer), kernel, math.prod(kernel.shape[inputs:])))
        if self.scheme.inputs is not None:
            x = _through(x, by_rows(layer, x, self.scheme.inputs))
        return layer.clone(parent=None).apply({"params": own}, x, *args, **kwargs)

    def _small(self, layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer with its stored kernel."""
        own, lib, type_ = dict(layer.variables["params"]), qwix(), self.scheme.inputs
        kernel, scale_GN, factor = own[KERNEL], own.pop(KERNEL + SCALE), own.pop(INPUT, None)
        (G, N), picture = scale_GN.shape, isinstance(layer, nn.Conv)

        def read(x: Any, free: Sequence[int]) -> Any:
            if factor is None:
                return lib.quantize(x.astype(jnp.float32), type_, channelwise_axes=free)
            return lib.QArray(cast(x.astype(jnp.float32) / factor, type_), factor.reshape((1,) * x.ndim))

        # XLA's CPU compiler has no library for convolutions of few bits: they take 16 times as long as in float32.
        if type_ is None or (picture and (G > 1 or platform() == "cpu")):
            own[KERNEL] = dequantised(kernel, scale_GN)
            x = x if type_ is None else lib.dequantize(read(x, [0])).astype(x.dtype)
            return layer.clone(parent=None).apply({"params": own}, x, *args, **kwargs)

        def dot(x: Any, _: Any, dimensions: Any, *__: Any, **___: Any) -> Any:
            axes = dimensions[0][0]
            free = [n for axis, n in enumerate(x.shape) if axis not in axes]
            rows = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim)).reshape(*free, -1)
            small = read(rows, range(len(free)))
            last = (((small.ndim - 1,), (0,)), ((), ()))
            y = lib.dot_general(small, lib.QArray(kernel.reshape(-1, N), scale_GN), last)
            return y.reshape(*free, *kernel.shape[len(axes) :]).astype(x.dtype)

        def convolve(x: Any, _: Any, *args: Any, precision: Any = None, **kwargs: Any) -> Any:
            small = lib.QArray(kernel, scale_GN.reshape((1,) * (kernel.ndim - 1) + (N,)))
            return lib.conv_general_dilated(read(x, [0]), small, *args, **kwargs).astype(x.dtype)

        own[KERNEL] = jnp.zeros(kernel.shape, x.dtype)  # Flax looks at its shape and type
        way = {"conv_general_dilated": convolve} if picture else {"dot_general": dot}
        return layer.clone(parent=None, **way).apply({"params": own}, x, *args, **kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class _Model:
    """See ``Quantised.runnable``. Programs are kept by the model: it is equal to itself alone."""

    inner: Any
    task: Quantised

    def apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:
        return self.task._run(self.inner.apply, variables, *args, **kwargs)

    def cache(self, *sizes: Any, **words: Any) -> Any:
        found = self.inner.cache(*sizes, **words)
        return found if self.task.cache is None else _small_cache(found)

    def clone(self, **words: Any) -> _Model:
        return dataclasses.replace(self, inner=self.inner.clone(**words))

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)


# ----------------------------------------------------------------------------------------------- which layers there are


def layer_name(path: Path) -> str:
    """``"encoder.block_0.mlp.up"``: a kernel's layer, or a table."""
    return ".".join(path[:-1] if path[-1] == KERNEL else path)


def _marked(variables: Variables, paths: Sequence[Path]) -> Variables:
    """Variables in which the layers of these kernels are told, by an empty array beside each."""
    params = flatten_dict(variables["params"])
    for path in paths:
        params[_beside(path, _MARK)] = jnp.zeros((*params[path].shape[: 1 if _stack(path) else 0], 0))
    return {**variables, "params": unflatten_dict(params)}


def _kernels(variables: Variables) -> list[Path]:
    return [path for path in flatten_dict(variables["params"]) if path[-1] == KERNEL]


def _tables(variables: Variables) -> list[Path]:
    return [path for path, x in flatten_dict(variables["params"]).items() if path[-1] in TABLES and x.ndim == 2]


def _stack(path: Path) -> int:
    """How many parts of a path lead to a stack of layers; 0: it is in none."""
    return path.index("blocks") + 1 if "blocks" in path else 0


def _beside(path: Path, name: str) -> Path:
    """Where what belongs to a parameter lives."""
    n = _stack(path)
    return (*path[:n], STACKED, *path[n:-1], name) if n else (*path[:-1], name)


def served_bytes(task: Any, batch: Mapping[str, Any]) -> dict[str, float]:
    """Bytes of the variables of a task without wrappers, as "float32" and under each of ``SCHEMES``.

    Args:
      batch: shapes are enough.
    """
    model: Any = getattr(task, "model", None)
    if getattr(model, "scan", False):
        task = dataclasses.replace(task, model=model.clone(scan=False))
    tasks = {"float32": task, **{name: Quantised(task, name, stored=True) for name in SCHEMES}}
    trees = {name: jax.eval_shape(kind.init, jax.random.key(0), dict(batch)) for name, kind in tasks.items()}
    return {name: float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))) for name, tree in trees.items()}


# ---------------------------------------------------------------------------------------------------------- arithmetic


def nearest(_: Path, x_MN: jax.Array, type_: Any, group: int) -> Any:
    """A ``QArray`` of the nearest values, by groups of so many inputs."""
    return qwix().quantize(x_MN, type_, channelwise_axes=[1], tiled_axes={0: group})


def by_rows(layer: Any, x: Any, type_: Any) -> Any:
    """A layer's input as a ``QArray``, with a scale for each of its rows; of a convolution, for each picture."""
    axes = getattr(layer, "axis", -1)
    summed = {axis % x.ndim for axis in ([axes] if isinstance(axes, int) else axes)}
    free = [0] if isinstance(layer, nn.Conv) else [axis for axis in range(x.ndim) if axis not in summed]
    return qwix().quantize(x.astype(jnp.float32), type_, channelwise_axes=free)


def cast(x: Any, type_: Any) -> Any:
    """The nearest values of a type."""
    if jnp.issubdtype(type_, jnp.integer):
        return jnp.clip(jnp.round(x), jnp.iinfo(type_).min, jnp.iinfo(type_).max).astype(type_)
    most = float(jnp.finfo(type_).max)
    return jnp.clip(x, -most, most).astype(type_)


def dequantised(values: Any, scale_GN: Any) -> jax.Array:
    """f32, in the shape of the kernel or the table."""
    values = _unpacked(values, scale_GN.shape[1])
    matrix = values.reshape(-1, values.shape[-1] if scale_GN.shape[1] == 1 else scale_GN.shape[1])
    return qwix().dequantize(qwix().QArray(matrix, scale_GN)).reshape(values.shape)


def _through(x: Any, small: Any) -> Any:
    """``x`` rounded, with the gradient of ``x``."""
    large = dequantised(small.qvalue, small.scale) if small.scale.ndim == 2 else qwix().dequantize(small)
    return x + jax.lax.stop_gradient(large.astype(x.dtype) - x)


def _last_input(shape: tuple[int, ...], N: int) -> int:
    """Of a kernel [*in, *out] with so many outputs, the last axis of the inputs."""
    return max(n for n in range(1, len(shape) + 1) if math.prod(shape[n:]) == N) - 1


def _packed(values: Any, N: int) -> Any:
    """Two values of 4 bits in a byte, u8, where the last axis of the inputs is even, and one where not."""
    if values.dtype != jnp.int4:
        return values
    axis, bits = _last_input(values.shape, N), values.astype(jnp.int8)
    if values.shape[axis] % 2:
        return bits
    low, high = jnp.split(bits.astype(jnp.uint8), 2, axis)
    return low & 15 | high << 4


def _unpacked(values: Any, N: int) -> Any:
    if values.dtype != jnp.uint8:
        return values
    low, high = ((x.astype(jnp.int8) << 4) >> 4 for x in (values, values >> 4))
    return jnp.concatenate([low, high], _last_input(values.shape, N))


# --------------------------------------------------------------------------------------------------------------- caches


def _small_cache(cache: Any) -> Any:
    """An empty cache, with the keys and values of self-attention as i8[B, G, S, K] and their scales f32[B, G, S, 1]."""
    if not isinstance(cache, Mapping):
        return cache
    found: dict[str, Any] = {name: _small_cache(x) for name, x in cache.items()}
    for block in found.values():
        if isinstance(block, dict) and (pair := block.get("attention")):
            small = {name: x.astype(jnp.int8) for name, x in pair.items()}
            block["attention"] = small | {name + SCALE: jnp.zeros((*x.shape[:3], 1)) for name, x in pair.items()}
    return found


def _small_keys(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """``Attention._keep`` of such a cache: each key and value by its own largest number."""
    if context.method_name != "_keep" or not context.module.has_variable("cache", args[0] + SCALE):
        return call(*args, **kwargs)
    name, new_BLGK, position_B = args
    small = qwix().quantize(new_BLGK.astype(jnp.float32), jnp.int8, channelwise_axes=[0, 1, 2])
    kept_BSGK, scale_BSG1 = call(name, small.qvalue, position_B), call(name + SCALE, small.scale, position_B)
    return kept_BSGK.astype(jnp.float32) * scale_BSG1
