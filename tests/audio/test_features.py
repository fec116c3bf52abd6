"""Log-mel features against transformers' extractors, on the host and on the device."""

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from bigbase_jax.audio.features import fbank, whisper


def recording(seconds=1.3, rate=16_000):
    t = np.arange(round(seconds * rate)) / rate
    voice = np.sin(2 * np.pi * 200 * t * (1 + t)) * np.exp(-t) + 0.1 * np.sin(2 * np.pi * 3100 * t)
    return (0.3 * voice + np.random.default_rng(0).normal(0, 0.01, len(t)) + 0.02).astype(np.float32)


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize("mels", [80, 128])
def test_whispers_features_are_the_published_ones(mels, xp):
    x_T = np.pad(recording(), (0, 30 * 16_000 - len(recording())))
    expected = WhisperFeatureExtractor(feature_size=mels)(x_T, sampling_rate=16_000, return_tensors="np")
    found_BFM = whisper(mels)(x_T[None], xp)
    assert found_BFM.shape == (1, 3000, mels)
    np.testing.assert_allclose(found_BFM[0].T, expected.input_features[0], atol=1e-4)


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize(("rate", "mels", "samples"), [(16_000, 80, 20_801), (8000, 40, 8000), (16_000, 23, 400)])
def test_filter_banks_are_kaldis(rate, mels, samples, xp):
    x_T = recording(2, rate)[:samples]
    features = fbank(mels, rate)
    bands = mel_filter_bank(
        features.fft // 2 + 1, mels, 20, rate / 2, rate, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    expected = spectrogram(
        x_T * 2**15,
        window_function(features.window, "povey", periodic=False),
        frame_length=features.window,
        hop_length=features.hop,
        fft_length=features.fft,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=bands,
        log_mel="log",
        mel_floor=features.floor,
        remove_dc_offset=True,
    )
    found_BFM = features(np.stack([x_T, 2 * x_T]), xp)
    assert found_BFM.shape == (2, features.frames(samples), mels)
    np.testing.assert_allclose(found_BFM[0].T, expected, atol=1e-4)
    assert np.abs(found_BFM[1] - found_BFM[0]).max() > 0.1
