"""A recommender answers rows alike from the command line, over HTTP and from what was exported."""

import io
import json
import pathlib
import runpy

import numpy as np
import pytest
import toy

from bigbase_jax import verbs
from bigbase_jax.core import UserError
from bigbase_jax.inference.predictor import Predictor

ROOT = pathlib.Path(__file__).parents[2]
ROWS = (
    {"history": "thing 1 of group 1; thing 3 of group 3; nothing"},
    {"item": "thing 5 of group 1"},
    {"user": "7", "history": None},
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = runpy.run_path(str(ROOT / "configs" / "recommend.py"))["get_config"]("tiny,loss=sampled_softmax")
    config.train.update({"writers": (), "steps": 4})
    config.evaluators = {}
    workdir = str(tmp_path_factory.mktemp("runs") / "recommend")
    verbs.train(config, workdir)
    return workdir


def answers(workdir, tmp_path, **words):
    file, out = tmp_path / "users.jsonl", io.StringIO()
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert verbs.predict(workdir, str(file), out=out, **words) == 0
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    return [{name: x for name, x in answer.items() if name not in ("input", "row")} for answer in found]


def named(answer):
    return [one["item"] for one in answer["items"]]


def test_every_way_gives_the_same_lists(run, tmp_path):
    plain = answers(run, tmp_path)
    assert [len(answer["items"]) for answer in plain] == [10] * 3 and len({tuple(named(a)) for a in plain}) == 3
    assert plain[0]["unknown"] == ["nothing"] and "unknown" not in plain[1]
    for answer in plain:
        assert not {one["item"] for one in answer["history"]} & set(named(answer))
        scores = [one["score"] for one in answer["items"]]
        assert scores == sorted(scores, reverse=True)
    assert [named(answer) for answer in answers(run, tmp_path, top=3)] == [named(answer)[:3] for answer in plain]
    more = answers(run, tmp_path, top=25)
    assert [len(answer["items"]) for answer in more] == [25] * 3
    assert [named(answer)[:10] for answer in more] == [named(answer) for answer in plain]

    exported = verbs.export(run, to="onnx")
    assert exported["proof"]["same_answers"] == 1
    assert [named(answer) for answer in answers(run, tmp_path, engine="onnxruntime")] == [named(a) for a in plain]
    measured, again = (verbs.evaluate(run, split="test", engine=engine) for engine in ("jax", "onnxruntime"))
    assert measured.pop("loss") > 0
    assert measured.pop("split") == again.pop("split") == "test" and measured.keys() == again.keys()
    np.testing.assert_allclose(list(measured.values()), list(again.values()), rtol=1e-6)


def test_the_server_answers_as_predict_does(run, tmp_path):
    with toy.client(shop=Predictor.open(run)) as client:
        found = client.post("/v1/predict/shop", json={"inputs": ROWS}).json()["answers"]
        assert [named(answer) for answer in found] == [named(answer) for answer in answers(run, tmp_path)]
        (few,) = client.post("/v1/predict/shop", json={**ROWS[1], "top": 2}).json()["answers"]
        assert named(few) == named(found[1])[:2]
        refused = client.post("/v1/predict/shop", json={"history": ["x"]})
        assert refused.status_code == 422 and "knows none of these items: 'x'" in refused.json()["error"]["message"]


def test_how_many_are_recommended_is_checked(run):
    with pytest.raises(UserError, match="top 0; both must be at least 1"):
        Predictor.open(run, top=0)
