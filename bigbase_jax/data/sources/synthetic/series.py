"""Hourly series made up here, whose noise is known, and so how well they can be forecast at best.

Legend: T steps.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.data.columns import Column, Columns
from bigbase_jax.data.sources.table.series import Series

NOISE = 0.3
"""Standard deviation of what cannot be known of ``load``, whose own is about 1.8: no MSE is lower than its square."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticSeries(Series):
    """Two series, ``load`` and ``temperature``: waves of the day, the week and a slow one, a trend, and white noise. On
    one day in twenty ``event`` is 1, and the load is higher. Some 2 % of the hours are missing, in gaps.

    Attributes:
      steps: T.
      seed: of the noise, the events and the gaps.

    Raises:
      UserError: fewer than 200 steps.
    """

    steps: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 200:
            raise UserError(f"steps is {self.steps}; it must be at least 200.")

    def read(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Columns:
        random, hour_T = np.random.default_rng(self.seed), np.arange(self.steps)
        day_T, weekend_T = 2 * np.pi * hour_T / 24, hour_T // 24 % 7 > 4
        event_T = (random.random(self.steps // 24 + 1) < 0.05)[hour_T // 24].astype(float)
        slow_T = np.sin(2 * np.pi * hour_T / (24 * 28))
        load_T = (2 - weekend_T) * np.sin(day_T - 1.5) + 0.4 * np.sin(2 * day_T) + slow_T + 1.5 * event_T
        temperature_T = 10 + 5 * np.sin(day_T - 2) + 4 * slow_T + hour_T / self.steps
        noise_TC = random.normal(size=(self.steps, 2)) * (NOISE, 1.0)
        there_T = np.ones(self.steps, bool)
        for start in random.integers(0, self.steps - 20, self.steps // 500):
            there_T[start : start + random.integers(1, 20)] = False
        time_T = np.datetime64("2024-01-01T00", "s") + hour_T * np.timedelta64(3600, "s")
        found = {"load": load_T + noise_TC[:, 0], "temperature": temperature_T + noise_TC[:, 1], "event": event_T}
        numbers = [Column(name, "number", x_T[there_T]) for name, x_T in found.items()]
        return Columns([Column("time", "date", time_T[there_T], form="iso"), *numbers], int(there_T.sum()))

    def origin(self) -> str:
        return f"two series made up here (seed {self.seed})"
