"""Words of a made-up language of whistles, for trying out speech without a file: synthetic, and said to be so.

A word is a melody of three notes. Speakers differ in pitch, speed, timbre and loudness; there is noise of every colour.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from bigbase_jax.core import Codec, Example, Source, UserError
from bigbase_jax.data.sources.audio.audio import AudioCodec, pcm16
from bigbase_jax.data.sources.splits import Split

_VERSION = 1  # of the sounds; part of the fingerprint
_STEPS = (0, 4, 7)  # semitones above a speaker's own note
_NAMES = ("do", "mi", "so")


class WhistledWords:
    """Seeded recordings of whistled words; a word is which of three notes follow each other, none twice in a row.

    Attributes:
      splits: ``audio`` i16[rate] and ``label`` i32[] each; recordings of all splits are alike.
      dataset_info: ``num_classes``, ``class_names`` and ``rate``.
      description: says that these are not recordings.
    """

    def __init__(
        self, rate: int = 16_000, num_train: int = 1200, num_val: int = 240, num_test: int = 240, seed: int = 0
    ):
        """
        Raises:
          UserError: fewer than two training words.
        """
        if num_train < 2:
            raise UserError(f"num_train is {num_train}; it must be at least 2.")
        self._words = [w for w in itertools.product(range(3), repeat=3) if w[0] != w[1] != w[2]]
        self._rate, self._seed = rate, seed
        starts = {"train": 0, "val": num_train, "test": num_train + num_val}
        counts = {"train": num_train, "val": num_val, "test": num_test}
        self._counts = counts

        def source(split: str) -> Source:
            label_N = np.arange(counts[split], dtype=np.int32) % len(self._words)
            return Split(split, counts[split], lambda i: self._made(starts[split] + i, label_N[i]), "", label_N)

        self.splits: Mapping[str, Source] = {split: source(split) for split in counts if counts[split]}
        names = tuple("-".join(_NAMES[note] for note in word) for word in self._words)
        self.dataset_info: Mapping[str, Any] = {"num_classes": len(names), "class_names": names, "rate": rate}
        self.description = f"{sum(counts.values()):,} synthetic sounds of {len(names)} whistled words (seed {seed})"

    def _made(self, number: int, label: np.int32) -> Example:
        random = np.random.default_rng((self._seed, number))
        rate, word = self._rate, self._words[label]
        note = int(rate * random.uniform(0.1, 0.2))
        steps = np.repeat([_STEPS[i] for i in word], note) + random.normal(0, 0.3)
        hz = 500 * 2 ** (random.uniform(-0.7, 0.7)) * 2 ** (steps / 12)
        phase = 2 * np.pi * np.cumsum(hz) / rate
        voice = sum(a * np.sin(k * phase) for k, a in enumerate(random.uniform(0, 1, 3) / (1, 2, 3), 1))
        envelope = np.tile(np.hanning(note), 3)
        spectrum = np.fft.rfft(random.normal(size=rate)) / np.arange(1, rate // 2 + 2) ** random.uniform(0, 1)
        noise = np.fft.irfft(spectrum, rate)
        start = random.integers(0, rate - 3 * note)
        x_T = noise / noise.std() * 0.02 * random.uniform(0.1, 1.5)
        x_T[start : start + 3 * note] += 0.2 * random.uniform(0.3, 1.5) * envelope * voice
        return {"audio": pcm16(x_T), "label": label}

    def fingerprint(self) -> str:
        """Of the version, the seed, the rate and the counts."""
        return f"whistled-{_VERSION}-{self._seed}-{self._rate}-" + "-".join(map(str, self._counts.values()))

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        return AudioCodec(int(dataset_info["rate"]))
