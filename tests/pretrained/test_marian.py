"""Marian against transformers: the same logits, padded, and back to the same bits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import styled

from bigbase_jax.core import UserError
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.pretrained import load, save

MARIAN = {
    "vocab_size": 61,
    "max_position_embeddings": 30,
    "d_model": 18,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 28,
    "decoder_ffn_dim": 28,
    "activation_function": "swish",
    "scale_embedding": True,
    "pad_token_id": 60,
    "decoder_start_token_id": 60,
    "eos_token_id": 0,
}
CASES = {
    "marian": MARIAN,
    "marian, fewer blocks that write, relu": {**MARIAN, "decoder_layers": 1, "activation_function": "relu"},
    "marian, embedding as it is": {**MARIAN, "scale_embedding": False, "activation_function": "gelu"},
}


def texts():
    """(source i32[2,19], which of it is no padding, target i32[2,13])"""
    random = np.random.RandomState(0)
    seen = np.arange(19) < np.array([[19], [12]])
    return np.where(seen, random.randint(1, 60, (2, 19)), 60), seen, random.randint(1, 60, (2, 13))


def logits_of(hf, model):
    source, seen, target = (hf.torch.tensor(x) for x in texts())
    with hf.torch.no_grad():
        return model(input_ids=source, attention_mask=seen.long(), decoder_input_ids=target).logits.numpy()


def made(hf, random_model, words):
    theirs = random_model("MarianMTModel", **words)
    with hf.torch.no_grad():
        theirs.final_logits_bias.copy_(hf.torch.linspace(-1, 1, theirs.config.vocab_size)[None])
        for side in (theirs.model.encoder, theirs.model.decoder):  # sinusoids, in whose place are random numbers
            side.embed_positions.weight.copy_(side.embed_positions.create_weight())
    return theirs


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_and_back_to_the_same_bits(hf, random_model, tmp_path, case):
    theirs = made(hf, random_model, CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    want = logits_of(hf, theirs)
    assert want.std() > 0.1  # there is something to compare
    model, variables = load(tmp_path / "theirs")
    source, _, target = texts()
    with jax.default_matmul_precision("highest"):
        got = jax.jit(model.apply)(variables, jnp.asarray(source), jnp.asarray(target))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)

    save(tmp_path / "ours", model, variables)
    back, about = hf.MarianMTModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(about.values()), about
    old, new = theirs.state_dict(), back.state_dict()
    assert set(old) == set(new)
    assert [key for key in old if not hf.torch.equal(old[key], new[key])] == []
    np.testing.assert_array_equal(logits_of(hf, back.eval()), want)
    again, same = load(tmp_path / "ours")
    assert again == model
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), variables, same))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"activation_function": "mish"}, "activation_function is 'mish'"),
        ({"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings=False; only True"),
        ({"decoder_vocab_size": 50}, "two sizes of vocabulary"),
        ({"decoder_ffn_dim": 50}, "another ffn_dim in its encoder than in its decoder"),
    ],
)
def test_a_folder_that_ours_cannot_be_is_one_sentence(tmp_path, words, says):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "marian", **MARIAN, **words}))
    with pytest.raises(UserError, match=says):
        load(tmp_path)


KIND = {"post_norm": True, "head_bias": True, "epsilon": 1e-5}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({**KIND, "positions": "rope"}, "Marian has sinusoidal positions"),
        ({**KIND, "post_norm": False}, "Marian has LayerNorm after each branch"),
        ({**KIND, "gated": True}, "Marian has no gates"),
        ({**KIND, "out_bias": False}, "Marian has biases everywhere"),
        ({**KIND, "head_bias": False}, "Marian's head is the embedding and a bias"),
    ],
)
def test_a_model_that_transformers_does_not_have(tmp_path, words, says):
    model = styled(EncoderDecoder, vocab_size=5, width=8, depth=1, heads=2, **words)
    shape = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), shape, shape)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    with pytest.raises(UserError, match=f"transformers has no model of this kind.*{says}"):
        save(tmp_path / "out", model, variables)
