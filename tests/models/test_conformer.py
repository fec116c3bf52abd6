"""The Conformer: a block against transformers, padding, what a chunk sees, chunk by chunk as all at once."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbase_jax.models.conformer import Block, Conformer, depthwise
from bigbase_jax.models.layers import ModelError

TINY = {"width": 16, "depth": 2, "heads": 2, "kernel": 5, "channels": 4}
CHUNKED = {"chunk": 3, "left": 2}
M = 12


def features(B=2, F=50, seed=0):
    return jax.random.normal(jax.random.key(seed), (B, F, M))


def made(model, seed=1):
    """Variables in which nothing is zero or one by chance."""
    variables = jax.jit(model.init)(jax.random.key(0), features(1, 20), jnp.array([20]))
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [0.1 * jnp.abs(jax.random.normal(key, x.shape)) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [x + more for x, more in zip(leaves, noise, strict=True)])


def test_the_parameter_count_is_about_the_published_one():
    """Conformer-S has 10.3 million with its decoder, an LSTM of width 320 (their table 1)."""
    model = Conformer(144, 16, 4, positions="relative")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 40, 80)), jnp.array([40]))
    count = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    assert 8.5e6 < count < 10.3e6


def test_a_block_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer")
    config = theirs.Wav2Vec2ConformerConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=24, conv_depthwise_kernel_size=5, hidden_act="swish"
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    layer = theirs.Wav2Vec2ConformerEncoderLayer(config).eval()
    with torch.no_grad():
        for x in itertools.chain(layer.parameters(), [layer.conv_module.batch_norm.running_mean]):
            x += 0.1 * torch.randn_like(x)
        x_BSD = torch.randn(2, 9, 16)
        where = theirs.Wav2Vec2ConformerRelPositionalEmbedding(config)(x_BSD)
        expected = layer(x_BSD, relative_position_embeddings=where)
    theirs_at = {name: x.numpy() for name, x in layer.state_dict().items()}

    def norm(name):
        return {"scale": theirs_at[f"{name}.weight"], "bias": theirs_at[f"{name}.bias"]}

    def dense(name, shape=None, bias_shape=None):
        kernel = theirs_at[f"{name}.weight"].squeeze()
        found = {"kernel": kernel.T.reshape(shape or kernel.T.shape)}
        if f"{name}.bias" in theirs_at:
            bias = theirs_at[f"{name}.bias"]
            found["bias"] = bias.reshape(bias_shape or bias.shape)
        return found

    heads = {"shape": (16, 2, 8), "bias_shape": (2, 8)}
    params = {f"norm_mlp{i}": norm(f"ffn{i}_layer_norm") for i in (1, 2)}
    params |= {
        f"mlp{i}": {"up": dense(f"ffn{i}.intermediate_dense"), "down": dense(f"ffn{i}.output_dense")} for i in (1, 2)
    }
    params |= {
        "norm_attention": norm("self_attn_layer_norm"),
        "query": dense("self_attn.linear_q", **heads),
        "key": dense("self_attn.linear_k", **heads),
        "value": dense("self_attn.linear_v", **heads),
        "distance": dense("self_attn.linear_pos", **heads),
        "bias_key": theirs_at["self_attn.pos_bias_u"],
        "bias_distance": theirs_at["self_attn.pos_bias_v"],
        "out": dense("self_attn.linear_out", shape=(2, 8, 16)),
        "norm_convolution": norm("conv_module.layer_norm"),
        "expand": dense("conv_module.pointwise_conv1"),
        "depthwise": theirs_at["conv_module.depthwise_conv.weight"][:, 0].T,
        "bn": norm("conv_module.batch_norm"),
        "mix": dense("conv_module.pointwise_conv2"),
        "norm": norm("final_layer_norm"),
    }
    running = {name: theirs_at[f"conv_module.batch_norm.running_{name}"] for name in ("mean", "var")}
    block = Block(2, 5, 24, 0.0, "relative", "batch", False, "float32")
    variables = {"params": params, "batch_stats": {"bn": running}}
    arguments = jnp.ones((2, 1, 9), bool), 9
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), jnp.zeros((2, 9, 16)), *arguments))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)
    variables = jax.tree.map(jnp.asarray, variables)
    ours, _ = block.apply(variables, jnp.asarray(x_BSD.numpy()), *arguments)
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("positions", "chunk"), [("relative", {}), ("rope", {**CHUNKED, "right": 1})])
def test_padding_never_leaks(positions, chunk):
    """Real frames do not change with how much padding there is, nor with what is in it; in training neither."""
    model = Conformer(**TINY, **chunk, positions=positions, dropout=0.0)
    variables, x = made(model), features()
    lengths = jnp.array([50, 33])
    one, length = jax.jit(model.apply)(variables, x, lengths)
    assert length.tolist() == [13, 9]
    assert one.shape == (2, 13, 16)
    alone, _ = jax.jit(model.apply)(variables, x[1:, :33], lengths[1:])
    np.testing.assert_allclose(one[1, :9], alone[0], atol=1e-5)
    other = jnp.pad(x.at[1, 33:].set(100.0), ((0, 0), (0, 30), (0, 0)), constant_values=-50.0)
    for train in (False, True):
        run = jax.jit(lambda x, train=train: model.apply(variables, x, lengths, train, mutable=["batch_stats"]))
        ((h, _), state), ((padded, _), padded_state) = run(x), run(other)
        for b, n in enumerate(length):
            np.testing.assert_allclose(h[b, :n], padded[b, :n], atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, padded_state)


@pytest.mark.parametrize(("causal", "right"), [(False, 2), (True, 0)])
def test_a_chunk_sees_what_it_may(causal, right):
    model = Conformer(**TINY, **CHUNKED, causal=causal, right=right)
    variables, x = made(model), features(1, 144)

    @jax.jit
    def of(first):  # how much each feature frame matters to the three encoder frames from here on
        def chosen(x):
            h, _ = model.apply(variables, x, jnp.array([144]))
            return jnp.sum(jnp.sin(jax.lax.dynamic_slice_in_dim(h, first, 3, 1)))

        return jnp.abs(jax.grad(chosen)(x)).sum((0, 2))

    fourth, last = of(9), of(33)
    assert (fourth[: 4 * (12 + right)] > 0).all()  # two blocks, two chunks before each: all that there is
    assert (fourth[4 * (12 + right) :] == 0).all()  # and nothing behind it
    assert (last[4 * (33 - 6) :] > 0).all()
    assert (last[: 4 * 9 - 3] == 0).all()  # in each block four frames back, to the chunk's beginning, and two chunks


@pytest.mark.parametrize(
    ("positions", "right", "causal"), [("rope", 0, True), ("rope", 2, False), ("relative", 1, False)]
)
def test_chunk_by_chunk_is_as_all_at_once(positions, right, causal):
    model = Conformer(**TINY, **CHUNKED, positions=positions, right=right, causal=causal)
    variables, x = made(model), features(2, 50)
    lengths = jnp.array([50, 29])
    expected, length = jax.jit(model.apply)(variables, x, lengths)
    whole, _ = jax.jit(lambda v, x, n: model.apply(v, x, n, whole=True))(variables, x, lengths)
    assert np.abs(whole - expected).max() > 1e-2  # the chunks do limit it
    state, parts = model.state(2, M), []
    encode = jax.jit(lambda *args: model.apply(*args, method="encode_chunk"))
    padded = jnp.pad(x, ((0, 0), (0, 40), (0, 0)), constant_values=7.0)
    for first in range(0, 52, 12):
        h, state = encode(variables, state, padded[:, first : first + 4 * (3 + right)], lengths - first)
        parts.append(h)
    found = jnp.concatenate(parts, 1)
    for b, n in enumerate(length):
        np.testing.assert_allclose(found[b, :n], expected[b, :n], atol=1e-5)


def test_the_depthwise_convolution_and_its_gradients_are_the_librarys():
    x, kernel = jax.random.normal(jax.random.key(0), (3, 41, 6)), jax.random.normal(jax.random.key(1), (7, 6))

    def library(x, kernel):
        words = {"dimension_numbers": ("NWC", "WIO", "NWC"), "feature_group_count": 6}
        return jax.lax.conv_general_dilated(x, kernel[:, None], (1,), "VALID", **words)

    def gradients(f):
        return jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(f(*args))), (0, 1))(x, kernel)

    assert depthwise(x, kernel).shape == (3, 35, 6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradients(depthwise), gradients(library))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kernel": 4}, "odd"),
        ({"heads": 3}, "3 heads"),
        ({"positions": "none"}, "positions is 'none'"),
        ({"norm": "none"}, "norm is 'none'"),
        ({"chunk": 2, "right": 3}, "right=3"),
    ],
)
def test_sizes_that_do_not_fit_are_told(wrong, said):
    with pytest.raises(ModelError, match=said):
        Conformer(**{**TINY, **wrong})


def test_only_chunks_have_a_state():
    with pytest.raises(ModelError, match="set chunk"):
        Conformer(**TINY).state(1, M)
