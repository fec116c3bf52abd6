"""The next item: the softmax without logits against the plain one, sampled losses by hand, ranks, what users read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import loss_of

from bigbase_jax.core import Task, UserError
from bigbase_jax.models.sasrec import SASRec
from bigbase_jax.tasks import chunked_loss
from bigbase_jax.tasks.next_item import NextItem

V, L, D = 13, 5, 16
MODEL = SASRec(num_items=V, length=L, width=D)
HISTORY = jnp.array([[3, 1, 4, 0, 0], [2, 6, 5, 3, 5], [7, 0, 0, 0, 0]], jnp.int32)
TARGET = jnp.array([[1, 4, 8, 0, 0], [6, 5, 3, 5, 9], [2, 0, 0, 0, 0]], jnp.int32)
TRAIN = {"history": HISTORY, "target": TARGET, "mask": jnp.array([1.0, 1.0, 0.0])}
EVAL = {"history": HISTORY, "target": jnp.array([8, 9, 2]), "mask": jnp.ones(3)}


@functools.cache
def variables():
    shapes = jax.eval_shape(NextItem(MODEL).init, jax.random.key(0), TRAIN)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), jnp.float32), shapes)


def value_and_grad(task, key=0):
    def loss(params):
        total, _ = loss_of(task, {"params": params}, TRAIN, jax.random.key(key))
        return total.total, total.weight

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables()["params"])


@pytest.mark.parametrize("logits", [14, 42, 10_000])  # 1, 3 and all places at a time
def test_the_softmax_and_its_gradient_are_the_plain_ones(logits, monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_LOGITS", logits)

    def plain(params):
        logits_BLV = MODEL.apply({"params": params}, HISTORY)[..., 1:]
        logp_BL = jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), jnp.maximum(TARGET[..., None] - 1, 0), -1)
        return -jnp.sum((TARGET > 0) * TRAIN["mask"][:, None] * logp_BL[..., 0])

    (total, weight), grads = value_and_grad(NextItem(MODEL))
    expected, expected_grads = jax.jit(jax.value_and_grad(plain))(variables()["params"])
    assert weight == 8
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected_grads)


def by_hand(task, drawn_of):
    """The sampled losses of the batch's targets, from scores of all items."""
    logits = np.asarray(MODEL.apply(variables(), HISTORY), np.float64)
    total = 0.0
    for b, at in zip(*np.nonzero(TARGET[:2]), strict=True):
        own = {*HISTORY[b].tolist(), *TARGET[b].tolist()}
        others = np.array([logits[b, at, i] for i in drawn_of(b, at) if i not in own])
        right = logits[b, at, TARGET[b, at]]
        if task.loss_kind == "bce":
            alpha = task.negatives / (V - 1)  # equation 8 of Petrov & Macdonald 2023
            beta = alpha * (task.calibration * (1 - 1 / alpha) + 1 / alpha)
            total += beta * np.log1p(np.exp(-right)) + np.log1p(np.exp(others)).sum()
        else:
            total += np.log(np.exp(right) + (np.exp(others) * V / task.negatives).sum()) - right
    return total


@pytest.mark.parametrize(
    "words", [("bce", 1, 0.0), ("bce", 7, 0.75), ("sampled_softmax", 1, 0.0), ("sampled_softmax", 7, 0.0)]
)
def test_sampled_losses_are_the_published_ones(words, monkeypatch):
    task = NextItem(MODEL, **dict(zip(("loss_kind", "negatives", "calibration"), words, strict=True)))
    drawn = {}
    randint = jax.random.randint

    def recorded(key, shape, low, high):
        assert (low, high) == (1, V + 1)
        drawn["items"] = randint(jax.random.key(5), shape, low, high)
        return drawn["items"]

    monkeypatch.setattr(jax.random, "randint", recorded)
    total, _ = loss_of(task, variables(), TRAIN, jax.random.key(0))
    items = np.asarray(drawn["items"])
    places = L if task.negatives == 1 else 1
    assert items.shape == ((3, places) if task.loss_kind == "bce" else ()) + (task.negatives,)
    expected = by_hand(task, lambda b, at: items[b, min(at, places - 1)] if task.loss_kind == "bce" else items)
    np.testing.assert_allclose(total.total, expected, rtol=1e-5)
    assert total.weight == 8


def test_answers_are_the_best_items_that_the_history_has_not():
    task = NextItem(MODEL, item_names=[f"i{k}" for k in range(1, V + 1)])
    scores = np.asarray(jax.jit(task.scores)(variables(), EVAL))
    last = [2, 4, 0]
    plain = np.asarray(MODEL.apply(variables(), HISTORY))[np.arange(3), last]
    np.testing.assert_allclose(scores[:, 1:], plain[:, 1:], rtol=1e-5, atol=1e-6)
    assert np.isneginf(scores[:, 0]).all()
    outputs = jax.device_get(jax.jit(task.predict)(variables(), {"history": HISTORY}))
    evaluated, sums = jax.device_get(jax.jit(task.evaluate)(variables(), EVAL))
    ranks = []
    for b, seen in enumerate(np.asarray(HISTORY)):
        order = [i for i in np.argsort(-scores[b]).tolist() if i and i not in seen]
        few = [*order, 0, 0, 0][:10]
        assert outputs["items"][b].tolist() == few
        np.testing.assert_allclose(outputs["scores"][b], scores[b, few], rtol=1e-5)
        ranks.append(order.index(int(EVAL["target"][b])))
    assert len(set(ranks)) > 1
    expected = {
        "hr@10": np.mean([rank < 10 for rank in ranks]),
        "ndcg@10": np.mean([(rank < 10) / np.log2(rank + 2) for rank in ranks]),
        "mrr@10": np.mean([(rank < 10) / (rank + 1) for rank in ranks]),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name].total / sums[name].weight, value, rtol=1e-6)
    assert set(sums) == set(task.metrics)
    first = {name: x[0] for name, x in outputs.items()}
    answer = dataclasses.replace(task, top=3).postprocess(first, {"history": np.asarray(HISTORY[0]), "unknown": ["x"]})
    assert [one["item"] for one in answer["items"]] == [f"i{k}" for k in outputs["items"][0][:3]]
    assert [one["item"] for one in answer["history"]] == ["i3", "i1", "i4"] and answer["unknown"] == ["x"]
    assert len(task.postprocess(first, {"history": np.asarray(HISTORY[0]), "top": 2})["items"]) == 2
    titled = dataclasses.replace(task, item_titles=["", "", "Three", *[""] * 10])
    assert titled.postprocess(first, {"history": [3, 1]})["history"] == [
        {"item": "i3", "title": "Three"},
        {"item": "i1"},
    ]
    np.testing.assert_array_equal(evaluated["items"], outputs["items"])
    assert all(hasattr(task, name) for name in [*Task.__annotations__, *vars(Task)] if not name.startswith("_"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"loss_kind": "sofmax"}, "Did you mean 'softmax'"),
        ({"top": 0}, "at least 1"),
        ({"calibration": 2.0}, "lies in"),
    ],
)
def test_mistakes_are_said(words, said):
    with pytest.raises(UserError, match=said):
        NextItem(MODEL, **words)
    assert dataclasses.replace(NextItem(MODEL), top=4).top == 4
