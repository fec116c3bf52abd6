"""Convolution, products and GELU against Flax and JAX, pools against ``reduce_window``, perceptron, classic CNN."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbase_jax.models import layers
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.layers import ACTIVATIONS, Conv, ModelError, max_pool_2x2, max_pool_3x3, product
from bigbase_jax.models.mlp import MLP


def count(model, *shape):
    """Number of parameters, without computing them."""
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables["params"]))


def convolved(make, x, words, wrap=lambda f: f):
    """What ``make``'s convolution gives, and its first and second derivatives after both arguments."""
    module = make(5, **words)
    kernel = jax.random.normal(jax.random.key(1), (*words["kernel_size"], x.shape[-1], 5)) / 3

    def bent(x, kernel):
        return jnp.sum(jnp.sin(wrap(lambda x: module.apply({"params": {"kernel": kernel}}, x))(x)))

    def slope(x, kernel):
        return sum(jnp.sum(jnp.cos(g)) for g in jax.grad(bent, (0, 1))(x, kernel))

    program = jax.jit(lambda x, k: (bent(x, k), *jax.grad(bent, (0, 1))(x, k), *jax.grad(slope, (0, 1))(x, k)))
    return program(x, kernel), program.lower(x, kernel).as_text()


SMALL = {"kernel_size": (3, 3), "padding": ((1, 1), (1, 1)), "use_bias": False}


@pytest.mark.parametrize(
    ("size", "changed", "products"),
    [
        ((2, 2), {}, True),
        ((3, 2), {"strides": 2}, True),
        ((4, 4), {"strides": 2}, True),  # only its gradient is smaller than the kernel
        ((2, 3), {"kernel_size": (3, 2), "padding": ((2, 0), (0, 1)), "strides": (1, 2)}, True),
        ((2, 2), {"padding": "SAME"}, True),
        ((4, 4), {"padding": "VALID"}, True),
        ((4, 3), {"padding": ((-1, 1), (1, 2))}, True),
        ((2, 2), {"dtype": jnp.bfloat16}, True),
        ((3, 3), {}, False),
        ((2, 2), {"kernel_size": (1, 1)}, True),
        ((5, 4), {"kernel_size": (1, 1), "strides": 2}, True),
        ((5, 5), {"kernel_dilation": 2, "strides": 2}, False),
        ((2, 2), {"input_dilation": 2}, False),
    ],
)
def test_convolution_is_that_of_flax(size, changed, products):
    words = {**SMALL, **changed}
    if words["kernel_size"] == (1, 1):
        words["padding"] = "VALID"
    x = jax.random.normal(jax.random.key(0), (2, *size, 4))
    (ours, text), (theirs, theirs_text) = convolved(Conv, x, words), convolved(nn.Conv, x, words)
    assert "stablehlo.convolution" in theirs_text
    assert ("stablehlo.convolution" not in text) == products
    tolerance = 2e-2 if "dtype" in changed else 1e-5
    for a, b in zip(ours, theirs, strict=True):
        assert float(jnp.linalg.norm(b)) > 0.1
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.max(jnp.abs(b))))


def test_grouped_convolution_is_left_to_xla():
    x = jnp.ones((1, 2, 2, 4))
    module = Conv(4, (3, 3), feature_group_count=2)
    variables = module.init(jax.random.key(0), x)
    assert "stablehlo.convolution" in jax.jit(module.apply).lower(variables, x).as_text()
    theirs = nn.Conv(4, (3, 3), feature_group_count=2).apply(variables, x)
    np.testing.assert_allclose(module.apply(variables, x), theirs, atol=1e-6)


@pytest.mark.parametrize("how", ["vmap", "remat", "shard_map"])
def test_convolution_goes_through_transformations(how):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    wrap = {
        "vmap": lambda f: lambda x: jax.vmap(f)(x[:, None])[:, 0],
        "remat": jax.checkpoint,
        "shard_map": lambda f: jax.shard_map(f, mesh=mesh, in_specs=rows, out_specs=rows),
    }[how]
    x = jax.random.normal(jax.random.key(0), (2, 2, 2, 4))
    ours, text = convolved(Conv, x, SMALL, wrap)
    theirs, _ = convolved(nn.Conv, x, SMALL)
    assert "stablehlo.convolution" not in text
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_accelerators_get_the_program_that_they_got(monkeypatch, platform):
    x = jnp.ones((2, 2, 2, 4))

    def programs():
        pointwise = {"kernel_size": (1, 1), "use_bias": False}
        return [[convolved(make, x, words)[1] for make in (Conv, nn.Conv)] for words in (SMALL, pointwise)]

    assert all(a != b for a, b in programs())
    monkeypatch.setattr(layers, "platform", lambda: platform)
    assert all(a == b for a, b in programs())


@pytest.mark.parametrize(
    ("features", "axis", "shape"),
    [((3, 4), (-1,), (2, 5, 6)), ((7,), (-2, -1), (2, 5, 3, 4)), ((7,), (-1,), (2, 1, 5, 6)), ((7,), (-1,), (6,))],
)
def test_a_product_of_two_matrices_is_that_of_more_axes(features, axis, shape, monkeypatch):
    x = jax.random.normal(jax.random.key(0), shape)
    reference = nn.DenseGeneral(features, axis=axis)
    ours = reference.clone(dot_general=product)
    params = jax.jit(reference.init)(jax.random.key(1), x)

    def step(dense):
        return jax.jit(jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(dense.apply(params, x))), (0, 1)))

    def text(dense):
        return step(dense).lower(params, x).as_text()

    assert text(ours) != text(reference)  # so the two are computed differently
    for a, b in zip(*(jax.tree.leaves(step(dense)(params, x)) for dense in (ours, reference)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(layers, "platform", lambda: "gpu")
    jax.clear_caches()
    assert text(ours) == text(reference)


def test_gelu_and_its_derivatives_are_jax_s(monkeypatch):
    x = jnp.linspace(-12, 12, 4001)
    reference, ours = functools.partial(jax.nn.gelu, approximate=False), ACTIVATIONS["gelu"]

    def text(f):
        return jax.jit(lambda x: f(x)).lower(x).as_text()

    assert text(ours) != text(reference)
    for _ in range(3):
        np.testing.assert_allclose(jax.vmap(ours)(x), jax.vmap(reference)(x), atol=1e-6)
        ours, reference = jax.grad(ours), jax.grad(reference)
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    assert text(ACTIVATIONS["gelu"]) == text(functools.partial(jax.nn.gelu, approximate=False))


def pool_2x2_reference(x):
    return nn.max_pool(x, (2, 2), (2, 2))


def pool_3x3_reference(x):
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


@pytest.mark.parametrize(
    ("pool", "reference"), [(max_pool_2x2, pool_2x2_reference), (max_pool_3x3, pool_3x3_reference)]
)
@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_pools_and_their_gradients_are_those_of_reduce_window(pool, reference, size):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3)) - 5.0  # negative, so that a border of zeros would show
    np.testing.assert_array_equal(pool(x), reference(x))
    assert np.isnan(pool(x.at[1, 2, 3].set(jnp.nan))).any((0, 1, 2)).all()
    grads = [jax.jit(jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x)))))(x) for f in (pool, reference)]
    assert np.abs(grads[0]).max() > 0.1
    np.testing.assert_allclose(*grads, rtol=1e-6)


@pytest.mark.parametrize(
    ("pool", "reference"), [(max_pool_2x2, pool_2x2_reference), (max_pool_3x3, pool_3x3_reference)]
)
def test_after_a_relu_ties_make_no_difference(pool, reference):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)) - 1.0  # most windows hold nothing but zeros after the ReLU
    assert np.mean(pool(jax.nn.relu(x)) == 0) > 0.1
    grads = [jax.jit(jax.grad(lambda x, f=f: jnp.sum(jnp.exp(f(jax.nn.relu(x))))))(x) for f in (pool, reference)]
    np.testing.assert_allclose(*grads, rtol=1e-6)


def test_parameter_counts_of_the_classic_models():
    assert count(MLP(2), 10, 10, 1) == 100 * 500 + 500 + 500 * 200 + 200 + 200 * 2 + 2
    dense = 28 * 28 * 64 * 1024 + 1024
    assert count(ConvNet(2), 224, 224, 3) == (27 * 64 + 64) + 2 * (576 * 64 + 64) + dense + (1024 * 2 + 2)


@pytest.mark.parametrize("model", [MLP(3, hidden=(8,), activation="relu"), ConvNet(3, stages=(4, 4), dense=8)])
def test_bfloat16_is_close_to_float32_and_parameters_stay_float32(model):
    x = jax.random.uniform(jax.random.key(1), (4, 9, 8, 3))
    half = model.clone(dtype="bfloat16")
    variables = jax.jit(half.init)(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    full_BK, half_BK = (jax.jit(m.apply)(variables, x) for m in (model, half))
    assert half_BK.dtype == jnp.float32
    assert 0 < np.abs(full_BK - half_BK).max() < 0.03 * np.abs(full_BK).max()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("model", [MLP(3, hidden=(8,)), ConvNet(3, stages=(4,), dense=8)])
def test_dropout_is_random_in_training_only(model, dropout):
    model = model.clone(dropout=dropout)
    x = jax.random.uniform(jax.random.key(1), (2, 4, 4, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    a, b = (model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(i)}) for i in range(2))
    assert bool(jnp.any(a != b)) == (dropout > 0)
    np.testing.assert_array_equal(model.apply(variables, x), model.clone(dropout=0.0).apply(variables, x))


def test_mistakes_are_told():
    with pytest.raises(ModelError, match=r"activation is 'rellu'.*'relu'"):
        MLP(2, activation="rellu")
    with pytest.raises(ModelError, match=r"kernel_init is 'xavier'.*'glorot'"):
        ConvNet(2, kernel_init="xavier")
    with pytest.raises(ModelError, match=r"dtype is 'float16'.*'bfloat16'"):
        ConvNet(2, dtype="float16")
    with pytest.raises(ModelError, match="num_classes is None"):
        MLP().init(jax.random.key(0), jnp.zeros((1, 4)))
    with pytest.raises(ModelError, match="4x9 cannot be halved 3 times"):
        ConvNet(2).init(jax.random.key(0), jnp.zeros((1, 4, 9, 1)))


def test_no_gradient_is_lost_where_the_pool_is_fused_with_a_batchnorm(optimized):
    """The compiled gradient is that of one operation after the other, whatever the rounding (see ``_larger``)."""
    model = ConvNet(num_classes=3, stages=(4,), dense=16, norm=True)
    x = jax.random.normal(jax.random.key(0), (16, 16, 16, 3))
    variables = model.init(jax.random.key(1), x)
    params = jax.tree.map(
        lambda a: a + 0.05 * jax.random.normal(jax.random.key(a.size), a.shape), variables["params"]
    )  # a scale of 1 and a shift of 0 would be rounded alike in any case

    def loss(params):
        logits, _ = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[:, 0])

    with jax.disable_jit():
        want = jax.grad(loss)(params)
    assert np.abs(want["stage_0"]["conv_0"]["kernel"]).max() > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jax.jit(jax.grad(loss))(params), want)
