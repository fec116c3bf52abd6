"""The optimizer a config describes is the optax chain one would write by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbase_jax.build import build, deferred, target
from bigbase_jax.core import UserError
from bigbase_jax.optim import Optimizer

PARAMS = {
    "conv1": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full((3,), 2.0)},
    "head": {"kernel": jnp.full((3, 1), 2.0)},
}
GRADS = jax.tree.map(lambda p: 0.3 * jnp.arange(1.0, p.size + 1).reshape(p.shape), PARAMS)


def after(tx, steps=3):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def same(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), a, b)


def test_adamw_with_warmup_cosine_clipping_and_mask_is_the_chain_by_hand():
    node = target(
        Optimizer,
        learning_rate=0.1,
        algorithm=deferred(optax.adamw, b1=0.8),
        schedule=deferred(optax.cosine_decay_schedule, alpha=0.1),
        warmup=0.2,
        weight_decay=0.5,
        clip_norm=1.0,
    )
    rate = optax.join_schedules([optax.linear_schedule(0, 0.1, 2), optax.cosine_decay_schedule(0.1, 8, alpha=0.1)], [2])
    mask = {"conv1": {"kernel": True, "bias": False}, "head": {"kernel": True}}
    by_hand = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.8, weight_decay=0.5, mask=mask))
    ours = after(build(node).transform(PARAMS, 10))
    assert abs(ours["conv1"]["kernel"] - PARAMS["conv1"]["kernel"]).max() > 1e-2
    same(ours, after(by_hand))


def test_sgd_takes_weight_decay_as_l2_like_pytorch():
    tx = Optimizer(0.1, functools.partial(optax.sgd, momentum=0.9), weight_decay=0.01, decay_mask=".*").transform(
        PARAMS, 10
    )
    same(after(tx), after(optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9))))


@pytest.mark.parametrize(
    "schedule",
    [
        optax.cosine_decay_schedule,
        functools.partial(optax.linear_schedule, end_value=0.0),
        optax.warmup_cosine_decay_schedule,
    ],
)
def test_schedules_of_any_spelling_reach_the_peak_and_decay(schedule):
    if schedule is optax.warmup_cosine_decay_schedule:
        schedule = functools.partial(schedule, warmup_steps=10)
    rate = Optimizer(0.2, schedule=functools.partial(schedule)).rate(100)
    values = [float(rate(s)) for s in range(101)]
    assert max(values) == pytest.approx(0.2) and values[-1] < 0.01


def test_groups_freeze_scale_and_insist_on_covering_everything():
    plain = after(Optimizer(0.1, functools.partial(optax.sgd)).transform(PARAMS, 10))
    grouped = Optimizer(
        0.1, functools.partial(optax.sgd), groups=(("^conv1.bias", 0.0), ("^conv1", 0.5), ("head", 1.0))
    )
    tx = grouped.transform(PARAMS, 10)
    got = after(tx)
    same(got["conv1"]["bias"], PARAMS["conv1"]["bias"])
    same(got["conv1"]["kernel"], (PARAMS["conv1"]["kernel"] + plain["conv1"]["kernel"]) / 2)
    same(got["head"], plain["head"])
    with pytest.raises(UserError, match=r"covers no rate for conv1.bias, conv1.kernel; add"):
        Optimizer(0.1, groups=(("head", 1.0),)).transform(PARAMS, 10)
    with pytest.raises(UserError, match="'nowhere' matches no parameter"):
        Optimizer(0.1, groups=(("nowhere", 0.0), (".*", 1.0))).transform(PARAMS, 10)
    with pytest.raises(UserError, match="not a regular expression"):
        Optimizer(0.1, groups=(("(", 0.0),)).transform(PARAMS, 10)


def test_frozen_parameters_keep_no_optimizer_state():
    tx = Optimizer(0.1, functools.partial(optax.adam), groups=(("conv1", 0.0), (".*", 1.0))).transform(PARAMS, 10)
    sizes = [x.size for x in jax.tree.leaves(tx.init(PARAMS)) if hasattr(x, "size") and x.size > 1]
    assert sizes == [3, 3]


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="warmup is 20 steps, but the run has only 10"):
        Optimizer(0.1, warmup=20).rate(10)
