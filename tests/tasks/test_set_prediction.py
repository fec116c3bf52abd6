"""The set prediction loss: transformers' numbers, the same over devices and microbatches, and what teaches nothing."""

import dataclasses
import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbase_jax import parallel
from bigbase_jax.build import build
from bigbase_jax.core import UserError, flatten
from bigbase_jax.models.boxes import convert
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.detr import DETR, Predictions
from bigbase_jax.models.mlp import MLP
from bigbase_jax.models.rt_detr import RTDETR
from bigbase_jax.models.yolos import YOLOS
from bigbase_jax.tasks.set_prediction import SetPrediction

S, M, C, Q = 32, 4, 3, 6
SMALL = {"num_classes": C, "width": 16, "depth": 1, "decoder_depth": 2, "heads": 2, "mlp_dim": 16, "queries": Q}


@functools.cache
def task(kind="detr", **words):
    backbone = ConvNet(stages=(4, 8, 8, 16))
    models = {
        "detr": lambda: DETR(backbone=backbone, **SMALL),
        "rt_detr": lambda: RTDETR(backbone=backbone, **SMALL, encoder_heads=2, encoder_mlp_dim=16),
        "yolos": lambda: YOLOS(num_classes=C, patch=16, width=12, depth=2, heads=2, grid=(2, 2), queries=Q),
    }
    return SetPrediction(models[kind](), **words)


def batch_of(size, seed=0, **changed):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, S - 15, (size, M, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 15, (size, M, 2))], -1).astype(np.float32)
    here = (np.arange(M) < rng.integers(0, M + 1, (size, 1))).astype(np.float32)  # from none to all
    return {
        "image": rng.integers(0, 256, (size, S, S, 3)).astype(np.uint8),
        "boxes": boxes * here[..., None],
        "classes": (rng.integers(0, C, (size, M)) * here).astype(np.int32),
        "box_mask": here,
        "crowd": np.zeros((size, M), np.float32),
        "scale": np.ones((size, 2), np.float32),
        "offset": np.zeros((size, 2), np.float32),
        "size": np.full((size, 2), S, np.int32),
        "mask": np.ones(size, np.float32),
        **changed,
    }


def total(own, outputs, batch):
    """The training loss of what a model gave."""
    terms = own.terms(outputs, batch)
    return sum(own.scale.get(name, 1.0) * float(np.sum(a) / np.sum(b)) for name, (a, b) in terms.items())


@functools.cache
def labels():
    """(a batch in which each picture has objects, the same as transformers takes it)."""
    import torch

    batch = batch_of(5, seed=3)
    batch["box_mask"][:, 0] = 1
    batch["boxes"][:, 0] = (5, 6, 16, 28)
    found = []
    for boxes, classes, here in zip(batch["boxes"], batch["classes"], batch["box_mask"] > 0, strict=True):
        centred = torch.tensor(convert(boxes[here], "xyxy", "cxcywh") / S)
        found.append({"class_labels": torch.tensor(classes[here]).long(), "boxes": centred})
    return batch, found


@pytest.mark.parametrize("matcher", ["device", "host"])
def test_the_loss_of_detr_is_transformers(matcher):
    torch = pytest.importorskip("torch")
    from transformers import DetrConfig
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    batch, wanted = labels()
    rng = np.random.default_rng(0)
    logits, boxes = rng.normal(size=(3, 5, Q, C + 1)), rng.uniform(0.2, 0.6, (3, 5, Q, 4))
    logits, boxes = logits.astype(np.float32), boxes.astype(np.float32)
    config = DetrConfig(num_labels=C, auxiliary_loss=True)
    a, b = torch.tensor(logits), torch.tensor(boxes)
    theirs = ForObjectDetectionLoss(a[-1], wanted, "cpu", b[-1], config, a, b)[0]
    found = total(task(matcher=matcher), Predictions(jnp.asarray(logits), jnp.asarray(boxes)), batch)
    np.testing.assert_allclose(found, float(theirs), rtol=1e-5)


def test_the_loss_of_rt_detr_is_transformers():
    torch = pytest.importorskip("torch")
    from transformers import RTDetrConfig
    from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

    batch, wanted = labels()
    rng = np.random.default_rng(0)
    logits, boxes = rng.normal(size=(3, 5, Q, C)), rng.uniform(0.2, 0.6, (3, 5, Q, 4))
    logits, boxes = logits.astype(np.float32), boxes.astype(np.float32)
    a, b = torch.tensor(logits).swapaxes(0, 1), torch.tensor(boxes).swapaxes(0, 1)
    theirs = RTDetrForObjectDetectionLoss(
        a[:, -1], wanted, "cpu", b[:, -1], RTDetrConfig(num_labels=C), a[:, 1:], b[:, 1:], a[:, 0], b[:, 0]
    )[0]
    found = total(task("rt_detr"), Predictions(jnp.asarray(logits), jnp.asarray(boxes)), batch)
    np.testing.assert_allclose(found, float(theirs), rtol=1e-5)


@pytest.mark.slow
def test_the_gradient_is_that_of_one_device_over_many_and_with_accumulation():
    batch, found = batch_of(16, mask=np.array([1] * 13 + [0] * 3, np.float32)), []
    for devices, how in [(1, {}), (2, {}), (8, {"mode": "shard_map"}), (1, {"microbatches": 4})]:
        mesh = parallel.make_mesh(devices)
        program = parallel.program(task(), optax.sgd(1.0), batch, mesh, seed=2, **how)
        state = program.init(parallel.put(batch, mesh))
        before = jax.device_get(state.params)
        state, sums = program.step(state, parallel.put(batch, mesh))
        gradient = jax.tree.map(lambda a, b: a - b, before, jax.device_get(state.params))
        found.append({**flatten(gradient), **{name: np.asarray(sums[name].mean()) for name in ("class", "l1", "giou")}})
    for other in found[1:]:
        for name, one in found[0].items():
            np.testing.assert_allclose(other[name], one, rtol=2e-3, atol=2e-5, err_msg=name)
    assert sum(np.abs(x).max() > 1e-4 for x in found[0].values()) > 30


def test_the_terms_of_rt_detr_are_those_of_each_picture_and_of_no_padding():
    own, batch = task("rt_detr", matcher="host"), batch_of(5, seed=1)
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 5, Q, C)), jnp.float32)
    outputs = Predictions(logits, jnp.asarray(rng.uniform(0.2, 0.6, (2, 5, Q, 4)), jnp.float32))
    whole = own.terms(outputs, batch)
    moved = {**batch, "boxes": batch["boxes"] + (1 - batch["box_mask"])[..., None] * (0, 0, 9, 9)}
    for n in range(5):
        one = own.terms(Predictions(*(x[:, n : n + 1] for x in outputs)), {k: x[n : n + 1] for k, x in moved.items()})
        for name, (a, b) in one.items():
            np.testing.assert_allclose([a[0], b[0]], [whole[name][0][n], whole[name][1][n]], rtol=1e-5, err_msg=name)


def test_crowds_and_padding_teach_nothing():
    own, batch = task(matcher="host"), batch_of(3, seed=1)
    batch["box_mask"][:] = 1
    rng = np.random.default_rng(0)
    found = jnp.asarray(rng.uniform(0.2, 0.6, (1, 3, Q, 4)), jnp.float32)
    logits = jnp.asarray(rng.normal(size=(1, 3, Q, C + 1)), jnp.float32)

    def loss(**changed):
        return jnp.stack([a for a, _ in own.terms(Predictions(logits, found), {**batch, **changed}).values()])

    crowd = np.zeros((3, M), np.float32)
    crowd[:, -1] = 1
    fewer = loss(box_mask=1 - crowd)
    elsewhere = {**batch, "boxes": batch["boxes"].copy()}["boxes"]
    elsewhere[:, -1] = 0, 0, 1, 1  # a crowd in which no query is
    np.testing.assert_allclose(loss(crowd=crowd, boxes=elsewhere), fewer, rtol=1e-6)
    elsewhere[:, -1] = 0, 0, S, S  # a crowd around all: only objects' queries are learnt
    ignored = loss(crowd=crowd, boxes=elsewhere)
    assert (ignored[0] < fewer[0] - 1e-2).all() and np.allclose(ignored[1:], fewer[1:])
    none = own.terms(Predictions(logits, found), {**batch, "box_mask": np.zeros((3, M), np.float32)})
    assert all(np.isfinite(a / b).all() for a, b in none.values()) and not none["l1"][0].any()


@pytest.mark.parametrize("kind", ["rt_detr", "yolos"])
def test_what_it_predicts_is_sorted_in_pixels_and_of_one_class_each(kind):
    own, batch = task(kind, keep=8), batch_of(2)
    variables = jax.jit(own.init)(jax.random.key(0), batch)
    found = jax.jit(own.predict)(variables, {"image": batch["image"]})
    assert found["boxes"].shape == (2, 8, 4) and found["classes"].dtype == np.int32
    scores = np.asarray(found["scores"])
    assert (np.diff(scores) <= 0).all() and (scores[:, :Q] > 0).all()
    if kind != "rt_detr":
        assert not scores[:, Q:].any()  # one class each
    boxes = np.asarray(found["boxes"])[scores > 0]
    assert boxes.min() >= 0 and boxes.max() <= S and boxes.max() > 2
    arrays, sums = jax.jit(own.evaluate)(variables, batch)
    assert np.isfinite(sums["loss"].mean()) and arrays["true_classes"].shape == (2, M)


def test_learning_finds_the_objects_of_a_few_pictures():
    own, batch = task(), batch_of(4, seed=5)
    batch["box_mask"][:, 0] = 1
    batch["boxes"][:, 0] = (5, 6, 16, 28)
    mesh = parallel.make_mesh(1)
    program = parallel.program(own, optax.adam(3e-3), batch, mesh)
    state, losses = program.init(parallel.put(batch, mesh)), []
    for _ in range(60):
        state, sums = program.step(state, parallel.put(batch, mesh))
        losses.append(float(sums["l1"].mean()))
    assert losses[-1] < 0.5 * losses[0], losses[::10]


@pytest.mark.parametrize("kind", ["rt_detr", "detr"])
def test_the_recipe_has_a_gradient_of_each_parameter(kind):
    recipe = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "configs" / "detect.py"))
    own, batch = build(recipe["get_config"](f"model={kind},tiny").task), batch_of(2)
    own = dataclasses.replace(own, model=own.model.clone(num_classes=C), num_classes=C)

    def gradient(key):
        variables = own.init(key, batch)

        def loss(params):
            terms = own.loss({**variables, "params": params}, batch, key)[0].terms
            return sum(term.mean() for term in terms.values())

        return variables["params"], jax.grad(loss)(variables["params"])

    params, gradients = jax.eval_shape(gradient, jax.random.key(0))
    assert params == gradients and {"backbone", "decoder_1", "box_head_1" if kind == "rt_detr" else "box_head"} < set(
        params
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": MLP(num_classes=2)}, "a MLP predicts no set"),
        ({"matcher": "greedy"}, "it is one of 'device', 'host'"),
        ({"l1": -1.0}, "none is below 0"),
    ],
)
def test_mistakes_are_one_sentence(change, said):
    with pytest.raises(UserError, match=said):
        SetPrediction(**{"model": task().model, **change})


def test_more_objects_than_queries_are_one_sentence():
    batch = batch_of(2)
    batch |= {name: np.repeat(batch[name], 2, 1) for name in ("boxes", "classes", "box_mask", "crowd")}
    outputs = Predictions(jnp.zeros((1, 2, Q, C + 1)), jnp.full((1, 2, Q, 4), 0.5))
    with pytest.raises(UserError, match="may hold 8 objects, and the model has 6 queries"):
        task().terms(outputs, batch)
