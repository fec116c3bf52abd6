"""Whether a difference is more than chance: McNemar's test, the paired bootstrap, intervals over seeds, Holm.

Axes: N = examples, R = resamples, r = resamples of one chunk, C = columns: several runs' scores of the same examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from scipy import stats

RESAMPLES = 10_000
LEVEL = 0.95
"""Of every interval."""
_CHUNK = 2**20  # draws that are held at once
Key = TypeVar("Key")


class Spread(NamedTuple):
    """A sample's mean and how sure it is.

    Attributes:
      mean: of the values.
      deviation: their standard deviation (n - 1 in the denominator); None for one value.
      low, high: the interval of the mean by Student's t; None for one value.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and t interval of one or more values."""
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return Spread(float(x[0]), None, None, None)
    deviation = float(x.std(ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 1)) * deviation / math.sqrt(len(x))
    return Spread(float(x.mean()), deviation, float(x.mean()) - half, float(x.mean()) + half)


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The two-sided p-value of Welch's t-test (Welch 1947); None unless both have at least two values that vary."""
    if min(len(a), len(b)) < 2:
        return None
    if not np.ptp(a) and not np.ptp(b):
        return None
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927)."""
    low, high = stats.binomtest(right, total).proportion_ci(LEVEL, "wilson")
    return float(low), float(high)


class McNemar(NamedTuple):
    """McNemar's test (McNemar 1947) in its exact form.

    Attributes:
      only_a, only_b: examples that only the one, or only the other, has right.
      p: the two-sided binomial p-value that such examples fall evenly on both.
    """

    only_a: int
    only_b: int
    p: float


def mcnemar(right_a_N: np.ndarray, right_b_N: np.ndarray) -> McNemar:
    """Of two classifiers on the same examples: which of them each has right."""
    a_N, b_N = np.asarray(right_a_N, bool), np.asarray(right_b_N, bool)
    only_a, only_b = int(np.sum(a_N & ~b_N)), int(np.sum(b_N & ~a_N))
    differing = only_a + only_b
    return McNemar(only_a, only_b, float(stats.binomtest(only_a, differing, 0.5).pvalue) if differing else 1.0)


def resampled(
    columns: Sequence[Callable[[np.ndarray], np.ndarray]], n: int, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """f64[R,C]: each column's statistic in samples of N examples drawn with replacement.

    All columns see the same draws, so differences of columns are those of the paired bootstrap (Efron & Tibshirani
    1993, chapter 8). Columns with the same draws also come out the same in other calls of this N and seed.

    Args:
      columns: each takes how often every example was drawn, f64[r,N], and gives f64[r].
    """
    rng, rows = np.random.default_rng(seed), max(1, _CHUNK // n)
    parts = []
    for start in range(0, resamples, rows):
        drawn_rN = rng.integers(n, size=(min(rows, resamples - start), n))
        count_rN = np.stack([np.bincount(row_N, minlength=n) for row_N in drawn_rN]).astype(np.float64)
        parts.append(np.stack([column(count_rN) for column in columns], 1))
    return np.concatenate(parts)


def percentiles(values_R: np.ndarray) -> tuple[float, float]:
    """The percentile interval of resampled values."""
    low, high = np.quantile(values_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap_p(difference_R: np.ndarray) -> float:
    """Two-sided p-value of no difference: the smallest level at which the percentile interval leaves out 0."""
    r = len(difference_R)
    below, above = int(np.sum(difference_R <= 0)), int(np.sum(difference_R >= 0))
    return min(1.0, 2 * (1 + min(below, above)) / (r + 1))


def holm(p: Mapping[Key, float | None]) -> dict[Key, float | None]:
    """P-values of a family of tests, adjusted so that any false alarm has the level's probability (Holm 1979)."""
    known: Iterable[tuple[Key, float]] = [(key, value) for key, value in p.items() if value is not None]
    ordered = sorted(known, key=lambda item: item[1])
    adjusted: dict[Key, float | None] = dict.fromkeys(p)
    highest = 0.0
    for i, (key, value) in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - i) * value))
        adjusted[key] = highest
    return adjusted
