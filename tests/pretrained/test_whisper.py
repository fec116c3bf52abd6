"""Whisper against transformers: the same logits, in odd shapes and with 128 bands, and back to the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbase_jax.models.whisper import Whisper, sinusoids
from bigbase_jax.pretrained import load, save

TINY = {
    "vocab_size": 71,
    "num_mel_bins": 80,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 26,
    "decoder_ffn_dim": 26,
    "d_model": 18,
    "max_source_positions": 1500,
    "max_target_positions": 40,
    "pad_token_id": 40,
    "bos_token_id": 40,
    "eos_token_id": 40,
    "decoder_start_token_id": 41,
    "begin_suppress_tokens": [5, 40],
}
CASES = {
    "odd": {**TINY, "max_source_positions": 37},
    "large-v3's bands, more blocks that write": {
        **TINY,
        "max_source_positions": 20,
        "num_mel_bins": 128,
        "decoder_layers": 3,
        "encoder_layers": 1,
    },
    "one head, as wide as long": {
        **TINY,
        "max_source_positions": 18,
        "encoder_attention_heads": 1,
        "decoder_attention_heads": 1,
        "activation_function": "gelu_new",
    },
}


def logits_of(hf, model, features, tokens):
    with hf.torch.no_grad():
        return model(
            input_features=hf.torch.tensor(features).swapaxes(1, 2), decoder_input_ids=hf.torch.tensor(tokens)
        ).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_and_back_to_the_same_bits(hf, random_model, tmp_path, case):
    words = CASES[case]
    theirs = random_model("WhisperForConditionalGeneration", **words)
    theirs.save_pretrained(tmp_path / "theirs")
    random = np.random.RandomState(0)
    features = random.randn(2, 2 * words["max_source_positions"], words["num_mel_bins"]).astype(np.float32)
    tokens = random.randint(0, 71, (2, 13))
    want = logits_of(hf, theirs, features, tokens)
    assert want.std() > 0.1  # there is something to compare
    model, variables = load(tmp_path / "theirs")
    assert isinstance(model, Whisper)
    with jax.default_matmul_precision("highest"):
        got = jax.jit(model.apply)(variables, jnp.asarray(features), jnp.asarray(tokens))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)

    save(tmp_path / "ours", model, variables)
    back, about = hf.WhisperForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(about.values()), about
    old, new = theirs.state_dict(), back.state_dict()
    assert set(old) == set(new)
    assert [key for key in old if not hf.torch.equal(old[key], new[key])] == []
    assert load(tmp_path / "ours")[0] == model


def test_fixed_positions_are_the_published_ones(hf):
    theirs = hf.models.whisper.modeling_whisper.sinusoids(50, 18).numpy()
    np.testing.assert_allclose(sinusoids(50, 18), theirs, atol=1e-5)
