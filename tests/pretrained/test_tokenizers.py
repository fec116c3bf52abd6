"""Our tokenizers as files: transformers' AutoTokenizer gives the same tokens and the same text."""

import json

import pytest

from bigbase_jax.pretrained.tokenizers import ids, published
from bigbase_jax.text.tokenizer import Subwords, Symbols

TEXT = "Die Katze (cat) – 猫 und <0x41> 🐈\n\ttabs, ünicode: naïve <|endoftext|> x"


def learned(algorithm):
    texts = lambda: iter(["the cat and the dog and the bird, die Katze, 猫 "] * 30)  # noqa: E731
    return Subwords(algorithm, 300).fit(texts, texts, True)


TOKENIZERS = {
    "bytes": lambda: Symbols(),
    "bytes and an end": lambda: Symbols(end=True),
    "characters": lambda: Symbols("".join(sorted(set("Die Katz(c)\n"))), True, True, ["pad", "cls", "sep"]),
    "characters without bytes": lambda: Symbols("".join(sorted(set(TEXT))), False, True),
    "bpe": lambda: learned("bpe"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_same_tokens_and_text(hf, name, tmp_path):
    ours = TOKENIZERS[name]()
    for file, content in published(ours).items():
        (tmp_path / file).write_bytes(content)
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT.replace("<|endoftext|>", "")  # which in theirs is a token
    tokens = ours.encode_batch([text])[0][0].tolist()
    assert theirs(text).input_ids == tokens
    assert theirs.decode(tokens) == text == ours.decode(tokens)
    assert theirs.eos_token_id == ours.end
    assert theirs.pad_token_id == ours.special.get("pad")
    assert len(theirs) == ours.size
    if ours.end is not None:
        assert theirs("<|endoftext|>").input_ids == [ours.end]


def test_what_a_config_says_of_special_tokens():
    assert ids(Symbols()) == {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    assert ids(Symbols(end=True, special=["pad"])) == {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
    config = json.loads(published(Symbols(special=["mask", "start"]))["tokenizer_config.json"])
    assert (config["mask_token"], config["bos_token"]) == ("[MASK]", "<s>")
    assert "eos_token" not in config
