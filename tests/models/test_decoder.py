"""The decoder: GPT-2's parameter count, causality through gradients, packed documents, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import assert_same, spread
from toys import styled

from bigbase_jax.models import transformer
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.transformer import stack_blocks

TINY = {"vocab_size": 11, "length": 8, "width": 16, "depth": 2, "heads": 2}
LLAMA = {
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 6,
    "positions": "rope",
    "norm": "rmsnorm",
    "activation": "silu",
    "gated": True,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "qk_norm": True,
    "tied": False,
}


def ready(**more):
    """A tiny decoder and parameters of which none is zero."""
    model = styled(Decoder, **{**TINY, **more})
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    random = np.random.default_rng(0)
    return model, {"params": jax.tree.map(lambda x: jnp.float32(0.3 * random.normal(size=x.shape)), shapes)}


def test_the_default_is_gpt2():
    model = Decoder(vocab_size=50257, length=1024)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 124_439_808  # openai-community/gpt2
    free = jax.eval_shape(model.clone(tied=False).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert sum(x.size for x in jax.tree.leaves(free)) == 124_439_808 + 50257 * 768


def influence(model, variables, segments_BL=None, positions_BL=None):
    """[L, L]: how much the logits at t (rows) depend on the embedded token at s (columns), through gradients."""
    L = TINY["length"]
    tokens_BL = jnp.arange(L)[None] + 1  # each token once, so that rows of the embedding stand for places
    embedding = variables["params"]["embedding"]

    def logits_at(t, embedding):
        params = {**variables["params"], "embedding": embedding}
        y_BLD = model.apply({"params": params}, tokens_BL, segments_BL, positions_BL, method="hidden")
        return jnp.sum(jnp.sin(model.apply(variables, y_BLD, method="logits")[0, t]))  # the head stays as it is

    gradient = jax.jit(jax.vmap(jax.grad(logits_at, 1), (0, None)))(jnp.arange(L), embedding)
    return np.abs(np.asarray(gradient)).sum(-1)[:, 1 : L + 1]


def test_llama_has_its_published_number_of_parameters():
    llama = {**LLAMA, "heads": 32, "kv_heads": 8, "head_dim": 64, "tied": True, "qk_norm": False}
    size = {"vocab_size": 128_256, "length": 131_072, "width": 2048, "depth": 16, "mlp_dim": 8192}
    model = styled(Decoder, **size, **llama)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 1_235_814_400  # meta-llama/Llama-3.2-1B


@pytest.mark.parametrize("more", [{}, {"scan": True}, LLAMA], ids=["gpt2", "stacked", "llama"])
def test_nothing_that_comes_later_has_any_influence(more):
    seen = influence(*ready(**more))
    assert (seen[np.tril_indices(8)] > 1e-6).all()
    assert (seen[np.triu_indices(8, 1)] == 0).all()


def test_a_window_is_seen_through_by_as_many_blocks():
    seen = influence(*ready(window=3))  # two blocks: two tokens before, and two before those
    reach = np.tri(8, dtype=bool) & ~np.tri(8, k=-5, dtype=bool)
    assert (seen[reach] > 1e-6).all() and (seen[~reach] == 0).all()


@pytest.mark.parametrize("scan", [False, True])
def test_some_blocks_have_a_window_and_others_see_all(scan):
    words = {"depth": 3, "window": 2, "scan": scan}
    plain = {"depth": 3, "window": 2}
    for windowed, steps in [((True,), 3), ((True, False), None)]:
        seen = influence(*ready(**words, windowed=windowed))
        reach = np.tri(8, dtype=bool) & ~np.tri(8, k=-steps - 1, dtype=bool) if steps else np.tri(8, dtype=bool)
        assert (seen[reach] > 1e-7).all() and (seen[~reach] == 0).all()
    a, variables = ready(**plain, windowed=(True, False))  # the middle block sees all
    stacked = {"params": stack_blocks(variables["params"])}
    tokens = jnp.arange(8)[None]
    b = a.clone(scan=True, remat=True)
    loss = lambda model: jax.jit(jax.value_and_grad(lambda v: jnp.sum(jnp.sin(model.apply(v, tokens)))))  # noqa: E731
    (one, grad), (two, other) = loss(a)(variables), loss(b)(stacked)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    assert_same(stack_blocks(grad["params"]), other["params"], 1e-4)
    assert abs(loss(styled(a, windowed=(False, True)))(variables)[0] - one) > 1e-3  # which of them matters


@pytest.mark.parametrize("shape", [{"sequence": 4}, {"pipeline": 2, "data": 2}, {"pipeline": 2, "sequence": 2}])
def test_windows_of_some_blocks_over_devices(shape):
    model, variables = ready(depth=4, window=2, windowed=(False, True), scan=True, pipeline_microbatches=2)
    tokens = jax.random.randint(jax.random.key(0), (4, 8), 0, 11)
    plain = jax.jit(model.apply)(variables, tokens)
    with spread(**shape):
        np.testing.assert_allclose(jax.jit(model.apply)(variables, tokens), plain, atol=1e-5, rtol=1e-5)
    assert abs(jax.jit(styled(model, windowed=(True, False)).apply)(variables, tokens) - plain).max() > 1e-2


@pytest.mark.parametrize("more", [{}, LLAMA], ids=["gpt2", "llama"])
def test_nothing_of_another_packed_document_has_any_influence(more):
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0, 0, 0]])
    seen = influence(*ready(**more), segment_ids, positions)
    same = np.asarray(segment_ids[0][:, None] == segment_ids[0][None, :]) & np.tri(8, dtype=bool)
    assert (seen[same] > 1e-6).all() and (seen[~same] == 0).all()


def test_a_packed_document_reads_as_it_does_alone():
    model, variables = ready()
    apply = jax.jit(functools.partial(model.apply, variables))
    first, second = jnp.array([[3, 1, 4]]), jnp.array([[1, 5, 9, 2]])
    packed = jnp.concatenate([first, second, jnp.array([[0]])], 1)
    logits = apply(packed, jnp.array([[1] * 3 + [2] * 4 + [0]]), jnp.array([[0, 1, 2, 0, 1, 2, 3, 0]]))
    np.testing.assert_allclose(logits[:, :3], apply(first), atol=1e-5)
    np.testing.assert_allclose(logits[:, 3:7], apply(second), atol=1e-5)
    assert np.abs(np.asarray(apply(packed)[:, 3:7] - logits[:, 3:7])).max() > 1e-2  # it does matter
    assert np.isfinite(np.asarray(logits)).all() and logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("more", "platform"),
    [({}, "gpu"), ({**LLAMA, "window": 3}, "cpu"), ({**LLAMA, "window": 2, "windowed": (False, True)}, "cpu")],
    ids=["gpt2", "llama", "windows of some blocks"],
)
def test_token_by_token_with_a_cache_is_the_whole_at_once(more, platform, monkeypatch):
    """Two sequences of different age share every step, of 3, 1 and 1 tokens: of the second, three have been read
    before; what was read behind them, as padding of a prompt, is overwritten before it is seen."""
    monkeypatch.setattr(transformer, "platform", lambda: platform)  # how the cache is written
    model, variables = ready(**more)
    tokens_BL = jax.random.randint(jax.random.key(1), (2, 8), 1, 11)
    whole = jax.jit(model.apply)(variables, tokens_BL)
    decode = jax.jit(functools.partial(model.apply, method="decode", mutable=["cache"]))
    position_B, parts = np.array([0, 3]), []
    _, state = decode({**variables, "cache": model.cache(2, 9)}, tokens_BL.at[:, 3:5].set(7)[:, :5], np.zeros(2, int))
    for size in (3, 1, 1):
        place_Bl = position_B[:, None] + np.arange(size)
        given_Bl = jnp.take_along_axis(tokens_BL, place_Bl, 1)
        y_BlD, state = decode({**variables, **state}, given_Bl, position_B)
        parts.append(model.apply(variables, y_BlD, method="logits"))
        position_B = position_B + size
    logits_BLV = np.concatenate(parts, 1)
    np.testing.assert_allclose(logits_BLV[0], whole[0, :5], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(logits_BLV[1], whole[1, 3:], atol=1e-5, rtol=1e-5)
    assert np.abs(logits_BLV[1] - whole[1, :5]).max() > 1e-2  # where it stands does matter


def test_shared_keys_are_repeated_keys():
    model, variables = ready(**LLAMA)
    params = variables["params"]
    attention = {f"block_{i}": dict(params["encoder"][f"block_{i}"]["attention"]) for i in range(2)}
    for block in attention.values():
        for name in ("key", "value"):
            block[name] = {"kernel": jnp.repeat(block[name]["kernel"], 2, 1)}
    encoder = {
        name: {**block, "attention": attention[name]} if name in attention else block
        for name, block in params["encoder"].items()
    }
    tokens = jnp.arange(8)[None]
    full = styled(model, kv_heads=4).apply({"params": {**params, "encoder": encoder}}, tokens)
    np.testing.assert_allclose(full, model.apply(variables, tokens), atol=1e-5, rtol=1e-5)


def test_tied_and_free_heads():
    model, variables = ready()
    assert "head" not in variables["params"]
    y = jax.random.normal(jax.random.key(0), (1, 2, 16))
    np.testing.assert_allclose(
        model.apply(variables, y, method="logits"), y @ variables["params"]["embedding"].T, rtol=1e-5, atol=1e-5
    )
    model, variables = ready(tied=False)
    np.testing.assert_allclose(
        model.apply(variables, y, method="logits"), y @ variables["params"]["head"], rtol=1e-5, atol=1e-5
    )


def test_logits_of_half_precision_are_float32():
    model, variables = ready()
    tokens = jnp.arange(8)[None]
    half = model.clone(dtype="bfloat16")
    assert jax.eval_shape(functools.partial(half.apply, method="hidden"), variables, tokens).dtype == jnp.bfloat16
    logits = jax.jit(half.apply)(variables, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, jax.jit(model.apply)(variables, tokens), atol=0.2)


def test_dropout_is_random_in_training_only():
    model, variables = ready(dropout=0.5)
    tokens = jnp.arange(8)[None]
    train = jax.jit(lambda key: model.apply(variables, tokens, train=True, rngs={"dropout": key}))
    a, b = (train(jax.random.key(k)) for k in (0, 1))
    assert np.abs(np.asarray(a - b)).max() > 1e-2
    plain = jax.jit(lambda tokens: model.apply(variables, tokens))(tokens)
    none = model.clone(dropout=0.0)
    np.testing.assert_array_equal(plain, jax.jit(lambda tokens: none.apply(variables, tokens))(tokens))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"heads": 3}, "does not divide over 3 heads"),
        ({"kv_heads": 3, "heads": 4}, "4 heads do not divide over kv_heads=3"),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'; it is one of 'layernorm', 'rmsnorm'"),
        ({"positions": "rotary"}, "positions is 'rotary'; it is one of 'learned', 'rope'"),
        ({"window": 0}, "window is 0"),
        ({"windowed": (True, False)}, "have a window=None; give both"),
        ({"window": 3, "windowed": ()}, r"windowed=\(\) says"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"length": None}, "length is None"),
        ({"length": 3}, "a sequence of 4 tokens is longer than the 3 positions"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"remat_policy": "all"}, "remat_policy"),
    ],
)
def test_what_does_not_fit_is_one_sentence(more, says):
    with pytest.raises(ModelError, match=says):
        styled(Decoder, **{**TINY, **more}).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
