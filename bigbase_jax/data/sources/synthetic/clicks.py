"""A log of clicks, made up here, so that the best possible scores are known.

Users and items have a bias and a taste each, a page and a device have one together, and so have a price and the device:
the logit of a click is the sum of the biases and of these products. So what a sum of columns can tell (a logistic
regression) stays below what products of columns can. Users and items are drawn by Zipf's law. The probability of every
click is known, and so is what it scores on the rows of test, on average over their clicks: ``best_auc`` and
``best_loss``, two more facts.

Axes: N rows, n rows of test.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special

from bigbase_jax.core import UserError
from bigbase_jax.data.columns import Columns, columns_of
from bigbase_jax.data.sources.table.table import TableData, TableRows

_SITES, _DEVICES, _TASTES = 20, 4, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticClicks(TableRows):
    """Impressions in the order of time, with ``user``, ``item``, ``site``, ``device``, ``price``, ``hour``, ``click``.

    Attributes:
      count: of rows.
      users, items: how many there are.

    Raises:
      UserError: a value out of its range.
    """

    target_name: str = "click"
    positive: str | None = "yes"
    by_time: str | None = "time"
    drop: tuple[str, ...] = ("time",)
    count: int = 100_000
    users: int = 200
    items: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 100 or self.users < 2 or self.items < 2:
            raise UserError("there are at least 100 rows, 2 users and 2 items.")

    def origin(self) -> str:
        return f"clicks of nobody, made up here (seed {self.seed})"

    def file_signature(self) -> list[Any]:
        return ["made-up clicks", self.count, self.users, self.items, self.seed]

    def read(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> tuple[Columns, list[str]]:
        columns, p_N = self.log()
        clicked_N = np.random.default_rng([self.seed, 2]).random(self.count) < p_N
        cells: dict[str, Any] = {**columns, self.target_name: np.where(clicked_N, "yes", "no")}
        return columns_of(cells, self.kind_of), [""]

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> TableData:
        data = super().prepare(cache, limit_bytes, say)
        auc, logloss = best_scores(self.log()[1][data.rows["test"]])
        data.dataset_info = {**data.dataset_info, "best_auc": auc, "best_loss": logloss}
        data.description += f"; the best possible on test: AUC {auc:.4f}, logloss {logloss:.4f}"
        return data

    def log(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The columns but that of clicks, and f64[N], the probability of a click in each row."""
        random = np.random.default_rng([self.seed, 1])
        sizes = {"user": self.users, "item": self.items, "site": _SITES, "device": _DEVICES}
        biases = {name: random.normal(0, 0.5, size) for name, size in sizes.items()}
        tastes = {name: random.normal(0, 0.8, (sizes[name], _TASTES)) for name in ("user", "item")}
        page, thrift = random.normal(0, 0.7, (_SITES, _DEVICES)), random.normal(0, 0.5, _DEVICES)
        drawn = {}
        for name, size in sizes.items():
            weight = 1 / np.arange(2, size + 2) ** 0.7
            drawn[name] = random.choice(random.permutation(size), self.count, p=weight / weight.sum())
        price_N, hour_N = random.lognormal(0, 1, self.count), random.integers(0, 24, self.count)
        logit_N = sum(biases[name][drawn[name]] for name in sizes) - 1.5
        logit_N += np.einsum("nd,nd->n", tastes["user"][drawn["user"]], tastes["item"][drawn["item"]])
        logit_N += page[drawn["site"], drawn["device"]] + thrift[drawn["device"]] * np.log(price_N)
        logit_N += 0.5 * np.sin(2 * np.pi * hour_N / 24)
        named = {name: np.char.add(f"{name} ", (codes + 1).astype(str)) for name, codes in drawn.items()}
        return {"time": np.arange(self.count), **named, "price": price_N, "hour": hour_N}, scipy.special.expit(logit_N)


def best_scores(p_n: np.ndarray) -> tuple[float, float]:
    """What the probabilities f64[n] score themselves: the AUC, as expected clicks above expected non-clicks (no two
    rows are paired with themselves), and the mean entropy, in nats, below which no logloss can be expected."""
    p_n = np.sort(p_n)
    misses_n = np.concatenate([[0.0], np.cumsum(1 - p_n)[:-1]])
    pairs = p_n.sum() * (1 - p_n).sum() - (p_n * (1 - p_n)).sum()
    entropy = scipy.special.entr(p_n) + scipy.special.entr(1 - p_n)
    return float((p_n * misses_n).sum() / pairs), float(entropy.mean())
