"""Calibration, thresholds, KS and fairness against scikit-learn, scipy's optimum, brute force and cases by hand."""

import numpy as np
import pytest
from scipy import special
from sklearn import linear_model
from sklearn import metrics as sk

from bigbase_jax.core import UserError
from bigbase_jax.tasks.metrics import risk

RNG = np.random.default_rng(0)
LOGIT_N = RNG.normal(0, 2, 4000)
POSITIVE_N = RNG.random(4000) < special.expit(LOGIT_N)
SURE_N = special.expit(2.5 * LOGIT_N)  # 2.5 times too sure


def test_the_temperature_is_the_one_that_was_too_low():
    found = risk.calibrated("temperature", SURE_N, POSITIVE_N)
    slope = linear_model.LogisticRegression(C=np.inf, fit_intercept=False).fit(2.5 * LOGIT_N[:, None], POSITIVE_N).coef_
    assert found.temperature == pytest.approx(1 / slope.item(), rel=1e-3)
    assert found.temperature == pytest.approx(2.5, rel=0.1) and not found.x
    before, after = (risk.probability_scores(p, POSITIVE_N) for p in (SURE_N, found(SURE_N)))
    assert after["log_loss"] < before["log_loss"] - 0.1 and after["auc"] == pytest.approx(before["auc"], abs=1e-12)


def test_isotonic_calibration_gives_frequencies_and_never_certainty():
    found = risk.calibrated("isotonic", SURE_N, POSITIVE_N)
    p_N = found(SURE_N)
    assert p_N.mean() == pytest.approx(POSITIVE_N.mean(), abs=1e-3)
    for level in np.unique(p_N)[1:-1]:  # each step holds just as many positives as it says
        assert POSITIVE_N[p_N == level].mean() == pytest.approx(level, abs=1e-9)
    assert np.all(np.diff(p_N[np.argsort(SURE_N)]) >= 0) and 0 < p_N.min() < p_N.max() < 1
    separable = risk.calibrated("isotonic", np.array([0.1, 0.2, 0.8]), np.array([0, 0, 1]))
    assert separable(np.array([0.0, 1.0])).tolist() == pytest.approx([0.2, 0.8])  # 1 / (3 + 2) away


BROKEN = (
    {"temperature": 0.0},
    {"temperature": float("nan")},
    {"temperature": "hot"},
    {"x": (0.0, 1.0)},
    {"x": (0.0, 1.0), "y": (1.0, 0.5)},
    {"x": (0.0, 1.0), "y": (0.5, 2.0)},
    {"x": ("a", "b"), "y": (0.0, 1.0)},
    {"x": 3},
)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_calibration_from_elsewhere_is_checked(broken):
    with pytest.raises(UserError, match="a calibration is"):
        risk.Calibration(**broken)


@pytest.mark.parametrize("cost", [((0, 1), (5, 0)), ((0, 1), (1, 0)), ((-1, 2), (3, -2))])
def test_no_threshold_is_cheaper_on_the_same_examples(cost):
    p_N, positive_N = SURE_N[:60].round(1), POSITIVE_N[:60]  # with ties
    found = risk.cheapest_threshold(p_N, positive_N, cost)
    costs = {t: risk.mean_cost(p_N >= t, positive_N, cost) for t in np.linspace(0, 1.1, 221)}
    assert risk.mean_cost(p_N >= found, positive_N, cost) == pytest.approx(min(costs.values()))
    assert min(costs.values()) < max(costs.values())
    truth_N = special.expit(LOGIT_N)
    assert risk.cheapest_threshold(truth_N, POSITIVE_N, cost) == pytest.approx(risk.bayes_threshold(cost), abs=0.08)


def test_costs_by_hand():
    cost = ((0, 1), (5, 0))
    assert risk.bayes_threshold(cost) == pytest.approx(1 / 6)
    assert risk.mean_cost([True, False, True, False], [True, True, False, False], cost) == (0 + 5 + 1 + 0) / 4
    assert risk.cheapest_threshold([0.1, 0.2, 0.3], [False, False, False], cost) > 0.3  # nobody
    assert risk.cheapest_threshold([0.1, 0.2, 0.3], [True, False, True], cost) < 0.1  # all: 1 is less than 5


def test_ks_is_the_largest_distance_of_the_roc_curve_from_the_diagonal():
    fpr_T, tpr_T, _ = sk.roc_curve(POSITIVE_N, SURE_N, drop_intermediate=False)
    assert risk.ks(SURE_N, POSITIVE_N) == pytest.approx(np.max(tpr_T - fpr_T)) and risk.ks(SURE_N, POSITIVE_N) > 0.3
    assert risk.ks(SURE_N, np.ones(4000, bool)) is None
    assert risk.probability_scores(SURE_N, np.ones(4000, bool))["auc"] is None


def test_fairness_by_hand():
    decided = np.array([1, 1, 0, 0, 1, 0, 0, 0, 1, 1])
    positive = np.array([1, 0, 1, 0, 1, 1, 0, 0, 0, 1])
    group = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, -1])
    found = risk.fairness(decided, positive, group, ("a", "b", "c", "empty"))
    assert found["groups"]["a"] == {
        "examples": 4, "positive": 0.5, "selected": 0.5, "true_positive": 0.5, "false_positive": 0.5,
    }  # fmt: skip
    assert found["groups"]["b"]["selected"] == 0.25 and found["groups"]["b"]["false_positive"] == 0
    assert found["groups"]["c"]["true_positive"] is None and set(found["groups"]) == {"a", "b", "c"}
    assert found["demographic_parity_difference"] == 0.75 and found["equalized_odds_difference"] == 1.0
    one = risk.fairness(decided, positive, np.zeros(10, int), ("a",))
    assert one["demographic_parity_difference"] is None is one["equalized_odds_difference"]
