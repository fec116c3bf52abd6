"""How well one label out of K is told.

Axes: N examples, K classes, B bins of confidence.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import metrics as sk

CALIBRATION_BINS = 15


def scores(p_NK: np.ndarray, label_N: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """``precision``, ``recall``, ``f1``, ``auc``, ``calibration_error``, ``confusion_matrix`` and ``per_class``.

    Precision, recall and F1 are macro averages over the classes that occur among labels or predictions (as
    scikit-learn's ``average="macro"``), 0 where undefined, and ``average`` says so. Of two classes, class 1 is the
    ``positive_class``, of which ``precision_positive``, ``recall_positive``, ``f1_positive`` (scikit-learn's
    ``average="binary"``) and ``auc`` are. Otherwise ``auc`` is the mean one-vs-rest AUC of the classes that have an
    AUC: a class without examples, or without others beside it, has None. Rows of the confusion matrix are true classes.
    """
    labels = np.arange(len(names))
    auc_K = [_auc(label_N == k, p_NK[:, k]) for k in labels]
    known = [auc for auc in auc_K if auc is not None]
    of = functools.partial(sk.precision_recall_fscore_support, label_N, p_NK.argmax(-1), zero_division=0)
    precision, recall, f1, _ = of(average="macro")
    columns = of(labels=labels)
    positive: dict[str, Any] = {}
    if len(names) == 2:
        named = zip(("precision", "recall", "f1"), columns, strict=False)
        positive = {f"{name}_positive": float(of_class[1]) for name, of_class in named}
        positive["positive_class"] = names[1]
    return {
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "average": "macro",
        **positive,
        "auc": auc_K[1] if len(names) == 2 else float(np.mean(known)) if known else None,
        "calibration_error": calibration_error(p_NK, label_N),
        "confusion_matrix": confusion(p_NK, label_N),
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "auc": auc, "support": int(n)}
            for name, p, r, f, n, auc in zip(names, *columns, auc_K, strict=True)
        },
    }


def confusion(p_NK: np.ndarray, label_N: np.ndarray) -> list[list[int]]:
    """How often each true class (rows) was called each class (columns)."""
    found: list[list[int]] = sk.confusion_matrix(label_N, p_NK.argmax(-1), labels=np.arange(p_NK.shape[-1])).tolist()
    return found


def calibration_error(p_NK: np.ndarray, label_N: np.ndarray) -> float | None:
    """The expected calibration error (Guo et al. 2017, equation 3), by the bins of ``bin_of``.

    None where a probability is not finite.
    """
    if not np.isfinite(p_NK).all():
        return None
    gap_N = (p_NK.argmax(-1) == label_N) - p_NK.max(-1)
    return float(np.abs(np.bincount(bin_of(p_NK), gap_N, minlength=CALIBRATION_BINS)).sum() / len(label_N))


def bin_of(p_NK: np.ndarray) -> np.ndarray:
    """i[N]: the bin of each confidence, of equal ones (low, high]."""
    return np.clip(np.ceil(p_NK.max(-1) * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)


def _auc(positive_N: np.ndarray, score_N: np.ndarray) -> float | None:
    if positive_N.all() or not positive_N.any() or not np.isfinite(score_N).all():
        return None
    return float(sk.roc_auc_score(positive_N, score_N))
