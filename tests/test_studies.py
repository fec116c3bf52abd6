"""The instruments under experiments/ that measure both sides of a comparison."""

import json
import math
import pathlib
import runpy
import subprocess
import sys

import jax
import pytest

STUDY = pathlib.Path(__file__).parents[1] / "experiments" / "cpu_speed"


@pytest.fixture
def worker(monkeypatch):
    for folder in (STUDY, STUDY.parents[1] / "configs"):
        monkeypatch.syspath_prepend(str(folder))
    import worker

    return worker


def test_both_sides_of_each_row_are_as_large(worker):
    torch = pytest.importorskip("torch")
    for name in worker.ROWS:
        task, _, batch, _ = worker.task_of(name)
        params = jax.eval_shape(task.init, jax.random.key(0), batch)["params"]
        with torch.device("meta"):
            theirs = sum(p.numel() for p in worker.model_of(name).parameters())
        assert theirs == sum(math.prod(p.shape) for p in jax.tree.leaves(params)) > 400_000, name


def test_the_study_measures_both_sides_of_a_row(tmp_path):
    pytest.importorskip("torch")
    output = tmp_path / "results.json"
    command = [sys.executable, str(STUDY / "run.py"), "--tiny", "--models=classic_cnn", f"--output={output}"]
    done = subprocess.run([*command, "--sides=ours,eager"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(output.read_text())["rows"]["classic_cnn"]
    assert all(row[side]["step_seconds"] > 0 and math.isfinite(row[side]["loss"]) for side in ("ours", "eager")), row
    assert "| classic_cnn |" in done.stdout


def test_the_words_of_the_compression_study_are_keys_of_its_recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY.parent / "compress"))
    import study

    for name, about in study.STUDIES.items():
        steps = study.steps(name, about, 0, pathlib.Path("runs"), "data")
        assert len({step.folder for step in steps}) == len(steps) > 15
        for step in steps:
            config = None
            for word in step.words:
                key, _, value = word.removeprefix("--").partition("=")
                if key == "config":
                    path, _, arg = value.partition(":")
                    config = runpy.run_path(str(study.ROOT / path))["get_config"](arg)
                elif key.startswith("config."):
                    node = config
                    for part in key.split(".")[1:]:
                        assert part in node, word
                        node = node[part]
                else:
                    assert key in ("mode", "workdir", "output", "prune", "quantize", "to", "allow_drop"), word
