"""wav2vec 2.0 and HuBERT for CTC against transformers: logits, padded and not, and back to the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbase_jax.models.wav2vec2 import Wav2Vec2
from bigbase_jax.pretrained import load, save

TINY = {
    "vocab_size": 32,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 34,
    "conv_dim": [10, 12, 14],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
}
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
CASES = {
    "base": ("Wav2Vec2ForCTC", TINY),
    "large, odd taps": ("Wav2Vec2ForCTC", {**TINY, **STABLE, "num_conv_pos_embeddings": 9}),
    "hubert base, which could mask": ("HubertForCTC", {**TINY, "mask_time_prob": 0.05, "pad_token_id": 3}),
    "hubert large": ("HubertForCTC", {**TINY, **STABLE, "feat_proj_layer_norm": False}),
}


def logits_of(hf, model, x_BT):
    with hf.torch.no_grad():
        return model(hf.torch.tensor(x_BT)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_and_back_to_the_same_bits(hf, random_model, tmp_path, case):
    name, words = CASES[case]
    theirs = random_model(name, **words)
    theirs.save_pretrained(tmp_path / "theirs")
    x_T = np.random.RandomState(0).randn(1207).astype(np.float32)
    model, variables = load(tmp_path / "theirs")
    assert isinstance(model, Wav2Vec2) and model.blank == words.get("pad_token_id", 0)
    longer = np.zeros((2, 1500), np.float32)
    longer[0, :1207], longer[1, :701] = x_T, x_T[:701]
    with jax.default_matmul_precision("highest"):
        got, frames = jax.jit(model.apply)(variables, jnp.asarray(longer), jnp.array([1207, 701]))
    for b, length in enumerate((1207, 701)):
        want = logits_of(hf, theirs, x_T[None, :length])[0]
        assert want.std() > 0.1 and len(want) == frames[b]  # there is something to compare
        np.testing.assert_allclose(got[b, : len(want)], want, rtol=1e-4, atol=1e-4)

    save(tmp_path / "ours", model, variables)
    back, about = getattr(hf, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(about.values()), about
    old, new = theirs.state_dict(), back.state_dict()
    assert {key for key in old if "masked_spec" not in key} == set(new)
    assert [key for key in new if not hf.torch.equal(old[key], new[key])] == []
    assert load(tmp_path / "ours")[0] == model
