"""The encoder-decoder: what sees what, through gradients; padding; the cache; stacks; T5's ranges of distances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import styled

from bigbase_jax.models.encoder_decoder import EncoderDecoder, buckets, sinusoids
from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.transformer import stack_blocks

TINY = {"vocab_size": 11, "length": 9, "width": 16, "depth": 2, "heads": 2, "pad_id": 0}
T5 = {
    "positions": "relative",
    "relative_buckets": 8,
    "relative_distance": 6,
    "norm": "rmsnorm",
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "scale": 1.0,
    "head_dim": 6,
    "scale_embedding": False,
    "scale_head": True,
}
KINDS = {
    "plain": {},
    "learned": {"positions": "learned", "decoder_depth": 1},
    "rope": {"positions": "rope", "kv_heads": 1, "tied": False},
    "t5": T5,
    "marian": {"post_norm": True, "head_bias": True, "activation": "silu", "epsilon": 1e-5},
}
SLOW = ("plain", "rope", "marian")
each_kind = pytest.mark.parametrize(
    "more", [pytest.param(k, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, k in KINDS.items()]
)
SOURCE = jnp.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 0, 0, 0]])
TARGET = jax.random.randint(jax.random.key(1), (2, 8), 1, 11)


def ready(**more):
    """A tiny model and parameters of which none is zero."""
    model = styled(EncoderDecoder, **{**TINY, **more})
    shapes = jax.eval_shape(model.init, jax.random.key(0), SOURCE, TARGET[:, :4])["params"]
    random = np.random.default_rng(0)
    return model, {"params": jax.tree.map(lambda x: jnp.float32(0.3 * random.normal(size=x.shape)), shapes)}


def test_the_transformer_base_has_its_published_number_of_parameters():
    shape = jax.ShapeDtypeStruct((1, 4), jnp.int32)

    def count(**more):
        model = styled(EncoderDecoder, **more)
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), shape, shape)))

    small = {**T5, "relative_buckets": 32, "relative_distance": 128, "head_dim": 64}
    assert count(vocab_size=32128, **small) == 60_506_624  # google-t5/t5-small
    v1_1 = {**small, "scale_head": False, "gated": True, "activation": "gelu_tanh", "tied": False}
    assert count(vocab_size=32128, depth=8, heads=6, mlp_dim=1024, **v1_1) == 76_961_152  # google/t5-v1_1-small
    opus = count(vocab_size=58101, head_bias=True, post_norm=True)
    assert opus == 73_944_309  # Helsinki-NLP/opus-mt-en-de, without its tables of sinusoids


def influence(model, variables):
    """([L, L], [L, S]): how much the logits at t depend on the embedded target (source) token at s."""
    source, target = jnp.arange(1, 6)[None], jnp.arange(6, 11)[None]  # each token once: rows stand for places

    def logits_at(t, embedding):
        params = {**variables["params"], "embedding": embedding}
        y_BLD = model.apply({"params": params}, source, target, method="hidden")
        return jnp.sum(jnp.sin(model.apply(variables, y_BLD, method="logits")[0, t]))  # the head stays as it is

    gradient = jax.jit(jax.vmap(jax.grad(logits_at, 1), (0, None)))(jnp.arange(5), variables["params"]["embedding"])
    size = np.abs(np.asarray(gradient)).sum(-1)
    return size[:, 6:11], size[:, 1:6]


@pytest.mark.parametrize("more", [{}, T5, {"scan": True}], ids=["plain", "t5", "stacked"])
def test_all_of_the_source_is_seen_and_nothing_of_the_target_to_come(more):
    target, source = influence(*ready(**more))
    assert (source > 1e-6).all()
    assert (target[np.tril_indices(5)] > 1e-6).all() and (target[np.triu_indices(5, 1)] == 0).all()


@each_kind
def test_padding_of_the_source_changes_nothing(more):
    model, variables = ready(**more)
    apply = jax.jit(functools.partial(model.apply, variables))
    padded = apply(SOURCE, TARGET)
    np.testing.assert_allclose(padded[1:], apply(SOURCE[1:, :4], TARGET[1:]), atol=1e-5, rtol=1e-5)
    said = (jnp.arange(7) < jnp.array([[7], [4]])).astype(jnp.int32)
    noisy = SOURCE.at[1, 4:].set(7)
    np.testing.assert_allclose(padded, apply(noisy, TARGET, said), atol=1e-5, rtol=1e-5)
    assert np.abs(np.asarray(apply(noisy, TARGET)[1] - padded[1])).max() > 1e-3  # it would


@each_kind
def test_token_by_token_with_a_cache_is_the_whole_at_once(more):
    """Sources of two lengths; of the second target three tokens have been read before, and padding behind them; then
    both share every step, of 3, 1 and 1 tokens."""
    model, variables = ready(**more)
    whole = jax.jit(functools.partial(model.apply, variables))
    decode = jax.jit(functools.partial(model.apply, method="decode", mutable=["cache"]))
    cache, position_B, parts = model.cache(2, 9, 7), np.array([0, 3]), []
    assert all(len(x) == 2 for x in jax.tree.leaves(cache))
    before = TARGET.at[:, 3:5].set(7)[:, :5]
    _, state = decode({**variables, "cache": cache}, before, np.zeros(2, int), SOURCE)
    for size in (3, 1, 1):
        place_Bl = position_B[:, None] + np.arange(size)
        y_BlD, state = decode({**variables, **state}, jnp.take_along_axis(TARGET, place_Bl, 1), position_B)
        parts.append(model.apply(variables, y_BlD, method="logits"))
        position_B = position_B + size
    logits_BLV, wanted_BLV = np.concatenate(parts, 1), whole(SOURCE, TARGET)
    np.testing.assert_allclose(logits_BLV[0], wanted_BLV[0, :5], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(logits_BLV[1], wanted_BLV[1, 3:], atol=1e-5, rtol=1e-5)
    assert np.abs(logits_BLV[1] - wanted_BLV[1, :5]).max() > 1e-3  # where it stands does matter
    assert np.abs(logits_BLV[0] - whole(jnp.full_like(SOURCE, 7), TARGET)[0, :5]).max() > 1e-3  # so does the source


@pytest.mark.parametrize("more", [{}, T5], ids=["plain", "t5"])
def test_stacked_blocks_compute_the_same(more):
    model, variables = ready(**more)
    stacked = {"params": stack_blocks(variables["params"])}
    assert {"blocks", "norm"} == set(stacked["params"]["decoder"])
    ours = jax.jit(model.clone(scan=True).apply)(stacked, SOURCE, TARGET)
    np.testing.assert_allclose(ours, jax.jit(model.apply)(variables, SOURCE, TARGET), atol=1e-5, rtol=1e-5)
    fresh = model.clone(scan=True).init(jax.random.key(0), SOURCE, TARGET)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, stacked)


def test_distances_fall_into_ranges():
    """8 of them, both ways up to 6: 0, -1, -2 and -3 to -6 with growing steps; and the same after the query."""
    assert buckets(8, 6, True).tolist() == [3, 3, 3, 2, 2, 1, 0, 5, 6, 6, 7, 7, 7]
    assert buckets(8, 6, False).tolist() == [7, 6, 4, 3, 2, 1, 0] + [0] * 6


@pytest.mark.parametrize(("count", "distance"), [(32, 128), (32, 20), (8, 20), (6, 50), (64, 256)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_ranges_are_those_of_transformers(count, distance, both_ways):
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    import torch

    offset = torch.arange(-distance, distance + 1)
    theirs = modeling.T5Attention._relative_position_bucket(offset, both_ways, count, distance)
    np.testing.assert_array_equal(buckets(count, distance, both_ways), theirs.numpy())
    beyond = modeling.T5Attention._relative_position_bucket(offset * 7, both_ways, count, distance)
    ours = buckets(count, distance, both_ways)[np.clip(offset.numpy() * 7, -distance, distance) + distance]
    np.testing.assert_array_equal(ours, beyond.numpy())


def test_far_places_share_a_range():
    """Distances beyond the last are clipped: a sequence longer than ``relative_distance`` has a bias everywhere."""
    model, variables = ready(**T5)
    bound = model.bind(variables)
    bias_1HLK = bound._bias(bound.target_distance, jnp.arange(12)[None], 12, False)
    assert bias_1HLK.shape == (1, 2, 12, 12)
    np.testing.assert_array_equal(bias_1HLK[0, :, 11, :6], np.repeat(bias_1HLK[0, :, 11, 5:6], 6, 1))
    np.testing.assert_array_equal(bias_1HLK[0, :, 7, 3:], bias_1HLK[0, :, 5, 1:10])
    np.testing.assert_array_equal(bias_1HLK[0, :, 4, 4], variables["params"]["target_distance"][0])


def test_sinusoids_by_hand():
    table = sinusoids(3, 4)
    by_hand = [[np.sin(p), np.sin(p / 100), np.cos(p), np.cos(p / 100)] for p in range(3)]
    np.testing.assert_allclose(table, by_hand, atol=1e-7)


def test_scales_of_embedding_and_head():
    model, variables = ready(head_bias=True, scale_head=True)
    y = jax.random.normal(jax.random.key(0), (1, 2, 16))
    expected = y @ variables["params"]["embedding"].T / 4 + variables["params"]["logits_bias"]
    np.testing.assert_allclose(model.apply(variables, y, method="logits"), expected, rtol=1e-5, atol=1e-5)
    larger = {**variables["params"], "embedding": variables["params"]["embedding"] * 4}
    hidden = functools.partial(jax.jit(model.apply, static_argnames="method"), method="hidden")
    other = functools.partial(
        jax.jit(model.clone(scale_embedding=False).apply, static_argnames="method"), method="hidden"
    )
    np.testing.assert_allclose(other({"params": larger}, SOURCE, TARGET), hidden(variables, SOURCE, TARGET), atol=1e-5)


def test_dropout_is_random_in_training_only():
    model, variables = ready(dropout=0.5)
    train = jax.jit(lambda key: model.apply(variables, SOURCE, TARGET, train=True, rngs={"dropout": key}))
    a, b = (train(jax.random.key(k)) for k in (0, 1))
    assert np.abs(np.asarray(a - b)).max() > 1e-2
    plain, none = (jax.jit(m.apply)(variables, SOURCE, TARGET) for m in (model, model.clone(dropout=0.0)))
    np.testing.assert_array_equal(plain, none)


def test_logits_of_half_precision_are_float32():
    model, variables = ready(dtype="bfloat16")
    assert (
        jax.eval_shape(functools.partial(model.apply, method="hidden"), variables, SOURCE, TARGET).dtype == "bfloat16"
    )
    logits = jax.jit(model.apply)(variables, SOURCE, TARGET)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, jax.jit(model.clone(dtype="float32").apply)(variables, SOURCE, TARGET), atol=0.3)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"heads": 3}, "does not divide over 3 heads"),
        ({"positions": "rotary"}, "positions is 'rotary'; it is one of 'sinusoidal', 'learned', 'rope', 'relative'"),
        ({"positions": "relative", "relative_distance": 8}, "relative_buckets=32 and relative_distance=8"),
        ({"width": 15, "heads": 3}, "a width of 15 is odd"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"positions": "learned", "length": None}, "length is None"),
        ({"positions": "learned", "length": 7}, "a target of 8 tokens is longer than the model's 7 positions"),
        ({"positions": "learned", "length": 6}, "a source of 7 tokens is longer than the model's 6 positions"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(more, says):
    with pytest.raises(ModelError, match=says):
        styled(EncoderDecoder, **{**TINY, **more}).init(jax.random.key(0), SOURCE, TARGET)


@pytest.mark.parametrize(
    ("more", "size", "says"),
    [
        ({"scan": True}, 7, "a stack of blocks has no cache"),
        ({}, 6, "a source of 7 tokens is not the cache's of 6"),
        ({"positions": "learned", "length": 7}, 7, "a target of 8 tokens is longer than the model's 7 positions"),
    ],
)
def test_what_cannot_be_decoded_is_one_sentence(more, size, says):
    model, variables = ready(**more)
    first = TARGET[:, :1], jnp.zeros(2, jnp.int32)
    with pytest.raises(ModelError, match=says):
        variables = {**variables, "cache": model.cache(2, 9, size)}
        model.apply(variables, *first, SOURCE, method="decode", mutable=["cache"])
