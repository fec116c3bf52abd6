"""DLRM and DCN-v2 against references in torch, written from the papers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bigbase_jax.models.clicks import DCN, DLRM, uniform_by_column
from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.tabular import TabularLinear

CARDINALITIES = (5, 40, 3)


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    categories = np.stack([random.integers(0, n, 16) for n in CARDINALITIES], 1)
    return jnp.asarray(random.normal(size=(16, 4)), jnp.float32), jnp.asarray(categories, jnp.int32)


def started(model, rows, seed=0):
    """Variables whose biases are not zero, and the logits."""
    variables = jax.jit(model.init)(jax.random.key(seed), *rows)
    leaves, tree = jax.tree.flatten(variables)
    random = np.random.default_rng(seed)
    variables = jax.tree.unflatten(tree, [np.asarray(x) + random.normal(0, 0.1, x.shape).astype("f4") for x in leaves])
    return variables, np.asarray(jax.jit(model.apply)(variables, *rows))


class Torch:
    """Layers with the parameters of ours."""

    def __init__(self, variables, rows):
        self.params = jax.tree.map(torch.tensor, variables["params"])
        self.numbers, self.categories = (torch.tensor(np.asarray(x)) for x in rows)

    def dense(self, name, x, at=None):
        layer = (at or self.params)[name]
        y = x @ layer["kernel"]
        return y + layer["bias"] if "bias" in layer else y

    def perceptron(self, name, x, depth):
        for i in range(depth):
            x = torch.relu(self.dense(f"{name}_{i}", x))
        return x

    def bags(self):
        """One table per column, as the releases have it: cut from ours."""
        tables = torch.split(self.params["embedding"]["table"][: sum(CARDINALITIES)], CARDINALITIES)
        return [torch.nn.functional.embedding(self.categories[:, i].long(), table) for i, table in enumerate(tables)]


def test_dlrm_is_that_of_the_paper(rows):
    model = DLRM(num_classes=2, cardinalities=CARDINALITIES, width=8, bottom=(12,), top=(16, 8))
    variables, ours = started(model, rows)
    ref = Torch(variables, rows)
    dense = ref.perceptron("bottom", ref.numbers, 2)
    vectors = [dense, *ref.bags()]
    products = [(a * b).sum(1, keepdim=True) for a, b in itertools.combinations(vectors, 2)]
    z = ref.dense("head", ref.perceptron("top", torch.cat([dense, *products], 1), 2))
    assert np.std(ours[:, 1]) > 0.1
    np.testing.assert_allclose(ours[:, 1], z[:, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ours[:, 0], 0)


@pytest.mark.parametrize("structure", ["parallel", "stacked"])
@pytest.mark.parametrize("rank, experts", [(None, 1), (4, 1), (4, 3)])
def test_dcn_v2_is_that_of_the_paper(rows, structure, rank, experts):
    words = {"crosses": 2, "deep": (16,), "structure": structure, "rank": rank, "experts": experts}
    model = DCN(num_classes=2, cardinalities=CARDINALITIES, width=4, **words)
    variables, ours = started(model, rows)
    ref = Torch(variables, rows)
    x0 = x = torch.cat([ref.numbers, *ref.bags()], 1)
    for i in range(2):
        at = ref.params[f"cross_{i}"]
        if rank is None:  # equation 1
            x = x0 * ref.dense("cross", x, at) + x
        elif experts == 1:  # equation 2
            x = x0 * (at["up"]["kernel"].T @ (at["down"]["kernel"].T @ x.T)).T + x0 * at["up"]["bias"] + x
        else:  # equations 3 to 5
            gate = torch.softmax(x @ at["gate"]["kernel"], 1)
            total = x
            for e in range(experts):
                v, c, u = (at[f"{name}_kernel"][e] for name in ("down", "core", "up"))
                total = total + gate[:, e : e + 1] * (x0 * (torch.tanh(torch.tanh(x @ v) @ c) @ u + at["bias"]))
            x = total
    deep = ref.perceptron("deep", x if structure == "stacked" else x0, 1)
    z = ref.dense("head", deep if structure == "stacked" else torch.cat([x, deep], 1))
    assert np.std(ours[:, 1]) > 0.1
    np.testing.assert_allclose(ours[:, 1], z[:, 0], rtol=1e-5, atol=1e-5)


def test_gradients_of_dlrm_are_those_of_torch(rows):
    model = DLRM(num_classes=2, cardinalities=CARDINALITIES, width=8, bottom=(12,), top=(16,))
    variables, _ = started(model, rows)
    label = np.arange(16) % 2

    def loss(variables):
        return -jnp.mean(jax.nn.log_softmax(model.apply(variables, *rows))[np.arange(16), label])

    ours = jax.jit(jax.grad(loss))(variables)["params"]
    ref = Torch(variables, rows)
    jax.tree.map(lambda x: x.requires_grad_(), ref.params)
    dense = ref.perceptron("bottom", ref.numbers, 2)
    vectors = torch.stack([dense, *ref.bags()], 1)
    lower = torch.tril_indices(4, 4, -1)
    products = torch.bmm(vectors, vectors.transpose(1, 2))[:, lower[0], lower[1]]
    order = sorted(range(6), key=lambda k: (int(lower[1][k]), int(lower[0][k])))  # the release goes by rows, ours by
    z = ref.dense("head", ref.perceptron("top", torch.cat([dense, products[:, order]], 1), 1))  # the first of a pair
    torch.nn.functional.binary_cross_entropy_with_logits(z[:, 0], torch.tensor(label, dtype=torch.float32)).backward()
    theirs = jax.tree.map(lambda x: x.grad.numpy(), ref.params)
    assert np.abs(ours["embedding"]["table"]).max() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)


def test_a_code_that_a_column_does_not_have_is_the_unknown_one(rows):
    model = DCN(num_classes=2, cardinalities=CARDINALITIES, width=4, crosses=1, deep=(8,))
    variables, _ = started(model, rows)
    numbers, categories = rows
    beyond, unknown = categories.at[:, :2].set(jnp.array([5, -1])), categories.at[:, :2].set(0)
    assert (categories[:, 1] > 0).any()
    np.testing.assert_array_equal(*(model.apply(variables, numbers, x) for x in (beyond, unknown)))


def test_embeddings_start_as_large_as_the_column_says():
    table = uniform_by_column((4, 100))(jax.random.key(0), (128, 16))
    assert 0.45 < np.abs(table[:4]).max() <= 0.5
    assert 0.095 < np.abs(table[4:104]).max() <= 0.1


@pytest.mark.parametrize("model", [DLRM, DCN, TabularLinear])
def test_models_read_numbers_alone_and_categories_alone(model, rows):
    numbers, categories = rows
    for given, cardinalities in (((numbers, categories[:, :0]), ()), ((numbers[:, :0], categories), CARDINALITIES)):
        out, variables = model(num_classes=2, cardinalities=cardinalities).init_with_output(jax.random.key(0), *given)
        assert out.shape == (16, 2)
        assert np.std(out[:, 1]) > 0.01 or model is TabularLinear  # which begins at zero
        assert all(x.size for x in jax.tree.leaves(variables))  # a checkpoint keeps nothing that is empty


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: DLRM(num_classes=2), "cardinalities are None"),
        (lambda: DCN(num_classes=2, cardinalities=(5, 4)), "knows 2 categories, and is given 3"),
        (lambda: DCN(num_classes=2, cardinalities=CARDINALITIES, structure="both"), "'parallel' or 'stacked'"),
        (lambda: DCN(num_classes=2, cardinalities=CARDINALITIES, experts=2), "needs a rank"),
        (lambda: DLRM(num_classes=2, cardinalities=(2**30, 2**30, 9)), "hash the largest"),
        (lambda: DLRM(num_classes=2, cardinalities=(5,)), "1 category alone"),
        (lambda: DLRM(cardinalities=CARDINALITIES), "num_classes is None"),
    ],
)
def test_what_a_model_cannot_be_is_said(make, said, rows):
    numbers, categories = rows
    if "alone" in said:
        numbers, categories = numbers[:, :0], categories[:, :1]
    with pytest.raises(ModelError, match=said):
        jax.eval_shape(make().init, jax.random.key(0), numbers, categories)


@pytest.mark.parametrize("model", [DLRM, DCN])
def test_one_program_serves_batches_of_every_size(model, rows):
    """As exports have it, whose B is a symbol."""
    built = model(num_classes=2, cardinalities=CARDINALITIES)
    variables = jax.eval_shape(built.init, jax.random.key(0), *rows)
    (size,) = jax.export.symbolic_shape("B")
    shapes = [jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for x in rows]
    assert str(jax.eval_shape(built.apply, variables, *shapes).shape) == "(B, 2)"
