"""Mixtures of corpora: shares, whole passes, one tokenizer, windows that never mix parts, resuming, and mistakes."""

import json
import os

import numpy as np
import pytest

from bigbase_jax.build import build, target
from bigbase_jax.core import Dataset, RawDataset, Source, UserError
from bigbase_jax.data.documents import Format
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.presets import texts, tokenizers
from bigbase_jax.data.sources.mixture import Mixture, interleaved, whole_passes
from bigbase_jax.data.sources.text.labelled_text import LabelledText
from bigbase_jax.data.sources.text.text import TextFiles
from bigbase_jax.text.tokenizer import Bytes, Characters, Subwords, TokenizerFile, load

LETTERS = {"small": "abc", "large": "xyz"}


def parts(tmp_path, small=10, large=100, **more):
    """Corpora of lines of 15 letters that no other has."""
    rng = np.random.default_rng(0)
    found = {}
    for name, count in (("small", small), ("large", large)):
        lines = ["".join(rng.choice(list(LETTERS[name]), 15)) for _ in range(count)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
        found[name] = TextFiles(root=str(tmp_path / f"{name}.txt"), format=Format(unit="line"), **more)
    return found


def prepare(tmp_path, limit=1e9, **given):
    said = []
    made = Mixture(**{"length": 16, "parts": given.pop("parts", None) or parts(tmp_path), **given})
    data = made.prepare(tmp_path / "cache", limit, said.append)
    assert isinstance(made, RawDataset) and isinstance(data, Dataset) and isinstance(data.splits["train"], Source)
    return data, said


def letters(data, split):
    """The texts of the windows of a split."""
    tokenizer, source = load(data.dataset_info["tokenizer"]), data.splits[split]
    return [tokenizer.decode(source[i]["targets"][source[i]["segment_ids"] > 0]) for i in range(len(source))]


def test_passes_are_whole_small_and_close():
    assert (
        whole_passes([1, 1, 1]) == [1, 1, 1] and whole_passes([0.2, 0.5]) == [2, 5] and whole_passes([3, 1]) == [3, 1]
    )
    for seed in range(20):
        often = np.random.default_rng(seed).uniform(0.1, 30, 3)
        found = np.array(whole_passes(often.tolist()))
        assert found.min() <= 20 and np.abs(found / found.sum() / (often / often.sum()) - 1).max() < 0.03
    assert whole_passes([1, 1000.4])[1] in range(1000, 1002)


@pytest.mark.parametrize(
    ("given", "passes", "share"),
    [
        ({}, (1, 1), 9 / 99),
        ({"weights": {"small": 1, "large": 1}}, (10, 1), 0.5),
        ({"weights": {"small": 0.2, "large": 0.6}}, (10, 3), 0.25),
        ({"epochs": {"small": 4, "large": 1}}, (4, 1), 36 / 126),
        ({"epochs": {"small": 1, "large": 0.4}}, (5, 2), 45 / 225),
    ],
)
def test_parts_have_their_shares_in_whole_passes(tmp_path, given, passes, share):
    data, _ = prepare(tmp_path, **given)
    assert data.passes == {"small": passes[0], "large": passes[1]}
    texts = letters(data, "train")
    assert all(set(text) <= set("abc") or set(text) <= set("xyz") for text in texts)
    small = [text for text in texts if set(text) <= set("abc")]
    assert len(small) / len(texts) == pytest.approx(share)
    counts = {text: texts.count(text) for text in set(texts)}
    assert {counts[t] for t in counts if t in small} == {passes[0]}
    assert {counts[t] for t in counts if t not in small} == {passes[1]}
    assert f"9 windows {passes[0]} time" in data.description and f"({share:.1%})" in data.description


def test_validation_is_that_of_all_parts_and_of_each(tmp_path):
    data, _ = prepare(tmp_path, weights={"small": 5, "large": 1})
    assert set(data.splits) == {"train", "val", "val_small", "val_large"}
    assert letters(data, "val") == letters(data, "val_large") + letters(data, "val_small")
    assert (len(data.splits["val_small"]), len(data.splits["val_large"])) == (1, 10)
    assert "1 of val" in data.description and "10 of val" in data.description
    some = parts(tmp_path)
    some["small"] = TextFiles(root=some["small"].root, format=Format(unit="line"), val_fraction=0.0)
    only, _ = prepare(tmp_path, parts=some)
    assert set(only.splits) == {"train", "val"} and len(only.splits["val"]) == 10


def test_one_tokenizer_knows_all_parts(tmp_path):
    for spec in (Characters(), Subwords("bpe", 300)):
        data, _ = prepare(tmp_path, tokenizer=spec)
        tokenizer = load(data.dataset_info["tokenizer"])
        assert tokenizer.decode(tokenizer.encode_batch(["abcxyz"])[0][0]) == "abcxyz"
        assert data.dataset_info["vocab_size"] == tokenizer.size and data.dataset_info["length"] == 16
        assert data.dataset_info["end_id"] == tokenizer.end is not None
    assert tokenizer.size > 257 + 20
    (tmp_path / "tokenizer.json").write_text(json.loads(data.dataset_info["tokenizer"])["tokenizer"])
    read, _ = prepare(tmp_path, tokenizer=TokenizerFile(str(tmp_path)))
    assert letters(read, "train") == letters(data, "train")


def test_texts_come_in_the_shares_of_their_parts():
    parts = [(3.0, iter(["aa"] * 60)), (1.0, iter(["bbbb"] * 10))]
    found = "".join(interleaved(parts))
    assert len(found) == 160
    assert [found[:n].count("a") / n for n in (40, 80, 120)] == pytest.approx([0.75] * 3, abs=0.1)
    assert list(interleaved([(1.0, iter(())), (1.0, iter(["", "x"]))])) == ["", "x"]


def test_any_step_is_reached_at_once_and_repeats_differ(tmp_path):
    mixture = Mixture(parts=parts(tmp_path), weights={"small": 1, "large": 1}, length=16)
    data = Data(dataset=mixture, batch_size=6, cache_dir=str(tmp_path / "cache")).prepare(lambda line: None)
    with data.train_batches() as batches:
        first = [next(batches) for _ in range(70)]
    for start in (1, 33, 69):
        with data.train_batches(start) as batches:
            for name, x in next(batches).items():
                np.testing.assert_array_equal(x, first[start][name])
    with data.train_batches(10**9) as batches:
        assert next(batches)["inputs"].shape == (6, 16)
    source = data.data.dataset.splits["train"]
    seen = [source.place(int(i)) for batch in first[:30] for i in batch["index"]]
    assert len(seen) == len(source) == 180
    assert {place: seen.count(place) for place in seen} == {
        **{(0, i): 1 for i in range(90)},
        **{(1, i): 10 for i in range(9)},
    }
    orders = [[at for part, at in seen[i : i + 60] if part == 1] for i in (0, 60, 120)]
    assert orders[0] != orders[1] != orders[2]
    assert "MB in " in data.summary()[-1]


def test_the_second_start_reads_nothing_and_what_matters_makes_another(tmp_path, monkeypatch):
    spec = Subwords("wordpiece", 60)
    first, said = prepare(tmp_path, tokenizer=spec)
    assert len(said) == 3
    memory, _ = prepare(tmp_path, 0, tokenizer=Bytes())
    kept, _ = prepare(tmp_path, tokenizer=Bytes())
    assert "memory" in memory.splits["train"].in_memory and letters(memory, "train") == letters(kept, "train")
    other, _ = prepare(tmp_path, tokenizer=Bytes(), weights={"small": 1, "large": 1})
    assert len({first.fingerprint(), kept.fingerprint(), other.fingerprint()}) == 3
    made = parts(tmp_path)
    for part in made.values():  # written anew just now
        os.utime(part.root, ns=(0, 10**18))
    prepare(tmp_path, parts=made, tokenizer=spec)
    monkeypatch.setattr(TextFiles, "documents", None)
    again, said = prepare(tmp_path, parts=made, tokenizer=spec)
    assert said == [] and letters(again, "val")


def test_a_config_builds_it_and_a_users_text_is_read(tmp_path):
    made = parts(tmp_path)
    node = target(Mixture, parts={name: target(TextFiles, root=part.root) for name, part in made.items()}, length=16)
    node.weights = {"small": 1.0, "large": 3.0}
    mixture = build(node)
    assert set(mixture.parts) == set(made) and mixture.weights["large"] == 3
    data = mixture.prepare(tmp_path / "cache", 1e9, lambda line: None)
    (tmp_path / "a.txt").write_text("abcabc")
    assert Mixture.codec({}, data.dataset_info).decode(str(tmp_path / "a.txt"))[0]["segment_ids"].sum() == 7


def test_recipes_name_texts_and_mixtures(tmp_path):
    made = parts(tmp_path)
    small, large = (made[name].root for name in ("small", "large"))
    mix = build(texts("mix", f"{small}@3 + {large}@1+{small}@1", tokenizers("chars", 0), 8))
    assert set(mix.parts) == {"small_txt", "large_txt", "small_txt_2"} and mix.tokenizer == Characters()
    assert mix.weights == {"small_txt": 3, "large_txt": 1, "small_txt_2": 1} and mix.parts["large_txt"].root == large
    assert build(texts("mix", f"{small}+{large}", tokenizers("bytes", 0), 8)).weights is None
    assert build(texts("hf", small, tokenizers("bytes", 0), 8)) == build(
        texts("text", small, tokenizers("bytes", 0), 8)
    )
    for data, root, says in [
        ("hug", small, "no data=hug.*Known values: hf, mix, pydoc, text"),
        ("hf", None, "data=hf needs root=FILE or root=DIR"),
        ("mix", None, "data=mix needs root=PATH"),
        ("mix", f"{small}@x", "the share of .* is 'x', not a number"),
        ("mix", f"{small}@1+{large}", "give all of them one, or none"),
    ]:
        with pytest.raises(UserError, match=says):
            texts(data, root, tokenizers("bytes", 0), 8)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"parts": {}}, "a mixture needs parts"),
        (
            {"parts": {"a": LabelledText(root="x")}},
            "the part 'a' of a mixture is LabelledText; it must be a text corpus",
        ),
        ({"weights": {"smal": 1, "large": 1}}, "weights has 'smal', which is no part. Did you mean 'small'"),
        ({"weights": {"small": 0, "large": 1}}, "the weights of 'small' are 0; leave the part out"),
        ({"epochs": {"small": 1}}, "epochs has nothing for the part 'large'"),
        ({"weights": {"small": 1, "large": 1}, "epochs": {"small": 1, "large": 1}}, "weights or epochs, not both"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, given, says):
    with pytest.raises(UserError, match=says):
        Mixture(**{"parts": parts(tmp_path), **given})


def test_a_part_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no file "):
        prepare(tmp_path, parts={"a": TextFiles(root=str(tmp_path / "none"))})
