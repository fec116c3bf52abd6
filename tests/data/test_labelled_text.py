"""Labelled texts: every way that rows lie in files, splits, special tokens, the cache, prediction, and mistakes."""

import csv
import io
import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from bigbase_jax.core import Dataset, RawDataset, Source, UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.text.base import Opened
from bigbase_jax.data.sources.text.labelled_text import LabelledText, read_text
from bigbase_jax.text.tokenizer import Bytes, Characters, Subwords, TokenizerFile, load

ROWS = [(f"text {i}, 明月 {i % 7}", i % 3) for i in range(30)]


def prepare(tmp_path, **given):
    said = []
    made = LabelledText(**{"tokenizer": Bytes(), "length": 32, **given})
    data = made.prepare(tmp_path / "cache", 1e9, said.append)
    assert isinstance(made, RawDataset) and isinstance(data, Dataset) and isinstance(data.splits["train"], Source)
    return data, said


def texts_of(data, split):
    """(text, class name) of every example."""
    tokenizer, found = load(data.dataset_info["tokenizer"]), []
    for i in range(len(data.splits[split])):
        example = data.splits[split][i]
        real = example["segment_ids"] > 0
        found.append(
            (tokenizer.decode(example["tokens"][real]), data.dataset_info["class_names"][int(example["label"])])
        )
    return found


def everything(data):
    return sorted(pair for split in data.splits for pair in texts_of(data, split))


def arrow(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def saved(folder, splits, features=None):
    """What ``datasets.save_to_disk`` writes of {split: {column: values}}."""
    for split, columns in splits.items():
        about = {"info": {"features": features or {}}}
        table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(about)})
        half = table.num_rows // 2
        for i, part in enumerate((table.slice(0, half), table.slice(half))):
            arrow(folder / split / f"data-0000{i}-of-00002.arrow", part)
        files = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
        (folder / split / "state.json").write_text(json.dumps({"_data_files": files, "_split": split}))
        (folder / split / "dataset_info.json").write_text(json.dumps({"features": features or {}}))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


def write(folder, kind):
    """``ROWS`` in a file of some format, and the arguments to read them."""
    folder.mkdir(exist_ok=True)
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("label", "review"), *((label, text) for text, label in ROWS)])
    records = [{"sentence": text, "label": label, "id": i} for i, (text, label) in enumerate(ROWS)]
    columns = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
    if kind == "csv":
        (folder / "a.csv").write_text(buffer.getvalue())
    elif kind == "zip":
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            archive.writestr("sub/a.csv", buffer.getvalue())
            archive.writestr("__MACOSX/a.csv", "litter")
    elif kind == "tsv without header":
        (folder / "a.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in ROWS))
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    elif kind == "json":
        (folder / "a.json").write_text(json.dumps(records))
    elif kind == "json of lines":
        (folder / "a.json").write_text("\n".join(map(json.dumps, records)))
    elif kind == "parquet":
        pq.write_table(pa.table(columns), folder / "a.parquet")
    elif kind == "arrow":
        arrow(folder / "a.arrow", pa.table(columns))
    return str(folder)


KINDS = ("csv", "zip", "tsv without header", "jsonl", "json", "json of lines", "parquet", "arrow")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_format_are_read_and_the_usual_columns_guessed(tmp_path, kind):
    data, _ = prepare(tmp_path, root=write(tmp_path / "d", kind))
    assert everything(data) == sorted((text, str(label)) for text, label in ROWS)
    assert data.dataset_info["class_names"] == ("0", "1", "2") and data.dataset_info["num_classes"] == 3
    assert {name: len(source) for name, source in data.splits.items()} == {"train": 24, "val": 3, "test": 3}
    for source in data.splits.values():
        assert np.bincount(source.labels).tolist() == [len(source) // 3] * 3


def test_what_an_example_is(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nabc,1\nabcdefgh,0\nxy,1\n")
    data, _ = prepare(tmp_path, root=str(tmp_path / "a.csv"), length=7, val_fraction=0.0, test_fraction=0.0)
    pad, cls, sep, mask = (data.dataset_info[f"{role}_id"] for role in ("pad", "cls", "sep", "mask"))
    assert (pad, cls, sep, mask) == (256, 257, 258, 259) and data.dataset_info["vocab_size"] == 260
    assert data.dataset_info["length"] == 7 and data.dataset_info["pair"] is False
    rows = [data.splits["train"][i] for i in range(3)]
    assert [row["tokens"].tolist() for row in rows] == [
        [cls, 97, 98, 99, sep, pad, pad],
        [cls, 97, 98, 99, 100, 101, sep],
        [cls, 120, 121, sep, pad, pad, pad],
    ]
    assert rows[0]["segment_ids"].tolist() == [1] * 5 + [0] * 2 and not rows[0]["token_type_ids"].any()
    assert [int(row["label"]) for row in rows] == [1, 0, 1] and data.splits["train"].labels.tolist() == [1, 0, 1]
    assert all(x.dtype == np.int32 for row in rows for x in row.values())
    assert "1 (33.3%) cut to 7 tokens" in data.description
    with pytest.raises(IndexError):
        data.splits["train"][3]


def test_pairs_have_types_and_a_published_tokenizer_its_own_layout(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
    raw = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    raw.add_special_tokens(words[:5])
    raw.post_processor = tokenizers.processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    raw.save(str(tmp_path / "tokenizer.json"))
    rows = [{"premise": "a b", "hypothesis": "c", "label": "yes"}, {"premise": "c", "hypothesis": "a", "label": "no"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 2))
    spec = {"root": str(tmp_path / "a.jsonl"), "length": 10, "val_fraction": 0.0, "test_fraction": 0.0}
    data, _ = prepare(tmp_path, **spec, tokenizer=TokenizerFile(str(tmp_path / "tokenizer.json")))
    example = data.splits["train"][0]
    assert example["tokens"].tolist() == [2, 5, 6, 3, 3, 7, 3, 0, 0, 0] and not example["token_type_ids"].any()
    assert (
        data.dataset_info["class_names"] == ("no", "yes") and int(example["label"]) == 1 and data.dataset_info["pair"]
    )
    ours, _ = prepare(tmp_path, **spec)
    assert ours.splits["train"][0]["tokens"].tolist() == [257, 97, 32, 98, 258, 99, 258, 256, 256, 256]
    assert ours.splits["train"][0]["token_type_ids"].tolist() == [0] * 5 + [1, 1] + [0] * 3


# ------------------------------------------------------------------------------------------------------------- splits


def test_equal_texts_stay_together_and_the_seed_deals(tmp_path):
    rows = [(f"text {i % 40}", i % 40 % 2) for i in range(100)]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in rows))
    made = [prepare(tmp_path, root=str(tmp_path / "a.csv"), seed=seed)[0] for seed in (0, 0, 1)]
    dealt = [{split: texts_of(data, split) for split in ("train", "val", "test")} for data in made]
    assert dealt[0] == dealt[1] != dealt[2]
    for splits in (dealt[0], dealt[2]):
        assert sum(map(len, splits.values())) == 100
        sets = [{text for text, _ in found} for found in splits.values()]
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
        assert len(sets[1]) == len(sets[2]) == 4


def test_files_named_after_splits_keep_them_and_what_they_share_is_said(tmp_path):
    (tmp_path / "d").mkdir()
    for name, rows in (("train", ROWS[:20]), ("dev", ROWS[18:25]), ("test_a", ROWS[25:28]), ("test_b", ROWS[28:])):
        (tmp_path / "d" / f"{name}.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    data, _ = prepare(tmp_path, root=str(tmp_path / "d"))
    assert {name: len(source) for name, source in data.splits.items()} == {"train": 20, "val": 7, "test": 5}
    assert "2 of the val texts are in train too" in data.description and "not used" not in data.description
    chosen, _ = prepare(tmp_path, root=str(tmp_path / "d"), test="test_b")
    assert texts_of(chosen, "test") == [(text, str(label)) for text, label in ROWS[28:]]
    assert "not used: test_a" in chosen.description and chosen.fingerprint() != data.fingerprint()
    with pytest.raises(UserError, match=r"no 'test_c' for test. Did you mean 'test_"):
        prepare(tmp_path, root=str(tmp_path / "d"), test="test_c")


def test_a_folder_that_datasets_saved(tmp_path):
    def columns(rows, label=None):
        return {"text": [t for t, _ in rows], "label": [y if label is None else label for _, y in rows]}

    names = {"label": {"names": ["bad", "fair", "good"], "_type": "ClassLabel"}}
    splits = {"train": columns(ROWS[:20]), "validation": columns(ROWS[20:]), "test": columns(ROWS[:5], -1)}
    saved(tmp_path / "hf", {**splits, "unsupervised": columns(ROWS, -1)}, names)
    data, _ = prepare(tmp_path, root=str(tmp_path / "hf"))
    assert data.dataset_info["class_names"] == ("bad", "fair", "good")
    assert {name: len(source) for name, source in data.splits.items()} == {"train": 20, "val": 10}
    assert texts_of(data, "val") == [(t, ("bad", "fair", "good")[y]) for t, y in ROWS[20:]]
    assert "the test split has no labels" in data.description and "not used: unsupervised" in data.description


def test_a_download_from_the_hub(tmp_path):
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for i, part in enumerate((ROWS[:10], ROWS[10:20])):
        table = pa.table({"text": [t for t, _ in part], "label": [y for _, y in part]})
        pq.write_table(table, folder / f"train-0000{i}-of-00002.parquet")
    (folder / "test.jsonl").write_text("\n".join(json.dumps({"text": t, "label": y}) for t, y in ROWS[20:]))
    (tmp_path / "hub" / "README.md").write_text("a card")
    (tmp_path / "hub" / "dataset_infos.json").write_text("{}")
    data, _ = prepare(tmp_path, root=str(tmp_path / "hub"), val_fraction=0.2)
    assert {name: len(source) for name, source in data.splits.items()} == {"train": 17, "val": 3, "test": 10}


def texts_in_folders(folder, *places):
    for i, place in enumerate(places):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(f" text {i}\n明月 \n", encoding="utf-8")
    return str(folder)


def test_a_folder_of_texts_for_each_class(tmp_path):
    names = [f"{label}/{i}.txt" for label in ("pos", "neg") for i in range(10)]
    data, _ = prepare(tmp_path, root=texts_in_folders(tmp_path / "d", *names, "notes.txt"))
    assert everything(data) == sorted((f"text {i}\n明月", name[:3]) for i, name in enumerate(names))
    assert {name: len(source) for name, source in data.splits.items()} == {"train": 16, "val": 2, "test": 2}
    assert data.dataset_info["class_names"] == ("neg", "pos") and "not used: notes.txt" in data.description


def test_folders_of_texts_below_splits_as_imdb_has_them(tmp_path):
    names = [f"x/{split}/{label}/{i}.txt" for split in ("train", "test") for label in ("pos", "neg") for i in range(4)]
    others = ["x/imdbEr.txt", "x/train/urls_pos.txt", "x/train/unsup/0.txt", "x/train/unsup/1.txt", "x/README"]
    root = texts_in_folders(tmp_path / "d", *names, *others)
    data, _ = prepare(tmp_path, root=root, val_fraction=0.25)
    assert {name: len(source) for name, source in data.splits.items()} == {"train": 6, "val": 2, "test": 8}
    assert [label for _, label in texts_of(data, "test")] == ["neg"] * 4 + ["pos"] * 4
    assert "not used: unsup, x/imdbEr.txt, x/train/urls_pos.txt" in data.description
    for split, other in (("train", "training_set"), ("test", "Testing")):
        (tmp_path / "d" / "x" / split).rename(tmp_path / split)
        (tmp_path / "d" / "x" / other).mkdir()
        (tmp_path / split).rename(tmp_path / "d" / "x" / other / other)
    data, _ = prepare(tmp_path, root=root, val_fraction=0.25)
    assert {name: len(source) for name, source in data.splits.items()} == {"train": 6, "val": 2, "test": 8}
    for split, other in (("training_set", "part1"), ("Testing", "part2")):
        (tmp_path / "d" / "x" / split / split).rename(tmp_path / "d" / "x" / other)
    with pytest.raises(
        UserError, match=r"has part1 and part2, each with the folders neg, pos; if the former are splits"
    ):
        prepare(tmp_path, root=root)
    with pytest.raises(UserError, match="neither a table nor a folder of texts for each class"):
        prepare(tmp_path, root=texts_in_folders(tmp_path / "e", "train/a.txt", "test/b.txt"))


# ------------------------------------------------------------------------------------------------- columns and classes


def test_a_text_of_several_columns(tmp_path):
    rows = [{"title": f"t{i}", "body": None if i == 3 else f"b{i}", "topic": "xy"[i % 2], "a+b": "c"} for i in range(8)]
    (tmp_path / "a.json").write_text(json.dumps({"data": rows}))
    whole = {"root": str(tmp_path / "a.json"), "val_fraction": 0.0, "test_fraction": 0.0, "label": "topic"}
    data, _ = prepare(tmp_path, **whole, text="title+body")
    assert texts_of(data, "train") == [(f"t{i}" if i == 3 else f"t{i}\nb{i}", "xy"[i % 2]) for i in range(8)]
    assert texts_of(prepare(tmp_path, **whole, text="a+b")[0], "train")[0] == ("c", "x")
    pairs, _ = prepare(tmp_path, **whole, text="title", text_pair="a+b")
    assert pairs.dataset_info["pair"]
    with pytest.raises(UserError, match="no column 'a'"):
        prepare(tmp_path, **whole, text="title", text_pair="body+a")


@pytest.mark.parametrize("first", [0, 1])
def test_a_file_names_the_classes_of_numbers(tmp_path, first):
    (tmp_path / "d").mkdir()
    rows = [(i % 3 + first, f"title {i}", f"body, {i}") for i in range(9)]
    with open(tmp_path / "d" / "train.csv", "w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)  # as AG News has it, without a header
    (tmp_path / "d" / "test.csv").write_text(f'"{first}","a","b"\n')
    (tmp_path / "d" / "classes.txt").write_text("World\nSports\n\nSci/Tech\n")
    given = {"root": str(tmp_path / "d"), "text": "1+2", "label": "0"}
    data, _ = prepare(tmp_path, **given)
    assert data.dataset_info["class_names"] == ("World", "Sports", "Sci/Tech")
    assert texts_of(data, "test") == [("a\nb", "World")]
    assert dict(everything(data))["title 7\nbody, 7"] == "Sports"
    (tmp_path / "names").write_text("a\nb\nc\n")
    other, said = prepare(tmp_path, **given, class_names=str(tmp_path / "names"))
    assert said and other.dataset_info["class_names"] == ("a", "b", "c") and other.fingerprint() != data.fingerprint()
    few, many = "names 1 classes, for labels 0 to 0 or 1 to 1, but .* has", "be either: leave only the names that occur"
    for content, says in (("a\n", few), ("a\n" * 4, many)):
        (tmp_path / "d" / "classes.txt").write_text(content)
        if first or says == few:
            with pytest.raises(UserError, match=says):
                prepare(tmp_path, **given)
    with pytest.raises(UserError, match="there is no file klasses.txt, nor one of that name in"):
        prepare(tmp_path, **given, class_names="klasses.txt")


# --------------------------------------------------------------------------------------------------- cache, pipeline


def test_the_second_start_reads_no_rows_and_what_matters_makes_another_cache(tmp_path, monkeypatch):
    root = write(tmp_path / "d", "jsonl")
    first, said = prepare(tmp_path, root=root, tokenizer=Subwords("wordpiece", 60))
    assert len(said) == 1
    folders = list((tmp_path / "cache").iterdir())
    assert len(folders) == 1
    in_memory = LabelledText(root=root, length=32, tokenizer=Bytes()).prepare(tmp_path / "cache", 0, said.append)
    kept, _ = prepare(tmp_path, root=root)
    assert "memory" in in_memory.splits["val"].in_memory and everything(in_memory) == everything(kept)
    assert in_memory.fingerprint() == kept.fingerprint()
    for change in ({"seed": 1}, {"val_fraction": 0.2}, {"tokenizer": Characters()}, {"label": "id", "length": 31}):
        try:
            other, said = prepare(tmp_path, root=root, **change)
        except UserError as error:
            assert "30 different values" in str(error)
            continue
        assert said and other.fingerprint() != kept.fingerprint()
        assert (other.examples() == kept.examples()) == ("tokenizer" in change)
    monkeypatch.setattr(Opened, "fingerprint", lambda self: "")
    monkeypatch.setattr("bigbase_jax.data.sources.text.labelled_text.rows", None)
    again, said = prepare(tmp_path, root=root, tokenizer=Subwords("wordpiece", 60))
    assert said == [] and again.dataset_info == first.dataset_info and again.description == first.description
    shorter, said = prepare(tmp_path, root=root, length=8)  # of the same tokens
    assert shorter.examples() == kept.examples()
    assert said == [] and shorter.splits["val"][0]["tokens"].shape == (8,)
    next(folders[0].glob("0.bin")).write_bytes(b"")
    with pytest.raises(TypeError):  # it would read again
        prepare(tmp_path, root=root, tokenizer=Subwords("wordpiece", 60))


def test_the_pipeline_shows_the_classes(tmp_path):
    dataset = LabelledText(root=write(tmp_path / "d", "csv"), length=16, tokenizer=Bytes())
    data = Data(dataset=dataset, batch_size=4, cache_dir=str(tmp_path / "cache")).prepare(lambda line: None)
    assert "0 8 (33.3%), 1 8 (33.3%), 2 8 (33.3%)" in "\n".join(data.summary())
    with data.train_batches() as batches:
        batch = next(batches)
    assert batch["tokens"].shape == (4, 16) and batch["label"].shape == (4,)


def test_a_users_text_is_an_example_without_label(tmp_path):
    data, _ = prepare(tmp_path, root=write(tmp_path / "d", "csv"))
    (tmp_path / "one.txt").write_text(" text 4, 明月 4\n")
    example = read_text(str(tmp_path / "one.txt"), data.dataset_info)
    at = {text: data.splits[split][i] for split in data.splits for i, (text, _) in enumerate(texts_of(data, split))}
    found = at["text 4, 明月 4"]
    assert set(example) == set(found) - {"label"}
    for name, x in example.items():
        np.testing.assert_array_equal(x, found[name])
    pair = {**data.dataset_info, "pair": True}
    (tmp_path / "two.txt").write_text("a\nb c\n")
    assert read_text(str(tmp_path / "two.txt"), pair)["token_type_ids"].tolist()[:7] == [0, 0, 0, 1, 1, 1, 1]
    for name, content, dataset_info, says in [
        ("one.txt", "a", pair, "has one line; this model reads two texts"),
        ("no.txt", " \n", data.dataset_info, "no.txt is empty"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=says):
            read_text(str(tmp_path / name), dataset_info)
    with pytest.raises(UserError, match="there is no file "):
        read_text(str(tmp_path / "none.txt"), data.dataset_info)


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "content", "given", "says"),
    [
        (
            "a.csv",
            "headline,verdict\nx,1\n",
            {},
            r"columns 'headline', 'verdict'; name the one of the text and label after the recipe, as in :root",
        ),
        ("a.csv", "text,verdict\nx,1\n", {}, "name the one of the label"),
        ("a.csv", "text,label\nx,1\n", {"label": "lable"}, "no column 'lable'. Did you mean 'label'"),
        ("a.csv", "text,label\nx,1\ny\n", {}, "a.csv, line 3 has 1 columns instead of 2"),
        ("a.csv", "text,label\n", {}, "no column|has no row|columns"),
        ("a.csv", "", {}, "a.csv has no rows"),
        ("a.csv", "text,label\n ,1\n", {}, "no row with text"),
        ("a.csv", "text,label\nx,1\ny,\n", {}, "line 3 has no label in 'label'"),
        ("a.csv", "text,label\nx,1\ny,1\n", {}, "all rows of .* have the label 1"),
        ("a.csv", "text,label\nx,1\ny,good\n", {}, "line 2 has the label 1, a number, but .*line 3 'good', a word"),
        ("a.csv", "text,label\n" + "".join(f"x,{i}\n" for i in range(50)), {}, "50 different values in 50 rows"),
        ("a.jsonl", '{"text": "x", "label": 0}\n{"text": "y", "label"', {}, "a.jsonl, line 2 is not JSON"),
        (
            "a.jsonl",
            '{"text": "x", "label": 0}\n{"txt": "y", "label": 1}',
            {},
            "line 2 has no 'text'. Did you mean 'txt'",
        ),
        ("a.jsonl", '{"text": "x", "label": 0.5}', {}, "line 1: 'label' is 0.5, neither"),
        ("a.jsonl", '{"text": 3, "label": 1}', {}, "line 1: 'text' is int, not text"),
        ("a.jsonl", '["x", 1]', {}, "record 1 is list, not an object"),
        ("a.txt", "x", {}, "is neither a table nor a folder of texts for each class"),
        ("a.parquet", "x", {}, "cannot be read"),
        ("a.arrow", "nothing of the kind", {}, "cannot be read"),
        ("a.zip", "x", {}, "a.zip cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, name, content, given, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says) as raised:
        prepare(tmp_path, root=str(tmp_path / name), **given)
    assert "\n" not in str(raised.value)


def test_mistakes_that_are_no_files(tmp_path):
    with pytest.raises(UserError, match="there is no file "):
        prepare(tmp_path, root=str(tmp_path / "none"))
    with pytest.raises(UserError, match="length is 3"):
        LabelledText(root="x", length=3)
    with pytest.raises(UserError, match="there is no encoding"):
        LabelledText(root="x", encoding="utf-9")
    (tmp_path / "train.csv").write_text("text,label\nx,1\ny,0\n")
    (tmp_path / "test.csv").write_text("text,label\nz,2\n")
    with pytest.raises(UserError, match="no training row of .* has the label 2"):
        prepare(tmp_path, root=str(tmp_path), val_fraction=0.0)
    with pytest.raises(UserError, match="val_fraction is 1.5"):
        prepare(tmp_path, root=str(tmp_path / "train.csv"), val_fraction=1.5)


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.mark.realdata
def test_sst2_is_as_published(real_data, tmp_path):
    data, _ = prepare(tmp_path, root=str(real_data / "sst2"), tokenizer=Subwords("bpe", 2048), length=64)
    assert {name: len(source) for name, source in data.splits.items()} == {"train": 6920, "val": 872, "test": 1821}
    assert texts_of(data, "val")[0] == ("one long string of cliches", "0")


@pytest.mark.realdata
def test_chinese_reviews_in_a_zip(real_data, tmp_path):
    root = str(real_data / "online_shopping_10_cats")
    data, _ = prepare(tmp_path, root=root, label="cat", tokenizer=Characters(), length=64)
    assert sum(map(len, data.splits.values())) == 62_773 and "1 without text left out" in data.description
    assert data.dataset_info["num_classes"] == 10 and "酒店" in data.dataset_info["class_names"]
