"""``--mode=compress`` through the real command: what it makes is a run as any other."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
from forks import shared

from bigbase_jax import verbs
from bigbase_jax.compress import command
from bigbase_jax.core import UserError
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.pretrained.files import read_safetensors
from bigbase_jax.pretrained.start import merged
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.wrappers.sparse import Sparse

TINY = ("--config=configs/catdog.py:tiny", "--config.train.steps=2", "--config.train.eval_every=2")


def launch(*args, status=0):
    done = shared().run(*args)
    assert done.status == status, done.err
    return json.loads(done.out.splitlines()[-1]) if status == 0 else done.err.splitlines()[-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run of the recipe catdog, which keeps a moving average."""
    workdir = tmp_path_factory.mktemp("compress") / "run"
    launch(*TINY, f"--workdir={workdir}")
    return workdir


def kernels(workdir):
    predictor = Predictor.open(workdir)
    return predictor, {
        name: x["conv_0"]["kernel"]
        for name, x in merged(predictor.task, predictor.variables)["params"].items()
        if name != "head"
    }


def test_zeros_stay_in_the_run_that_begins_from_them(run, tmp_path):
    new, tuned = tmp_path / "new", tmp_path / "tuned"
    made = launch("--mode=compress", f"--workdir={run}", "--prune=0.8", f"--output={new}")
    assert 0.7 < made["zeros"] / made["of"] < 0.8  # norms and biases stay
    files = ["checkpoints", "compression.json", "config.json", "data.json", "lineage.json", "proof.json"]
    assert sorted(path.name for path in new.iterdir()) == files
    lineage = RunDir(new).read_json("lineage.json")
    assert lineage["parent"]["folder"] == str(run) and lineage["parent"]["step"] == 2
    evaluated = launch("--mode=eval", f"--workdir={new}")
    proof = RunDir(new).read_json("proof.json")
    assert proof["largest_difference"] > 0  # it did prune
    assert evaluated["loss"] == pytest.approx(proof["metrics"]["loss"]["after"], rel=1e-5)
    launch(*TINY, f"--config.init_from={new}", f"--workdir={tuned}")
    (_, before), (predictor, after) = kernels(new), kernels(tuned)
    assert isinstance(predictor.task, Sparse)
    for name, x in before.items():
        assert np.any(np.asarray(x) != np.asarray(after[name]))  # it did train
        np.testing.assert_array_equal(np.asarray(x) == 0, np.asarray(after[name]) == 0)
    again = launch("--mode=compress", f"--workdir={run}", "--prune=0.8", f"--output={new}", status=2)
    assert "is there already" in again
    here = launch(*TINY, f"--workdir={new}", status=2)
    assert "config.compression is missing here" in here


def test_a_narrower_model_trains_on_and_keeps_its_size(run, tmp_path):
    new, tuned = tmp_path / "new", tmp_path / "tuned"
    made = launch("--mode=compress", f"--workdir={run}", "--prune=channels=0.5,score=taylor", f"--output={new}")
    assert made["parameters"] < 0.4 * made["parameters_before"]
    assert RunDir(new).read_json("compression.json")["kept"] and "kept" not in made  # a line is read by people
    assert tuple(RunDir(new).config().task.model.stages) == (2, 4, 4, 4)
    launch(*TINY, f"--config.init_from={new}", f"--workdir={tuned}")
    config = RunDir(tuned).config()
    assert tuple(config.task.model.stages) == (2, 4, 4, 4) and "Sparse" not in config.task.target
    report = launch("--mode=report", f"--workdir={new}")
    assert os.path.getsize(report["report"])


def test_what_wraps_a_task_is_merged_before_it_is_pruned(tmp_path):
    text = ("--config=configs/text_classify.py:tiny,adapt=lora,sparsity=0.5", *TINY[1:], "--config.task.task.end=1")
    launch(*text, f"--workdir={tmp_path / 'run'}")
    launch("--mode=compress", f"--workdir={tmp_path / 'run'}", "--prune=heads=0.5", f"--output={tmp_path / 'new'}")
    before, after = RunDir(tmp_path / "run").config(), RunDir(tmp_path / "new").config()
    assert "LoRA" in before.task.target and "TextClassification" in after.task.target
    assert after.task.model.heads == before.task.task.task.model.heads // 2 and after.compression.masked
    kernel = Predictor.open(tmp_path / "new").variables["params"]["encoder"]["block_0"]["mlp"]["up"]["kernel"]
    assert 0.4 < np.mean(np.asarray(kernel) == 0) < 0.6


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        command.compress(str(run), str(tmp_path / "new"), prune="0.5")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_told_before_the_model_is_read(run, tmp_path):
    with pytest.raises(UserError, match="needs to know what to do"):
        command.compress(str(run))
    with pytest.raises(UserError, match="--calibrate=0 is a number of examples"):
        command.compress(str(run), prune="0.5", calibrate=0)
    with pytest.raises(UserError, match="--calibrate=9 is for what is measured on data, and this is not"):
        command.compress(str(run), str(tmp_path / "new"), prune="0.5", calibrate=9)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="--calibrate is how many examples --quantize looks at"):
        verbs.export(str(run), "onnx", calibrate=9)
    with pytest.raises(UserError, match="not a run folder"):
        command.compress(str(tmp_path), prune="0.5")
    assert "takes no --prune; compress does" in launch("--mode=eval", f"--workdir={run}", "--prune=0.5", status=2)


def test_scores_that_need_data_say_that_it_is_not_there(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    config = json.loads((moved / "config.json").read_text())
    dataset = {"target": "bigbase_jax.data.sources.image.folder:ImageFolder", "root": str(tmp_path / "gone")}
    config["data"]["dataset"] = dataset
    (moved / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="measures the model on its training data: .*gone"):
        command.compress(str(moved), prune="channels=0.5,score=taylor")


def test_a_quantised_run_is_a_run(run, tmp_path):
    made = launch(
        "--mode=compress", f"--workdir={run}", "--quantize=int8", "--calibrate=16", f"--output={tmp_path / 'q'}"
    )
    assert made["bytes_after"] < 0.45 * made["bytes_before"]  # norms and biases are a large part of a tiny one
    evaluated = launch("--mode=eval", f"--workdir={tmp_path / 'q'}")
    proof = json.loads((tmp_path / "q" / "proof.json").read_text())
    assert proof["largest_difference"] > 0
    assert evaluated["loss"] == pytest.approx(proof["metrics"]["loss"]["after"], rel=1e-6)
    exported = verbs.export(str(tmp_path / "q"), "safetensors", str(tmp_path / "small"), allow_drop=0.0)
    assert exported["proof"]["same_answers"] == 1 and exported["proof"]["largest_difference"] == 0
    kept = read_safetensors(tmp_path / "small" / "model.safetensors")
    assert {str(x.dtype) for x in kept.values()} >= {"int8", "float32"}
    assert sum(x.nbytes for x in kept.values()) == made["bytes_after"]
    assert json.loads((tmp_path / "small" / "manifest.json").read_text())["quantize"] == "int8"
    for words in ({"prune": "0.5"}, {"quantize": "int4"}):
        with pytest.raises(UserError, match="is quantised already; compress the run that it was made of"):
            command.compress(str(tmp_path / "q"), str(tmp_path / "no"), **words)
    lines = launch("--mode=compress", f"--workdir={run}", "--quantize=int9", f"--output={tmp_path / 'no'}", status=2)
    assert "Did you mean 'int8'" in lines and not (tmp_path / "no").exists()
