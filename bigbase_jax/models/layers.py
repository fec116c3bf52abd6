"""What the models share: words for dtypes, activations and initialisers, convolution, pools, logical axes, the error.

A model says which of its axes are "batch", "length", "heads", "mlp", "layers" or "width"; where each lives is said by
the rules around it (``nn.logical_axis_rules``) and the mesh (``jax.set_mesh``), and nothing moves where there are none.

Axes: B examples, H height, W width, C channels, D channels of the output, h and w: H and W over the stride, k and l:
height and width of a kernel, P: k x l x C.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

T = TypeVar("T")

DTYPES: Mapping[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _gelu(x: Array) -> Array:
    """GELU (Hendrycks & Gimpel 2016); on a CPU by erf, as PyTorch, which costs less there than erfc."""
    if platform() == "cpu" and x.dtype == jnp.float32:
        return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: Mapping[str, Callable[..., Any]] = {
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": _gelu,
    "gelu_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # of CLIP's published weights
    "silu": jax.nn.silu,
}
INITS: Mapping[str, Callable[..., Any]] = {
    "he": nn.initializers.he_normal(),  # He et al. 2015b, for ReLU
    "glorot": nn.initializers.glorot_uniform(),  # Glorot & Bengio 2010, for tanh
    "glorot_sigmoid": nn.initializers.variance_scaling(16.0, "fan_avg", "uniform"),  # 4x: a sigmoid's slope is 1/4
    "lecun": nn.initializers.lecun_normal(),
    "torch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # of its Linear and Conv2d
}


class ModelError(ValueError):
    """A model that cannot be built, or cannot read arrays of this shape; a task shows it as the user's mistake."""


def look_up(table: Mapping[str, T], name: str, what: str) -> T:
    """``table[name]``.

    Raises:
      ModelError: there is no such name; lists those there are.
    """
    if name not in table:
        raise ModelError(f"{what} is {name!r}; it is one of {', '.join(map(repr, table))}.")
    return table[name]


def classes(num_classes: int | None) -> int:
    """``num_classes``, which a config may leave to the data.

    Raises:
      ModelError: it is still None, or not positive.
    """
    if num_classes is None or num_classes < 1:
        raise ModelError(f"the model's num_classes is {num_classes}; give it the number of classes.")
    return num_classes


def platform() -> str:
    """What is compiled for: "cpu", "gpu", "tpu"; of the current mesh, or else JAX's default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def mesh_axes(logical_name: str) -> tuple[str, ...]:
    """The mesh axes, of more than one device, that the active rules spread ``logical_name`` over; () without rules.

    Axes that a ``shard_map`` around has split by hand are left out: inside it, an array is what one device holds.
    """
    return _mesh_axes((logical_name,))[0]


def mesh_size(logical_name: str) -> int:
    """Over how many devices the active rules spread ``logical_name``; 1 without rules or mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh_axes(logical_name))


def constrain(x: Array, *logical_names: str | None) -> Array:
    """``x``, laid out over the devices as the active rules say of its axes' names; None is an axis kept whole.

    Nothing at all is added to the program where no name is spread over more than one device.
    """
    axes = _mesh_axes(logical_names)
    if not any(axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(names or None for names in axes)))


def _mesh_axes(logical_names: tuple[str | None, ...]) -> list[tuple[str, ...]]:
    mesh = jax.sharding.get_abstract_mesh()  # also that of a concrete mesh which jax.set_mesh made current
    spec = () if mesh.empty else nn.logical_to_mesh_axes(logical_names) or ()
    spread = {name for name, size in mesh.shape.items() if size > 1} - set(mesh.manual_axes)
    axes = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    return [tuple(axis for axis in names if axis in spread) for names in axes] or [()] * len(logical_names)


def convolution(
    x_BHWC: Float[Array, "B H W C"],
    kernel_klCD: Float[Array, "k l _ D"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **words: Any,
) -> Float[Array, "B h w D"]:
    """``jax.lax.conv_general_dilated`` as ``nn.Conv`` calls it; on a CPU a product where the kernel is 1x1 or large.

    For the weight gradient of a 1x1 convolution XLA's CPU compiler copies the picture and its gradient into another
    layout, which a product does not need (ResNet-50's step has 84 copies in place of 188). It exchanges picture and
    kernel where the kernel has more places than the picture, or its gradient, and has no library for what comes of it:
    a 3x3 convolution of 512 channels at 2x2 pixels takes 70 times as long as the product with the picture's patches
    (im2col; Chellapilla et al. 2006). GPUs and TPUs run the program they did.
    """
    size, kernel = x_BHWC.shape[1:3], kernel_klCD.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(size, kernel, strides, padding)
    out = [(sum(pad) + n - k) // stride + 1 for n, k, stride, pad in zip(size, kernel, strides, padding, strict=True)]
    plain = words["feature_group_count"] == 1 and {*words["lhs_dilation"], *words["rhs_dilation"]} == {1}
    library = 1 < math.prod(kernel) <= min(map(math.prod, (size, out)))
    if platform() != "cpu" or not plain or library or min(out) < 1:
        return jax.lax.conv_general_dilated(x_BHWC, kernel_klCD, strides, padding, **words)
    borders = [(0, 0, 0), *((*pad, 0) for pad in padding), (0, 0, 0)]
    padded = jax.lax.pad(x_BHWC, jnp.zeros((), x_BHWC.dtype), borders)
    spans = [(n - 1) * stride + 1 for n, stride in zip(out, strides, strict=True)]
    patches_BhwP = jnp.concatenate(
        [
            padded[:, i : i + spans[0] : strides[0], j : j + spans[1] : strides[1]]
            for i, j in itertools.product(*map(range, kernel))
        ],
        -1,
    )
    kernel_PD = kernel_klCD.reshape(-1, kernel_klCD.shape[-1])
    return product(patches_BhwP, kernel_PD, (((3,), (0,)), ((), ())), words["precision"])


Conv = functools.partial(nn.Conv, conv_general_dilated=convolution)
"""``nn.Conv`` of pictures."""


def product(x: Array, kernel: Array, dimensions: Any, precision: Any = None, **kwargs: Any) -> Array:
    """``jax.lax.dot_general`` for a layer: the last axes of ``x`` by the first of ``kernel``; on a CPU as two matrices.

    With more axes XLA's CPU compiler copies the activations, the gradients and the kernel into other layouts for each
    gradient. Where devices share a sequence, "length" stays an axis.
    """
    if platform() == "cpu" and not mesh_axes("length"):
        n = len(dimensions[0][0])
        free = (*x.shape[: x.ndim - n], *kernel.shape[n:])
        width = math.prod(kernel.shape[:n])
        y = jax.lax.dot(x.reshape(-1, width), kernel.reshape(width, -1), precision=precision, **kwargs)
        return y.reshape(free)
    return jax.lax.dot_general(x, kernel, dimensions, precision, **kwargs)


def max_pool_2x2(x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """2x2 maxima at stride 2; an odd last row or column is left out, as torch's ``MaxPool2d(2)`` does.

    Written over reshaped axes because the gradient of ``reduce_window`` is slow on CPUs (the classic CNN's step takes
    1.2x as long), and by ``_larger`` because of what that says. Of equal maxima the first gets the gradient, as there.
    On a CPU the second maximum is picked by a sum, which the compiler stores (YNNPACK): comparisons would be computed
    anew, with what comes before, by each operation that reads them, such as the transposed copy for the next
    convolution's weight gradient. Not by a maximum over the axis, because that of YNNPACK loses NaN.
    """
    B, H, W, C = x_BHWC.shape
    x = x_BHWC[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C)
    left, right = x[:, :, :, :, 0], x[:, :, :, :, 1]
    rows = _larger(left, right)
    if platform() != "cpu":
        return _larger(rows[:, :, 0], rows[:, :, 1])
    picked = _is_larger(rows[:, :, :1], rows[:, :, 1:]) == jnp.array([True, False]).reshape(2, 1, 1)
    return jnp.sum(jnp.where(picked, rows, 0), 2)


def _larger(a: Any, b: Any) -> Any:
    """The elementwise maximum; NaN where either is. Its gradient goes to one of the two, whatever the rounding.

    That of ``jnp.maximum`` and of a maximum over an axis goes where an element equals the maximum. A compiler may
    compute the elements anew for that comparison and round them otherwise (with a fused multiply-add, say): then none
    is equal, and gradients are lost. XLA's CPU compiler of JAX 0.12 does so where a BatchNorm comes before the pool.
    """
    return jnp.where(_is_larger(a, b), a, b)


def _is_larger(a: Any, b: Any) -> Any:
    return (a >= b) | (a != a)


def max_pool_3x3(x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """3x3 maxima at stride 2 with a border of -inf, as torch's ``MaxPool2d(3, 2, padding=1)``; h and w round up.

    One axis after the other, as maxima of elements 2 i - 1, 2 i and 2 i + 1: the gradient takes 1/4 to 1/9 of
    ``reduce_window``'s time on a CPU. What ``max_pool_2x2`` says of ties holds here too.
    """
    return _max_of_three(_max_of_three(x_BHWC, 1), 2)


def _max_of_three(x: Any, axis: int) -> Any:
    def pad(x: Any, before: int, after: int) -> Any:
        widths = [(before, after) if i == axis else (0, 0) for i in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=-jnp.inf)

    pairs = pad(x, 0, x.shape[axis] % 2)
    pairs = pairs.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    even, odd = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    before = pad(jax.lax.slice_in_dim(odd, 0, odd.shape[axis] - 1, axis=axis), 1, 0)
    return _larger(_larger(before, even), odd)
