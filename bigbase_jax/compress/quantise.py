"""Quantisation of a trained model: ``--mode=compress --quantize=int8,except=head``, and what each layer would cost.

Axes: M inputs and N outputs of a layer, R rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bigbase_jax.build import parse_arg, suggest, target
from bigbase_jax.compare.tables import show_table
from bigbase_jax.compress.compressed import Batches, Compressed
from bigbase_jax.compress.measured import observe
from bigbase_jax.core import Batch, UserError, Variables, add
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.models.transformer import unstack_blocks
from bigbase_jax.runtime.log import say
from bigbase_jax.wrappers.layers import each, path_of
from bigbase_jax.wrappers.quantised import (
    SCHEMES,
    Quantised,
    by_rows,
    cast,
    dequantised,
    layer_name,
    nearest,
    qwix,
)
from bigbase_jax.wrappers.wrapper import Path

METHODS = ("nearest", "gptq")
_SAMPLE = 4096  # of the numbers that a layer reads in a batch, how many its scale is chosen by
_CLIPS = np.linspace(0.4, 1.0, 25)  # shares of the largest number
_BLOCK = 128  # inputs that GPTQ rounds before it corrects the others
_DAMPING = 0.01  # of the mean of the Hessian's diagonal (Frantar et al. 2023, section 3.3)


def words(text: str) -> dict[str, Any]:
    """The arguments of ``quantise`` in ``int4,group=32,method=gptq,only=REGEX,except=REGEX,cache=int8,dynamic``.

    Raises:
      UserError: an unknown word or scheme, with the nearest.
    """
    scheme, _, rest = text.partition(",")
    if scheme not in SCHEMES:
        raise UserError(f"there is no --quantize={scheme}.{suggest(scheme, SCHEMES, 'scheme')}")
    found = vars(
        parse_arg(
            rest,
            "--quantize",
            **{"only": None, "except": None, "group": 0, "method": "nearest", "cache": None},
            dynamic=False,
        )
    )
    if found["method"] not in METHODS:
        raise UserError(f"--quantize has no method={found['method']}.{suggest(found['method'], METHODS, 'method')}")
    skip, group = found.pop("except"), found.pop("group") or None
    return {"quantize": scheme, **found, "skip": skip, "group": group}


def quantise(predictor: Predictor, found: Compressed, text: str, batches: Batches) -> Compressed:
    """The model with weights, and inputs of layers where the scheme says so, in few bits.

    Args:
      found: the plain model of the run that ``predictor`` opens.
      text: see ``words``.
      batches: gives the calibration batches, of which a scheme that quantises inputs takes in what range these lie,
        unless it is ``dynamic``, and GPTQ what each layer reads.

    Raises:
      UserError: a scheme that does not fit the model, or no examples where they are needed.
    """
    given = words(text)
    method = given.pop("method")
    found = _unstacked(found)
    task = Quantised(found.task, stored=True, **given)
    chosen = task.chosen(found.variables, _one(predictor))
    layers = [path for path, N in chosen.items() if N]
    seen: _Seen | None = None
    if layers and (task.calibrated or method == "gptq"):
        seen = _observe(found, batches(), method == "gptq")
    inputs = None if seen is None or not task.calibrated else _ranges(seen, layers, task.scheme.inputs)
    solve = functools.partial(_solved, seen) if seen is not None and method == "gptq" else None
    variables = task.store(found.variables, chosen, inputs, solve)
    before, after = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (found.variables, variables))
    say(f"quantise: {len(layers)} layers and {len(chosen) - len(layers)} tables; {before:,} bytes are {after:,}")
    about = {
        "quantize": text,
        "layers": len(layers),
        "tables": len(chosen) - len(layers),
        "calibrated_on": 0 if seen is None else _count(batches()),
        "bytes_before": before,
        "bytes_after": after,
    }
    found.config.task = target(Quantised, task=found.config.task, stored=True, **given)
    return Compressed(found.config, task, variables, {**found.about, **about})


def sensitivity(predictor: Predictor, found: Compressed, text: str, batches: Batches) -> dict[str, Any]:
    """What the task measures on the calibration batches where one layer or table alone is quantised; prints a table.

    Returns:
      ``layers``: rows, the costliest first, of ``layer``, ``bytes`` (what quantising it saves), each ``Sum`` of
      ``Task.evaluate`` as a mean, and ``change``, that of ``loss``, or of the first of these where there is none;
      ``all``: such a row where all of them are quantised; ``before``: the means where none is.

    Raises:
      UserError: as ``quantise``, or no examples.
    """
    given = words(text)
    given.pop("method")
    found = _unstacked(found)
    inner, variables = found.task, found.variables
    task = Quantised(inner, stored=True, **given)
    chosen = task.chosen(variables, _one(predictor))
    layers = [path for path, N in chosen.items() if N]
    seen = _observe(found, batches())
    ranges = _ranges(seen, layers, task.scheme.inputs) if task.calibrated and layers else {}
    factors = np.array([ranges.get(path, 1.0) for path in layers], np.float32)
    number, type_ = {path: i for i, path in enumerate(layers)}, task.scheme.inputs

    def visit(on: Any, layer: Any, call: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        index = number.get(path_of(layer))
        if type_ is not None and index is not None:
            small = qwix().dequantize(by_rows(layer, x, type_)) if task.dynamic else cast(x / factors[index], type_)
            small = small if task.dynamic else small.astype(jnp.float32) * factors[index]
            x = jnp.where(on[index], small.astype(x.dtype), x)
        return call(x, *args, **kwargs)

    @jax.jit
    def sums(variables: Variables, on: Any, batch: Batch) -> Any:
        with nn.intercept_methods(each(functools.partial(visit, on))):
            return inner.evaluate(variables, batch)[1]

    def measured(paths: Sequence[Path]) -> dict[str, float]:
        params = flatten_dict(variables["params"])
        for path in paths:
            small = task.rounded(path, params[path], chosen[path])
            params[path] = dequantised(small.qvalue, small.scale).astype(params[path].dtype)
        changed = {**variables, "params": unflatten_dict(params)}
        on = np.array([path in paths for path in layers], bool)
        parts = [jax.device_get(sums(changed, on, dict(batch))) for batch in batches()]
        return {name: float(np.mean(x.mean())) for name, x in functools.reduce(add, parts).items()}

    before = measured(())
    first = "loss" if "loss" in before else next(iter(before))
    params, rows = flatten_dict(variables["params"]), list[dict[str, Any]]()
    for paths in (*((path,) for path in chosen), tuple(chosen)):
        after = measured(paths)
        saved = sum(params[path].nbytes * (1 - task.scheme.bits / 32) for path in paths)
        name = layer_name(paths[0]) if len(paths) == 1 else "all"
        rows.append({"layer": name, "bytes": int(saved), "change": after[first] - before[first], **after})
    rows, whole = sorted(rows[:-1], key=lambda row: -row["change"]), rows[-1]
    lines = ({"layer": "none", "bytes": 0, "change": 0.0, **before}, *rows, whole)
    show_table(
        f"{text}: what quantising one layer alone changes, on {_count(batches())} training examples",
        "layer",
        ["bytes saved", f"change of {first}", *before],
        [[x["layer"], f"{x['bytes']:,}", f"{x['change']:+.2g}", *(f"{x[n]:.5g}" for n in before)] for x in lines],
    )
    return {"quantize": text, "examples": _count(batches()), "before": before, "all": whole, "layers": rows}


# ------------------------------------------------------------------------------------------------------------ the model


def _unstacked(found: Compressed) -> Compressed:
    """The model with its blocks one by one."""
    if not found.config.task.model.get("scan"):
        return found
    found.config.task.model.scan = False
    task = dataclasses.replace(found.task, model=found.task.model.clone(scan=False))  # type: ignore[type-var,attr-defined]
    variables = {**found.variables, "params": unstack_blocks(found.variables["params"])}
    return found._replace(task=task, variables=variables)


def _one(predictor: Predictor) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of one example."""
    return {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in predictor.spec.items()}


# ---------------------------------------------------------------------------------------------------------- calibration


def _count(batches: Sequence[Batch]) -> int:
    return sum(int(np.sum(batch["mask"])) for batch in batches)


class _Seen:
    """What layers have read: the largest number, a sample, and where asked for the sum over rows of x x^T."""

    def __init__(self) -> None:
        self.most: dict[Path, float] = {}
        self.samples: dict[Path, list[np.ndarray]] = {}
        self.hessians: dict[Path, np.ndarray] = {}

    def keep(self, path: Path, most: Any, sample: Any, hessian_MM: Any = None) -> None:
        self.most[path] = max(self.most.get(path, 0.0), float(most))
        self.samples.setdefault(path, []).append(np.array(sample))
        if hessian_MM is not None:
            self.hessians[path] = self.hessians.get(path, 0.0) + np.asarray(hessian_MM, np.float64)


def _observe(found: Compressed, batches: Sequence[Batch], hessians: bool = False) -> _Seen:
    """What the layers of a task read as it predicts.

    Raises:
      UserError: there are no batches.
    """
    if not batches:
        raise UserError(
            "calibration needs training examples, and there are none; put the run's data back, give --calibrate=256, or"
            " take --quantize=int8_weights, or int8,dynamic, which need none."
        )

    def what(layer: Any, x: Any, _: Any) -> tuple[Any, ...]:
        flat = x.astype(jnp.float32).reshape(-1)
        some = np.random.default_rng(zlib.crc32(repr(layer.path).encode())).permutation(flat.size)[:_SAMPLE]
        most_sample = jnp.max(jnp.abs(flat)), flat[some]
        if not hessians or isinstance(layer, nn.Conv):
            return most_sample
        axes = getattr(layer, "axis", -1)
        axes = (axes,) if isinstance(axes, int) else axes
        moved = jnp.moveaxis(x.astype(jnp.float32), axes, range(-len(axes), 0))
        x_RM = moved.reshape(-1, math.prod(moved.shape[x.ndim - len(axes) :]))
        return *most_sample, x_RM.T @ x_RM

    seen, names = _Seen(), found.task.inputs
    inputs = [{name: batch[name] for name in names} for batch in batches]
    observe(found.task.predict, found.variables, inputs, what, seen.keep)
    return seen


def _ranges(seen: _Seen, layers: Sequence[Path], type_: Any) -> dict[Path, float]:
    """The scale of each layer's inputs with which the sample loses least, in the mean square."""
    found = {}
    for path in layers:
        most = seen.most[path] or 1.0
        sample = np.concatenate([*seen.samples[path], [most]]).astype(np.float32)
        scales = most * _CLIPS / float(jnp.finfo(type_).max if jnp.issubdtype(type_, jnp.inexact) else 127)
        errors = [
            float(np.mean((np.asarray(cast(sample / scale, type_), np.float32) * scale - sample) ** 2))
            for scale in scales
        ]
        found[path] = float(scales[int(np.argmin(errors))])
    return found


def _solved(seen: _Seen, path: Path, x_MN: jax.Array, type_: Any, group: int) -> Any:
    hessian_MM = seen.hessians.get(path)
    if hessian_MM is None:
        return nearest(path, x_MN, type_, group)
    return gptq(x_MN, jnp.asarray(hessian_MM, jnp.float32), type_, group)


@functools.partial(jax.jit, static_argnums=(2, 3))
def gptq(x_MN: jax.Array, hessian_MM: jax.Array, type_: Any, group: int) -> Any:
    """GPTQ (Frantar et al. 2023, algorithm 1): inputs are rounded in order, and the error of each is made up for by
    those that are left, as far as the layer's output on the calibration data goes.

    As ``qwix.contrib.gptq_core.quantize_weight``, which makes a program of its own for each input; with groups, each
    group's scale is taken after all corrections by those before it, and zeros stay zeros.

    Args:
      x_MN: a kernel.
      hessian_MM: the sum over rows of x x^T.
      type_: of the values.
      group: inputs that share a scale.

    Returns:
      a ``QArray`` of [M, N] values and [M / group, N] scales.
    """
    M, lib = len(x_MN), qwix()
    size = group if group < M else max(n for n in range(1, min(M, _BLOCK) + 1) if M % n == 0)
    diagonal_M = jnp.diag(hessian_MM)
    dead_M = diagonal_M == 0
    x_MN = jnp.where(dead_M[:, None], 0, x_MN)
    damped_MM = hessian_MM + jnp.diag(jnp.where(dead_M, 1, 0) + _DAMPING * jnp.mean(diagonal_M))
    inverse_MM = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped_MM), True), jnp.eye(M))
    upper_MM = jnp.linalg.cholesky(inverse_MM, upper=True)
    keep_MN, whole_1N = x_MN != 0, nearest((), x_MN, type_, M).scale

    def block(x_MN: jax.Array, start: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        x_bN, keep_bN, upper_bM = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in (x_MN, keep_MN, upper_MM))
        upper_bb = jax.lax.dynamic_slice_in_dim(upper_bM, start, size, 1)
        scale_1N = nearest((), x_bN, type_, size).scale if group < M else whole_1N

        def one(x_bN: jax.Array, i: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            value_N = cast(jnp.where(keep_bN[i], x_bN[i] / scale_1N[0], 0), type_)
            error_N = (x_bN[i] - value_N.astype(jnp.float32) * scale_1N[0]) / upper_bb[i, i]
            return x_bN - upper_bb[i][:, None] * error_N, (value_N, error_N)

        _, (value_bN, error_bN) = jax.lax.scan(one, x_bN, jnp.arange(size))
        return x_MN - upper_bM.T @ error_bN, (value_bN, scale_1N[0])

    _, (values, scales) = jax.lax.scan(block, x_MN, jnp.arange(0, M, size))
    return lib.QArray(values.reshape(M, -1), scales if group < M else whole_1N)
