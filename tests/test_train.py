"""The loop in this process: golden steps, early stopping, the best checkpoint, what it refuses."""

import json
import runpy
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from bigbase_jax import cli, parallel, verbs
from bigbase_jax import train as training
from bigbase_jax.build import build
from bigbase_jax.core import UserError, flatten
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.runtime.checkpoint import Checkpoints
from bigbase_jax.runtime.log import Diverged, _Rows
from bigbase_jax.runtime.restored import restore
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.train import TrainConfig


def recipe(name="catdog_mlp", arg="tiny", **loop):
    config = runpy.run_path(f"configs/{name}.py")["get_config"](arg)
    config.train.devices = 1
    config.train.update(loop)
    return config


def rows_of(workdir, kind=None):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if kind in (None, row["kind"])]


def test_golden_steps_of_the_default_recipe(tmp_path):
    """Change these only together with the drawings, the recipe's ``:tiny`` or the random streams, on purpose."""
    training.train(recipe("catdog", steps=6, log_every=1), str(tmp_path))
    losses = [row["loss"] for row in rows_of(tmp_path, "train")]
    np.testing.assert_allclose(losses, GOLDEN, rtol=2e-3)


GOLDEN = [1.896287, 1.440334, 1.895991, 2.238721, 1.187373, 2.119854]


def test_early_stopping_keeps_and_reports_the_best_checkpoint_whatever_is_damaged(tmp_path, capsys):
    config = recipe(steps=40, eval_every=2, best_metric="accuracy", patience=3)
    config.optim.learning_rate = 0.0  # nothing improves after the first evaluation
    result = training.train(config, str(tmp_path))
    evaluations = rows_of(tmp_path, "eval")
    assert [row["step"] for row in evaluations] == [2, 4, 6, 8]
    assert result["step"] == 2
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [2, 6, 8]

    def files():
        found = {p: p for p in sorted(tmp_path.rglob("*")) if p.is_file()}
        kept = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in found if not p.name.startswith(("eval-", "pred"))}
        return kept, {p: p.read_bytes() for p in found.keys() - kept.keys()}

    before = files()
    assert training.train(config, str(tmp_path)) == result  # again: evaluates the best one and ends
    assert files() == before
    (tmp_path / "checkpoints" / "8" / "_CHECKPOINT_METADATA").write_text("")
    (tmp_path / "checkpoints" / "8.damaged").mkdir()
    assert verbs.evaluate(str(tmp_path)) == result
    assert "8 cannot be read (_CHECKPOINT_METADATA is not what was saved)" in capsys.readouterr().err
    with pytest.raises(UserError, match="8 cannot be read"):
        verbs.evaluate(str(tmp_path), 8)
    (tmp_path / "checkpoints" / "6" / "metrics" / "metrics").write_text("")
    assert training.train(config, str(tmp_path)) == result  # from the best, to the same end
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [2, 6, 8]
    assert {p.name for p in tmp_path.glob("checkpoints/*.dam*")} == {"8.damaged", "8.damaged-2", "6.damaged"}
    for path in (tmp_path / "checkpoints" / "2" / "state" / "d").iterdir():
        path.write_bytes(b"")
    assert verbs.evaluate(str(tmp_path))["step"] == 8
    assert "the best checkpoint, of step 2, is damaged; the newest is used, of step 8." in capsys.readouterr().err
    assert training.train(config, str(tmp_path))["step"] == 8


@pytest.mark.parametrize(
    ("mode", "values", "best"), [("max", [0.5, 0.7, 0.7, 0.6], 2), ("min", [0.5, 0.7, 0.4, 0.4], 3)]
)
def test_the_first_of_equally_good_evaluations_is_the_best(mode, values, best):
    loop = TrainConfig(steps=9, best_metric="m", best_mode=mode, patience=2)
    progress = {}
    for step, value in enumerate(values, 1):
        progress = training._judge(progress, step, {"m": value}, loop)
    assert progress["best_step"] == best
    assert progress.get("stopped", False) == (mode == "max")


def test_a_run_that_was_killed_anywhere_has_the_rows_of_one_that_was_not(tmp_path, monkeypatch):
    """The folder is copied while each row is written, as a kill would leave it there, and trained on."""
    config = recipe(steps=15, log_every=4, checkpoint_every=3, eval_every=7, keep=9, writers=())
    write, images = _Rows.write, []

    def writing(self, row):
        images.append(tmp_path / f"image-{len(images)}")
        shutil.copytree(tmp_path / "calm", images[-1], ignore=lambda _, names: [n for n in names if "tmp" in n])
        with open(images[-1] / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": %d, "kind": "tr' % row["step"])
        write(self, row)

    def told(workdir):
        timed = ("seconds", "step_seconds", "examples_per_second", "data_wait", "memory_gb", "compile_seconds")
        return [{k: v for k, v in row.items() if k not in timed} for row in rows_of(workdir)]

    monkeypatch.setattr(_Rows, "write", writing)
    training.train(config, str(tmp_path / "calm"))
    monkeypatch.setattr(_Rows, "write", write)
    calm = told(tmp_path / "calm")
    assert [row["step"] for row in calm if row["kind"] == "train"] == [4, 8, 12, 15]
    begun = {}
    for path in images:
        steps = [int(p.name) for p in (path / "checkpoints").glob("*") if p.name.isdigit()]
        begun[max(steps, default=0)] = path  # of several that go on from one checkpoint, that with the most rows
    assert len(begun) > 2 and len(calm) == len(images) == 8
    for path in list(begun.values())[::2]:
        training.train(config, str(path))
        assert told(path) == calm, path.name


def test_a_run_that_was_stopped_in_an_interval_has_the_rows_of_one_that_was_not(tmp_path):
    config = recipe(steps=10, log_every=4, eval_every=2, writers=())
    training.train(config, str(tmp_path / "calm"))
    for stop in (2, 6):
        found = training.train(
            config, str(tmp_path / "run"), observe=lambda step, _, at=stop: "!" if step == at else None
        )
        assert (
            found["stopped"] == "!"
            and [row["step"] for row in rows_of(tmp_path / "run", "train")] == [4, 8][: stop // 4]
        )
    training.train(config, str(tmp_path / "run"))
    calm, run = ([(r["kind"], r["step"], r.get("loss")) for r in rows_of(tmp_path / n)] for n in ("calm", "run"))
    assert calm == run and len(calm) == 9


def test_an_unknown_metric_lists_those_there_are(tmp_path):
    with pytest.raises(UserError, match=r"best_metric 'acuracy' is not measured; there are .*accuracy"):
        training._judge({}, 1, {"accuracy": 0.5, "per_class": {}}, TrainConfig(steps=1, best_metric="acuracy"))


def test_divergence_names_the_step_and_saves_nothing_infinite(tmp_path):
    config = recipe(steps=30, log_every=4, checkpoint_every=2)
    config.task.loss_kind = "softmax"
    config.task.model.activation = "relu"
    config.optim.learning_rate = 1e25
    with pytest.raises((Diverged, UserError), match=r"at step \d+"):
        verbs.train(config, str(tmp_path))
    for step in Checkpoints(tmp_path / "checkpoints", read_only=True).steps():
        variables = Predictor.open(tmp_path, step).variables
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(variables)), step
    assert (tmp_path / "report.html").exists()


def test_nan_before_the_first_checkpoint_is_a_sentence_and_the_next_start_begins_anew(tmp_path):
    config = recipe(steps=6, log_every=1, checkpoint_every=5)
    config.task.loss_kind = "softmax"
    config.task.model.activation = "relu"
    config.optim.learning_rate = 1e38
    for _ in range(2):
        with pytest.raises(UserError, match=r"at step 2; lower the .*; nothing was saved before it, .* begins anew\.$"):
            verbs.train(config, str(tmp_path))
        assert "diverged at step 2" in (tmp_path / "report.html").read_text()
        assert not list((tmp_path / "checkpoints").iterdir())
    config.optim.learning_rate = 1e-3  # in the same folder
    assert verbs.train(config, str(tmp_path))["step"] == 6
    assert [row["step"] for row in rows_of(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]
    assert not rows_of(tmp_path, "diverged")
    lineage = json.loads((tmp_path / "lineage.json").read_text())
    assert [start["from_step"] for start in lineage["starts"]] == [0, 0, 0]
    assert ["nan" in lineage["starts"][0]["how"], lineage["starts"][2]["how"]] == [True, "finished"]
    page = (tmp_path / "report.html").read_text()
    assert ">finished</span>" in page and "steps 0 to 6, finished" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of"),
        ({"steps": 3, "epochs": 1.0}, "exactly one of"),
        ({"steps": 0}, "config.train.steps is 0"),
        ({"steps": 3, "best_mode": "most"}, "'max' or 'min'"),
        ({"steps": 3, "patience": 2}, "needs config.train.best_metric"),
    ],
)
def test_impossible_loops_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**arguments)


@pytest.mark.parametrize(
    ("given", "steps", "epochs"),
    [(["steps=50"], 50, None), (["epochs=2"], None, 2.0), ([], None, 8.0), (["steps=50", "epochs=2"], 50, 2.0)],
)
def test_steps_on_the_command_line_take_the_place_of_epochs(monkeypatch, given, steps, epochs):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    assert cli.parse(["launch.py"]) == ["launch.py"]
    values.unparse_flags()
    argv = ["launch.py", "--config=configs/catdog.py", *(f"--config.train.{flag}" for flag in given)]
    monkeypatch.setattr(sys, "argv", argv)  # where overrides are looked for
    cli.parse(argv)
    config = values.config
    assert (config.train.steps, config.train.epochs) == (steps, epochs)
    if steps and epochs:
        with pytest.raises(UserError, match="exactly one of"):
            build(config.train)
        return
    total = build(config.train).total_steps(10.0)
    assert total == (steps or 10 * epochs)
    rate = build(config.optim).rate(total)
    assert float(rate(total)) < 0.1 * float(rate(total // 2))  # the schedule ends with the run


def test_epochs_and_evaluations_need_not_be_whole():
    assert TrainConfig(epochs=1.5).total_steps(10.2) == 16
    due = [step for step in range(1, 40) if training._due(step, 12.5)]
    assert due == [13, 25, 38]
    assert [step for step in range(1, 10) if training._due(step, 4)] == [4, 8]


def test_data_that_changed_under_a_run_is_refused(tmp_path):
    config = recipe(steps=4)
    training.train(config, str(tmp_path))
    lineage = json.loads((tmp_path / "lineage.json").read_text())
    lineage["data"]["fingerprint"] = "other"
    (tmp_path / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(UserError, match="data changed since"):
        training.train(config, str(tmp_path))


def test_a_run_is_restored_where_its_rules_say_and_whole_where_they_do_not_fit(tmp_path):
    rules = (("head.kernel$", (None, "tensor")), "fsdp:1")
    config = recipe(devices=8, sharding=rules)
    config.train.mesh.update(tensor=2, fsdp=2)
    result = training.train(config, str(tmp_path))
    evaluated = verbs.evaluate(str(tmp_path))
    assert evaluated["accuracy"] == result["accuracy"]

    def head(mesh):
        _, variables, _ = restore(RunDir(tmp_path), RunDir(tmp_path).config(), mesh)
        found = flatten(variables)["params.head.kernel"]
        return found.sharding.spec, np.asarray(found)

    P = jax.sharding.PartitionSpec
    spec, trained = head(parallel.make_mesh(8, parallel.MeshShape(tensor=2, fsdp=2)))
    assert spec == P(None, "tensor")
    for devices, shape, expected in ((1, {}, P(None, "tensor")), (8, {"tensor": 8, "data": 1}, P())):
        spec, same = head(parallel.make_mesh(devices, parallel.MeshShape(**shape)))  # 8 do not divide two classes
        assert spec == expected
        np.testing.assert_array_equal(same, trained)


def test_a_run_with_buckets_goes_on_where_it_stopped_on_several_devices(tmp_path):
    texts = [f"{'ab' * (i % 7)},{i % 2}" for i in range(1, 200) if i % 7]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *texts]))
    arg = f"tiny,model=bow,tokenizer=chars,root={tmp_path / 'a.csv'}"
    config = recipe("text_classify", arg, devices=4, microbatches=2, steps=6, log_every=1, eval_every=3)
    config.data.buckets = (6, 10)
    expected = training.train(config, str(tmp_path / "whole"))
    stopped = training.train(config, str(tmp_path / "parts"), observe=lambda step, metrics: "enough")
    assert stopped == {"step": 3, "stopped": "enough"}
    assert training.train(config, str(tmp_path / "parts")) == expected
    losses = [[row["loss"] for row in rows_of(tmp_path / name, "train")] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(set(losses[0])) == 6
