"""A mesh and rules around a function, as ``parallel`` sets them, for tests of models on simulated devices."""

import contextlib

import flax.linen as nn
import jax
from jax.sharding import AxisType

RULES = (
    ("batch", ("data", "expert")),
    ("length", "sequence"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("layers", "pipeline"),
)


@contextlib.contextmanager
def spread(**sizes):
    """Inside, ``data=2, tensor=4`` devices are the current mesh, and ``RULES`` are active."""
    sizes = {axis: sizes.get(axis, 1) for axis in ("data", "expert", "pipeline", "sequence", "tensor")}
    count = 1
    for size in sizes.values():
        count *= size
    types = (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=jax.devices()[:count])
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh
