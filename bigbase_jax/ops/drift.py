"""Whether what a model sees and says is still what it was trained for: KS, PSI and MMD, with one rate of false alarms.

Axes: N reference examples, M live ones, S = N + M; F features, K bins or classes, R permutations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

from bigbase_jax.compare.statistics import holm
from bigbase_jax.ops.features import CLASS

FALSE_ALARMS = 0.01
"""The probability that a page sounds an alarm though nothing has changed."""
LEAST = 20
"""Live examples below which nothing is tested."""
_MMD_ROWS = 400  # of each side; the cost grows with their square
_BINS = 10  # deciles of the reference, for PSI


class Test(NamedTuple):
    """One comparison.

    Attributes:
      method: "KS", "PSI" or "MMD".
      value: the statistic.
      p: the probability of such a value, or a larger one, if nothing has changed.
      p_holm: adjusted for all tests of the page (Holm 1979).
      psi: the size of the change (population stability index): under 0.1 little, over 0.25 much; None of MMD.
      alarm: whether ``p_holm`` is below the rate of false alarms.
    """

    method: str
    value: float
    p: float
    p_holm: float
    psi: float | None
    alarm: bool


def drift(
    reference: Mapping[str, np.ndarray],
    live: Mapping[str, np.ndarray],
    false_alarms: float = FALSE_ALARMS,
    seed: int = 0,
) -> dict[str, Test]:
    """Tests of the features that both have, by name, and of all inputs together, "inputs".

    Classes are tested by PSI, other features by KS (exact for small samples), and the inputs together by MMD. The
    p-values of PSI and MMD are those of permutations, which are exact where the examples of both are exchangeable
    under the hypothesis; so that by Holm's adjustment any false alarm of the page has at most the given probability.
    """
    rng = np.random.default_rng(seed)
    shared = {name: tuple(_finite(x[name]) for x in (reference, live)) for name in reference if name in live}
    shared = {name: pair for name, pair in shared.items() if min(map(len, pair)) >= LEAST}
    inputs = [name for name in shared if name.startswith("input.")]
    permutations = math.ceil(10 * (len(shared) + 1) / false_alarms)  # so that the least p can be told well
    found: dict[str, tuple[str, float, float, float | None]] = {}
    for name, (a_N, b_M) in shared.items():
        if name == CLASS:
            value, p = _psi_test(a_N.astype(int), b_M.astype(int), permutations, rng)
            found[name] = "PSI", value, p, value
        else:
            tested = stats.ks_2samp(a_N, b_M)
            found[name] = "KS", float(tested.statistic), float(tested.pvalue), psi(*_binned(a_N, b_M))
    sides = [[np.asarray(x[name], np.float64) for name in inputs] for x in (reference, live)]
    if len(inputs) > 1 and all(len({len(x) for x in side}) == 1 for side in sides):
        rows = [np.stack(side, 1)[np.isfinite(np.stack(side, 1)).all(1)] for side in sides]
        if min(map(len, rows)) >= LEAST:
            found["inputs"] = "MMD", *mmd(rows[0], rows[1], permutations, rng), None
    adjusted = holm({name: p for name, (_, _, p, _) in found.items()})
    return {
        name: Test(method, value, p, float(adjusted[name] or 0.0), size, float(adjusted[name] or 0.0) < false_alarms)
        for name, (method, value, p, size) in found.items()
    }


def psi(a_K: np.ndarray, b_K: np.ndarray) -> float:
    """The population stability index of two histograms, counts [K] or [R,K]; half an example stands in every empty
    bin."""
    a, b = (np.maximum(x, 0.5) / np.maximum(x, 0.5).sum(-1, keepdims=True) for x in (a_K, b_K))
    return ((a - b) * np.log(a / b)).sum(-1)


def mmd(a_NF: np.ndarray, b_MF: np.ndarray, permutations: int, rng: np.random.Generator) -> tuple[float, float]:
    """The squared maximum mean discrepancy (Gretton et al. 2012, equation 5), by a Gaussian kernel as wide as the
    median distance of standardised features, and the p-value of permutations; of at most ``_MMD_ROWS`` rows each."""
    a_NF, b_MF = (x[rng.permutation(len(x))[:_MMD_ROWS]] for x in (a_NF, b_MF))
    x_SF = np.concatenate([a_NF, b_MF])
    x_SF = (x_SF - x_SF.mean(0)) / np.maximum(x_SF.std(0), 1e-12)  # of both, so that permutations change nothing
    squares_S = (x_SF**2).sum(1)
    distance_SS = np.maximum(squares_S[:, None] + squares_S - 2 * x_SF @ x_SF.T, 0)
    median = float(np.median(distance_SS[np.triu_indices(len(x_SF), 1)]))
    kernel_SS = np.exp(-distance_SS / max(median, 1e-12))
    weight_S = np.repeat([1 / len(a_NF), -1 / len(b_MF)], [len(a_NF), len(b_MF)])
    value = float(weight_S @ kernel_SS @ weight_S)
    beyond = 0
    for start in range(0, permutations, 500):
        some = min(500, permutations - start)
        weights_RS = rng.permuted(np.tile(weight_S, (some, 1)), axis=1)
        beyond += int(np.sum(np.einsum("rs,rs->r", weights_RS @ kernel_SS, weights_RS) >= value * (1 - 1e-9)))
    return value, (1 + beyond) / (1 + permutations)


def _psi_test(a_N: np.ndarray, b_M: np.ndarray, permutations: int, rng: np.random.Generator) -> tuple[float, float]:
    """PSI of classes, and the p-value of permutations: of all examples, which of them are the live ones."""
    kinds = np.unique(np.concatenate([a_N, b_M]))
    a_K, b_K = ((x[:, None] == kinds).sum(0) for x in (a_N, b_M))
    value = float(psi(a_K, b_K))
    drawn_RK = rng.multivariate_hypergeometric(a_K + b_K, len(b_M), size=permutations, method="marginals")
    beyond = int(np.sum(psi(a_K + b_K - drawn_RK, drawn_RK) >= value * (1 - 1e-9)))
    return value, (1 + beyond) / (1 + permutations)


def _binned(a_N: np.ndarray, b_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts of both between the deciles of the first."""
    edges = np.unique(np.quantile(a_N, np.linspace(0, 1, _BINS + 1)[1:-1]))
    counted = [np.bincount(np.searchsorted(edges, x, side="right"), minlength=len(edges) + 1) for x in (a_N, b_M)]
    return counted[0], counted[1]


def _finite(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x[np.isfinite(x)]
