"""Adapters: the first step sees the base, only what is named trains, and the merged model is the adapted one.

Axes: B examples, D inputs, H hidden units, R rank.
"""

import copy
import functools
import json
import math
import pathlib
import pickle
import re
import runpy
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import some_slow
from toys import Net, Regression, loss_of, measured, regression_batch

from bigbase_jax import parallel, verbs
from bigbase_jax import train as training
from bigbase_jax.build import target
from bigbase_jax.core import UserError, flatten
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.vit import ViT
from bigbase_jax.plan import hlo
from bigbase_jax.runtime.checkpoint import Checkpoints
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.tasks.language import CausalLanguageModel
from bigbase_jax.wrappers import lora
from bigbase_jax.wrappers.adapter import load_adapter, save_adapter
from bigbase_jax.wrappers.frozen import Frozen
from bigbase_jax.wrappers.layers import beside
from bigbase_jax.wrappers.lora import LoRA
from bigbase_jax.wrappers.mix import Mix

KEY = jax.random.key(0)


def vit(**how):
    how = {"width": 16, "depth": 2, "heads": 4, "mlp_dim": 32, "patch": 4, **how}
    return Classification(ViT(3, **how))


def pictures(size=16, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8)
    return {"image": image, "label": rng.integers(0, 3, size), "mask": np.ones(size, np.float32)}


class Zoo(nn.Module):
    """One of each layer that can be adapted, also as Flax's own transformations hold them."""

    @nn.compact
    def __call__(self, x_BD, train=False):
        x = nn.DenseGeneral((2, 8), name="heads")(x_BD)
        x = nn.DenseGeneral(8, axis=(-2, -1), name="join")(x)
        looped = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = looped(name="looped")(x, None)
        x = nn.remat(Layer)(name="again")(x, None)[0].reshape(-1, 4, 2)
        x = nn.Conv(4, (3,), name="conv")(x)
        x = nn.Conv(4, (3,), feature_group_count=2, name="grouped")(x)
        x = nn.ConvTranspose(4, (2,), (2,), name="up")(x)
        x = nn.Einsum((4, 2, 3), "blc,cde->blde", name="einsum")(x)
        x = nn.DenseGeneral(2, axis=-1, batch_dims=(0,), name="batched")(x.reshape(len(x), -1)[:16])
        return nn.Dense(1, name="out")(jnp.tanh(x))[:, 0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(x.shape[-1], name="dense")(x)), None


def words(size=4):
    tokens = np.random.default_rng(0).integers(0, 11, (size, 9)).astype(np.int32)
    ones = np.ones((size, 8), np.int32)
    places = np.broadcast_to(np.arange(8, dtype=np.int32), (size, 8))
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": ones,
        "positions": places,
        "bytes": ones,
    }
    return {name: jnp.asarray(x) for name, x in {**batch, "mask": np.ones(size, np.float32)}.items()}


DECODER = {"vocab_size": 11, "length": 8, "width": 16, "depth": 2, "heads": 2}
CASES = {
    "everything": (LoRA(vit(), 3, targets="."), pictures()),
    "scanned": (LoRA(vit(scan=True), 3, targets="attention|mlp"), pictures()),
    "scanned again": (LoRA(vit(scan=True, remat=True), 3, targets="out$|down$"), pictures()),
    "computed again": (LoRA(vit(remat=True), 3, targets="query$|up$", modules_to_save="^head"), pictures()),
    "decoder": (LoRA(CausalLanguageModel(Decoder(**DECODER, scan=True)), 3), words()),
    "zoo": (LoRA(Regression(Zoo()), 3, 1.0, targets="."), regression_batch(16)),
}


def born(task, batch=None, seed=0):
    """Fresh variables."""
    return jax.jit(task.init)(jax.random.key(seed), pictures() if batch is None else batch)


def stirred(variables, scale=0.3):
    """With B random instead of zero."""
    rng = np.random.default_rng(7)
    params = jax.tree.map(lambda x: x + jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype), variables["params"])
    return {**variables, "params": params}


def assert_close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def inputs_of(task, batch):
    return {name: batch[name] for name in task.inputs}


@pytest.mark.parametrize("case", some_slow(CASES, "everything", "scanned again", "computed again"))
def test_an_adapted_model_starts_as_its_base_and_merges_into_a_plain_one(case):
    """Also: its gradient is that of the model whose kernels hold the products."""
    task, batch = CASES[case]
    variables = born(task, batch)
    plain = born(task.task, batch)
    assert_equal(task.unwrap(variables), plain)
    names = flatten(variables["params"])
    assert sum(name.endswith("lora_a") for name in names) >= 2
    run, inside = jax.jit(task.predict), jax.jit(task.task.predict)
    inputs = inputs_of(task, batch)
    before = inside(plain, inputs)
    assert_equal(run(variables, inputs), before)

    variables = stirred(variables)
    after, merged = run(variables, inputs), inside(task.unwrap(variables), inputs)
    name = next(name for name, x in before.items() if jnp.issubdtype(x.dtype, jnp.floating))
    assert np.abs(np.asarray(after[name]) - np.asarray(before[name])).max() > 1e-2
    assert_close(after, merged)

    def total(task, of):
        def value(params):
            return loss_of(task, of({**variables, "params": params}), batch, KEY)[0].total

        return jax.jit(jax.value_and_grad(value))(variables["params"])

    own, wanted = total(task, lambda v: v), total(task.task, task.unwrap)
    assert all(np.abs(np.asarray(x)).max() > 1e-4 for x in jax.tree.leaves(wanted[1]))
    assert_close(own, wanted, 1e-4)


def test_the_gradient_is_that_of_the_formula_written_out():
    task, batch = (
        LoRA(Regression(Net(width=8)), 2, alpha=3.0, targets="hidden$", modules_to_save=r"out\.bias"),
        regression_batch(12),
    )
    variables = stirred(born(task, batch))
    base = variables["frozen"]
    assert set(flatten(base)) == {"hidden.bias", "hidden.kernel", "out.kernel"}

    def written_out(a_DR, b_RH, bias):
        h_BH = batch["x"] @ base["hidden"]["kernel"] + base["hidden"]["bias"] + 3.0 / 2 * (batch["x"] @ a_DR) @ b_RH
        y_B = (jnp.tanh(h_BH) @ base["out"]["kernel"] + bias)[:, 0]
        return jnp.sum(batch["mask"] * (y_B - batch["y"]) ** 2)

    def total(params):
        return loss_of(task, {**variables, "params": params}, batch, KEY)[0].total

    hidden, bias = variables["params"]["hidden"], variables["params"]["out"]["bias"]
    loss, grads = jax.jit(jax.value_and_grad(total))(variables["params"])
    want, wanted = jax.value_and_grad(written_out, (0, 1, 2))(hidden["lora_a"], hidden["lora_b"], bias)
    assert_close(loss, want)
    assert_close((grads["hidden"]["lora_a"], grads["hidden"]["lora_b"], grads["out"]["bias"]), wanted)
    assert all(np.abs(x).max() > 1e-2 for x in wanted)


def test_a_starts_uniform_and_b_at_zero():
    task = LoRA(vit(width=64, scan=True), 8, targets="query$|out$")
    variables = born(task)
    block = variables["params"]["encoder"]["blocks"]["~lora"]["attention"]
    assert block["query"]["lora_a"].shape == (2, 64, 8) and block["query"]["lora_b"].shape == (2, 8, 4, 16)
    assert block["out"]["lora_a"].shape == (2, 4, 16, 8) and block["out"]["lora_b"].shape == (2, 8, 64)
    for layer in block.values():
        a = np.asarray(layer["lora_a"])
        assert 0.95 / 8 < np.abs(a).max() <= 1 / 8
        assert abs(a.std() - 1 / 8 / math.sqrt(3)) < 0.01
        assert np.abs(a[0] - a[1]).max() > 0.1
        assert not np.any(layer["lora_b"])
    assert (
        np.abs(np.asarray(block["query"]["lora_a"]) - np.asarray(block["out"]["lora_a"]).reshape(2, 64, 8)).max() > 0.1
    )


def test_parameters_of_half_the_precision_are_adapted_in_it():
    task, batch = LoRA(vit(dtype="bfloat16"), 3, targets="query$|up$"), pictures()
    variables = stirred(born(task, batch))
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    text = jax.jit(task.predict).lower(variables, inputs_of(task, batch)).as_text()
    products = [
        line for line in text.splitlines() if "dot_general" in line and re.search(r"x3xbf16>|<3x\S*bf16>", line)
    ]
    assert len(products) == 8  # two for each of two layers of two blocks
    merged = jax.jit(task.task.predict)(task.unwrap(variables), inputs_of(task, batch))["logits"]
    own = jax.jit(task.predict)(variables, inputs_of(task, batch))["logits"]
    np.testing.assert_allclose(own, merged, atol=0.1)
    assert np.abs(own - merged).max() > 0


# ------------------------------------------------------------------------------------------------------------- dropout


class Copy(nn.Module):
    """Gives what a layer that is zero gives."""

    @nn.compact
    def __call__(self, x_BD, train=False):
        return nn.Dense(x_BD.shape[-1], use_bias=False, kernel_init=nn.initializers.zeros, name="layer")(x_BD)


class Look(Regression):
    def loss(self, variables, batch, key):
        return self.model.apply({"params": variables["params"]}, batch["x"], train=True), {}


def test_dropout_drops_inputs_of_the_adapter_alone():
    task = LoRA(Look(Copy()), 3, alpha=3.0, targets="layer", dropout=0.25)
    batch = {"x": 1 + jnp.arange(3000.0).reshape(1000, 3)}
    variables = born(task, batch)
    eye = {"layer": {"lora_a": jnp.eye(3), "lora_b": jnp.eye(3)}}
    variables = {**variables, "params": eye}
    y, _ = task.loss(variables, batch, KEY)
    ratio = np.asarray(y / batch["x"])
    kept = np.isclose(ratio, 1 / 0.75)
    assert np.all(kept | (ratio == 0)) and abs(kept.mean() - 0.75) < 0.03
    assert_close(task.predict(variables, batch)["y_hat"], batch["x"])
    assert_equal(y, task.loss(variables, batch, KEY)[0])
    assert np.any(y != task.loss(variables, batch, jax.random.key(1))[0])


def test_dropout_differs_between_the_layers_of_a_stack_and_between_steps():
    task, batch = LoRA(vit(scan=True), 3, dropout=0.5, targets="query$"), pictures()
    variables = stirred(born(task, batch))
    masks = []

    def seen(call, args, kwargs, context):
        if isinstance(context.module, nn.DenseGeneral) and context.module.has_variable("params", "kernel"):
            leaves = beside(context.module, lora.A)
            if leaves:
                jax.debug.callback(lambda k: masks.append(np.asarray(k)), jax.random.key_data(leaves["lora_key"]))
        return call(*args, **kwargs)

    with nn.intercept_methods(seen):
        jax.jit(functools.partial(loss_of, task))(variables, batch, KEY)
        jax.effects_barrier()
    assert len(masks) == 2 and np.any(masks[0] != masks[1])

    program, state, _ = trained(task, 1, steps=0, tx=optax.sgd(0.0))
    state = state.replace(params=variables["params"])
    losses = [
        float(program.step(copied(state).replace(step=jnp.int32(n)), pictures())[1]["loss"].mean()) for n in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


# ------------------------------------------------------------------------------------------------------------ training


def copied(state):
    return jax.tree.map(jnp.copy, state)


def trained(task, devices, steps=2, shape=None, tx=None, batches=pictures, **how):
    """(program, state after some steps, losses)."""
    mesh = parallel.make_mesh(devices, parallel.MeshShape(**(shape or {})))
    spec = jax.eval_shape(lambda: batches())
    program = parallel.program(task, tx or optax.adam(0.01), spec, mesh, seed=1, **how)
    state = program.init(parallel.put(batches(), mesh))
    losses = []
    for n in range(steps):
        state, sums = program.step(state, parallel.put(batches(seed=n), mesh))
        losses.append(float(sums["loss"].mean()))
    return program, state, losses


FORMS = {
    "jit": {"devices": 8},
    "shard_map": {"devices": 8, "mode": "shard_map", "ema_decay": 0.9},
    "fsdp": {"devices": 4, "shape": {"fsdp": 2}, "sharding": ("fsdp:16",), "ema_decay": 0.9},
    "fsdp by hand": {
        "devices": 8,
        "shape": {"data": 2, "fsdp": 4},
        "sharding": ("fsdp:16",),
        "mode": "shard_map",
        "microbatches": 2,
    },
    "tensor": {"devices": 8, "shape": {"data": 2, "tensor": 2, "fsdp": 2}, "microbatches": 2},
    "pipeline": {"devices": 4, "shape": {"data": 2, "pipeline": 2}},
}


@pytest.fixture(scope="module")
def plain():
    return {scan: trained(LoRA(vit(scan=scan), 3, modules_to_save="^head"), 1) for scan in (False, True)}


@pytest.mark.parametrize("form", some_slow(FORMS, "tensor", "fsdp by hand"))
def test_every_form_of_the_step_trains_adapters_alike_and_leaves_the_base(form, plain):
    scan = form == "pipeline"
    _, want, losses = plain[scan]
    program, state, other = trained(LoRA(vit(scan=scan), 3, modules_to_save="^head"), **FORMS[form])
    assert_close(losses, other)
    assert_close(want.params, state.params, 1e-4)
    start = jax.device_get(program.init(pictures()))
    assert_equal(start.model_state, jax.device_get(state.model_state))
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), start.params, state.params)
    assert all(x > 1e-3 for name, x in flatten(moved).items() if "lora_a" not in name)
    if FORMS[form].get("ema_decay"):
        assert_equal(state.ema["frozen"], start.model_state["frozen"])
        assert np.any(state.ema["params"]["head"]["kernel"] != state.params["head"]["kernel"])
    spread = [x.sharding.spec for x in jax.tree.leaves(state.model_state["frozen"]) if any(x.sharding.spec)]
    assert len(spread) >= (8 if "shape" in FORMS[form] else 0)


HOW = {"lifted": {"remat": True}, "scanned": {"scan": True, "remat": True}}


@pytest.mark.parametrize("case", some_slow(HOW, "lifted"))
def test_dropout_is_the_same_on_more_devices(case):
    how = HOW[case]
    task = LoRA(vit(**how), 3, targets="attention|mlp", dropout=0.3)
    _, one, losses = trained(task, 1, tx=optax.sgd(0.1))
    _, more, other = trained(task, 4, tx=optax.sgd(0.1), shape={"fsdp": 2}, sharding=("fsdp:16",))
    assert_close(losses, other)
    assert_close(one.params, more.params)
    _, dry, _ = trained(LoRA(vit(**how), 3, targets="attention|mlp"), 1, tx=optax.sgd(0.1))
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (dry.params, one.params)), strict=True)) > 1e-4


def test_the_optimizer_keeps_slots_of_adapters_alone():
    task = LoRA(vit(), 3)
    _, state, _ = trained(task, 1, steps=0)
    adapters = 2 * 2 * (16 * 3 + 3 * 16)
    assert sum(x.size for x in jax.tree.leaves(state.params)) == adapters
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * adapters + 1  # Adam's moments and its count
    assert set(state.model_state) == {"frozen"}


def compiled(task, devices=1, mode="jit", batches=pictures, **how):
    mesh = parallel.make_mesh(devices, parallel.MeshShape(**how.pop("shape", {})))
    spec = jax.eval_shape(lambda: batches())
    program = parallel.program(task, optax.sgd(0.1), spec, mesh, mode=mode, **how)
    return program, program.step.lower(program.state, parallel.placed_batch(spec, mesh)).compile()


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_only_the_gradient_of_adapters_is_reduced(mode):
    program, step = compiled(LoRA(vit(), 3), 8, mode)
    collectives = hlo.Module(step.as_text()).work().collectives
    assert {c.kind for c in collectives} == {"all-reduce"}
    assert (
        sum(c.times * c.nbytes for c in collectives)
        == sum(4 * x.size for x in jax.tree.leaves(program.state.params)) + 8
    )


def test_a_base_in_pieces_is_gathered_and_never_reduced():
    how = {"shape": {"data": 1, "fsdp": 8}, "sharding": ("fsdp:200",), "mode": "shard_map"}
    program, step = compiled(LoRA(vit(), 3), 8, **how)
    collectives = hlo.Module(step.as_text()).work().collectives
    base = [x for x in jax.tree.leaves(program.state.model_state) if any(x.sharding.spec)]
    assert len(base) >= 12 and not any(any(x.sharding.spec) for x in jax.tree.leaves(program.state.params))
    gathered = sum(c.times * c.nbytes for c in collectives if c.kind == "all-gather")
    assert gathered == sum(4 * x.size for x in base)
    rest = sum(c.times * c.nbytes for c in collectives if c.kind != "all-gather")
    assert rest == sum(4 * x.size for x in jax.tree.leaves(program.state.params)) + 8


def test_adapters_and_a_linear_probe_cost_less_than_training_everything():
    size = {"width": 64, "mlp_dim": 256, "depth": 3}
    tasks = vit(**size), LoRA(vit(**size), 2, targets="attention|mlp"), Frozen(vit(**size), "^head")
    full, lora, probe = (parallel.flops(compiled(task)[1]) for task in tasks)
    inference = jax.jit(tasks[0].predict).lower(born(tasks[0]), inputs_of(tasks[0], pictures())).compile()
    forward = parallel.flops(inference)
    assert forward < probe < 1.1 * forward
    assert 2.7 * forward < full
    assert lora < 0.8 * full


def test_batchnorm_statistics_go_on_moving_and_nothing_else_of_the_state():
    task = Frozen(Regression(Net(norm=True)), "^out")
    rows = lambda seed=0: jax.device_get(regression_batch(16, seed))  # noqa: E731
    program, state, _ = trained(task, 8, batches=rows, mode="shard_map", ema_decay=0.9, microbatches=2)
    start = program.init(rows())
    assert set(flatten(state.params)) == {"out.kernel", "out.bias"}
    assert_equal(start.model_state["frozen"], state.model_state["frozen"])
    assert np.any(start.model_state["batch_stats"]["norm"]["mean"] != state.model_state["batch_stats"]["norm"]["mean"])
    assert_equal(task.unwrap(state.variables()).keys(), {"params": 0, "batch_stats": 0}.keys())


def test_frozen_parameters_are_the_models_own():
    task, batch = Frozen(vit(), "block_1|^head"), pictures()
    variables = born(task, batch)
    assert_equal(task.unwrap(variables), born(task.task, batch))
    assert all("block_1" in name or name.startswith("head") for name in flatten(variables["params"]))
    assert not any("block_1" in name for name in flatten(variables["frozen"]))
    total = lambda p: loss_of(task, {**variables, "params": p}, batch, KEY)[0].total  # noqa: E731
    inside = lambda p: loss_of(task.task, {"params": p}, batch, KEY)[0].total  # noqa: E731
    grads = jax.jit(jax.grad(total))(variables["params"])
    whole = jax.jit(jax.grad(inside))(task.unwrap(variables)["params"])
    wanted = flatten(whole)
    for name, grad in flatten(grads).items():
        assert_close(grad, wanted[name])


# ------------------------------------------------------------------------------------------------------- around a task


def test_everything_else_is_the_tasks():
    task, batch = CASES["decoder"]
    variables = stirred(born(task, batch))
    assert (task.inputs, task.batch_coupled) == (task.task.inputs, False)
    assert task.figures == task.task.figures and task.logit_chunks is None
    own, inside = jax.jit(task.log_probability), jax.jit(task.task.log_probability)
    logp = own(variables, batch)
    assert_close(logp, inside(task.unwrap(variables), batch))
    assert np.abs(logp - inside(born(task.task, batch), batch)).max() > 1e-2
    outputs, sums = jax.jit(task.evaluate)(variables, batch)
    assert set(sums) == {"loss", "bits_per_byte"} and task.metrics is task.task.metrics
    host = jax.device_get(dict(outputs))
    one = {name: x[0] for name, x in host.items()}
    assert measured(task, host)["tokens"] == 32 and task.postprocess(one, {})["tokens"] == 8
    assert pickle.loads(pickle.dumps(Frozen(Regression(), "out"))) == copy.deepcopy(Frozen(Regression(), "out"))
    assert not hasattr(LoRA(vit()), "log_probability")
    mixed = LoRA(Mix(vit(), 0.2), 3)
    assert_equal(born(mixed)["frozen"], born(mixed.task)["params"])
    assert jax.jit(functools.partial(loss_of, mixed))(born(mixed), pictures(), KEY)[0].weight == 16


@pytest.mark.parametrize(
    "task", [LoRA(vit(), 3, modules_to_save="^head"), Frozen(vit(), "norm"), Frozen(vit(scan=True), "^head")]
)
def test_place_says_where_each_parameter_of_the_inner_task_lives(task):
    variables = born(task)
    where = {name: ".".join(task.place(name)) for name in flatten(born(task.task)["params"])}
    there = flatten({name: variables[name] for name in ("params", "frozen")})
    assert {name for name in there if "lora_" not in name} == set(where.values())
    assert {name.partition(".")[0] for name in where.values()} == {"params", "frozen"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(vit(), 0), "rank is 0; it is at least 1"),
        (lambda: LoRA(vit(), alpha=0.0), "alpha is 0.0; it is above 0"),
        (lambda: LoRA(vit(), dropout=1.0), r"dropout is 1.0; it lies in \[0, 1\)"),
        (lambda: LoRA(vit(), targets="("), r"targets='\(' is not a regular expression"),
        (lambda: Frozen(vit(), "["), r"trainable='\[' is not a regular expression"),
        (lambda: LoRA(vit(), targets="q_proj"), r"'q_proj' match no layer.* 'encoder.block_\d.\S+' and \d+ more"),
        (
            lambda: LoRA(vit(), modules_to_save="classifier"),
            "modules_to_save='classifier' matches no parameter; there are 'embedding.kernel', ",
        ),
        (
            lambda: Frozen(vit(), "classifier"),
            "trainable='classifier' matches no parameter; there are 'embedding.kernel', ",
        ),
        (lambda: LoRA(Frozen(vit(), "head")), "wraps Frozen, which has frozen parameters already"),
        (lambda: LoRA(Regression(Zoo()), targets="grouped", dropout=0.1), "'grouped', whose adapter is added"),
        (lambda: LoRA(Regression(Odd()), targets="layer"), "'layer', which is none of nn.Dense"),
        (lambda: LoRA(Regression(Odd()), targets="mixed"), "'mixed', whose equation mixes the kernel's axes"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(UserError, match=message):
        task = make()
        jax.eval_shape(task.init, KEY, regression_batch(2) if isinstance(task.task, Regression) else pictures(2))


class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.ones, (3, 3))


class Odd(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Einsum((4, 3), "bd,ed->be", use_bias=False, name="mixed")(Own(name="layer")(x))
        return x[:, 0]


# ------------------------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("scan", [False, True])
def test_an_adapter_comes_back_bit_for_bit(tmp_path, scan):
    task = LoRA(vit(scan=scan), 3, dropout=0.1, modules_to_save="^head")
    variables = stirred(born(task))
    variables["params"]["head"]["bias"] = variables["params"]["head"]["bias"].astype(jnp.bfloat16)
    save_adapter(tmp_path / "a", task, variables)
    fresh = born(task)
    fresh["params"]["head"]["bias"] = fresh["params"]["head"]["bias"].astype(jnp.bfloat16)
    loaded = load_adapter(tmp_path / "a", LoRA(vit(scan=scan), 3, modules_to_save="^head"), fresh)
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(fresh), jax.tree.leaves(loaded), strict=True))
    assert_equal(loaded, variables)
    assert jax.tree.map(lambda x: x.dtype, loaded) == jax.tree.map(lambda x: x.dtype, variables)
    files = {path.name: path.stat().st_size for path in (tmp_path / "a").iterdir()}
    trained = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert set(files) == {"adapter_model.safetensors", "adapter_config.json"}
    assert files["adapter_model.safetensors"] < 4 * trained + 2000 < 4 * sum(x.size for x in jax.tree.leaves(variables))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["rank"], config["alpha"], config["targets"]) == (3, 16.0, "(query|value)$")


def test_an_adapter_of_something_else_is_refused(tmp_path):
    task, batch = LoRA(vit(), 3), pictures()
    variables = born(task, batch)
    save_adapter(tmp_path, task, variables)
    with pytest.raises(UserError, match="was trained on another base"):
        load_adapter(tmp_path, task, born(task, batch, seed=1))
    one = jax.tree.map(jnp.copy, variables)
    one["frozen"]["head"]["bias"] = one["frozen"]["head"]["bias"].at[1].set(1e-3)
    with pytest.raises(UserError, match="was trained on another base"):
        load_adapter(tmp_path, task, one)
    with pytest.raises(UserError, match="has rank=3, and this task rank=4"):
        load_adapter(tmp_path, LoRA(vit(), 4), born(LoRA(vit(), 4)))
    probe = Frozen(vit(), "^head")
    with pytest.raises(UserError, match="has kind='LoRA', and this task kind='Frozen'"):
        load_adapter(tmp_path, probe, born(probe, batch))
    with pytest.raises(UserError, match="there is no adapter in .*nothing: it has no adapter_config.json"):
        load_adapter(tmp_path / "nothing", task, variables)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(tmp_path, task, variables)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the adapter to .*file"):
        save_adapter(tmp_path / "file", task, variables)


def test_statistics_that_moved_are_saved_with_the_adapter(tmp_path):
    task, batch = Frozen(Regression(Net(norm=True)), "^out"), regression_batch(16)
    variables = born(task, batch)
    _, state = jax.jit(functools.partial(loss_of, task))(variables, batch, KEY)
    save_adapter(tmp_path, task, {**state, "params": variables["params"]})
    loaded = load_adapter(tmp_path, task, variables)
    assert np.any(loaded["batch_stats"]["norm"]["mean"] != variables["batch_stats"]["norm"]["mean"])
    assert_equal(loaded, {**state, "params": variables["params"]})


# ----------------------------------------------------------------------------------------------------------- whole runs


def recipe(**how):
    config = runpy.run_path("configs/catdog.py")["get_config"]("tiny,model=vit")
    config.train.devices = 1
    config.train.update({"steps": 4, "eval_every": 2, "checkpoint_every": 2, "keep": 9, "log_every": 1})
    config.task = target(LoRA, task=config.task, rank=2, modules_to_save="^head", dropout=0.1, **how)
    return config


def bits(workdir, step):
    return {name: np.asarray(x).tobytes() for name, x in flatten(Predictor.open(workdir, step).variables).items()}


def test_a_run_trains_goes_on_evaluates_and_predicts(tmp_path, capsys):
    run, again = tmp_path / "run", tmp_path / "again"
    result = training.train(recipe(), str(run))
    assert result["step"] == 4 and 0 <= result["accuracy"] <= 1
    assert verbs.evaluate(str(run)) == result

    shutil.copytree(run, again)
    for step in (s for s in Checkpoints(again / "checkpoints", read_only=True).steps() if s > 2):
        shutil.rmtree(again / "checkpoints" / str(step))
    assert training.train(recipe(), str(again)) == result
    first, last, other = bits(run, 2), bits(run, 4), bits(again, 4)
    assert last == other
    changed = {name for name in last if last[name] != first[name]}
    assert changed == {name for name in last if name.startswith("params.")} and len(changed) == 2 + 4 * 2

    capsys.readouterr()
    from PIL import Image

    Image.new("RGB", (40, 50), (200, 100, 20)).save(tmp_path / "a.png")
    assert verbs.predict(str(run), str(tmp_path / "a.png")) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert pathlib.Path(answer["input"]).name == "a.png"
