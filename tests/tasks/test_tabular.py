"""Models and tasks of rows: formulas against torch and scikit-learn, what depends on what, and the units of answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
import torch

from bigbase_jax.core import UserError
from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.tabular import PerColumn, TabularLinear, TabularMLP, normal_edges, periodic, piecewise_linear
from bigbase_jax.tasks.tabular import TabularClassification, TabularRegression, outputs_of, pinball

B, F, K = 5, 3, 2
CARDINALITIES = (4, 3)
INFO = {"cardinalities": CARDINALITIES, "number_names": ("a", "b", "c")}


def batch(seed=0, rows=B):
    rng = np.random.default_rng(seed)
    found = {
        "numbers": rng.normal(size=(rows, F)).astype(np.float32),
        "categories": np.stack([rng.integers(0, c, rows) for c in CARDINALITIES], 1).astype(np.int32),
        "label": rng.integers(0, K, rows).astype(np.int32),
        "target": (50 + 10 * rng.normal(size=rows)).astype(np.float32),
        "mask": np.ones(rows, np.float32),
    }
    return {name: jnp.asarray(x) for name, x in found.items()}


def test_embeddings_against_torch():
    rng = np.random.default_rng(0)
    x, c, w, b = (rng.normal(size=s).astype(np.float32) for s in ((B, F), (F, 4), (F, 8, 6), (F, 6)))
    angle = 2 * torch.pi * torch.tensor(c) * torch.tensor(x)[..., None]
    parts = torch.cat([torch.cos(angle), torch.sin(angle)], -1)
    np.testing.assert_allclose(periodic(jnp.asarray(x), jnp.asarray(c)), parts, atol=1e-5)
    wanted = (parts[..., None, :] @ torch.tensor(w))[..., 0, :] + torch.tensor(b)  # a layer for each column
    found = PerColumn(6).apply({"params": {"kernel": w, "bias": b}}, jnp.asarray(parts))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_piecewise_linear_encoding():
    """Equation 1 of Gorishniy et al. 2022, bin by bin."""
    edges, x = np.array([-1.0, 0.0, 2.0, 3.0]), np.array([-2.0, -0.5, 1.0, 2.5, 9.0], np.float32)
    wanted = np.zeros((5, 3))
    for i, value in enumerate(x):
        for t in range(1, 4):
            if value < edges[t - 1] and t > 1:
                wanted[i, t - 1] = 0
            elif value >= edges[t] and t < 3:
                wanted[i, t - 1] = 1
            else:
                wanted[i, t - 1] = (value - edges[t - 1]) / (edges[t] - edges[t - 1])
    np.testing.assert_allclose(piecewise_linear(jnp.asarray(x)[:, None], edges)[:, 0], wanted, atol=1e-6)
    z = np.random.default_rng(0).normal(size=100_000)
    np.testing.assert_allclose(np.histogram(z, normal_edges(8))[0] / 1e5, 1 / 8, atol=0.005)


def test_the_linear_model_is_one_of_one_hot_categories():
    given, rng = batch(), np.random.default_rng(1)
    model = TabularLinear(num_classes=K, cardinalities=CARDINALITIES)
    params = jax.jit(model.init)(jax.random.key(0), given["numbers"], given["categories"])["params"]
    assert not any(np.any(x) for x in jax.tree.leaves(params))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    one_hot = np.concatenate([np.eye(c)[given["categories"][:, i]] for i, c in enumerate(CARDINALITIES)], 1)
    wanted = given["numbers"] @ params["head"]["kernel"] + params["head"]["bias"]
    wanted = wanted + one_hot @ params["embedding"]["embedding"]
    np.testing.assert_allclose(
        model.apply({"params": params}, given["numbers"], given["categories"]), wanted, atol=1e-5
    )


@pytest.mark.parametrize("embedding", ["plr", "ple", "none"])
def test_rows_do_not_mix_and_every_column_counts(embedding):
    given = batch()
    model = TabularMLP(K, CARDINALITIES, embedding, 16, 4, highest_frequency=1.0, hidden=(32,))
    variables = jax.jit(model.init)(jax.random.key(0), given["numbers"], given["categories"])

    def logit(numbers):
        return model.apply(variables, numbers, given["categories"])[0, 0]

    gradient = np.asarray(jax.grad(logit)(jnp.asarray(given["numbers"])))
    assert gradient[0].all() and not gradient[1:].any()
    other = (given["categories"] + 1) % np.array(CARDINALITIES)
    before = model.apply(variables, given["numbers"], given["categories"])
    for column in range(2):
        changed = jnp.where(np.arange(2) == column, other, given["categories"])
        assert (np.abs(model.apply(variables, given["numbers"], changed) - before) > 1e-6).all()
    with pytest.raises(ModelError, match="cardinalities"):
        TabularMLP(K, (4,), embedding).init(jax.random.key(0), given["numbers"], given["categories"])


def test_classification_of_tables_without_numbers_or_without_categories():
    given = batch()
    task = TabularClassification(TabularLinear(K, ()), cardinalities=(), number_names=("a", "b", "c"))
    assert task.inputs == ("numbers",) and task.num_classes == K
    task.predict(
        jax.jit(task.init)(jax.random.key(0), given | {"categories": np.zeros((B, 0), np.int32)}),
        {"numbers": given["numbers"]},
    )
    task = TabularClassification(TabularLinear(K, CARDINALITIES), cardinalities=CARDINALITIES, number_names=())
    assert task.inputs == ("categories",)
    variables = jax.jit(task.init)(jax.random.key(0), given | {"numbers": np.zeros((B, 0), np.float32)})
    found = task.predict(variables, {"categories": given["categories"]})["probabilities"]
    np.testing.assert_allclose(found, 0.5)


def test_classification_learns_and_several_rows_have_several_answers():
    given = batch(rows=64)
    given["label"] = (given["numbers"][:, 0] + (given["categories"][:, 0] == 2) > 0.3).astype(np.int32)
    task = TabularClassification(TabularMLP(K, CARDINALITIES, "plr", 4, 4, hidden=(16,)), **INFO)
    variables, key = jax.jit(task.init)(jax.random.key(0), given), jax.random.key(1)

    @jax.jit
    def step(params):
        def mean(params):
            return task.loss({"params": params}, given, key)[0].terms["loss"].mean()

        value, gradient = jax.value_and_grad(mean)(params)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

    losses, params = [], variables["params"]
    for _ in range(60):
        value, params = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]
    assert getattr(task, "merge", None) is None
    arrays, _ = task.evaluate({"params": params}, given | {"group": given["label"]})
    np.testing.assert_array_equal(arrays["group"], given["label"])


@pytest.mark.parametrize("kind", ["squared", "absolute", "pinball"])
def test_regression_is_measured_as_scikit_learn_does(kind):
    given = batch(rows=40)
    given["mask"] = given["mask"].at[-5:].set(0)
    quantiles = (0.1, 0.5, 0.9)
    model = TabularMLP(outputs_of(kind, quantiles), CARDINALITIES, "plr", 4, 4, hidden=(8,))
    task = TabularRegression(model, 50.0, 10.0, kind, quantiles, "price", **INFO)
    variables = jax.jit(task.init)(jax.random.key(0), given)
    arrays, sums = task.evaluate(variables, given)
    target, value = given["target"][:-5], np.asarray(arrays["value"])[:-5]
    meter = task.meters()["squares"]
    for part in (slice(0, 10), slice(10, 35)):
        meter.update({name: np.asarray(x)[part] for name, x in arrays.items()})
    found = {**{name: float(s.mean()) for name, s in sums.items()}, **meter.result()}
    assert found["mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(target, value), rel=1e-5)
    assert found["rmse"] == pytest.approx(sklearn.metrics.root_mean_squared_error(target, value), rel=1e-5)
    assert found["r2"] == pytest.approx(sklearn.metrics.r2_score(target, value), abs=1e-5)
    assert set(found) == set(task.metrics)
    if kind == "pinball":
        y = np.asarray(arrays["quantiles"])[:-5]
        assert (np.diff(y, axis=1) >= 0).all() and (y[:, 1] == value).all()
        each = [sklearn.metrics.mean_pinball_loss(target, y[:, i], alpha=q) for i, q in enumerate(quantiles)]
        assert found["pinball"] == pytest.approx(np.mean(each), rel=1e-5)
        assert found["coverage"] == pytest.approx(np.mean((y[:, 0] <= target) & (target <= y[:, 2])))
        answer = task.postprocess({name: np.asarray(arrays[name])[0] for name in ("value", "quantiles")}, {})
        assert list(answer) == ["price", "quantiles"] and list(answer["quantiles"]) == ["0.1", "0.5", "0.9"]
    loss = task.loss(variables, given, jax.random.key(0))[0].terms["loss"]
    assert float(loss.weight) == 35


def test_the_optimum_of_the_pinball_loss_is_the_quantile():
    target = jnp.asarray(np.random.default_rng(0).exponential(size=2001).astype(np.float32))
    for q in (0.1, 0.5, 0.9):
        grid = jnp.linspace(0, 5, 2001)
        loss = jax.vmap(lambda y, q=q: pinball(jnp.full((len(target), 1), y), target, (q,)).mean())(grid)
        assert float(grid[loss.argmin()]) == pytest.approx(np.quantile(target, q), abs=0.01)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"loss_kind": "squard"}, "Did you mean 'squared'"),
        ({"quantiles": (0.1, 0.9)}, "0.5 is one of them"),
        ({"quantiles": (0.9, 0.5)}, "ascend"),
        ({"target_std": None}, "does not know"),
    ],
)
def test_mistakes_in_a_regression(words, said):
    with pytest.raises(UserError, match=said):
        TabularRegression(TabularLinear(1, CARDINALITIES), **{"target_mean": 0.0, "target_std": 1.0, **words})


def test_a_model_of_other_outputs_is_refused():
    task = TabularRegression(TabularLinear(1, CARDINALITIES), 0.0, 1.0, "pinball", **INFO)
    with pytest.raises(UserError, match="set its num_classes to 5"):
        jax.jit(task.init)(jax.random.key(0), batch())
    three = TabularClassification(TabularLinear(3, CARDINALITIES), **INFO)
    assert three.num_classes == 3
