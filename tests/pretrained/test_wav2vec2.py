"""wav2vec 2.0 and HuBERT for CTC against transformers: logits, padded and not, and back to the same bits."""

import difflib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from bigbase_jax.inference import published
from bigbase_jax.inference.predictor import Predictor
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


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    """Of a second: this small model hears 800 frames in it."""
    monkeypatch.setattr(published, "_HEARD", 16_000)


LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]


@pytest.fixture(scope="module")
def spoken(hf, random_model, tmp_path_factory):
    """(transformers' model, its processor, the folder): random weights that say blanks, letters and pauses."""
    folder = tmp_path_factory.mktemp("wav2vec2")
    theirs = random_model("Wav2Vec2ForCTC", **TINY)
    with hf.torch.no_grad():
        theirs.lm_head.bias[1:4] = -100.0
    theirs.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
    extractor = hf.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    extractor.save_pretrained(folder)
    tokenizer = hf.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    return theirs, (extractor, tokenizer), folder


def said_by_theirs(hf, theirs, processor, x_T):
    extractor, tokenizer = processor
    given = extractor(x_T / np.float32(32768), sampling_rate=16_000, return_tensors="pt").input_values
    with hf.torch.no_grad():
        path = theirs(given).logits.argmax(-1)[0]
    return tokenizer.decode(path), tokenizer.decode(path, output_word_offsets=True).word_offsets


def test_greedy_transcripts_and_words_are_those_of_transformers(hf, spoken, tmp_path):
    theirs, processor, folder = spoken
    x_T = (3000 * np.random.RandomState(1).randn(9000)).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", x_T, 16_000)
    want, words = said_by_theirs(hf, theirs, processor, x_T)
    (got,) = Predictor.open(folder).answer(str(tmp_path / "a.wav"))
    assert len(set(want)) > 5 and len(words) > 1
    assert got["text"] == " ".join(want.split())
    assert [word["word"] for word in got["words"]] == [word["word"] for word in words]
    hop = 20 / 16_000
    for ours, said in zip(got["words"], words, strict=True):
        assert ours["start"] == pytest.approx(said["start_offset"] * hop, abs=2e-3)
        assert ours["end"] == pytest.approx(said["end_offset"] * hop, abs=2e-3)
    assert got["duration"] == round(9000 / 16_000, 3)


def test_long_recordings_are_joined_from_overlapping_windows(hf, spoken, tmp_path):
    theirs, processor, folder = spoken
    x_T = (3000 * np.random.RandomState(2).randn(40_321)).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", x_T, 16_000)
    want, _ = said_by_theirs(hf, theirs, processor, x_T)
    (got,) = Predictor.open(folder).answer(str(tmp_path / "a.wav"))
    assert got["duration"] == round(40_321 / 16_000, 3)
    assert difflib.SequenceMatcher(None, got["text"].replace(" ", ""), want.replace(" ", ""), False).ratio() > 0.8


@pytest.mark.parametrize("samples", [0, 1, 29])
def test_what_is_shorter_than_a_frame_has_no_text(spoken, tmp_path, samples):
    soundfile.write(tmp_path / "a.wav", np.ones(samples, np.int16), 16_000)
    (got,) = Predictor.open(spoken[2]).answer(str(tmp_path / "a.wav"))
    assert got["text"] == "" and got["words"] == []
