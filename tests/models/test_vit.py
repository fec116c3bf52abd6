"""The transformer: published sizes, a block against numpy, causality, stochastic depth; pictures of any shape."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.transformer import Attention, Block, Encoder, sincos2d
from bigbase_jax.models.vit import ViT

TINY = {"width": 16, "depth": 2, "heads": 2, "patch": 4}


def count(model, *shape):
    spec = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(spec["params"]))


@pytest.mark.parametrize(
    ("variant", "published"), [("Ti", 5_717_416), ("S", 22_050_664), ("B", 86_567_656), ("L", 304_326_632)]
)
def test_parameter_counts_are_the_published_ones(variant, published):
    assert count(ViT(1000, variant), 224, 224, 3) == published


def test_parts_given_replace_the_variants():
    assert ViT(3, "S", width=96).size == (96, 12, 6)
    assert ViT(3, depth=2, heads=4).size == (192, 2, 4)
    assert count(ViT(3, **TINY, mlp_dim=8), 8, 8, 3) < count(ViT(3, **TINY), 8, 8, 3)
    assert count(ViT(3, **TINY), 8, 8, 3) - count(ViT(3, **TINY, pool="gap"), 8, 8, 3) == 2 * 16  # token and position


@pytest.mark.parametrize(("pool", "positions"), [("cls", "learned"), ("gap", "sincos2d")])
def test_pictures_need_not_be_square_and_positions_matter(pool, positions):
    model = ViT(3, **{**TINY, "depth": 1}, pool=pool, positions=positions)
    x = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    apply = jax.jit(model.apply)
    logits = apply(variables, x)
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)
    moved = jnp.concatenate([x[:, :, 4:], x[:, :, :4]], 2)  # the same patches elsewhere
    assert np.abs(apply(variables, moved) - logits).max() > 1e-5
    if positions == "learned":
        params = {**variables["params"], "position": jnp.zeros_like(variables["params"]["position"])}
        same = [apply({"params": params}, picture) for picture in (x, moved)]
        np.testing.assert_allclose(*same, rtol=1e-4, atol=1e-5)


def test_sincos2d_is_the_formula():
    h, w, D = 2, 3, 8
    table = sincos2d(h, w, D)
    for y in range(h):
        for x in range(w):
            angles = [[p / 10_000 ** (j / (D // 4 - 1)) for j in range(D // 4)] for p in (x, y)]
            expected = [f(a) for row in angles for f in (math.sin, math.cos) for a in row]
            np.testing.assert_allclose(table[y * w + x], expected, atol=1e-6)


def test_block_is_the_formula():
    B, L, D, H = 2, 5, 8, 2
    x = jax.random.normal(jax.random.key(1), (B, L, D))
    block = Block(H, 12)
    variables = jax.jit(block.init)(jax.random.key(0), x)
    params = jax.tree.map(
        lambda a: np.asarray(a) + 0.1 * np.random.default_rng(0).normal(size=a.shape), variables["params"]
    )
    p = params["attention"]

    def norm(x, p):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    x64 = np.asarray(x, np.float64)
    y = norm(x64, params["norm1"])
    q, k, v = (np.einsum("bld,dhk->blhk", y, p[n]["kernel"]) + p[n]["bias"] for n in ("query", "key", "value"))
    scores = np.exp(np.einsum("bqhk,bshk->bhqs", q, k) / math.sqrt(D // H))
    attended = np.einsum("bhqs,bshk->bqhk", scores / scores.sum(-1, keepdims=True), v)
    x64 = x64 + np.einsum("blhk,hkd->bld", attended, p["out"]["kernel"]) + p["out"]["bias"]
    h = norm(x64, params["norm2"]) @ params["mlp"]["up"]["kernel"] + params["mlp"]["up"]["bias"]
    h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    expected = x64 + h @ params["mlp"]["down"]["kernel"] + params["mlp"]["down"]["bias"]
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    np.testing.assert_allclose(jax.jit(block.apply)({"params": params}, x), expected, rtol=1e-4, atol=1e-4)


def sensitivity(model, x, *args):
    """[L, L]: how much output position i depends on input position j."""
    variables = jax.jit(model.init)(jax.random.key(0), x)
    jacobian = jax.jit(jax.jacobian(lambda x: model.apply(variables, x, *args)[0].sum(-1)))(x)
    return np.abs(np.asarray(jacobian)[:, 0]).max(-1)


def test_a_causal_encoder_does_not_see_the_future():
    x = jax.random.normal(jax.random.key(1), (1, 5, 8))
    future = np.triu(np.ones((5, 5), bool), 1)
    open_, causal = (sensitivity(Encoder(2, 2, 16, causal=c), x) for c in (False, True))
    assert open_[future].min() > 0
    assert causal[future].max() == 0 and causal[~future].min() > 0


def test_masked_keys_are_not_seen():
    x = jax.random.normal(jax.random.key(1), (1, 4, 8))
    mask = jnp.array([True, True, False, True])[None, None, None].repeat(4, 2)
    seen = sensitivity(Attention(2), x, mask)
    assert np.delete(seen[:, 2], 2).max() == 0  # position 2 still asks, so its own output depends on it
    assert np.delete(seen, 2, 1).min() > 0


def test_drop_path_leaves_out_whole_branches_in_training_only():
    x = jax.random.normal(jax.random.key(1), (64, 3, 8))
    block = Block(2, 16, drop_path=0.9)
    variables = jax.jit(block.init)(jax.random.key(0), x)
    y = jax.jit(functools.partial(block.apply, train=True))(variables, x, rngs={"dropout": jax.random.key(2)})
    untouched = np.all(np.asarray(y == x), (1, 2))
    assert 0.6 < untouched.mean() < 0.95  # 0.81 expected: both branches left out
    assert np.all((y != x).any((1, 2)) == (y != x).all((1, 2)))
    plain = [jax.jit(b.apply)(variables, x) for b in (block, Block(2, 16))]
    np.testing.assert_array_equal(*plain)


def test_rematerialisation_changes_nothing_even_with_dropout():
    x = jax.random.normal(jax.random.key(1), (4, 3, 8))
    model = Encoder(1, 2, 16, dropout=0.3)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]

    def loss(params, model):
        y = model.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(5)})
        return jnp.sum(jnp.sin(3 * y))

    results = []
    for remat in (False, True):
        step = jax.jit(jax.value_and_grad(functools.partial(loss, model=model.clone(remat=remat))))
        assert ("remat" in str(step.trace(params).jaxpr)) == remat
        results.append(step(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)


def test_bfloat16_is_close_to_float32():
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    model = ViT(3, **{**TINY, "depth": 1})
    half = model.clone(dtype="bfloat16")
    variables = jax.jit(half.init)(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    a, b = (jax.jit(m.apply)(variables, x) for m in (model, half))
    assert b.dtype == jnp.float32
    assert 0 < np.abs(a - b).max() < 0.03


def test_mistakes_are_told():
    with pytest.raises(ModelError, match="30x32 does not divide into patches of 16x16"):
        ViT(2).init(jax.random.key(0), jnp.zeros((1, 30, 32, 3)))
    with pytest.raises(ModelError, match="192 does not divide over 5 heads"):
        ViT(2, heads=5)
    with pytest.raises(ModelError, match="'Ti', 'S', 'B', 'L'"):
        ViT(2, "T")
    with pytest.raises(ModelError, match="'cls', 'gap', 'map'"):
        ViT(2, pool="mean")
    with pytest.raises(ModelError, match="multiple of 4"):
        sincos2d(2, 2, 6)
