"""Verification of pairs by the cosine of their vectors: speakers, faces, anything of which a task gives a ``vector``.

Axes: N examples, P pairs, D of a vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from bigbase_jax.core import Evaluated, Figure, Metric, Plot, Task, UserError
from bigbase_jax.evaluate import Split
from bigbase_jax.runtime.log import say
from bigbase_jax.tasks.metrics import verification


@dataclasses.dataclass
class Verification:
    """A ``core.Evaluator`` of whether two examples have one label, by the cosine of their vectors.

    Pairs are those that the split's source has as ``pairs``, i[P,2], indices into it, and ``same``, bool[P], as
    published lists of pairs do; or else all pairs of the split, or ``most`` of them, drawn by ``seed``. Of pairs of one
    kind alone, as of people with one photo each, nothing is measured.

    Attributes:
      split: its name.
      listed: whether a list of pairs is used, where there is one.
      most: pairs at most.
      prior: the share of same pairs that ``min_dcf`` is for.
      folds: of the accuracy.
      far: the false accepts that ``tar`` is for; it is measured where there are enough different pairs to tell.
    """

    split: str = "test"
    listed: bool = True
    most: int = 1_000_000
    prior: float = 0.01
    folds: int = 10
    far: float = 1e-3
    seed: int = 0
    final: bool = True

    metrics: ClassVar[Mapping[str, Metric]] = {
        "eer": Metric("min", "%", "Equal error rate"),
        "min_dcf": Metric("min", title="Least detection cost"),
        "accuracy": Metric("max", "%"),
        "tar": Metric("max", "%", "True accepts"),
        "threshold": Metric(),
    }

    def run(self, task: Task, variables: Any, data: Any, mesh: Any) -> Evaluated:
        """See ``core.Evaluator``. Keeps ``score`` f32[P], ``same`` and ``pair`` i32[P,2].

        Raises:
          UserError: no vectors.
        """
        examples = Split(self.split).run(task, variables, data, mesh).examples
        vector_ND, label_N = unit_vectors(examples)
        source = data.source(self.split)
        pair_P2: Any = getattr(source, "pairs", None) if self.listed else None
        same_P: Any = getattr(source, "same", None)
        if pair_P2 is None:
            pair_P2 = self.drawn(len(label_N))
            same_P = label_N[pair_P2[:, 0]] == label_N[pair_P2[:, 1]]
        if np.all(same_P) or not np.any(same_P):
            say(f"{self.split} has no two photos or recordings of one, or of two: verification measures nothing")
            return Evaluated(self.split, {"pairs": len(pair_P2)})
        score_P = np.concatenate(
            [np.einsum("pd,pd->p", *vector_ND[part].swapaxes(0, 1)) for part in np.array_split(pair_P2, 64)]
        )
        found: dict[str, Any] = {**verification.scores(score_P, same_P, self.prior, self.folds)}
        if np.sum(~np.asarray(same_P)) * self.far >= 1:
            found["tar"] = verification.true_accepts(score_P, same_P, self.far)
        kept = {"score": score_P, "same": np.asarray(same_P), "pair": pair_P2.astype(np.int32)}
        return Evaluated(self.split, {**found, "pairs": len(score_P)}, kept)

    def drawn(self, size: int) -> np.ndarray:
        """i[P,2]: pairs of so many examples, in an order that mixes them."""
        rng, whole = np.random.default_rng(self.seed), size * (size - 1) // 2
        if whole <= self.most:
            return np.stack(np.triu_indices(size, 1), 1)[rng.permutation(whole)]
        pair_P2 = rng.integers(0, size, (self.most, 2))
        return pair_P2[pair_P2[:, 0] != pair_P2[:, 1]]

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """The DET curve (Martin et al. 1997), and the scores of both kinds of pairs."""
        if "score" not in evaluated.examples:
            return
        score_P, same_P = evaluated.examples["score"], evaluated.examples["same"] > 0
        _, accepts_T, rejects_T = verification.rates(score_P, same_P)
        yield det(accepts_T, rejects_T)
        at = np.linspace(-1, 1, 41)
        series = {
            name: (at[:-1].tolist(), (100 * np.histogram(score_P[which], at)[0] / which.sum()).tolist())
            for name, which in (("same", same_P), ("different", ~same_P))
        }
        yield Plot("Scores of pairs", series, "cosine", "share of the pairs, %")


def unit_vectors(examples: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """f32[N,D] of length 1, and the labels, i[N]; raises UserError where a task gives none."""
    if "vector" not in examples or "label" not in examples:
        raise UserError("this evaluator needs a task that gives a vector and a label of each example; leave it out.")
    length_N1 = np.linalg.norm(examples["vector"], axis=1, keepdims=True)
    return examples["vector"] / np.maximum(length_N1, 1e-9), examples["label"]


def det(accepts_T: np.ndarray, rejects_T: np.ndarray) -> Plot:
    """Both errors in percent, at some 200 thresholds."""
    some = np.unique(np.linspace(0, len(accepts_T) - 1, 200).astype(int))
    curve = (100 * accepts_T[some]).tolist(), (100 * rejects_T[some]).tolist()
    return Plot("Detection error trade-off", {"errors": curve}, "false accepts, %", "false rejects, %")
