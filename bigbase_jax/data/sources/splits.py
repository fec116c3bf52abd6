"""Seeded stratified splits, and digests of data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from bigbase_jax.core import UserError


def stratified(
    names: Sequence[str], labels: np.ndarray, fractions: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
    """Splits examples by class: of n examples a split gets ``round(n * fraction)``, ``train`` the rest.

    An example's place depends on the seed, its name and its class's other examples: another class, more or fewer, moves
    nothing. The first split of ``fractions`` does not depend on the fractions of those after it.

    Args:
      names: the examples' names, each once.
      labels: their classes, [N].
      fractions: shares of the splits other than ``train``.
      seed: of the order in which examples are dealt.

    Returns:
      Ascending indices by split, ``train`` first; splits without examples are left out.

    Raises:
      UserError: fractions outside [0, 1), or that leave nothing to train on.
    """
    for split, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise UserError(f"{split}_fraction is {fraction}; it must be at least 0 and below 1.")
    if sum(fractions.values()) >= 1:
        given = " and ".join(f"{split}_fraction={fraction}" for split, fraction in fractions.items())
        raise UserError(f"{given} leave nothing to train on; use a sum below 1.")
    parts: dict[str, list[np.ndarray]] = {"train": [], **{split: [] for split in fractions}}
    rank = np.array([_hash64(f"{seed}/{name}") for name in names], np.uint64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        dealt = members[np.argsort(rank[members], kind="stable")]
        start = 0
        for split, fraction in fractions.items():
            stop = min(start + math.floor(len(dealt) * fraction + 0.5), len(dealt) - 1)
            parts[split].append(dealt[start:stop])
            start = stop
        parts["train"].append(dealt[start:])
    joined = {split: np.sort(np.concatenate(part)) for split, part in parts.items() if part}
    return {split: indices for split, indices in joined.items() if indices.size}


def to_split_off(found: Collection[str], val_fraction: float, test_fraction: float) -> dict[str, float]:
    """The splits that are to be taken from ``train``, by the rule that all data sets share.

    A missing val is always split off; a missing test only where there is nothing but ``train``: whoever keeps a val
    split beside it has the test data elsewhere.
    """
    fractions = {} if {"val", "test"} & set(found) else {"test": test_fraction}
    return fractions if "val" in found else {**fractions, "val": val_fraction}


def digest(parts: Iterable[object]) -> str:
    """16 hex digits over arrays (dtype, shape and contents) and the ``repr`` of anything else, in order."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, np.ndarray):
            state.update(f"{part.dtype.str}{part.shape}".encode())
            state.update(np.ascontiguousarray(part).data)
        else:
            state.update(repr(part).encode("utf-8", "surrogateescape") + b"\n")
    return state.hexdigest()


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")
