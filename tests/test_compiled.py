"""What the compiled step sends between devices. Golden numbers: a change here is a change of the communication; let it
be on purpose, and then put the new numbers down.
"""

import collections
import importlib.util

import jax
import optax
import pytest
from test_forms import CNN, SHAPES, STACK, VIT

from bigbase_jax import parallel
from bigbase_jax.models.vit import ViT
from bigbase_jax.plan import hlo, topology
from bigbase_jax.tasks.classification import Classification

pytestmark = pytest.mark.usefixtures("optimized")

SUMS = 8  # bytes of the loss: its total and its weight


def compiled(model, devices, mesh=None, **how):
    """(collectives by kind: [count, bytes], bytes of all parameters, bytes of those in pieces, their number)."""
    mesh = parallel.make_mesh(devices, parallel.MeshShape(**(mesh or {})))
    program = parallel.program(Classification(model), optax.sgd(0.1), SHAPES, mesh, **how)
    text = program.step.lower(program.state, parallel.placed_batch(SHAPES, mesh)).compile().as_text()
    found = collections.defaultdict(lambda: [0, 0])
    for collective in hlo.Module(text).work().collectives:
        found[collective.kind][0] += collective.times
        found[collective.kind][1] += collective.times * collective.nbytes
    sizes = [(4 * x.size, any(x.sharding.spec)) for x in jax.tree.leaves(program.state.params)]
    pieces = [size for size, spread in sizes if spread]
    return dict(found), sum(size for size, _ in sizes), sum(pieces), len(pieces)


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_data_parallelism_reduces_the_gradient_once_and_sends_nothing_else(mode):
    found, params, _, _ = compiled(VIT, 8, mode=mode)
    assert found.keys() == {"all-reduce"}
    count, nbytes = found["all-reduce"]
    assert count <= 2  # the gradient and the loss, in one where the compiler fuses them
    assert nbytes == params + SUMS


@pytest.mark.parametrize("model", [VIT, CNN], ids=["vit", "cnn"])
def test_fsdp_gathers_each_parameter_once_and_no_activation(model):
    """The CPU compiler reduces gradients whole and keeps a slice; see the next test for the scatter."""
    found, params, pieces, number = compiled(model, 8, {"data": 1, "fsdp": 8}, sharding=("fsdp:16",))
    assert found["all-gather"] == [number, pieces]
    assert found.keys() == {"all-gather", "all-reduce"}
    assert params <= found["all-reduce"][1] <= params + 200  # and the loss, the gradient's norm, BatchNorm's moments


def test_fsdp_by_hand_scatters_the_gradient_of_each_piece():
    how = {"sharding": ("fsdp:16",), "mode": "shard_map"}
    found, params, pieces, number = compiled(VIT, 8, {"data": 1, "fsdp": 8}, **how)
    assert found["all-gather"] == [number, pieces]
    assert found["reduce-scatter"][1] == pieces
    assert found["all-reduce"][1] <= params - pieces + 200


def test_fsdp_gathers_a_stack_layer_by_layer_in_both_passes():
    found, _, pieces, _ = compiled(STACK, 8, {"data": 1, "fsdp": 8}, sharding=("fsdp:16",))
    assert pieces < found["all-gather"][1] <= 2 * pieces  # what the backward pass needs is gathered again


def test_tensor_parallelism_reduces_activations_twice_per_layer_and_pass():
    """Shoeybi et al. 2019, figure 4: f and g, once each for attention and feed-forward, forward and backward."""
    found, _, _, _ = compiled(VIT, 2, {"tensor": 2})
    assert found.keys() == {"all-reduce"}
    rows, length, width = SHAPES["image"].shape[0], (16 // VIT.patch) ** 2, VIT.width
    activations = 4 * 4 * rows * length * width
    assert activations <= found["all-reduce"][1] <= 1.6 * activations


@pytest.mark.parametrize(
    ("axis", "kind", "count"), [("pipeline", "collective-permute", 16), ("sequence", "collective-permute", 6)]
)
def test_neighbours_pass_activations_on(axis, kind, count):
    model = VIT if axis == "sequence" else STACK
    found, _, _, _ = compiled(model, 2, {axis: 2})
    assert found[kind][0] <= count
    rows, length, width = SHAPES["image"].shape[0], (16 // VIT.patch) ** 2, VIT.width
    assert found.get("all-gather", [0, 0])[1] <= 1.1 * 4 * rows * length * width  # the patches' gradient, once


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed (libtpu)")
def test_the_tpu_compiler_gathers_pieces_and_scatters_gradients_under_jit():
    """Gradients are scattered where they are large; a device sends less than reducing all of them whole would take."""
    devices = topology.devices(topology.parse("v5e:2x4"))
    mesh = parallel.make_mesh(devices, parallel.MeshShape(data=1, fsdp=8))
    model = ViT(num_classes=3, patch=16, width=1024, depth=1, heads=8, dtype="bfloat16")
    spec = {
        "image": jax.ShapeDtypeStruct((64, 224, 224, 3), "uint8"),
        "label": jax.ShapeDtypeStruct((64,), "int32"),
        "mask": jax.ShapeDtypeStruct((64,), "float32"),
    }
    program = parallel.program(Classification(model), optax.sgd(0.1), spec, mesh, sharding=("fsdp",))
    compiled = program.step.lower(program.state, parallel.placed_batch(spec, mesh)).compile()
    work = hlo.Module(compiled.as_text()).work()
    kinds = {collective.kind for collective in work.collectives}
    assert {"all-gather", "reduce-scatter"} <= kinds, kinds
    share = 7 / 8 * sum(2 * x.size for x in jax.tree.leaves(program.state.params))  # both travel as bfloat16
    sent = work.collective_bytes()
    assert 0.7 * share < sent["reduce-scatter"] < share  # small gradients are reduced whole
    assert sent["reduce-scatter"] + sent["all-reduce"] < 1.3 * share  # reducing all of them whole would send 2
    assert 0.9 * share < sent["all-gather"] <= 2 * share  # at most once more for the backward pass
