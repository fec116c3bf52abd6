"""Tables from file to service: trained by the recipe, asked by rows in JSON and in tables, exported."""

import io
import json
import pathlib
import runpy

import numpy as np
import pytest

from bigbase_jax import verbs
from bigbase_jax.build import build
from bigbase_jax.core import UserError
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.serve.served import Options, Served

pytest.importorskip("pyarrow")
ROOT = pathlib.Path(__file__).parents[1]
NAMES = ["size", "place", "built", "price", "sold"]


def write(folder, n=160):
    rng = np.random.default_rng(0)
    lines = [",".join(NAMES)]
    for _ in range(n):
        size, place = rng.integers(20, 200), rng.choice(["north", "south", "?"])
        price = 1000 * size + 30_000 * (place == "north") + rng.normal(0, 2000)
        lines.append(f"{size},{place},{1950 + rng.integers(0, 70)}-05-01,{price:.0f},{'yes' if size > 90 else 'no'}")
    (folder / "houses.csv").write_text("\n".join(lines) + "\n")
    return folder / "houses.csv"


def trained(folder, arg, **train):
    path = write(folder)
    config = runpy.run_path(str(ROOT / "configs/table.py"))["get_config"](f"root={path},tiny,{arg}")
    config.data.cache_dir = str(folder / "cache")
    config.train.update({"eval_every": 1000, "writers": (), **train})
    return verbs.train(config, str(folder / "run")), folder / "run"


def answers(run, path, **more):
    found = io.StringIO()
    status = verbs.predict(str(run), str(path), out=found, **more)
    return status, [json.loads(line) for line in found.getvalue().splitlines()]


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("classes"), "target=sold,drop=price,audit=place", steps=20)


def test_rows_are_answered_as_they_were_evaluated(classes, tmp_path):
    result, run = classes
    data = json.loads((run / "data.json").read_text())
    kept = np.load(run / "predictions-test.npz")
    assert result["split"] == "test" and {"probabilities", "label", "group"} <= set(kept.files)
    config = Predictor.open(run).config
    rows = build(config.data.dataset).prepare(run.parent / "cache", 1e9, print).rows["test"]
    lines = (run.parent / "houses.csv").read_text().splitlines()
    (tmp_path / "test.csv").write_text("\n".join([lines[0], *(lines[i + 1] for i in rows)]) + "\n")
    status, found = answers(run, tmp_path / "test.csv")
    assert status == 0
    names = data["dataset_info"]["class_names"]
    said = np.array([[answer["probabilities"][name] for name in names] for answer in found])
    np.testing.assert_allclose(said, kept["probabilities"][np.argsort(kept["index"])], atol=1e-6)


def test_json_tables_and_what_is_new_or_missing(classes, tmp_path):
    predictor = Predictor.open(classes[1])
    row = {"size": 120, "place": "north", "built": "1990-05-01", "price": None, "else": "?"}
    (one,) = predictor.answer(row)
    (same,) = predictor.answer({name: "" if value is None else str(value) for name, value in row.items()})
    assert one == same and set(one) == {"label", "probability", "probabilities"}
    (new,), (gone,) = (predictor.answer(row | {"place": place}) for place in ("west", None))
    assert new == gone != one
    table = b"size,place,built\n120,north,1990-05-01\n30,south,1990-05-01\n"
    first, second = predictor.answer(table)
    assert first["probability"] == pytest.approx(one["probability"], abs=1e-6) and second["part"] == 1
    with pytest.raises(UserError, match="the row has no 'built'"):
        predictor.answer({"size": 1, "place": "north"})
    (tmp_path / "new.csv").write_text("size,place,built\nmany,north,1990-05-01\n120,north,1990-05-01\n")
    status, (bad, good) = answers(classes[1], tmp_path / "new.csv")
    assert status == 1 and "size is 'many', which is no number" in bad["error"] and good["label"] == one["label"]
    (tmp_path / "new.csv").write_text("size,place\n1,north\n")
    with pytest.raises(UserError, match="this model reads 'built'"):
        answers(classes[1], tmp_path / "new.csv")


def test_the_form_of_a_row_has_its_columns(classes):
    reads = Served("houses", Predictor.open(classes[1]), Options(max_batch=1)).card["reads"]
    assert reads["entries"] == ["size", "place", "built"] and not reads["files"]
    assert set(reads["short"]["place"]) == {"north", "south"} and reads["short"]["size"] == []


@pytest.mark.parametrize("to", ["stablehlo", "onnx"])
def test_what_is_exported_says_the_same(classes, to):
    pytest.importorskip("jax2onnx" if to == "onnx" else "jax")
    found = verbs.export(str(classes[1]), to=to)
    assert found["proof"]["same_answers"] == 1


def test_a_regression_with_quantiles(tmp_path):
    result, run = trained(tmp_path, "target=price,drop=sold,task=regression,loss=pinball,members=2", steps=400)
    assert result["r2"] > 0.5 and result["rmse"] > result["mae"] > 0 and 0.5 < result["coverage"] <= 1
    row = {"size": 100, "place": "south", "built": "1990-05-01"}
    (answer,) = Predictor.open(run).answer(row)
    low, *_, high = answer["quantiles"].values()
    assert 50_000 < low < answer["price"] < high < 150_000
    report = (run / "report.html").read_text()
    assert "Furthest off" in report and "Said and true" in report


@pytest.mark.parametrize(
    ("arg", "said"),
    [
        ("task=regresion", "Did you mean 'regression'"),
        ("root=a.csv", "say which column"),
        ("task=regression", "the embedded set has classes"),
        ("model=tree", "Known models: linear, mlp"),
    ],
)
def test_mistakes_of_the_recipe(arg, said):
    with pytest.raises(UserError, match=said):
        runpy.run_path(str(ROOT / "configs/table.py"))["get_config"](arg)
