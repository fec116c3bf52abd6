"""From log-mel bands to sound without anything trained: phases that fit the magnitudes, found by iteration.

Legend: B recordings, T samples, F frames, N frequency bins, M mel bands.
"""

from __future__ import annotations

import numpy as np

from bigbase_jax.audio.features import LogMel
from bigbase_jax.core import UserError
from bigbase_jax.models.spectra import istft, stft


def magnitudes(mel_BFM: np.ndarray, features: LogMel, iterations: int = 50) -> np.ndarray:
    """f32[B,F,N] at least 0 whose bands are nearest to ``exp(mel_BFM)``: non-negative least squares, by the
    multiplicative updates of Lee & Seung 2001 from the pseudo-inverse on, near which they stay: of all solutions, an
    active-set solver finds one with few bins, 5 times as far from a recording's own magnitudes (measured).

    Raises:
      UserError: the bands are not finite numbers.
    """
    if not np.isfinite(mel_BFM).all():
        raise UserError("the mel bands have values that are no numbers; the model that gave them is broken.")
    bands_BFM = np.exp(np.minimum(mel_BFM, 20.0)).astype(np.float32)
    x_BFN = np.maximum(bands_BFM @ np.linalg.pinv(features.filters), 1e-6)
    wanted_BFN = bands_BFM @ features.filters.T
    for _ in range(iterations):
        x_BFN *= wanted_BFN / np.maximum((x_BFN @ features.filters) @ features.filters.T, 1e-12)
    return x_BFN


def griffin_lim(
    mel_BFM: np.ndarray, features: LogMel, iterations: int = 32, momentum: float = 0.99, seed: int = 0
) -> np.ndarray:
    """f32[B,F,M] natural logarithms of ``features`` (``vocoder_mel``) -> f32[B, F * hop] samples.

    The fast algorithm of Perraudin, Balazs & Sondergaard 2013; ``momentum`` 0 is that of Griffin & Lim 1984. The phases
    that it starts from are drawn by ``seed``.

    Raises:
      UserError: the bands are not finite numbers.
    """
    size, hop = features.fft, features.hop
    wanted_BFN = magnitudes(mel_BFM, features)
    angle_BFN = np.random.default_rng(seed).uniform(-np.pi, np.pi, wanted_BFN.shape).astype(np.float32)
    phase_BFN, before_BFN = np.exp(1j * angle_BFN), np.zeros_like(wanted_BFN, np.complex64)
    for _ in range(iterations):
        found_BFN = stft(istft(wanted_BFN * phase_BFN, size, hop, np), size, hop, np)
        phase_BFN = found_BFN - momentum / (1 + momentum) * before_BFN
        phase_BFN /= np.maximum(np.abs(phase_BFN), 1e-16)
        before_BFN = found_BFN
    wave_BT: np.ndarray = istft(wanted_BFN * phase_BFN, size, hop, np)
    return wave_BT
