"""Masks in training: what is zero stays zero whatever the optimizer does, and zeros grow as the schedule says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import Net, Regression, regression_batch

from bigbase_jax import parallel
from bigbase_jax.core import UserError
from bigbase_jax.wrappers.lora import LoRA
from bigbase_jax.wrappers.sparse import MASKS, Sparse

KEY = jax.random.key(0)


def zeros(variables):
    return np.mean(np.asarray(variables["params"]["hidden"]["kernel"]) == 0)


def noisy():
    """An optimizer that moves every number, as Muon does."""
    return optax.chain(optax.sgd(0.1), optax.add_noise(0.1, 0.0, KEY))


def begun(task, batch):
    variables = task.init(KEY, batch)
    kernel = variables["params"]["hidden"]["kernel"]
    variables["params"]["hidden"]["kernel"] = kernel.at[:, 1].set(0)
    return variables


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_zeros_stay_zeros_and_the_moving_average_has_them(mode):
    task, batch = Sparse(Regression(Net(norm=True))), regression_batch(8)
    mesh = parallel.make_mesh(2)
    spec = parallel.global_spec(batch, mesh)
    program = parallel.program(task, noisy(), spec, mesh, mode=mode, ema_decay=0.9)
    state = program.init(parallel.put(batch, mesh))
    params = begun(task, batch)["params"]
    state = state.replace(params=jax.device_put(params, jax.tree.map(lambda x: x.sharding, program.state.params)))
    state = state.replace(ema={**state.ema, "params": jax.tree.map(jnp.copy, state.params)})
    for _ in range(2):
        state, _ = program.step(state, parallel.put(batch, mesh))
    assert np.all(np.asarray(state.params["hidden"]["kernel"])[:, 1] != 0)  # the optimizer did move them
    for variables in (state.variables(), {"params": state.params, **state.model_state}):
        inner = task.unwrap(variables)
        assert MASKS not in inner and zeros(inner) == pytest.approx(1 / 5)
        kept = np.asarray(inner["params"]["hidden"]["kernel"])
        assert (kept[:, 1] == 0).all() and (np.delete(kept, 1, 1) != 0).all()
        np.testing.assert_array_equal(task.predict(variables, batch)["y_hat"], task.task.predict(inner, batch)["y_hat"])


def test_zeros_grow_by_the_cubic_schedule_and_never_return():
    task, batch = Sparse(Regression(Net(width=40)), "hidden.kernel", 0.8, begin=2, end=10, every=4), regression_batch(8)
    loss = jax.jit(task.loss)
    variables, before, shares = dict(task.init(KEY, batch)), None, []
    size = variables["params"]["hidden"]["kernel"].size
    for t in range(12):
        _, state = loss(variables, batch, KEY)
        params = jax.tree.map(
            lambda x, t=t: x + 0.5 * jax.random.normal(jax.random.key(t), x.shape), variables["params"]
        )
        variables = {**state, "params": params}
        kept = np.asarray(state[MASKS]["kept"]["hidden"]["kernel"])
        assert before is None or not np.any(kept & ~before)
        before = kept
        shares.append(1 - kept.mean())
    expected = [0.8 * (1 - (1 - (t - 2) / 8) ** 3) if t >= 2 else 0 for t in (0, 1, 2, 2, 2, 2, 6, 6, 6, 6, 10, 10)]
    np.testing.assert_allclose(shares, [round(x * size) / size for x in expected], atol=1e-6)


def test_n_of_m_grows_by_the_schedule_among_the_inputs_of_each_output():
    task = Sparse(Regression(Net(width=8)), "kernel", "1:4", begin=2, end=10, every=4)
    batch = {**regression_batch(8), "x": np.asarray(jax.random.normal(KEY, (8, 4)))}
    variables, kept, shares = dict(task.init(KEY, batch)), [], []
    for t in range(11):
        _, state = jax.jit(task.loss)(variables, batch, KEY)
        noise = jax.random.normal(jax.random.key(t), variables["params"]["hidden"]["kernel"].shape)
        variables = {**state, "params": jax.tree.map(lambda x: x, variables["params"])}
        variables["params"]["hidden"]["kernel"] += 0.5 * noise
        kept.append(np.asarray(state[MASKS]["kept"]["hidden"]["kernel"]))
        (share,) = set(kept[-1].reshape(-1, 4, 8).sum(1).reshape(-1).tolist())  # the same in each group
        shares.append(share)
    assert shares == [4, 4, 4, 4, 4, 4, 1, 1, 1, 1, 1]  # round(3 (1 - (1 - 4 / 8) ** 3)) = 3 are less at step 6
    assert np.any(kept[0] != kept[-1]) and not np.any(kept[-1] & ~kept[6])
    with pytest.raises(UserError, match="whose inputs 3 divides, outside of"):
        Sparse(Regression(Net(width=8)), "hidden", "2:3").init(KEY, batch)


def test_no_gradient_reaches_a_zero():
    task, batch = Sparse(Regression()), regression_batch(8)
    variables = begun(task, batch)
    state = {name: x for name, x in variables.items() if name != "params"}

    def total(params):
        return task.loss({"params": params, **state}, batch, KEY)[0].terms["loss"].total

    grads = jax.jit(jax.grad(total))(variables["params"])["hidden"]["kernel"]
    assert (grads[:, 1] == 0).all() and (np.delete(np.asarray(grads), 1, 1) != 0).any()


def test_adapters_go_around_masks():
    """What computes is what is merged, in which zeros are zeros."""
    batch = regression_batch(8)
    task = LoRA(Sparse(Regression()), rank=2, targets="hidden")
    variables = task.init(KEY, batch)
    variables["frozen"]["hidden"]["kernel"] = variables["frozen"]["hidden"]["kernel"].at[:, 1].set(0)
    plain = task.predict(variables, batch)["y_hat"]
    variables["params"]["hidden"]["lora_b"] += 1
    _, state = task.loss(variables, batch, KEY)
    variables = {**variables, **state}
    inner = task.task.unwrap(task.unwrap(variables))
    assert zeros(inner) == pytest.approx(1 / 5)
    found = task.predict(variables, batch)["y_hat"]
    assert np.abs(found - plain).max() > 0.01
    np.testing.assert_allclose(found, task.task.task.predict(inner, batch)["y_hat"], rtol=1e-6)
    with pytest.raises(UserError, match="where dropout cannot be"):
        LoRA(Sparse(Regression()), rank=2, targets="hidden", dropout=0.5).init(KEY, batch)


@pytest.mark.parametrize(
    "words, said",
    [
        ({"sparsity": 1.0}, "above 0 and below 1"),
        ({"sparsity": "4:2"}, "keeps 4 of every 2"),
        ({"sparsity": "much"}, "is none of SHARE and N:M"),
        ({"begin": 5, "end": 5}, "begin is at least 0 and below end"),
        ({"targets": "("}, "not a regular expression"),
    ],
)
def test_values_out_of_range_are_told(words, said):
    with pytest.raises(UserError, match=said):
        Sparse(Regression(), **words)


def test_targets_that_match_nothing_are_told():
    with pytest.raises(UserError, match="targets='nothing' match no parameter; there are"):
        Sparse(Regression(), "nothing").init(KEY, regression_batch(8))
