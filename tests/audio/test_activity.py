"""Speech is found where it is: real digits between silence and over noise, and nothing in noise alone."""

import glob
import itertools
import os

import numpy as np
import pytest

from bigbase_jax.audio.activity import speech
from bigbase_jax.audio.files import decode
from bigbase_jax.core import UserError

RATE = 8000


def noise(rng, samples, colour):
    """Of loudness 1; amplitudes fall with frequency to the power of ``colour``."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    x_T = np.fft.irfft(spectrum / np.arange(1, len(spectrum) + 1) ** colour, samples)
    return (x_T / x_T.std()).astype(np.float32)


@pytest.fixture(scope="module")
def digits():
    root = os.path.join(os.environ.get("BIGBASE_DATA", ""), "fsdd", "recordings")
    if not os.path.isdir(root):
        pytest.skip("BIGBASE_DATA has no fsdd")
    return [decode(path, RATE) for path in sorted(glob.glob(f"{root}/*_[0-4].wav"))[::12]]


@pytest.mark.realdata
@pytest.mark.parametrize("snr", [None, 20, 10])
def test_a_digit_is_found_between_silence_and_over_noise(digits, snr):
    rng, off = np.random.default_rng(0), []
    for i, x_T in enumerate(digits):
        y_T = np.pad(x_T, 2 * RATE)
        if snr is not None:
            y_T = y_T + noise(rng, len(y_T), (0, 0.5, 1)[i % 3]) * x_T.std() * 10 ** (-snr / 20)
        found = speech(y_T, RATE)
        assert len(found) == 1
        off.append(np.subtract(found[0], (2, 2 + len(x_T) / RATE)))
    assert (np.abs(np.median(off, 0)) < 0.15).all()
    assert np.mean(np.abs(off) < 0.2) > 0.9


@pytest.mark.realdata
def test_sixteen_bits_shifts_and_gain_change_nothing(digits):
    y_T = np.concatenate([np.pad(x_T, RATE) for x_T in digits[:4]])
    found = speech(y_T, RATE)
    assert len(found) == 4 and all(a < b for a, b in found)
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(found))
    np.testing.assert_allclose(speech(0.2 * y_T, RATE), found, atol=0.15)
    np.testing.assert_allclose(speech((y_T * 32768).astype(np.int16), RATE), found, atol=0.02)
    np.testing.assert_allclose(speech(np.pad(y_T, (RATE, 0)), RATE), np.add(found, 1.0), atol=0.02)


@pytest.mark.parametrize("colour", [0, 0.5, 1])
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_noise_alone_is_no_speech(colour, rate):
    assert speech(0.1 * noise(np.random.default_rng(1), 12 * rate, colour), rate) == []


def test_silence_clicks_and_next_to_nothing():
    click = np.zeros(3 * RATE, np.float32)
    click[RATE] = 1.0
    for x_T in (click[:0], click[:1], click[:100], np.zeros(RATE, np.float32), np.full(RATE, np.nan), click):
        assert speech(x_T, RATE) == []
    with pytest.raises(UserError, match="one channel"):
        speech(np.zeros((4, 2)), RATE)
