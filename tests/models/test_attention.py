"""Attention over a spread sequence, against jax.nn.dot_product_attention on one device: values, gradients, masks."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import assert_same, spread

from bigbase_jax.models.attention import _CODES, attention, within_segments
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.decoder import Decoder
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


def segments(length=L):
    """[B, length]: in pieces of different lengths, with padding (0) at the end of all but the first; one piece returns,
    and one has the greatest number."""
    ends = jnp.array([[0, 0, 0, length], [3, 5, 11, 14], [1, 2, 6, 7], [2, 6, 9, 12]])
    number = jnp.sum(jnp.arange(length)[None, :, None] >= ends[:, None], -1)
    return jnp.take_along_axis(
        jnp.array([[1, 1, 1, 1, 0], [1, 2, 3, 4, 0], [7, 2, 7, 3, 0], [1, 2, 12_869, 3, 0]]), number, 1
    )


def masked_by(segment_ids):
    return (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]


@pytest.mark.parametrize("words", [{}, {"is_causal": True, "local_window_size": (5, 0)}], ids=str)
def test_codes_of_segments_give_the_value_and_gradient_of_their_mask(words):
    attend = functools.partial(jax.nn.dot_product_attention, **words)
    for dtype, heads in ((jnp.float32, H), (jnp.bfloat16, 2)):
        q, k, v, weight = inputs(dtype)
        x = 30 * q, k[:, :, :heads], v[:, :, :heads], weight  # scores far apart
        mask = masked_by(segments())
        masked = value_and_grads(lambda q, k, v, m: attend(q, k, v, mask=m), x, mask)
        coded = value_and_grads(lambda q, k, v, _: within_segments(attend, segments(), q, k, v), x, None)
        plain = value_and_grads(lambda q, k, v, _: attend(q, k, v), x, None)
        assert np.abs(np.float32(masked[0]) - np.float32(plain[0])).max() > 0.1
        assert coded[0].dtype == dtype
        for a, b in zip(jax.tree.leaves(coded), jax.tree.leaves(masked), strict=True):
            np.testing.assert_allclose(np.float32(a), np.float32(b), atol=1e-5)


def test_no_code_covers_another():
    assert {int(n).bit_count() for n in _CODES} == {8}  # of as many, a different one leaves out some
    assert len(np.unique(_CODES)) == 12_870


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """As if this were an H100 with cuDNN, up to the lowered program."""
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr("bigbase_jax.models.attention.platform", lambda: "gpu")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: capability <= "9.0")
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)


LONG = 44  # no other size of a program is as long


def cuda_text(step, *args):
    return jax.jit(step).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("words", [{}, {"is_causal": True, "window": 5}])
def test_on_a_gpu_segments_make_no_array_of_all_pairs(as_on_a_gpu, words):
    x, ids = (jnp.zeros((B, LONG, H, K), jnp.bfloat16),) * 4, segments(LONG)
    attend = functools.partial(attention, **words)
    text = cuda_text(lambda x, s: value_and_grads(lambda q, k, v, s: attend(q, k, v, segment_ids=s), x, s), x, ids)
    assert "fmhaSoftmax(" in text and "fmhaSoftmaxBackward(" in text
    assert f"{LONG}x{LONG}" not in text
    masked = cuda_text(functools.partial(value_and_grads, attend), x, masked_by(ids))
    assert "fmhaScaleBiasSoftmaxBackward(" in masked
    assert f"tensor<{B}x1x{LONG}x{LONG}xi1>" in masked and f"tensor<{B}x1x{LONG}x{LONG}xbf16>" in masked


def test_on_a_gpu_heads_that_have_no_room_for_codes_are_masked(as_on_a_gpu):
    x = tuple(jnp.zeros((B, L, 2, 248), jnp.bfloat16) for _ in range(3))
    text = cuda_text(lambda q, k, v: attention(q, k, v, segment_ids=segments()), *x)
    assert "fmhaScaleBiasSoftmax(" in text


@pytest.mark.parametrize("model", ["decoder", "stacked", "bert"])
def test_on_a_gpu_no_model_makes_an_array_of_all_pairs(as_on_a_gpu, model):
    words = {"vocab_size": 11, "length": LONG, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 8, "dtype": "bfloat16"}
    model = Bert(**words) if model == "bert" else Decoder(**words, scan=model == "stacked", remat=model == "stacked")
    tokens = jnp.zeros((B, LONG), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss(params, segment_ids):
        return jnp.sum(model.apply(params, tokens, segment_ids, method="hidden").astype(jnp.float32))

    text = cuda_text(jax.grad(loss), params, segments(LONG))
    assert "fmhaSoftmaxBackward(" in text
    assert f"{LONG}x{LONG}" not in text


def test_where_cudnn_does_not_take_the_shapes_the_plain_program_runs(as_on_a_gpu, monkeypatch):
    def refuse(capability):
        raise NotImplementedError

    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", refuse)
    x = inputs(jnp.bfloat16)[:3]
    plain = jax.nn.dot_product_attention(*x, is_causal=True, mask=masked_by(segments()))
    np.testing.assert_array_equal(attention(*x, is_causal=True, segment_ids=segments()), plain)


def test_segments_on_this_device_in_half_precision_are_as_near_to_float32_as_their_mask():
    keys, ids = jax.random.split(jax.random.key(2), 4), segments(128)
    x = tuple(jax.random.normal(key, (B, 128, n, 64), jnp.bfloat16) for key, n in zip(keys, (H, 2, 2, H), strict=True))

    def grads(attend, x):
        return jax.device_get(jax.jit(lambda x: value_and_grads(lambda q, k, v, _: attend(q, k, v), x, None))(x))

    plain = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    exact = grads(functools.partial(plain, mask=masked_by(ids)), tuple(a.astype(jnp.float32) for a in x))
    half = grads(functools.partial(plain, mask=masked_by(ids)), x)
    ours = grads(functools.partial(attention, is_causal=True, segment_ids=ids), x)
    assert np.abs(np.float32(half[0]) - np.float32(grads(plain, x)[0])).max() > 0.1
    for a, b, c in zip(*map(jax.tree.leaves, (ours, half, exact)), strict=True):
        error, expected = (np.abs(np.float32(y) - c).max() for y in (a, b))
        assert 0 < error < 2 * expected


@pytest.mark.parametrize("how", ["ring", "all_gather"])
def test_segments_over_a_spread_sequence_and_on_one_device_are_their_mask(how):
    attend = functools.partial(attention, is_causal=True, sequence_attention=how)
    x, mask = inputs(), masked_by(segments())
    masked = jax.device_get(value_and_grads(attend, x, mask))
    by_segments = lambda q, k, v, s: attend(q, k, v, segment_ids=s)  # noqa: E731
    assert np.abs(masked[0] - reference("none", True)[0]).max() > 0.1
    assert_same(jax.device_get(value_and_grads(by_segments, x, segments())), masked)
    assert_same(run(by_segments, x, segments(), sequence=2, data=2, tensor=2)[0], masked)


def test_mistakes_are_told():
    x = tuple(a[:, :10] for a in inputs()[:3])
    with spread(sequence=4), pytest.raises(ModelError, match="length of 10 does not divide over the 4 devices"):
        attention(*x)
    with pytest.raises(ModelError, match="'ringg'; it is one of 'ring', 'all_gather'"):
        attention(*x, sequence_attention="ringg")
