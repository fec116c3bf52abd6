"""What of a user's files is one input, and which columns of a row are read, for each kind of run."""

import csv
import json

import pytest

from bigbase_jax.core import Fields, UserError
from bigbase_jax.data.sources.text.chat import ChatFiles
from bigbase_jax.data.sources.text.labelled_text import LabelledText
from bigbase_jax.data.sources.text.parallel_text import ParallelText
from bigbase_jax.data.sources.text.text import TextFiles
from bigbase_jax.inference import inputs


def given(path, fields):
    """(row, what is read, error) of each input in a file."""
    return [(item.row, item.given, item.error) for item in inputs.read([str(path)], fields)]


def write(path, rows, delimiter=","):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def test_lines_of_a_text_are_rows_unless_the_run_was_trained_on_whole_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("good\n\nbad, so bad\n")
    lines = LabelledText.codec({}, {"pair": False}).fields
    assert given(path, lines) == [(1, {"text": "good"}, ""), (3, {"text": "bad, so bad"}, "")]
    for fields in (
        LabelledText.codec({}, {"pair": False, "text_files": True}).fields,
        LabelledText.codec({}, {"pair": True}).fields,
        TextFiles.codec({}, {}).fields,
        ChatFiles.codec({}, {}).fields,
        None,
    ):
        assert given(path, fields) == [(None, str(path), "")]
    assert [row for row, _, _ in given(path, TextFiles.codec({"format": {"unit": "line"}}, {}).fields)] == [1, 3]
    path.write_bytes("很好\n".encode("gb18030"))
    assert given(path, LabelledText.codec({"encoding": "gb18030"}, {"pair": False}).fields) == [
        (1, {"text": "很好"}, "")
    ]
    with pytest.raises(UserError, match="not utf-8"):
        given(path, lines)


def test_columns_are_the_runs_own_or_the_usual_ones(tmp_path):
    path = write(tmp_path / "a.csv", [("title", "body", "text"), ("T", "B", "X")])
    kept = {"pair": False, "text_columns": ("title", "body"), "header": True}
    assert given(path, LabelledText.codec({}, kept).fields) == [(1, {"text": "T\nB"}, "")]
    assert given(path, LabelledText.codec({"text": "body"}, {"pair": False}).fields) == [
        (1, {"text": "B"}, "")
    ]  # an old run
    assert given(path, LabelledText.codec({}, {"pair": False}).fields) == [(1, {"text": "X"}, "")]
    pairs = LabelledText.codec({}, {"pair": True}).fields
    with pytest.raises(UserError, match="has the columns 'title', 'body', 'text'"):
        given(path, pairs)
    path = write(tmp_path / "b.csv", [("hypothesis", "premise"), ("H", "P")])
    assert given(path, pairs) == [(1, {"text": "P", "text_pair": "H"}, "")]


def test_tables_without_a_header(tmp_path):
    kept = LabelledText.codec({}, {"pair": False, "text_columns": ("1",), "header": False}).fields
    path = write(tmp_path / "a.txt", [("ham", "see you"), ("spam", "win, now")], "\t")  # a table, as in training
    assert given(path, kept) == [(1, {"text": "see you"}, ""), (2, {"text": "win, now"}, "")]
    path = write(tmp_path / "b.csv", [("see you",), ("win now",)])
    assert given(path, kept) == [(1, {"text": "see you"}, ""), (2, {"text": "win now"}, "")]
    path = write(tmp_path / "c.tsv", [("7", "Hello", "9", "Hallo")], "\t")
    assert given(path, ParallelText.codec({}, {"column": "1"}).fields) == [(1, {"source": "Hello"}, "")]


def test_both_languages_in_one_column(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"translation": {"en": "Hello", "de": "Hallo"}}))
    fields = ParallelText.codec({"source_language": "en"}, {}).fields
    ((_, found, _),) = given(tmp_path / "a.jsonl", fields)
    assert found == {"source": {"en": "Hello", "de": "Hallo"}}


def test_options_stand_beside_what_is_read(tmp_path):
    fields = Fields({"text": [("text",)]}, options=("voice", "rate"))
    path = write(tmp_path / "a.csv", [("text", "voice", "other"), ("T", "ann", "X"), ("U", "", "X")])
    assert given(path, fields) == [(1, {"text": "T", "voice": "ann"}, ""), (2, {"text": "U"}, "")]
    row = {"text": "T", "rate": 1.5, "other": 1}
    assert inputs.entries_of(row, fields) == {"text": "T", "rate": 1.5}


def test_several_files_go_on_past_one_that_cannot_be_read(tmp_path):
    write(tmp_path / "a.csv", [("text",), ("x",)])
    (tmp_path / "b.csv").write_bytes(b"text\n\xff\xfe\xfd\n")
    write(tmp_path / "c.csv", [("one", "two"), ("x", "y")])
    files = inputs.find(str(tmp_path))
    found = list(inputs.read(files, Fields({"text": [("text",)]})))
    assert [bool(item.error) for item in found] == [False, True, True]
    assert "'one', 'two'" in found[2].error
    with pytest.raises(UserError, match="names no file"):
        inputs.find(str(tmp_path / "*.tsv"))
