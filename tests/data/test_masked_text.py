"""Text for masked language modelling: layout and packing of documents, what is hidden, and how much of it."""

import pathlib

import numpy as np
import pytest

from bigbase_jax.core import RawDataset, UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.masked_text import MaskedPythonReference, MaskedTextFiles
from bigbase_jax.data.tokenizer import Bytes, Subwords, TokenizerFile, load
from bigbase_jax.data.transforms.mask_tokens import NONE, MaskTokens

TEXTS = ["the cat sat on the mat", "a dog", "hi", "x" * 50, "once upon a time there was a very long sentence here"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    (tmp_path / "val.jsonl").write_text('{"text": "the dog sat on the cat"}\n')
    return tmp_path


def prepared(folder, **words):
    words = {"tokenizer": Bytes(), "length": 16, **words}
    return MaskedTextFiles(root=str(folder), **words).prepare(folder / "cache", 0, lambda line: None)


def test_documents_stand_whole_and_once_between_their_special_tokens(folder):
    data = prepared(folder)
    facts, source = data.facts, data.splits["train"]
    cls, sep, pad = (facts[f"{role}_id"] for role in ("cls", "sep", "pad"))
    assert facts["length"] == 16 and facts["vocab_size"] == 260 and "end_id" not in facts
    pieces = []
    for i in range(len(source)):
        example = source[i]
        tokens, segments = example["tokens"], example["segments"]
        assert (tokens[segments == 0] == pad).all() and (example["words"][segments == 0] == 0).all()
        for segment in range(1, segments.max() + 1):
            piece = tokens[segments == segment]
            assert piece[0] == cls and piece[-1] == sep
            np.testing.assert_array_equal(example["positions"][segments == segment], np.arange(len(piece)))
            words = example["words"][segments == segment]
            assert words[0] == words[-1] == 0 and (words[1:-1] > 0).all()
            pieces.append(bytes(piece[1:-1].tolist()).decode())
    expected = sorted(text[i : i + 14] for text in TEXTS for i in range(0, len(text), 14))
    assert sorted(pieces) == expected
    filled = np.mean([source[i]["segments"] > 0 for i in range(len(source))])
    assert source.fill == pytest.approx(filled) and f"{source.fill:.1%}" in data.description
    assert len(source) < len(pieces)  # some are packed
    with pytest.raises(IndexError):
        source[len(source)]


def test_words_are_told_apart(folder):
    source = prepared(folder, length=32).splits["val"]
    words = source[0]["words"]
    text = source[0]["tokens"]
    parts = [bytes(text[words == w].tolist()).decode() for w in range(1, words.max() + 1)]
    assert "".join(parts) == "the dog sat on the cat"
    assert {"the", "dog", "cat"} <= set(parts)


def test_the_same_masks_again_and_others_for_another_use(folder):
    assert isinstance(MaskedTextFiles(root=str(folder)), RawDataset)
    node = MaskedTextFiles(root=str(folder), tokenizer=Bytes(), length=16)
    data = Data(node, 4, (MaskTokens(),), (MaskTokens(),), cache_limit_gb=0, seed=3).prepare(lambda line: None)

    def batches(start, count):
        with data.train_batches(start) as stream:
            return [next(stream) for _ in range(count)]

    first, again = batches(0, 12), batches(5, 1)
    np.testing.assert_array_equal(first[5]["at"], again[0]["at"])
    assert first[0]["tokens"].shape == (4, 16) and first[0]["at"].shape == (4, 3)
    assert set(first[0]) == {"tokens", "segments", "positions", "types", "at", "targets", "mask", "index"}
    of_example = {}
    for batch in first:
        for index, at in zip(batch["index"], batch["at"], strict=True):
            of_example.setdefault(int(index), set()).add(tuple(at))
    assert max(map(len, of_example.values())) > 1
    fixed = [[b["at"] for b in data.eval_batches("val")] for _ in range(2)]
    np.testing.assert_array_equal(*fixed)


def example_of(words, vocab=1000, mask=999):
    words = np.array(words, np.int32)
    tokens = np.arange(1, len(words) + 1, dtype=np.int32)
    return {"tokens": tokens, "words": words, "mask_id": np.int32(mask), "vocab_size": np.int32(vocab)}


def test_shares_of_what_becomes_of_hidden_tokens():
    words = [0, *range(1, 399), 0]
    example, rng = example_of(words), np.random.default_rng(0)
    count = masked = same = 0
    often = np.zeros(400, int)
    for _ in range(200):
        found = MaskTokens()(example, rng)
        at = found["at"][found["at"] != NONE]
        assert len(at) == 60 and (np.diff(at) > 0).all()
        np.testing.assert_array_equal(found["targets"][: len(at)], example["tokens"][at])
        rest = np.setdiff1d(np.arange(400), at)
        np.testing.assert_array_equal(found["tokens"][rest], example["tokens"][rest])
        count, masked = count + len(at), masked + (found["tokens"][at] == 999).sum()
        same += (found["tokens"][at] == example["tokens"][at]).sum()
        often[at] += 1
    assert masked / count == pytest.approx(0.8, abs=0.02) and same / count == pytest.approx(0.1, abs=0.015)
    assert often[[0, 399]].sum() == 0 and often[1:399].min() > 10  # every word has its turn, special tokens never
    assert example["tokens"][5] == 6  # the example is left alone


def test_whole_words_and_single_tokens():
    words = [0, *np.repeat(np.arange(1, 31), 3), 0]
    rng = np.random.default_rng(0)
    for _ in range(50):
        at = MaskTokens()(example_of(words), rng)["at"]
        hidden = np.array(words)[at[at != NONE]]
        assert (np.unique(hidden, return_counts=True)[1] == 3).all() and 9 <= len(hidden) <= 14
    singles = [MaskTokens(whole_words=False)(example_of(words), rng)["at"] for _ in range(50)]
    assert all((at != NONE).sum() == 14 for at in singles)
    parts = [np.unique(np.array(words)[at[at != NONE]], return_counts=True)[1] for at in singles]
    assert any((counts < 3).any() for counts in parts)


def test_short_texts_have_one_hidden_word_and_long_words_none():
    rng = np.random.default_rng(0)
    found = MaskTokens(max_masked=4)(example_of([0, 1, 1, 2, 2, 0, 0, 0]), rng)
    assert (found["at"] != NONE).sum() == 2
    found = MaskTokens(max_masked=4)(example_of([0, 1, 1, 1, 1, 1, 0, 0]), rng)
    assert (found["at"] == NONE).all() and (found["targets"] == NONE).all()


def test_a_users_masks_are_what_is_asked(folder, tmp_path):
    data = prepared(folder, length=32)
    (tmp_path / "a.txt").write_text("the [MASK] sat on the [MASK]")
    (example,) = data.read(str(tmp_path / "a.txt"))
    found = MaskTokens()(example, np.random.default_rng(0))
    mask = data.facts["mask_id"]
    np.testing.assert_array_equal(found["at"][:2], np.flatnonzero(found["tokens"] == mask))
    assert (found["targets"] == NONE).all() and (found["at"] != NONE).sum() == 2
    (tmp_path / "b.txt").write_text("[MASK] " * 9)
    with pytest.raises(UserError, match="9 masks"):
        MaskTokens()(data.read(str(tmp_path / "b.txt"))[0], np.random.default_rng(0))
    (tmp_path / "c.txt").write_text("word " * 20)
    assert [int((e["segments"] > 0).sum()) for e in data.read(str(tmp_path / "c.txt"))] == [32, 32, 32, 11]
    (tmp_path / "d.txt").write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        data.read(str(tmp_path / "d.txt"))


def test_learned_and_published_tokenizers(tmp_path):
    words = {"val_fraction": 0.05, "test_fraction": 0.05, "length": 32}
    node = MaskedPythonReference(tokenizer=Subwords("wordpiece", 500), **words)
    data = node.prepare(tmp_path / "cache", 1e9, lambda line: None)
    pieces = load(data.facts["tokenizer"]).pieces(data.splits["train"][0]["tokens"].tolist())
    assert pieces[0] == "[CLS]" and pieces[-1] == "[SEP]"
    starts = np.array([not piece.startswith("##") for piece in pieces[1:-1]])
    np.testing.assert_array_equal(np.diff(data.splits["train"][0]["words"][1:-1]), starts[1:])
    assert data.fingerprint() == node.prepare(tmp_path / "cache", 1e9, lambda line: None).fingerprint()
    vocab = pathlib.Path(tmp_path / "vocab.txt")
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abc"]))
    with pytest.raises(UserError, match="no mask token"):
        MaskedPythonReference(tokenizer=TokenizerFile(str(vocab)), **words).prepare(tmp_path, 0, lambda line: None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"rate": 0}, "rate is 0"),
        ({"replaced": 0.6, "kept": 0.6}, "their sum is at most 1"),
        ({"max_masked": 0}, "max_masked is 0"),
    ],
)
def test_mistakes_are_named(words, sentence):
    with pytest.raises(UserError, match=sentence):
        MaskTokens(**words)
    with pytest.raises(UserError, match="needs words, mask_id, vocab_size"):
        MaskTokens()({"tokens": np.zeros(3, np.int32)}, np.random.default_rng(0))
    with pytest.raises(UserError, match="length is 3"):
        MaskedPythonReference(length=3)
