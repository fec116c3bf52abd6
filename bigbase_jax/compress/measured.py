"""What calibration batches make of a model: the size of what each layer reads and writes, and gradients.

The model runs as in training, without random masks, since every task has a loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from bigbase_jax.compress.compressed import Unrolled
from bigbase_jax.core import TrainState
from bigbase_jax.parallel import loss_and_grads
from bigbase_jax.wrappers.lora import kernel_axes
from bigbase_jax.wrappers.wrapper import Path

KERNEL = "kernel"
Batch = Mapping[str, np.ndarray]


def inputs_of(context: Any) -> int | None:
    """How many axes of its kernel the layer sums over, which are the first; None: it is none, or has others first."""
    layer = context.module
    if context.method_name != "__call__" or not isinstance(layer, nn.Dense | nn.DenseGeneral | nn.Conv):
        return None
    lead, inputs = kernel_axes(layer, layer.get_variable("params", KERNEL).ndim)
    return None if lead else inputs


def layers_of(model: Unrolled) -> dict[Path, int]:
    """``inputs_of`` every layer, by the path of its kernel."""
    layers: dict[Path, int] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        if (inputs := inputs_of(context)) is not None:
            layers[(*context.module.path, KERNEL)] = inputs
        return y

    with nn.intercept_methods(note):
        jax.eval_shape(model.task.init, jax.random.key(0), dict(model.spec))
    return layers


def layer_means(model: Unrolled, batches: Sequence[Batch], what: str) -> dict[str, Any]:
    """A mean over the batches by the path of each layer's kernel.

    Args:
      what: "inputs": |x| of each input (of a convolution: channel), as the kernel's input axes; "squares": x ** 2
        likewise; "outputs": |y|, a number.
    """

    @jax.jit
    def measured(variables: Any, batch: Any) -> dict[Path, jax.Array]:
        found: dict[Path, jax.Array] = {}

        def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y, inputs = call(*args, **kwargs), inputs_of(context)
            if inputs is not None:
                x = (y if what == "outputs" else args[0]).astype(jnp.float32)
                x = jnp.square(x) if what == "squares" else jnp.abs(x)
                own = 0 if what == "outputs" else 1 if isinstance(context.module, nn.Conv) else inputs
                found[(*context.module.path, KERNEL)] = jnp.mean(x, tuple(range(x.ndim - own)))
            return y

        with nn.intercept_methods(note):
            model.task.loss(variables, batch, jax.random.key(0))
        return found

    each = [jax.device_get(measured(model.variables, batch)) for batch in batches]
    means: dict[str, Any] = unflatten_dict({path: np.mean([found[path] for found in each], 0) for path in each[0]})
    return means


def products(model: Unrolled, batches: Sequence[Batch]) -> Iterator[dict[str, Any]]:
    """Of each batch, parameter x gradient of the mean loss."""

    @jax.jit
    def product(variables: Any, batch: Any) -> Any:
        state = {name: x for name, x in variables.items() if name != "params"}
        whole = TrainState(jnp.int32(0), variables["params"], state, (), None, jax.random.key(0))
        found = loss_and_grads(model.task, whole, batch, jax.random.key(0), 1)
        return jax.tree.map(lambda p, g: p * g / found.weight, whole.params, found.grads)

    for batch in batches:
        yield jax.device_get(product(model.variables, batch))
