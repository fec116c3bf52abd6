"""Attention over a spread sequence, against jax.nn.dot_product_attention on one device: values, gradients, masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import assert_same, spread

from bigbase_jax.models.attention import attention
from bigbase_jax.models.layers import ModelError

B, L, H, K = 4, 16, 4, 8


def inputs(dtype=jnp.float32):
    return tuple(jax.random.normal(key, (B, L, H, K), dtype) for key in jax.random.split(jax.random.key(0), 4))


def padding_mask():
    """[B, 1, 1, L]: the keys of sequences of different lengths; the first is whole."""
    return (jnp.arange(L) < jnp.array([L, 11, 6, 1])[:, None])[:, None, None]


MASKS = {
    "none": None,
    "padding": padding_mask(),
    "left": padding_mask()[..., ::-1],  # with a causal mask, the first queries see nothing at all
    "pairs": jax.random.bernoulli(jax.random.key(9), 0.3, (B, H, L, L)),
}


def value_and_grads(attend, x, mask):
    """The output and the gradient of a sum over it, whose weights differ for every element."""
    *qkv, weight = x
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask), *qkv)
    return out, pull(weight)


def run(attend, x, mask, **sizes):
    with spread(**sizes):
        step = jax.jit(functools.partial(value_and_grads, attend))
        text = step.lower(x, mask).as_text()
        return jax.device_get(step(x, mask)), text


@functools.cache
def reference(mask, is_causal):
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)
    return jax.device_get(
        jax.jit(functools.partial(value_and_grads, lambda q, k, v, m: attend(q, k, v, mask=m)))(inputs(), MASKS[mask])
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("how", ["ring", "all_gather"])
def test_a_spread_sequence_gives_the_value_and_gradient_of_one_device(how, mask, is_causal):
    attend = functools.partial(attention, is_causal=is_causal, sequence_attention=how)
    ours, text = run(attend, inputs(), MASKS[mask], sequence=4)
    assert ("collective_permute" in text, "all_gather" in text) == (how == "ring", how == "all_gather")
    assert_same(ours, reference(mask, is_causal))
    if is_causal or mask != "none":
        assert np.abs(ours[0] - reference("none", False)[0]).max() > 0.1  # the mask does something


@pytest.mark.parametrize("how", ["ring", "all_gather"])
@pytest.mark.parametrize(
    "sizes",
    [{"sequence": 2}, {"sequence": 8}, {"sequence": 2, "data": 2, "tensor": 2}, {"sequence": 2, "tensor": 4}],
    ids=str,
)
def test_any_number_of_devices_beside_data_and_tensor_axes(how, sizes):
    attend = functools.partial(attention, is_causal=True, sequence_attention=how)
    for mask in ("padding", "pairs"):
        assert_same(run(attend, inputs(), MASKS[mask], **sizes)[0], reference(mask, True))


def test_batch_and_heads_that_do_not_divide_stay_whole():
    x = tuple(a[:1, :, :3] for a in inputs())
    ours, _ = run(attention, x, MASKS["padding"][1:2], sequence=2, data=2, tensor=2)
    theirs = value_and_grads(lambda q, k, v, m: jax.nn.dot_product_attention(q, k, v, mask=m), x, MASKS["padding"][1:2])
    assert_same(ours, jax.device_get(theirs))


@pytest.mark.parametrize("how", ["ring", "all_gather"])
def test_bfloat16_is_as_near_to_float32_as_on_one_device(how):
    x, mask = inputs(jnp.bfloat16), MASKS["padding"]
    exact = reference_of(tuple(a.astype(jnp.float32) for a in x), mask)
    plain = reference_of(x, mask)
    ours, _ = run(functools.partial(attention, is_causal=True, sequence_attention=how), x, mask, sequence=4)
    for a, b, c in zip(*map(jax.tree.leaves, (ours, plain, exact)), strict=True):
        assert a.dtype == jnp.bfloat16
        error, expected = (np.abs(np.float32(y) - c).max() for y in (a, b))
        assert 0 < error < 1.5 * expected


def reference_of(x, mask):
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    return jax.device_get(
        jax.jit(functools.partial(value_and_grads, lambda q, k, v, m: attend(q, k, v, mask=m)))(x, mask)
    )


def test_what_the_ring_keeps_for_the_gradient_does_not_grow_with_the_ring():
    def kept(devices):
        with spread(sequence=devices):
            out = jax.eval_shape(lambda *qkv: jax.vjp(attention, *qkv)[1], *inputs()[:3])
        return sum(leaf.size for leaf in jax.tree.leaves(out))

    whole = 4 * B * L * H * K + 2 * B * H * L + L  # queries, keys, values, output; two numbers a row; places
    assert kept(2) == kept(8) <= whole


def test_without_a_spread_length_the_program_is_that_of_one_device():
    x = inputs()[:3]
    plain = jax.jit(lambda q, k, v: attention(q, k, v)).trace(*x).jaxpr
    with spread(data=2, tensor=2):
        assert str(jax.jit(lambda q, k, v: attention(q, k, v)).trace(*x).jaxpr) == str(plain)
    with spread(sequence=2):
        assert str(jax.jit(lambda q, k, v: attention(q, k, v)).trace(*x).jaxpr) != str(plain)


@pytest.mark.parametrize("how", ["ring", "all_gather"])
def test_few_heads_of_keys_and_a_window_over_a_spread_sequence(how):
    q, k, v, weight = inputs()
    x, words = (q, k[:, :, :2], v[:, :, :2], weight), {"is_causal": True, "window": 3}
    attend = functools.partial(attention, sequence_attention=how, **words)
    plain = jax.device_get(value_and_grads(functools.partial(attention, **words), x, None))
    assert_same(run(attend, x, None, sequence=4, tensor=2)[0], plain)
    near = jnp.tri(L, dtype=bool) & ~jnp.tri(L, k=-3, dtype=bool)
    heads = q, *(jnp.repeat(a, 2, 2) for a in x[1:3])
    np.testing.assert_allclose(plain[0], jax.nn.dot_product_attention(*heads, mask=near[None, None]), atol=1e-5)
    assert np.abs(plain[0] - reference("none", True)[0]).max() > 0.1


def test_a_bias_and_keys_of_another_sequence_over_a_spread_sequence():
    (q, k, v, weight), bias = inputs(), jax.random.normal(jax.random.key(5), (1, H, L, L))
    biased = functools.partial(attention, bias=bias, is_causal=True)
    plain = jax.device_get(value_and_grads(biased, (q, k, v, weight), None))
    assert_same(run(biased, (q, k, v, weight), None, sequence=4)[0], plain)
    assert np.abs(plain[0] - reference("none", True)[0]).max() > 0.1
    x, mask = (q, k[:, :7], v[:, :7], weight), MASKS["padding"][..., :7]
    assert_same(run(attention, x, mask, sequence=4)[0], jax.device_get(value_and_grads(attention, x, mask)))


@pytest.mark.parametrize("heads", [H, 2])
@pytest.mark.parametrize("words", [{}, {"is_causal": True}, {"is_causal": True, "window": 70}, {"window": 3}])
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_cpu_attention_by_blocks_is_that_of_jax(heads, words, masked):
    shape, keys = (2, 256, H, 8), jax.random.split(jax.random.key(1), 6)
    q, k, v, weight = (jax.random.normal(key, shape) for key in keys[:4])
    k, v = k[:, :, :heads], v[:, :, :heads]
    bias = jax.random.normal(keys[4], (1, H, 256, 256)) if masked else None
    mask = jax.random.bernoulli(keys[5], 0.7, (2, 1, 256, 256)) | jnp.eye(256, dtype=bool) if masked else None
    near = (words["window"] - 1, 0) if "window" in words else None
    jaxs = functools.partial(
        jax.nn.dot_product_attention, bias=bias, is_causal="is_causal" in words, local_window_size=near
    )
    ours = functools.partial(attention, bias=bias, **words)
    assert "concatenate" in str(jax.make_jaxpr(ours)(q, k, v)) or "is_causal" not in words  # in several blocks
    got = value_and_grads(lambda q, k, v, m: ours(q, k, v, m), (q, k, v, weight), mask)
    want = value_and_grads(lambda q, k, v, m: jaxs(q, k, v, mask=m), (q, k, v, weight), mask)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_where_cudnn_does_not_take_the_shapes_the_plain_program_runs(monkeypatch):
    x = inputs(jnp.bfloat16)[:3]
    plain = jax.nn.dot_product_attention(*x, is_causal=True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # there is none: cuDNN's refuses to be traced
    np.testing.assert_array_equal(attention(*x, is_causal=True), plain)


def test_mistakes_are_told():
    x = tuple(a[:, :10] for a in inputs()[:3])
    with spread(sequence=4), pytest.raises(ModelError, match="length of 10 does not divide over the 4 devices"):
        attention(*x)
    with pytest.raises(ModelError, match="'ringg'; it is one of 'ring', 'all_gather'"):
        attention(*x, sequence_attention="ringg")
