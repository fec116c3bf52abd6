"""Drift: the tests against scipy and each other, the stated rate of false alarms, and that changes are found."""

import numpy as np
import pytest
from scipy import stats

from bigbase_jax.ops import drift as module
from bigbase_jax.ops.drift import drift, mmd, psi
from bigbase_jax.ops.features import CLASS, CONFIDENCE, features


def sample(rng, n, shift=0.0, turn=0.0, classes=(0.7, 0.2, 0.1)):
    """Two inputs that depend on each other by ``turn``, a class and a confidence."""
    x, y = rng.normal(size=(2, n))
    return {
        "input.x.0": x + shift,
        "input.x.1": turn * x + np.sqrt(1 - turn**2) * y,
        CLASS: rng.choice(3, n, p=classes).astype(float),
        CONFIDENCE: rng.beta(5, 2, n),
    }


def test_false_alarms_are_as_rare_as_is_said():
    """200 pages on which nothing has changed; at a rate of 10 %, 20 of them may sound an alarm, and 34 do so once in a
    thousand such tests."""
    rng, rate, pages = np.random.default_rng(0), 0.1, 200
    alarms = {"page": 0, **dict.fromkeys(("KS", "PSI", "MMD"), 0)}
    for seed in range(pages):
        tests = drift(sample(rng, 80), sample(rng, 50), rate, seed)
        assert len(tests) == 5
        alarms["page"] += any(test.alarm for test in tests.values())
        for test in tests.values():
            alarms[test.method] += test.p < rate
    most = int(stats.binom.isf(1e-3, pages, rate))
    assert most == 34
    assert 2 <= alarms["page"] <= most, alarms
    assert alarms["PSI"] <= most and alarms["MMD"] <= most and alarms["KS"] <= 3 * most, alarms
    assert alarms["PSI"] >= 5 and alarms["MMD"] >= 5 and alarms["KS"] >= 20, alarms  # the p-values are no idle ones


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"shift": 1.0}, {"input.x.0", "inputs"}),
        ({"turn": 0.95}, {"inputs"}),  # each input is as it was, but not both together
        ({"classes": (0.3, 0.3, 0.4)}, {CLASS}),
        ({}, set()),
    ],
)
def test_a_change_is_found_where_it_is(change, found):
    rng = np.random.default_rng(1)
    tests = drift(sample(rng, 400), sample(rng, 300, **change))
    assert {name for name, test in tests.items() if test.alarm} == found, tests


def test_psi_and_mmd_are_what_their_papers_say():
    a, b = np.array([50, 30, 20]), np.array([30, 30, 40])
    p, q = a / 100, b / 100
    assert psi(a, b) == pytest.approx(stats.entropy(p, q) + stats.entropy(q, p))
    assert psi(a, a) == 0 and np.isfinite(psi(a, np.array([100, 0, 0])))
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(30, 2)), rng.normal(size=(40, 2)) + 1
    value, p = mmd(x, y, 200, rng)
    both = np.concatenate([x, y])
    both = (both - both.mean(0)) / both.std(0)
    distance = ((both[:, None] - both) ** 2).sum(-1)
    kernel = np.exp(-distance / np.median(distance[distance > 0]))
    expected = kernel[:30, :30].mean() + kernel[30:, 30:].mean() - 2 * kernel[:30, 30:].mean()
    assert value == pytest.approx(expected) and p == pytest.approx(1 / 201)


def test_what_cannot_be_tested_is_left_out():
    rng = np.random.default_rng(3)
    reference, live = sample(rng, 100), sample(rng, 100)
    live["input.new"] = rng.normal(size=100)
    live["input.x.0"] = np.full(100, np.nan)
    reference["constant"] = live["constant"] = np.ones(100)
    tests = drift(reference, live)
    assert set(tests) == {"input.x.1", CLASS, CONFIDENCE, "constant"} and tests["constant"].p == 1
    assert drift(reference, {name: x[: module.LEAST - 1] for name, x in live.items()}) == {}


def test_features_tell_inputs_apart_and_not_what_they_hold():
    rng = np.random.default_rng(4)
    picture = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
    output = {"probabilities": np.array([0.2, 0.8])}
    plain, dark, smooth = (features({"image": x}, output) for x in (picture, picture // 2, np.full_like(picture, 100)))
    assert dark["input.image.mean"] < plain["input.image.mean"]
    assert smooth["input.image.roughness"] == 0 < plain["input.image.roughness"]
    assert plain[CLASS] == 1 and plain[CONFIDENCE] == pytest.approx(0.8)
    text = features({"tokens": np.array([5, 6, 5, 0, 0], np.int32)}, {"scores": np.ones((2, 3))})
    assert text == {
        "input.tokens.length": 3,
        "input.tokens.distinct": pytest.approx(2 / 3),
        "output.scores.mean": 1,
        "output.scores.deviation": 0,
    }
    assert features({"x": np.array([1.5, np.nan])}, {})["input.x.0"] == 1.5
