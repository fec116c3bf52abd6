"""What the losses of a batch cost a device in memory, by XLA's own account of the compiled gradient.

Nothing is computed.

python experiments/clip/memory.py
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bigbase_jax import parallel
from bigbase_jax.tasks import in_batch

WIDTH = 512


def temporary(loss: str, B: int, devices: int) -> float:
    """Megabytes on each device, beside the vectors and their gradients."""
    mesh = parallel.make_mesh(devices)

    def of(u, v):
        rest = (jnp.float32(-10.0),) if loss == "sigmoid" else ()
        return jnp.sum(getattr(in_batch, loss)(u, v, jnp.float32(10.0), *rest, jnp.ones(B))) / B

    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", "data"),)):
        rows = PartitionSpec("data")
        step = jax.jit(jax.value_and_grad(of, (0, 1)), in_shardings=(rows, rows), out_shardings=(None, (rows, rows)))
        like = jax.ShapeDtypeStruct((B, WIDTH), jnp.float32)
        return step.lower(like, like).compile().memory_analysis().temp_size_in_bytes / 1e6


for B in (1024, 4096, 16_384, 65_536):
    row = [f"{temporary(loss, B, n):,.0f}" for loss in ("clip", "sigmoid") for n in (1, 8)]
    print(f"| {B:,} | {' | '.join(row)} |", flush=True)
