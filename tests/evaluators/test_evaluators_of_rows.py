"""What evaluators make of rows whose truth is known: through ``train``, the report, ``--answers`` and a rerun."""

import io
import json
import pathlib
import runpy

import jax
import numpy as np
import pytest
from evaluators.rows import NOISE, PLACE, STRONG, Rows, recipe

from bigbase_jax import verbs
from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.evaluators.attributions import Attributions, integrated_gradients, score
from bigbase_jax.evaluators.boosting import Boosting
from bigbase_jax.evaluators.importance import Importance
from bigbase_jax.evaluators.risk import Risk
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.tasks.metrics import risk

ROOT = pathlib.Path(__file__).parents[2]
COST = ((0.0, 1.0), (5.0, 0.0))
ROW = {"numbers": [3.0, 0.1], PLACE: 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rows") / "run"
    config = recipe(
        risk=target(Risk, cost=COST, calibration="isotonic", group="group"),
        importance=target(Importance),
        reasons=target(Attributions, steps=64),
        boosting=target(Boosting, trees=40),
    )
    return workdir, verbs.train(config, str(workdir))


def test_what_is_fitted_comes_from_val_and_what_is_measured_from_test(run):
    workdir, result = run
    found = result["risk"]
    verbs.evaluate(str(workdir), split="val")
    p_N = np.load(workdir / "predictions-val.npz")["probabilities"][:, 1]
    val, test = Rows(300, 1), Rows(300, 2)
    calibration = risk.calibrated("isotonic", p_N, val.label)
    np.testing.assert_allclose(found["calibration"]["y"], calibration.y, atol=1e-6)
    assert found["threshold"] == pytest.approx(risk.cheapest_threshold(calibration(p_N), val.label, COST), abs=1e-6)
    kept = np.load(workdir / "predictions-risk.npz")
    decided_N = kept["probability"] >= found["threshold"]
    assert found["cost"] == np.mean(np.where(test.label == 1, 5 * ~decided_N, decided_N)) < found["cost_at_half"]
    assert found["cost"] < found["cost_of_one_answer"] and np.array_equal(kept["label"], test.label)
    assert found["groups"]["north"]["examples"] == (test.group == 0).sum()
    assert result["auc"] == pytest.approx(found["uncalibrated"]["auc"])


def test_importance_finds_the_column_that_the_truth_is_made_of(run):
    found = run[1]["importance"]["importance"]
    assert next(iter(found)) == STRONG and set(found) == {STRONG, PLACE, NOISE}
    assert found[STRONG]["importance"] > 0.2 > found[PLACE]["importance"] > 0.02 > abs(found[NOISE]["importance"])


def test_integrated_gradients_add_up_to_the_difference_of_the_scores(run):
    workdir, result = run
    predictor = Predictor.open(workdir)
    task, variables, rows = predictor.task, predictor.variables, Rows(20, 5)
    inputs = {"numbers": rows.numbers, "categories": rows.categories}
    typical = {"numbers": np.zeros(2, np.float32), "categories": np.array([2], np.int32)}
    number_BF, category_BC = integrated_gradients(task, variables, inputs, typical, steps=256)
    here = {name: np.broadcast_to(x, inputs[name].shape) for name, x in typical.items()}
    difference_B = score(*2 * [task.predict(variables, inputs)]) - score(*2 * [task.predict(variables, here)])
    np.testing.assert_allclose(number_BF.sum(1) + category_BC.sum(1), difference_B, atol=2e-3)
    assert np.abs(difference_B).max() > 1 and np.allclose(category_BC[rows.categories[:, 0] == 2], 0)
    size = result["reasons"]["attribution"]
    assert result["reasons"]["unexplained"] < 0.01
    assert set(size) == {STRONG, PLACE, NOISE} and size[NOISE] < 0.2 * size[STRONG]


def test_a_linear_model_is_explained_by_its_weights():
    class Linear:
        def predict(self, variables, inputs):
            return {"value": inputs["numbers"] @ np.array([2.0, -3.0], np.float32)}

    x_BF = np.array([[1.0, 1.0], [0.0, 4.0]], np.float32)
    typical = {"numbers": np.array([1.0, 2.0], np.float32)}
    none = np.zeros((2, 0), np.int32)
    number_BF, none_BC = jax.jit(
        lambda x: integrated_gradients(Linear(), {}, {"numbers": x, "categories": none}, typical, 8)
    )(x_BF)
    np.testing.assert_allclose(number_BF, [[0, 3], [-2, -6]], atol=1e-5)
    assert none_BC.shape == (2, 0)


def test_boosting_is_measured_on_the_same_rows_and_says_who_wins(run):
    found = run[1]["boosting"]
    own, peer = found["models"]["the model"], found["models"]["HistGradientBoosting"]
    assert own["auc"] == pytest.approx(run[1]["auc"], abs=1e-9) and own["log_loss"] == pytest.approx(
        run[1]["loss"], abs=1e-5
    )
    assert 1 <= peer["trees"] <= 40 and peer["low"] <= peer["ahead"] <= peer["high"]
    assert 0.75 < peer["auc"] == found["auc"] < own["auc"] + 0.05
    wins = "Neither" if peer["low"] <= 0 <= peer["high"] else "The model" if peer["ahead"] < 0 else "HistGradient"
    assert found["verdict"].startswith(wins)


def test_the_report_shows_what_evaluators_say(run):
    page = (run[0] / "report.html").read_text()
    for title in (
        "Decisions on test",
        "Groups",
        "Calibration, isotonic",
        "Importance of columns",
        "Reasons",
        "Gradient boosting",
    ):
        assert title in page
    assert run[1]["boosting"]["verdict"] in page


def test_answers_have_what_is_asked_for(run):
    workdir, result = run
    (plain,) = Predictor.open(workdir).answer(ROW)
    (asked,) = Predictor.open(workdir, answers_of=("risk", "reasons")).answer(ROW)
    assert {"decision", "reasons"} == asked.keys() - plain.keys()
    kept = result["risk"]
    p = np.interp(plain["probabilities"]["yes"], kept["calibration"]["x"], kept["calibration"]["y"])
    assert asked["probabilities"]["yes"] == pytest.approx(p) and p != plain["probabilities"]["yes"]
    assert asked["decision"] == ("yes" if p >= kept["threshold"] else "no")
    assert asked["reasons"][0]["column"] == STRONG and asked["reasons"][0]["attribution"] > 2
    assert json.dumps(asked)


def test_mistakes_are_one_sentence(run, tmp_path):
    workdir, _ = run
    with pytest.raises(UserError, match="no evaluator 'rsk'. Did you mean 'risk'"):
        Predictor.open(workdir, answers_of=("rsk",))
    with pytest.raises(UserError, match="adds nothing to answers"):
        Predictor.open(workdir, answers_of=("importance",))
    for words, said in (
        ({"cost": ((0, 1), (0, 0))}, "costs more than the right one"),
        ({"calibration": "platt"}, "no calibration 'platt'"),
        ({"class_names": ("a", "b", "c")}, "this data has 3"),
    ):
        with pytest.raises(UserError, match=said):
            Risk(**words)
    for name, broken in (
        ("risk", {"calibration": {"temperature": "hot"}, "threshold": 0.5}),
        ("risk", {"calibration": [], "threshold": 0.5}),
        ("risk", {"calibration": {"x": 3}, "threshold": 0.5}),
        ("reasons", {"typical": {"numbers": [0.0, float("nan")], "categories": [1]}}),
        ("reasons", {"typical": {"numbers": [0.0], "categories": [1]}}),
        ("reasons", {"typical": 3}),
    ):
        kept = (workdir / f"eval-{name}.json").read_text()
        try:
            RunDir(workdir).write_json(f"eval-{name}.json", broken)
            with pytest.raises(UserError):
                Predictor.open(workdir, answers_of=(name,))
        finally:
            (workdir / f"eval-{name}.json").write_text(kept)


def test_the_recipe_asks_for_them_and_predict_gives_them(tmp_path):
    """Of a table with categories, missing numbers and an ensemble."""
    rng = np.random.default_rng(0)
    lines = ["income,place,sex,default"]
    for _ in range(200):
        income, place, sex = rng.integers(10, 90), rng.choice(["north", "south"]), rng.choice(["f", "m"])
        late = income + 30 * (place == "north") + rng.normal(0, 10) < 60
        lines.append(f"{income if rng.random() > 0.1 else ''},{place},{sex},{'yes' if late else 'no'}")
    (tmp_path / "credit.csv").write_text("\n".join(lines) + "\n")
    get_config = runpy.run_path(str(ROOT / "configs/table.py"))["get_config"]
    root = f"root={tmp_path / 'credit.csv'},target=default"
    config = get_config(f"{root},tiny,members=2,audit=sex,cost=5+1,calibration=isotonic,explain=true")
    config.data.cache_dir = str(tmp_path / "cache")
    config.train.update({"eval_every": 1000, "writers": (), "steps": 60})
    config.optim.learning_rate = 0.03
    result = verbs.train(config, str(tmp_path / "run"))
    assert {"boosting", "importance", "reasons", "risk"} <= result.keys() and set(result["risk"]["groups"]) == {
        "f",
        "m",
    }
    assert (
        set(result["importance"]["importance"]) == {"income", "place", "sex"} == set(result["reasons"]["attribution"])
    )
    said = io.StringIO()
    status = verbs.predict(
        str(tmp_path / "run"), str(tmp_path / "credit.csv"), out=said, answers_of=("reasons", "risk")
    )
    answers = [json.loads(line) for line in said.getvalue().splitlines()]
    assert status == 0 and len(answers) == 200 and {"yes", "no"} == {answer["decision"] for answer in answers}
    levels = {round(y, 6) for y in result["risk"]["calibration"]["y"]}
    assert any(round(answer["probabilities"]["yes"], 6) in levels for answer in answers)

    predictor = Predictor.open(tmp_path / "run", answers_of=("reasons",))
    row = predictor.examples({"income": 20, "place": "south", "sex": "f"})[0]
    inputs = {name: row[name][None] for name in predictor.task.inputs}
    here = {name: np.asarray(x)[None].astype(inputs[name].dtype) for name, x in predictor.task.typical.items()}
    there, at = (predictor.task.predict(predictor.variables, x) for x in (inputs, here))
    difference = float(there["score"][0] - at["score"][0])
    assert float(there["attributions"].sum()) == pytest.approx(difference, abs=0.05) and abs(difference) > 0.5

    for words, fault in (("cost=5", "reads MISSED"), ("task=regression,cost=5+1", "of two classes")):
        with pytest.raises(UserError, match=fault):
            get_config(f"{root},{words}")
