"""Losses against numpy and hand-derived gradients; weights, masks and sums; what the report says."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
import sklearn.metrics
from toys import loss_of, measured, sums_of

from bigbase_jax.build import build, target
from bigbase_jax.core import UserError, add
from bigbase_jax.models.mlp import MLP
from bigbase_jax.models.resnet import CifarResNet
from bigbase_jax.models.vit import ViT
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.tasks.metrics.classes import calibration_error

KEY = jax.random.key(0)


class Identity(nn.Module):
    """Logits are the pixels: [B, 1, 1, K] -> [B, K]."""

    @nn.compact
    def __call__(self, x, train=False):
        return x[:, 0, 0]


def batch_of(logits, label, mask=None):
    logits = np.asarray(logits, np.float32)
    mask = np.ones(len(logits), np.float32) if mask is None else np.asarray(mask, np.float32)
    return {"image": logits[:, None, None], "label": np.asarray(label), "mask": mask}


def random_batch(size=12, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    return batch_of(3 * rng.normal(size=(size, classes)), rng.integers(0, classes, size).astype(np.int32))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def reference_loss(kind, z, y):
    """The formulas as they are printed, in float64."""
    if kind == "softmax":
        return -(y * np.log(np.exp(z) / np.exp(z).sum(-1, keepdims=True))).sum(-1)
    if kind == "sigmoid":
        return -(y * np.log(sigmoid(z)) + (1 - y) * np.log(1 - sigmoid(z))).sum(-1)
    return 0.5 * ((sigmoid(z) - y) ** 2).sum(-1)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "squared"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 2.0, 0.0)])
def test_losses_are_the_formulas(kind, smoothing, weights):
    batch = random_batch()
    batch["mask"][-3:] = 0
    task = Classification(Identity(), 4, None, kind, smoothing, weights)
    loss, state = loss_of(task, {"params": {}}, batch, KEY)
    y = np.eye(4)[batch["label"]]
    weight = batch["mask"] * (1.0 if weights is None else np.asarray(weights)[batch["label"]])
    value = reference_loss(kind, batch["image"][:, 0, 0].astype(np.float64), (1 - smoothing) * y + smoothing / 4)
    np.testing.assert_allclose(loss.total, (weight * value).sum(), rtol=1e-5)
    np.testing.assert_allclose(loss.weight, weight.sum(), rtol=1e-6)
    assert state == {}


def test_extreme_logits_stay_finite():
    batch = batch_of([[200.0, -200.0], [-200.0, -200.0]], [1, 0])
    for kind in ("softmax", "sigmoid", "squared"):
        task = Classification(Identity(), 2, loss_kind=kind)
        assert np.isfinite(loss_of(task, {"params": {}}, batch, KEY)[0].total)
        probabilities = task.predict({}, batch)["probabilities"]
        np.testing.assert_allclose(probabilities.sum(-1), 1.0, rtol=1e-6)


def test_squared_loss_gradient_is_backpropagation():
    """Rumelhart, Hinton & Williams 1986: deltas go back through the sigmoids, layer by layer."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(6, 10, 10, 1)).astype(np.float32)
    label = rng.integers(0, 2, 6)
    task = Classification(MLP(2, hidden=(7, 5)), loss_kind="squared")
    batch = {"image": x, "label": label, "mask": np.ones(6, np.float32)}
    params = jax.jit(task.init)(KEY, batch)["params"]
    grads = jax.jit(jax.grad(lambda p: loss_of(task, {"params": p}, batch, KEY)[0].total))(params)

    layers = ["dense_0", "dense_1", "head"]
    activations = [x.reshape(6, 100).astype(np.float64)]
    for name in layers:
        p = jax.tree.map(lambda a: np.asarray(a, np.float64), params[name])
        activations.append(sigmoid(activations[-1] @ p["kernel"] + p["bias"]))
    delta = (activations[-1] - np.eye(2)[label]) * activations[-1] * (1 - activations[-1])
    for i in (2, 1, 0):
        np.testing.assert_allclose(grads[layers[i]]["kernel"], activations[i].T @ delta, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(grads[layers[i]]["bias"], delta.sum(0), rtol=1e-4, atol=1e-5)
        kernel = np.asarray(params[layers[i]]["kernel"], np.float64)
        delta = (delta @ kernel.T) * activations[i] * (1 - activations[i])


def test_pixels_are_normalised_in_the_step():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    task = Classification(MLP(2, hidden=()), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    by_hand = ((image / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.25]).astype(np.float32)
    np.testing.assert_allclose(task.normalise(image), by_hand, rtol=1e-5, atol=1e-6)
    variables = task.init(KEY, {"image": image})
    logits = [task.predict(variables, {"image": x})["logits"] for x in (image, by_hand)]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="int32"):
        task.normalise(image.astype(np.int32))
    with pytest.raises(UserError, match="1 channel"):
        task.normalise(image[..., :1])


def test_padding_changes_nothing_and_metrics_add_up():
    task = Classification(Identity(), 7)
    whole = random_batch(12, 7)
    padded = {name: np.concatenate([x, x[:4]]) for name, x in whole.items()}
    padded["mask"][12:] = 0
    parts = [{name: x[rows] for name, x in whole.items()} for rows in (slice(0, 3), slice(3, 12))]

    def sums(batch):
        return {**sums_of(task, {}, batch), "train": loss_of(task, {"params": {}}, batch, KEY)[0]}

    assert set(sums(whole)) == {"loss", "accuracy", "top5_accuracy", "train"}
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)  # noqa: E731
    jax.tree.map(close, sums(padded), sums(whole))
    jax.tree.map(close, add(*map(sums, parts)), sums(whole))


def test_accuracies_are_counts():
    batch = random_batch(50, 7)
    task = Classification(Identity(), 7)
    found = {name: float(s.mean()) for name, s in sums_of(task, {}, batch).items()}
    ranks = (-batch["image"][:, 0, 0]).argsort(-1)
    assert found["accuracy"] == pytest.approx(np.mean(ranks[:, 0] == batch["label"]))
    assert found["top5_accuracy"] == pytest.approx(np.mean((ranks[:, :5] == batch["label"][:, None]).any(-1)))
    assert found["accuracy"] < found["top5_accuracy"] < 1
    few = random_batch(6, 5)
    assert set(sums_of(task, {}, few)) == {"loss", "accuracy"}


def test_soft_labels_extend_hard_ones():
    task = Classification(Identity(), 4, label_smoothing=0.1, class_weights=(1.0, 2.0, 3.0, 4.0))
    hard = random_batch()
    soft = {**hard, "label": np.eye(4, dtype=np.float32)[hard["label"]]}
    a, b = (loss_of(task, {"params": {}}, batch, KEY)[0] for batch in (hard, soft))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    even = {**hard, "label": np.full((12, 4), 0.25, np.float32)}
    np.testing.assert_allclose(loss_of(task, {"params": {}}, even, KEY)[0].weight, 12 * 2.5, rtol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "squared"])
def test_probabilities(kind):
    batch = random_batch()
    z = batch["image"][:, 0, 0].astype(np.float64)
    scores = np.exp(z) if kind == "softmax" else sigmoid(z)
    found = Classification(Identity(), 4, loss_kind=kind).predict({}, batch)["probabilities"]
    np.testing.assert_allclose(found, scores / scores.sum(-1, keepdims=True), rtol=1e-4)


def test_flip_test_averages_the_mirror_image():
    x = jax.random.normal(KEY, (3, 4, 4, 1))
    plain = Classification(MLP(2, hidden=()))
    variables = plain.init(KEY, {"image": x})
    flipped = dataclasses.replace(plain, flip_test=True)
    a, mirror, b = (
        task.predict(variables, {"image": image})["logits"]
        for task, image in ((plain, x), (plain, x[:, :, ::-1]), (flipped, x))
    )
    assert np.abs(a - mirror).max() > 0.01
    np.testing.assert_allclose(b, (a + mirror) / 2, rtol=1e-5, atol=1e-6)


def test_the_models_state_comes_back_in_the_same_structure():
    task = Classification(CifarResNet(3, 8, 4))
    batch = {"image": np.zeros((4, 8, 8, 3), np.uint8), "label": np.arange(4) % 3, "mask": np.ones(4, np.float32)}
    batch["image"][::2] = 200
    variables = jax.jit(task.init)(KEY, batch)
    state = {name: value for name, value in variables.items() if name != "params"}
    _, new = jax.jit(functools.partial(loss_of, task))(variables, batch, KEY)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert np.abs(new["batch_stats"]["bn1"]["mean"]).max() > 1e-3


def test_dropout_follows_the_key():
    task = Classification(MLP(3, hidden=(32,), dropout=0.5))
    batch = {"image": np.ones((2, 2, 2, 1), np.float32), "label": np.zeros(2, int), "mask": np.ones(2, np.float32)}
    variables = task.init(KEY, batch)
    a, again, b = (float(loss_of(task, variables, batch, jax.random.key(k))[0].total) for k in (1, 1, 2))
    assert a == again != b


def brute_force_auc(positive, score):
    pairs = [(p > n) + 0.5 * (p == n) for p in score[positive] for n in score[~positive]]
    return float(np.mean(pairs))


def report_of(task, p, label):
    report = measured(task, {"logits": np.log(p), "probabilities": p, "label": label})
    return json.loads(json.dumps(report))


@pytest.mark.parametrize("classes", [2, 3])
def test_report_against_brute_force(classes):
    rng = np.random.default_rng(classes)
    label = rng.integers(0, classes, 60)
    p = np.round(rng.dirichlet(np.ones(classes), 60), 1) + np.eye(classes)[label] * 0.3 + 0.1
    p /= p.sum(-1, keepdims=True)
    guess = p.argmax(-1)
    report = report_of(Classification(Identity(), class_names="abc"[:classes]), p, label)
    confusion = [[int(np.sum((label == i) & (guess == j))) for j in range(classes)] for i in range(classes)]
    assert report["confusion_matrix"] == confusion and confusion[0][1] > 0
    scores = []
    for k, name in enumerate("abc"[:classes]):
        true = confusion[k][k]
        precision, recall = true / np.sum(guess == k), true / np.sum(label == k)
        f1 = 2 * precision * recall / (precision + recall)
        scores.append((precision, recall, f1, brute_force_auc(label == k, p[:, k])))
        row = report["per_class"][name]
        assert [row[m] for m in ("precision", "recall", "f1", "auc")] == pytest.approx(scores[-1])
        assert row["support"] == np.sum(label == k)
    macro = np.mean(scores, 0)
    assert [report[m] for m in ("precision", "recall", "f1")] == pytest.approx(macro[:3])
    assert report["auc"] == pytest.approx(scores[1][3] if classes == 2 else macro[3])
    assert report["f1"] == pytest.approx(sklearn.metrics.f1_score(label, guess, average=report["average"]))
    positive = {name: report.get(f"{name}_positive") for name in ("precision", "recall", "f1")}
    if classes == 2:
        found = sklearn.metrics.precision_recall_fscore_support(label, guess, average="binary")
        assert list(positive.values()) == pytest.approx(found[:3]) and report["positive_class"] == "b"
        assert positive["f1"] != report["f1"] and report["auc"] == report["per_class"]["b"]["auc"]
    else:
        assert set(positive.values()) == {None} and "positive_class" not in report


def test_a_class_missing_from_the_split_has_no_auc():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 40)
    label = rng.integers(0, 2, 40)
    task = Classification(Identity(), 3)
    report = report_of(task, p, label)
    assert report["per_class"]["2"]["auc"] is None and report["per_class"]["2"]["support"] == 0
    assert report["auc"] == pytest.approx(np.mean([brute_force_auc(label == k, p[:, k]) for k in (0, 1)]))
    assert report_of(task, p, np.zeros(40, int))["auc"] is None
    diverged = report_of(task, np.full((40, 3), np.nan), label)
    assert diverged["auc"] is None and diverged["calibration_error"] is None


def test_calibration_error_against_brute_force():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3) * 0.5, 200)
    label = rng.integers(0, 3, 200)
    expected = 0.0
    for b in range(15):
        inside = [i for i in range(200) if b / 15 < p[i].max() <= (b + 1) / 15]
        if inside:
            accuracy = np.mean([p[i].argmax() == label[i] for i in inside])
            expected += len(inside) / 200 * abs(accuracy - np.mean([p[i].max() for i in inside]))
    assert calibration_error(p, label) == pytest.approx(expected) and expected > 0.1
    certain = np.eye(3)[label]
    assert calibration_error(certain, label) == 0
    assert calibration_error(certain, (label + 1) % 3) == 1


def test_present_is_what_a_user_reads():
    task = Classification(Identity(), class_names=("cat", "dog"))
    answer = json.loads(json.dumps(task.postprocess({"probabilities": np.array([0.25, 0.75], np.float32)}, {})))
    assert answer == {"label": "dog", "probability": 0.75, "probabilities": {"cat": 0.25, "dog": 0.75}}


def test_counts_come_from_the_data():
    config = target(Classification, model=target(MLP, num_classes=None, hidden=(4,)))
    task = build(config, {"num_classes": 3, "class_names": ("a", "b", "c")})
    assert (task.num_classes, task.model.num_classes, task.class_names) == (3, 3, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"num_classes": 1}, "at least 2"),
        ({"num_classes": 3, "class_names": ("a", "b")}, "num_classes: 3, class_names: 2"),
        ({"num_classes": 3, "class_weights": (1.0,)}, "class_weights: 1"),
        ({"num_classes": 3, "model": MLP(4)}, "model.num_classes: 4"),
        ({"class_names": ("a", "a")}, "repeats"),
        ({"loss_kind": "softmx"}, "Did you mean 'softmax'"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"class_weights": (1.0, -1.0)}, "not negative"),
        ({"std": (0.0,)}, "std above zero"),
    ],
)
def test_mistakes_are_told(arguments, told):
    with pytest.raises(UserError, match=told):
        Classification(**{"model": Identity(), **arguments})


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Identity(), r"shape \(4,\) for 3 classes"),
        (ViT(3, patch=5), "4x4 does not divide into patches of 5x5"),
        (MLP(), "num_classes is None"),
    ],
)
def test_a_model_that_does_not_fit_is_told_before_training(model, told):
    with pytest.raises(UserError, match=told):
        Classification(model, 3).init(KEY, {"image": np.zeros((2, 4, 4, 4), np.uint8)})
