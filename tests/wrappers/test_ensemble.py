"""An ensemble: each member is what it would be alone, and they predict by the mean of their probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluators.rows import Net, Rows, Told

from bigbase_jax import parallel
from bigbase_jax.core import TrainState, UserError
from bigbase_jax.wrappers.ensemble import Ensemble

ROWS = Rows(16, 3)
BATCH = {name: getattr(ROWS, name) for name in ("numbers", "categories", "label", "group")} | {
    "mask": np.ones(16, "f4")
}
BATCH["mask"][-3:] = 0
TASK, S = Told(Net(), num_classes=2), 3


def trained(task, variables, steps=4):
    tx = optax.adamw(0.05, weight_decay=0.1, eps=1e-12)
    state = TrainState(jnp.int32(0), variables["params"], {}, tx.init(variables["params"]), None, jax.random.key(7))
    step = jax.jit(parallel.plain_step(task, tx))
    losses = []
    for _ in range(steps):
        state, sums = step(state, BATCH)
        losses.append(float(sums["loss"].mean()))
    return state.variables(), losses


def test_each_member_is_what_it_would_be_alone():
    ensemble = Ensemble(TASK, S)
    variables = ensemble.init(jax.random.key(0), BATCH)
    together, losses = trained(ensemble, variables)
    alone = [trained(TASK, jax.tree.map(lambda x, s=s: x[s], variables)) for s in range(S)]
    for s, (member, _) in enumerate(alone):
        for one, all_ in zip(jax.tree.leaves(member), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(one, all_[s], atol=2e-5)
    kernels = together["params"]["Dense_0"]["kernel"]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1  # they differ
    np.testing.assert_allclose(losses, np.mean([loss for _, loss in alone], 0), atol=1e-5)

    said = ensemble.predict(together, BATCH)
    p_BK = np.mean([TASK.predict(member, BATCH)["probabilities"] for member, _ in alone], 0)
    np.testing.assert_allclose(said["probabilities"], p_BK, atol=1e-5)
    np.testing.assert_allclose(jax.nn.softmax(said["logits"]), p_BK, atol=1e-5)
    arrays, sums = ensemble.evaluate(together, BATCH)
    nll_B = -np.log(p_BK[np.arange(16), ROWS.label])
    assert float(sums["loss"].mean()) == pytest.approx(nll_B[:13].mean(), abs=1e-5)
    np.testing.assert_allclose(arrays["probabilities"], p_BK, atol=1e-5)


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="at least 1"):
        Ensemble(TASK, 0)
    with pytest.raises(UserError, match="softmax"):
        Ensemble(Told(Net(), num_classes=2, loss_kind="sigmoid"))
