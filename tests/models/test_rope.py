"""Rotary positions: what they must leave alone, what they tell, and how they are stretched."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.rope import frequencies, rotate, rotation

K = 8


def turned(x_LHK, first=0, **scaling):
    positions = first + jnp.arange(len(x_LHK))
    return rotate(x_LHK[None], rotation(positions[None], K, 100.0, scaling or None))[0]


def x_and_y():
    return tuple(jax.random.normal(key, (6, 2, K)) for key in jax.random.split(jax.random.key(0)))


def test_lengths_stay_and_the_first_position_is_not_turned():
    x, _ = x_and_y()
    y = turned(x)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(y[0], x[0], atol=1e-6)
    assert np.abs(np.asarray(y[1:] - x[1:])).max() > 0.1


def test_products_depend_on_the_distance_alone():
    x, y = x_and_y()
    products = [jnp.einsum("lhk,shk->hls", turned(x, first), turned(y, first)) for first in (0, 17)]
    np.testing.assert_allclose(*products, atol=1e-4)
    assert np.abs(np.asarray(products[0] - jnp.einsum("lhk,shk->hls", x, y))).max() > 0.1


def test_pairs_turn_as_complex_numbers():
    x, _ = x_and_y()
    z = np.asarray(x[..., : K // 2] + 1j * x[..., K // 2 :])
    turns = np.exp(1j * np.arange(6)[:, None] * 100.0 ** (-np.arange(K // 2) / (K // 2)))
    z = z * turns[:, None]
    np.testing.assert_allclose(turned(x), np.concatenate([z.real, z.imag], -1), atol=1e-5)


def test_linear_scaling_reads_positions_between_those_of_training():
    x = jnp.broadcast_to(x_and_y()[0][:1], (6, 2, K))
    stretched, plain = turned(x, rope_type="linear", factor=2.0), turned(x)
    np.testing.assert_allclose(stretched[2::2], plain[1:3], atol=1e-6)


def test_llama3_slows_slow_pairs_only():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    (plain, _), (scaled, factor) = frequencies(32, 10_000.0), frequencies(32, 10_000.0, scaling)
    turns = 64 * plain / (2 * math.pi)
    assert factor == 1.0 and (turns > 4).any() and (turns < 1).any() and ((turns > 1) & (turns < 4)).any()
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_yarn_slows_slow_pairs_and_cools_the_softmax():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    (plain, _), (scaled, factor) = frequencies(64, 10_000.0), frequencies(64, 10_000.0, scaling)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
    np.testing.assert_allclose(scaled[0], plain[0])
    np.testing.assert_allclose(scaled[-1], plain[-1] / 4)
    assert (np.diff(scaled) < 0).all()
    assert frequencies(64, 1e4, {**scaling, "attention_factor": 1.5})[1] == 1.5


@pytest.mark.parametrize(
    ("width", "scaling", "says"),
    [
        (7, None, "a head is 7 wide"),
        (8, {"rope_type": "dynamic"}, "rope_type is 'dynamic'; it is one of 'default', 'linear'"),
        (8, {"rope_type": "llama3", "factor": 2.0}, "needs the number 'low_freq_factor'"),
    ],
)
def test_mistakes_are_told(width, scaling, says):
    with pytest.raises(ModelError, match=says):
        frequencies(width, 1e4, scaling)
