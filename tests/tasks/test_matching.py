"""The assignment of least cost is SciPy's, on the device and on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from bigbase_jax.tasks.matching import MATCHERS


def problems(kind, B, M, Q, seed=0):
    rng = np.random.default_rng(seed)
    cost = {
        "normal": lambda: rng.normal(size=(B, M, Q)),
        "ties": lambda: rng.integers(0, 3, (B, M, Q)),
        "all want one": lambda: rng.random((B, M, 1)) * rng.random((B, 1, Q)),  # long paths
        "far apart": lambda: 10.0 ** rng.uniform(-4, 4, (B, M, Q)),
    }[kind]()
    return cost.astype(np.float32), (rng.random((B, M)) < 0.7).astype(np.float32)


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("kind", ["normal", "ties", "all want one", "far apart"])
@pytest.mark.parametrize("shape", [(7, 5, 9), (6, 8, 8), (2, 1, 1), (3, 20, 60)])
def test_no_assignment_is_cheaper(matcher, kind, shape):
    cost, mask = problems(kind, *shape)
    found = np.asarray(jax.jit(MATCHERS[matcher])(cost, mask))
    for n in range(len(cost)):
        real = mask[n] > 0
        rows, columns = scipy.optimize.linear_sum_assignment(cost[n][real].astype(np.float64))
        ours = found[n][real]
        assert len(set(ours)) == len(ours) and not found[n][~real].any()
        least = cost[n][real][rows, columns].astype(np.float64).sum()
        np.testing.assert_allclose(cost[n][real][rows, ours].astype(np.float64).sum(), least, rtol=1e-6, atol=1e-6)
        if kind == "normal":  # of random costs there is one least
            np.testing.assert_array_equal(ours, columns)


@pytest.mark.parametrize("matcher", MATCHERS)
def test_costs_that_are_no_numbers_end_and_match_what_can_be(matcher):
    cost = np.float32([[[np.nan, 1, np.inf], [0, np.nan, -np.inf]], [[np.nan] * 3] * 2])
    found = np.asarray(jax.jit(MATCHERS[matcher])(cost, np.ones((2, 2), np.float32)))
    np.testing.assert_array_equal(found[0], [1, 2])
    assert len(set(found[1])) == 2


@pytest.mark.parametrize("matcher", MATCHERS)
def test_more_objects_than_queries_are_refused(matcher):
    with pytest.raises(ValueError, match="3 objects do not find a query each among 2"):
        MATCHERS[matcher](jnp.zeros((1, 3, 2)), jnp.ones((1, 3)))
