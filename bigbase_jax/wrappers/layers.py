"""A model's layers from outside of it: which there are, what lies beside their kernels, and computing in their place.

``nn.intercept_methods`` shows the calls of layers, so that no model knows of what is around it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from bigbase_jax.wrappers.wrapper import Path

KERNEL = "kernel"
STACKED = "~lora"
"""Where what belongs to layers of a stack lies, in it. The name, that of earlier checkpoints, sorts after every one of
Linen: the first leaves of a stack stay those that its module expects."""
KINDS = (nn.Dense, nn.DenseGeneral, nn.Conv)


def each(run: Callable[..., Any], kinds: tuple[Any, ...] = KINDS) -> Callable[..., Any]:
    """For ``nn.intercept_methods``: ``run(layer, call, *its arguments)`` in place of each call of a layer."""

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, kinds) and context.method_name == "__call__":
            return run(context.module, call, *args, **kwargs)
        return call(*args, **kwargs)

    return intercept


def path_of(layer: Any) -> Path:
    """Of a layer's kernel; inside of a stack, within its block."""
    return (*layer.path, KERNEL)


def beside(layer: Any, name: str) -> Mapping[str, Any]:
    """The leaves among which one has this name: the layer's own, or those below ``STACKED`` in the block it belongs to;
    empty: there is none."""
    scope = layer.scope
    if scope.has_variable("params", name):
        own: Mapping[str, Any] = layer.variables["params"]
        return own
    if not scope.root.has_variable("params", STACKED):
        return {}
    node = scope.root.get_variable("params", STACKED)
    for part in scope.path[len(scope.root.path) :]:
        node = node.get(part, {})
    return node if name in node else {}


def kernel_axes(layer: Any, ndim: int, einsum_str: str | None = None, **_: Any) -> tuple[int, int | None]:
    """How many of a kernel's axes come before its inputs, and before its outputs (None: they are mixed)."""
    if isinstance(layer, nn.Einsum):
        left, kernel, out = re.split(",|->", (einsum_str or layer.einsum_str or "").replace(" ", ""))
        order = "".join("o" if c not in left else "b" if c in out else "i" for c in kernel)
        fits = re.fullmatch("(b*)(i+)o+", order)
        return (fits.end(1), fits.end(2)) if fits else (0, None)
    if isinstance(layer, nn.DenseGeneral):
        lead = len(layer.batch_dims)
        return lead, lead + (1 if isinstance(layer.axis, int) else len(layer.axis))
    return 0, ndim - 1


def inputs_of(layer: Any) -> int | None:
    """How many axes of its kernel a layer of ``KINDS`` sums over, which are the first; None: it has others before."""
    lead, inputs = kernel_axes(layer, layer.get_variable("params", KERNEL).ndim)
    return None if lead else inputs


def layers_of(method: Callable[..., Any], *args: Any) -> dict[Path, int]:
    """``inputs_of`` every layer that a task's method calls, by ``path_of``; of the arguments, shapes are enough."""
    found: dict[Path, int] = {}

    def note(layer: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        y = call(*args, **kwargs)
        if (inputs := inputs_of(layer)) is not None:
            found[path_of(layer)] = inputs
        return y

    with nn.intercept_methods(each(note)):
        jax.eval_shape(method, *args)
    return found
