"""SASRec against the paper's formulas written anew in torch, layer by layer; causality; where padding is."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.sasrec import SASRec

V, L, D, H = 11, 6, 16, 2
MODEL = SASRec(num_items=V, length=L, width=D, heads=H)
HISTORY = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 0, 0, 0], [7, 0, 0, 0, 0, 0]], jnp.int32)


@functools.cache
def variables():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), HISTORY)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), jnp.float32), shapes)


def published(params, items, heads=H):
    """Section III of the paper for one history without padding: what the embedding and each block give, and scores."""
    p = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), params)
    encoder = p["encoder"]

    def norm(x, p):
        return F.layer_norm(x, (D,), p["scale"], p["bias"], 1e-6)

    def attention(x, p):
        q, k, v = (torch.einsum("ld,dhk->hlk", x, p[n]["kernel"]) + p[n]["bias"][:, None] for n in names)
        score = q @ k.transpose(-1, -2) / math.sqrt(D // heads)
        later = torch.triu(torch.ones(len(x), len(x), dtype=torch.bool), 1)
        y = torch.softmax(score.masked_fill(later, -torch.inf), -1) @ v
        return torch.einsum("hlk,hkd->ld", y, p["out"]["kernel"]) + p["out"]["bias"]

    def feed_forward(x, p):
        h = torch.relu(x @ p["up"]["kernel"] + p["up"]["bias"])
        return h @ p["down"]["kernel"] + p["down"]["bias"]

    names = ("query", "key", "value")
    x = p["embedding"][items] * math.sqrt(D) + p["position"][L - len(items) :]  # the last item has the last position
    layers = {"embedding": x}
    for i in range(2):
        block = encoder[f"block_{i}"]
        x = x + attention(norm(x, block["norm1"]), block["attention"])
        x = x + feed_forward(norm(x, block["norm2"]), block["mlp"])
        layers[f"block_{i}"] = x
    layers["norm"] = norm(x, encoder["norm"])
    return layers, layers["norm"] @ p["embedding"].T


@pytest.mark.parametrize("before", [False, True])
def test_every_layer_is_the_papers(before):
    history = [row[row > 0] for row in np.asarray(HISTORY)]
    padded = np.stack([np.pad(row, (L - len(row), 0) if before else (0, L - len(row))) for row in history])
    apply = jax.jit(functools.partial(MODEL.apply, capture_intermediates=True, mutable="intermediates"))
    logits, kept = apply(variables(), jnp.asarray(padded))
    encoder = kept["intermediates"]["encoder"]
    for row, (items, real) in enumerate(zip(history, padded > 0, strict=True)):
        layers, scores = published(variables()["params"], items)
        for name in ("block_0", "block_1", "norm"):
            ours = encoder[name]["__call__"][0][row][real]
            np.testing.assert_allclose(ours, layers[name], rtol=1e-4, atol=1e-4, err_msg=f"{name} of {items}")
        np.testing.assert_allclose(logits[row][real], scores, rtol=1e-4, atol=1e-4)


def test_a_place_sees_itself_and_what_is_before_it():
    def at(embedding, place):
        params = {**variables()["params"], "embedding": embedding}
        return jnp.sum(MODEL.apply({"params": params}, HISTORY[:1], method="hidden")[0, place] ** 2)

    gradient = jax.jit(jax.grad(at))
    embedding = variables()["params"]["embedding"]
    for place in (0, 2, 5):
        seen = set(np.flatnonzero(np.abs(gradient(embedding, place)).sum(1)).tolist())
        assert seen == set(HISTORY[0, : place + 1].tolist())


def test_a_history_that_is_too_long_is_refused():
    with pytest.raises(ModelError, match="a history of 7 items is longer than the 6 of the model"):
        MODEL.apply(variables(), jnp.ones((1, 7), jnp.int32))
    with pytest.raises(ModelError, match="num_items is None"):
        SASRec(length=4).init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))
