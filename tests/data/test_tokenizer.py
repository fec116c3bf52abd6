"""Tokenizers: round trips in English and Chinese, bytes counted exactly, nothing in a text is special."""

import io
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from bigbase_jax.core import UserError
from bigbase_jax.text.tokenizer import (
    END,
    FIRST,
    SECOND,
    Bytes,
    Characters,
    Subwords,
    Symbols,
    TokenizerFile,
    compose,
    dataset_info_of,
    encode,
    lacking,
    load,
    word_starts,
)

TRAIN = (
    "The quick brown fox jumps over the lazy dog; the dog sleeps on.\n" * 20,
    "明月几时有？把酒问青天。不知天上宫阙，今夕是何年。\n" * 20,
)
HARD = (
    "The lazy fox.",
    "明月照青天，不知何年。",
    "  two  spaces,\ttabs\r\nand CRLF \n\n",
    "naïve Ünïcode 🦊👩‍👩‍👧 \u200b é vs e\u0301",
    f"not special: {END} <unk> <0x41> </s> [SEP] [UNK]",
    "",
)
EXACT = (Bytes(), Characters(), Characters(fallback=True), Subwords("bpe", 320), Subwords("unigram", 120))


def fitted(spec, end=True, others=HARD):
    return spec.fit(lambda: iter(TRAIN), lambda: iter(others), end)


@pytest.mark.parametrize("spec", EXACT, ids=repr)
def test_round_trips_are_exact_and_every_byte_belongs_to_a_token(spec):
    made = fitted(spec)
    again = load(made.state())
    assert made.state() == again.state() and (again.size, again.end) == (made.size, made.size - 1)
    for text, (tokens, counts) in zip((*TRAIN, *HARD), again.encode_batch([*TRAIN, *HARD]), strict=True):
        assert again.decode(tokens) == text
        assert counts.sum() == len(text.encode()) and len(counts) == len(tokens) and (counts >= 0).all()
        assert tokens.dtype == counts.dtype == np.int32
        assert made.end not in tokens and (tokens < made.size).all()
        np.testing.assert_array_equal(tokens, encode(made, text))
    assert again.decode([*encode(again, "fox"), again.end]) == "fox"
    assert again.pieces([again.end]) == [END]


def test_a_document_is_worth_its_bytes_also_where_the_tokenizer_changes_it():
    made = fitted(Subwords("wordpiece", 200))
    assert made.token_bytes is None and made.pieces([made.end]) == ["[SEP]"]
    for text, (tokens, counts) in zip(HARD, made.encode_batch(HARD), strict=True):
        assert counts.sum() == len(text.encode()) if text else not len(tokens)
        assert made.end not in tokens
    (tokens, counts), *_ = made.encode_batch(["  The fox  "])
    assert made.decode(tokens) == "The fox" and counts.sum() == 11 and counts[-1] >= len("fox  ")
    chinese = Subwords("wordpiece", 200).fit(lambda: iter(["明月几时有，把酒问青天 The fox。"]), lambda: iter([]), True)
    assert chinese.decode(encode(chinese, "明月有酒，The 天 fox")) == "明月有酒， The 天 fox"


def test_words_are_tokens_and_others_are_unknown():
    texts = ["yes no yes no", "no no maybe"]
    made = load(Subwords("words", 3).fit(lambda: iter(texts), lambda: iter([]), False).state())
    assert made.spelled() == [b"", b" no", b" yes"] and made.token_bytes is None
    for text, tokens, said in (
        ("no yes  yes ", [1, 2, 2], "no yes yes"),
        ("no maybe", [1, 0], "no[UNK]"),
        ("[UNK]", [0], "[UNK]"),
        ("", [], ""),
    ):
        ((found, counts),) = made.encode_batch([text])
        assert found.tolist() == tokens and made.decode(found) == said and counts.sum() == len(text.encode())
    assert word_starts(made, np.array([1, 2, 2])).all()


# ----------------------------------------------------------------------------------------------------- special tokens


def test_the_same_texts_give_the_same_vocabulary_in_another_process():
    learn = """
import hashlib, pydoc_data.topics
from bigbase_jax.text.tokenizer import Subwords
texts = [text for _, text in sorted(pydoc_data.topics.topics.items())[:20]]
for spec in (Subwords("bpe", 600), Subwords("wordpiece", 600)):
    state = spec.fit(lambda: iter(texts), lambda: iter([]), True, ("pad", "mask")).state()
    print(hashlib.sha256(state.encode()).hexdigest())
"""
    said = [subprocess.run([sys.executable, "-c", learn], capture_output=True, text=True) for _ in range(2)]
    assert said[0].stdout == said[1].stdout and len(set(said[0].stdout.split())) == 2, said[0].stderr


@pytest.mark.parametrize("spec", [*EXACT, Subwords("wordpiece", 200)], ids=repr)
def test_special_tokens_are_had_where_asked_for_and_no_text_holds_them(spec):
    roles = ("pad", "cls", "sep", "mask", "start", "turn", "stop")
    plain, made = fitted(spec), spec.fit(lambda: iter(TRAIN), lambda: iter(HARD), True, roles)
    again = load(made.state())
    assert again.special == made.special and set(made.special) >= set(roles)
    assert len({*made.special.values(), made.end}) >= 6 and max(made.special.values()) < made.size
    dataset_info = dataset_info_of(again)
    assert dataset_info["end_id"] == made.end and all(
        dataset_info[f"{role}_id"] == made.special[role] for role in roles
    )
    ids = {*made.special.values(), made.end}
    for text in HARD:
        tokens = encode(made, text)
        assert not ids & set(tokens.tolist())
        if not isinstance(spec, Subwords) or spec.algorithm == "bpe":
            np.testing.assert_array_equal(tokens, encode(plain, text))
        surrounded = [made.special["cls"], *tokens, made.special["sep"], made.special["pad"], made.end]
        assert made.decode(surrounded) == made.decode(tokens)
    marked, counts = again.encode_special("<|im_start|>明月 fox<|im_end|>")
    assert (marked[0], marked[-1]) == (made.special["turn"], made.special["stop"])
    np.testing.assert_array_equal(marked[1:-1], encode(made, "明月 fox"))
    assert counts[0] == len("<|im_start|>") and counts.sum() == len("<|im_start|>明月 fox<|im_end|>".encode())
    lacking(again, roles)
    if "mask" not in plain.special:
        with pytest.raises(UserError, match=r"no mask token \(\[MASK\], <mask>\)"):
            lacking(plain, ("mask",))


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "wordpiece"])
def test_a_learned_tokenizer_puts_its_special_tokens_around_a_text_elsewhere_too(algorithm):
    spec = Subwords(algorithm, 300)
    made = spec.fit(lambda: iter(TRAIN), lambda: iter(HARD), False, ("pad", "cls", "sep", "mask"))
    raw = tokenizers.Tokenizer.from_str(json.loads(made.state())["tokenizer"])
    first, second = encode(made, "the fox").tolist(), encode(made, "a dog").tolist()
    cls, sep = made.special["cls"], made.special["sep"]
    assert raw.encode("the fox").ids == [cls, *first, sep]
    pair = raw.encode("the fox", "a dog")
    assert pair.ids == [cls, *first, sep, *second, sep]
    assert pair.type_ids == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert made.layout(True) == ((cls, FIRST, sep, SECOND, sep), (0, 0, 0, 1, 1))


def bert(hf_processor=True):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##s", "dog", "明", "fox", "quick", "brown", "##ly"]
    raw = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    raw.add_special_tokens(words[:5])
    if hf_processor:
        raw.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return raw


@pytest.mark.parametrize("kind", ["bert", "roberta", "none"])
@pytest.mark.parametrize("length", [5, 7, 8, 30])
def test_texts_and_pairs_are_put_together_and_cut_as_hugging_face_does(tmp_path, kind, length):
    raw = bert()
    if kind == "roberta":
        raw.post_processor = tokenizers.processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    raw.save(str(tmp_path / "tokenizer.json"))
    if kind == "none":
        bert(False).save(str(tmp_path / "tokenizer.json"))
    made = load(fitted(TokenizerFile(str(tmp_path))).state())
    raw.enable_truncation(length)
    for first, second in [("the dogs", None), ("the quick brown fox", None), ("", None)] + [
        ("the dog " * a, "fox 明 brown " * b) for a in (0, 1, 5) for b in (0, 1, 3)
    ]:
        expected = raw.encode(first, second) if second is not None else raw.encode(first)
        pair = [encode(made, text) for text in (first, second) if text is not None]
        tokens, token_type_ids, text = compose(made.layout(second is not None), pair, length)
        assert text.tolist() == [place is not None for place in expected.sequence_ids]
        assert tokens.tolist() == expected.ids and token_type_ids.tolist() == expected.type_ids
        assert tokens.dtype == token_type_ids.dtype == np.int32


def test_layouts_are_those_of_the_file_or_of_the_tokens_there_are(tmp_path):
    bpe = Subwords("bpe", 300).fit(lambda: iter(TRAIN), lambda: iter(()), False, ("cls", "sep"))
    cls, sep = (bpe.special[role] for role in ("cls", "sep"))
    assert bpe.layout(True) == ((cls, FIRST, sep, SECOND, sep), (0, 0, 0, 1, 1)) and bpe.layout(False)[0][1] == FIRST
    assert Symbols().layout(True) == ((FIRST, SECOND), (0, 1))
    assert Symbols(special=("sep",)).layout(False) == ((FIRST, 256), (0, 0))


def test_words_begin_where_a_reader_sees_them_begin():
    def words(made, text):
        tokens = encode(made, text)
        starts = np.flatnonzero(word_starts(made, tokens))
        return ["".join(made.pieces(part)) for part in np.split(tokens, starts)[1:]]

    word_piece = load(json.dumps({"kind": "subword", "tokenizer": bert().to_str(), "end": 3}))
    tokens = encode(word_piece, "the dogs quick quickly, fox")
    assert word_starts(word_piece, tokens).tolist() == [True, True, False, True, True, False, True, True]
    text = "The fox's 12 dogs, naïve 明月."
    found = ["The", " ", "fox", "'", "s", " ", "12", " ", "dogs", ",", " ", "naïve", " ", "明", "月", "."]
    assert words(Characters().fit(lambda: iter([text]), lambda: iter(()), False), text) == found
    in_bytes = np.flatnonzero(word_starts(Symbols(), encode(Symbols(), text)))
    assert [bytes(w).decode() for w in np.split(encode(Symbols(), text).astype(np.uint8), in_bytes)[1:]] == found
    bpe = fitted(Subwords("bpe", 320))
    assert words(bpe, "the lazy dog; the fox2")[:3] == ["the", " lazy", " dog"] and words(bpe, "a fox2")[-1] == "2"
    assert len(words(bpe, "明月何今")) == 3  # of which 明月 is one token
    made = Symbols(special=("mask",))
    assert word_starts(made, np.array([97, 256, 98, 99])).tolist() == [True, True, True, False]
    assert word_starts(made, np.zeros(0, np.int32)).shape == (0,)


def test_characters_are_those_of_the_training_text_in_order():
    made = Characters().fit(lambda: iter(["banana", "cab"]), lambda: iter(["nab"]), False)
    assert (made.size, made.end) == (4, None)
    assert encode(made, "cab").tolist() == [2, 0, 1]
    assert made.pieces([0, 3]) == ["a", "n"] and made.token_bytes.tolist() == [1, 1, 1, 1]
    with pytest.raises(UserError, match=r"'月' \(U\+6708\) is not among the 4"):
        encode(made, "a月")
    strict = fitted(Characters(fallback=False))
    with pytest.raises(UserError, match="not among"):
        encode(strict, "🦊")


def test_other_characters_cost_their_bytes_where_validation_text_has_some():
    made = Characters().fit(lambda: iter(["ab"]), lambda: iter(["a月"]), True)
    assert made.size == 2 + 256 + 1
    tokens, counts = made.encode_batch(["a月b🦊"])[0]
    assert tokens.tolist() == [0, *(2 + b for b in "月".encode()), 1, *(2 + b for b in "🦊".encode())]
    assert counts.tolist() == [1] * 9
    assert made.pieces(tokens[:3]) == ["a", "\\xe6", "\\x9c"]


def test_bytes_are_bytes():
    made = fitted(Bytes(), end=False)
    assert (made.size, made.end) == (256, None)
    assert encode(made, "aé").tolist() == [97, 0xC3, 0xA9]
    assert made.decode([0xC3]) == "\ufffd"


def test_bpe_learns_the_same_twice_and_shows_its_pieces():
    made = fitted(Subwords("bpe", 300))
    assert made.state() == fitted(Subwords("bpe", 300)).state()
    assert made.size == 301
    assert len(encode(made, TRAIN[0])) < len(TRAIN[0]) / 1.8
    assert "".join(made.pieces(encode(made, "the fox"))) == "the fox"


def test_unknown_words_and_sizes_are_one_sentence():
    with pytest.raises(UserError, match="Did you mean 'unigram'"):
        Subwords("unigramm")
    with pytest.raises(UserError, match="bpe needs at least 257"):
        Subwords("bpe", 100)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("spec", [Subwords("bpe", 320), Subwords("unigram", 120)], ids=repr)
def test_a_tokenizer_json_is_read(tmp_path, spec):
    made = fitted(spec)
    (tmp_path / "tokenizer.json").write_text(json.loads(made.state())["tokenizer"])
    read = fitted(TokenizerFile(str(tmp_path)))
    assert read.end == made.end
    for text in HARD:
        np.testing.assert_array_equal(encode(read, text), encode(made, text))
    assert TokenizerFile(str(tmp_path)).file_signature()[0] == "tokenizer.json"


def test_special_tokens_that_a_file_puts_around_texts_are_left_out(tmp_path):
    raw = tokenizers.Tokenizer.from_str(json.loads(fitted(Subwords("wordpiece", 200)).state())["tokenizer"])
    pair = [(name, raw.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pair)
    raw.enable_truncation(4)
    raw.save(str(tmp_path / "tokenizer.json"))
    read = fitted(TokenizerFile(str(tmp_path / "tokenizer.json")))
    tokens = encode(read, TRAIN[0])
    assert len(tokens) > 4 and not {token for _, token in pair} & set(tokens.tolist())


@pytest.mark.parametrize(("extra", "lowers"), [("fox", True), ("Fox", False)])
def test_a_vocab_txt_is_read(tmp_path, extra, lowers):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##s", "dog", "明", extra]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    read = fitted(TokenizerFile(str(tmp_path)))
    assert (read.size, read.end) == (10, 3)
    assert encode(read, "The dogs 明明").tolist() == [5 if lowers else 1, 7, 6, 8, 8]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert encode(fitted(TokenizerFile(str(tmp_path))), "The").tolist() == [1]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(("byte_fallback", "rule"), [(True, "nmt_nfkc"), (False, "nmt_nfkc"), (False, "identity")])
def test_a_sentencepiece_model_gives_its_own_librarys_tokens(tmp_path, kind, byte_fallback, rule):
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain.from_iterable(text.splitlines() for text in TRAIN),
        model_writer=model,
        vocab_size=340 if byte_fallback else 84,
        model_type=kind,
        byte_fallback=byte_fallback,
        normalization_rule_name=rule,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    reference = spm.SentencePieceProcessor(model_proto=model.getvalue())
    read = fitted(TokenizerFile(str(tmp_path / "spiece.model")))
    assert read.pieces([read.end]) == ["</s>"] and read.size == reference.vocab_size()
    odd = ("  \u3000the\t dog\n ", "\x0bthe\x0c")
    for text in ("The lazy fox.", "明月照青天，不知何年。", "the  dog  sleeps", "quick 🦊 fox", "ﬁve Ｆｏｘ", *odd):
        assert encode(read, text).tolist() == reference.encode(text), text
        if reference.unk_id() not in reference.encode(text):  # which the library shows as ⁇, Hugging Face as <unk>
            assert read.decode(encode(read, text)) == reference.decode(reference.encode(text))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", b"{", "tokenizer.json cannot be read as JSON"),
        ("vocab.txt", b"a\nb\n", "no entry"),
        ("vocab.txt", b"\xff\xfe", "is not a tokenizer that can be read"),
        ("m.model", b"\xff\xff", "is not a SentencePiece model"),
        ("m.model", b"", "no pieces"),
        ("other.bin", b"", "no tokenizer.json, vocab.txt"),
        (None, b"", "there is no tokenizer at"),
    ],
)
def test_files_that_are_no_tokenizers_are_one_sentence(tmp_path, name, content, says):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        fitted(TokenizerFile(str(tmp_path if name else tmp_path / "none")))


def test_the_table_of_symbols_covers_the_highest_code_points():
    made = Symbols("a\U0010ffff", fallback=False)
    assert encode(made, "\U0010ffffa").tolist() == [1, 0]
    with pytest.raises(UserError):
        encode(made, "\U0010fffe")
