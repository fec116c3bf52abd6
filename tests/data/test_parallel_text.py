"""Parallel text: files line by line and tables, splits, what an example holds, the cache, prediction, and mistakes."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigbase_jax.core import Dataset, RawDataset, Source, UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.text.parallel_text import PADDING, ParallelText, read_lines, reference_of
from bigbase_jax.text.tokenizer import Bytes, Characters, Subwords, load

PAIRS = [(f"the number {i}", f"die Zahl {i} — 明月") for i in range(40)]


def prepare(tmp_path, **given):
    said = []
    made = ParallelText(**{"tokenizer": Bytes(), **given})
    data = made.prepare(tmp_path / "cache", 1e9, said.append)
    assert isinstance(made, RawDataset) and isinstance(data, Dataset) and isinstance(data.splits["train"], Source)
    return data, said


def lines(folder, **splits):
    """``NAME.en`` and ``NAME.de`` of {NAME: pairs}."""
    folder.mkdir(exist_ok=True)
    for name, pairs in splits.items():
        for side, language in enumerate(("en", "de")):
            (folder / f"{name}.{language}").write_text("".join(pair[side] + "\n" for pair in pairs), encoding="utf-8")
    return str(folder)


def pairs_of(data, split):
    """(source, target) texts as the tokens say them, which must be what the reference says."""
    source, target = load(data.dataset_info["source_tokenizer"]), load(data.dataset_info["tokenizer"])
    found = []
    for i in range(len(data.splits[split])):
        example = data.splits[split][i]
        real = example["target_out"] != PADDING
        text = target.decode(example["target_out"][real])
        assert text == reference_of(example["reference"])
        found.append((source.decode(example["source"][example["source_segments"] > 0]), text))
    return found


def test_what_an_example_is(tmp_path):
    train = [("ab", "c"), ("abcdef", "d"), ("", "e"), ("a", "cdefgh")]
    root = lines(tmp_path / "d", train=train, test=[("abcdef", "xyzuvw")])
    data, _ = prepare(tmp_path, root=root, source_length=5, target_length=4, val_fraction=0.0)
    end, pad, start = (data.dataset_info[name] for name in ("end_id", "pad_id", "start_id"))
    assert (end, pad, start, data.dataset_info["vocab_size"]) == (256, 257, 258, 259)
    assert (
        data.dataset_info["source_end_id"] == end and data.dataset_info["shared"] and data.dataset_info["length"] == 5
    )
    assert len(data.splits["train"]) == 1
    assert "2 training pairs too long for 5 and 4 tokens, and 1 with an empty side, left out" in data.description
    example = data.splits["train"][0]
    assert example["source"].tolist() == [97, 98, end, pad, pad]
    assert example["source_segments"].tolist() == [1, 1, 1, 0, 0]
    assert example["target_in"].tolist() == [start, 99, pad, pad] and example["target_out"].tolist() == [
        99,
        end,
        -1,
        -1,
    ]
    cut = data.splits["test"][0]
    assert cut["source"].tolist() == [97, 98, 99, 100, end] and cut["source_segments"].all()
    assert cut["target_in"].tolist() == [start, 120, 121, 122] and cut["target_out"].tolist() == [120, 121, 122, 117]
    assert reference_of(cut["reference"]) == "xyzuvw" and "1 pairs of test cut" in data.description
    assert cut["reference"].dtype == np.uint8 and cut["reference"].shape == example["reference"].shape == (6,)
    assert all(x.dtype == np.int32 for name, x in cut.items() if name != "reference")
    with pytest.raises(IndexError):
        data.splits["test"][1]


def write(folder, kind):
    folder.mkdir()
    if kind == "one pair of files":
        return lines(folder, **{"europarl.de-en": PAIRS})
    if kind == "gzip":
        for side, language in enumerate(("en", "de")):
            text = "".join(pair[side] + "\r\n" for pair in PAIRS)
            (folder / f"a.{language}.gz").write_bytes(gzip.compress(text.encode()))
    elif kind == "tsv":
        (folder / "a.tsv").write_text("en\tde\n" + "".join(f"{en}\t{de}\n" for en, de in PAIRS), encoding="utf-8")
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text("\n".join(json.dumps({"en": en, "de": de, "id": 1}) for en, de in PAIRS))
    elif kind == "nested":
        (folder / "a.jsonl").write_text("\n".join(json.dumps({"translation": {"en": a, "de": b}}) for a, b in PAIRS))
    elif kind == "parquet":
        pq.write_table(pa.table({"translation": [{"en": en, "de": de} for en, de in PAIRS]}), folder / "a.parquet")
    return str(folder)


@pytest.mark.parametrize("kind", ["one pair of files", "gzip", "tsv", "jsonl", "nested", "parquet"])
def test_pairs_of_every_format_are_read_and_dealt(tmp_path, kind):
    data, _ = prepare(tmp_path, root=write(tmp_path / "d", kind), val_fraction=0.1, test_fraction=0.2)
    found = {split: pairs_of(data, split) for split in data.splits}
    assert {split: len(pairs) for split, pairs in found.items()} == {"train": 28, "val": 4, "test": 8}
    assert sorted(pair for pairs in found.values() for pair in pairs) == sorted(PAIRS)
    reverse, _ = prepare(
        tmp_path, root=str(tmp_path / "d"), source_language="de", target_language="en", val_fraction=0.1
    )
    assert pairs_of(reverse, "train")[0][0].startswith("die Zahl")


@pytest.mark.parametrize(
    ("name", "row", "given"),
    [
        ("deu.txt", "{en}\t{de}\tCC-BY 2.0 (France) Attribution: tatoeba.org #1 (x)\n", {}),
        ("a.tsv", "{en}.\t{de}.\n", {}),
        ("a.tsv", "17\t{en}\t18\t{de}\n", {}),
        ("a.csv", "{de};x;{en}\n", {"source_language": "2", "target_language": "0"}),
    ],
)
def test_tables_without_a_header(tmp_path, name, row, given):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_text("".join(row.format(en=en, de=de) for en, de in PAIRS))
    (tmp_path / "d" / "_about.txt").write_text("one text\n")
    data, _ = prepare(tmp_path, root=str(tmp_path / "d"), test_fraction=0.0, **given)
    found = sorted((en.strip("."), de.strip(".")) for split in data.splits for en, de in pairs_of(data, split))
    assert found == sorted(PAIRS) and "without a header, " in data.description
    assert ("en in column" in data.description) == (not given)


def test_equal_sources_stay_together_and_the_seed_deals(tmp_path):
    root = lines(tmp_path / "d", all=[(en, f"{de}{i}") for i in range(3) for en, de in PAIRS])
    made = [prepare(tmp_path, root=root, seed=seed, val_fraction=0.2, test_fraction=0.0)[0] for seed in (0, 0, 1)]
    dealt = [{split: pairs_of(data, split) for split in data.splits} for data in made]
    assert dealt[0] == dealt[1] != dealt[2] and set(dealt[0]) == {"train", "val"}
    assert not {en for en, _ in dealt[0]["train"]} & {en for en, _ in dealt[0]["val"]} and len(dealt[0]["val"]) == 24


def test_files_named_after_splits_and_several_test_sets(tmp_path):
    parts = {"train": PAIRS[:20], "val": PAIRS[20:24], "test_a": PAIRS[24:30], "test_b": PAIRS[30:39]}
    parts["notes"] = PAIRS[39:]
    root = lines(tmp_path / "d", **parts)
    (tmp_path / "d" / "test_c.en").write_text("alone\n")
    data, _ = prepare(tmp_path, root=root)
    assert list(data.splits) == ["train", "val", "test", "test_b"]
    for split, name in (("train", "train"), ("val", "val"), ("test", "test_a"), ("test_b", "test_b")):
        assert pairs_of(data, split) == parts[name]
    assert "test is test_a" in data.description and "not used: test_c, notes" in data.description
    other, _ = prepare(tmp_path, root=root, test="test_b", val="notes")
    assert pairs_of(other, "test") == parts["test_b"] and pairs_of(other, "test_a") == parts["test_a"]
    assert pairs_of(other, "val") == parts["notes"] and other.fingerprint() != data.fingerprint()
    with pytest.raises(UserError, match=r"no 'test_c' in both languages for test. Of 'test_c' one side is there alone"):
        prepare(tmp_path, root=root, test="test_c")
    with pytest.raises(UserError, match=r"no 'test_bb' .*Did you mean 'test_b'"):
        prepare(tmp_path, root=root, test="test_bb")


def test_two_tokenizers_each_learn_their_side(tmp_path):
    root = lines(tmp_path / "d", train=PAIRS, test=PAIRS[:2])
    data, _ = prepare(tmp_path, root=root, tokenizer=Characters(False), target_tokenizer=Subwords("bpe", 300))
    source, target = load(data.dataset_info["source_tokenizer"]), load(data.dataset_info["tokenizer"])
    assert (
        source.size == data.dataset_info["source_vocab_size"] < 40
        and target.size == data.dataset_info["vocab_size"] > 260
    )
    assert (
        not data.dataset_info["shared"]
        and data.dataset_info["source_end_id"] == source.end != target.end == data.dataset_info["end_id"]
    )
    assert pairs_of(data, "test") == PAIRS[:2] and "2 of the test sources are in train too" in data.description
    with pytest.raises(UserError, match="not among"):
        source.encode_batch(["月"])
    shared, _ = prepare(tmp_path, root=root, tokenizer=Characters(False))
    assert load(shared.dataset_info["source_tokenizer"]).encode_batch(["the Zahl 月"])


def test_the_second_start_reads_nothing_and_what_matters_makes_another_cache(tmp_path, monkeypatch):
    root = lines(tmp_path / "d", all=PAIRS)
    kept, said = prepare(tmp_path, root=root)
    assert len(said) == 1
    in_memory = ParallelText(root=root, tokenizer=Bytes()).prepare(tmp_path / "cache", 0, said.append)
    assert "memory" in in_memory.splits["val"].in_memory and pairs_of(in_memory, "val") == pairs_of(kept, "val")
    assert in_memory.fingerprint() == kept.fingerprint()
    for change in ({"seed": 1}, {"source_language": "de", "target_language": "en"}, {"target_tokenizer": Characters()}):
        other, said = prepare(tmp_path, root=root, **change)
        assert len(said) == 1 and other.fingerprint() != kept.fingerprint()
    monkeypatch.setattr("bigbase_jax.data.sources.text.base.Survey", None)
    again, said = prepare(tmp_path, root=root)
    assert said == [] and again.dataset_info == kept.dataset_info and again.description == kept.description
    shorter, said = prepare(tmp_path, root=root, source_length=15)
    assert said == [] and shorter.splits["val"][0]["source"].shape == (15,)
    assert shorter.fingerprint() != kept.fingerprint()


def test_the_pipeline_makes_batches_of_it(tmp_path):
    dataset = ParallelText(root=lines(tmp_path / "d", all=PAIRS), tokenizer=Bytes())
    data = Data(dataset=dataset, batch_size=4, cache_dir=str(tmp_path / "cache")).prepare(lambda line: None)
    with data.train_batches() as batches:
        batch = next(batches)
    assert batch["source"].shape == batch["target_in"].shape == (4, 64) and batch["reference"].dtype == np.uint8


def test_a_users_file_is_one_example_a_line(tmp_path):
    data, _ = prepare(tmp_path, root=lines(tmp_path / "d", all=PAIRS))
    (tmp_path / "a.txt").write_text("the number 3\n\n the moon \n")
    examples = ParallelText.codec({}, data.dataset_info).decode(str(tmp_path / "a.txt"))
    tokenizer = load(data.dataset_info["source_tokenizer"])
    assert [tokenizer.decode(e["source"][e["source_segments"] > 0]) for e in examples] == ["the number 3", "the moon"]
    found = data.splits["train"][0]
    assert set(examples[0]) == set(found) - {"reference"}
    for name, x in examples[0].items():
        assert x.shape == found[name].shape and x.dtype == found[name].dtype
    assert examples[0]["target_in"][0] == data.dataset_info["start_id"] and (examples[0]["target_out"] == PADDING).all()
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(UserError, match="a.txt is empty"):
        read_lines(str(tmp_path / "a.txt"), data.dataset_info)


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_unequal_numbers_of_lines_are_told_with_both(tmp_path):
    root = lines(tmp_path / "d", train=PAIRS)
    with open(tmp_path / "d" / "train.de", "a") as file:
        file.write("one more\nand another\n")
    with pytest.raises(UserError, match=r"train.en has 40 lines and .*train.de 42; line by line") as raised:
        prepare(tmp_path, root=root)
    assert "\n" not in str(raised.value) and not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize(
    ("files", "given", "says"),
    [
        ({}, {}, "holds no"),
        ({"a.png": ""}, {}, "no files NAME.en and NAME.de, in lines, and no table"),
        ({"train.en": "a\n"}, {}, "has train.en but no train.de beside it"),
        ({"train.en": "", "train.de": ""}, {}, "holds no pairs"),
        ({"test.en": "a", "test.de": "b", "val.en": "a", "val.de": "b"}, {}, "has test, val but nothing named train"),
        ({"a/train.en": "a", "b/train.en": "b", "a/train.de": "a"}, {}, r"train.en twice, in 'a' and 'b'"),
        ({"a.tsv": "en\tfr\nx\ty\n"}, {}, r"a.tsv, line 2 has no 'de'. Known columns: en, fr. Name the columns after"),
        ({"a.tsv": "english\tgerman\nGo.\tGeh.\n"}, {}, r"line 2 has no 'en'.* as in :root=...,source=english"),
        ({"a.jsonl": '{"translation": {"en": "x", "fr": "y"}}'}, {}, "line 1 has no 'de'"),
        ({"a.jsonl": '{"en": "x", "de": 3}'}, {}, "line 1: 'de' is int, not text"),
        ({"a.jsonl": '{"en": "x"'}, {}, "line 1 is not JSON"),
        (
            {"train.en": "a long line\n", "train.de": "b\n"},
            {"source_length": 4},
            "no training pair of .* fits source_len",
        ),
        ({"train.en": b"\xff\n", "train.de": "b\n"}, {}, r"train.en is not utf-8 \(byte 0xff\)"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, files, given, says):
    (tmp_path / "d").mkdir()
    for name, content in files.items():
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says) as raised:
        prepare(tmp_path, root=str(tmp_path / "d"), val_fraction=0.0, test_fraction=0.0, **given)
    assert "\n" not in str(raised.value)


def test_mistakes_that_are_no_files(tmp_path):
    with pytest.raises(UserError, match="there is no file "):
        prepare(tmp_path, root=str(tmp_path / "none"))
    with pytest.raises(UserError, match="target_length is 1"):
        ParallelText(root="x", target_length=1)
    with pytest.raises(UserError, match="are both 'de'"):
        ParallelText(root="x", source_language="de")


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.mark.realdata
def test_multi30k_is_as_published(real_data, tmp_path):
    root = str(real_data / "multi30k")
    data, _ = prepare(tmp_path, root=root, test="test_2016_flickr", source_length=300, target_length=300)
    assert {s: len(data.splits[s]) for s in ("train", "val", "test")} == {"train": 29000, "val": 1014, "test": 1000}
    assert set(data.splits) == {"train", "val", "test", "test_2017_flickr", "test_2017_mscoco", "test_2018_flickr"}
    source, target = pairs_of(data, "test")[0]
    assert source == "A man in an orange hat starring at something."
    assert target == "Ein Mann mit einem orangefarbenen Hut, der etwas anstarrt."
