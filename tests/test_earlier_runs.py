"""Run folders that the version before the rooms (commit 2959711) wrote still open: see earlier/expected.json.

``earlier/pictures`` was stopped at step 3 of 6; ``expected["continued"]`` is what the run without a stop ended with.
"""

import io
import json
import pathlib
import shutil

import pytest

from bigbase_jax import verbs
from bigbase_jax.runtime.rundir import RunDir

EARLIER = pathlib.Path(__file__).parent / "earlier"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())


@pytest.fixture
def earlier(tmp_path):
    def copy(name):
        shutil.copytree(EARLIER / name, tmp_path / name)
        return str(tmp_path / name)

    return copy


def same(found, expected):
    assert expected.keys() <= found.keys()
    numbers = {name: value for name, value in expected.items() if isinstance(value, float)}
    assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)
    others = {name: value for name, value in expected.items() if isinstance(value, (int, str)) and name != "step"}
    assert {name: found[name] for name in others} == others


def test_it_evaluates(earlier):
    same(verbs.evaluate(earlier("pictures"), split="test"), EXPECTED["eval"])


def test_it_continues_where_it_was(earlier):
    workdir = earlier("pictures")
    found = verbs.train(RunDir(workdir).config(), workdir)
    assert found["step"] == 6
    assert EXPECTED["eval"]["loss"] != pytest.approx(EXPECTED["continued"]["loss"], rel=1e-5)  # it did train
    same(found, EXPECTED["continued"])


def test_it_predicts(earlier, tmp_path):
    texts, out = tmp_path / "texts.csv", io.StringIO()
    texts.write_text("text\nopens a file and reads its lines\nwaits for the thread to end\n")
    assert verbs.predict(earlier("adapted"), str(texts), out=out) == 0
    for line, expected in zip(out.getvalue().splitlines(), EXPECTED["answers"], strict=True):
        found = json.loads(line)
        assert found["label"] == expected["label"]
        assert found["probabilities"] == pytest.approx(expected["probabilities"], rel=1e-4)


@pytest.mark.parametrize("name", ["pictures", "adapted"])
def test_it_has_a_report(earlier, name):
    workdir = earlier(name)
    page = pathlib.Path(verbs.report(workdir)["report"]).read_text()
    assert "Run report" in page and "accuracy" in page.lower()
