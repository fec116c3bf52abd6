"""Tokenizers that somebody made to do harm: each ends in one sentence at load; nothing grows, hangs or crashes here."""

import base64
import json

import pytest

from bigbase_jax.core import UserError
from bigbase_jax.runtime import limits
from bigbase_jax.text import tokenizer_checks
from bigbase_jax.text.tokenizer import Subwords, TokenizerFile, encode, load

UNK = {
    "id": 0,
    "content": "[UNK]",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}
WORDS = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}
BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
PIECE = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": {"[UNK]": 0, "a": 1}}
GOOD = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [UNK], "normalizer": None}
GOOD |= {"pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": WORDS}


def replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(key, rules):
    return {"type": "Sequence", key: rules}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def nested(depth):
    node = {"type": "NFC"}
    for _ in range(depth):
        node = sequence("normalizers", [node])
    return node


def charsmap(size, texts=b"\0"):
    data = size.to_bytes(4, "little") + bytes(16) + texts
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def template(*ids, pieces=()):
    pieces = [*pieces, *({"SpecialToken": {"id": i, "type_id": 0}} for i in ids)]
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": {}}


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
GROW, RULES, CANNOT = "let a text grow", "of more than 64 rules, or 8 levels", "is not a tokenizer that can be read"
HOSTILE = {
    "doubling": ({"normalizer": sequence("normalizers", [replace("a", "aa")] * 40)}, GROW),
    "one long rule": ({"normalizer": replace("the", "a" * 10**6)}, GROW),
    "a character that NFKC makes 18": (
        {"normalizer": sequence("normalizers", [replace("a", "\ufdfa"), {"type": "NFKC"}, replace(" ", "a")] * 9)},
        GROW,
    ),
    "a regex that matches nothing": ({"normalizer": replace("", "a" * 1000, "Regex")}, GROW),
    "bytes of bytes": ({"normalizer": sequence("normalizers", [{"type": "ByteLevel"}] * 20)}, GROW),
    "bytes of bytes of pieces": ({"pre_tokenizer": sequence("pretokenizers", [BYTES] * 20)}, GROW),
    "half before and half after": (
        {"normalizer": replace("a", "a" * 20), "pre_tokenizer": sequence("pretokenizers", [BYTES] * 2)},
        GROW,
    ),
    "a decoder": ({"decoder": sequence("decoders", [replace("a", "aa")] * 30)}, GROW),
    "a template": ({"post_processor": template(pieces=[{"Sequence": {"id": "A", "type_id": 0}}] * 1000)}, GROW),
    "a character map": ({"normalizer": charsmap(16, b"x" * 1000 + b"\0")}, GROW),
    "many rules": ({"normalizer": sequence("normalizers", [{"type": "NFC"}] * 10**4)}, RULES),
    "nested rules": ({"normalizer": nested(60)}, RULES),
    "a regex that does not close": ({"normalizer": replace("(", "", "Regex")}, CANNOT),
    "a regex that backtracks": ({"pre_tokenizer": split("(a+)+$")}, f"{CANNOT}: .*retry-limit"),
    "a regex that repeats too much": ({"pre_tokenizer": split("a{100000}{100000}")}, CANNOT),
    "nested brackets": ({"pre_tokenizer": split("(" * 10**5 + ")" * 10**5)}, CANNOT),
    "pieces of length 0": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, f"{CANNOT}: chunk size"),
    "a map that is cut short": ({"normalizer": charsmap(1 << 31)}, "claims more than it holds"),
    "a map whose size is not whole": ({"normalizer": charsmap(3)}, "claims more than it holds"),
    "a map that points elsewhere": ({"normalizer": charsmap(4)}, CANNOT),
    "a template of unknown tokens": ({"post_processor": template("[X]")}, CANNOT),
    "ids of 4e9": ({"model": {**WORDS, "vocab": {"[UNK]": 0, "a": 4_000_000_000}}}, "has the token id 4000000000"),
    "ids of 2^70": ({"model": {**WORDS, "vocab": {"[UNK]": 0, "a": 1 << 70}}}, "has the token id 118"),
    "ids below 0": ({"model": {**WORDS, "vocab": {"[UNK]": 0, "a": -1}}}, "has the token id -1"),
    "ids that are words": ({"model": {**WORDS, "vocab": {"[UNK]": "0"}}}, "has the token id '0'"),
    "added ids of 4e9": ({"added_tokens": [{**UNK, "id": 4_000_000_000}]}, "has the token id 4000000000"),
    "added tokens that are none": ({"added_tokens": [{**UNK, "content": 3}]}, "added_tokens"),
    "merges of other pieces": ({"model": {**BPE, "merges": ["x y"]}}, f"{CANNOT}: .*out of vocabulary"),
    "a prefix longer than pieces": ({"model": {**BPE, "continuing_subword_prefix": "####"}}, CANNOT),
    "no unknown piece": ({"model": {**PIECE, "unk_token": "[NO]"}}, CANNOT),
    "words without end": ({"model": {**PIECE, "max_input_chars_per_word": 10**12}}, "max_input_chars_per_word"),
    "nothing": ({"model": {"type": "Unigram", "unk_id": None, "vocab": []}, "added_tokens": []}, CANNOT),
    "an unknown piece out of bounds": ({"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}}, CANNOT),
    "another kind": ({"normalizer": {"type": "Evil"}}, CANNOT),
    "a list for an object": ({"normalizer": [1]}, CANNOT),
    "no model": ({"model": None}, CANNOT),
}


def fit(path):
    return TokenizerFile(str(path)).fit(lambda: iter(()), lambda: iter(()), False)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_json_is_one_sentence(name, tmp_path, capfd):
    change, sentence = HOSTILE[name]
    content = json.dumps({**GOOD, **change})
    (tmp_path / "tokenizer.json").write_text(content)
    for read in (
        lambda: fit(tmp_path),
        lambda: load(json.dumps({"kind": "subword", "tokenizer": content, "end": None})),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not capfd.readouterr().err  # no backtrace of Rust's


def test_a_regex_that_takes_its_time_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv(limits.VARIABLE, "0.2")
    (tmp_path / "tokenizer.json").write_text(json.dumps({**GOOD, "pre_tokenizer": split("(?:a|a){22}[x-z]")}))
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer takes more than 1 seconds; .*LIMITS=2"):
        fit(tmp_path)


def test_a_good_one_is_read(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(GOOD))
    assert encode(fit(tmp_path), "a b a").tolist() == [1, 0, 1]


def test_what_fails_with_a_text_only_is_one_sentence_too(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({**GOOD, "pre_tokenizer": split("(z|zz)+$")}))
    tokenizer = fit(tmp_path)
    assert encode(tokenizer, "a").tolist() == [1]
    with pytest.raises(UserError, match="the tokenizer fails with this text .*retry-limit"):
        encode(tokenizer, "z" * 60 + "!")
    assert encode(tokenizer, "a").tolist() == [1]


def test_the_limits_can_be_raised(tmp_path, monkeypatch):
    growing = {**GOOD, "normalizer": sequence("normalizers", [replace("a", "aa")] * 9)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(growing))
    with pytest.raises(UserError, match="BIGBASE_LIMITS=2"):
        fit(tmp_path)
    monkeypatch.setenv(limits.VARIABLE, "2")
    assert encode(fit(tmp_path), "a").tolist() == [0]


def test_a_vocabulary_without_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_checks, "MOST_PIECES", 100)
    (tmp_path / "vocab.txt").write_text("[UNK]\n" + "a\n" * 1000)
    with pytest.raises(UserError, match=r"vocab\.txt has a vocabulary of 1,001 entries, more than 100; .*LIMITS"):
        fit(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({**GOOD, "model": {**WORDS, "vocab": {f"{i}": i for i in range(200)}}})
    )
    with pytest.raises(UserError, match=r"tokenizer\.json has a vocabulary of 201 entries"):
        fit(tmp_path)


def test_a_tokenizer_json_that_is_nested_or_huge_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text('{"normalizer":' + "[" * 10**5)
    with pytest.raises(UserError, match="nested too deep"):
        fit(tmp_path)
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing
    with pytest.raises(UserError, match=r"tokenizer\.json is larger than"):
        fit(tmp_path)


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


MODELS = {
    "a length of 2^60": (varint(1 << 3 | 2) + varint(1 << 60), "not a SentencePiece model"),
    "a number without end": (b"\xff" * 100, "not a SentencePiece model"),
    "cut short": (field(1, field(1, b"abc"))[:-2], "not a SentencePiece model"),
    "very many pieces": (field(1, b"") * (13 << 20), "is larger than 25,165,824 bytes"),
    "many pieces": (field(1, b"") * (2 << 20), "holds more than 1,048,576 pieces"),
    "a piece of unknown fields": (field(1, b"\x08\x01" * 100), "a piece without a name"),
    "a piece without a name": (field(1, b"\x18\x01"), "a piece without a name"),
    "a name that is no text": (field(1, field(1, b"\xff\xfe")), "tokenizer.model"),
    "messages in messages": (b"\x1b" * 10**6, "not a SentencePiece model"),
    "a long piece": (field(1, field(1, b"a" * 10**6)), "a piece of more than 1,024 bytes"),
    "a map that is cut short": (
        field(1, field(1, b"a")) + field(3, field(2, (1 << 31).to_bytes(4, "little") + bytes(8))),
        "claims more than it holds",
    ),
    "a map that grows": (
        field(1, field(1, b"a")) + field(3, field(2, bytes(4) + b"x" * 1000)),
        "more than 64 characters of one",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_sentencepiece_model_is_one_sentence(name, tmp_path, capfd):
    content, sentence = MODELS[name]
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(
        UserError, match=f"tokenizer.model is not a tokenizer that can be read: .*{sentence}|{sentence}"
    ):
        fit(tmp_path)
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    "state",
    [
        "",
        "[]",
        "{}",
        "[" * 10**5,
        '{"kind": "evil"}',
        '{"kind": "symbols", "evil": 1}',
        '{"kind": "symbols", "special": ["evil"]}',
        '{"kind": "marian", "vocabulary": {"<unk>": 0, "</s>": 4000000000}, "models": [""], "end": null}',
        '{"kind": "subword", "tokenizer": 3, "end": 1}',
    ],
)
def test_a_state_that_is_none_is_one_sentence(state):
    with pytest.raises(UserError):
        load(state)


def test_files_of_a_folder_are_in_it(tmp_path):
    (tmp_path / "secret").write_text(json.dumps(GOOD))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(UserError, match="outside of its folder"):
        fit(folder)
    assert encode(fit(folder / "tokenizer.json"), "a").tolist() == [1]  # which the user has named


def test_our_own_tokenizers_pass_the_checks():
    for algorithm in ("bpe", "unigram", "wordpiece"):
        texts = lambda: iter(["the cat and the dog, 猫 "] * 30)  # noqa: E731
        made = Subwords(algorithm, 300).fit(texts, texts, True, ["pad", "cls", "sep", "mask"])
        assert encode(load(made.state()), "cat").tolist() == encode(made, "cat").tolist()
