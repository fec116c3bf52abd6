"""Scores of single examples from the predictions that an evaluation has kept, and what tells that two are of the same.

Axes: N = examples of a split, K = classes, L = positions of an example.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np
from scipy import sparse

from bigbase_jax.compare.runs import Run
from bigbase_jax.core import Metric

METRICS = {
    "accuracy": Metric("max", "%"),
    "log_loss": Metric("min", "nats"),
    "f1": Metric("max", "%", "F1 (macro)"),
    "f1_positive": Metric("max", "%", "F1 (positive class)"),
    "auc": Metric("max", title="AUC"),
    "bits_per_byte": Metric("min"),
}
"""What is measured here, where a task does not say it in other words."""
_MOST = 200_000  # probabilities whose AUC is resampled: it takes about ten seconds
_BROKEN = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)


class Score:
    """A metric, of any sample of the examples."""

    @property
    def right_N(self) -> np.ndarray | None:
        """bool[N]: which examples are right, where each is simply right or wrong; else None."""
        return None

    def sample(self, count_rN: np.ndarray) -> np.ndarray:
        """f64[r]: of samples in which each example is drawn so often, f64[r,N]."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Ratio(Score):
    """A metric by example: over any of them it is the sum of ``total_N`` by the sum of ``weight_N``.

    Attributes:
      total_N, weight_N: f64[N].
    """

    total_N: np.ndarray
    weight_N: np.ndarray

    @property
    def right_N(self) -> np.ndarray | None:
        simple = np.all(self.weight_N == 1) and np.isin(self.total_N, (0, 1)).all()
        return self.total_N > 0.5 if simple else None

    def sample(self, count_rN: np.ndarray) -> np.ndarray:
        return _ratio(count_rN @ self.total_N, count_rN @ self.weight_N)


@dataclasses.dataclass(frozen=True)
class F1(Score):
    """The F1 score of a class, or the mean over the classes that occur among labels or guesses (macro).

    Attributes:
      label_N, guess_N: i64[N].
      positive: the class; None: all.
    """

    label_N: np.ndarray
    guess_N: np.ndarray
    positive: int | None = None

    def sample(self, count_rN: np.ndarray) -> np.ndarray:
        shape = len(self.label_N), int(max(self.label_N.max(), self.guess_N.max(), self.positive or 0)) + 1
        rows_N, right_N = np.arange(shape[0]), self.label_N == self.guess_N
        one = np.ones(shape[0])
        hit_NK = sparse.csr_array((2.0 * right_N, (rows_N, self.label_N)), shape)
        any_NK = sparse.csr_array((one, (rows_N, self.label_N)), shape)
        any_NK = any_NK + sparse.csr_array((one, (rows_N, self.guess_N)), shape)
        any_rK = (any_NK.T @ count_rN.T).T
        f1_rK = _ratio((hit_NK.T @ count_rN.T).T, any_rK)
        return f1_rK[:, self.positive] if self.positive is not None else _ratio(f1_rK.sum(1), (any_rK > 0).sum(1))


@dataclasses.dataclass(frozen=True)
class AUC(Score):
    """The area under the ROC curve of class 1 of two, or the mean of one class against the rest over the classes: the
    share of pairs of examples that are in order, ties counting half.

    Attributes:
      p_NK: f64[N,K], scores.
      label_N: i64[N].
    """

    p_NK: np.ndarray
    label_N: np.ndarray

    def sample(self, count_rN: np.ndarray) -> np.ndarray:
        K = self.p_NK.shape[1]
        pairs_rK, areas_rK = np.zeros((2, len(count_rN), K))
        for k in range(K) if K > 2 else (1,):
            order_N = np.argsort(self.p_NK[:, k], kind="stable")
            first = np.flatnonzero(np.diff(self.p_NK[order_N, k], prepend=np.nan))  # of examples with equal scores
            positive_N = self.label_N[order_N] == k
            drawn_rN = count_rN[:, order_N]
            positive_rT = np.add.reduceat(drawn_rN * positive_N, first, 1)
            negative_rT = np.add.reduceat(drawn_rN * ~positive_N, first, 1)
            below_rT = np.cumsum(negative_rT, 1) - negative_rT / 2
            areas_rK[:, k] = np.sum(positive_rT * below_rT, 1)
            pairs_rK[:, k] = positive_rT.sum(1) * negative_rT.sum(1)
        return _ratio(_ratio(areas_rK, pairs_rK).sum(1), (pairs_rK > 0).sum(1))


def _ratio(total: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.divide(total, weight, out=np.zeros_like(total), where=weight != 0)


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

    def mean(self, metric: str) -> float:
        """A metric of all examples."""
        return float(self.scores[metric].sample(np.ones((1, self.number)))[0])

    @property
    def same_as(self) -> tuple[int, str | None, str, str]:
        """Equal for evaluations on the same examples."""
        return (self.number, self.examples, self.labels, self.places)


def read(run: Run, split: str) -> Scored | str:
    """The scores of a run's examples; else a sentence that says why there are none.

    Where ``predictions-SPLIT.npz`` holds ``probabilities`` [N,K] and ``label`` [N] (or soft, [N,K]): ``accuracy``, and
    for hard labels ``f1``, of two classes ``f1_positive``, ``auc`` (where resampling it does not take long) and
    ``log_loss`` in nats. Where it holds ``log_probability`` and ``target`` [N,L] (negative: no target):
    ``loss`` in nats per target, with ``bytes`` [N,L] ``bits_per_byte``, and with ``correct`` [N,L] ``accuracy``, the
    share of targets that are right. Otherwise, where the run's task has a method ``ratios(examples)``: what that gives
    of all that is kept, metric -> (totals [N], weights [N]), of what was to be found as ``reference``.
    """
    path = pathlib.Path(run.path) / f"predictions-{split}.npz"
    if not path.exists():
        return f"{run.name} has no {path.name}: --mode=eval makes it."
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in _READ if name in file.files}
            kept = ", ".join(file.files)
        number = len(next(iter(arrays.values()), ()))
        index_N = np.asarray(arrays.get("index", np.arange(number)))
        if any(len(x) != number for x in arrays.values()):
            raise ValueError("its arrays are not of the same examples")
        order_N = np.argsort(index_N, kind="stable")
        scores, labels = of_arrays({name: x[order_N] for name, x in arrays.items()})
        if not scores and (ratios := getattr(run.task, "ratios", None)) is not None:
            kept_of = run.evaluated(split).examples
            labels = kept_of["reference"][order_N]
            scores = {
                name: Ratio(np.asarray(total, np.float64)[order_N], np.asarray(weight, np.float64)[order_N])
                for name, (total, weight) in ratios(kept_of).items()
            }
    except _BROKEN as error:
        return f"{path} cannot be read ({error})."
    if not scores:
        return (
            f"{run.name} keeps {kept} of each example; a paired test needs probabilities and label, or log_probability "
            "and target."
        )
    return Scored(
        scores,
        number,
        run.examples,
        _digest(labels),
        _digest(index_N[order_N]),
    )


_READ = ("probabilities", "label", "log_probability", "target", "bytes", "correct", "index")


def of_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Score], np.ndarray]:
    """The scores of what an evaluation keeps of each example (see ``read``), and what was to be predicted."""
    if "probabilities" in arrays and "label" in arrays:
        p_NK, label = np.asarray(arrays["probabilities"], np.float64), arrays["label"]
        if p_NK.ndim != 2 or label.ndim > 2:
            raise ValueError("probabilities and label do not fit each other")
        one_N = np.ones(len(label))
        label_N = label.argmax(-1) if label.ndim == 2 else label.astype(np.int64)
        scores: dict[str, Score] = {"accuracy": Ratio((p_NK.argmax(-1) == label_N).astype(np.float64), one_N)}
        if label.ndim == 1 and len(label) and label_N.min() >= 0 and label_N.max() < p_NK.shape[1]:
            log_N = -np.log(np.maximum(p_NK[np.arange(len(label_N)), label_N], 1e-30))
            if np.isfinite(log_N).all():
                scores["log_loss"] = Ratio(log_N, one_N)
            scores["f1"] = F1(label_N, p_NK.argmax(-1))
            if p_NK.shape[1] == 2:
                scores["f1_positive"] = F1(label_N, p_NK.argmax(-1), positive=1)
            if p_NK.size <= _MOST:
                scores["auc"] = AUC(p_NK, label_N)
        return scores, label
    if "log_probability" in arrays and "target" in arrays:
        logp_NL, target_NL = np.asarray(arrays["log_probability"], np.float64), arrays["target"]
        if logp_NL.shape != target_NL.shape or logp_NL.ndim != 2:
            raise ValueError("log_probability and target do not fit each other")
        real_NL = target_NL >= 0
        nats_N: np.ndarray = -np.where(real_NL, logp_NL, 0.0).sum(1)
        scores = {"loss": Ratio(nats_N, real_NL.sum(1).astype(np.float64))}
        if arrays.get("correct", np.zeros(0)).shape == target_NL.shape:
            right_N = (real_NL & arrays["correct"].astype(bool)).sum(1).astype(np.float64)
            scores["accuracy"] = Ratio(right_N, real_NL.sum(1).astype(np.float64))
        if "bytes" in arrays:
            bytes_N = np.where(real_NL, arrays["bytes"], 0).sum(1).astype(np.float64)
            if bytes_N.sum():
                scores["bits_per_byte"] = Ratio(nats_N / np.log(2), bytes_N)
        return scores, target_NL
    return {}, np.zeros(0)


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
