"""Training examples that may or may not be trained on, by a coin each, so that what a model has kept can be audited."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bigbase_jax.core import Codec, Dataset, Example, RawDataset, Source, UserError
from bigbase_jax.data.sources.splits import digest


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

    Raises:
      UserError: no canary, or (from ``prepare``) more than there are examples, or no labels that could be wrong.
    """

    dataset: Any
    count: int = 1000
    wrong: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"Canaries has count={self.count}; an audit needs some hundred.")

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Dataset:
        """The data set with its canaries."""
        inner = self.dataset
        while isinstance(inner, RawDataset):
            inner = inner.prepare(cache, limit_bytes, say)
        return Planted(inner, self)

    def codec(self, config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """The data set's own."""
        found: Codec = self.dataset.codec(config["dataset"], dataset_info)
        return found


class Planted:
    """A ``Dataset`` with canaries; see ``Canaries``."""

    def __init__(self, dataset: Dataset, how: Canaries):
        train = dataset.splits["train"]
        if how.count > len(train):
            raise UserError(f"there are {len(train)} training examples, of which {how.count} cannot be canaries.")
        rng = np.random.default_rng([how.seed, how.count])
        chosen = np.sort(rng.choice(len(train), how.count, replace=False))
        member = rng.random(how.count) < 0.5
        labels = _labels(train)
        if how.wrong:
            classes = dataset.dataset_info.get("num_classes", 0)
            if labels is None or classes < 2:
                raise UserError("these examples have no class that could be a wrong one; use Canaries(wrong=False).")
            labels = labels.copy()
            labels[chosen] = (labels[chosen] + rng.integers(1, classes, how.count)) % classes
        stays = np.ones(len(train), bool)
        stays[chosen[~member]] = False
        self._dataset, self._how = dataset, how
        canary = _Some(train, chosen, labels if how.wrong else None, member.astype(np.float32))
        self.splits: Mapping[str, Source] = {
            **dataset.splits,
            "train": _Some(train, np.flatnonzero(stays), labels if how.wrong else None),
            "canary": canary,
        }
        self.dataset_info = dataset.dataset_info
        kind = "examples with wrong labels" if how.wrong else "examples"
        self.description = f"{dataset.description}; {how.count:,} {kind} are canaries, {member.sum():,} of them trained"

    def fingerprint(self) -> str:
        how = self._how
        return digest([self._dataset.fingerprint(), how.count, how.wrong, how.seed])


class _Some:
    """Some examples of a source, perhaps with other labels, perhaps told whether they are trained on."""

    def __init__(
        self, source: Source, indices: np.ndarray, labels: np.ndarray | None, member: np.ndarray | None = None
    ):
        self._source, self._indices, self._member = source, indices, member
        self._relabelled = None if labels is None else labels[indices]
        own = _labels(source)
        self.labels = self._relabelled if labels is not None else None if own is None else own[indices]
        lengths = getattr(source, "lengths", None)
        self.lengths = None if lengths is None else np.asarray(lengths)[indices]
        self.sequences: tuple[str, ...] = getattr(source, "sequences", ())
        self.packed = getattr(source, "packed", False)
        self.in_memory = getattr(source, "in_memory", False)
        self.batch = None if getattr(source, "batch", None) is None else self._batch

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._told(dict(self._source[int(self._indices[index])]), index)

    def _batch(self, indices: np.ndarray) -> dict[str, Any] | None:
        found = self._source.batch(self._indices[indices])  # type: ignore[attr-defined]
        return None if found is None else self._told(dict(found), indices)

    def _told(self, example: dict[str, Any], index: Any) -> dict[str, Any]:
        if self._relabelled is not None:
            example["label"] = self._relabelled[index]
        if self._member is not None:
            example["member"] = self._member[index]
        return example

    def name(self, index: int) -> str:
        name = getattr(self._source, "name", None)
        return str(name(int(self._indices[index]))) if name else f"[{self._indices[index]}]"


def _labels(source: Source) -> np.ndarray | None:
    labels = getattr(source, "labels", None)
    return None if labels is None else np.asarray(labels)
