"""What a proof says of a model that is the same, of one that is not, and of data that is gone."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from bigbase_jax import verbs
from bigbase_jax.compare.numbers import Metrics, proof_rows
from bigbase_jax.core import UserError
from bigbase_jax.export import proof
from bigbase_jax.inference.predictor import Predictor


def answering(run, change):
    """The run in another engine, with changed outputs."""
    after = Predictor.open(run)
    program = jax.jit(after.task.predict)
    after.compute = lambda variables, batch: change(jax.device_get(program(variables, batch)))
    return after


def test_the_same_model_is_proven(pictures, tmp_path):
    found = proof.prove(Predictor.open(pictures), answering(pictures, dict), tmp_path, 0.0)
    assert json.loads((tmp_path / "proof.json").read_text()) == found
    assert (found["split"], found["examples"], found["same_answers"], found["largest_difference"]) == ("test", 32, 1, 0)
    metrics = found["metrics"]
    assert metrics["accuracy"]["p_mcnemar"] == 1 and metrics["loss"]["verdict"] == "no difference shown"
    assert all(m["before"] == pytest.approx(m["after"], abs=1e-6) for m in metrics.values())
    assert found["latency_ms"].keys() == {"1", "32"}


def test_a_model_that_answers_otherwise_is_refused_or_noted(pictures, tmp_path):
    def turned(outputs):  # every answer is the other class
        return {name: x[:, ::-1] for name, x in outputs.items()}

    with pytest.raises(UserError, match=r"the answers to 32 examples of test differ .* by 100 %, .*--allow_drop=100"):
        proof.prove(Predictor.open(pictures), answering(pictures, turned), tmp_path, 0.5)
    assert not list(tmp_path.iterdir())
    found = proof.prove(Predictor.open(pictures), answering(pictures, turned), tmp_path)
    accuracy = found["metrics"]["accuracy"]
    assert found["same_answers"] == 0 and accuracy["before"] == pytest.approx(1 - accuracy["after"])
    assert accuracy["only_baseline_right"] + accuracy["only_this_right"] == 32

    def lost(outputs):
        return {name: np.full_like(x, np.nan) for name, x in outputs.items()}

    with pytest.raises(UserError, match="logits, probabilities .* not finite"):
        proof.prove(Predictor.open(pictures), answering(pictures, lost), tmp_path, 100.0)


def test_what_is_written_is_part_of_it(decoder, tmp_path):
    before, again = Predictor.open(decoder), Predictor.open(decoder)
    examples = proof.some_examples(before, 8)
    assert proof._written(before, dataclasses.replace(before, compute=before.program), examples) is None
    same = proof._written(before, again, examples)
    assert same["prompts"] == 8 and same["tokens"] > 8 and same["same_tokens"] == 1
    again.variables = jax.tree.map(lambda x: -x, again.variables)
    assert proof._written(before, again, examples)["same_tokens"] < 1

    made = verbs.compress(decoder, str(tmp_path / "small"), quantize="int4,cache=int8")  # its blocks one by one
    found = json.loads((tmp_path / "small" / "proof.json").read_text())
    assert made["same_tokens"] == found["written"]["same_tokens"] > 0.1 and found["largest_difference"] > 0
    memory = found["memory_bytes"]["1"]
    assert memory["before"] > sum(x.nbytes for x in jax.tree.leaves(before.variables)) and memory["after"] > 0
    rows = {row[0]: row[2:] for row in proof_rows(found, Metrics(before.task.metrics))}
    assert rows["Same tokens"][1].endswith("that follow 8 beginnings") and "Memory, batch 1" in rows


def test_data_that_is_gone_is_said(pictures, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"]["dataset"] = {
        "target": "bigbase_jax.data.sources.image.folder:ImageFolder",
        "root": str(tmp_path / "gone"),
    }
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    run = str(tmp_path / "run")
    found = proof.prove(Predictor.open(run), answering(run, dict), tmp_path, 0.5)
    assert "gone" in found["missing"] and "metrics" not in found and found["latency_ms"].keys() == {"1", "32"}
    assert "nothing could be compared" in capsys.readouterr().err


def test_the_report_and_a_comparison_show_it(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "run")
    run = str(tmp_path / "run")
    (tmp_path / "run" / "export" / "copy").mkdir(parents=True)
    proof.prove(Predictor.open(run), answering(run, dict), tmp_path / "run" / "export" / "copy")
    report = pathlib.Path(verbs.report(run)["report"]).read_text()
    for said in ("Export to copy", "Latency, batch 32", "no difference shown", "of 32 examples of test"):
        assert said in report
    page = verbs.compare([run, pictures], str(tmp_path / "comparison"))["comparison"]
    assert "run: export to copy" in pathlib.Path(page).read_text()
    (tmp_path / "run" / "export" / "copy" / "proof.json").write_text(
        '{"metrics": {"accuracy": 1}, "bytes": [], "x": 1}'
    )
    assert "Export to copy" in pathlib.Path(verbs.report(run)["report"]).read_text()
