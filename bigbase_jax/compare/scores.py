"""Scores of single examples from the predictions that an evaluation has kept, and what tells that two are of the same.

Axes: N = examples of a split, K = classes, L = positions of an example.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import zipfile
from typing import NamedTuple

import numpy as np

from bigbase_jax.compare.runs import Run

ACCURACY = "accuracy"
_BROKEN = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)


class Score(NamedTuple):
    """A metric by example: over any of them it is the sum of ``total_N`` by the sum of ``weight_N``.

    Attributes:
      total_N, weight_N: f64[N].
    """

    total_N: np.ndarray
    weight_N: np.ndarray

    @property
    def yes_or_no(self) -> bool:
        """Whether each example is simply right or wrong."""
        return bool(np.all(self.weight_N == 1) and np.isin(self.total_N, (0, 1)).all())

    def mean(self) -> float:
        """Over all examples."""
        return float(self.total_N.sum() / max(self.weight_N.sum(), 1e-300))


@dataclasses.dataclass(frozen=True)
class Scored:
    """The examples of an evaluation.

    Attributes:
      scores: by metric.
      number: N.
      examples: the fingerprint of the data, however it was encoded.
      labels, places: digests of what is to be predicted, and of which examples of the split they are.
    """

    scores: dict[str, Score]
    number: int
    examples: str | None
    labels: str
    places: str

    @property
    def same_as(self) -> tuple[int, str | None, str, str]:
        """Equal for evaluations on the same examples."""
        return (self.number, self.examples, self.labels, self.places)


def read(run: Run, split: str) -> Scored | str:
    """The scores of a run's examples; else a sentence that says why there are none.

    Where ``predictions-SPLIT.npz`` holds ``probabilities`` [N,K] and ``label`` [N] (or soft, [N,K]): ``accuracy``, and
    ``log_loss`` for hard labels, in nats. Where it holds ``log_probability`` and ``target`` [N,L], in which a negative
    target means none: ``loss`` in nats per target, with ``bytes`` [N,L] ``bits_per_byte``, and with ``correct`` [N,L]
    ``accuracy``, the share of targets that are right.
    """
    path = pathlib.Path(run.path) / f"predictions-{split}.npz"
    if not path.exists():
        return f"{run.name} has no {path.name}: --mode=eval makes it."
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in _READ if name in file.files}
            kept = ", ".join(file.files)
        number, scores, labels = _scores(arrays)
        index_N = np.asarray(arrays.get("index", np.arange(number)))
        order_N = np.argsort(index_N, kind="stable")
        if len(index_N) != number:
            raise ValueError("index")
    except _BROKEN as error:
        return f"{path} cannot be read ({error})."
    if not scores:
        return (
            f"{run.name} keeps {kept} of each example; a paired test needs probabilities and label, or log_probability "
            "and target."
        )
    return Scored(
        {name: Score(total[order_N], weight[order_N]) for name, (total, weight) in scores.items()},
        number,
        run.examples,
        _digest(labels[order_N]),
        _digest(index_N[order_N]),
    )


_READ = ("probabilities", "label", "log_probability", "target", "bytes", "correct", "index")


def _scores(arrays: dict[str, np.ndarray]) -> tuple[int, dict[str, Score], np.ndarray]:
    if "probabilities" in arrays and "label" in arrays:
        p_NK, label = np.asarray(arrays["probabilities"], np.float64), arrays["label"]
        if p_NK.ndim != 2 or len(p_NK) != len(label) or label.ndim > 2:
            raise ValueError("probabilities and label do not fit each other")
        one_N = np.ones(len(label))
        label_N = label.argmax(-1) if label.ndim == 2 else label.astype(np.int64)
        scores = {ACCURACY: Score((p_NK.argmax(-1) == label_N).astype(np.float64), one_N)}
        if label.ndim == 1 and len(label) and label_N.min() >= 0 and label_N.max() < p_NK.shape[1]:
            log_N = -np.log(np.maximum(p_NK[np.arange(len(label_N)), label_N], 1e-30))
            if np.isfinite(log_N).all():
                scores["log_loss"] = Score(log_N, one_N)
        return len(label), scores, label
    if "log_probability" in arrays and "target" in arrays:
        logp_NL, target_NL = np.asarray(arrays["log_probability"], np.float64), arrays["target"]
        if logp_NL.shape != target_NL.shape or logp_NL.ndim != 2:
            raise ValueError("log_probability and target do not fit each other")
        real_NL = target_NL >= 0
        nats_N: np.ndarray = -np.where(real_NL, logp_NL, 0.0).sum(1)
        scores = {"loss": Score(nats_N, real_NL.sum(1).astype(np.float64))}
        if arrays.get("correct", np.zeros(0)).shape == target_NL.shape:
            right_N = (real_NL & arrays["correct"].astype(bool)).sum(1).astype(np.float64)
            scores[ACCURACY] = Score(right_N, real_NL.sum(1).astype(np.float64))
        if "bytes" in arrays:
            bytes_N = np.where(real_NL, arrays["bytes"], 0).sum(1).astype(np.float64)
            if bytes_N.sum():
                scores["bits_per_byte"] = Score(nats_N / np.log(2), bytes_N)
        return len(target_NL), scores, target_NL
    return 0, {}, np.zeros(0)


def why_not_the_same(a: Run, b: Run, scored_a: Scored, scored_b: Scored) -> str | None:
    """The sentence why two evaluations are not of the same examples; None where they are."""
    if scored_a.examples is None or scored_b.examples is None:
        which = a.name if scored_a.examples is None else b.name
        return f"the lineage of {which} does not say which data it was evaluated on."
    if scored_a.examples != scored_b.examples:
        return (
            f"{a.name} and {b.name} were evaluated on different data (fingerprints {scored_a.examples} and "
            f"{scored_b.examples})."
        )
    if scored_a.number != scored_b.number:
        return f"{a.name} was evaluated on {scored_a.number:,} examples and {b.name} on {scored_b.number:,}."
    if scored_a.places != scored_b.places:
        return f"{a.name} and {b.name} were evaluated on different examples of the split."
    if scored_a.labels != scored_b.labels:
        return f"the labels or targets of {a.name} and {b.name} differ (another tokenizer or order of classes?)."
    return None


def _digest(x: np.ndarray) -> str:
    """Of an array's shape and values; i32 and i64 of the same values are the same."""
    x = x.astype(np.float64) if x.dtype.kind == "f" else x.astype(np.int64)
    return hashlib.sha256(repr(x.shape).encode() + np.ascontiguousarray(x).tobytes()).hexdigest()
