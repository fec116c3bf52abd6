"""What calibration batches make of a model: what each layer reads and writes, and gradients.

The model runs as in training, without random masks, since every task has a loss; or as a caller says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from bigbase_jax.compress.compressed import Unrolled
from bigbase_jax.core import TrainState
from bigbase_jax.parallel import loss_and_grads
from bigbase_jax.wrappers.layers import each, inputs_of, path_of
from bigbase_jax.wrappers.wrapper import Path

Batch = Mapping[str, Any]


def observe(
    method: Callable[[Any, Any], Any],
    variables: Any,
    batches: Sequence[Batch],
    what: Callable[[Any, Any, Any], tuple[Any, ...]],
    keep: Callable[..., None],
) -> None:
    """Calls ``keep(path, *what(layer, x, y))`` for each layer, by its kernel, that a method of a task computes with.

    Args:
      method: takes variables and a batch.
      what: traced, of a layer and what it reads and gives; also inside of loops.
    """

    def visit(layer: Any, call: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        y = call(x, *args, **kwargs)
        if inputs_of(layer) is not None:
            jax.debug.callback(functools.partial(keep, path_of(layer)), *what(layer, x, y))
        return y

    @jax.jit
    def program(variables: Any, batch: Any) -> Any:
        with nn.intercept_methods(each(visit)):
            return method(variables, batch)

    for batch in batches:
        program(variables, batch)
    jax.effects_barrier()


def layer_means(model: Unrolled, batches: Sequence[Batch], what: str) -> dict[str, Any]:
    """A mean over the batches by the path of each layer's kernel.

    Args:
      what: "inputs": |x| of each input (of a convolution: channel), as the kernel's input axes; "squares": x ** 2
        likewise; "outputs": |y|, a number.
    """

    def mean(layer: Any, x: Any, y: Any) -> tuple[Any]:
        x = (y if what == "outputs" else x).astype(jnp.float32)
        own = 0 if what == "outputs" else 1 if isinstance(layer, nn.Conv) else inputs_of(layer) or 0
        return (jnp.mean(jnp.square(x) if what == "squares" else jnp.abs(x), tuple(range(x.ndim - own))),)

    each: dict[Path, list[Any]] = {}
    method = functools.partial(model.task.loss, key=jax.random.key(0))
    observe(method, model.variables, batches, mean, lambda path, x: each.setdefault(path, []).append(np.asarray(x)))
    means: dict[str, Any] = unflatten_dict({path: np.mean(found, 0) for path, found in each.items()})
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
