"""Seeded, stratified splits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bigbase_jax.core import UserError


def stratified(labels: np.ndarray, fractions: Sequence[float], seed: int) -> list[np.ndarray]:
    """Splits examples into the rest and one part per fraction, each class in proportion.

    Args:
      labels: i32[N], the class of each example.
      fractions: of the whole, each in [0, 1), their sum below 1.
      seed: of the choice; a class's split depends on the seed, its number and its own examples only.

    Returns:
      Sorted indices: of the rest, then of each part. A part gets ``round(fraction * n)`` of a class's n examples, but
      not its last one.

    Raises:
      UserError: a fraction out of range.
    """
    if any(not 0 <= f < 1 for f in fractions) or sum(fractions) >= 1:
        raise UserError(f"split fractions {tuple(fractions)} must lie in [0, 1) and leave something to train on.")
    parts: list[list[np.ndarray]] = [[] for _ in range(len(fractions) + 1)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng((seed, int(label))).permutation(members)
        start = 0
        for i, fraction in enumerate(fractions):
            count = min(round(fraction * len(members)), len(members) - 1 - start)
            parts[i + 1].append(order[start : start + count])
            start += count
        parts[0].append(order[start:])
    return [np.sort(np.concatenate(part)) if part else np.empty(0, np.int64) for part in parts]
