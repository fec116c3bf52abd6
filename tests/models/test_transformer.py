"""The scanned encoder against the unrolled one, what rematerialisation keeps, and activations spread over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from meshes import assert_same, spread

from bigbase_jax.core import flatten
from bigbase_jax.models.layers import ModelError, constrain, mesh_axes, mesh_size
from bigbase_jax.models.transformer import Block, Encoder, stack_blocks, unstack_blocks
from bigbase_jax.models.vit import ViT

B, L, D = 4, 6, 8


def x_and_mask():
    mask = (jnp.arange(L) < jnp.array([L, 4, 2, 1])[:, None])[:, None, None]
    return jax.random.normal(jax.random.key(1), (B, L, D)), mask


def loss(params, x, mask, model, seed=None):
    train = {} if seed is None else {"train": True, "rngs": {"dropout": jax.random.key(seed)}}
    return jnp.mean(jnp.sin(3 * model.apply({"params": params}, x, mask, **train)) * jnp.arange(1, L + 1)[:, None])


# -- one stack of blocks -----------------------------------------------------------------------------------------------


def test_the_scanned_encoder_is_the_unrolled_one():
    (x, mask), model = x_and_mask(), Encoder(3, 2, 16, causal=True)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    scanned = model.clone(scan=True)
    stack = stack_blocks(params)
    spec = jax.eval_shape(scanned.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, stack) == jax.tree.map(jnp.shape, spec)
    plain, ours = (jax.jit(jax.value_and_grad(functools.partial(loss, model=m), (0, 1))) for m in (model, scanned))
    assert "while" in ours.lower(stack, x, mask).as_text() and "while" not in plain.lower(params, x, mask).as_text()
    value, (grads, dx) = plain(params, x, mask)
    assert_same(ours(stack, x, mask), (value, (stack_blocks(grads), dx)))


def test_stacking_and_unstacking_are_inverse_wherever_the_encoder_is():
    model = ViT(3, width=8, depth=11, heads=2, patch=4)  # so that block_10 must not come before block_2
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.float32(random.normal(size=leaf.shape)), shapes)
    stack = stack_blocks(params)
    for i in range(11):
        kernel = params["encoder"][f"block_{i}"]["mlp"]["up"]["kernel"]
        np.testing.assert_array_equal(stack["encoder"]["blocks"]["mlp"]["up"]["kernel"][i], kernel)
    assert {"cls", "embedding", "head", "position"} < set(stack)
    back = unstack_blocks(stack)
    assert set(flatten(back)) == set(flatten(params)) != set(flatten(stack))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert unstack_blocks(back) == back and stack_blocks(stack) == stack


def test_every_layer_of_a_stack_starts_as_a_block_of_its_own():
    x = jnp.zeros((1, 2, 64))
    params = jax.jit(Encoder(4, 2, 128, scan=True).init)(jax.random.key(0), x)["params"]
    stack, block = flatten(params["blocks"]), flatten(jax.jit(Block(2, 128).init)(jax.random.key(7), x)["params"])
    assert set(stack) == set(block)
    for name, leaf in block.items():
        assert stack[name].shape == (4, *leaf.shape)
        deviations = np.std(stack[name].reshape(4, -1), axis=1)
        np.testing.assert_allclose(deviations, np.std(leaf), rtol=0.5 if leaf.ndim == 1 else 0.05)
        if name.endswith("kernel"):
            assert len(np.unique(stack[name].reshape(4, -1)[:, 0])) == 4


def test_drop_path_grows_linearly_over_a_stack():
    depth, rows = 3, 1024
    model = Encoder(depth, 1, 4, drop_path=0.8, scan=True)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1, D)))["params"]
    params = jax.tree.map(jnp.zeros_like, params)
    params["norm"]["scale"] = jnp.ones(D)
    params["blocks"]["mlp"]["down"]["bias"] = jnp.eye(depth, D)  # layer i adds 1 to element i, where it is not left out
    y = jax.jit(functools.partial(model.apply, train=True))(
        {"params": params}, jnp.zeros((rows, 1, D)), rngs={"dropout": jax.random.key(1)}
    )[:, 0]
    added = (y[:, :depth] - y[:, -1:]) / (y[:, :1] - y[:, -1:])  # the last norm undone: nothing was added to the last
    rates = np.array([0.0, 0.4, 0.8])
    np.testing.assert_allclose(np.mean(added > 0.5, 0), 1 - rates, atol=0.05)
    np.testing.assert_allclose(np.max(added, 0), 1 / (1 - rates), rtol=1e-3)


def test_dropout_of_a_stack_is_random_in_training_only():
    (x, mask), model = x_and_mask(), Encoder(2, 2, 16, dropout=0.3, drop_path=0.3, scan=True)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    step = jax.jit(functools.partial(loss, model=model))
    a, b, again = (step(params, x, mask, seed=seed) for seed in (0, 1, 0))
    assert a == again and abs(a - b) > 1e-4
    assert step(params, x, mask) == jax.jit(functools.partial(loss, model=Encoder(2, 2, 16, scan=True)))(
        params, x, mask
    )


# -- rematerialisation -------------------------------------------------------------------------------------------------

POLICIES = ("nothing_saveable", "dots_with_no_batch_dims_saveable", "dots_saveable", "everything_saveable")


@pytest.mark.parametrize("scan", [False, True])
def test_policies_keep_more_or_less_and_give_the_same_gradients(scan):
    (x, mask), plain = x_and_mask(), Encoder(2, 2, 16, dropout=0.3, scan=scan)
    params = jax.jit(plain.init)(jax.random.key(0), x)["params"]

    def gradient(model):
        return jax.jit(jax.value_and_grad(functools.partial(loss, x=x, mask=mask, model=model, seed=5)))(params)

    def kept(model):
        pull = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, x, mask, model, 5), p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    expected, sizes = gradient(plain), []
    for policy in POLICIES:
        model = plain.clone(remat=True, remat_policy=policy)
        sizes.append(kept(model))
        if policy in ("nothing_saveable", "dots_saveable"):
            assert_same(gradient(model), expected)
    assert sizes == sorted(set(sizes))  # each keeps more than the one before


# -- over devices ------------------------------------------------------------------------------------------------------


def constrained(*shape, names):
    return "sharding_constraint" in str(jax.make_jaxpr(lambda x: constrain(x, *names))(jnp.zeros(shape)))


def test_logical_axes_are_those_of_the_rules_that_have_devices():
    names = ("batch", "length", "width")
    assert (mesh_axes("batch"), mesh_size("batch"), constrained(4, 4, 4, names=names)) == ((), 1, False)
    with spread(data=2, expert=2, tensor=2):
        assert mesh_axes("batch") == ("data", "expert") and mesh_size("batch") == 4
        assert mesh_axes("heads") == ("tensor",)
        assert mesh_axes("length") == mesh_axes("width") == mesh_axes("unheard_of") == ()
        assert constrained(4, 4, 4, names=names) and constrained(4, 4, names=("length", "mlp"))
        assert not constrained(4, 4, names=("length", "width")) and not constrained(4, names=(None,))
    with spread():
        assert mesh_size("batch") == 1 and not constrained(4, 4, 4, names=names)
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):  # a mesh, but no rules
        assert mesh_axes("batch") == () and not constrained(4, 4, 4, names=names)


def test_inside_a_shard_map_nothing_is_split_again():
    seen = []

    def body(x):
        seen.append((mesh_axes("batch"), mesh_axes("heads")))
        return constrain(x, "batch", "width")

    with spread(data=4, tensor=2):
        half = PartitionSpec("data")
        step = jax.shard_map(body, in_specs=half, out_specs=half, axis_names={"data"}, check_vma=False)
        assert "sharding_constraint" not in str(jax.make_jaxpr(step)(jnp.zeros((4, 4))))
    assert seen[0] == ((), ("tensor",))


MEGATRON = {  # the axis of each parameter of a block that tensor devices share (Shoeybi et al. 2019)
    "attention.query.kernel": 1,
    "attention.key.kernel": 1,
    "attention.value.kernel": 1,
    "attention.query.bias": 0,
    "attention.key.bias": 0,
    "attention.value.bias": 0,
    "attention.out.kernel": 0,
    "mlp.up.kernel": 1,
    "mlp.up.bias": 0,
    "mlp.down.kernel": 0,
}


def test_a_block_over_tensor_devices_sums_once_after_each_branch():
    x, mask = x_and_mask()
    block = Block(4, 16)
    params = jax.jit(block.init)(jax.random.key(0), x)["params"]
    plain = jax.jit(block.apply)({"params": params}, x, mask)
    with spread(tensor=4) as mesh:

        def home(name):
            axis = MEGATRON.get(name)
            return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "tensor"))

        names = flatten(params)
        assert set(MEGATRON) < set(names)
        homes = jax.tree.unflatten(jax.tree.structure(params), [home(name) for name in names])
        step = jax.jit(
            lambda params, x, mask: block.apply({"params": params}, x, mask), in_shardings=(homes, None, None)
        )
        compiled = step.lower(params, x, mask).compile()
        text = compiled.as_text()
        assert_same(compiled(jax.device_put(params, homes), x, mask), plain)
    assert text.count(" all-reduce(") == 2
    assert not any(f" {op}(" in text for op in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize(
    ("sizes", "attributes"),
    [
        ({"data": 2, "tensor": 4}, {"pool": "cls"}),
        ({"data": 2, "sequence": 4}, {"pool": "gap", "sequence_attention": "ring"}),
        (
            {"data": 2, "sequence": 2, "tensor": 2},
            {"pool": "gap", "sequence_attention": "all_gather", "scan": True, "remat": True},
        ),
    ],
    ids=str,
)
def test_a_vit_over_devices_is_the_vit(sizes, attributes):
    model = ViT(3, width=16, depth=2 if "scan" in attributes else 1, heads=4, patch=4, **attributes)
    x = jax.random.normal(jax.random.key(2), (4, 8, 8, 3))
    params = jax.jit(model.init)(jax.random.key(0), x[:1])["params"]

    def loss(params, x):
        return jnp.sum(jnp.sin(5 * model.apply({"params": params}, x)) * jnp.arange(1.0, 5.0)[:, None])

    plain = jax.device_get(jax.jit(jax.value_and_grad(loss))(params, x))
    with spread(**sizes):
        step = jax.jit(jax.value_and_grad(lambda params, x: loss(params, x)))
        assert "sharding_constraint" in str(step.trace(params, x).jaxpr)
        assert_same(jax.device_get(step(params, x)), plain)


def test_mistakes_are_told():
    with pytest.raises(ModelError, match=r"remat_policy is 'dots'; it is one of 'nothing_saveable', 'dots_saveable'"):
        ViT(3, remat_policy="dots")
    with pytest.raises(ModelError, match=r"sequence_attention is 'all'.*'ring', 'all_gather'"):
        Encoder(2, 2, 16, sequence_attention="all")
    x = jnp.zeros((2, 8, 8, 3))
    with spread(sequence=2), pytest.raises(ModelError, match="length of 5 does not divide over the 2 devices"):
        jax.eval_shape(ViT(3, width=16, depth=1, heads=2, patch=4).init, jax.random.key(0), x)
