"""A mesh and rules around a function, as ``parallel`` sets them, for tests of models on simulated devices."""

import contextlib
import functools
import math

import flax.linen as nn
import jax
import numpy as np
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
    devices, token_type_ids = jax.devices()[: math.prod(sizes.values())], (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=token_type_ids, devices=devices)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh


def assert_same(ours, theirs, tolerance=1e-5):
    """Two trees agree to an absolute plus a relative ``tolerance``."""
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), ours, theirs)
