"""Columns of tables: kinds, exactness, missing cells, several files, and what is refused."""

import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.data.columns import column_of, columns_of, read_columns, table_files

pa = pytest.importorskip("pyarrow")


def read(tmp_path, text, name="t.csv", **words):
    (tmp_path / name).write_text(text)
    return read_columns(table_files(str(tmp_path / name)), say=lambda line: None, **words)


def test_kinds_are_inferred(tmp_path):
    table = read(
        tmp_path,
        "id,zip,x,sex,day,when,says,none\n"
        "1000000000001,01234,1.5,F,31-12-2020,2020-01-01T00:00:00+02:00,the first one is good,\n"
        "1000000000002,99999,inf,M,01-02-2021,2020-01-01 00:00:00,the second one is bad,NA\n"
        "1000000000003,10000, ?,,,,what comes third of all,?\n",
    )
    kinds = {name: column.kind for name, column in table.items()}
    assert kinds == {
        "id": "number",
        "zip": "category",
        "x": "number",
        "sex": "category",
        "day": "date",
        "when": "date",
        "says": "text",
        "none": "number",
    }
    assert table["id"].values.tolist() == [10**12 + 1, 10**12 + 2, 10**12 + 3] and table["id"].values.dtype == np.int64
    assert list(table["zip"].names) == ["01234", "99999", "10000"]
    np.testing.assert_array_equal(table["x"].values, [1.5, np.inf, np.nan])
    assert table["sex"].values.tolist() == [0, 1, -1] and table["sex"].missing == 1
    assert table["day"].values[:2].astype(str).tolist() == ["2020-12-31T00:00:00", "2021-02-01T00:00:00"]
    assert table["when"].values[:2].astype(str).tolist() == ["2019-12-31T22:00:00", "2020-01-01T00:00:00"]
    assert np.isnat(table["when"].values[2]) and table["says"].values[1] == "the second one is bad"
    assert np.isnan(table["none"].values).all() and table["none"].missing == 3


def test_integers_stay_exact_or_become_names(tmp_path):
    big = 2**53 + 1
    table = read(tmp_path, f"a,b,c\n{big},{big},{10**30}\n1,,2\n")
    assert table["a"].values.tolist() == [big, 1]
    assert list(table["b"].names) == [str(big)] and list(table["c"].names) == [str(10**30), "2"]


@pytest.mark.parametrize("mark", [",", "\t", ";", "  ", "::"])
def test_marks_between_cells(tmp_path, mark):
    text = "\n".join(mark.join(cells) for cells in [("a", "b"), ("1", "x"), ("2", "y")]) + "\n"
    table = read(tmp_path, text, "t.txt" if mark in ("  ", "::") else "t.csv")
    assert table["a"].values.tolist() == [1, 2] and list(table["b"].names) == ["x", "y"]


def test_files_that_differ_and_formats_agree(tmp_path):
    from pyarrow import parquet

    said = []
    for folder in ("cells", "typed"):
        (tmp_path / folder).mkdir()
    (tmp_path / "cells/a.csv").write_text("x,c,t\n1,red,yes\n2,blue,no\n")
    (tmp_path / "cells/b.csv").write_text("new,t,x\n9,no,2.5\n")
    first = pa.table({"x": [1, 2], "c": pa.array(["red", "blue"]).dictionary_encode(), "t": ["yes", "no"]})
    parquet.write_table(first, tmp_path / "typed/a.parquet")
    with pa.OSFile(str(tmp_path / "typed/b.arrow"), "wb") as file:
        second = pa.table({"new": [9], "t": ["no"], "x": [2.5]})
        with pa.ipc.new_file(file, second.schema) as writer:
            writer.write_table(second)
    one, other = (
        read_columns(table_files(str(tmp_path / folder)), say=said.append, cache=tmp_path / "cache")
        for folder in ("cells", "typed")
    )
    assert one.files[1][1] == 1 and one.rows == 3 and any("'c'" in line and "missing" in line for line in said)
    assert any("'new'" in line and "left out" in line for line in said)
    for name in ("x", "c", "t"):
        np.testing.assert_array_equal(one[name].values, other[name].values)
        assert list(one[name].names) == list(other[name].names)
    again = read_columns(table_files(str(tmp_path / "cells")), say=pytest.fail, cache=tmp_path / "cache")
    np.testing.assert_array_equal(again["x"].values, [1, 2, 2.5])


def test_blocks_do_not_show(tmp_path, monkeypatch):
    from bigbase_jax.data import column_files

    text = "a,b,c\n" + "".join(f"{i if i != 400 else i + 0.5},n{i % 7},a text of row {i}\n" for i in range(500))
    whole = read(tmp_path, text, kinds={"c": "text"})
    monkeypatch.setattr(column_files, "_BLOCK", 512)
    monkeypatch.setattr(column_files, "_ROWS", 10)
    parts = read(tmp_path, text, kinds={"c": "text"}, cache=tmp_path / "cache")
    assert parts["a"].values.dtype == np.float64 and parts["a"].values[400] == 400.5
    np.testing.assert_array_equal(whole["a"].values, parts["a"].values)
    assert [parts["b"].names[i] for i in parts["b"].values] == [f"n{i % 7}" for i in range(500)]
    assert list(parts["c"].values) == list(whole["c"].values) and parts["c"].values[499] == "a text of row 499"


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("a,b\n1,x\n", {"kinds": {"b": "number"}}, "'x' in b, which is no number"),
        ("a,b\n1,x\n", {"kinds": {"c": "number"}}, "no column 'c'"),
        ("a,b\n1,x\n", {"kinds": {"b": "numbr"}}, "Did you mean 'number'"),
        ("a,a\n1,x\n", {}, "several columns 'a'"),
        ("a,b\n1,x\n2\n", {}, "Expected 2 columns, got 1"),
        ("1,2\n1,x\n", {"header": False, "names": ("a",)}, "2 columns, and there are 1 names"),
        ("", {}, "is empty"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, text, words, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, text, **words)


def test_values_of_json():
    assert column_of("x", [1, "2.5", None, " inf "], "number").values[[0, 1, 3]].tolist() == [1, 2.5, np.inf]
    assert list(column_of("c", [1.0, True, "a"], "category").names) == ["1", "true", "a"]
    assert str(column_of("d", ["3/4/2020"], "date", "%d/%m/%Y").values[0]) == "2020-04-03T00:00:00"
    with pytest.raises(UserError, match="x is 'many', which is no number"):
        column_of("x", ["many"], "number")
    kinds = {name: c.kind for name, c in columns_of({"a": [1, 2], "b": ["x", None]}).items()}
    assert kinds == {"a": "number", "b": "category"}
