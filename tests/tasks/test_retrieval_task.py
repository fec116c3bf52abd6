"""Two towers: the batch's softmax estimates the catalogue's, wherever its rows lie.

Legend: B examples, I items, L length, K batches.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbase_jax import parallel
from bigbase_jax.core import UserError, flatten
from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.two_tower import Ids, TwoTower
from bigbase_jax.tasks.retrieval import Retrieval

USERS, ITEMS, LENGTH = 5, 8, 4
SKEWED = 1 / np.arange(1, ITEMS + 1) ** 1.5
SKEWED /= SKEWED.sum()


def task(**how):
    model = TwoTower(USERS, ITEMS, LENGTH, width=16, **how.pop("model", {}))
    return Retrieval(model, **{"id_dropout": 0.0, **how})


def batch_of(size, seed=0, share=SKEWED, **more):
    rng = np.random.default_rng(seed)
    item = rng.choice(ITEMS, size, p=share).astype(np.int32) + 1
    history = rng.integers(0, ITEMS + 1, (size, LENGTH)).astype(np.int32)
    found = {"user": rng.integers(0, USERS, size).astype(np.int32), "history": history, "item": item}
    return {**found, "log_q": np.log(share[item - 1]).astype(np.float32), "mask": np.ones(size, np.float32), **more}


def every_item():
    return {"item": np.arange(1, ITEMS + 1), "log_q": np.zeros(ITEMS, np.float32)}


def trained(correct):
    """What many skewed batches teach of users who all choose alike: f64[I], the probabilities of items."""
    own = task(correct=correct, model={"hidden": (16,)})
    variables = jax.jit(own.init)(jax.random.key(0), batch_of(2))
    tx = optax.adam(0.02)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(lambda p: own.loss({"params": p}, batch, None)[0].terms["loss"].mean())(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    params, state = variables["params"], tx.init(variables["params"])
    for i in range(300):
        params, state = step(params, state, batch_of(128, seed=i))
    users = own.users({"params": params}, batch_of(64, seed=999))
    return np.asarray(jax.nn.softmax(users @ own.items({"params": params}, every_item()).T).mean(0))


def test_hashed_ids_share_rows_and_few_share_both():
    ids, rows = Ids(10_000, 8, 1_000), jnp.arange(10_001)
    variables = ids.init(jax.random.key(0), rows)
    assert jax.tree.map(np.shape, variables["params"]) == {"vectors": {"table": (1_024, 8)}}
    vectors = np.asarray(ids.apply(variables, rows))
    met = 10_000**2 / 2 / (1_000**2 / 2)  # as many as meet by chance: pairs of ids, over pairs of rows in any order
    assert 0 < 10_001 - len(np.unique(vectors.round(5), axis=0)) < 1.5 * met
    np.testing.assert_allclose(vectors[0], 2 * variables["params"]["vectors"]["table"][0], rtol=1e-6)
    np.testing.assert_array_equal(vectors[7:9], ids.apply(variables, jnp.array([7, 8])))
    few = Ids(1_000, 8, 1_000).init(jax.random.key(0), rows[:5])
    assert few["params"]["vectors"]["table"].shape == (1_024, 8)
    with pytest.raises(ModelError, match="at least one row"):
        TwoTower(1, 1, 1, hashed=0)


def test_the_correction_recovers_what_the_full_softmax_would_learn():
    apart = {correct: 0.5 * np.abs(trained(correct) - SKEWED).sum() for correct in (True, False)}
    assert apart[True] < 0.04 < 0.15 < apart[False], apart


def test_the_partition_function_is_estimated_without_bias():
    """For a row and its item, over all that the other two rows of a batch may hold."""
    own = task(model={"temperature": 0.7})
    variables = jax.jit(own.init)(jax.random.key(1), batch_of(2))
    a, b = (x.reshape(-1) for x in np.meshgrid(np.arange(ITEMS), np.arange(ITEMS)))
    for chosen in (0, ITEMS - 1):
        items_K3 = np.stack([np.full_like(a, chosen), a, b], 1)

        def of_first(item_3, alike):
            batch = {**batch_of(3), "item": item_3 + 1, "log_q": jnp.log(SKEWED)[item_3]}
            return own.log_partition(variables, batch)[1][0] if alike else own.users(variables, batch)[0]

        log_z_K = jax.vmap(lambda x: of_first(x, True))(jnp.asarray(items_K3, jnp.int32))
        user_D = of_first(jnp.asarray(items_K3[0], jnp.int32), False)
        full = jnp.exp(own.items(variables, every_item()) @ user_D).sum()
        np.testing.assert_allclose((SKEWED[a] * SKEWED[b] * np.exp(log_z_K)).sum(), full, rtol=1e-4)
        assert np.exp(log_z_K).std() > 0.1 * full  # it is an estimate


def test_padding_and_the_same_item_elsewhere_are_no_negatives():
    own = task()
    batch = batch_of(8, item=np.array([1, 1, 2, 3, 4, 5, 6, 7], np.int32))
    variables = jax.jit(own.init)(jax.random.key(0), batch)

    def loss(**changed):
        return own.loss(variables, {**batch, **changed}, None)[0].terms["loss"]

    short = {name: x[:6] for name, x in batch.items()}
    padded = loss(mask=np.array([1] * 6 + [0] * 2, np.float32))
    fewer = own.loss(variables, short, None)[0].terms["loss"]
    np.testing.assert_allclose(padded, fewer, rtol=1e-5)
    assert abs(float(loss().mean() - fewer.mean())) > 1e-3  # the padding counts when it is none
    chosen_B, log_z_B = own.log_partition(variables, {name: x[:2] for name, x in batch.items()})
    np.testing.assert_allclose(chosen_B, log_z_B, rtol=1e-6)  # nothing but the item itself twice


def test_gradients_are_the_same_over_devices_and_splitting_the_batch_is_refused():
    own = task(model={"hidden": (16,), "learn_temperature": True}, id_dropout=0.3)
    batch, found = batch_of(16, mask=np.array([1] * 13 + [0] * 3, np.float32)), []
    for devices in (1, 4):
        mesh = parallel.make_mesh(devices)
        program = parallel.program(own, optax.sgd(1.0), batch, mesh, seed=2)
        state = program.init(parallel.put(batch, mesh))
        before = jax.device_get(state.params)
        state, sums = program.step(state, parallel.put(batch, mesh))
        gradient = jax.tree.map(lambda a, b: a - b, before, jax.device_get(state.params))
        found.append({**flatten(gradient), "loss": np.asarray(sums["loss"].mean())})
    for name, one in found[0].items():
        np.testing.assert_allclose(one, found[1][name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert sum(np.abs(x).max() > 1e-3 for x in found[0].values()) > 6
    for how in ({"microbatches": 2}, {"mode": "shard_map"}):
        with pytest.raises(UserError, match="compares the examples of a batch"):
            parallel.program(own, optax.sgd(1.0), batch, parallel.make_mesh(2), **how)


def test_what_training_has_not_seen_is_known_by_its_words_and_features_alone():
    own = task(model={"item_words": 20, "user_words": 6, "item_features": 3})
    words = np.arange(1, 17).reshape(8, 2).astype(np.int32)
    features = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    more = {"item_words": words, "item_features": features, "user_words": words[:, :1] % 7}
    batch = batch_of(8, item=np.arange(1, 9, dtype=np.int32), **more)
    assert own.inputs == ("user", "history", "user_words")
    variables = jax.jit(own.init)(jax.random.key(0), batch)

    def items(**changed):
        return np.asarray(own.items(variables, {**batch, **changed}))

    cold = np.full(8, -np.inf, np.float32)
    np.testing.assert_array_equal(items(log_q=cold), items(log_q=cold, item=batch["item"][::-1]))
    changes = {"item": batch["item"][::-1]}, {"item_words": words[::-1]}, {"item_features": features[::-1]}
    assert all(np.abs(items() - items(**change)).max() > 1e-3 for change in changes)
    assert np.abs(items(log_q=cold) - items(log_q=cold, item_words=words[::-1])).max() > 1e-3
    users = own.users(variables, {**batch, "user": np.full(8, -1, np.int32)})
    assert np.abs(users - own.users(variables, batch)).max() > 1e-3
    one = own.users(variables, {**batch, "history": np.zeros((8, LENGTH), np.int32)})
    assert np.isfinite(one).all() and np.abs(one - own.users(variables, batch)).max() > 1e-3
    left, right = np.zeros((2, 8, LENGTH), np.int32)
    left[:, -2:], right[:, :2] = (3, 4), (3, 4)  # padding may lie on either side
    found = [own.users(variables, {**batch, "history": x}) for x in (left, right, left[:, ::-1])]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


def test_an_answer_is_the_best_that_the_user_does_not_have():
    own = task(item_names=[f"i{n}" for n in range(1, ITEMS + 1)], item_titles=["", "", "Three", *[""] * 5], top=2)
    output = {"items": np.array([3, 1, 5, 2, -1]), "scores": np.array([0.9, 0.8, 0.7, 0.6, -np.inf])}
    answer = own.postprocess(output, {"history": np.array([0, 1])})
    assert answer["items"] == [{"item": "i3", "title": "Three", "score": 0.9}, {"item": "i5", "score": 0.7}]
    assert answer["history"] == [{"item": "i1"}]
    with pytest.raises(UserError, match="id_dropout is 1"):
        task(id_dropout=1)
    with pytest.raises(UserError, match="num_users is None"):
        Retrieval(TwoTower()).init(jax.random.key(0), batch_of(2))
    with pytest.raises(UserError, match="longer than the 4"):
        jax.jit(own.init)(jax.random.key(0), batch_of(2, history=np.ones((2, 9), np.int32)))
