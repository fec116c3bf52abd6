"""Verification: error rates against their definitions, the margin against trigonometry, and vectors of voices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.evaluators.verification import Verification
from bigbase_jax.models.bc_resnet import BCResNet
from bigbase_jax.models.ecapa import ECAPA, _statistics
from bigbase_jax.models.margin import CosineHead, unit, with_margin
from bigbase_jax.tasks.metrics import verification
from bigbase_jax.tasks.verification import SpeakerVerification


def drawn(count=2000, apart=2.0):
    rng = np.random.default_rng(0)
    same = rng.random(count) < 0.3
    return rng.standard_normal(count) + apart * same, same


def test_rates_count_what_is_accepted_and_refused():
    score, same = drawn(300)
    score = np.round(score, 1)  # so that some are equal
    thresholds, accepts, rejects = verification.rates(score, same)
    assert len(thresholds) == len(np.unique(score)) + 1 and (np.diff(thresholds) < 0).all()
    for t, a, r in zip(thresholds, accepts, rejects, strict=True):
        assert a == pytest.approx(np.mean(score[~same] >= t)) and r == pytest.approx(np.mean(score[same] < t))
    with pytest.raises(ValueError, match="pairs that are the same"):
        verification.rates(score, np.ones(300, bool))


def test_scores_of_two_normal_distributions():
    score, same = drawn(40_000)
    found = verification.scores(score, same, prior=0.5)
    assert found["eer"] == pytest.approx(0.1587, abs=0.01)  # Phi(-1), half way between both means
    assert found["min_dcf"] == pytest.approx(2 * 0.1587, abs=0.02) and found["threshold"] == pytest.approx(1, abs=0.3)
    perfect = verification.scores(np.array([3, 2, 1, 0.0]), np.array([1, 1, 0, 0]), folds=2)
    assert perfect["eer"] == 0 and perfect["min_dcf"] == 0
    assert verification.scores(-score, same)["eer"] == pytest.approx(0.8413, abs=0.01)


def test_accuracy_of_a_fold_uses_the_threshold_of_the_others():
    score, same = drawn(600)
    folds = np.arange(600) * 10 // 600
    for fold, found in enumerate(verification.accuracies(score, same)):
        rest, here = folds != fold, folds == fold
        tried = np.sort(score[rest])
        right = [np.mean((score[rest] >= t) == same[rest]) for t in tried]
        expected = np.mean((score[here] >= tried[int(np.argmax(right))]) == same[here])
        assert found == pytest.approx(expected, abs=0.035)  # a threshold lies between two scores, not on one
    assert np.mean(verification.accuracies(np.array([1, 1, 0, 0] * 5, float), np.array([1, 1, 0, 0] * 5), 5)) == 1


def test_the_margin_is_added_to_the_angle_of_the_right_class():
    angle = np.array([[0.3, 1.0, 2.0]])
    found = with_margin(jnp.cos(angle), jnp.array([[0.0, 1.0, 0.0]]), 0.2, 30.0)
    np.testing.assert_allclose(found, 30 * np.cos(np.add(angle, [[0, 0.2, 0]])), rtol=1e-5)
    same = with_margin(jnp.cos(angle), jnp.array([[0.0, 1.0, 0.0]]), 0.0, 30.0)
    np.testing.assert_allclose(same, 30 * np.cos(angle), rtol=1e-5)
    far = np.linspace(0, np.pi, 400)[:, None]
    logits = np.asarray(with_margin(jnp.cos(far), jnp.ones((400, 1)), 0.2, 1.0))[:, 0]
    assert (np.diff(logits) < 1e-6).all()  # the farther, the less, also where angle and margin are beyond pi
    gradient = jax.grad(lambda c: with_margin(c, jnp.ones((3, 1)), 0.2, 1.0).sum())(jnp.array([[1.0], [-1.0], [0.0]]))
    assert np.isfinite(gradient).all() and np.isfinite(jax.grad(lambda x: unit(x).sum())(jnp.zeros(4))).all()


def test_attentive_statistics_are_weighted_moments_and_a_constant_is_nothing():
    x = np.random.default_rng(0).standard_normal((2, 9, 3)).astype(np.float32)
    weight = np.random.default_rng(1).dirichlet(np.ones(9), (2, 3)).swapaxes(1, 2).astype(np.float32)
    mean, std = _statistics(jnp.asarray(x), jnp.asarray(weight))
    for b in range(2):
        for c in range(3):
            expected = np.average(x[b, :, c], weights=weight[b, :, c])
            spread = np.average((x[b, :, c] - expected) ** 2, weights=weight[b, :, c]) ** 0.5
            assert mean[b, c] == pytest.approx(expected, abs=1e-5) and std[b, c] == pytest.approx(spread, abs=1e-4)
    model = ECAPA(channels=16, dim=8, parts=4, squeeze=4)
    bands = jax.random.normal(jax.random.key(2), (2, 30, 20, 1))
    variables = model.init(jax.random.key(0), bands)
    louder = bands + jax.random.normal(jax.random.key(3), (1, 1, 20, 1))
    assert np.abs(bands - louder).max() > 1
    np.testing.assert_allclose(model.apply(variables, bands), model.apply(variables, louder), atol=1e-4)


def test_a_task_gives_vectors_of_length_one_and_says_what_it_needs():
    body = ECAPA(channels=16, dim=8, parts=4, squeeze=4)
    task = SpeakerVerification(CosineHead(body, num_classes=2), rate=8000, mels=20)
    batch = {"audio": np.random.default_rng(0).integers(-9000, 9000, (3, 4000)).astype(np.int16)}
    batch |= {"label": np.array([0, 1, 2]), "mask": np.ones(3, np.float32)}  # 2: nobody of the training
    variables = task.init(jax.random.key(0), batch)
    outputs, sums = task.evaluate(variables, batch)
    np.testing.assert_allclose(np.linalg.norm(outputs["vector"], axis=1), 1, atol=1e-5)
    assert sums["accuracy"].weight == 2
    cosine = outputs["vector"] @ unit(variables["params"]["classes"], 0)
    np.testing.assert_allclose(task.logits(variables, batch), cosine, atol=1e-5)
    loss, _ = task.loss(variables, {**batch, "label": np.array([0, 1, 1])}, jax.random.key(1))
    assert np.isfinite(loss.terms["loss"].total)
    with pytest.raises(UserError, match="CosineHead"):
        SpeakerVerification(BCResNet(num_classes=2), rate=8000)


def test_pairs_are_all_or_drawn():
    assert {tuple(pair) for pair in Verification().drawn(5)} == {(i, j) for i in range(5) for j in range(i + 1, 5)}
    some = Verification(most=50).drawn(100)
    assert len(some) <= 50 and (some[:, 0] != some[:, 1]).all()
