"""T5 against transformers: the same logits with both kinds of heads, padded, and back to the same bits."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import styled

from bigbase_jax.core import UserError
from bigbase_jax.decoding.sampling import greedy_tokens
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.pretrained import load, save

T5 = {
    "vocab_size": 61,
    "d_model": 20,
    "d_kv": 6,
    "d_ff": 28,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 11,
    "decoder_start_token_id": 0,
}
LATER = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES = {
    "t5": T5,
    "t5, fewer blocks that write": {**T5, "num_decoder_layers": 1},
    "t5, gates, tied": {**T5, "feed_forward_proj": "gated-silu"},
    "t5 1.1": {**LATER, "layer_norm_epsilon": 1e-5},
}


def texts():
    """(source i32[2,19], which of it is no padding, target i32[2,13])"""
    random = np.random.RandomState(0)
    seen = np.arange(19) < np.array([[19], [12]])
    return np.where(seen, random.randint(1, 61, (2, 19)), 0), seen, random.randint(1, 61, (2, 13))


def logits_of(hf, model):
    source, seen, target = (hf.torch.tensor(x) for x in texts())
    with hf.torch.no_grad():
        return model(input_ids=source, attention_mask=seen.long(), decoder_input_ids=target).logits.numpy()


def made(hf, random_model, case):
    theirs = random_model("T5ForConditionalGeneration", **CASES[case])
    if not CASES[case].get("tie_word_embeddings", True):  # as published: another matrix
        head = hf.torch.randn(61, 20, generator=hf.torch.Generator().manual_seed(1)) * 0.3
        theirs.lm_head.weight = hf.torch.nn.Parameter(head)
    return theirs


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_and_back_to_the_same_bits(hf, random_model, tmp_path, case):
    theirs = made(hf, random_model, case)
    theirs.save_pretrained(tmp_path / "theirs")
    want = logits_of(hf, theirs)
    assert want.std() > 0.1  # there is something to compare
    model, variables = load(tmp_path / "theirs")
    assert isinstance(model, EncoderDecoder) and model.tied == CASES[case].get("tie_word_embeddings", True)
    source, _, target = texts()
    with jax.default_matmul_precision("highest"):
        got = jax.jit(model.apply)(variables, jnp.asarray(source), jnp.asarray(target))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)

    save(tmp_path / "ours", model, variables)
    back, about = hf.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(about.values()), about
    old, new = theirs.state_dict(), back.state_dict()
    assert set(old) == set(new)
    assert [key for key in old if not hf.torch.equal(old[key], new[key])] == []
    np.testing.assert_array_equal(logits_of(hf, back.eval()), want)
    again, same = load(tmp_path / "ours")
    assert again == model
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), variables, same))


def test_what_it_writes_is_what_transformers_writes(hf, random_model, tmp_path):
    theirs = made(hf, random_model, "t5 1.1")
    theirs.save_pretrained(tmp_path)
    model, variables = load(tmp_path)
    source, seen, _ = texts()
    given = {"input_ids": hf.torch.tensor(source), "attention_mask": hf.torch.tensor(seen).long()}
    theirs.generation_config.eos_token_id = None
    want = theirs.generate(**given, max_new_tokens=12, do_sample=False).numpy()[:, 1:]
    start = jnp.zeros((2, 1), jnp.int32)
    greedy = functools.partial(greedy_tokens, model, max_new_tokens=12)
    with jax.default_matmul_precision("highest"):
        got = np.asarray(jax.jit(lambda v, s: greedy(v, start, source_BS=s))(variables, jnp.asarray(source)))
    assert len(np.unique(got[0])) > 2
    np.testing.assert_array_equal(got, want)


def test_a_head_that_is_stored_as_the_embedding(hf, random_model, tmp_path):
    """transformers 5 ties the head of a fresh T5 1.1, and stores one matrix for both."""
    theirs = random_model("T5ForConditionalGeneration", **LATER)
    if not hf.torch.equal(theirs.lm_head.weight, theirs.shared.weight):
        pytest.skip("this version of transformers does not tie it")
    theirs.save_pretrained(tmp_path)
    _, variables = load(tmp_path)
    np.testing.assert_array_equal(variables["params"]["head"], variables["params"]["embedding"].T)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj is 'tanh'"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder=False; only True"),
    ],
)
def test_a_folder_that_ours_cannot_be_is_one_sentence(tmp_path, words, says):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", **T5, **words}))
    with pytest.raises(UserError, match=says):
        load(tmp_path)


RELATIVE = {"positions": "relative", "norm": "rmsnorm", "scale": 1.0, "scale_embedding": False, "scale_head": True}
RELATIVE |= {"qkv_bias": False, "out_bias": False, "mlp_bias": False}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"positions": "rope"}, "T5 has relative positions"),
        ({**RELATIVE, "norm": "layernorm"}, "T5 has RMSNorm"),
        ({**RELATIVE, "mlp_bias": True}, "T5 has no biases"),
        ({**RELATIVE, "scale_head": False}, "T5's head is scaled where it is the embedding"),
        ({**RELATIVE, "activation": "gelu", "gated": True}, "T5's gates have GELU's approximation"),
    ],
)
def test_a_model_that_transformers_does_not_have(tmp_path, words, says):
    model = styled(EncoderDecoder, vocab_size=5, width=8, depth=1, heads=2, **words)
    shape = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), shape, shape)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    with pytest.raises(UserError, match=f"transformers has no model of this kind.*{says}"):
        save(tmp_path / "out", model, variables)
