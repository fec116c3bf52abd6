"""A published VITS opens in the predictor: its tokenizer is transformers', and it writes the same sound each time."""

import io
import json
import wave

import numpy as np
import pytest

from bigbase_jax import verbs
from bigbase_jax.core import UserError
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.inference.voices import VitsCodec

TINY = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "ffn_dim": 8,
    "flow_size": 6,
    "spectrogram_bins": 5,
    "upsample_initial_channel": 8,
    "upsample_rates": [4],
    "upsample_kernel_sizes": [8],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1]],
    "prior_encoder_num_flows": 1,
    "prior_encoder_num_wavenet_layers": 1,
    "posterior_encoder_num_wavenet_layers": 1,
    "use_stochastic_duration_prediction": False,
    "duration_predictor_filter_channels": 4,
    "num_speakers": 2,
    "speaker_embedding_size": 3,
}
VOCABULARY = {c: i for i, c in enumerate("|abcdefghijklmnopqrstuvwxyz' ")}
TEXTS = ("Hello, World!", "  it's  A b-c ", "ÜBER x", "two. Sentences here")


def folder_of(transformers, path, **about):
    torch = transformers.torch
    torch.manual_seed(0)
    transformers.VitsModel(transformers.VitsConfig(**TINY)).save_pretrained(path)
    (path / "vocab.json").write_text(json.dumps(VOCABULARY))
    said = {"add_blank": True, "normalize": True, "phonemize": False, "is_uroman": False, "language": "eng", **about}
    (path / "tokenizer_config.json").write_text(json.dumps(said))
    return path


@pytest.mark.parametrize("blank", [True, False])
def test_tokens_are_those_of_transformers(tmp_path, blank):
    import transformers

    (tmp_path / "vocab.json").write_text(json.dumps(VOCABULARY))
    words = {"add_blank": blank, "normalize": True, "phonemize": False}
    theirs = transformers.VitsTokenizer(str(tmp_path / "vocab.json"), pad_token="|", unk_token="|", **words)
    codec = VitsCodec({"speakers": ("0",)}, vocabulary=VOCABULARY, **words)
    for text in TEXTS[:3]:
        (example,) = codec.decode({"text": text})
        count = example["present"].sum()
        assert example["tokens"][:count].tolist() == theirs(text)["input_ids"], text
        assert not example["present"][count:].any()


def test_a_folder_speaks(tmp_path):
    import transformers

    transformers.torch = pytest.importorskip("torch")
    path = folder_of(transformers, tmp_path / "voice")
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS, "123 !"]))
    found = io.StringIO()
    assert verbs.predict(str(path), str(tmp_path / "texts.txt"), output=str(tmp_path / "out"), out=found) == 1
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 5 and "nothing in '123 !'" in answers[4]["error"]
    with wave.open(str(tmp_path / "out" / answers[0]["file"])) as sound:
        assert sound.getframerate() == 16_000
        assert sound.getnframes() / 16_000 == pytest.approx(answers[0]["duration"], abs=1e-3)
    predictor = Predictor.open(path)

    def said(**row):
        (answer, made), *_ = predictor.rendered([(e, o) for e, o in outputs(predictor, row)])
        return answer["duration"], made.data

    slow, fast = said(text="hello world", rate=0.5), said(text="hello world", rate=2)
    assert slow[0] > fast[0] and said(text="hello world", rate=2)[1] == fast[1]
    assert said(text="hello world", speaker="1")[1] != said(text="hello world")[1]
    for row, reason in (
        ({"rate": 9}, "0.5 to 2"),
        ({"speaker": "bob"}, "no speaker 'bob'"),
        ({"text": "…"}, "nothing"),
    ):
        with pytest.raises(UserError, match=reason):
            predictor.answer({"text": "a", **row})


def outputs(predictor, row):
    examples = predictor.examples(row)
    return zip(examples, predictor.computed(predictor.cut(examples), 1), strict=True)


@pytest.mark.parametrize("fault", ["uroman", "vocabulary", "no vocabulary", "truncated"])
def test_what_does_not_fit_is_one_sentence(tmp_path, fault):
    import transformers

    transformers.torch = pytest.importorskip("torch")
    path = folder_of(transformers, tmp_path / "voice", is_uroman=fault == "uroman")
    said = {"uroman": "through uroman", "vocabulary": "none of the model's 30", "no vocabulary": "no vocab.json"}
    if fault == "vocabulary":
        (path / "vocab.json").write_text(json.dumps({**VOCABULARY, "é": 30}))
    elif fault == "no vocabulary":
        (path / "vocab.json").unlink()
    elif fault == "truncated":
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-500])
    with pytest.raises(UserError, match=said.get(fault, "model.safetensors")):
        Predictor.open(path)


def test_samples_that_are_no_numbers_are_refused():
    from bigbase_jax.models.vits import Vits
    from bigbase_jax.tasks.vits import PublishedVoice

    voice = PublishedVoice(Vits(3))
    output = {"wave": np.full(9, np.nan), "samples": np.int32(9), "cut": np.bool_(False)}
    with pytest.raises(UserError, match="no numbers"):
        voice.rendered(output, {})
