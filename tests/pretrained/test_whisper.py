"""Whisper against transformers: the same logits, in odd shapes and with 128 bands, back to the same bits, and the same
transcripts of windows and of long recordings."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import tokenizers

from bigbase_jax.audio.features import compressed, in_blocks, whisper
from bigbase_jax.core import UserError
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.models.whisper import Whisper, sinusoids
from bigbase_jax.pretrained import load, save
from bigbase_jax.tasks.transcription import Format
from bigbase_jax.text.tokenizer import TokenizerFile

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


# ------------------------------------------------------------------------------------------------- what it writes

END, START, EN, DE, TRANSLATE, TRANSCRIBE, PREVIOUS, NO_SPEECH, NO_TIMES = range(256, 265)
SPOKEN = {
    **TINY,
    "vocab_size": 303,
    "max_source_positions": 37,
    "max_target_positions": 60,
    "decoder_layers": 2,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), END),
    "decoder_start_token_id": START,
    "begin_suppress_tokens": None,
}
WRITES = {
    "no_timestamps_token_id": NO_TIMES,
    "prev_sot_token_id": PREVIOUS,
    "lang_to_id": {"<|en|>": EN, "<|de|>": DE},
    "task_to_id": {"translate": TRANSLATE, "transcribe": TRANSCRIBE},
    "is_multilingual": True,
    "suppress_tokens": [5, 17],
    "begin_suppress_tokens": [32, END],
    "max_initial_timestamp_index": 10,
    "max_length": 60,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), END),
    "decoder_start_token_id": START,
}


@pytest.fixture(scope="module")
def spoken(hf, random_model, tmp_path_factory):
    """(transformers' model, its folder): random weights, bytes as text, a window of 0.74 s."""
    folder = tmp_path_factory.mktemp("spoken")
    theirs = random_model("WhisperForConditionalGeneration", **SPOKEN)
    with hf.torch.no_grad():  # or it would write one token again and again
        theirs.model.decoder.embed_positions.weight *= 8
    theirs.generation_config = hf.GenerationConfig(**WRITES)
    theirs.save_pretrained(folder)
    hf.WhisperFeatureExtractor().save_pretrained(folder)
    save_tokenizer(folder)
    return theirs, folder


def save_tokenizer(folder):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    names = "endoftext startoftranscript en de translate transcribe startofprev nospeech notimestamps"
    tokenizer.add_special_tokens([f"<|{name}|>" for name in names.split()])
    tokenizer.add_tokens([f"<|{0.02 * i:.2f}|>" for i in range(38)])
    tokenizer.save(str(folder / "tokenizer.json"))


def sound(seconds, seed=0):
    """i16[T] of tones that change every quarter of a second, and noise."""
    random, t = np.random.RandomState(seed), np.arange(int(16_000 * seconds)) / 16_000
    tones = random.uniform(200, 4000, (len(t) // 4000 + 1, 1)).repeat(4000, 1).ravel()[: len(t)]
    return (3000 * np.sin(2 * np.pi * tones * t) + 300 * random.randn(len(t))).astype(np.int16)


def heard_by_theirs(hf, x_T, whole):
    extractor = hf.WhisperFeatureExtractor()
    words = {"truncation": False, "padding": "longest"} if whole else {"max_length": 74 * 160}
    given = extractor(x_T / np.float32(32768), sampling_rate=16_000, return_tensors="pt", **words)
    return given.input_features


def opened(folder, **words):
    predictor = Predictor.open(folder)
    plain = {"temperatures": (0.0,), "compression": None, "log_p": None, "no_speech": None, **words}
    predictor.task = dataclasses.replace(predictor.task, **plain)
    return predictor


def wav(path, x_T):
    soundfile.write(path, x_T, 16_000, subtype="PCM_16")
    return str(path)


@pytest.mark.parametrize("language", [None, "de"])
def test_a_window_is_written_as_transformers_writes_it(hf, spoken, tmp_path, language):
    theirs, folder = spoken
    predictor = opened(folder, timestamps=False)
    for seed in range(3):
        x_T = sound(0.7, seed)
        features = heard_by_theirs(hf, x_T, False)
        want = theirs.generate(features, language=language, task="transcribe")[0].tolist()
        (example,) = predictor.examples(wav(tmp_path / "a.wav", x_T))
        example["language"] = np.int32(predictor.task.token_of(language) if language else -1)
        (got,) = predictor.computed([example], 1)
        assert len(set(want)) > 4
        assert got["tokens"][: int(got["count"])].tolist() == want


@pytest.mark.parametrize("condition", [False, True])
def test_long_recordings_are_written_as_transformers_writes_them(hf, spoken, tmp_path, condition):
    theirs, folder = spoken
    x_T = sound(2.53)
    found = theirs.generate(
        heard_by_theirs(hf, x_T, True),
        return_timestamps=True,
        return_segments=True,
        task="transcribe",
        condition_on_prev_tokens=condition,
        temperature=(0.0,),
        logprob_threshold=-100.0,
    )["segments"][0]
    want = [(round(float(s["start"]), 2), round(float(s["end"]), 2), s["tokens"].tolist()) for s in found]
    predictor = opened(folder, condition=condition)
    parts = []
    task = predictor.task
    object.__setattr__(task, "answer", lambda found, *_: parts.extend(found) or {})
    predictor.answer(wav(tmp_path / "long.wav", x_T))
    got = [(round(float(a), 2), round(float(b), 2), tokens.tolist()) for a, b, tokens in parts]
    assert len(want) > 3
    for ours, said in zip(got, want, strict=True):
        assert ours[:2] == said[:2]
        assert ours[2] == said[2][: len(ours[2])]  # theirs may have the last time twice


def test_windows_without_speech_are_left_out_as_transformers_leaves_them_out(hf, spoken, tmp_path):
    theirs, folder = spoken
    x_T, features = sound(2.53), heard_by_theirs(hf, sound(2.53), True)
    predictor, chances = opened(folder, log_p=0.0, no_speech=1.0), []
    write = predictor._write
    predictor.__dict__["_write"] = lambda *words: chances.append(write(*words)) or chances[-1]
    path = wav(tmp_path / "long.wav", x_T)
    predictor.answer(path)
    limit = float(np.median([float(found["no_speech"][0]) for found in chances]))
    words = {"return_timestamps": True, "return_segments": True, "task": "transcribe", "temperature": (0.0,)}
    found = theirs.generate(features, **words, logprob_threshold=0.0, no_speech_threshold=limit)["segments"][0]
    want = [round(float(s["start"]), 2) for s in found]
    parts = []
    predictor = opened(folder, log_p=0.0, no_speech=limit)
    object.__setattr__(predictor.task, "answer", lambda found, *_: parts.extend(found) or {})
    predictor.answer(path)
    assert [round(float(a), 2) for a, *_ in parts] == want
    assert len(want) > 0


def test_what_is_not_good_enough_is_written_again_at_higher_temperatures(spoken, tmp_path):
    _, folder = spoken
    path = wav(tmp_path / "a.wav", sound(0.7))
    predictor = opened(folder, temperatures=(0.0, 0.5, 1.0), log_p=0.0)
    heats, write = [], predictor._write
    predictor.__dict__["_write"] = lambda *words: heats.append(float(words[-2])) or write(*words)
    (first,) = predictor.answer(path)
    assert heats[:2] == [0.5, 1.0]  # the first is that of the batch
    assert predictor.answer(path) == [first]  # draws by a fixed seed
    heats.clear()
    predictor.task = dataclasses.replace(predictor.task, log_p=None, compression=1e-9)
    predictor.answer(path)
    assert heats[:2] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"language": "xx"}, "knows no language 'xx' .it knows de, en"),
        ({"audio": b"RIFF"}, "no recording that can be read"),
    ],
)
def test_what_it_cannot_hear_is_one_sentence(spoken, tmp_path, given, says):
    with open(wav(tmp_path / "a.wav", sound(0.3)), "rb") as file:
        row = {"audio": file.read(), **given}
    with pytest.raises(UserError, match=says):
        opened(spoken[1]).answer(row)


@pytest.mark.parametrize("samples", [1, 159, 160])
def test_the_shortest_recordings_are_answered(spoken, tmp_path, samples):
    (answer,) = opened(spoken[1]).answer(wav(tmp_path / "a.wav", sound(1)[:samples]))
    assert answer["duration"] == round(samples / 16_000, 3)
    assert answer["segments"] == [] or samples == 160


def test_frames_in_blocks_are_those_of_the_whole_recording():
    features, x_T = whisper(), sound(2.53) / np.float32(32768)
    want = features(x_T[None], np)[0]
    for size in (37, 399, 4000, 99_999):
        parts = list(in_blocks(features, (x_T[i : i + size] for i in range(0, len(x_T), size))))
        found = np.concatenate(parts)
        np.testing.assert_allclose(compressed(found, found.max()), want, atol=1e-4)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("config.json", {"d_model": 24}, "does not fit the model"),
        ("config.json", {"encoder_attention_heads": 5}, "encoder_attention_heads=5"),
        ("config.json", {"decoder_layers": 3}, "lacks"),
        ("preprocessor_config.json", {"feature_size": 128}, "hears 80 bands"),
        ("preprocessor_config.json", {"sampling_rate": 8000}, "only 16000"),
        ("generation_config.json", {"suppress_tokens": ["a"]}, "suppress_tokens"),
        ("model.safetensors", None, "model.safetensors"),
    ],
)
def test_damaged_folders_are_one_sentence(spoken, tmp_path, file, change, says):
    folder = tmp_path / "damaged"
    shutil.copytree(spoken[1], folder)
    if change is None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: len(data) // 2])
    else:
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))
    with pytest.raises(UserError, match=says):
        Predictor.open(folder)


def test_a_vocabulary_with_merges_is_the_tokenizer_that_they_are_of(tmp_path):
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(["how are you", "who are they, and how?"] * 3, vocab_size=290, min_frequency=1)
    theirs.save_model(str(tmp_path))
    size = theirs.get_vocab_size()
    names = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|notimestamps|>"]
    (tmp_path / "added_tokens.json").write_text(json.dumps({name: size + i for i, name in enumerate(names)}))
    ours = TokenizerFile(str(tmp_path)).fit(lambda: iter(()), lambda: iter(()), False)
    text = "who are you? hów"
    tokens = ours.encode_batch([text])[0][0]
    assert tokens.tolist() == theirs.encode(text).ids and len(tokens) < len(text.encode())
    assert ours.decode(tokens) == text
    assert Format.of(ours.special_tokens)[:3] == (size, size + 1, size + 3)
