"""Text for masked language modelling: layout and packing of documents, what is hidden, and how much of it."""

import pathlib

import numpy as np
import pytest

from bigbase_jax.core import RawDataset, UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.text.masked_text import PASSES, MaskedPythonReference, MaskedTextFiles
from bigbase_jax.data.transforms.mask_tokens import NONE, MaskTokens
from bigbase_jax.text.tokenizer import Bytes, Subwords, TokenizerFile, load

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
    dataset_info, source = data.dataset_info, data.splits["train"]
    cls, sep, pad = (dataset_info[f"{role}_id"] for role in ("cls", "sep", "pad"))
    assert dataset_info["length"] == 16 and dataset_info["vocab_size"] == 260 and "end_id" not in dataset_info
    pieces = []
    for i in range(len(source)):
        example = source[i]
        tokens, segment_ids = example["tokens"], example["segment_ids"]
        assert (tokens[segment_ids == 0] == pad).all() and (example["words"][segment_ids == 0] == 0).all()
        for segment in range(1, segment_ids.max() + 1):
            piece = tokens[segment_ids == segment]
            assert piece[0] == cls and piece[-1] == sep
            np.testing.assert_array_equal(example["positions"][segment_ids == segment], np.arange(len(piece)))
            words = example["words"][segment_ids == segment]
            assert words[0] == words[-1] == 0 and (words[1:-1] > 0).all()
            pieces.append(bytes(piece[1:-1].tolist()).decode())
    expected = sorted(text[i : i + 14] for text in TEXTS for i in range(0, len(text), 14))
    assert sorted(pieces) == expected
    filled = np.mean([source[i]["segment_ids"] > 0 for i in range(len(source))])
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
    assert set(first[0]) == {"tokens", "segment_ids", "positions", "token_type_ids", "at", "targets", "mask", "index"}
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
    (example,) = MaskedTextFiles.codec({}, data.dataset_info).decode(str(tmp_path / "a.txt"))
    found = MaskTokens()(example, np.random.default_rng(0))
    mask = data.dataset_info["mask_id"]
    np.testing.assert_array_equal(found["at"][:2], np.flatnonzero(found["tokens"] == mask))
    assert (found["targets"] == NONE).all() and (found["at"] != NONE).sum() == 2
    (tmp_path / "b.txt").write_text("[MASK] " * 9)
    with pytest.raises(UserError, match="9 masks"):
        MaskTokens()(
            MaskedTextFiles.codec({}, data.dataset_info).decode(str(tmp_path / "b.txt"))[0], np.random.default_rng(0)
        )
    (tmp_path / "c.txt").write_text("word " * 20)
    assert [
        int((e["segment_ids"] > 0).sum())
        for e in MaskedTextFiles.codec({}, data.dataset_info).decode(str(tmp_path / "c.txt"))
    ] == [32, 32, 32, 11]
    (tmp_path / "d.txt").write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        MaskedTextFiles.codec({}, data.dataset_info).decode(str(tmp_path / "d.txt"))


# --------------------------------------------------------------------------------------------------------------- pairs


def story(d, words):
    """A document of words and signs, of which no other document has a character."""
    letters, sign = "abcdefghijklmnopqrstu"[3 * d : 3 * d + 3], "+-*/=<>"[d]
    random = np.random.default_rng(d)
    return sign.join("".join(random.choice(list(letters), random.integers(1, 6))) for _ in range(words))


STORIES = [*(story(d, n) for d, n in enumerate((40, 12, 3, 25, 7, 9))), "z"]
"""One has one token, and nothing to be cut."""


def pairs_of(tmp_path, texts=STORIES, val=STORIES[:2], **words):
    for name, given in (("train", texts), ("val", val)):
        path, lines = tmp_path / f"{name}.jsonl", "".join(f'{{"text": "{text}"}}\n' for text in given)
        if not path.exists() or path.read_text() != lines:  # whose time is part of the fingerprint
            path.write_text(lines)
    node = MaskedTextFiles(root=str(tmp_path), **{"tokenizer": Bytes(), "length": 32, "next_sentence": True, **words})
    return node, node.prepare(tmp_path / "cache", 0, lambda line: None)


def texts_in(example, dataset_info):
    """(the first text, the second) of an example that is laid out as it should be."""
    tokens, token_type_ids, segment_ids = (example[name] for name in ("tokens", "token_type_ids", "segment_ids"))
    n = int(segment_ids.sum())
    assert (segment_ids == (np.arange(len(tokens)) < n)).all() and (tokens[n:] == dataset_info["pad_id"]).all()
    first, second = np.flatnonzero(tokens == dataset_info["sep_id"])
    assert tokens[0] == dataset_info["cls_id"] and second == n - 1 and first > 1 and second > first + 1
    np.testing.assert_array_equal(token_type_ids, (np.arange(len(tokens)) > first) * segment_ids)
    np.testing.assert_array_equal(example["positions"], np.arange(len(tokens)) * segment_ids)
    special = np.isin(np.arange(len(tokens)), [0, first, *range(second, len(tokens))])
    np.testing.assert_array_equal(example["words"] == 0, special)
    assert (np.diff(example["words"][~special]) >= 0).all()
    assert example["words"][first + 1] == example["words"][first - 1] + 1  # a word of the second text is another one
    return bytes(tokens[1:first].tolist()).decode(), bytes(tokens[first + 1 : second].tolist()).decode()


def test_half_of_the_second_texts_follow_and_half_are_of_another_document(tmp_path):
    _, data = pairs_of(tmp_path)
    assert data.dataset_info["next_sentence"] and "of two documents" in data.description
    for split, documents in (("train", STORIES), ("val", STORIES[:2])):
        source = data.splits[split]
        examples = [source[i] for i in range(len(source))]
        labels = np.array([example["next"] for example in examples])
        assert abs(labels.sum() - len(labels) / 2) <= 0.5 and examples[0]["next"].dtype == np.int32
        filled, with_first = [], set()
        for example, label in zip(examples, labels, strict=True):
            first, second = texts_in(example, data.dataset_info)
            (d,) = [d for d, text in enumerate(documents) if first[0] in text]
            (e,) = [e for e, text in enumerate(documents) if second[0] in text]
            assert (d == e) == (label == 0) and first in documents[d] and second in documents[e]
            assert label == 1 or first + second in documents[d]
            filled.append(example["segment_ids"].mean())
            with_first.add(d)
        assert source.fill == pytest.approx(np.mean(filled), abs=0.03)
        assert with_first == {d for d, text in enumerate(documents) if len(text) > 1}
    assert len(data.splits["train"]) % PASSES == 0
    with pytest.raises(IndexError):
        source[len(source)]


def test_each_text_goes_as_often_with_its_own_as_with_another_in_new_cuts(tmp_path):
    _, data = pairs_of(tmp_path)
    source = data.splits["train"]
    n = len(source) // PASSES
    labels = np.array([source[i]["next"] for i in range(len(source))]).reshape(PASSES, n)
    assert (labels.sum(0) == PASSES // 2).all() and (labels[0] != labels[1]).all()
    cuts = {tuple(source[i]["token_type_ids"]) for i in range(0, len(source), n)}
    assert len(cuts) > 2
    seen = {texts_in(source[i], data.dataset_info)[1] for i in range(0, len(source), n) if source[i]["next"]}
    assert len(seen) > 2  # of several documents


def test_lengths_and_ends_do_not_tell_which_texts_belong_together(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join("w" * rng.integers(1, 8) for _ in range(rng.integers(2, 40))) for _ in range(300)]
    _, data = pairs_of(tmp_path, texts, length=64)
    source = data.splits["train"]
    examples = [source[i] for i in range(len(source))]
    label = np.array([example["next"] for example in examples]) == 1
    for what in (
        [example["segment_ids"].sum() for example in examples],
        [(example["token_type_ids"] == 1).sum() for example in examples],
        [texts_in(example, data.dataset_info)[1].startswith(" ") for example in examples],
        [example["words"].max() for example in examples],
    ):
        same, other = np.array(what)[~label], np.array(what)[label]
        error = np.sqrt(same.var() / len(same) + other.var() / len(other))
        assert abs(same.mean() - other.mean()) < 4 * error, (same.mean(), other.mean())
        assert len(same) > 2000


def test_pairs_are_a_function_of_seed_and_place(tmp_path):
    def rows(**words):
        node, data = pairs_of(tmp_path, **words)
        return node, data, [data.splits["train"][i] for i in (*range(20), 3)]

    node, data, first = rows()
    _, again, second = rows()
    for a, b in zip(first, second, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert all(np.array_equal(first[3][name], first[20][name]) for name in first[3])
    _, other, third = rows(seed=1)
    assert any(not np.array_equal(a["token_type_ids"], b["token_type_ids"]) for a, b in zip(first, third, strict=True))
    _, plain = pairs_of(tmp_path, next_sentence=False)
    prints = [d.fingerprint() for d in (data, again, other, plain)]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    assert "next" not in plain.splits["train"][0] and "next_sentence" not in plain.dataset_info

    data = Data(node, 4, (MaskTokens(),), (MaskTokens(),), cache_limit_gb=0, seed=3).prepare(lambda line: None)
    with data.train_batches(0) as stream:
        batches = [next(stream) for _ in range(6)]
    with data.train_batches(5) as stream:
        resumed = next(stream)
    assert all(np.array_equal(batches[5][name], resumed[name]) for name in resumed)
    assert batches[0]["next"].shape == (4,) and batches[0]["next"].dtype == np.int32
    hidden = [
        batch["token_type_ids"][b, at] for batch in batches for b in range(4) for at in batch["at"][b] if at != NONE
    ]
    assert {0, 1} == set(hidden)  # in both texts


def test_whole_words_are_hidden_in_both_texts_of_a_pair(tmp_path):
    _, data = pairs_of(tmp_path)
    source, rng = data.splits["train"], np.random.default_rng(0)
    for i in range(40):
        example = source[i]
        at = MaskTokens()(example, rng)["at"]
        hidden = example["words"][at[at != NONE]]
        assert all((example["words"] == word).sum() == (hidden == word).sum() for word in hidden)


def test_published_pairs_have_their_own_layout(tmp_path):
    """RoBERTa's has two separators in the middle and one type."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = sorted({*"".join(STORIES)})
    vocabulary = {piece: i for i, piece in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").mkdir()
    _, data = pairs_of(tmp_path / "text", tokenizer=TokenizerFile(str(tmp_path / "tokenizer.json")))
    example = data.splits["train"][0]
    tokens = example["tokens"][example["segment_ids"] > 0]
    assert [int(t) for t in tokens if t < 5] == [0, 2, 2, 2] and tokens[0] == 0 and tokens[-1] == 2
    assert (example["token_type_ids"] == 0).all() and (example["tokens"][example["segment_ids"] == 0] == 1).all()


def test_too_few_documents_for_pairs_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="train has 1 of two tokens or more; give it more documents"):
        pairs_of(tmp_path, STORIES[:1])
    with pytest.raises(UserError, match="val has 1 of two tokens or more"):
        pairs_of(tmp_path, val=[STORIES[0], "x"])
    _, data = pairs_of(tmp_path, ["ab", "cd"], ["ef", "gh"])
    found = {texts_in(data.splits["train"][i], data.dataset_info) for i in range(2 * PASSES)}
    assert found == {("a", "b"), ("a", "d"), ("c", "d"), ("c", "b")}  # two letters are enough
    with pytest.raises(UserError, match="length is 5; it must be at least 6"):
        pairs_of(tmp_path, length=5)


def test_learned_and_published_tokenizers(tmp_path):
    words = {"val_fraction": 0.05, "test_fraction": 0.05, "length": 32}
    node = MaskedPythonReference(tokenizer=Subwords("wordpiece", 500), **words)
    data = node.prepare(tmp_path / "cache", 1e9, lambda line: None)
    pieces = load(data.dataset_info["tokenizer"]).pieces(data.splits["train"][0]["tokens"].tolist())
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
