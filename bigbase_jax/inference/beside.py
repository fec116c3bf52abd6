"""Several LoRA adapters of one base in one program: each row has its own, or none (Chen et al. 2023, Punica).

Axes: B rows, L length, N adapters and one of zeros before them, I inputs of a layer, R rank, O outputs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from bigbase_jax.core import UserError, Variables
from bigbase_jax.inference.generation import Engine
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.models.transformer import unstack_blocks
from bigbase_jax.wrappers.layers import each
from bigbase_jax.wrappers.lora import STACKED, A, B, LoRA

ADAPTERS, ROWS = "adapters", "adapter_rows"
"""Among the variables: (f32[N,I,R], f32[N,R,O]) by the dotted path of a layer; and i32[B], which of them a row has."""


@dataclasses.dataclass(frozen=True)
class Beside:
    """A model whose layers add the product of each row's adapter; see ``with_adapters``."""

    inner: Any

    def apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:
        """As the model's, of variables with ``ADAPTERS`` and ``ROWS``."""
        own = {name: x for name, x in variables.items() if name not in (ADAPTERS, ROWS)}
        add = functools.partial(_add, variables[ADAPTERS], variables[ROWS])
        with nn.intercept_methods(each(add, (nn.Module,))):
            return self.inner.apply(own, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)


def _add(
    adapters: Mapping[str, Any], row_B: jax.Array, layer: Any, call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    y = call(*args, **kwargs)
    if (found := adapters.get(".".join(layer.path))) is None:
        return y
    a_NIR, b_NRO = found
    x = args[0] if args else kwargs["inputs"]
    x_BLI = x.reshape(*x.shape[:2], -1)
    h_BLR = jnp.einsum("bli,bir->blr", x_BLI, a_NIR[row_B].astype(x.dtype))
    return y + jnp.einsum("blr,bro->blo", h_BLR, b_NRO[row_B].astype(x.dtype)).reshape(y.shape).astype(y.dtype)


def with_adapters(engine: Engine, adapted: Mapping[str, Predictor]) -> Engine:
    """An engine with these adapters, in this order from 1 on, whose base is the engine's, array by array.

    Args:
      adapted: by name, the same model with an adapter around it (``Predictor.with_adapter``).

    Raises:
      UserError: one is no LoRA, or trains more than its products.
    """
    layers: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for n, (name, predictor) in enumerate(adapted.items(), 1):
        task: Any = predictor.task
        params = flatten_dict(unstack_blocks(predictor.variables["params"])) if isinstance(task, LoRA) else {}
        if not params or any(path[-1] not in (A, B) for path in params):
            raise UserError(f"the adapter {name!r} is more than LoRA's products; serve it as a model of its own.")
        for path, a in ((path, x) for path, x in params.items() if path[-1] == A):
            b = np.asarray(params[(*path[:-1], B)], np.float32) * task.scale
            a = np.asarray(a, np.float32).reshape(-1, task.rank)
            layer = ".".join(part for part in path[:-1] if part != STACKED)
            layers.setdefault(layer, []).append((n, a, b.reshape(task.rank, -1)))
    rank = max(predictor.task.rank for predictor in adapted.values())  # type: ignore[attr-defined]
    found: dict[str, Any] = {}
    for layer, products in layers.items():
        _, a, b = products[0]
        a_NIR = np.zeros((len(adapted) + 1, len(a), rank), np.float32)
        b_NRO = np.zeros((len(adapted) + 1, rank, math.prod(b.shape[1:])), np.float32)
        for n, a, b in products:
            a_NIR[n, :, : a.shape[1]], b_NRO[n, : len(b)] = a, b
        found[layer] = jnp.asarray(a_NIR), jnp.asarray(b_NRO)
    new = copy.copy(engine)
    new.model, new.variables = Beside(engine.model), {**engine.variables, ADAPTERS: found}
    return new
