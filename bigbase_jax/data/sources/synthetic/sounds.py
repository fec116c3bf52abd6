"""Sounds of made-up languages, for trying out speech without a file: synthetic, and said to be so.

A whistled word is a melody of three notes. Speakers differ in pitch, speed, timbre and loudness; noise has a colour.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from bigbase_jax.audio.files import pcm16
from bigbase_jax.core import Codec, Example, Source, UserError
from bigbase_jax.data.sources.audio.audio import AudioCodec
from bigbase_jax.data.sources.audio.transcribed import Settings, Transcribed, TranscribedCodec, Utterance
from bigbase_jax.data.sources.audio.voices import Voices
from bigbase_jax.data.sources.splits import Split
from bigbase_jax.text.tokenizer import Characters

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


_LETTERS = "abcdefgh"
_SPOKEN = ("bad", "bag", "cab", "cafe", "dad", "deaf", "egg", "fade", "feed", "gab", "had", "head")


class SpokenTones(Transcribed):
    """Sentences in an alphabet of tones and noises, for trying out recognition without a file: synthetic.

    Each of eight letters is a sound of its own: two tones, or a band of noise. There are twelve words, with silence
    between; speakers differ in pitch, speed and loudness. See ``Transcribed``; recordings of all splits are alike.
    """

    def __init__(
        self,
        rate: int = 16_000,
        num_train: int = 600,
        num_val: int = 60,
        num_test: int = 60,
        frame_seconds: float = 0.04,
        tokenizer: Any = Characters(False),  # noqa: B008
        seed: int = 0,
    ):
        counts = {"train": num_train, "val": num_val, "test": num_test}
        self._rate, self._seed = rate, seed
        names = [(split, n) for split, count in counts.items() for n in range(count)]
        said: dict[str, list[Utterance]] = {split: [] for split, count in counts.items() if count}
        for number, (split, n) in enumerate(names):
            random = np.random.default_rng((seed, number, 0))
            text = " ".join(random.choice(_SPOKEN, random.integers(1, 5)))
            note = random.uniform(0.09, 0.15)  # seconds of a letter
            said[split].append(Utterance(f"{split}[{n}]", text, split, str(number), note, (len(text) + 2) * note))
        settings = Settings(rate=rate, frame_seconds=frame_seconds, tokenizer=tokenizer, order=2)
        what = f"a synthetic alphabet of tones and noises (seed {seed})"
        super().__init__(said, lambda u: u.duration or 0.0, self._spoken, what, settings, [_VERSION, seed, rate])

    def _spoken(self, u: Utterance) -> np.ndarray:
        random = np.random.default_rng((self._seed, int(u.speaker), 1))
        x_T = _tones(u.text, self._rate, u.offset, 2 ** random.uniform(-0.2, 0.2), random)
        x_T = 0.2 * random.uniform(0.3, 1.5) * x_T
        return (x_T + 0.003 * random.normal(size=len(x_T))).astype(np.float32)

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        return TranscribedCodec(int(dataset_info["rate"]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpokenTexts(Voices):
    """Sentences in the alphabet of ``SpokenTones``, by two speakers, for trying out synthesis without a file.

    Attributes:
      num: utterances of all splits.
    """

    rate: int = 8_000
    language: str = "characters"
    num: int = 400
    val_fraction: float = 0.1
    test_fraction: float = 0.1

    def utterances(self) -> list[Utterance]:
        random = np.random.default_rng(self.seed)
        texts = [" ".join(random.choice(_SPOKEN, random.integers(1, 5))) for _ in range(self.num)]
        return [Utterance(f"{n:05d}", text, "", ("low", "high")[n % 2]) for n, text in enumerate(texts)]

    def read(self, utterance: Utterance) -> np.ndarray:
        random = np.random.default_rng((self.seed, int(utterance.name)))
        pitch = (0.9, 1.1)[utterance.speaker == "high"] * random.uniform(0.98, 1.02)
        x_T = 0.2 * _tones(utterance.text, self.rate, random.uniform(0.1, 0.12), pitch, random)
        return (x_T + 0.001 * random.normal(size=len(x_T))).astype(np.float32)

    def origin(self) -> str:
        return f"a synthetic alphabet of tones and noises (seed {self.seed})"

    def file_signature(self) -> list[Any]:
        return [_VERSION, self.num]


def _tones(text: str, rate: int, note: float, pitch: float, random: np.random.Generator) -> np.ndarray:
    """f64[T]: the sounds of letters, ``note`` seconds each, times ``pitch``."""
    size = round(note * rate)
    t = np.arange(size) / rate
    parts = [np.zeros(size)]
    for letter in text:
        kind = _LETTERS.find(letter)
        if kind < 0:
            parts.append(np.zeros(size))
        elif kind < 5:
            low, high = 250 * pitch * 1.35**kind, 900 * pitch * 1.2 ** ((3 * kind) % 5)
            parts.append(np.hanning(size) * (np.sin(2 * np.pi * low * t) + 0.6 * np.sin(2 * np.pi * high * t)))
        else:
            spectrum = np.fft.rfft(random.normal(size=size))
            hz = np.fft.rfftfreq(size, 1 / rate)
            spectrum *= np.exp(-(((hz - pitch * (500, 1000, 1600)[kind - 5]) / 200) ** 2))
            noise = np.fft.irfft(spectrum, size)
            parts.append(np.hanning(size) * noise / max(float(np.abs(noise).max()), 1e-9))
    return np.concatenate([*parts, np.zeros(size)])
