"""``--mode=compress`` through the real command: what it makes is a run as any other."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def launch(*args, status=0):
    done = subprocess.run([sys.executable, "launch.py", *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if status == 0 else done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run of the recipe catdog."""
    workdir = tmp_path_factory.mktemp("compress") / "run"
    launch("--config=configs/catdog.py:tiny", f"--workdir={workdir}", "--config.train.steps=4")
    return workdir


def test_zeros_are_a_run_that_evaluates_and_knows_its_parent(run, tmp_path):
    made = launch("--mode=compress", f"--workdir={run}", "--prune=0.8", f"--output={tmp_path / 'new'}")
    assert 0.7 < made["zeros"] / made["of"] < 0.8  # norms and biases stay
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "checkpoints",
        "compression.json",
        "config.json",
        "data.json",
        "lineage.json",
        "proof.json",
    ]
    lineage = json.loads((tmp_path / "new" / "lineage.json").read_text())
    assert lineage["parent"]["folder"] == str(run) and lineage["parent"]["step"] == 4
    evaluated = launch("--mode=eval", f"--workdir={tmp_path / 'new'}")
    proof = json.loads((tmp_path / "new" / "proof.json").read_text())
    assert proof["largest_difference"] > 0  # it did prune
    assert evaluated["loss"] == pytest.approx(proof["metrics"]["loss"]["after"], rel=1e-6)
    again = launch("--mode=compress", f"--workdir={run}", "--prune=0.8", f"--output={tmp_path / 'new'}", status=2)
    assert "is there already" in again


def test_a_quantised_run_is_a_run(run, tmp_path):
    made = launch(
        "--mode=compress", f"--workdir={run}", "--quantize=int8", "--calibrate=16", f"--output={tmp_path / 'q'}"
    )
    assert made["bytes_after"] < 0.45 * made["bytes_before"]  # norms and biases are a large part of a tiny one
    evaluated = launch("--mode=eval", f"--workdir={tmp_path / 'q'}")
    proof = json.loads((tmp_path / "q" / "proof.json").read_text())
    assert proof["largest_difference"] > 0
    assert evaluated["loss"] == pytest.approx(proof["metrics"]["loss"]["after"], rel=1e-6)
    lines = launch("--mode=compress", f"--workdir={run}", "--quantize=int9", f"--output={tmp_path / 'no'}", status=2)
    assert "Did you mean 'int8'" in lines and not (tmp_path / "no").exists()
