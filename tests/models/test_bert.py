"""The bidirectional encoder: published parameter counts, what sees what, packing, padding, heads, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import assert_same, spread
from toys import styled

from bigbase_jax.models.bert import Bert
from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.transformer import stack_blocks

TINY = {"vocab_size": 11, "length": 8, "width": 16, "depth": 2, "heads": 2}
HEADS = {"pooled": True, "masked": True, "next_sentence": True, "num_classes": 3}
ROBERTA = {"type_vocab_size": 1, "position_offset": 2, "epsilon": 1e-5, "classifier": "dense"}
ONE = jnp.zeros((1, 4), jnp.int32)


def count(**more):
    shapes = jax.eval_shape(styled(Bert, **more).init, jax.random.key(0), ONE)["params"]
    return sum(x.size for x in jax.tree.leaves(shapes))


def ready(**more):
    """A tiny model and parameters of which none is zero."""
    model = styled(Bert, **{**TINY, **more})
    shapes = jax.eval_shape(model.init, jax.random.key(0), ONE)["params"]
    random = np.random.default_rng(0)
    return model, {"params": jax.tree.map(lambda x: jnp.float32(0.3 * random.normal(size=x.shape)), shapes)}


def test_the_published_models_have_their_numbers_of_parameters():
    assert count(vocab_size=30522, length=512, pooled=True) == 109_482_240  # google-bert/bert-base-uncased
    assert count(vocab_size=21128, length=512, pooled=True) == 102_267_648  # google-bert/bert-base-chinese
    mini = {"width": 384, "depth": 6, "heads": 12, "mlp_dim": 1536}
    assert count(vocab_size=30522, length=512, pooled=True, **mini) == 22_713_216  # all-MiniLM-L6-v2
    base = count(vocab_size=50265, length=512, pooled=True, **ROBERTA)
    assert base == 124_645_632  # FacebookAI/roberta-base
    masked = count(vocab_size=50265, length=512, masked=True, **ROBERTA)
    assert masked == base + 1536 + 50265  # a norm and the biases; the head's layer is as large as the pooler


def influence(model, variables, *args):
    """[L, L]: how much the vector at t (rows) depends on the embedded token at s (columns), through gradients."""
    L = TINY["length"]
    tokens_BL = jnp.arange(L)[None] + 1

    def vector_at(t, embedding):
        params = {**variables["params"], "embedding": embedding}
        return jnp.sum(jnp.sin(model.apply({"params": params}, tokens_BL, *args, method="hidden")[0, t]))

    gradient = jax.jit(jax.vmap(jax.grad(vector_at, 1), (0, None)))(jnp.arange(L), variables["params"]["embedding"])
    return np.abs(np.asarray(gradient)).sum(-1)[:, 1 : L + 1]


def test_every_token_sees_every_other_of_its_segment_and_none_else():
    model, variables = ready()
    assert influence(model, variables).min() > 1e-6
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0]])
    seen = influence(model, variables, segment_ids)
    same = np.asarray(segment_ids[0][:, None] == segment_ids[0][None, :])
    assert (seen[same] > 1e-6).all() and (seen[~same] == 0).all()


def test_a_padded_or_packed_text_reads_as_it_does_alone():
    model, variables = ready(**HEADS)
    apply = jax.jit(functools.partial(model.apply, variables))
    first, second = jnp.array([[3, 1, 4]]), jnp.array([[1, 5, 9, 2]])
    packed = jnp.concatenate([first, second, jnp.array([[7]])], 1)
    segment_ids, positions = jnp.array([[1] * 3 + [2] * 4 + [0]]), jnp.array([[0, 1, 2, 0, 1, 2, 3, 0]])
    found, alone = apply(packed, segment_ids, positions), [apply(first), apply(second)]
    for name in ("hidden", "masked"):
        np.testing.assert_allclose(found[name][:, :3], alone[0][name], atol=1e-5)
        np.testing.assert_allclose(found[name][:, 3:7], alone[1][name], atol=1e-5)
    assert np.abs(np.asarray(apply(packed)["hidden"][:, 3:7] - found["hidden"][:, 3:7])).max() > 1e-2  # it matters
    padded = apply(jnp.pad(first, ((0, 0), (0, 5)), constant_values=9), jnp.array([[1] * 3 + [0] * 5]))
    for name in ("pooled", "next_sentence", "classes"):
        np.testing.assert_allclose(padded[name], alone[0][name], atol=1e-5)
        assert np.isfinite(np.asarray(padded[name])).all()


@pytest.mark.parametrize("classifier", ["pooled", "dense", "mean"])
def test_classifiers_are_their_formulas(classifier):
    model, variables = ready(num_classes=3, classifier=classifier)
    p = jax.tree.map(np.asarray, variables["params"])
    tokens, segment_ids = jnp.array([[3, 1, 4, 1, 5]]), jnp.array([[1, 1, 1, 0, 0]])
    found = jax.jit(model.apply)(variables, tokens, segment_ids)
    y_BLD = np.asarray(found["hidden"])
    y_BD = y_BLD[:, :3].mean(1) if classifier == "mean" else y_BLD[:, 0]
    if classifier != "mean":
        layer = p["pooler"] if classifier == "pooled" else p["head"]["dense"]
        y_BD = np.tanh(y_BD @ layer["kernel"] + layer["bias"])
    expected = y_BD @ p["head"]["out"]["kernel"] + p["head"]["out"]["bias"]
    np.testing.assert_allclose(found["classes"], expected, atol=1e-5)
    assert ("pooler" in p) == ("pooled" in found) == (classifier == "pooled")


def test_types_and_positions_are_rows_of_their_tables():
    model, variables = ready(position_offset=2)
    apply = jax.jit(functools.partial(model.apply, method="hidden"))
    tokens, token_type_ids = jnp.array([[3, 1, 4, 1]]), jnp.array([[0, 0, 1, 1]])
    plain, zeros = apply(variables, tokens), jnp.zeros_like(token_type_ids)
    assert np.abs(apply(variables, tokens, None, None, token_type_ids) - plain).max() > 1e-2
    np.testing.assert_allclose(apply(variables, tokens, None, None, zeros), plain, atol=1e-6)

    def with_rows(rows):
        table = variables["params"]["position"].at[rows].multiply(-1)
        return apply({"params": {**variables["params"], "position": table}}, tokens)

    assert variables["params"]["position"].shape == (10, 16)
    np.testing.assert_array_equal(with_rows(jnp.array([0, 1, 6])), plain)  # those of no token
    assert np.abs(with_rows(jnp.array([2])) - plain).max() > 1e-2
    one, variables = ready(type_vocab_size=1)
    found = one.apply(variables, tokens, None, None, token_type_ids, method="hidden")
    np.testing.assert_array_equal(found, one.apply(variables, tokens, method="hidden"))


def test_stacked_rematerialised_and_spread_models_are_the_model():
    model, variables = ready(masked=True, dropout=0.0)
    tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 11)
    segment_ids = jnp.array([[1] * 5 + [2] * 2 + [0]] * 4)

    def value(model, params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, tokens, segment_ids, train=True)["masked"]))

    grad = jax.jit(jax.value_and_grad(value, 1), static_argnums=0)
    expected, plain = grad(model, variables["params"])
    stacked = stack_blocks(variables["params"])
    ours, gradient = grad(model.clone(scan=True, remat=True), stacked)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert_same(gradient, stack_blocks(plain), 1e-4)
    with spread(data=2, tensor=2):
        ours, gradient = grad(model.clone(), variables["params"])
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert_same(gradient, plain, 1e-4)


def test_dropout_and_half_precision():
    model, variables = ready(**HEADS, dtype="bfloat16", dropout=0.5)
    tokens = jnp.array([[3, 1, 4, 1]])

    def apply(key):
        return model.apply(variables, tokens, train=True, rngs={"dropout": jax.random.key(key)})

    first, again, other = jax.jit(apply)(0), jax.jit(apply)(0), jax.jit(apply)(1)
    assert_same(first, again, 0)
    for name in ("masked", "next_sentence", "classes"):
        assert np.abs(np.asarray(first[name] - other[name])).max() > 1e-2
        assert first[name].dtype == jnp.float32
    assert first["hidden"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"vocab_size": None}, "vocab_size is None"),
        ({"length": None}, "length is None"),
        ({"length": 3}, "4 tokens is longer than the 3 positions"),
        ({"classifier": "cls"}, "'pooled', 'dense', 'mean'"),
        ({"width": 15}, "does not divide over 2 heads"),
        ({"type_vocab_size": 0}, "type_vocab_size is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_mistakes_are_named(more, sentence):
    with pytest.raises(ModelError, match=sentence):
        styled(Bert, **{**TINY, **more}).init(jax.random.key(0), ONE)


def test_heads_that_are_not_there_are_named():
    model, variables = ready()
    y_BLD = jnp.zeros((1, 4, 16))
    for method, sentence in [
        ("pool", "set pooled"),
        ("masked_logits", "set masked"),
        ("next_logits", "set next_sentence"),
        ("classify", "num_classes"),
    ]:
        with pytest.raises(ModelError, match=sentence):
            model.apply(variables, y_BLD, method=method)
