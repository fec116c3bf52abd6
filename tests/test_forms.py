"""Real models through every form of the step: each equals the plain step on one device, with masks that are uneven."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbase_jax import parallel
from bigbase_jax.core import UserError
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.vit import ViT
from bigbase_jax.tasks.classification import Classification

ROWS = 16
VIT = ViT(num_classes=3, patch=8, width=16, depth=1, heads=2, pool="gap")
STACK = VIT.clone(depth=4, scan=True, pipeline_microbatches=2)
CNN = ConvNet(num_classes=3, stages=(4,), dense=16, norm=True)
SHAPES = {
    "image": jax.ShapeDtypeStruct((ROWS, 16, 16, 3), jnp.float32),
    "label": jax.ShapeDtypeStruct((ROWS,), jnp.int32),
    "mask": jax.ShapeDtypeStruct((ROWS,), jnp.float32),
}


def batch_of(step):
    """Rows of which an uneven number is padding, more on some devices than on others."""
    rng = np.random.default_rng(step)
    return {
        "image": rng.normal(size=SHAPES["image"].shape).astype(np.float32),
        "label": rng.integers(0, 3, ROWS, dtype=np.int32),
        "mask": (np.arange(ROWS) < ROWS - 5 + step).astype(np.float32) * (np.arange(ROWS) != 2),
    }


def built(model, devices=1, mesh=None, tx=None, **how):
    mesh = parallel.make_mesh(devices, parallel.MeshShape(**(mesh or {})))
    tx = tx or optax.sgd(0.1, momentum=0.9)
    return mesh, parallel.program(Classification(model), tx, SHAPES, mesh, seed=1, **how)


def begun(model, **form):
    """A fresh state, as the form makes it."""
    mesh, program = built(model, **form)
    return program.init(parallel.put(batch_of(0), mesh))


@functools.cache
def plainly_begun(model):
    return begun(model)


def train(model, steps=2, start=None, **form):
    """(losses, parameters, model state) after some steps, as numpy; from a state that is put where it lives."""
    mesh, program = built(model, **form)
    if start is None:
        state = begun(model, **form)
    else:  # a copy, since the step donates it
        state = jax.tree.map(lambda x, where: jax.device_put(jnp.copy(x), where.sharding), start, program.state)
    losses = []
    start = jax.device_get(state.params)
    for step in range(steps):
        state, sums = program.step(state, parallel.put(batch_of(step), mesh))
        losses.append(float(sums["loss"].mean()))
    after = jax.device_get((state.params, state.model_state))
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(after[0]), strict=True)]
    assert max(moved) > 1e-2  # there is something to compare
    return np.array(losses), *after


@functools.cache
def plain(model):
    return train(model, start=plainly_begun(model))


def assert_close(got, want, tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), got, want)


PIECES = {"devices": 8, "mesh": {"fsdp": 4}, "sharding": ("fsdp:16",)}
BOTH = {"devices": 8, "mesh": {"fsdp": 2, "tensor": 2}, "sharding": ("tensor", "fsdp:16")}


@pytest.mark.parametrize(
    ("model", "form"),
    [
        pytest.param(CNN, {"devices": 8}, marks=pytest.mark.slow),  # the next is more of it
        (CNN, PIECES),
        (CNN, {**PIECES, "mode": "shard_map"}),
        (VIT, {**BOTH, "microbatches": 2}),
        (
            STACK,
            {"devices": 8, "mesh": {"fsdp": 2, "pipeline": 2, "sequence": 2}, "sharding": ("pipeline", "fsdp:16")},
        ),
        pytest.param(STACK, {"devices": 4, "mesh": {"pipeline": 4}}, marks=pytest.mark.slow),
        (STACK, {"devices": 8, "mesh": {"pipeline": 2, "tensor": 2}, "microbatches": 2}),
        pytest.param(STACK, {**BOTH, "microbatches": 2}, marks=pytest.mark.slow),
        (VIT, {"devices": 8, "mesh": {"sequence": 4}}),
        (VIT.clone(sequence_attention="all_gather"), {"devices": 8, "mesh": {"sequence": 2, "tensor": 2}}),
        pytest.param(VIT, {"devices": 8, "mode": "shard_map"}, marks=pytest.mark.slow),
        pytest.param(VIT, PIECES, marks=pytest.mark.slow),
        (VIT, {**PIECES, "mode": "shard_map"}),
        pytest.param(VIT, {"devices": 2, "mesh": {"tensor": 2}}, marks=pytest.mark.slow),
        (VIT, {"devices": 4, "microbatches": 2}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, (ViT, ConvNet)) else str(value),
)
def test_where_and_in_what_pieces_a_step_is_computed_changes_nothing(model, form):
    assert_close(train(model, start=plainly_begun(model), **form), plain(model), 1e-4)


@pytest.mark.parametrize(("model", "form"), [(CNN, PIECES), (STACK, BOTH)], ids=["cnn", "stack"])
def test_a_state_is_born_in_pieces_as_it_is_whole(model, form):
    assert_close(*(jax.device_get(s.params) for s in (begun(model, **form), plainly_begun(model))), 1e-6)


@pytest.mark.parametrize("model", [VIT, CNN], ids=["vit", "cnn"])
def test_rematerialisation_changes_nothing(model):
    assert_close(train(model.clone(remat=True)), plain(model), 1e-5)


@pytest.mark.parametrize("model", [VIT, CNN], ids=["vit", "cnn"])
def test_bfloat16_compute_stays_near_float32_without_loss_scaling(model):
    """Parameters, gradients' sums and the loss stay float32; bfloat16 has float32's range, so nothing underflows."""
    losses, params, _ = train(model.clone(dtype="bfloat16"))
    wanted, _, _ = plain(model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert np.abs(losses - wanted).max() > 0
    np.testing.assert_allclose(losses, wanted, rtol=3e-2)


@pytest.mark.usefixtures("optimized")
def test_clipping_and_adam_see_the_global_gradient():
    """Norms and moments are taken over all pieces, not over a device's own."""
    tx = optax.chain(optax.clip_by_global_norm(0.05), optax.adam(0.02))
    want = train(CNN, tx=tx)
    got = train(CNN, tx=tx, **PIECES, mode="shard_map")
    assert_close(got[0], want[0], 1e-4)
    assert_close(got[1], want[1], 1e-3)  # Adam divides tiny gradients by their size


@pytest.mark.usefixtures("optimized")
def test_the_state_is_donated():
    mesh = parallel.make_mesh(1)
    program = parallel.program(Classification(CNN), optax.sgd(0.1), SHAPES, mesh)
    state = program.init(parallel.put(batch_of(0), mesh))
    before = jax.tree.leaves(state.params)
    program.step(state, parallel.put(batch_of(0), mesh))
    assert all(x.is_deleted() for x in before)
    memory = program.step.lower(program.state, parallel.placed_batch(SHAPES, mesh)).compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state.params))
    assert memory.alias_size_in_bytes >= size  # the new parameters are written where the old ones were


@pytest.mark.parametrize(
    ("model", "mesh", "sentence"),
    [
        (VIT, {"sequence": 8}, "a length of 4 does not divide over the 8 devices"),
        (STACK, {"pipeline": 8}, "does not divide"),
        (VIT.clone(depth=8), {"pipeline": 8}, "the blocks are not stacked; set scan"),
        (STACK.clone(pipeline_microbatches=3), {"pipeline": 4}, "a batch of 16 does not divide over 3 microbatches"),
    ],
)
def test_a_model_that_does_not_fit_the_mesh_says_so_in_one_sentence(model, mesh, sentence):
    with pytest.raises(UserError, match=sentence):
        train(model, devices=8, mesh=mesh)
