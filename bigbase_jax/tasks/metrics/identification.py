"""Identification: who in a gallery somebody is, and whether anybody there is (ISO/IEC 19795-1).

Legend: Q probes, G people of the gallery, T thresholds, S strangers, who are not in the gallery.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def of_people(score_QN: np.ndarray, person_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[Q,G]: the best score of each person over their photos; and who they are, [G], ascending."""
    people_G, first_G = np.unique(person_N, return_index=True)
    order_N = np.argsort(person_N, kind="stable")
    starts_G = np.searchsorted(np.asarray(person_N)[order_N], people_G)
    return np.maximum.reduceat(score_QN[:, order_N], starts_G, axis=1), np.asarray(person_N)[first_G]


def ranks(score_QG: np.ndarray, right_Q: np.ndarray) -> np.ndarray:
    """i64[Q]: how many people have at least the score of the right one, who is the column ``right_Q``; 1 is best, and
    of those with one score nobody is before the others by chance."""
    own_Q1 = np.take_along_axis(score_QG, np.asarray(right_Q)[:, None], 1)
    return (score_QG >= own_Q1).sum(1)


def scores(rank_Q: np.ndarray, best_Q: np.ndarray, stranger_S: np.ndarray, fpir: float = 0.01) -> dict[str, float]:
    """``rank1``, ``rank5``: the share of known probes whose person is among the first. With strangers, ``fnir``: the
    share of known probes that are missed where at most ``fpir`` of the strangers are taken for somebody, and
    ``threshold``, the score from which on they are.

    Args:
      rank_Q: of ``ranks``.
      best_Q: the best score of each known probe.
      stranger_S: that of each stranger; empty: there is none.
    """
    found = {f"rank{k}": float(np.mean(rank_Q <= k)) for k in (1, 5)}
    if len(stranger_S):
        accepted, missed, threshold = curve(rank_Q, best_Q, stranger_S)
        at = int(np.flatnonzero(accepted <= fpir)[-1])
        found |= {"fnir": float(missed[at]), "threshold": float(threshold[at])}
    return found


def curve(rank_Q: np.ndarray, best_Q: np.ndarray, stranger_S: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At each threshold, descending from above all scores: FPIR, the share of strangers whose best score reaches it,
    FNIR, that of known probes whose person is not first or does not reach it, and the threshold, f64[T] each."""
    threshold_T = np.unique(np.concatenate([best_Q, stranger_S]).astype(np.float64))[::-1]
    hits = np.sort(np.asarray(best_Q, np.float64)[np.asarray(rank_Q) == 1])
    strangers = np.sort(np.asarray(stranger_S, np.float64))
    reached_T = len(hits) - np.searchsorted(hits, threshold_T)
    accepted_T = len(strangers) - np.searchsorted(strangers, threshold_T)
    above = np.nextafter(threshold_T[0], np.inf)
    return (
        np.concatenate([[0.0], accepted_T / max(len(strangers), 1)]),
        np.concatenate([[1.0], 1 - reached_T / max(len(rank_Q), 1)]),
        np.concatenate([[above], threshold_T]),
    )


def first_photos(person_N: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """bool[N]: the first ``count`` photos of everybody who has more; of others, none."""
    person_N = np.asarray(person_N)
    chosen_N = np.zeros(len(person_N), bool)
    for person in np.unique(person_N):
        own = np.flatnonzero(person_N == person)
        if len(own) > count:
            chosen_N[own[:count]] = True
    return chosen_N
