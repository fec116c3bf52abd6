"""One step, many forms: jit, shard_map, one device, microbatches and padding agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import Net, Regression, regression_batch

from bigbase_jax import parallel
from bigbase_jax.core import UserError


def run_steps(task, devices, mode="jit", microbatches=1, batch_size=16, masked=0, steps=3, ema=None):
    mesh = parallel.make_mesh(devices)
    tx = optax.adam(0.05)
    spec = regression_batch(batch_size)
    init = functools.partial(parallel.init_state, task, tx, seed=1, ema=ema is not None)
    homes = parallel.shardings(jax.eval_shape(init, spec), mesh)
    state = jax.jit(init, out_shardings=homes)(spec)
    start = jax.device_get(state.params)
    step = parallel.train_step(task, tx, mesh, homes, mode, microbatches, ema)
    losses = []
    for i in range(steps):
        batch = parallel.put(jax.device_get(regression_batch(batch_size, seed=i, masked=masked)), mesh)
        state, sums = step(state, batch)
        losses.append(float(sums["loss"].mean()))
    return start, jax.device_get(state), losses


def assert_same(a, b, tolerance=1e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), a, b)


def moved(start, state):
    return any(
        np.abs(a - b).max() > 1e-3 for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(state.params), strict=True)
    )


@pytest.mark.parametrize(
    "form",
    [
        {"devices": 8},
        {"devices": 8, "mode": "shard_map"},
        {"devices": 2, "mode": "shard_map", "microbatches": 4},
        {"devices": 1, "microbatches": 4},
        {"devices": 4, "microbatches": 2},
    ],
)
@pytest.mark.parametrize("masked", [0, 5])
def test_every_form_of_the_step_agrees_with_the_plain_one(form, masked):
    start, plain, losses = run_steps(Regression(), 1, masked=masked)
    _, other, other_losses = run_steps(Regression(), **form, masked=masked)
    assert moved(start, plain)
    assert_same(losses, other_losses)
    assert_same(plain.params, other.params)


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_batchnorm_statistics_are_those_of_the_global_batch(mode):
    _, plain, losses = run_steps(Regression(Net(norm=True)), 1)
    axis = "data" if mode == "shard_map" else None
    _, other, other_losses = run_steps(Regression(Net(norm=True, axis_name=axis)), 8, mode)
    assert np.abs(plain.model_state["batch_stats"]["norm"]["mean"]).max() > 1e-3
    assert_same(losses, other_losses)
    assert_same((plain.params, plain.model_state), (other.params, other.model_state), 1e-4)


def test_unsynchronised_batchnorm_would_differ():
    _, plain, _ = run_steps(Regression(Net(norm=True)), 1)
    _, other, _ = run_steps(Regression(Net(norm=True)), 8, "shard_map")
    with pytest.raises(AssertionError):
        assert_same(plain.params, other.params, 1e-4)


def test_padding_changes_nothing():
    task = Regression()
    mesh = parallel.make_mesh(1)
    full = regression_batch(16, masked=4)
    loss, _ = task.loss(task.init(jax.random.key(0), full), full, None)
    cut = {k: v[:12] for k, v in full.items()}
    loss_cut, _ = task.loss(task.init(jax.random.key(0), cut), cut, None)
    np.testing.assert_allclose(loss.mean(), loss_cut.mean(), rtol=1e-6)
    assert parallel.put(jax.device_get(full), mesh)["x"].shape == (16, 3)


def test_moving_average_follows_its_formula():
    _, state, _ = run_steps(Regression(), 1, steps=1, ema=0.99)
    start, after, _ = run_steps(Regression(), 1, steps=1)
    decay = min(0.99, 1 / 10)
    want = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, start, after.params)
    assert_same(state.ema["params"], want, 1e-6)
    assert state.variables() is state.ema


def test_coupled_losses_are_refused_where_the_batch_would_be_split():
    with pytest.raises(UserError, match="would split them"):
        run_steps(Regression(batch_coupled=True), 2, "shard_map")
    with pytest.raises(UserError, match="microbatches=2"):
        run_steps(Regression(batch_coupled=True), 1, microbatches=2)


def test_the_data_parallel_step_has_one_gradient_reduction():
    """Golden collectives: if this changes, the step's communication changed; make sure that it is on purpose."""
    mesh = parallel.make_mesh(8)
    task, tx = Regression(), optax.sgd(0.1)
    init = functools.partial(parallel.init_state, task, tx, seed=1, ema=False)
    spec = regression_batch(16)
    homes = parallel.shardings(jax.eval_shape(init, spec), mesh)
    state = jax.jit(init, out_shardings=homes)(spec)
    for mode in ("jit", "shard_map"):
        step = parallel.train_step(task, tx, mesh, homes, mode)
        text = step.lower(state, parallel.put(jax.device_get(spec), mesh)).compile().as_text()
        assert text.count(" all-gather(") == 0
        assert 1 <= text.count(" all-reduce(") + text.count(" all-reduce-start(") <= 2


def test_errors_name_what_fits():
    mesh = parallel.make_mesh(8)
    with pytest.raises(UserError, match="batch_size 30 does not divide over 8 devices; use 24 or 32"):
        parallel.check_batch(30, mesh)
    parallel.check_batch(32, mesh, 4)
    with pytest.raises(UserError, match=r"8 devices x 4 microbatches; use 32 or 64"):
        parallel.check_batch(40, mesh, 4)
    with pytest.raises(UserError, match="has 8"):
        parallel.make_mesh(9)
    with pytest.raises(UserError, match="covers the parameter 'b.kernel'"):
        parallel.shardings({"a": {"kernel": 1}, "b": {"kernel": 1}}, mesh, (("^a", ()),))
    with pytest.raises(UserError, match="'jit' or 'shard_map'"):
        run_steps(Regression(), 1, "pmap")


def test_prefetch_keeps_the_order_and_closes_its_source():
    closed = []

    def numbers():
        try:
            for i in range(6):
                yield {"x": np.full((8, 1), i, np.float32)}
        finally:
            closed.append(True)

    mesh = parallel.make_mesh(8)
    assert [int(b["x"][0, 0]) for b in parallel.prefetch(numbers(), mesh)] == list(range(6))
    batches = parallel.prefetch(numbers(), mesh)
    next(batches)
    batches.close()
    assert len(closed) == 2


def test_all_finite_sees_one_bad_leaf():
    good = {"a": jnp.ones(3), "n": jnp.int32(1)}
    assert parallel.all_finite(good)
    assert not parallel.all_finite({**good, "b": jnp.array([1.0, jnp.inf])})
    assert not parallel.all_finite({**good, "b": jnp.array([jnp.nan])})
