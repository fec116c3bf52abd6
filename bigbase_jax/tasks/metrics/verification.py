"""Verification: whether two recordings, or two pictures, are of one person, by a score that is higher where they are.

Legend: P pairs, T thresholds.
"""

from __future__ import annotations

import numpy as np


def rates(score_P: np.ndarray, same_P: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thresholds f64[T], descending from above all scores, and at each the shares of different pairs that are accepted
    (false accepts) and of same pairs that are not (false rejects). A pair is accepted from the threshold on.

    Raises:
      ValueError: there are no pairs of one kind.
    """
    score_P, same_P = np.asarray(score_P, np.float64), np.asarray(same_P, bool)
    if same_P.all() or not same_P.any():
        raise ValueError("verification needs pairs that are the same and pairs that are not.")
    order_P = np.argsort(-score_P, kind="stable")
    score_P, same_P = score_P[order_P], same_P[order_P]
    last_T = np.append(np.flatnonzero(np.diff(score_P)), len(score_P) - 1)  # scores that are equal go together
    accepted_T, right_T = last_T + 1, np.cumsum(same_P)[last_T]
    threshold_T = np.concatenate([[np.inf], score_P[last_T]])
    false_accepts_T = np.concatenate([[0.0], (accepted_T - right_T) / (~same_P).sum()])
    return threshold_T, false_accepts_T, np.concatenate([[1.0], 1 - right_T / same_P.sum()])


def scores(score_P: np.ndarray, same_P: np.ndarray, prior: float = 0.01, folds: int = 10) -> dict[str, float]:
    """``eer``, where false accepts are as many as false rejects (between two thresholds, on the line through both);
    ``min_dcf``, the least cost at a share ``prior`` of same pairs, as part of that of one answer for all (NIST);
    ``accuracy`` of ``accuracies``, its mean, and ``threshold``, at which half the sum of both errors is least."""
    threshold_T, accepts_T, rejects_T = rates(score_P, same_P)
    at = int(np.argmax(accepts_T >= rejects_T))
    gap, before = accepts_T[at] - rejects_T[at], rejects_T[at - 1] - accepts_T[at - 1]
    share = before / (before + gap)
    cost_T = prior * rejects_T + (1 - prior) * accepts_T
    best = int(np.argmin(accepts_T + rejects_T))
    return {
        "eer": float(rejects_T[at - 1] + share * (rejects_T[at] - rejects_T[at - 1])),
        "min_dcf": float(cost_T.min() / min(prior, 1 - prior)),
        "accuracy": float(np.mean(accuracies(score_P, same_P, folds))),
        "threshold": float(threshold_T[best]),
    }


def true_accepts(score_P: np.ndarray, same_P: np.ndarray, far: float) -> float:
    """The share of same pairs that are accepted at the lowest threshold with at most ``far`` false accepts."""
    _, accepts_T, rejects_T = rates(score_P, same_P)
    return float(1 - rejects_T[np.flatnonzero(accepts_T <= far)[-1]])


def accuracies(score_P: np.ndarray, same_P: np.ndarray, folds: int = 10) -> list[float]:
    """Of each fold, pairs in a row as they stand, at the threshold that is best on all others (Huang et al. 2007)."""
    score_P, same_P = np.asarray(score_P, np.float64), np.asarray(same_P, bool)
    fold_P = np.arange(len(score_P)) * folds // len(score_P)
    found = []
    for fold in np.unique(fold_P):
        held_P = fold_P == fold
        order_P = np.argsort(score_P[~held_P], kind="stable")
        score, same = score_P[~held_P][order_P], same_P[~held_P][order_P]
        right = np.concatenate([[same.sum()], same.sum() + np.cumsum(np.where(same, -1, 1))])  # of the n lowest refused
        right[1:-1][np.diff(score) == 0] = -1
        best = int(np.argmax(right))
        edges = np.concatenate([[-np.inf], score, [np.inf]])
        threshold = (edges[best] + edges[best + 1]) / 2 if 0 < best < len(score) else edges[best + (best > 0)]
        found.append(float(np.mean((score_P[held_P] >= threshold) == same_P[held_P])))
    return found
