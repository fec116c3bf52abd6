"""DP-SGD: clipping by hand and against jax-privacy's numbers, noise, the accountant, and what is refused."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize, stats
from toys import Detection, Net, Regression, regression_batch

from bigbase_jax import parallel
from bigbase_jax.core import UserError, flatten
from bigbase_jax.parallel import MeshShape
from bigbase_jax.train import TrainConfig
from bigbase_jax.wrappers.frozen import Frozen
from bigbase_jax.wrappers.private import PRIVACY, Mechanism, Private, clip_and_sum

pytest.importorskip("dp_accounting")
KEY = jax.random.key(0)
N, EXPECTED, ROWS = 1000, 6.0, 8


def facts(n=N, expected=EXPECTED, rows=ROWS, packed=False, unit=None):
    """What ``planned`` asks of the data."""
    data = types.SimpleNamespace(poisson=expected, unit=unit)
    return types.SimpleNamespace(
        data=data, batch_size=rows, num_units=n, source=lambda split: types.SimpleNamespace(packed=packed)
    )


def planned(task, steps=20, **about):
    return task.planned(facts(**about), TrainConfig(steps=steps), steps)[0]


def quiet(task, **how):
    """Planned, and then the noise taken away."""
    made = planned(Private(task, noise=1.0, **how))
    object.__setattr__(made, "mechanism", made.mechanism._replace(noise=0.0))
    return made


def by_hand(task, variables, batch, clip):
    """The sum over rows of the gradients of each row's own loss, scaled to at most ``clip``."""
    rest = {name: x for name, x in variables.items() if name not in ("params", PRIVACY)}
    found, clipped = None, 0
    for i in np.flatnonzero(batch["mask"]):
        row = {name: x[i : i + 1] for name, x in batch.items()}

        def own(params, row=row):
            loss, _ = task.loss({"params": params, **rest}, row, KEY)
            return sum(loss.scale.get(name, 1.0) * part.mean() for name, part in loss.terms.items())

        grads = jax.tree.map(np.asarray, jax.grad(own)(variables["params"]))
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
        clipped += norm > clip
        grads = jax.tree.map(lambda g, norm=norm: g * min(1, clip / norm), grads)
        found = grads if found is None else jax.tree.map(np.add, found, grads)
    return found, clipped


def close(a, b, **how):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_allclose(x, b[name], err_msg=name, **{"rtol": 1e-5, "atol": 1e-6, **how})


def stepped(task, batch, devices=1, microbatches=1, mode="jit", shape=None, steps=1):
    """The state after some steps of SGD, and what was logged of the last."""
    mesh = parallel.make_mesh(devices, shape)
    spec = parallel.global_spec(batch, mesh)
    sharding = ("fsdp:1", "replicated") if shape else ()
    how = {"mode": mode, "microbatches": microbatches, "sharding": sharding}
    program = parallel.program(task, optax.sgd(1.0), spec, mesh, seed=3, **how)
    state = program.init(parallel.put(batch, mesh))
    for _ in range(steps):
        state, sums = program.step(state, parallel.put(batch, mesh))
    return jax.device_get((state.params, state.model_state)), jax.device_get(sums)


@pytest.mark.parametrize(
    "task", [Regression(), Detection(), Frozen(Regression(), "out")], ids=lambda t: type(t).__name__
)
def test_the_gradient_is_the_sum_of_clipped_ones_over_the_public_size(task):
    clip, batch = 0.9, regression_batch(ROWS, masked=3)
    private = quiet(task, clip=clip)
    variables = private.init(KEY, batch)
    expected, clipped = by_hand(task, variables, batch, clip)
    assert 0 < clipped < 5  # both kinds are among them

    def mean(params):
        loss, _ = private.loss({**variables, "params": params}, batch, KEY)
        return loss.terms["loss"].mean(), loss

    grads, loss = jax.jit(jax.grad(mean, has_aux=True))(variables["params"])
    close(grads, jax.tree.map(lambda g: g / EXPECTED, expected))
    assert float(loss.terms["loss"].weight) == pytest.approx(EXPECTED)  # whatever the batch has
    assert tuple(map(float, loss.aux["clipped"])) == (clipped, 5)


def test_clipping_is_that_of_jax_privacy():
    """Numbers of ``jax_privacy.clipped_grad(f, l2_clip_norm=1.5)`` 2.0.0 (see experiments/private)."""
    x = jnp.array([[1.0, 2.0], [0.1, -0.2], [3.0, 0.5], [-1.0, 0.3]])
    y = jnp.array([1.0, 0.0, -2.0, 0.5])
    w = {"w": jnp.array([0.5, -1.0]), "b": jnp.float32(0.25)}
    grads = jax.vmap(jax.grad(lambda p, x, y: (p["w"] @ x + p["b"] - y) ** 2), (None, 0, 0))(w, x, y)
    total, norms = clip_and_sum(grads, 1.5, jnp.ones(4, bool))
    close(total, {"w": np.array([1.9307631, -1.5017557]), "b": np.array(-0.18142283)})
    assert (np.asarray(norms) > 1.5).tolist() == [True, False, True, True]


def test_one_that_is_not_finite_counts_as_nothing():
    grads = {"w": jnp.array([[3.0, 4.0], [jnp.nan, 1.0], [jnp.inf, 0.0], [0.0, 0.0]])}
    total, _ = clip_and_sum(grads, 1.0, jnp.ones(4, bool))
    np.testing.assert_allclose(total["w"], [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize(
    "how",
    [
        {"devices": 4},
        {"devices": 2, "microbatches": 2},
        {"devices": 4, "mode": "shard_map"},
        {"devices": 4, "shape": MeshShape(data=2, fsdp=2)},
    ],
    ids=str,
)
def test_devices_and_microbatches_change_neither_gradient_nor_noise(how):
    """The noise is much larger than the gradients, so it is there, and once."""
    task, batch = planned(Private(Regression(), noise=3.0, clip=0.9)), regression_batch(ROWS, masked=2)
    (one, state), sums = stepped(task, batch, steps=2)
    (several, state_too), sums_too = stepped(task, batch, steps=2, **how)
    close(one, several)
    assert int(state[PRIVACY]["steps"]) == int(state_too[PRIVACY]["steps"]) == 2
    close({n: x.mean() for n, x in sums.items()}, {n: x.mean() for n, x in sums_too.items()}, rtol=1e-4)
    (calm, _), _ = stepped(quiet(Regression(), clip=0.9), batch, steps=2)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (one, calm)), strict=True)) > 0.3


def test_noise_has_its_deviation_and_differs_by_step():
    noise, clip = 0.7, 2.0
    task = planned(Private(Regression(Net(width=5000)), noise=noise, clip=clip))
    batch = {**regression_batch(ROWS), "mask": jnp.zeros(ROWS)}  # an empty batch: what is left is the noise
    updates = []
    for steps in (1, 2):
        (params, _), _ = stepped(task, batch, steps=steps)
        updates.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)]))
    first = updates[1] - updates[0]
    deviation = noise * clip / EXPECTED
    assert first.std() == pytest.approx(deviation, rel=0.02) and abs(first.mean()) < 3 * deviation / math.sqrt(
        first.size
    )
    assert stats.kstest(first / deviation, "norm").pvalue > 1e-3
    start = np.concatenate([np.ravel(x) for x in jax.tree.leaves(stepped_start(task, batch))])
    assert abs(np.corrcoef(first, updates[0] - start)[0, 1]) < 0.05


def stepped_start(task, batch):
    mesh = parallel.make_mesh(1)
    program = parallel.program(task, optax.sgd(1.0), parallel.global_spec(batch, mesh), mesh, seed=3)
    return jax.device_get(program.init(parallel.put(batch, mesh)).params)


# --- the accountant ---------------------------------------------------------------------------------------------------


def gaussian_epsilon(noise, delta):
    """Of one Gaussian mechanism of sensitivity 1 (Balle & Wang 2018, theorem 8)."""

    def excess(epsilon):
        a, b = 0.5 / noise - epsilon * noise, -0.5 / noise - epsilon * noise
        return stats.norm.cdf(a) - math.exp(epsilon) * stats.norm.cdf(b) - delta

    return optimize.brentq(excess, 0, 200)


@pytest.mark.parametrize("noise, steps", [(1.0, 1), (2.0, 4), (5.0, 100)])
def test_without_sampling_epsilon_is_the_gaussian_mechanisms(noise, steps):
    whole = Mechanism(units=50, expected=50.0, most=50, noise=noise)
    exact = gaussian_epsilon(noise / math.sqrt(steps), 1e-5)  # n of them are one with the noise over sqrt(n)
    assert exact <= whole.epsilon(steps, 1e-5) <= 1.005 * exact


def test_one_sampled_step_is_the_mixtures_by_hand():
    """Delta of removing the example: E[(p - e^eps q)+] of p = (1 - s) N(0, v) + s N(1, v), q = N(0, v), on a grid."""
    noise, rate, delta = 0.8, 0.1, 1e-3
    x = np.linspace(-12, 13, 2_000_001)
    q = stats.norm.pdf(x, 0, noise)
    p = (1 - rate) * q + rate * stats.norm.pdf(x, 1, noise)

    def excess(epsilon):
        return max(np.trapezoid(np.maximum(a - math.exp(epsilon) * b, 0), x) for a, b in ((p, q), (q, p))) - delta

    exact = optimize.brentq(excess, 0, 10)
    assert Mechanism(1000, 100.0, 1000, noise).epsilon(1, delta) == pytest.approx(exact, rel=2e-3)


def test_truncation_costs_something_where_it_happens():
    free, tight = (Mechanism(1000, 50.0, most, 1.0).epsilon(50, 1e-5) for most in (1000, 50))
    wide = Mechanism(1000, 50.0, 110, 1.0).epsilon(50, 1e-5)
    assert free < 1.001 * free < tight and wide == pytest.approx(free, rel=1e-3)


def test_calibration_keeps_to_the_budget_and_hardly_below():
    mechanism = Mechanism(10_000, 200.0, 300, 0.0)
    found = mechanism.calibrated(3.0, 1e-5, 500)
    assert 2.98 < found.epsilon(500, 1e-5) <= 3.0 < found._replace(noise=0.995 * found.noise).epsilon(500, 1e-5)
    assert found.epsilon(0, 1e-5) == 0 and mechanism.epsilon(1, 1e-5) == math.inf
    allowed = found.affordable(1.0, 1e-5, 500)
    assert found.epsilon(allowed, 1e-5) <= 1.0 < found.epsilon(allowed + 1, 1e-5)


def test_what_is_logged_is_never_below_what_was_spent():
    task, batch = planned(Private(Regression(), epsilon=3.0), steps=20), regression_batch(ROWS)
    for steps in (1, 7, 20):
        (_, state), sums = stepped(task, batch, steps=steps)
        logged, spent = float(sums["epsilon"].mean()), task.mechanism.epsilon(steps, task.delta)
        assert spent <= logged <= 3.0 and (steps < 20 or logged == pytest.approx(spent, rel=1e-6))
        _, measured = task.evaluate({"params": task.init(KEY, batch)["params"], **state}, batch)
        assert float(measured["epsilon"].mean()) == pytest.approx(logged) and "epsilon" in task.metrics
    assert task.guarantee["privacy"] == {
        "epsilon": pytest.approx(logged),
        "delta": 1e-5,
        "steps": 20,
        "unit": "example",
        "neighbours": "one added or removed",
        "clip": 1.0,
        **task.mechanism._asdict(),
    }


def test_a_budget_ends_training_where_it_is_spent(capsys):
    task, steps = Private(Regression(), epsilon=1.0, noise=2.0).planned(facts(), TrainConfig(steps=5000), 5000)
    assert 0 < steps < 5000 and task.mechanism.epsilon(steps, 1e-5) <= 1.0 < task.mechanism.epsilon(steps + 1, 1e-5)
    assert f"allows {steps:,} of the 5,000 steps" in capsys.readouterr().err


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, told",
    [
        ({"epsilon": 0.0}, "epsilon is 0.0; it is a number above 0"),
        ({"epsilon": math.inf}, "epsilon is inf"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"noise": 0.01}, "with less than 0.05 nothing is private"),
        ({"epsilon": 3.0, "clip": 0.0}, "clip is 0.0"),
        ({"epsilon": 3.0, "delta": 0.0}, "delta is 0.0"),
        ({}, "needs epsilon="),
    ],
    ids=str,
)
def test_numbers_out_of_range(words, told):
    with pytest.raises(UserError, match=told):
        Private(Regression(), **words)


def test_tasks_without_gradients_of_examples():
    with pytest.raises(UserError, match="compares the examples of a batch"):
        Private(Regression(batch_coupled=True), epsilon=3.0)
    with pytest.raises(UserError, match="batch_stats .* without BatchNorm"):
        Private(Regression(Net(norm=True)), epsilon=3.0).init(KEY, regression_batch(ROWS))


@pytest.mark.parametrize(
    "data, loop, told",
    [
        ({"n": 200_000}, {}, r"delta is 1e-05, above 1/200000: .* give at most 5e-06"),
        ({"expected": None}, {}, "config.data.poisson"),
        ({"packed": True}, {}, "several documents are packed"),
        ({}, {"best_metric": "accuracy"}, "the last checkpoint is the result"),
        ({}, {"best_metric": "accuracy", "patience": 2}, "the last checkpoint is the result"),
        ({}, {"lazy_tables": True}, "lazy_tables"),
    ],
    ids=str,
)
def test_what_would_void_the_guarantee(data, loop, told):
    with pytest.raises(UserError, match=told):
        Private(Regression(), epsilon=3.0).planned(facts(**data), TrainConfig(steps=9, **loop), 9)


def test_a_budget_below_one_step():
    with pytest.raises(UserError, match="less than one step at noise=0.5 costs"):
        Private(Regression(), epsilon=0.01, noise=0.5).planned(facts(), TrainConfig(steps=9), 9)


def test_it_is_around_all_others_and_trained_by_the_loop_alone():
    batch = regression_batch(ROWS)
    with pytest.raises(UserError, match="Private is around all other wrappers, so Frozen goes inside"):
        parallel.plain_step(Frozen(quiet(Regression()), "out"), optax.sgd(1.0))
    bare = Private(Regression(), epsilon=3.0)
    with pytest.raises(UserError, match="ordinary loop"):
        bare.loss(bare.init(KEY, batch), batch, KEY)
    assert dataclasses.replace(bare, epsilon=2.0).mechanism is None
    np.testing.assert_array_equal(
        bare.predict(bare.init(KEY, batch), batch)["y_hat"],
        bare.task.predict(bare.task.init(KEY, batch), batch)["y_hat"],
    )
