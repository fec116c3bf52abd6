"""Low-rank adapters beside a model's kernels: see ``wrapper``.

Adapters of the kernel ``encoder.block_0.attention.query.kernel`` are ``lora_a`` and ``lora_b`` beside it. A model that
keeps a stack of layers as one parameter and applies another module to its slices (``Encoder(scan=True)``) has them
below ``STACKED`` in it, where each slice brings its own.

Shapes: a kernel is [*lead, *in, *out]; ``lora_a`` [*lead, *in, rank], ``lora_b`` [*lead, rank, *out]. ``lead`` are
axes of layers or batches, ``in`` those that the input is summed over.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bigbase_jax.core import Batch, Loss, UserError, Variables
from bigbase_jax.models.dropout import dropout
from bigbase_jax.parallel import FROZEN
from bigbase_jax.wrappers.layers import KERNEL, KINDS, STACKED, beside, each, kernel_axes
from bigbase_jax.wrappers.sparse import Sparse
from bigbase_jax.wrappers.wrapper import Path, Wrapper, check_regex, some_paths

A, B, KEY = "lora_a", "lora_b", "lora_key"
_LAYERS = (*KINDS, nn.ConvTranspose, nn.Einsum)


@dataclasses.dataclass(frozen=True)
class LoRA(Wrapper):
    """Low-rank adaptation (Hu et al. 2021): a product of two thin matrices is trained beside each of some kernels.

    ``y = frozen(x) + alpha / rank * (dropout(x) @ A) @ B``; A starts uniform within ``1 / sqrt(inputs)``, as in the
    authors' code, and B at zero, so that the first step sees the base. The products run beside the calls of
    ``nn.Dense``, ``nn.DenseGeneral`` and ``nn.Conv``: no gradient of a kernel's size is formed. ``nn.Einsum``,
    ``nn.ConvTranspose`` and what is grouped, masked or batched among the others get ``A @ B`` added to their kernels,
    and cost that gradient; so does everything around ``Sparse``, whose zeros stay zeros in the sum.

    Weight decay reaches adapters where ``optim.decay_mask`` names them (``"kernel$|lora_"``).

    Attributes:
      task: the task.
      rank: width of the products.
      alpha: their scale is ``alpha / rank``, so that the learning rate need not be tuned again for another rank.
      targets: a regex over the paths of layers (``"encoder.block_0.attention.query"``), searched for; a stack of layers
        has ``"encoder.blocks.attention.query"``.
      dropout: rate on the input of A in training. The slices of a pipelined batch share their mask.
      modules_to_save: a regex over paths of parameters that are trained in full beside the adapters, such as
        ``"^head"`` where the head is fresh; None: none.

    Raises:
      UserError: a value out of range, or (from ``init``) a regex that matches nothing or what cannot be adapted.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = "(query|value)$"
    dropout: float = 0.0
    modules_to_save: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"LoRA's rank is {self.rank}; it is at least 1, for example 8.")
        if not self.alpha > 0:
            raise UserError(f"LoRA's alpha is {self.alpha}; it is above 0, for example twice the rank.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA's dropout is {self.dropout}; it lies in [0, 1), for example 0.1.")
        check_regex("targets", self.targets)
        check_regex("modules_to_save", self.modules_to_save or "")

    @property
    def scale(self) -> float:
        """Of the products."""
        return self.alpha / self.rank

    def trains(self, path: str) -> bool:
        return self.modules_to_save is not None and bool(re.search(self.modules_to_save, path))

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """The base is that of the inner task at the same key.

        Raises:
          UserError: a regex matches nothing, or a layer that cannot be adapted.
        """
        layers: list[_Layer] = []
        with nn.intercept_methods(each(functools.partial(self._note, layers), _LAYERS)):
            trained, frozen, rest = self._init(key, batch)
        if self.modules_to_save is not None and not trained:
            raise UserError(
                f"LoRA's modules_to_save={self.modules_to_save!r} matches no parameter; there are {some_paths(frozen)}."
            )
        kernels = {path[:-1]: x for path, x in frozen.items() if path[-1] == KERNEL}
        chosen = {path: x for path, x in kernels.items() if re.search(self.targets, ".".join(path))}
        if not chosen:
            raise UserError(
                f"LoRA's targets={self.targets!r} match no layer with a kernel; there are {some_paths(kernels)}."
            )
        adapters = {}
        for path, kernel in chosen.items():
            home, lead, inputs = self._split_of(path, kernel, layers)
            a_key = jax.random.fold_in(key, zlib.crc32(".".join((*path, A)).encode()))
            limit = 1 / math.sqrt(math.prod(kernel.shape[lead:inputs]))
            a_shape = (*kernel.shape[:inputs], self.rank)
            adapters[(*home, A)] = jax.random.uniform(a_key, a_shape, jnp.float32, -limit, limit)
            adapters[(*home, B)] = jnp.zeros((*kernel.shape[:lead], self.rank, *kernel.shape[inputs:]), jnp.float32)
        return {"params": unflatten_dict({**trained, **adapters}), FROZEN: unflatten_dict(frozen), **rest}

    def _split_of(self, path: Path, kernel: Any, layers: Sequence[_Layer]) -> tuple[Path, int, int]:
        """Where the adapters of a kernel live, its number of axes before the inputs, and that before the outputs."""
        name, shape = ".".join(path), tuple(kernel.shape)
        fitting = [
            layer
            for layer in layers
            if path[len(path) - len(layer.path) :] == layer.path
            and shape[len(shape) - len(layer.shape) :] == layer.shape
        ]
        if not fitting:
            known = ", ".join(f"nn.{kind.__name__}" for kind in _LAYERS)
            raise UserError(f"LoRA's targets={self.targets!r} match {name!r}, which is none of {known}; leave it out.")
        layer = max(fitting, key=lambda layer: len(layer.path))
        outer = path[: len(path) - len(layer.path)]
        if layer.inputs is None or (outer and layer.lifted):
            why = (
                "whose equation mixes the kernel's axes" if layer.inputs is None else "a lifted layer inside of a stack"
            )
            raise UserError(f"LoRA's targets={self.targets!r} match {name!r}, {why}; leave it out.")
        if self.dropout and layer.summed:
            raise UserError(
                f"LoRA's targets={self.targets!r} match {name!r}, whose adapter is added to its kernel, where dropout "
                f"cannot be; leave it out, or set dropout (now {self.dropout}) to 0."
            )
        stack = len(shape) - len(layer.shape)
        home = (*outer, STACKED, *layer.path) if outer else path
        return home, stack + layer.lead, stack + layer.inputs

    def unwrap(self, variables: Variables) -> Variables:
        """The variables of the task inside, with each product added to its kernel, in float32."""
        whole = super().unwrap(variables)
        params = flatten_dict(whole["params"])
        for path in _adapters(params):
            a, b = params.pop(path), params.pop((*path[:-1], B))
            params[_kernel(path)] = _added(params[_kernel(path)], a, b, self.scale)
        return {**whole, "params": unflatten_dict(params)}

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        trained = variables
        if self.dropout:  # each adapter's key goes to it as a leaf beside it, to each layer of a stack its own
            params, base = flatten_dict(variables["params"]), flatten_dict(variables[FROZEN])
            for path in _adapters(params):
                own = jax.random.fold_in(key, zlib.crc32(".".join((*path[:-1], KEY)).encode()))
                a, b = params[path], params[(*path[:-1], B)]
                lead = a.shape[: _lead(a, b, base[_kernel(path)])]
                params[(*path[:-1], KEY)] = jax.random.split(own, lead) if lead else own
            trained = {**variables, "params": unflatten_dict(params)}
        loss, state = self._run(self.task.loss, trained, batch, key)
        return loss, {**state, FROZEN: variables[FROZEN]}

    def _run(self, method: Callable[..., Any], variables: Variables, /, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(each(self._beside, _LAYERS)):
            return method(super().unwrap(variables), *args, **kwargs)

    @functools.cached_property
    def _masked(self) -> bool:
        """Whether zeros of the kernels are to stay."""
        task: Any = self.task
        while task is not None and not isinstance(task, Sparse):
            task = vars(task).get("task")
        return task is not None

    def _note(self, layers: list[_Layer], layer: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Keeps what a layer's initialisation shows of it."""
        y = call(*args, **kwargs)
        shape: tuple[int, ...] = tuple(layer.get_variable("params", KERNEL).shape)
        lead, inputs = kernel_axes(layer, len(shape), *args[1:], **kwargs)
        summed = self._masked or _is_summed(layer)
        layers.append(_Layer(tuple(layer.path), shape, lead, inputs, summed, bool(layer.scope.root.path)))
        return y

    def _beside(self, layer: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer's output with that of its adapter, if it has one."""
        leaves = beside(layer, A)
        if not leaves:
            return call(*args, **kwargs)
        if self._masked or _is_summed(layer):
            own = {name: x for name, x in layer.variables["params"].items() if name not in (A, B)}
            kernel = _added(own[KERNEL], leaves[A], leaves[B], self.scale)
            own[KERNEL] = jnp.where(own[KERNEL] == 0, 0, kernel) if self._masked else kernel
            return layer.clone(parent=None).apply({"params": own}, *args, **kwargs)
        y, x = call(*args, **kwargs), args[0] if args else kwargs["inputs"]
        if KEY in leaves:
            x = dropout(leaves[KEY], x, self.dropout)
        thin: Any = layer.clone(parent=None, features=self.rank, use_bias=False)
        h = thin.apply({"params": {KERNEL: leaves[A]}}, x) * self.scale
        more = jnp.tensordot(h, leaves[B].astype(h.dtype), 1, precision=layer.precision)
        return y + more.astype(y.dtype)


# --------------------------------------------------------------------------------------------- layers and their kernels


class _Layer(NamedTuple):
    """What an initialisation shows of a layer.

    Attributes:
      path: within the outermost module that was applied: of the whole model, or of a block alone.
      shape: of its kernel there.
      lead, inputs: axes of the kernel before its inputs, and before its outputs; None: they are not in this order.
      summed: the adapter is added to the kernel.
      lifted: it is in a transformed module, such as ``nn.remat``'s, which hides what is around.
    """

    path: Path
    shape: tuple[int, ...]
    lead: int
    inputs: int | None
    summed: bool
    lifted: bool


def _is_summed(layer: Any) -> bool:
    """Whether an adapter cannot run beside the layer, and is added to its kernel."""
    if isinstance(layer, nn.Conv):
        return layer.feature_group_count != 1 or layer.mask is not None
    if isinstance(layer, nn.DenseGeneral):
        return bool(layer.batch_dims)
    return not isinstance(layer, nn.Dense)


def _adapters(params: Mapping[Path, Any]) -> list[Path]:
    """Paths of all ``lora_a``."""
    return [path for path in params if path[-1] == A]


def _kernel(path: Path) -> Path:
    """The path of the kernel that an adapter's leaf belongs to."""
    return (*(part for part in path[:-1] if part != STACKED), KERNEL)


def _lead(a: Any, b: Any, kernel: Any) -> int:
    """How many axes the three have in common."""
    return a.ndim + b.ndim - 2 - kernel.ndim


def _added(kernel: Any, a: Any, b: Any, scale: float) -> jax.Array:
    """``kernel + scale * a @ b``, computed in float32; of the kernel's dtype."""
    lead = a.shape[: _lead(a, b, kernel)]
    a_matrix, b_matrix = (jnp.asarray(x, jnp.float32) for x in (a, b))
    a_matrix = a_matrix.reshape(*lead, -1, a.shape[-1])
    product = jnp.matmul(a_matrix, b_matrix.reshape(*lead, a.shape[-1], -1), precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)).astype(kernel.dtype)
