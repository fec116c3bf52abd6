"""Training examples that may or may not be trained on, by a coin each, so that what a model has kept can be audited."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bigbase_jax.core import Codec, Dataset, RawDataset, Source, UserError
from bigbase_jax.data.sources.splits import Opened, Split


@dataclasses.dataclass(frozen=True)
class Canaries:
    """``dataset``, of whose training examples ``count`` are canaries (Steinke, Nasr & Jagielski 2023): half of them, as
    coins fall, stay in ``train``, the others are left out. All are in a split ``canary``, whose examples have an entry
    ``member``, f32[]: 1 for those in ``train``. ``evaluators.membership.Membership`` audits by them.

    Attributes:
      dataset: the data set.
      count: of the canaries.
      wrong: whether each gets another label than its own, drawn at random, which a model has to learn by heart.
      seed: of the coins, of the choice and of the labels.
      coins: another seed of the coins alone, as runs have by which an audit is calibrated.

    Raises:
      UserError: no canary, or (from ``prepare``) more than there are examples, or no labels that could be wrong.
    """

    dataset: Any
    count: int = 1000
    wrong: bool = True
    seed: int = 0
    coins: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"Canaries has count={self.count}; an audit needs some hundred.")

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Dataset:
        """The data set with its canaries."""
        inner = self.dataset
        while isinstance(inner, RawDataset):
            inner = inner.prepare(cache, limit_bytes, say)
        return _planted(inner, self)

    def codec(self, config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """The data set's own."""
        found: Codec = self.dataset.codec(config["dataset"], dataset_info)
        return found


def _planted(dataset: Dataset, how: Canaries) -> Opened:
    train = dataset.splits["train"]
    if how.count > len(train):
        raise UserError(f"there are {len(train)} training examples, of which {how.count} cannot be canaries.")
    rng = np.random.default_rng([how.seed, how.count])
    chosen = np.sort(rng.choice(len(train), how.count, replace=False))
    coins = rng.random(how.count)
    if how.coins is not None:
        coins = np.random.default_rng([how.seed, how.count, how.coins]).random(how.count)
    member = coins < 0.5
    labels = _labels(train)
    if how.wrong:
        classes = dataset.dataset_info.get("num_classes", 0)
        if labels is None or classes < 2:
            raise UserError("these examples have no class that could be a wrong one; use Canaries(wrong=False).")
        labels = labels.copy()
        labels[chosen] = (labels[chosen] + rng.integers(1, classes, how.count)) % classes
    stays = np.ones(len(train), bool)
    stays[chosen[~member]] = False
    kept = _some(train, np.flatnonzero(stays), labels, how.wrong)
    canary = _some(train, chosen, labels, how.wrong, member.astype(np.float32))
    kind = "examples with wrong labels" if how.wrong else "examples"
    words = f"{dataset.description}; {how.count:,} {kind} are canaries, {member.sum():,} of them trained"
    about = [dataset.fingerprint(), how.count, how.wrong, how.seed, *([] if how.coins is None else [how.coins])]
    return Opened({**dataset.splits, "train": kept, "canary": canary}, dataset.dataset_info, words, about)


def _some(
    source: Source, indices: np.ndarray, labels: np.ndarray | None, wrong: bool, member: np.ndarray | None = None
) -> Split:
    """Some examples of a source with these labels of all, perhaps told whether they are trained on."""
    label_n, lengths = None if labels is None else labels[indices], getattr(source, "lengths", None)
    batch, called = getattr(source, "batch", None), getattr(source, "name", lambda index: f"[{index}]")

    def told(example: dict[str, Any], index: Any) -> dict[str, Any]:
        more = {"label": label_n[index]} if wrong and label_n is not None else {}
        return {**example, **more, **({} if member is None else {"member": member[index]})}

    found = Split(
        "train",
        len(indices),
        lambda index: told(source[int(indices[index])], index),
        getattr(source, "in_memory", False),
        label_n,
        None if lengths is None else np.asarray(lengths)[indices],
        getattr(source, "sequences", ()),
        None if batch is None else lambda some: told(batch(indices[some]), some),
        lambda index: str(called(int(indices[index]))),
    )
    found.packed = getattr(source, "packed", False)
    return found


def _labels(source: Source) -> np.ndarray | None:
    labels = getattr(source, "labels", None)
    return None if labels is None else np.asarray(labels)
