"""ResNets: published sizes and outputs, statistics as torch's, precision, rematerialisation."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from bigbase_jax.core import flatten
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.resnet import CifarResNet, FrozenBatchNorm, ResidualBlock, ResNet


def abstract(model, *shape):
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))


def count(model, *shape):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract(model, *shape)["params"]))


@pytest.mark.parametrize(("depth", "published"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_parameter_counts_are_torchvisions(depth, published):
    assert count(ResNet(1000, depth), 224, 224, 3) == published


@pytest.mark.parametrize(
    ("depth", "shortcut", "published"),
    [(20, "pad", 269_722), (56, "pad", 853_018), (20, "conv", 272_474), (56, "conv", 855_770)],
)
def test_parameter_counts_of_the_cifar_resnets(depth, shortcut, published):
    assert count(CifarResNet(10, depth, shortcut=shortcut), 32, 32, 3) == published


def test_names_are_torchvisions_with_underscores():
    names = set(flatten(abstract(ResNet(10, 50), 64, 64, 3)["params"]))
    blocks = [(s + 1, i) for s, n in enumerate((3, 4, 6, 3)) for i in range(n)]
    layers = ["conv1", "bn1"] + [f"layer{s}_{i}.{x}{k}" for s, i in blocks for x in ("conv", "bn") for k in (1, 2, 3)]
    layers += [f"layer{s}_0.downsample_{k}" for s in (1, 2, 3, 4) for k in (0, 1)]
    leaves = [f"{x}.kernel" for x in layers if "conv" in x or x.endswith("downsample_0")]
    leaves += [f"{x}.{leaf}" for x in layers if "bn" in x or x.endswith("downsample_1") for leaf in ("scale", "bias")]
    assert names == {*leaves, "fc.kernel", "fc.bias"}


@pytest.mark.realdata
@pytest.mark.parametrize("depth", [20, 56])
def test_published_weights_give_the_published_logits(real_data, depth):
    folder = real_data / "w_resnet_cifar10"
    theirs = dict(np.load(folder / f"resnet{depth}_state_dict.npz"))
    reference = np.load(folder / "ref_logits_60imgs.npz")
    model = CifarResNet(10, depth)
    names = {"weight": "params.{}.scale", "bias": "params.{}.bias"}
    names |= {"running_mean": "batch_stats.{}.mean", "running_var": "batch_stats.{}.var"}
    ours = {}
    for name, value in theirs.items():
        module, leaf = re.sub(r"(layer\d)\.", r"\1_", name).rsplit(".", 1)
        if value.ndim > 1:  # OIHW -> HWIO, OI -> IO
            ours[f"params.{module}.kernel"] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        else:
            ours[names[leaf].format(module)] = value
    spec = abstract(model, 32, 32, 3)
    assert set(flatten(spec)) == set(ours)
    variables = jax.tree.unflatten(jax.tree.structure(spec), [jnp.asarray(ours[name]) for name in flatten(spec)])
    x = (reference["images_u8"] / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    with jax.default_matmul_precision("highest"):
        logits_NK = jax.jit(model.apply)(variables, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(logits_NK, reference[f"logits_resnet{depth}"], rtol=1e-4, atol=1e-4)
    assert np.mean(np.argmax(logits_NK, -1) == reference["labels"]) > 0.8


@pytest.mark.parametrize("stem", ["imagenet", "cifar", "patch"])
def test_any_size_of_picture(stem):
    out = jax.eval_shape(ResNet(3, 18, 8, stem).init_with_output, jax.random.key(0), jnp.zeros((2, 33, 47, 1)))[0]
    assert (out.shape, out.dtype) == ((2, 3), jnp.float32)


def test_running_statistics_move_as_torchs():
    x = jax.random.normal(jax.random.key(1), (8, 6, 6, 3))
    block = ResidualBlock(3)
    variables = block.init(jax.random.key(0), x, True)
    _, new = block.apply(variables, x, True, mutable=["batch_stats"])
    kernel = variables["params"]["conv1"]["kernel"]
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    statistics = new["batch_stats"]["bn1"]
    old = variables["batch_stats"]["bn1"]
    np.testing.assert_allclose(statistics["mean"], 0.9 * old["mean"] + 0.1 * y.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics["var"], 0.9 * old["var"] + 0.1 * y.var((0, 1, 2)), rtol=1e-4)


def test_zero_init_makes_blocks_start_as_the_identity():
    x = jax.random.uniform(jax.random.key(1), (2, 6, 6, 3))
    for zero_init in (False, True):
        block = ResidualBlock(3, zero_init=zero_init)
        y = block.apply(block.init(jax.random.key(0), x, False), x, False)
        assert bool(jnp.all(y == x)) == zero_init


def test_bfloat16_is_close_to_float32():
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    model, half = CifarResNet(3, 8, 4), CifarResNet(3, 8, 4, dtype="bfloat16")
    variables = jax.jit(half.init)(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    a, b = (jax.jit(m.apply)(variables, x) for m in (model, half))
    assert b.dtype == jnp.float32
    assert 0 < np.abs(a - b).max() < 0.03 * np.abs(a).max()


@pytest.mark.parametrize("model", [CifarResNet(3, 8, 4), ConvNet(3, (4,), 8)])
def test_rematerialisation_changes_nothing_but_memory(model):
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    state = {k: v for k, v in variables.items() if k != "params"}

    def loss(params, model):
        logits, new = model.apply({"params": params, **state}, x, train=True, mutable=list(state))
        return jnp.sum(jnp.sin(logits)), new

    results = []
    for remat in (False, True):
        step = jax.jit(jax.value_and_grad(functools.partial(loss, model=model.clone(remat=remat)), has_aux=True))
        assert ("remat" in str(step.trace(variables["params"]).jaxpr)) == remat
        results.append(step(variables["params"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


def test_mistakes_are_told():
    with pytest.raises(ModelError, match="depth 18, 34, 50"):
        ResNet(2, 20)
    with pytest.raises(ModelError, match="'imagenet', 'cifar', 'patch'"):
        ResNet(2, stem="conv")
    with pytest.raises(ModelError, match="20, 32, 44 or 56"):
        CifarResNet(2, 18)
    with pytest.raises(ModelError, match="'pad' or 'conv'"):
        CifarResNet(2, shortcut="A")
    with pytest.raises(TypeCheckError):
        CifarResNet(2).init(jax.random.key(0), jnp.zeros((32, 32, 3)))


@pytest.mark.parametrize(
    ("model", "strides", "channels"),
    [
        (ResNet(3, 18, 8), (4, 8, 16, 32), (8, 16, 32, 64)),
        (ResNet(None, 50, 4), (4, 8, 16, 32), (16, 32, 64, 128)),
        (CifarResNet(3, 8, 4), (1, 2, 4), (4, 8, 16)),
        (ConvNet(3, (4, 8), dense=0, pool="mean"), (2, 4), (4, 8)),
    ],
)
def test_features_are_what_the_stages_of_a_classifier_give(model, strides, channels):
    x = jnp.ones((1, 64, 96, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, features=True))
    names = set(flatten(variables["params"]))
    assert not any(name.startswith(("fc", "linear", "head")) for name in names)
    found = jax.eval_shape(lambda v: model.apply(v, x, features=True), variables)
    assert [f.shape for f in found] == [(1, 64 // s, 96 // s, c) for s, c in zip(strides, channels, strict=True)]


def test_a_frozen_batchnorm_is_one_in_evaluation_that_nothing_trains():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 3, 4)), jnp.float32)
    frozen, plain = FrozenBatchNorm(), nn.BatchNorm(use_running_average=True)
    variables = jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.5, 2, a.shape)), plain.init(jax.random.key(0), x))
    assert jax.tree.map(np.shape, frozen.init(jax.random.key(0), x)) == jax.tree.map(np.shape, variables)
    np.testing.assert_allclose(frozen.apply(variables, x), plain.apply(variables, x), rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda params: frozen.apply({**variables, "params": params}, x).sum())(variables["params"])
    assert not any(np.any(g) for g in jax.tree.leaves(gradient))
