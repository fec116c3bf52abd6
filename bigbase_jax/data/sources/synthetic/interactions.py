"""People who choose things one after another, made up here, so that the best possible ranking is known.

Each of I items belongs to one of some groups, is more or less popular, and has a few successors, most of them in its
own group. What a person chooses next is with probability ``follow`` a successor of the last choice, else any item by
its popularity; never the same item twice. So the probability of every item given a history is known, and no model
can be expected to rank better than by that. What this reaches is said in the description, and evaluators show it as a
peer (``Histories.best``). Popularity, and what else is blind to order, stays far below.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.data.sources.table.catalogue import Known, known_of
from bigbase_jax.data.sources.table.interactions import Histories, Interactions, Log

_SUCCESSORS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticInteractions(Interactions):
    """A log of such choices; ``prepare`` makes it.

    Attributes:
      users, num_items, groups: how many there are.
      mean_length: of a history.
      follow: the probability of a successor of the last choice.
      seed: of everything.

    Raises:
      UserError: a value out of its range.
    """

    users: int = 2000
    num_items: int = 200
    groups: int = 10
    mean_length: float = 15.0
    follow: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.users < 10 or self.groups < 1 or self.num_items < 4 * self.groups or self.mean_length < 5:
            raise UserError("there are at least 10 users, a group, 4 items for each group, and 5 choices of a user.")
        if not 0 <= self.follow < 1:
            raise UserError(f"follow is {self.follow}; it lies in [0, 1).")

    def file_signature(self) -> list[Any]:
        return ["made-up choices", *dataclasses.astuple(self)]

    def origin(self) -> str:
        return f"choices of nobody, made up here (seed {self.seed})"

    def log(self, cache: pathlib.Path | None, limit_bytes: float, say: Callable[[str], None]) -> Log:
        random = np.random.default_rng([self.seed, 1])
        lengths = np.minimum(5 + random.geometric(1 / (self.mean_length - 4), self.users) - 1, self.num_items // 2)
        chosen: list[np.ndarray] = []
        left_UI, last_U = np.ones((self.users, self.num_items), bool), np.full(self.users, -1)
        for _ in range(lengths.max()):
            p_UI = self.probabilities(last_U, left_UI)
            last_U = (p_UI.cumsum(1) > random.random((self.users, 1))).argmax(1)
            left_UI[np.arange(self.users), last_U] = False
            chosen.append(last_U)
        user, place = np.nonzero(np.arange(lengths.max()) < lengths[:, None])
        names = [f"thing {i + 1} of group {i % self.groups + 1}" for i in range(self.num_items)]
        begin_U = random.integers(0, 200, self.users)
        return Log(user, np.stack(chosen, 1)[user, place], begin_U[user] + place, None, names)

    def known(self, side: str, names: Sequence[str]) -> tuple[Sequence[str], Known] | None:
        """Of items, the group."""
        groups = [name.partition(" of ")[2].replace(" ", "") for name in names]
        return (names, known_of(groups, 1)) if side == "item" else None

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Histories:
        found = super().prepare(cache, limit_bytes, say)
        if self.core == 0 and self.split == "last":
            number_I = np.array([int(name.split()[1]) - 1 for name in found.item_names])

            def best(history_nS: np.ndarray) -> np.ndarray:
                """f32[n, items + 1]: how probable each item is to be next."""
                left_nI = np.ones((len(history_nS), self.num_items), bool)
                row, place = np.nonzero(history_nS)
                left_nI[row, number_I[history_nS[row, place] - 1]] = False
                last_n = np.take_along_axis(history_nS, (history_nS > 0).sum(1, keepdims=True) - 1, 1)[:, 0]
                p_nX = np.zeros((len(history_nS), len(number_I) + 1), np.float32)
                p_nX[:, 1:] = self.probabilities(number_I[last_n - 1], left_nI)[:, number_I]
                return p_nX

            test: Any = found.splits["test"]
            p_nK = -np.sort(-best(test.seen(np.arange(len(test)))), 1)[:, :10]
            hits, ndcg = p_nK.sum(1).mean(), (p_nK / np.log2(np.arange(10) + 2)).sum(1).mean()
            found.best = best
            found.description += f"; the best ranking is expected to have HR@10 {hits:.1%} and NDCG@10 {ndcg:.4f}"
        return found

    def probabilities(self, last_n: np.ndarray, left_nI: np.ndarray) -> np.ndarray:
        """f64[n, I] of the next choices, given the last ones (-1: there is none) and which items are left."""
        popularity_I, successor_II = self.structure
        followed_nI = self.follow * successor_II[last_n] + (1 - self.follow) * popularity_I
        p_nI = np.where(last_n[:, None] < 0, popularity_I, followed_nI)
        p_nI = np.where(left_nI, p_nI, 0)
        return p_nI / p_nI.sum(1, keepdims=True)

    @functools.cached_property
    def structure(self) -> tuple[np.ndarray, np.ndarray]:
        """(popularity f64[I], probabilities of successors f64[I, I]); each row sums to 1."""
        random = np.random.default_rng([self.seed, 0])
        popularity_I = random.permutation(1 / np.arange(1, self.num_items + 1))
        group_I = np.arange(self.num_items) % self.groups
        successor_II = np.zeros((self.num_items, self.num_items))
        for i in range(self.num_items):
            own = np.where(group_I == group_I[i], 1.0, 0.1 * (group_I != group_I[i]) / self.groups)
            own[i] = 0
            few = random.choice(self.num_items, _SUCCESSORS, replace=False, p=own / own.sum())
            successor_II[i, few] = 0.6 ** np.arange(_SUCCESSORS)
        return popularity_I / popularity_I.sum(), successor_II / successor_II.sum(1, keepdims=True)
