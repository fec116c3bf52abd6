"""A run of pictures and texts answers by captions, and by labels that it was never trained on."""

import io
import json
import pathlib

import jax
import numpy as np
import pytest
from forks import shared
from PIL import Image

from bigbase_jax import verbs
from bigbase_jax.core import UserError
from bigbase_jax.inference.predictor import Predictor

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the folder of a tiny run that was measured on classes too, its results)."""
    workdir = tmp_path_factory.mktemp("runs") / "clip"
    done = shared().run(f"--config=configs/clip.py:tiny,classes={ROOT}/docs/examples/pets", f"--workdir={workdir}")
    assert done.status == 0, done.err[-3000:]
    return workdir, json.loads(done.out.splitlines()[-1])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30), np.uint8)).save(folder / "grey.png")
    rows = [
        {"image": "grey.png"},
        {"image": "grey.png", "labels": "red circle|blue square|green", "templates": "a {}|{}", "top": 2},
        {"image": "grey.png", "labels": ["green", "red circle", "blue square"], "templates": ["a {}", "{}"]},
        {"image": "grey.png", "labels": "cat"},
        {"image": "grey.png", "labels": "a|b", "templates": "no place"},
        {"image": "grey.png", "labels": "a|b", "top": "many"},
        {"image": "none.png", "labels": "a|b"},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def predicted(workdir, given, **how):
    out = io.StringIO()
    status = verbs.predict(str(workdir), str(given), out=out, **how)
    return status, [json.loads(line) for line in out.getvalue().splitlines()]


def test_classes_are_told_by_their_names_alone(run):
    workdir, result = run
    found = result["zero_shot"]
    assert found["labels"] == ["cat", "dog"] and found["accuracy_chance"] == 0.5
    assert 0 <= found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"] <= 1
    kept = np.load(workdir / "predictions-zero_shot.npz")
    assert found["accuracy"] == (kept["probabilities"].argmax(1) == kept["label"]).mean()
    assert result["retrieval"]["pictures"] == 6 and 0 < result["retrieval"]["text_to_image_r@5_chance"] < 1
    report = (workdir / "report.html").read_text()
    assert "Captions found for pictures" in report and "Recall" in report


def test_a_picture_is_answered_by_captions_or_by_the_labels_of_its_row(run, table):
    status, (plain, two, all_, *bad) = predicted(run[0], table)
    assert status == 1
    scores = [one["score"] for one in plain["captions"]]
    assert len(scores) == 5 and scores == sorted(scores, reverse=True)
    assert all(
        "circle" in c["caption"] or "square" in c["caption"] or "triangle" in c["caption"] for c in plain["captions"]
    )
    assert len(two["probabilities"]) == 2 and len(all_["probabilities"]) == 3
    assert sum(all_["probabilities"].values()) == pytest.approx(1)
    assert len(set(all_["probabilities"].values())) == 3  # the words are known
    for name, p in two["probabilities"].items():  # whatever the order of labels and templates
        assert p == pytest.approx(all_["probabilities"][name], rel=1e-4)
    wanted = ("labels is one", "each has {} once", "top is 'many'", "there is no file")
    for answer, words in zip(bad, wanted, strict=True):
        assert words in answer["error"]


def test_labels_of_an_evaluator_answer_where_they_are_asked_for(run, table):
    _, (plain, two, *_) = predicted(run[0], table, answers_of=["zero_shot"], top=1)
    assert plain["label"] in ("cat", "dog") and len(plain["probabilities"]) == 1
    assert set(two["probabilities"]) < {"red circle", "blue square", "green"}


def test_both_towers_give_vectors(run, table):
    workdir, predictor = str(run[0]), Predictor.open(run[0])
    out, given = str(table.parent / "v.npy"), table.parent / "said.csv"
    assert verbs.embed(workdir, str(table.parent / "grey.png"), output=out) == 0
    (picture,) = predictor.computed(predictor.examples(str(table.parent / "grey.png")), 1, predictor.program)
    np.testing.assert_allclose(np.load(out), picture["vector"][None], atol=1e-6)
    texts = ["a red circle", "a blue square above a green circle"]
    given.write_text("\n".join(["caption", *texts]))
    assert verbs.embed(workdir, str(given), output=out) == 0
    wanted = jax.jit(predictor.task.items)(predictor.variables, predictor.task.texts(texts))
    np.testing.assert_allclose(np.load(out), wanted, atol=1e-5)
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-3


def test_too_many_labels_are_refused(run):
    predictor = Predictor.open(run[0])
    given = {"image": (ROOT / "docs/examples/pets/test/dog/1.jpg").read_bytes()}
    for labels, words in ((["a"] * 1001, "1,001, and at most 1,000"), ([1, 2], "give texts"), ("[", "no list")):
        with pytest.raises(UserError, match=words):
            predictor.answer({**given, "labels": labels})
