"""Pipeline parallelism: layers spread over devices, through which slices of the batch flow.

Axes: N layers, S stages of n = N / S layers, B examples, M microbatches of b = B / M, T = M + S - 1 ticks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from bigbase_jax.models.layers import ModelError, mesh_size


def check_stages(depth: int, stages: int) -> None:
    """
    Raises:
      ModelError: ``depth`` layers do not divide over the stages.
    """
    if depth % stages:
        fits = depth // stages * stages + stages
        raise ModelError(f"a depth of {depth} does not divide over {stages} pipeline stages; make it {fits}.")


def pipeline(
    block: Callable[[Any, Array, Any, Array], Array],
    layers: Any,
    x: Array,
    extra: Any,
    microbatches: int,
    axes: tuple[str, ...],
) -> Array:
    """All layers one after the other, each applied by the device that holds it (GPipe, Huang et al. 2019).

    At tick t, stage s works on microbatch t - s and hands it on; S - 1 of the T ticks a stage has nothing to do. What
    it computes then is thrown away before it reaches anybody, and has no gradient.

    Microbatch m takes rows m, m + M, m + 2M, ...: every device of a spread batch keeps its own rows.

    Args:
      block: (layer, x [b, ...], extra, m) -> x [b, ...]: applies one layer to microbatch number m, i32[]. Random masks
        that it draws from ``layer`` and m alone are the same for any number of stages. Finite, with finite derivatives,
        at x = 0.
      layers: tree of arrays [N, ...]; one slice along N is a ``layer``.
      x: [B, ...].
      extra: tree of arrays [B, ...] that every layer reads (masks); each layer gets the microbatch's rows.
      microbatches: M; of the ticks, (S - 1) / (M + S - 1) are idle, so several times S is good.
      axes: mesh axes that hold the stages, of S devices in all; other axes stay with the compiler.

    Returns:
      [B, ...], whole on every stage.

    Raises:
      ModelError: the layers do not divide over the stages, or the batch over microbatches and the devices of a batch.
    """
    shape, M, B = jax.sharding.get_abstract_mesh().shape, microbatches, len(x)
    S = math.prod(shape[axis] for axis in axes)
    check_stages(len(jax.tree.leaves(layers)[0]), S)
    devices = mesh_size("batch")
    if M < 1 or B % (M * devices):
        over = f"{M} microbatches" + (f" x {devices} devices" if devices > 1 else "")
        raise ModelError(f"a batch of {B} does not divide over {over}; change the batch size or pipeline_microbatches.")

    def split(a: Array) -> Array:
        return jnp.swapaxes(a.reshape(B // M, M, *a.shape[1:]), 0, 1)

    def stage(layers_n: Any, x_1Tb: Array, extra_Mb: Any) -> Array:
        s = jax.lax.axis_index(axes)

        def tick(passed_b: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
            t, fresh_b = now
            m = jnp.clip(t - s, 0, M - 1)
            extra_b = jax.tree.map(lambda a: a[m], extra_Mb)
            y_b = jnp.where(s == 0, fresh_b, passed_b)
            y_b, _ = jax.lax.scan(lambda y_b, layer: (block(layer, y_b, extra_b, m), None), y_b, layers_n)
            y_b = jnp.where((t >= s) & (t - s < M), y_b, 0)
            return jax.lax.ppermute(y_b, axes, [(i, i + 1) for i in range(S - 1)]), y_b

        _, y_Tb = jax.lax.scan(tick, jnp.zeros_like(x_1Tb[0, 0]), (jnp.arange(M + S - 1), x_1Tb[0]))
        return y_Tb[None, S - 1 :]

    # The batch enters at the first stage alone and leaves at the last, as parts of arrays with an axis of stages: an
    # input that every stage shares would have its gradient summed over them, of which all but the first give zero.
    x_Mb = split(x)
    x_STb = jnp.pad(x_Mb[None], ((0, S - 1), (0, S - 1), *[(0, 0)] * x.ndim))
    spread = PartitionSpec(axes)
    y_SMb = jax.shard_map(
        stage,
        in_specs=(spread, spread, PartitionSpec()),
        out_specs=spread,
        axis_names=set(axes),
        check_vma=False,
    )(layers, x_STb, jax.tree.map(split, extra))
    return jnp.swapaxes(y_SMb[-1], 0, 1).reshape(x.shape)
