"""Identification of people in a gallery, and of strangers as such, by the cosine of vectors that a task gives.

Legend: N photos of the gallery, Q probes, G people, S strangers, D of a vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from bigbase_jax.core import Evaluated, Figure, Metric, Plot, Task, UserError
from bigbase_jax.evaluate import Split
from bigbase_jax.evaluators.verification import unit_vectors
from bigbase_jax.tasks.metrics import identification

_PROBES = 1024  # that are compared at once


@dataclasses.dataclass
class Identification:
    """A ``core.Evaluator`` of who is found in a gallery.

    Attributes:
      split: of the probes.
      gallery: the split that is enrolled; None: the first photos of each person of ``split``, where they have more.
        People who are not enrolled are the strangers of the open set, such as those with one photo.
      enrolled: photos of each person, where ``gallery`` is None.
      strangers: the share of the people who are not enrolled although they might be, those of the greatest labels.
      fpir: the share of strangers that may be taken for somebody.
    """

    split: str = "test"
    gallery: str | None = None
    enrolled: int = 1
    strangers: float = 0.0
    fpir: float = 0.01
    final: bool = True

    metrics: ClassVar[Mapping[str, Metric]] = {
        "rank1": Metric("max", "%", "Rank-1"),
        "rank5": Metric("max", "%", "Rank-5"),
        "fnir": Metric("min", "%", "FNIR"),
        "threshold": Metric(),
    }

    @property
    def needs(self) -> tuple[str, ...]:
        """See ``core.Evaluator``."""
        return (self.split, *filter(None, [self.gallery]))

    def run(self, task: Task, variables: Any, data: Any, mesh: Any) -> Evaluated:
        """See ``core.Evaluator``. Keeps ``rank`` i32[Q] and ``score`` f32[Q] of known probes, ``stranger`` f32[S].

        Raises:
          UserError: no vectors, or nobody who is both enrolled and searched.
        """
        probe_QD, person_Q = unit_vectors(Split(self.split).run(task, variables, data, mesh).examples)
        if self.gallery is None:
            enrolled_Q = identification.first_photos(person_Q, self.enrolled)
            gallery_ND, person_N = probe_QD[enrolled_Q], person_Q[enrolled_Q]
            probe_QD, person_Q = probe_QD[~enrolled_Q], person_Q[~enrolled_Q]
        else:
            gallery_ND, person_N = unit_vectors(Split(self.gallery).run(task, variables, data, mesh).examples)
        people_G = np.unique(person_N)
        here_N = np.isin(person_N, people_G[: len(people_G) - round(self.strangers * len(people_G))])
        gallery_ND, person_N = gallery_ND[here_N], person_N[here_N]
        known_Q = np.isin(person_Q, person_N)
        if not known_Q.any():
            raise UserError(
                f"{self.split}: nobody is both enrolled and searched; it takes people with more than {self.enrolled} "
                "photos."
            )
        best, rank = [], []
        for start in range(0, len(probe_QD), _PROBES):
            part = slice(start, start + _PROBES)
            score_QG, people_G = identification.of_people(probe_QD[part] @ gallery_ND.T, person_N)
            right_Q = np.searchsorted(people_G, person_Q[part]).clip(0, len(people_G) - 1)
            best.append(score_QG.max(1))
            rank.append(identification.ranks(score_QG, right_Q))
        best_Q, rank_Q = np.concatenate(best), np.concatenate(rank)[known_Q]
        kept = {"rank": rank_Q.astype(np.int32), "score": best_Q[known_Q], "stranger": best_Q[~known_Q]}
        found: dict[str, Any] = {**identification.scores(rank_Q, kept["score"], kept["stranger"], self.fpir)}
        counts = {"people": len(np.unique(person_N)), "probes": len(rank_Q), "strangers": len(kept["stranger"])}
        return Evaluated(self.split, {**found, **counts}, kept)

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """The cumulative match characteristic, and the open set's trade-off where there are strangers."""
        if "rank" not in evaluated.examples:
            return
        rank_Q, score_Q, stranger_S = (evaluated.examples[name] for name in ("rank", "score", "stranger"))
        at = np.arange(1, min(int(rank_Q.max()), 50) + 1)
        share = [100 * float(np.mean(rank_Q <= k)) for k in at]
        yield Plot("Cumulative match", {"found": (at.tolist(), share)}, "among the first", "of the probes, %")
        if len(stranger_S):
            accepted_T, missed_T, _ = identification.curve(rank_Q, score_Q, stranger_S)
            some = np.unique(np.linspace(0, len(accepted_T) - 1, 200).astype(int))
            errors = (100 * accepted_T[some]).tolist(), (100 * missed_T[some]).tolist()
            yield Plot("Open set", {"errors": errors}, "strangers taken for somebody, %", "people missed, %")
