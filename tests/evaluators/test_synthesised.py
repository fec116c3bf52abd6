"""Speech against recordings: warping equals brute force, distortion its formula; and a voice is measured as a whole."""

import functools

import numpy as np

from bigbase_jax.evaluators.synthesis import Synthesised, cepstra, compared, warped


def test_warping_is_the_cheapest_path():
    random = np.random.default_rng(0)
    for F, G in ((1, 1), (1, 4), (5, 3), (6, 6)):
        a, b = random.normal(size=(F, 2)), random.normal(size=(G, 2))
        cost = np.sqrt(((a[:, None] - b) ** 2).sum(-1))

        @functools.cache
        def best(f, g, cost=cost):
            if f < 0 or g < 0:
                return np.inf
            before = 0.0 if f == g == 0 else min(best(f - 1, g - 1), best(f - 1, g), best(f, g - 1))
            return cost[f, g] + before

        first, second = warped(a, b)
        assert (first[0], second[0], first[-1], second[-1]) == (0, 0, F - 1, G - 1)
        assert set(zip(np.diff(first), np.diff(second), strict=True)) <= {(1, 1), (0, 1), (1, 0)}
        np.testing.assert_allclose(cost[first, second].sum(), best(F - 1, G - 1))


def test_distortion_is_kubicheks():
    a, b = np.zeros((3, 13)), np.zeros((3, 13))
    b[:, 0] = [1.0, 2.0, 3.0]
    hz, other = np.array([100.0, 0, 200.0]), np.array([200.0, 100.0, 200.0])
    found = compared(a, b, hz, other)
    np.testing.assert_allclose(found["mcd"], 10 / np.log(10) * np.sqrt(2) * 2)
    np.testing.assert_allclose(found["f0_error"], np.sqrt(12**2 / 2))
    np.testing.assert_allclose(found["voicing_error"], 1 / 3)
    assert np.isnan(compared(a, b, np.zeros(3), other)["f0_error"])


def test_cepstra_are_those_of_the_log_magnitude_and_no_loudness():
    """c_k of a spectrum whose logarithm is 2 c_1 cos(w) is c_1, and a louder one has the same."""
    w = np.pi * (np.arange(80) + 0.5) / 80
    mel = (2 * 0.7 * np.cos(w) + 2 * -0.2 * np.cos(3 * w))[None]
    found = cepstra(mel + 5.0)
    np.testing.assert_allclose(found[0, :3], [0.7, 0.0, -0.2], atol=1e-6)
    np.testing.assert_allclose(found, cepstra(mel), atol=1e-6)


def test_figures_need_examples():
    from bigbase_jax.core import Evaluated

    assert list(Synthesised().figures(Evaluated("synthesis", {}, {}))) == []
