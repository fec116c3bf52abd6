"""A stack of layers over pipeline stages, against one device: values, gradients, masks, dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from meshes import assert_same, spread

from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.pipeline import pipeline
from bigbase_jax.models.transformer import Encoder
from bigbase_jax.models.vit import ViT

B, L, D, N = 8, 6, 8, 4
AXES = ("pipeline",)


def layer_of(layer, x, extra, m):
    return x + jnp.tanh(x @ layer["w"] + layer["b"]) * extra


def toy():
    keys = iter(jax.random.split(jax.random.key(0), 4))
    layers = {"w": jax.random.normal(next(keys), (N, D, D)), "b": jax.random.normal(next(keys), (N, D))}
    return layers, jax.random.normal(next(keys), (B, D)), jax.random.normal(next(keys), (B, 1))


def toy_loss(apply, layers, x, extra):
    return jnp.sum(jnp.sin(apply(layers, x, extra) + jnp.arange(B)[:, None]))


@functools.cache
def toy_on_one_device():
    def apply(layers, x, extra):
        for i in range(N):
            x = layer_of(jax.tree.map(lambda a, i=i: a[i], layers), x, extra, 0)
        return x

    return jax.device_get(jax.jit(jax.value_and_grad(functools.partial(toy_loss, apply), (0, 1, 2)))(*toy()))


@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("stages", [2, 4])
def test_values_and_gradients_are_those_of_one_layer_after_the_other(stages, microbatches):
    def apply(layers, x, extra):
        return pipeline(layer_of, layers, x, extra, microbatches, AXES)

    with spread(pipeline=stages, data=2):
        step = jax.jit(jax.value_and_grad(functools.partial(toy_loss, apply), (0, 1, 2)))
        assert "collective_permute" in step.lower(*toy()).as_text()
        assert_same(jax.device_get(step(*toy())), toy_on_one_device())


def test_a_layer_sees_its_microbatch_with_its_number():
    rows = jnp.arange(8.0)[:, None]

    def block(layer, x, extra, m):
        assert x.shape == (2, 1)
        return x * 10 + m + 0 * extra

    with spread(pipeline=2):
        y = jax.jit(lambda: pipeline(block, jnp.zeros(2), rows, rows, 4, AXES))()
    m = np.arange(8) % 4  # rows m, m + 4
    np.testing.assert_allclose(y[:, 0], np.arange(8) * 100 + m * 11)


def encoder(**attributes):
    return Encoder(N, 2, 16, scan=True, causal=True, pipeline_microbatches=2, **attributes)


@functools.cache
def encoder_inputs():
    k1, k2 = jax.random.split(jax.random.key(1))
    mask = (jnp.arange(L) < jnp.arange(1, B + 1)[:, None])[:, None, None]
    params = jax.jit(encoder().init)(k1, jnp.zeros((1, L, D)))["params"]
    params = jax.tree.map(lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), params)  # no bias is zero
    return params, jax.random.normal(k2, (B, L, D)), mask


def encoder_loss(model, params, x, mask, seed=None):
    train = {} if seed is None else {"train": True, "rngs": {"dropout": jax.random.key(seed)}}
    y = model.apply({"params": params}, x, mask, **train).astype(jnp.float32)
    return jnp.mean(jnp.sin(3 * y) * jnp.arange(1, L + 1)[:, None])


def run(model, seed=None, **sizes):
    params, x, mask = encoder_inputs()
    step = jax.value_and_grad(functools.partial(encoder_loss, model, seed=seed), (0, 1))
    with spread(**sizes) as mesh:
        homes = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params)
        homes["blocks"] = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec(AXES)), params["blocks"])
        return jax.device_get(jax.jit(step)(jax.device_put(params, homes), x, mask))


@functools.cache
def one_device():
    params, x, mask = encoder_inputs()
    return jax.device_get(
        jax.jit(jax.value_and_grad(functools.partial(encoder_loss, encoder()), (0, 1)))(params, x, mask)
    )


@pytest.mark.parametrize(
    ("sizes", "attributes"),
    [
        ({"pipeline": 2}, {}),
        ({"pipeline": 4, "data": 2}, {"remat": True}),
        ({"pipeline": 2, "data": 2, "tensor": 2}, {}),
        ({"pipeline": 2, "data": 2, "sequence": 2}, {"sequence_attention": "ring"}),
        ({"pipeline": 2, "tensor": 2, "sequence": 2}, {"sequence_attention": "all_gather", "remat": True}),
    ],
    ids=str,
)
def test_an_encoder_with_masks_over_stages_is_the_encoder(sizes, attributes):
    assert_same(run(encoder(**attributes), **sizes), one_device())
    assert abs(one_device()[0]) > 1e-3


def test_bfloat16_over_stages_is_as_near_to_float32_as_on_one_device():
    model = encoder(dtype="bfloat16", sequence_attention="all_gather")
    plain, ours = run(model), run(model, pipeline=2, data=2, sequence=2)

    def error(grads):
        pairs = zip(*map(jax.tree.leaves, (grads, one_device())), strict=True)
        return sum(np.sum(np.square(a - b)) for a, b in pairs) ** 0.5

    assert 0 < error(ours) < 1.5 * error(plain)


def test_random_masks_do_not_depend_on_the_number_of_stages():
    model = encoder(dropout=0.3, drop_path=0.3)
    params, x, mask = encoder_inputs()

    def forward(seed, **sizes):
        with spread(**sizes):
            return jax.device_get(jax.jit(functools.partial(encoder_loss, model))(params, x, mask, seed))

    assert_same(forward(3, pipeline=2), forward(3, pipeline=4, data=2))
    assert abs(forward(3, pipeline=2) - forward(4, pipeline=2)) > 1e-4


def test_a_stage_holds_its_layers_only():
    params, x, mask = encoder_inputs()
    with spread(pipeline=4) as mesh:
        whole, part = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), (AXES,)))
        homes = {
            name: jax.tree.map(lambda _, h=(part if name == "blocks" else whole): h, p) for name, p in params.items()
        }
        step = jax.jit(
            jax.grad(functools.partial(encoder_loss, encoder())),
            in_shardings=(homes, whole, whole),
            out_shardings=homes,
        )
        compiled = step.lower(params, x, mask).compile()
    held = compiled.memory_analysis().argument_size_in_bytes - (x.nbytes + mask.nbytes)
    every = sum(a.nbytes for a in jax.tree.leaves(params["blocks"]))
    assert held < every / 4 * 1.2
    assert "all-gather" not in compiled.as_text()  # no stage asks for another's layers


def test_mistakes_are_told():
    x = jnp.zeros((6, L, D))
    with spread(pipeline=4):
        with pytest.raises(ModelError, match="depth of 6 does not divide over 4 pipeline stages; make it 8"):
            jax.eval_shape(Encoder(6, 2, 16, scan=True).init, jax.random.key(0), x)
        with pytest.raises(ModelError, match="layers over 4 devices, but the blocks are not stacked; set scan"):
            jax.eval_shape(Encoder(4, 2, 16).init, jax.random.key(0), x)
    model = encoder(dtype="float32")
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    with (
        spread(pipeline=2, data=2),
        pytest.raises(ModelError, match="batch of 6 does not divide over 2 microbatches x 2 dev"),
    ):
        jax.eval_shape(model.apply, params, x)
    with spread(pipeline=2), pytest.raises(ModelError, match="batch of 6 does not divide over 4 microbatches; "):
        jax.eval_shape(model.clone(pipeline_microbatches=4).apply, params, x)


def test_a_vit_over_stages_starts_from_one_picture():
    model = ViT(3, width=16, depth=2, heads=2, patch=4, scan=True, pipeline_microbatches=2)
    x = jax.random.normal(jax.random.key(2), (4, 8, 8, 3))
    plain = jax.jit(model.init)(jax.random.key(0), x[:1])
    with spread(pipeline=2, data=2):
        shapes = jax.eval_shape(lambda key: model.init(key, x[:1]), jax.random.key(0))
        logits = jax.jit(lambda v: model.apply(v, x))(plain)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, plain)
    assert_same(jax.device_get(logits), jax.device_get(jax.jit(model.apply)(plain, x)))
