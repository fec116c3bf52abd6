"""Dropout's masks: what they are made of, that they depend on key and place alone, and that they look random."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bigbase_jax.models.bert import Bert
from bigbase_jax.models.dropout import Dropout, _threefry, dropout, random_bits

KEY = jax.random.key(3)
words = functools.partial(np.array, dtype=np.uint32)


def kept(rate, *shape, key=KEY, broadcast_dims=()):
    return np.asarray(dropout(key, jnp.ones(shape), rate, broadcast_dims)) != 0


@pytest.mark.parametrize(  # from the known answers of Random123, Salmon et al.'s own code
    ("rounds", "key", "counter", "answer"),
    [
        (13, (0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
        (13, (0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0xFD36D048, 0x2D17272C)),
        (13, (0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xBA3E4725, 0xF27D669E)),
        (20, (0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_hash_is_threefry(rounds, key, counter, answer):
    arrays = [jnp.asarray(words(x)) for x in (*key, *counter)]
    assert tuple(int(x) for x in _threefry(*arrays, rounds=rounds)) == answer


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_and_the_scale_are_those_asked_for(rate):
    n = 2**18
    y = np.asarray(dropout(KEY, jnp.ones((512, n // 512)), rate))
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - rate)], rtol=1e-6)
    deviation = np.sqrt(rate * (1 - rate) / n)
    assert abs(np.mean(y != 0) - (1 - rate)) < 4 * deviation
    per_row, expected = np.var(np.mean(y != 0, 1)), rate * (1 - rate) / (n // 512)
    assert 0.7 < per_row / expected < 1.3  # rows, and likewise columns, vary as independent draws do
    assert 0.7 < np.var(np.mean(y != 0, 0)) / (rate * (1 - rate) / 512) < 1.3


def test_masks_of_neighbours_keys_and_calls_are_independent():
    keys = [jax.random.fold_in(KEY, i) for i in range(3)]
    a = kept(0.5, 256, 256) * 2.0 - 1
    pairs = {f"moved by {shift}": np.roll(a, shift, (0, 1)) for shift in [(0, 1), (1, 0), (1, 1), (0, 128), (128, 0)]}
    pairs |= {f"key {i}": kept(0.5, 256, 256, key=key) * 2.0 - 1 for i, key in enumerate(keys)}
    pairs |= {"transposed": a.T, "of an adjacent seed": kept(0.5, 256, 256, key=jax.random.key(4)) * 2.0 - 1}
    for name, b in pairs.items():
        assert abs(np.mean(a * b)) < 4.5 / 256, name
    counts = np.bincount(np.asarray(random_bits(KEY, (256, 256))).ravel() >> 28, minlength=16)
    assert np.sum((counts - 4096) ** 2 / 4096) < 45  # chi squared with 15 degrees: 1e-4
    for bit in range(32):
        assert abs(np.mean(np.asarray(random_bits(KEY, (256, 256))) >> bit & 1) - 0.5) < 4.5 / 512, bit


@pytest.mark.parametrize("spec", [("d",), (None, "d"), (None, None, "d"), ("a", "b", None), (None, "b", "a"), ()])
def test_a_mask_does_not_depend_on_the_devices(spec, optimized):
    names = ("a", "b") if {"a", "b"} & set(spec) else ("d",)
    mesh = jax.make_mesh((2, 4) if len(names) == 2 else (8,), names, (jax.sharding.AxisType.Auto,) * len(names))
    x = jax.random.normal(jax.random.key(0), (8, 16, 24))
    alone = dropout(KEY, x, 0.3)
    assert 0 < np.mean(np.asarray(alone) == 0) < 1
    spread = NamedSharding(mesh, PartitionSpec(*spec))
    program = jax.jit(lambda x: dropout(KEY, x, 0.3), in_shardings=spread, out_shardings=spread).lower(x).compile()
    assert "all-" not in program.as_text() and "collective" not in program.as_text()
    np.testing.assert_array_equal(program(jax.device_put(x, spread)), alone)


def test_a_mask_is_the_same_however_it_is_computed():
    x = jax.random.normal(jax.random.key(0), (4, 5, 7))  # no size is even where it matters
    keys = jax.random.split(KEY, 3)
    plain = np.stack([dropout(key, x, 0.4) for key in keys])
    assert not np.array_equal(plain[0], plain[1])
    np.testing.assert_array_equal(jax.jit(dropout, static_argnums=2)(keys[0], x, 0.4), plain[0])
    np.testing.assert_array_equal(jax.vmap(lambda key: dropout(key, x, 0.4))(keys), plain)
    np.testing.assert_array_equal(jax.lax.scan(lambda c, key: (c, dropout(key, x, 0.4)), 0, keys)[1], plain)
    np.testing.assert_array_equal(dropout(keys[0], x[:3], 0.4), plain[0, :3])  # the rows of a smaller batch

    def total(x, form):
        return jnp.sum(jnp.sin(form(lambda x: dropout(keys[0], x, 0.4))(x)))

    grads = [jax.grad(total)(x, form) for form in (lambda f: f, jax.checkpoint, jax.jit)]
    np.testing.assert_array_equal(np.asarray(grads[0]) == 0, plain[0] == 0)
    np.testing.assert_allclose(grads[0], np.where(plain[0] == 0, 0, np.cos(plain[0]) / 0.6), rtol=1e-5, atol=1e-6)
    for other in grads[1:]:
        np.testing.assert_allclose(grads[0], other, rtol=1e-5, atol=1e-6)


def test_the_ends_of_the_range_and_shared_axes():
    x = jnp.ones((4, 6, 8)).at[0, 0, 0].set(jnp.inf)
    assert np.all(np.asarray(dropout(KEY, x, 1.0)) == 0)
    assert Dropout(0.0).apply({}, x) is x
    assert Dropout(0.5, deterministic=True).apply({}, x) is x
    assert np.all(kept(1e-12, 64, 64))  # rounds to a probability of 1
    grad = jax.grad(lambda x: jnp.sum(dropout(KEY, x, 0.5)))(x)
    assert np.all(np.isfinite(grad))
    shared = kept(0.5, 64, 6, 8, broadcast_dims=(1, 2))
    assert 0 < shared.mean() < 1
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[:, :1, :1], shared.shape))
    assert kept(0.5).shape == ()
    assert 0 < kept(0.5, 999).mean() < 1


def test_bfloat16_stays_and_keeps_its_mask():
    x = jnp.full((64, 63), 1.0, jnp.bfloat16)
    y = dropout(KEY, x, 0.1)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y != 0), kept(0.1, 64, 63))


def test_another_kind_of_key_gives_its_own_bits():
    key = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(random_bits(key, (4, 8)), jax.random.bits(key, (4, 8)))
    assert random_bits(KEY, (4, 8)).tolist() != jax.random.bits(KEY, (4, 8)).tolist()


def test_layers_and_steps_have_masks_of_their_own():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Dropout(0.5)(x), Dropout(0.5)(x)

    x = jnp.ones((32, 32))
    steps = [Two().apply({}, x, rngs={"dropout": jax.random.fold_in(KEY, step)}) for step in range(2)]
    masks = [np.asarray(y) for step in steps for y in step]
    for i in range(4):
        for j in range(i):
            assert 0.4 < np.mean(masks[i] == masks[j]) < 0.6, (i, j)
    variables = Bert(vocab_size=8, length=4, width=16, depth=2, heads=2, num_classes=2).init(
        KEY, jnp.ones((1, 4), jnp.int32)
    )
    assert "Dropout" not in str(jax.tree_util.tree_structure(variables))
