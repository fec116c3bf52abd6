"""The loop in this process: golden steps, early stopping, the best checkpoint, what it refuses."""

import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbase_jax import parallel, verbs
from bigbase_jax import train as training
from bigbase_jax.checkpoint import Checkpoints
from bigbase_jax.core import UserError, flatten
from bigbase_jax.log import Diverged
from bigbase_jax.restored import restore
from bigbase_jax.rundir import RunDir
from bigbase_jax.train import Loop


def recipe(name="catdog_mlp", arg="tiny", **loop):
    config = runpy.run_path(f"configs/{name}.py")["get_config"](arg)
    config.train.devices = 1
    config.train.update(loop)
    return config


def rows_of(workdir, kind):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


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
    assert training.train(config, str(tmp_path)) == result  # again: evaluates the best one and ends
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
    loop = Loop(steps=9, best_metric="m", best_mode=mode, patience=2)
    progress = {}
    for step, value in enumerate(values, 1):
        progress = training._judge(progress, step, {"m": value}, loop)
    assert progress["best_step"] == best
    assert progress.get("stopped", False) == (mode == "max")


def test_an_unknown_metric_lists_those_there_are(tmp_path):
    with pytest.raises(UserError, match=r"best_metric 'acuracy' is not measured; there are .*accuracy"):
        training._judge({}, 1, {"accuracy": 0.5, "per_class": {}}, Loop(steps=1, best_metric="acuracy"))


def test_divergence_names_the_step_and_saves_nothing_infinite(tmp_path):
    config = recipe(steps=30, log_every=4, checkpoint_every=2)
    config.task.loss_kind = "softmax"
    config.task.model.activation = "relu"
    config.optim.learning_rate = 1e25
    with pytest.raises((Diverged, UserError), match=r"at step \d+"):
        verbs.train(config, str(tmp_path))
    for step in Checkpoints(tmp_path / "checkpoints", read_only=True).steps():
        saved = Checkpoints(tmp_path / "checkpoints", read_only=True)
        task, variables, _ = verbs.restore(verbs.RunDir(tmp_path), config, training.parallel.make_mesh(1), step)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(variables)), (task, saved)
    assert (tmp_path / "report.html").exists()


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
        Loop(**arguments)


def test_epochs_and_evaluations_need_not_be_whole():
    assert Loop(epochs=1.5).total_steps(10.2) == 16
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
