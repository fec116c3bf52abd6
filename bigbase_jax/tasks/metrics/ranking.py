"""How well items are ranked for users: hits, NDCG, reciprocal rank, recall, coverage and novelty.

A rank counts from 1. Items of equal score share their ranks: half of them count as ahead, so that a model that says
nothing gains nothing. Of NDCG (Jarvelin & Kekalainen 2002), a relevant item at rank r gains 1 / log2(r + 1), and the
ideal has all of them first.

Legend: N users, T relevant items of a user, K places of a list, I items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def of_users(rank_NT: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """f64[N] each: ``hr@k`` (1 where a relevant item is among the first k), ``ndcg@k``, ``recall@k`` (which share of
    the relevant items is among them), and ``mrr`` (1 / the best rank).

    Args:
      rank_NT: integers, ranks of the relevant items, below 1 where there are fewer than T; each user has one at least.
    """
    real_NT = rank_NT > 0
    found: dict[str, np.ndarray] = {}
    count_N = real_NT.sum(1)
    gain_NT = np.where(real_NT, 1 / np.log2(np.maximum(rank_NT, 1) + 1.0), 0)
    ideal_T = np.cumsum(1 / np.log2(np.arange(rank_NT.shape[1]) + 2.0))
    for k in ks:
        hit_NT = real_NT & (rank_NT <= k)
        found[f"hr@{k}"] = np.asarray(hit_NT.any(1), np.float64)
        found[f"ndcg@{k}"] = np.divide((gain_NT * hit_NT).sum(1), ideal_T[np.minimum(count_N, k) - 1])
        found[f"recall@{k}"] = np.divide(hit_NT.sum(1), count_N)
    found["mrr"] = 1 / np.where(real_NT, rank_NT, np.iinfo(np.int64).max).min(1)
    return found


def of_lists(top_NK: np.ndarray, count_I: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """``coverage@k``, the share of all items that are among anybody's first k, and ``novelty@k``, the mean of -log2 of
    these items' shares of the interactions of train, in bits (Vargas & Castells 2011); an item without any has one.

    Args:
      top_NK: items by rank; below 1: there is none.
      count_I: interactions of train with each item; of place 0, which is no item, none.
    """
    share_I, found = np.maximum(count_I, 1) / max(count_I.sum(), 1), {}
    for k in ks:
        listed = top_NK[:, :k][top_NK[:, :k] > 0]
        found[f"coverage@{k}"] = len(np.unique(listed)) / (len(count_I) - 1)
        found[f"novelty@{k}"] = float(-np.log2(share_I[listed]).mean()) if listed.size else 0.0
    return found


def means(of_N: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of each measure, over users."""
    return {name: float(x_N.mean()) for name, x_N in of_N.items()}


def by_activity(activity_N: np.ndarray, groups: int) -> dict[str, np.ndarray]:
    """bool[N] of each group of users, by how many interactions they have: about as many users in each, and users with
    as many interactions in one."""
    borders = np.unique(np.quantile(activity_N, np.arange(1, groups) / groups, method="inverted_cdf"))
    low, most, found = int(activity_N.min()), int(activity_N.max()), {}
    for high in [*borders[borders < most].astype(int).tolist(), most]:
        found[f"{low}" if low == high else f"{low} to {high}"] = (activity_N >= low) & (activity_N <= high)
        low = high + 1
    return found
