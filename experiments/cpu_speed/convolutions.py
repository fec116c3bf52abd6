"""Convolutions and their two gradients on a CPU by YNNPACK, by Eigen, and as products of shifted rows or patches.

python experiments/cpu_speed/convolutions.py

Prints milliseconds, the least of seven; "kernel" and "input" are the gradients. Alone, without what a model has around.
"""

import functools
import itertools
import time

import jax
import jax.numpy as jnp

FLAG = "xla_cpu_experimental_ynn_fusion_type"
LIBRARIES = {
    "YNNPACK": {FLAG: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"},
    "Eigen": {FLAG: ""},
}
SHAPES = (  # batch, pixels, channels in and out, kernel, stride
    (4, 224, 64, 64, 3, 1),
    (4, 112, 64, 64, 3, 1),
    (32, 96, 24, 24, 3, 1),
    (32, 48, 48, 48, 3, 1),
    (32, 32, 128, 128, 3, 1),
    (128, 32, 16, 16, 3, 1),
    (32, 16, 64, 64, 3, 1),
    (32, 64, 3, 64, 7, 2),
    (4, 56, 64, 256, 1, 1),
    (32, 4, 256, 512, 3, 2),
    (32, 2, 512, 512, 3, 1),
)
FORM = ("NHWC", "HWIO", "NHWC")


def convolve(x, kernel, stride):
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=FORM)


def patches(x, kernel, stride, rows=True):
    """The columns of a kernel's places side by side, and its rows too; else a list of arrays, one a row."""
    k, out = kernel.shape[0], -(-x.shape[1] // stride)
    x = jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    span = (out - 1) * stride + 1
    x = jnp.concatenate([x[:, :, j : j + span : stride] for j in range(k)], -1)
    x = [x[:, i : i + span : stride] for i in range(k)]
    return jnp.concatenate(x, -1) if rows else x


def by_patches(x, kernel, stride):
    return jnp.tensordot(patches(x, kernel, stride), kernel.reshape(-1, kernel.shape[-1]), 1)


def by_rows(x, kernel, stride):
    pieces = patches(x, kernel, stride, rows=False)
    return sum(jnp.tensordot(row, k.reshape(-1, k.shape[-1]), 1) for row, k in zip(pieces, kernel, strict=True))


def milliseconds(f, *args, options):
    f = jax.jit(f, compiler_options=options).lower(*args).compile()
    taken = []
    for _ in range(8):
        began = time.perf_counter()
        jax.block_until_ready(f(*args))
        taken.append(time.perf_counter() - began)
    return 1e3 * min(taken[1:])


for batch, pixels, width, out, side, stride in SHAPES:
    x = jax.random.normal(jax.random.key(0), (batch, pixels, pixels, width))
    kernel = jax.random.normal(jax.random.key(1), (side, side, width, out))
    dy = convolve(x, kernel, stride)
    print(f"{batch} x {pixels}^2 x {width} -> {out}, {side}x{side}, stride {stride}", flush=True)
    ways = itertools.chain(
        ((name, convolve, options) for name, options in LIBRARIES.items()),
        (("rows", by_rows, LIBRARIES["Eigen"]), ("patches", by_patches, LIBRARIES["Eigen"])),
    )
    for name, way, options in ways:
        if way is by_patches and x.size * side**2 > 2**27:
            continue
        y = functools.partial(way, stride=stride)
        forward = milliseconds(y, x, kernel, options=options)
        to_kernel = milliseconds(
            lambda x, k, dy, y=y: jax.vjp(lambda k: y(x, k), k)[1](dy)[0], x, kernel, dy, options=options
        )
        to_input = milliseconds(
            lambda x, k, dy, y=y: jax.vjp(lambda x: y(x, k), x)[1](dy)[0], x, kernel, dy, options=options
        )
        print(f"  {name:8} forward {forward:7.1f}  kernel {to_kernel:7.1f}  input {to_input:7.1f}", flush=True)
