"""A population: each member is what its own run is."""

import dataclasses
import importlib.util
import pathlib

import jax
import numpy as np
import optax
import pytest
import toys

from bigbase_jax import parallel
from bigbase_jax import train as training
from bigbase_jax.build import deferred
from bigbase_jax.core import UserError, flatten
from bigbase_jax.optim import Optimizer
from bigbase_jax.runtime.checkpoint import Checkpoints
from bigbase_jax.sweep import population

ROOT = pathlib.Path(__file__).parents[1]
TASK = toys.Regression(toys.Net(norm=True))
BATCHES = [toys.regression_batch(16, seed, masked=seed) for seed in range(5)]
SHAPES = jax.eval_shape(TASK.init, jax.random.key(0), BATCHES[0])["params"]


def recipe():
    spec = importlib.util.spec_from_file_location("catdog_mlp", ROOT / "configs" / "catdog_mlp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("tiny")
    config.train.update(devices=1, writers=(), best_metric=None)
    config.task.model.hidden = (16, 8)
    return config


def close(mine, theirs):
    mine, theirs = flatten(mine), flatten(theirs)
    assert set(mine) == set(theirs) and len(theirs) > 1
    for name, x in mine.items():
        np.testing.assert_allclose(np.asarray(x), np.asarray(theirs[name]), rtol=1e-5, atol=1e-5, err_msg=name)


def test_members_equal_their_own_runs_and_differ_from_each_other(tmp_path):
    """The recipe of the perceptron, against ``train.train`` and its checkpoint."""
    config = recipe()
    trained = population.train(config, seeds=(0, 5), at_once=2)
    home = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=home), {"params": trained.state.params}
    )
    for index, seed in enumerate((0, 5)):
        own = config.copy_and_resolve_references()
        own.seed = seed
        result = training.train(own, str(tmp_path / str(seed)))
        checkpoints = Checkpoints(tmp_path / str(seed) / "checkpoints", read_only=True)
        close({"params": population.member(trained.state, index).params}, checkpoints.restore(abstract, result["step"]))
        assert set(trained.metrics[index]) >= {"accuracy", "loss"}
    kernel = np.asarray(trained.state.params["head"]["kernel"])
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-2


NUMBERS = {"learning_rate": (0.01, 0.1, 0.2), "weight_decay": (0.0, 0.3, 0.1)}


@pytest.mark.parametrize(
    ("algorithm", "numbers", "at_once"),
    [(optax.adamw, {}, None), (optax.adamw, NUMBERS, 1), (optax.sgd, NUMBERS, None), (optax.sgd, NUMBERS, 2)],
    ids=["adamw-seeds", "adamw-one", "sgd-all", "sgd-two"],
)
def test_states_averages_and_numbers_are_each_members_own(algorithm, numbers, at_once):
    """Against ``parallel.program``, for a task with BatchNorm, a schedule, clipping and microbatches."""
    seeds = (4, 4, 7)
    optimizer = Optimizer(0.05, algorithm, optax.cosine_decay_schedule, warmup=2, weight_decay=0.2, clip_norm=0.5)
    total = len(BATCHES)
    how = {"microbatches": 2, "ema_decay": 0.9}
    init, step = population.program(TASK, optimizer.transform(SHAPES, total), seeds, numbers, **how, at_once=at_once)
    state = init(BATCHES[0])
    for batch in BATCHES:
        state, sums = step(state, batch)
    assert state.step.tolist() == [5, 5, 5] and sums["loss"].total.shape == (3,)
    for index in (0, 2):
        own = dataclasses.replace(optimizer, **{name: values[index] for name, values in numbers.items()})
        tx = own.transform(SHAPES, total)
        spec = jax.eval_shape(lambda x: x, BATCHES[0])
        program = parallel.program(TASK, tx, spec, parallel.make_mesh(1), seed=seeds[index], **how)
        alone = program.init(BATCHES[0])
        for batch in BATCHES:
            alone, _ = program.step(alone, batch)
        mine = population.member(state, index)
        for part in ("params", "model_state", "ema"):
            close(getattr(mine, part), getattr(alone, part))
        assert (jax.random.key_data(mine.key) == jax.random.key_data(alone.key)).all()
    same = np.allclose(*(np.asarray(x) for x in state.params["hidden"]["kernel"][:2]))
    assert same == (not numbers), "members of one seed differ exactly where their numbers do"


def test_what_cannot_differ_is_refused():
    with pytest.raises(UserError, match="may differ in learning_rate"):
        population.train(recipe(), (0, 1), {"momentum": (0.1, 0.2)})
    with pytest.raises(UserError, match="needs as many values of learning_rate, not 3"):
        population.train(recipe(), (0, 1), {"learning_rate": (0.1, 0.2, 0.3)})
    fixed = recipe()
    fixed.optim.schedule = deferred(optax.warmup_cosine_decay_schedule, warmup_steps=1)
    with pytest.raises(UserError, match="schedule does not allow members to differ in learning_rate"):
        population.train(fixed, (0, 1), {"learning_rate": (0.1, 0.2)})
    started = recipe()
    started.init_from = "somewhere"
    with pytest.raises(UserError, match="random weights"):
        population.train(started, (0, 1))
