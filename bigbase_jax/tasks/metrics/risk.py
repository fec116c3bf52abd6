"""What decisions by probabilities cost, and whom they meet: of two classes, of which class 1 is the positive one.

Axes: N examples, T thresholds, G groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize, special, stats
from sklearn import isotonic
from sklearn import metrics as sk

from bigbase_jax.core import UserError

KINDS = ("none", "temperature", "isotonic")
"""Of calibration."""
Cost = Sequence[Sequence[float]]
"""What each decision costs: rows are what is true, columns what is decided."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A monotone map from what a model takes for the probability of class 1 to one that can be read as a frequency.

    Attributes:
      temperature: T of ``sigmoid(logit(p) / T)`` (Guo et al. 2017).
      x, y: points between which it is interpolated, where there are any (isotonic: Zadrozny & Elkan 2002).

    Raises:
      UserError: they are no such numbers.
    """

    temperature: float = 1.0
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        try:
            points = np.array([self.x, self.y], np.float64)
            rises = points.ndim == 2 and bool(np.isfinite(points).all() and (np.diff(points) >= 0).all())
            fits = rises and 0 < self.temperature < math.inf and bool(((points >= 0) & (points <= 1)).all())
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise UserError("a calibration is a temperature above 0, and points x, y in [0, 1] that do not fall.")

    def __call__(self, p_N: np.ndarray) -> np.ndarray:
        """f64[N] from f[N]."""
        p_N = np.asarray(p_N, np.float64)
        return np.interp(p_N, self.x, self.y) if self.x else special.expit(special.logit(p_N) / self.temperature)


def calibrated(kind: str, p_N: np.ndarray, positive_N: np.ndarray) -> Calibration:
    """The calibration of a kind that fits these examples, which the model was not trained on.

    The temperature is the one of least log loss. Frequencies of isotonic regression are kept 1 / (N + 2) away from 0
    and 1, which no sample of N can show.
    """
    p_N, positive_N = np.asarray(p_N, np.float64), np.asarray(positive_N, np.float64)
    if kind == "isotonic":
        rest = 1 / (len(p_N) + 2)
        fitted = isotonic.IsotonicRegression(y_min=rest, y_max=1 - rest, out_of_bounds="clip").fit(p_N, positive_N)
        return Calibration(x=tuple(fitted.X_thresholds_.tolist()), y=tuple(fitted.y_thresholds_.tolist()))
    if kind == "none":
        return Calibration()
    tiny = np.finfo(np.float64).tiny
    signed_N = np.where(positive_N > 0, 1, -1) * special.logit(np.clip(p_N, tiny, 1 - np.finfo(np.float64).epsneg))

    def loss(log_temperature: float) -> float:
        return float(np.mean(np.logaddexp(0, -signed_N * math.exp(-log_temperature))))

    found = optimize.minimize_scalar(loss, bounds=(math.log(0.01), math.log(100)), method="bounded")
    return Calibration(temperature=math.exp(found.x))


def bayes_threshold(cost: Cost) -> float:
    """The probability of class 1 from which deciding for it costs less, if probabilities are right (Elkan 2001)."""
    (c00, c01), (c10, c11) = cost
    return (c01 - c00) / (c01 - c00 + c10 - c11)


def cheapest_threshold(p_N: np.ndarray, positive_N: np.ndarray, cost: Cost) -> float:
    """The threshold at which deciding for class 1 where ``p >= threshold`` costs least on these examples; of several,
    the one nearest to ``bayes_threshold``."""
    p_N, positive_N = np.asarray(p_N, np.float64), np.asarray(positive_N, bool)
    level_T, inverse_N = np.unique(p_N, return_inverse=True)
    threshold_T = np.concatenate([[0.0], (level_T[1:] + level_T[:-1]) / 2, [np.nextafter(1, 2)]])
    (c00, c01), (c10, c11) = cost
    dearer_N = np.where(positive_N, c10 - c11, c00 - c01)  # by how much, if it is not decided for
    cost_T = np.concatenate([[0.0], np.cumsum(np.bincount(inverse_N, dearer_N, len(level_T)))])
    best_T = threshold_T[cost_T <= cost_T.min() + 1e-9 * np.abs(dearer_N).sum()]
    return float(best_T[np.argmin(np.abs(best_T - bayes_threshold(cost)))])


def mean_cost(decided_N: np.ndarray, positive_N: np.ndarray, cost: Cost) -> float:
    """What a decision costs on average."""
    return float(np.asarray(cost, np.float64)[np.asarray(positive_N, int), np.asarray(decided_N, int)].mean())


def ks(p_N: np.ndarray, positive_N: np.ndarray) -> float | None:
    """The Kolmogorov-Smirnov statistic of the scores of the two classes: how far apart their distributions are, in
    0..1; None of one class alone."""
    positive_N = np.asarray(positive_N, bool)
    if positive_N.all() or not positive_N.any():
        return None
    return float(stats.ks_2samp(p_N[positive_N], p_N[~positive_N], method="asymp").statistic)


def probability_scores(p_N: np.ndarray, positive_N: np.ndarray) -> dict[str, float | None]:
    """``auc``, ``ks``, ``log_loss`` in nats, and ``brier``, the mean squared error."""
    both = 0 < np.mean(positive_N) < 1
    return {
        "auc": float(sk.roc_auc_score(positive_N, p_N)) if both else None,
        "ks": ks(p_N, positive_N),
        "log_loss": float(sk.log_loss(positive_N, p_N, labels=[0, 1])),
        "brier": float(np.mean((np.asarray(p_N) - positive_N) ** 2)),
    }


def fairness(
    decided_N: np.ndarray, positive_N: np.ndarray, group_N: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """How decisions fall on groups (Hardt, Price & Srebro 2016; the definitions of fairlearn).

    Args:
      decided_N: bool: decided for class 1.
      positive_N: bool: it is class 1.
      group_N: i[N], an index into ``names``; examples whose group is -1 are in none.

    Returns:
      ``groups``: of each that has examples, ``examples``, ``positive`` (its share of class 1), ``selected`` (the share
      decided for), ``true_positive`` and ``false_positive`` (the share decided for of class 1 and of class 0; None
      where there are none). ``demographic_parity_difference``: the largest minus the smallest ``selected``;
      ``equalized_odds_difference``: the larger such difference of the two rates, of the groups that have them; None of
      fewer than two groups.
    """
    decided_N, positive_N = np.asarray(decided_N, bool), np.asarray(positive_N, bool)

    def rate(among_N: np.ndarray) -> float | None:
        return float(decided_N[among_N].mean()) if among_N.any() else None

    groups: dict[str, dict[str, Any]] = {}
    for g, name in enumerate(names):
        of_N = np.asarray(group_N) == g
        if of_N.any():
            groups[name] = {
                "examples": int(of_N.sum()),
                "positive": float(positive_N[of_N].mean()),
                "selected": rate(of_N),
                "true_positive": rate(of_N & positive_N),
                "false_positive": rate(of_N & ~positive_N),
            }

    def spread(rate: str) -> float | None:
        known = [value for group in groups.values() if (value := group[rate]) is not None]
        return float(np.ptp(known)) if len(known) > 1 else None

    odds = [x for x in (spread("true_positive"), spread("false_positive")) if x is not None]
    return {
        "groups": groups,
        "demographic_parity_difference": spread("selected"),
        "equalized_odds_difference": max(odds, default=None),
    }
