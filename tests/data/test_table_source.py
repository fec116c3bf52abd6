"""Tables as data sets: splits, classes, what is left out and told, the cache, and rows as users give them."""

import json

import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.table.table import BreastCancer, Table

pytest.importorskip("pyarrow")
N = 120


def lines(rows, header="x,color,day,y"):
    return "\n".join([header, *rows]) + "\n"


def make(i, x=None, color=None, y=None):
    x = i / 2 if x is None else x
    color = ("red", "blue", "green")[i % 3] if color is None else color
    return f"{x},{color},2020-01-{1 + i % 28:02d},{('no', 'yes')[i % 4 == 0] if y is None else y}"


def prepared(tmp_path, rows=None, said=None, name="t.csv", **words):
    if rows is not None:
        (tmp_path / name).write_text(lines(rows))
    data = Table(
        **{"root": str(tmp_path / name), "target_name": "y", "val_fraction": 0.25, "test_fraction": 0.25, **words}
    )
    return data.prepare(tmp_path / "cache", 1e9, (said if said is not None else []).append)


def test_fractions_are_dealt_by_class_and_every_row_once(tmp_path):
    data = prepared(tmp_path, map(make, range(N)))
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 58, "val": 31, "test": 31}
    for source in data.splits.values():
        assert source.labels.mean() == pytest.approx(0.25, abs=0.02)
    rows = np.concatenate(list(data.rows.values()))
    assert sorted(rows) == list(range(N))
    other = prepared(tmp_path, seed=1)
    assert sorted(other.rows["test"]) != sorted(data.rows["test"])
    columns = data.columns()
    for split, source in data.splits.items():  # each example is of its row
        wanted = [columns["y"].names[code] for code in columns["y"].values[data.rows[split]]]
        assert [data.dataset_info["class_names"][label] for label in source.labels] == wanted
        encoded = data.encoders.encode(columns, data.rows[split])
        np.testing.assert_array_equal(source.batch(np.arange(len(source)))["numbers"], encoded["numbers"])
    assert source[3]["numbers"].tolist() == source.batch(np.array([3]))["numbers"][0].tolist()
    info = json.loads(json.dumps(dict(data.dataset_info)))
    assert info["class_names"] == ["no", "yes"] and info["category_names"] == ["color"]


def test_by_time_and_by_group(tmp_path):
    rows = [make(i) for i in range(N)]
    data = prepared(tmp_path, rows, by_time="day")
    days = data.columns()["day"].values
    of = {split: days[rows] for split, rows in data.rows.items()}
    assert of["train"].max() < of["val"].min() and of["val"].max() < of["test"].min()
    data = prepared(tmp_path, by_group="day")
    of = {split: set(days[rows].tolist()) for split, rows in data.rows.items()}
    assert not (of["train"] & of["val"]) and not (of["train"] & of["test"]) and "day" not in data.encoders.number_names
    with pytest.raises(UserError, match="not by both"):
        prepared(tmp_path, by_group="day", by_time="day")
    with pytest.raises(UserError, match="split by a date or a number"):
        prepared(tmp_path, by_time="color")


def test_files_keep_their_splits_and_columns_may_vanish_or_appear(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "train.csv").write_text(lines(map(make, range(60))))
    (folder / "test.csv").write_text("new,y,x\n" + "".join(f"1,yes,{i}\n" for i in range(20)))
    said = []
    data = prepared(tmp_path, said=said, name="t")
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 45, "val": 15, "test": 20}
    assert any("has no 'color', 'day'; missing in its rows" in line for line in said)
    assert any("has 'new'" in line and "left out" in line for line in said)
    assert not data.splits["test"].batch(np.arange(20))["categories"].any()
    (folder / "test.csv").write_text("x,color,day\n1,red,2020-01-01\n")
    said = []
    assert set(prepared(tmp_path, said=said, name="t").splits) == {"train", "val"}
    assert "the test split has no y and is left out" in prepared(tmp_path, name="t").description


def test_what_is_odd_is_told(tmp_path):
    rows = [make(i) for i in range(N)] * 2  # every row twice
    rows += ["inf,red,2020-01-01,no", "1,red,2020-01-01,", "1,red,2020-01-01,?"]
    data = prepared(tmp_path, rows)
    for words in ("rows of val are in train too", "rows of test are in train too", "infinite numbers in x"):
        assert words in data.description
    assert "2 rows without y left out" in data.description
    whole = {split: {(*rows[i].split(","),) for i in part} for split, part in data.rows.items()}
    shared = sum((*rows[i].split(","),) in whole["train"] for i in data.rows["test"])
    assert f"{shared} rows of test are in train too" in data.description
    alone = prepared(tmp_path, [make(i, x=i * 1.5) for i in range(N)])
    assert "in train too" not in alone.description


def test_a_class_that_train_has_not_is_left_out(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "train.csv").write_text(lines(map(make, range(60))))
    (folder / "test.csv").write_text(lines([make(0), make(1, y="maybe"), make(2)]))
    data = prepared(tmp_path, name="t")
    assert len(data.splits["test"]) == 2 and "1 rows of test of classes that train has not (maybe)" in data.description
    assert data.dataset_info["class_names"] == ("no", "yes")


def test_targets(tmp_path):
    data = prepared(tmp_path, [make(i, y=i % 3) for i in range(N)], positive="1", balanced=True)
    assert data.dataset_info["class_names"] == ("0", "2", "1")
    np.testing.assert_allclose(data.dataset_info["class_weights"], 1, atol=0.05)
    data = prepared(tmp_path, [make(i, y=i * 0.5 if i % 10 else "inf") for i in range(N)], regression=True)
    target = np.concatenate([source.batch(np.arange(len(source)))["target"] for source in data.splits.values()])
    assert sorted(target) == [i / 2 for i in range(N) if i % 10] and "12 rows without y" in data.description
    train = data.splits["train"].batch(np.arange(len(data.splits["train"])))["target"]
    assert data.dataset_info["target_mean"] == pytest.approx(train.mean(), rel=1e-5)
    assert data.dataset_info["target_std"] == pytest.approx(train.std(), rel=1e-5)


@pytest.mark.parametrize(
    ("target", "words", "said"),
    [
        ("no", {}, "y is 'no' in all rows of train"),
        (3, {"regression": True}, "y is 3 in all rows of train"),
        ("", {}, "no row to train on"),
        (None, {"target_name": "z"}, "no column 'z'"),
        (None, {"target_name": "day"}, "holds a date, and no classes"),
        (None, {"target_name": "x"}, "say task=regression"),
        (None, {"regression": True}, "is no number"),
        (None, {"positive": "yess"}, "Did you mean 'yes'"),
        (None, {"drop": ("colour",)}, "Did you mean 'color'"),
        (None, {"drop": ("x", "color", "day")}, "no column tells"),
        (None, {"kinds": ("color",)}, "NAME:KIND"),
        (None, {"kinds": ("color:number",)}, "'red' in color, which is no number"),
        (None, {"audit": "x"}, "no categories"),
        (None, {"root": "/no/such.csv"}, "there is no"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, target, words, said):
    with pytest.raises(UserError, match=said) as error:
        prepared(tmp_path, [make(i, y=target) for i in range(N)], **words)
    assert "\n" not in str(error.value)


def test_the_cache_is_used_again_and_knows_what_it_is_of(tmp_path):
    said = []
    first = prepared(tmp_path, map(make, range(N)), said)
    assert len(said) == 2
    again = prepared(tmp_path, said=said)
    assert len(said) == 2 and again.fingerprint() == first.fingerprint() and again.description == first.description
    assert prepared(tmp_path, said=said, drop=("day",)).fingerprint() != first.fingerprint()
    assert len(said) == 3  # encoded anew, and not read
    data = Data(Table(root=str(tmp_path / "t.csv"), target_name="y"), 8, cache_limit_gb=0).prepare(said.append)
    assert next(iter(data.train_batches()))["categories"].shape == (8, 1)


def test_rows_of_users(tmp_path):
    data = prepared(tmp_path, map(make, range(N)), audit="color", drop=("color",))
    assert data.dataset_info["group_names"] == ("red", "blue", "green")
    index = 5
    row = data.rows["train"][index]
    assert data.splits["train"][index]["group"] == row % 3
    codec = Table.codec({}, json.loads(json.dumps(dict(data.dataset_info))))
    assert list(codec.fields.columns) == ["x", "day"]
    given = {"x": row / 2, "day": f"2020-01-{1 + row % 28:02d}", "color": "pink", "else": 1}
    (one,) = codec.decode(given)
    np.testing.assert_array_equal(one["numbers"], data.splits["train"][index]["numbers"])
    table = "day;x\n2020-01-05;1\n2020-01-05;2\n".replace(";", ",").encode()
    assert len(codec.decode(table)) == 2
    for bad, said in (({"x": 1}, "no 'day'"), ("a.bin", "is no table"), (b"\xff\xfe\xfd", "not valid utf-8")):
        with pytest.raises(UserError, match=said):
            codec.decode(bad)


def test_the_embedded_set_needs_no_file(tmp_path):
    data = BreastCancer().prepare(tmp_path, 1e9, lambda line: None)
    assert sum(map(len, data.splits.values())) == 569 and data.dataset_info["class_names"] == ("benign", "malignant")
    assert len(data.dataset_info["number_names"]) == 30 and not data.dataset_info["cardinalities"]
