"""Pools against ``reduce_window``, perceptron and classic CNN: shapes, sizes, dtypes, errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.layers import ModelError, max_pool_2x2, max_pool_3x3
from bigbase_jax.models.mlp import MLP


def count(model, *shape):
    """Number of parameters, without computing them."""
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables["params"]))


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
