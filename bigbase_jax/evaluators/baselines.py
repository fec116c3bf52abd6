"""What every recommender has to beat: popularity, item-kNN, implicit ALS. Each is fitted in closed form or by
alternating least squares, on the interactions of train, and ranks by the very procedure by which the model does.

Legend: U users, I items, n users that are scored, S items of their histories, D factors, k neighbours. Item 0 is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Protocol

import numpy as np
import scipy.sparse

from bigbase_jax.core import UserError

Scorer = Callable[[np.ndarray], np.ndarray]
"""From histories i32[n,S], in order and with 0 behind, to scores f32[n,I+1]."""
_BLOCK = 1 << 22  # elements that are worked on at once


class Baseline(Protocol):
    """A way to rank.

    Attributes:
      name: in tables.
    """

    name: ClassVar[str]

    def fit(self, train_UI: scipy.sparse.csr_matrix) -> Scorer:
        """What scores histories, of how often each user chose each item, f32[U,I+1]."""
        ...


@dataclasses.dataclass(frozen=True)
class Popularity:
    """Items by how many interactions they have."""

    name: ClassVar[str] = "popularity"

    def fit(self, train_UI: scipy.sparse.csr_matrix) -> Scorer:
        count_I = np.asarray(train_UI.sum(0), np.float32).ravel()
        return lambda history_nS: np.broadcast_to(count_I, (len(history_nS), len(count_I)))


@dataclasses.dataclass(frozen=True)
class ItemKNN:
    """The sum of an item's similarities to those of the history: the cosine of the users who chose them (Sarwar et al.
    2001), shrunk where few did (Ferrari Dacrema et al. 2019).

    Attributes:
      neighbours: k, the most similar items of each item, which alone count.
      shrink: is added to the product of the lengths.

    Raises:
      UserError: a value out of its range.
    """

    neighbours: int = 100
    shrink: float = 50.0

    name: ClassVar[str] = "item-kNN"

    def __post_init__(self) -> None:
        if self.neighbours < 1 or self.shrink < 0:
            raise UserError(f"neighbours is {self.neighbours} and shrink {self.shrink}; they are at least 1 and 0.")

    def fit(self, train_UI: scipy.sparse.csr_matrix) -> Scorer:
        similar_II = self.similarities(train_UI)
        return lambda history_nS: (_counted(history_nS, similar_II.shape[0]) @ similar_II).toarray()

    def similarities(self, train_UI: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
        """f32[I+1,I+1]: row i has how similar its neighbours are to item i."""
        x_UI = train_UI.astype(np.float32)
        x_UI.data[:] = 1
        x_IU = x_UI.T.tocsr()
        length_I = np.sqrt(np.diff(x_IU.indptr))
        work_I = np.cumsum(x_IU @ np.diff(x_UI.indptr).astype(np.float64))  # products that rows take, at most
        rows, start = [], 0
        while start < len(work_I):
            before = work_I[start - 1] if start else 0
            stop = max(int(np.searchsorted(work_I, before + _BLOCK, side="right")), start + 1)
            block = (x_IU[start:stop] @ x_UI).tocoo()
            other = block.row + start != block.col
            row, col, both = block.row[other], block.col[other], block.data[other]
            value = both / (length_I[row + start] * length_I[col] + self.shrink)
            order = np.lexsort((col, -value, row))
            row, col, value = row[order], col[order], value[order]
            near = np.arange(len(row)) - np.searchsorted(row, row) < self.neighbours
            rows.append(scipy.sparse.csr_matrix((value[near], (row[near], col[near])), (stop - start, len(work_I))))
            start = stop
        return scipy.sparse.vstack(rows, "csr", np.float32)


@dataclasses.dataclass(frozen=True)
class ALS:
    """Factors of users and items by alternating least squares with confidences (Hu, Koren & Volinsky 2008): the minimum
    of the sum over all pairs of c (p - x y)^2 plus ``regularisation`` (|x|^2 + |y|^2), with p = 1 and c = 1 + ``alpha``
    for a pair with interactions, else p = 0 and c = 1. A history that is scored is given factors in the same way.

    Each least-squares problem is solved by some steps of conjugate gradients from the last solution (Takacs et al.
    2011), which needs no matrix of D x D for each user.

    Attributes:
      factors: D.
      regularisation, alpha: see above.
      iterations: over users and items.
      steps: of conjugate gradients.
      seed: of the first factors.

    Raises:
      UserError: a value out of its range.
    """

    factors: int = 64
    regularisation: float = 1.0
    alpha: float = 10.0
    iterations: int = 15
    steps: int = 3
    seed: int = 0

    name: ClassVar[str] = "ALS"

    def __post_init__(self) -> None:
        if min(self.factors, self.iterations, self.steps) < 1 or self.regularisation <= 0 or self.alpha <= 0:
            raise UserError("factors, iterations and steps are at least 1; regularisation and alpha are above 0.")

    def fit(self, train_UI: scipy.sparse.csr_matrix) -> Scorer:
        _, y_ID = self.factorise(train_UI)

        def scores(history_nS: np.ndarray) -> np.ndarray:
            history_nI = _counted(history_nS, len(y_ID))
            return self.solve(history_nI, y_ID, np.zeros((len(history_nS), self.factors), np.float32), 10) @ y_ID.T

        return scores

    def factorise(self, train_UI: scipy.sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
        """(f32[U,D], f32[I+1,D])."""
        random = np.random.default_rng(self.seed)
        x_UD, y_ID = (random.normal(0, 0.01, (size, self.factors)).astype(np.float32) for size in train_UI.shape)
        train_IU = train_UI.T.tocsr()
        for _ in range(self.iterations):
            x_UD = self.solve(train_UI, y_ID, x_UD, self.steps)
            y_ID = self.solve(train_IU, x_UD, y_ID, self.steps)
        return x_UD, y_ID

    def solve(self, chosen_UI: scipy.sparse.csr_matrix, y_ID: np.ndarray, x_UD: np.ndarray, steps: int) -> np.ndarray:
        """f32[U,D]: for fixed ``y_ID``, the minimum, by conjugate gradients from ``x_UD``."""
        gram_DD = y_ID.T @ y_ID + self.regularisation * np.eye(self.factors, dtype=np.float32)
        found_UD = np.empty_like(x_UD)
        stop_U, start = chosen_UI.indptr[1:] * self.factors, 0
        while start < len(x_UD):
            before = int(chosen_UI.indptr[start]) * self.factors
            stop = max(int(np.searchsorted(stop_U, before + _BLOCK, side="right")), start + 1)
            stop = min(stop, start + max(_BLOCK // self.factors, 1))
            found_UD[start:stop] = self._solve(chosen_UI[start:stop], y_ID, x_UD[start:stop], gram_DD, steps)
            start = stop
        return found_UD

    def _solve(
        self,
        chosen_uI: scipy.sparse.csr_matrix,
        y_ID: np.ndarray,
        x_uD: np.ndarray,
        gram_DD: np.ndarray,
        steps: int,
    ) -> np.ndarray:
        user_T = np.repeat(np.arange(len(x_uD)), np.diff(chosen_uI.indptr))
        y_TD, shape = y_ID[chosen_uI.indices], (len(x_uD), len(user_T))
        sum_uT = scipy.sparse.csr_matrix(
            (np.ones(len(user_T), np.float32), np.arange(len(user_T)), chosen_uI.indptr), shape
        )

        def product(v_uD: np.ndarray) -> np.ndarray:
            """Y^T C Y v + regularisation v."""
            of_T = np.einsum("td,td->t", v_uD[user_T], y_TD)
            return v_uD @ gram_DD + sum_uT @ (self.alpha * of_T[:, None] * y_TD)

        r_uD = (1 + self.alpha) * (sum_uT @ y_TD) - product(x_uD)
        p_uD, square_u = r_uD, (r_uD**2).sum(1)
        for _ in range(steps):
            q_uD = product(p_uD)
            length_u = square_u / np.maximum((p_uD * q_uD).sum(1), 1e-30)
            x_uD = x_uD + length_u[:, None] * p_uD
            r_uD = r_uD - length_u[:, None] * q_uD
            before_u, square_u = square_u, (r_uD**2).sum(1)
            p_uD = r_uD + (square_u / np.maximum(before_u, 1e-30))[:, None] * p_uD
        return x_uD


def _counted(history_nS: np.ndarray, items: int) -> scipy.sparse.csr_matrix:
    """f32[n,I+1]: 1 for each item of a history."""
    row, place = np.nonzero(history_nS)
    ones = np.ones(len(row), np.float32)
    found = scipy.sparse.csr_matrix((ones, (row, history_nS[row, place])), (len(history_nS), items))
    found.data[:] = 1
    return found
