"""Documents from files of every format, exactly as they stand; and one sentence for every file that is broken."""

import csv
import gzip
import json
import sys
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from bigbase_jax.core import UserError
from bigbase_jax.data import documents
from bigbase_jax.data.documents import Format
from bigbase_jax.data.files import by_split, list_files, named_after, split_of, unused
from bigbase_jax.data.rows import class_names, rows

TEXTS = ['The fox,\t"quoted".', "明月几时有？\n把酒问青天。", "naïve 🦊\r\n"]

SCHEMA = pa.schema({"id": pa.int64(), "text": pa.large_string()})


def read(root, **options):
    """Every document of every file: {name: text}."""
    found = {}
    for file in list_files(str(root)):
        for document in Format(**options).documents(file):
            assert document.name not in found
            found[document.name] = "".join(document.blocks)
    return found


def table(path, rows, delimiter=","):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def write(folder, kind):
    """A file of ``TEXTS`` in some format."""
    path = folder / f"data{kind}"
    records = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    if kind in (".jsonl", ".ndjson"):
        path.write_text("\n\n".join(json.dumps(r) for r in records) + "\n", encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    elif kind == ".csv":
        table(path, [["id", "text"], *([r["id"], r["text"]] for r in records)])
    elif kind == ".parquet":
        pq.write_table(pa.table({"id": [0, 1, 2], "text": TEXTS}), path)
    elif kind == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            writer.write_table(pa.table({"id": [0, 1, 2], "text": TEXTS}, SCHEMA), max_chunksize=2)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow"])
def test_records_of_every_format_are_documents(tmp_path, kind):
    assert list(read(write(tmp_path, kind)).values()) == TEXTS


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_packed_files_are_read_as_they_are_unpacked(tmp_path, kind, packed):
    plain = "".join(TEXTS) if kind == ".txt" else json.dumps({"text": TEXTS[1]})
    data = plain.encode()
    half = len(data) // 2
    pack = gzip.compress if packed == ".gz" else zstandard.ZstdCompressor().compress
    (tmp_path / f"a{kind}{packed}").write_bytes(pack(data[:half]) + pack(data[half:]))  # two members, as cat makes
    assert list(read(tmp_path).values()) == ["".join(TEXTS) if kind == ".txt" else TEXTS[1]]


def test_plain_text_keeps_every_character_and_comes_in_blocks(tmp_path, monkeypatch):
    text = "".join(TEXTS) * 50
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    monkeypatch.setattr(documents, "BLOCK", 100)
    (document,) = Format().documents(list_files(str(tmp_path))[0])
    blocks = list(document.blocks)
    assert "".join(blocks) == text and len(blocks) > 10
    assert all(block.endswith("\n") for block in blocks[:-1]) and max(map(len, blocks)) <= 201


def test_lines_and_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\r\n \n二\nthree\n\n\nlast".encode())
    assert read(tmp_path, unit="line") == {"a.txt:1": "one", "a.txt:4": "二", "a.txt:5": "three", "a.txt:8": "last"}
    assert read(tmp_path, unit="paragraph") == {"a.txt:1": "one", "a.txt:4": "二\nthree", "a.txt:8": "last"}


def test_other_encodings(tmp_path):
    (tmp_path / "a.txt").write_bytes("明月".encode("gb18030"))
    with pytest.raises(UserError, match=r"a.txt is not utf-8 \(byte 0xc3\)"):
        read(tmp_path)
    assert read(tmp_path, encoding="gb18030") == {"a.txt": "明月"}


def test_columns_by_name_by_place_and_by_guess(tmp_path):
    poem = {"author": "x", "rhythmic": "导引", "paragraphs": ["一", "二"]}
    (tmp_path / "a.json").write_text(json.dumps([poem]))
    assert read(tmp_path) == {"a.json:1": "导引\n一\n二"}
    assert read(tmp_path, columns=("author", "rhythmic")) == {"a.json:1": "x\n导引"}
    (tmp_path / "a.json").write_text(json.dumps(["just", "texts", ""]))
    assert list(read(tmp_path).values()) == ["just", "texts"]
    (tmp_path / "a.json").unlink()
    (tmp_path / "b.tsv").write_text('one "long" string\t0\nanother\t1\n')
    assert read(tmp_path, columns=("0",)) == {"b.tsv:1": 'one "long" string', "b.tsv:2": "another"}
    with pytest.raises(UserError, match=r"first line of .*b.tsv has the columns 'one .*', '0'; name those"):
        read(tmp_path)
    with pytest.raises(UserError, match="column 2 "):
        read(tmp_path, columns=("2",))
    table(tmp_path / "b.tsv", [["title", "body"], ["a", "b"]], "\t")
    with pytest.raises(UserError, match="has no column 'titel'. Did you mean 'title'"):
        read(tmp_path, columns=("titel",))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\xff\xf0", "is not utf-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', "record 2 has no 'text'. Did you mean 'txt'"),
        ("a.jsonl", b'{"text": 3}', "'text' is int, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}', "half a character"),
        ("a.json", b"[", "is not JSON"),
        ("a.csv", b'text\nfirst\n"never closed\n\n', "a.csv, line 3 cannot be read"),
        ("a.parquet", b"not parquet", "cannot be read"),
        ("a.arrow", b"not arrow", "cannot be read"),
        ("a.arrow", b"", "cannot be read"),
        ("a.zip", b"not zip", "cannot be read"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"cut off " * 100, mtime=0)[:-12], "cannot be read"),
        ("a.txt.zst", b"not zstandard", "cannot be read"),
    ],
)
def test_a_broken_file_is_one_sentence_that_names_it(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as raised:
        read(tmp_path)
    assert name in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "package"),
    [("a.parquet", "pyarrow"), ("a.arrow", "pyarrow"), ("a.txt.zst", "zstandard"), ("a.xlsx", "openpyxl")],
)
def test_a_package_that_is_missing_is_one_sentence(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"")
    for module in (package, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs the package {package}: pip install 'bigbase_jax\[text\]'"):
        read(tmp_path)


def test_folders_are_read_by_name_without_litter(tmp_path):
    for name in ("b.txt", "sub/a.txt", ".hidden/x.txt", ".x.txt", "README.md", "LICENSE.txt", "x.png", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert list(read(tmp_path)) == ["b.txt", "c.md", "sub/a.txt"]
    assert read(tmp_path / "x.png") == {"x.png": "x.png"}  # named by the user: plain text, whatever its suffix


def test_nothing_to_read_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no file "):
        list_files(str(tmp_path / "none"))
    (tmp_path / "poems").mkdir()
    with pytest.raises(UserError, match=r"Did you mean 'poems'\?"):
        list_files(str(tmp_path / "poem"))
    (tmp_path / "poems" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"it has 1 \.png"):
        list_files(str(tmp_path / "poems"))
    with pytest.raises(UserError, match="Did you mean 'line'"):
        Format(unit="lines")
    with pytest.raises(UserError, match="there is no encoding"):
        Format(encoding="utf-9")
    assert read(write_empty(tmp_path)) == {}


def write_empty(folder):
    (folder / "empty.txt").write_bytes(b"")
    return folder / "empty.txt"


def test_files_named_after_splits_keep_them(tmp_path):
    def splits(*names):
        for path in tmp_path.iterdir():
            path.unlink()
        for name in names:
            (tmp_path / name).write_text("x")
        return split_of(list_files(str(tmp_path)), str(tmp_path))

    assert splits("train.txt", "valid.txt", "test-0.txt") == {
        "train.txt": "train",
        "valid.txt": "val",
        "test-0.txt": "test",
    }
    assert splits("train.txt", "dev.txt")["dev.txt"] == "val"
    assert splits("train.txt", "notes.txt") == {} == splits("test.txt") == splits("training.txt", "tests.txt")
    with pytest.raises(UserError, match="nothing named train"):
        splits("valid.txt", "test.txt")


# ----------------------------------------------------------------------------------- what Hugging Face's tools leave


def saved(folder, splits):
    """Folders as ``datasets.save_to_disk`` leaves them, with ``TEXTS`` in each."""
    for split in splits:
        (folder / split).mkdir(parents=True)
        write(folder / split, ".arrow").rename(folder / split / "data-00000-of-00001.arrow")
        (folder / split / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
        (folder / split / "dataset_info.json").write_text('{"features": {}}')
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def test_a_folder_that_datasets_saved_is_documents_and_rows(tmp_path):
    root = saved(tmp_path / "d", ["train", "validation", "unsupervised"])
    files = list_files(str(root))
    assert [file.name.split("/")[0] for file in files] == ["train", "unsupervised", "validation"]
    assert list(read(root / "train").values()) == TEXTS
    assert {name.split("/")[0]: split for name, split in split_of(files, str(root)).items()} == {
        "train": "train",
        "validation": "val",
        "unsupervised": "",
    }
    used = by_split(files, str(root), {})
    assert {split: len(given) for split, given in used.items()} == {"train": 1, "val": 1}
    assert unused(files, used) == ["unsupervised"]
    (row, *_) = rows(files[0])
    assert row.values == {"id": 0, "text": TEXTS[0]} and row.where.endswith("data-00000-of-00001.arrow, row 1")
    assert class_names(files[0], "id") is None
    with pytest.raises(UserError, match="nothing named train"):
        split_of(list_files(str(saved(tmp_path / "e", ["a"]))), str(tmp_path / "e"))


def test_an_arrow_file_with_an_index_and_a_broken_one(tmp_path):
    table = pa.table({"id": [0, 1, 2], "text": TEXTS}, SCHEMA)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table, max_chunksize=2)
    assert list(read(tmp_path).values()) == TEXTS
    stream = write(tmp_path, ".arrow").read_bytes()
    (tmp_path / "a.arrow").unlink()
    (tmp_path / "data.arrow").write_bytes(stream[: len(stream) // 2])
    with pytest.raises(UserError, match="data.arrow cannot be read"):
        read(tmp_path)


def test_splits_below_a_folder_and_by_choice(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation_matched", "validation_other", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text('{"text": "x"}')
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "dataset_infos.json").write_text("{}")
    files = list_files(str(tmp_path))
    assert sorted(split_of(files, str(tmp_path)).values()) == ["test", "train", "train", "val", "val"]
    used = by_split(files, str(tmp_path), {"val": "validation_matched", "test": None})
    assert {split: len(given) for split, given in used.items()} == {"train": 2, "val": 1, "test": 1}
    assert unused(files, used) == ["validation_other"]
    with pytest.raises(UserError, match="no 'validation_matchd' for val. Did you mean 'validation_matched'"):
        by_split(files, str(tmp_path), {"val": "validation_matchd"})
    with pytest.raises(UserError, match="has nothing named train"):
        by_split([file for file in files if "train" not in file.name], str(tmp_path), {"val": "validation_matched"})


def test_zips_are_opened_where_named_or_alone(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("train.txt", TEXTS[0])
        archive.writestr("deep/test.csv.gz", gzip.compress(f"text\n{'b' * 9}\n".encode()))
        archive.writestr("__MACOSX/x.txt", "litter")
        archive.writestr("README.txt", "litter")
        archive.write(write(tmp_path, ".parquet"), "data.parquet")
    found = {"train.txt": TEXTS[0], "deep/test.csv.gz:2": "b" * 9}
    found |= {f"data.parquet:{i}": text for i, text in enumerate(TEXTS, 1)}
    assert read(tmp_path / "a.zip") == found
    assert not any(name.startswith("a.zip") for name in read(tmp_path))
    (tmp_path / "data.parquet").unlink()
    assert read(tmp_path) == {f"a.zip/{name}": text for name, text in found.items()}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", "{")
    with pytest.raises(UserError, match="a.zip/a.jsonl, line 1 is not JSON"):
        read(tmp_path)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("a.png", "")
    with pytest.raises(UserError, match="b.zip holds no text or table"):
        read(tmp_path / "b.zip")


def test_json_lines_under_the_name_of_json(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read(tmp_path) == {"a.json:1": "a", "a.json:2": "b"}
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text"')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train train-00000-of-00002 training TRAINING_SET trainset train2017 Train.data training.1600000"),
        ("val", "val valid validation_matched dev dev2 development eval evaluation Eval-Set val_images valData"),
        ("test", "test test_2016_flickr testing testset hold_out holdout held-out TestData"),
        (None, "trainer values devices testament evaluator text"),
    ],
)
def test_what_splits_are_called(split, names):
    for name in names.split(" "):
        assert named_after(name) == split, name


def test_classes_that_only_begin_like_splits_are_no_split_folders():
    for name in ("train_station", "test tube", "dev-board", "val thorens"):
        assert named_after(name) and named_after(name, whole=True) is None
    for name in ("train", "Training Set", "train2017", "test_images", "val_1"):
        assert named_after(name, whole=True)
