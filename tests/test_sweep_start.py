"""A sweep whose recipe begins from trained weights that are gone: what has begun goes on, the rest waits for them."""

import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_launch import arrays
from test_sweep import Fake

from bigbase_jax import pretrained, verbs
from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.models.resnet import CifarResNet
from bigbase_jax.sweep import Sweep, command, worker
from bigbase_jax.sweep.study import Stop, Study

FILE = """
from bigbase_jax.sweep import Sweep
def sweep():
    return Sweep("accuracy", fixed=[{"optim.learning_rate": rate} for rate in (0.01, 0.1)])
"""


@pytest.fixture
def weights(tmp_path):
    """The state dict of a small random ResNet for CIFAR, as .npz."""
    from safetensors.numpy import load_file

    variables = jax.jit(CifarResNet(3, 8, 4).init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    pretrained.save(tmp_path / "saved", CifarResNet(3, 8, 4), variables)
    np.savez(tmp_path / "weights.npz", **load_file(tmp_path / "saved" / "model.safetensors"))
    return tmp_path / "weights.npz"


def recipe(weights):
    config = runpy.run_path("configs/catdog.py")["get_config"]("tiny")
    config.init_from = str(weights)
    config.train.devices, config.train.writers = 1, ()
    return config


@pytest.mark.slow
def test_a_sweep_goes_on_without_what_its_recipe_began_from(weights, tmp_path, monkeypatch):
    (tmp_path / "sweep.py").write_text(FILE)
    declared, train = str(tmp_path / "sweep.py"), verbs.train

    def one(folder, index):
        return command.run(recipe(weights), declared, str(tmp_path / folder), index=index)

    def until_a_signal(config, workdir, name, observe):
        train(config, workdir, name, lambda step, _: "enough" if step == 4 else None)
        return {"step": 4, "signal": 15}

    assert one("calm", 0) == 0
    monkeypatch.setattr(verbs, "train", until_a_signal)
    assert one("sweep", 0) == 128 + 15
    monkeypatch.setattr(verbs, "train", train)
    assert [path.name for path in (tmp_path / "sweep" / "start").iterdir()] == ["config.json"]

    weights.rename(tmp_path / "away.npz")
    with pytest.raises(UserError, match=f"config.init_from='{weights}' is gone, and what has not begun needs its"):
        one("sweep", 1)
    with pytest.raises(UserError, match="is no folder"):
        one("new", 0)
    sweep = runpy.run_path(declared)["sweep"]()
    config = pretrained.resolve(recipe(weights), pretrained.recorded_by_sweep(tmp_path / "sweep", recipe(weights)))
    study = Study(sweep, config, tmp_path / "sweep")
    with pytest.raises(Stop, match="is gone"):  # a worker does first what it can
        worker.work(study, config, verbs.train)
    assert [trial.state.name for trial in study.trials()] == ["COMPLETE", "WAITING"]
    assert arrays(tmp_path / "sweep" / "trial-0000") == arrays(tmp_path / "calm" / "trial-0000")

    (tmp_path / "away.npz").rename(weights)
    assert one("sweep", 1) == 0 and study.finished()


def test_of_several_seeds_those_that_have_not_begun_wait(weights, tmp_path):
    sweep = Sweep("accuracy", fixed=[{"optim.learning_rate": 0.1}], seeds=2)
    config = pretrained.resolve(recipe(weights))
    study = Study(sweep, config, tmp_path / "sweep")
    fake, away = Fake(), tmp_path / "away.npz"

    def first_alone(config, folder, name, observe):
        result = fake(config, folder, name, observe)
        weights.rename(away)
        return result

    with pytest.raises(Stop, match="is gone"):
        worker.work(study, config, first_alone)
    assert list(study.get(0).user_attrs["values"]) == ["0"] and study.get(0).state.name == "RUNNING"
    shutil.move(away, weights)
    assert worker.work(study, config, fake) == 0
    assert study.get(0).state.name == "COMPLETE" and list(study.get(0).user_attrs["values"]) == ["0", "1"]


def test_a_sweep_does_not_try_models_where_the_weights_say_what_the_model_is(weights, tmp_path):
    def swept(key, value):
        (tmp_path / "sweep.py").write_text(
            FILE.replace("optim.learning_rate", key).replace("(0.01, 0.1)", f"({value},)")
        )
        config = recipe(weights)
        config.task.model = target(CifarResNet)
        return command.run(config, str(tmp_path / "sweep.py"), str(tmp_path / "runs"), index=7)

    with pytest.raises(UserError, match=r"varies task\.model\.width, which config\.init_from decides"):
        swept("task.model.width", 16)
    with pytest.raises(UserError, match="sweep_index=7"):  # the next thing that is looked at
        swept("task.model.dtype", "'bfloat16'")
