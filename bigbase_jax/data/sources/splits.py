"""Seeded stratified splits, the source of one, and digests of data."""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.core import Batch, Example, Source, UserError


def stratified(
    names: Sequence[Any], labels: np.ndarray, fractions: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
    """Splits examples by class: of n examples a split gets ``round(n * fraction)``, ``train`` the rest.

    An example's place depends on the seed, its name and its class's other examples: another class, more or fewer, moves
    nothing. The first split of ``fractions`` does not depend on the fractions of those after it.

    Args:
      names: the examples' names, or numbers, each once.
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
    rank = np.fromiter((_hash64(f"{seed}/{name}") for name in names), np.uint64, len(names))
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


def by_time(
    time_N: np.ndarray, fractions: Mapping[str, float], moments: Mapping[str, np.datetime64] | None = None
) -> dict[str, np.ndarray]:
    """Splits rows by time: what is earliest is ``train``, then come the others in their order, and the last is latest.

    Rows of one time are in one split, so that nothing of a later split is known in an earlier one.

    Args:
      time_N: of each row, in any order.
      fractions: shares of the rows that the other splits have, such as ``{"val": 0.1, "test": 0.2}``.
      moments: when a split begins, in the place of its share.

    Returns:
      Ascending indices by split, ``train`` first; splits without rows are left out.

    Raises:
      UserError: fractions that leave nothing to train on, or moments that are out of order.
    """
    moments = moments or {}
    shares = {split: 0.0 if split in moments else share for split, share in fractions.items()}
    if not all(0 <= share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        given = " and ".join(f"{split}_fraction={share}" for split, share in fractions.items())
        raise UserError(f"{given} leave nothing to train on; use shares of at least 0 whose sum is below 1.")
    order_N = np.argsort(time_N, kind="stable")
    sorted_N = time_N[order_N]
    cuts, stop, left = {}, len(order_N), len(order_N)
    for split in reversed(list(fractions)):
        if split in moments:
            left = int(np.searchsorted(sorted_N, moments[split]))
        else:
            left -= math.floor(len(order_N) * shares[split] + 0.5)
            left = int(np.searchsorted(sorted_N, sorted_N[left])) if 0 <= left < len(order_N) else left
        if left > stop:
            raise UserError(
                f"the {split} split begins at {moments[split]}, which is after the one behind it; move one."
            )
        cuts[split], stop = (left, stop), left
    if stop <= 0:
        raise UserError("no row is left to train on: the other splits begin before the first time.")
    parts = {"train": (0, stop), **{split: cuts[split] for split in fractions}}
    return {split: np.sort(order_N[a:b]) for split, (a, b) in parts.items() if b > a}


def deal(
    split_N: Sequence[str],
    name_N: Sequence[str],
    fractions: Mapping[str, float],
    seed: int,
    label_N: Sequence[int] | None = None,
) -> list[str]:
    """The split of each row: that of ``train`` is dealt by class, rows of one name (which are equal) to one split.

    Args:
      split_N: as the files say it; what is not ``train`` stays.
      label_N: of rows of several classes with one name, the least counts; None: there are no classes.
    """
    groups: dict[str, list[int]] = {}
    for i, split in enumerate(split_N):
        if split == "train":
            groups.setdefault(name_N[i], []).append(i)
    names = sorted(groups)
    classes = [0 if label_N is None else min(label_N[i] for i in groups[name]) for name in names]
    found = list(split_N)
    for split, chosen in stratified(names, np.array(classes), fractions, seed).items():
        for group in chosen:
            for i in groups[names[group]]:
                found[i] = split
    return found


def also_in_train(split_N: Sequence[str], name_N: Sequence[str]) -> dict[str, int]:
    """How many rows of each other split have the name of a row of ``train``; ``""`` is no split."""
    trained = {name for name, split in zip(name_N, split_N, strict=True) if split == "train"}
    others = Counter(s for n, s in zip(name_N, split_N, strict=True) if s not in ("", "train") and n in trained)
    return dict(sorted(others.items()))


def to_split_off(found: Collection[str], val_fraction: float, test_fraction: float) -> dict[str, float]:
    """The splits that are to be taken from ``train``, by the rule that all data sets share.

    A missing val is always split off; a missing test only where there is nothing but ``train``: whoever keeps a val
    split beside it has the test data elsewhere.
    """
    fractions = {} if {"val", "test"} & set(found) else {"test": test_fraction}
    return fractions if "val" in found else {**fractions, "val": val_fraction}


def split_off(
    found: Collection[str],
    names: Sequence[str] | None,
    labels: np.ndarray,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> dict[str, np.ndarray]:
    """Rows of ``train`` by split, as ``stratified`` deals them; empty where nothing is to be taken from it.

    Args:
      found: the splits that there are.
      names: of the examples of ``train``; None: their numbers.
      labels: of these.
    """
    fractions = to_split_off(found, val_fraction, test_fraction)
    names = [str(i) for i in range(len(labels))] if names is None else names
    return stratified(names, labels, fractions, seed) if fractions else {}


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


class Split:
    """The ``Source`` of one split, whose examples are made as they are asked for.

    Attributes:
      in_memory: where what they are made of is, in words, or whether it is there.
      labels, lengths, sequences, batch: see ``core.Source``.
      packed: see ``data.pipeline.KeptSource``.
    """

    packed = False

    def __init__(
        self,
        split: str,
        size: int,
        example: Callable[[int], Example] | None = None,
        in_memory: str | bool = False,
        labels: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
        sequences: Sequence[str] = (),
        batch: Callable[[np.ndarray], Batch] | None = None,
        name: Callable[[int], str] | None = None,
    ):
        """What is kept in columns has ``batch``, and needs no ``example``; ``name`` None: ``val[17]``."""
        self._split, self._size, self._example, self._namer, self.batch = split, size, example, name, batch
        self.in_memory, self.labels, self.lengths, self.sequences = in_memory, labels, lengths, tuple(sequences)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self._split} has {len(self)} examples; there is no {index}")
        if self._example is None and self.batch is not None:
            return {name: x[0] for name, x in self.batch(np.array([index])).items()}
        return self._example(index)  # type: ignore[misc]

    def name(self, index: int) -> str:
        """What a person calls the example."""
        return self._namer(index) if self._namer else f"{self._split}[{index}]"


def numbered(
    counts: Mapping[str, int],
    example: Callable[[int], Example],
    label: Callable[[np.ndarray], np.ndarray] | None = None,
    name: Callable[[int], str] | None = None,
) -> dict[str, Source]:
    """Splits of a series whose examples are made by their numbers, one split behind the other; empty ones are left out.

    Args:
      label, name: of numbers; None: there are no labels, the names are the splits'.
    """
    splits, start = dict[str, Source](), 0
    for split, count in counts.items():
        if count:
            labels = None if label is None else label(np.arange(start, start + count)).astype(np.int32)
            of, named = (make and functools.partial(_from, start, make) for make in (example, name))
            splits[split] = Split(split, count, of, labels=labels, name=named)
        start += count
    return splits


def _from(start: int, make: Callable[[int], Any], index: int) -> Any:
    return make(start + index)


class Read:
    """What is read as a whole before it has splits. Subclasses say where it comes from."""

    def origin(self) -> str:
        """Where it comes from, in words."""
        raise NotImplementedError

    def file_signature(self) -> list[Any]:
        """What changes when it does, and all that says how to read it."""
        raise NotImplementedError


class Opened:
    """A ``Dataset`` that was read.

    Args:
      about: what its fingerprint depends on.
      rows: what the examples and the splits depend on, where these may be encoded in several ways; None: the same.
    """

    def __init__(
        self,
        splits: Mapping[str, Source],
        dataset_info: Mapping[str, Any],
        description: str,
        about: Sequence[Any],
        rows: Sequence[Any] | None = None,
    ):
        self.splits, self.dataset_info, self.description = splits, dataset_info, description
        self._about, self._rows = about, about if rows is None else rows

    def fingerprint(self) -> str:
        """A digest of the examples, the splits, and how they are encoded."""
        return digest(self._about)

    def examples(self) -> str:
        """A digest of the examples and the splits, however they are encoded."""
        return digest(self._rows)
