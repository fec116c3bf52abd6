"""Contrastive learning: the losses as published, and the same numbers on 1, 2 and 8 devices.

Legend: B examples, C captions, L length, E width of the vectors.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models.meshes import assert_same, spread

from bigbase_jax import parallel
from bigbase_jax.core import UserError
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.clip import CLIP
from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.vit import ViT
from bigbase_jax.tasks import in_batch
from bigbase_jax.tasks.contrastive import Contrastive
from bigbase_jax.wrappers.frozen import Frozen


def task(loss_kind="softmax", **how):
    picture = ViT(width=8, depth=1, heads=2, patch=4, pool="gap")
    text = Bert(11, 6, width=8, depth=1, heads=2, type_vocab_size=1, dropout=0.0)
    bias = {"bias": -2.0} if loss_kind == "sigmoid" else {}
    return Contrastive(CLIP(picture, text, width=8, pool="mean", **bias), length=6, loss_kind=loss_kind, **how)


def batch_of(size, captions=3, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 11, (size, captions, 6)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[:, :, 4:] = 0
    segments[::2, 1:] = 0  # of every other picture there is one caption
    image = rng.integers(0, 256, (size, 8, 8, 3)).astype(np.uint8)
    return {"image": image, "tokens": tokens, "segment_ids": segments, "mask": np.ones(size, np.float32)}


def vectors(size, seed=0):
    u, v = np.random.default_rng(seed).normal(size=(2, size, 5))
    return u / np.linalg.norm(u, axis=1, keepdims=True), v / np.linalg.norm(v, axis=1, keepdims=True)


def test_the_softmax_is_that_of_clip_figure_3():
    u, v = vectors(6)
    score = 7.0 * u @ v.T
    log_p, log_q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (score, score.T))
    want = -(np.diag(log_p) + np.diag(log_q)) / 2
    np.testing.assert_allclose(in_batch.clip(u, v, 7.0, np.ones(6)), want, rtol=1e-5)


def test_the_sigmoid_is_that_of_siglip_algorithm_1():
    u, v = vectors(6)
    score = 7.0 * u @ v.T - 2.0
    want = np.log1p(np.exp(-(2 * np.eye(6) - 1) * score)).sum(1)
    np.testing.assert_allclose(in_batch.sigmoid(u, v, 7.0, -2.0, np.ones(6)), want, rtol=1e-5)


@pytest.mark.parametrize("loss", ["clip", "sigmoid"])
def test_padding_is_no_negative(loss):
    u, v = vectors(6)
    real = np.array([1.0, 1, 1, 1, 0, 0])
    rest = (-2.0,) if loss == "sigmoid" else ()
    whole = getattr(in_batch, loss)(u, v, 7.0, *rest, real)[:4]
    np.testing.assert_allclose(whole, getattr(in_batch, loss)(u[:4], v[:4], 7.0, *rest, np.ones(4)), rtol=1e-5)
    assert not np.allclose(whole, getattr(in_batch, loss)(u, v, 7.0, *rest, np.ones(6))[:4], rtol=1e-3)


def test_the_ring_never_holds_all_scores():
    u, v = (jnp.asarray(x, jnp.float32) for x in vectors(64))

    def loss(u, v):
        return jnp.sum(in_batch.sigmoid(u, v, jnp.float32(7), jnp.float32(-2), jnp.ones(64)))

    want = jax.value_and_grad(loss, (0, 1))(u, v)
    with spread(data=8):
        rows = jax.sharding.PartitionSpec("data")
        step = jax.jit(jax.value_and_grad(loss, (0, 1)), in_shardings=(rows, rows))
        assert_same(jax.device_get(step(u, v)), jax.device_get(want), 1e-4)
        text = step.lower(u, v).compile().as_text()
    assert "collective-permute" in text and "[8,8]" in text
    assert "[64,64]" not in text and "[8,64]" not in text


@pytest.mark.parametrize("loss_kind", [pytest.param("softmax", marks=pytest.mark.slow), "sigmoid"])
def test_the_loss_and_its_gradient_are_those_of_the_whole_batch_on_any_number_of_devices(loss_kind):
    own, batch = task(loss_kind), batch_of(16)
    batch["mask"][-3:] = 0
    found = []
    for devices in (1, 2, 8):
        mesh = parallel.make_mesh(devices)
        program = parallel.program(own, optax.sgd(1.0), batch, mesh, seed=0)  # a step is the gradient
        state = program.init(parallel.put(batch, mesh))
        before = jax.device_get(state.params)
        state, sums = program.step(state, parallel.put(batch, mesh))
        grads = jax.tree.map(lambda a, b: a - np.asarray(b), before, jax.device_get(state.params))
        total, weight = jax.device_get(sums["loss"])
        found.append((total / weight, grads))
    assert max(np.abs(g).max() for g in jax.tree.leaves(found[0][1])) > 1e-3
    for value, grads in found[1:]:
        np.testing.assert_allclose(value, found[0][0], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), grads, found[0][1])
    variables = jax.jit(own.init)(jax.random.key(0), batch)
    halves = [own.loss(variables, {k: x[i : i + 8] for k, x in batch.items()}, None)[0].terms["loss"] for i in (0, 8)]
    mean = sum(float(half.total) for half in halves) / float(batch["mask"].sum())
    assert abs(mean - float(found[0][0])) > 0.1  # half a batch is another loss


def test_what_would_split_a_batch_is_refused():
    mesh = parallel.make_mesh(2)
    with pytest.raises(UserError, match="compares the examples of a batch"):
        parallel.check_step(task(), mesh, "jit", 2)
    with pytest.raises(UserError, match="compares the examples of a batch"):
        parallel.check_step(task(), mesh, "shard_map", 1)


def test_a_caption_is_drawn_of_those_that_there_are():
    own, batch = task(), batch_of(8)
    variables = jax.jit(own.init)(jax.random.key(0), batch)
    losses = {float(own.loss(variables, batch, jax.random.key(k))[0].terms["loss"].total) for k in range(6)}
    assert len(losses) > 1
    batch["tokens"][::2, 1:] = 5  # behind what there is: unread
    again = {float(own.loss(variables, batch, jax.random.key(k))[0].terms["loss"].total) for k in range(6)}
    assert again == losses


def test_lit_trains_texts_alone():
    own, batch = Frozen(task(), r"^(text|text_projection|log_scale)"), batch_of(8)
    variables = jax.jit(own.init)(jax.random.key(0), batch)
    assert set(variables["params"]) == {"text", "text_projection", "log_scale"} and "picture" in variables["frozen"]
    grads = jax.grad(lambda p: own.loss({**variables, "params": p}, batch, jax.random.key(1))[0].terms["loss"].total)(
        variables["params"]
    )
    assert np.abs(grads["text_projection"]["kernel"]).max() > 1e-4


def test_labels_are_the_mean_of_their_templates():
    own = task(templates=("{}", "a {}"), tokenizer=None)
    assert own.label_texts(("cat", "dog")) == ["cat", "a cat", "dog", "a dog"]
    variables = jax.jit(own.init)(jax.random.key(0), batch_of(2))
    texts = {"tokens": np.arange(24).reshape(4, 6) % 11, "segment_ids": np.ones((4, 6), np.int32)}
    texts = {name: x.astype(np.int32) for name, x in texts.items()}
    one = np.asarray(own.items(variables, jax.tree.map(jnp.asarray, texts)))
    mean = one.reshape(2, 2, -1).mean(1)
    want = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    found = own.label_vectors(variables, jax.tree.map(jnp.asarray, texts), 2)
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_mistakes_are_told():
    with pytest.raises(UserError, match="no loss_kind 'sigmod'"):
        task("sigmod")
    with pytest.raises(UserError, match="each has {} once"):
        task(templates=("a photo",))
    with pytest.raises(UserError, match="length of texts"):
        dataclasses.replace(task(), length=None).init(jax.random.key(0), batch_of(2))
    with pytest.raises(ModelError, match="temperature is 0"):
        CLIP(ViT(), Bert(), temperature=0.0)
    with pytest.raises(ModelError, match="vectors of 5, and width is 8"):
        CLIP(ViT(5), Bert(), width=8)
    with pytest.raises(UserError, match="does not know its tokenizer"):
        task().texts(["a"])
