"""Vocoder features against HiFi-GAN's own code, inverse transforms, and Griffin-Lim on a recording."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank

from bigbase_jax.audio.features import vocoder_mel
from bigbase_jax.audio.files import decode
from bigbase_jax.audio.griffin_lim import griffin_lim, magnitudes
from bigbase_jax.core import UserError
from bigbase_jax.models.spectra import istft, stft


def noise(samples, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, (2, samples)).astype(np.float32)


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize(("rate", "samples"), [(22_050, 8192), (16_000, 5000), (8000, 2560)])
def test_features_are_hifi_gans(rate, samples, xp):
    features, x_BT = vocoder_mel(rate), noise(samples)
    fft, hop = features.fft, features.hop
    assert (fft, hop) == ((512, 128) if rate == 8000 else (1024, 256))
    high = min(8000, rate / 2)
    bands = mel_filter_bank(fft // 2 + 1, 80, 0, high, rate, norm="slaney", mel_scale="slaney")  # librosa's
    edge = (fft - hop) // 2
    padded = torch.nn.functional.pad(torch.tensor(x_BT)[:, None], (edge, edge), mode="reflect")[:, 0]
    window = torch.hann_window(fft)
    spectrum = torch.stft(padded, fft, hop, fft, window, center=False, onesided=True, return_complex=True)
    magnitude = torch.sqrt(torch.view_as_real(spectrum).pow(2).sum(-1) + 1e-9)
    expected = torch.log(torch.clamp(torch.tensor(bands.T, dtype=torch.float32) @ magnitude, min=1e-5))
    found_BFM = features(x_BT, xp)
    assert found_BFM.shape == (2, samples // hop, 80)
    np.testing.assert_allclose(np.swapaxes(found_BFM, 1, 2), expected, atol=1e-4)


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize(("fft", "hop"), [(64, 16), (48, 16), (64, 32)])
def test_what_is_transformed_comes_back(fft, hop, xp):
    x_BT = noise(10 * hop)
    y_BFN = stft(x_BT, fft, hop, xp)
    assert y_BFN.shape == (2, 10, fft // 2 + 1)
    np.testing.assert_allclose(istft(y_BFN, fft, hop, xp), x_BT, atol=1e-6)
    one = stft(x_BT[:, :hop], fft, hop, xp)  # one frame, mirrored more than once
    np.testing.assert_allclose(istft(one, fft, hop, xp), x_BT[:, :hop], atol=1e-6)


def test_magnitudes_have_the_bands():
    features = vocoder_mel(16_000)
    mel_BFM = features(noise(8192), np)
    found_BFN = magnitudes(mel_BFM, features)
    assert (found_BFN >= 0).all()
    assert np.abs(np.log(found_BFN @ features.filters) - mel_BFM).mean() < 0.02


def convergence(x_T, wave_T, features):
    """Of the magnitudes: |A - B| / |B|."""
    a, b = (np.abs(stft(x[None], features.fft, features.hop, np)) for x in (wave_T, x_T))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.realdata
def test_a_recording_comes_back(real_data):
    features = vocoder_mel(16_000)
    path = sorted((real_data / "kathleen_arctic" / "wavs").glob("*.ogg"))[0]
    x_T = decode(path, 16_000)
    x_T = x_T[: len(x_T) // features.hop * features.hop]
    mel_BFM = features(x_T[None], np)
    plain, fast = (griffin_lim(mel_BFM, features, momentum=m)[0] for m in (0.0, 0.99))
    assert len(fast) == len(x_T)
    wanted_FN = np.abs(stft(x_T[None], features.fft, features.hop, np))[0]
    found_FN = magnitudes(mel_BFM, features)[0]
    without_phases = np.linalg.norm(found_FN - wanted_FN) / np.linalg.norm(wanted_FN)  # what bands do not tell
    error = {m: convergence(x_T, w, features) for m, w in (("plain", plain), ("fast", fast))}
    assert without_phases < error["fast"] < min(1.1 * without_phases, error["plain"]), (without_phases, error)
    assert np.abs(features(fast[None], np) - mel_BFM).mean() < 0.25


def test_silence_one_frame_and_what_is_no_number():
    features = vocoder_mel(16_000)
    silent = np.full((1, 5, 80), np.log(1e-5), np.float32)
    assert np.abs(griffin_lim(silent, features)).max() < 1e-4
    assert griffin_lim(silent[:, :1], features).shape == (1, 256)
    assert np.isfinite(griffin_lim(silent + 200, features)).all()
    silent[0, 2, 3] = np.nan
    with pytest.raises(UserError, match="no numbers"):
        griffin_lim(silent, features)
