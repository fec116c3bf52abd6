"""Speech with its text, for synthesis: utterances become phonemes, mel bands and pitch, once, and are kept.

An example is, with L = ``length`` and F = ``frames`` of ``dataset_info``:

- ``phonemes`` i32[L]: ids in ``symbols``, an edge before the first and behind the last; 0 is padding;
- ``speaker`` i32[]: in ``speakers``; ``rate`` and ``pitch`` f32[]: 1 and 0, what a user may ask for instead;
- ``mel`` f32[F,M]: of ``audio.features.vocoder_mel``; ``f0`` f32[F]: Hz, 0 where there is none; ``frames`` i32[];
- ``reference`` u8[R]: the text in UTF-8, and zeros.

Legend: T samples, F frames, M mel bands, L phonemes, N utterances.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from bigbase_jax.audio.features import vocoder_mel
from bigbase_jax.audio.pitch import yin
from bigbase_jax.build import suggest
from bigbase_jax.core import Codec, Dataset, Example, Fields, UserError
from bigbase_jax.data.cache import Store, Write, Writer, kept, source_digest
from bigbase_jax.data.files import LIMITS, Limits, limits_of, named_after
from bigbase_jax.data.sources.audio.transcribed import Corpus, Utterance
from bigbase_jax.data.sources.splits import deal, digest, to_split_off
from bigbase_jax.data.sources.text.base import Opened, given_text, named, splits_of
from bigbase_jax.text.phonemes import FrontEnd, front_end

SPLITS = ("train", "val", "test")
PADDING, EDGE = "", "^"
"""The symbols 0 and 1."""
RATES, SHIFTS = (0.5, 2.0), (-12.0, 12.0)
"""What may be asked for: times the usual speed, and semitones."""
_BEFORE, _BEHIND = "ˈˌ", "ːʰʲ\u0303\u0329"  # what changes the symbol behind it, or before it
_QUIET = 3.5  # of a frame's mean log-mel below the loudest, at the ends of a recording: it is silent
_MARGIN = 2  # silent frames that are kept
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])|\n+")
_VERSION = 1  # of what is kept
_CODE = ("audio.features", "audio.files", "audio.pitch", "text.phonemes", "text.spoken")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voices:
    """Utterances, and how examples are made of them; subclasses say where they come from.

    Left out, and counted, are those with nothing to speak, longer ones than ``seconds``, and those of more phonemes
    than frames, for which there is no alignment.

    Attributes:
      rate: samples per second.
      language: of the text front end, see ``text.phonemes.front_end``.
      seconds: that an utterance may have.
      val_fraction, test_fraction: shares that are taken from train where the data has no such split.
      seed: of the dealing.
    """

    rate: int = 16_000
    language: str = "en"
    seconds: float = 10.0
    val_fraction: float = 0.03
    test_fraction: float = 0.05
    seed: int = 0

    def utterances(self) -> list[Utterance]:
        """All there are, in order."""
        raise NotImplementedError

    def read(self, utterance: Utterance) -> np.ndarray:
        """Its samples, f32[T]."""
        raise NotImplementedError

    def origin(self) -> str:
        """Where they come from, in words."""
        raise NotImplementedError

    def file_signature(self) -> list[Any]:
        """What changes when they change."""
        raise NotImplementedError

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Dataset:
        """See ``core.RawDataset``.

        Raises:
          UserError: nothing to train on, or what cannot be read.
        """
        front = front_end(self.language)
        settings = [self.rate, self.seconds, self.val_fraction, self.test_fraction, self.seed, front.name]
        parts = [type(self).__name__, self.file_signature(), settings, [_VERSION, *map(source_digest, _CODE)]]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
        what = f"reading {self.origin()} once: phonemes, mel bands and pitch"
        return self.opened(kept(key, lambda: self._begin(front), cache, limit_bytes, say, what), parts)

    def _begin(self, front: FrontEnd) -> Write:
        found = self.utterances()
        left: collections.Counter[str] = collections.Counter()
        symbols_N = _read_all(front, [u.text for u in found])
        given = [named_after(u.split) or "train" for u in found]
        fractions = to_split_off(set(given) - {"train"}, self.val_fraction, self.test_fraction)
        split_N = deal(given, [f"{u.speaker} {u.text} {u.name}" for u in found], fractions, self.seed)
        seen = {s for symbols, split in zip(symbols_N, split_N, strict=True) if split == "train" for s in symbols or ()}
        symbols, speakers = [PADDING, EDGE, *sorted(seen)], sorted({u.speaker for u in found})

        def made(n: int) -> tuple[int, np.ndarray, np.ndarray]:
            mel_FM, f0_F = features_of(self.read(found[n]), self.rate)
            return n, mel_FM, f0_F

        def write(writer: Writer) -> Mapping[str, Any]:
            spoken = [n for n, some in enumerate(symbols_N) if some]
            left["without anything to speak"] = len(found) - len(spoken)
            hz: list[np.ndarray] = []
            for n, mel_FM, f0_F in _in_threads(made, spoken):
                ids_L = ids(symbols_N[n] or (), symbols)
                if len(mel_FM) > frames_of(self.seconds, self.rate):
                    left[f"longer than {self.seconds:g} s"] += 1
                    continue
                if len(ids_L) > len(mel_FM):
                    left[f"with more phonemes than frames (such as {found[n].name})"] += 1
                    continue
                if split_N[n] == "train":
                    hz.append(f0_F[f0_F > 0])
                writer.add(
                    {
                        "mel": mel_FM.astype(np.float16),
                        "f0": f0_F,
                        "phonemes": ids_L.astype(np.int16),
                        "speaker": np.int32(speakers.index(found[n].speaker)),
                        "split": np.uint8(SPLITS.index(split_N[n])),
                        "name": np.frombuffer(_name(found[n]).encode(), np.uint8),
                    }
                )
            if not hz:
                why = ", ".join(f"{number:,} {reason}" for reason, number in left.items() if number)
                raise UserError(f"{self.origin()}: no utterance is left to train on ({why or 'there is none'}).")
            octaves = np.log2(np.concatenate(hz) if any(map(len, hz)) else [150.0])
            about = {"symbols": symbols, "speakers": speakers, "front_end": front.name, "left": dict(left)}
            return {**about, "pitch": [float(octaves.mean()), max(float(octaves.std()), 0.05)]}

        return write

    def opened(self, rows_N: Store, parts: list[Any]) -> Dataset:
        """The data set of what was read."""
        about, count = rows_N.about, collections.Counter(rows_N.values("split").tolist())
        rows = {name: np.flatnonzero(rows_N.values("split") == i) for i, name in enumerate(SPLITS) if count[i]}
        notes = ", ".join(f"{number:,} {why}" for why, number in about["left"].items() if number)
        info = {
            "vocab_size": len(about["symbols"]),
            "num_speakers": len(about["speakers"]),
            **{name: tuple(about[name]) for name in ("symbols", "speakers")},
            "front_end": about["front_end"],
            "rate": self.rate,
            "length": max(32, 16 * math.ceil(rows_N.lengths("phonemes").max() / 16)),
            "frames": 16 * math.ceil(rows_N.lengths("f0").max() / 16),
            "pitch_centre": about["pitch"][0],
            "pitch_spread": about["pitch"][1],
        }

        said = {_name(u): np.frombuffer(u.text.encode(), np.uint8) for u in self.utterances()}
        size = max(map(len, said.values()))
        name_N = [bytes(rows_N.get("name", row)).decode() for row in range(len(rows_N))]

        def example(row: int) -> Example:
            reference = said[name_N[row]]
            mel_FM, f0_F = rows_N.get("mel", row), rows_N.get("f0", row)
            pad = info["frames"] - len(f0_F)
            return {
                **asked(rows_N.get("phonemes", row), info["length"], int(rows_N.get("speaker", row))),
                "mel": np.pad(mel_FM.astype(np.float32), ((0, pad), (0, 0))),
                "f0": np.pad(f0_F, (0, pad)),
                "frames": np.int32(len(f0_F)),
                "reference": np.pad(reference, (0, size - len(reference))),
            }

        splits = splits_of(rows_N, example, rows, None, rows_N.lengths("f0"), ("mel", "f0"))
        for name, source in splits.items():
            source.name = lambda i, r=rows[name]: name_N[r[i]]  # type: ignore[attr-defined]
        hours = rows_N.lengths("f0").sum() * vocoder_mel(self.rate).hop / self.rate / 3600
        who = f"{len(info['speakers'])} speakers, " if len(info["speakers"]) > 1 else ""
        text = f"{self.origin()}: {len(rows_N):,} utterances ({who}{hours:.2f} hours), {info['vocab_size']} symbols by"
        return Opened(splits, info, f"{text} {about['front_end']}{notes and f'; left out: {notes}'}", [digest(parts)])

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """Texts, by sentence."""
        return SpeakCodec(dataset_info, limits_of(config))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedVoices(Voices):
    """Recordings with their texts, in one of the layouts of ``transcribed``; see ``Voices``.

    Attributes:
      root: a folder, an archive or a table.
      test: the recordings whose names are this or follow it by alphabet are the test split; None: as the data says.
      limits: of archives and tables.
    """

    root: str
    test: str | None = None
    limits: Limits = LIMITS

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The files, as they were when this was first asked for."""
        return Corpus(self.root, (None, None), self.limits)

    def utterances(self) -> list[Utterance]:
        """
        Raises:
          UserError: none of the layouts, or a list that names a recording that is not there.
        """
        found = list(self.corpus.utterances())
        if self.test is None:
            return found
        last = [os.path.basename(u.name) >= self.test for u in found]
        if not any(last):
            raise UserError(f"no recording of {self.root} has a name of {self.test!r} or after; leave test out.")
        return [u._replace(split="test") if test else u for u, test in zip(found, last, strict=True)]

    def read(self, utterance: Utterance) -> np.ndarray:
        return self.corpus.read(utterance, self.rate)

    def origin(self) -> str:
        return self.root

    def file_signature(self) -> list[Any]:
        return [[(f.name, f.size, f.mtime_ns, *f.permission) for f in self.corpus.files.values()], self.test]


def _name(u: Utterance) -> str:
    return f"{u.name} from {u.offset:g} s" if u.offset else u.name


def frames_of(seconds: float, rate: int) -> int:
    """F of so many seconds."""
    return int(vocoder_mel(rate).frames(int(seconds * rate)))


def features_of(x_T: np.ndarray, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Mel bands f32[F,M] and pitch f32[F] of a recording, without most of the silence at its ends."""
    features = vocoder_mel(rate)
    if len(x_T) < features.fft:
        x_T = np.pad(x_T, (0, features.fft - len(x_T)))
    mel_FM = features(x_T[None], np)[0]
    loud = np.flatnonzero((level := mel_FM.mean(1)) > level.max() - _QUIET)
    part = slice(max(loud[0] - _MARGIN, 0), loud[-1] + 1 + _MARGIN)
    return mel_FM[part], yin(x_T, rate, features.hop, len(mel_FM))[part]


def units(symbols: Sequence[str], pinyin: bool = False) -> list[str]:
    """Symbols of a front end with the marks that change them: stress, length, nasality, tones of pinyin."""
    found: list[str] = []
    mark, behind = "", _BEHIND + "12345" * pinyin
    for symbol in symbols:
        if symbol in _BEFORE:
            mark = symbol
        elif symbol in behind and found:
            found[-1] += symbol
        else:
            found.append(mark + symbol)
            mark = ""
    return found


def ids(units: Sequence[str], symbols: Sequence[str]) -> np.ndarray:
    """i64[L], between edges; what the voice has not learned is the same without its marks, or left out."""
    known = {symbol: i for i, symbol in enumerate(symbols)}
    plain = (u if u in known else u.strip(_BEFORE + _BEHIND + "12345") for u in units)
    return np.array([1, *(known[u] for u in plain if u in known), 1])


def asked(ids_L: np.ndarray, length: int, speaker: int, rate: float = 1.0, pitch: float = 0.0) -> Example:
    """What the model reads of a sentence."""
    phonemes = np.zeros(length, np.int32)
    phonemes[: len(ids_L)] = ids_L
    return {"phonemes": phonemes, "speaker": np.int32(speaker), "rate": np.float32(rate), "pitch": np.float32(pitch)}


@dataclasses.dataclass(frozen=True)
class SpokenCodec(Codec):
    """Texts that are to be spoken, sentence by sentence; rows may say by whom, and how fast.

    Attributes:
      dataset_info: of the voice: the names of its ``speakers``.
      limits: of reading a file.
    """

    dataset_info: Mapping[str, Any]
    limits: Limits = LIMITS

    options: ClassVar[tuple[str, ...]] = ("speaker", "rate")

    @property
    def fields(self) -> Fields:  # type: ignore[override]
        names = [(name,) for name in ("text", "sentence", "transcript")]
        return Fields(
            {"text": names}, lines=True, short={"speaker": self.dataset_info["speakers"]}, options=self.options
        )

    def sentences(self, given: bytes | str | Mapping[str, Any]) -> list[str]:
        """Raises UserError where there is no text."""
        text = given_text(given, self.dataset_info, "text", self.limits)
        return [sentence for sentence in _SENTENCE.split(text) if sentence.strip()]

    def speaker(self, row: Mapping[str, Any]) -> int:
        """By name, or else by number; raises UserError where there is none such."""
        given, names = row.get("speaker"), list(map(str, self.dataset_info["speakers"]))
        if given in (None, ""):
            return 0
        if str(given) in names:
            return names.index(str(given))
        if str(given).isdigit() and int(given) < len(names):
            return int(given)
        raise UserError(f"there is no speaker {given!r}.{suggest(str(given), names[:20], 'speaker')}")

    def number(self, row: Mapping[str, Any], name: str, usual: float, bounds: tuple[float, float]) -> float:
        """An option; raises UserError where it is none from the one bound to the other."""
        given = row.get(name)
        try:
            value = usual if given in (None, "") else float(given)
        except (TypeError, ValueError):
            value = math.nan
        if not bounds[0] <= value <= bounds[1]:
            raise UserError(f"{name} is {given!r}; it is a number from {bounds[0]:g} to {bounds[1]:g}.")
        return value


@dataclasses.dataclass(frozen=True)
class SpeakCodec(SpokenCodec):
    """A text to be spoken, as an example for each sentence, or for each part of one that is too long.

    Rows may have a ``speaker`` (a name or a number), ``rate`` (times the usual speed) and ``pitch`` (semitones).
    """

    padded = ("phonemes",)
    options = ("speaker", "rate", "pitch")

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """
        Raises:
          UserError: no text, nothing in it that can be spoken, or a wrong option.
        """
        info, row = self.dataset_info, given if isinstance(given, Mapping) else {}
        options = self.speaker(row), self.number(row, "rate", 1.0, RATES), self.number(row, "pitch", 0.0, SHIFTS)
        with named(given):
            front, sentences = front_end(info["front_end"]), self.sentences(given)
            spoken = list(filter(None, _read_all(front, sentences)))
            if not spoken:
                front(" ".join(sentences))  # which says what is wrong with it
            parts = [part for some in spoken for part in _parts(some, info["length"] - 2)]
        return [asked(ids(part, info["symbols"]), info["length"], *options) for part in parts]


def _parts(units: Sequence[str], most: int) -> Iterator[Sequence[str]]:
    """Pieces of at most so many units, cut at the last pause or space that allows it."""
    while len(units) > most:
        stop = next((i for marks in (",;:.!?", " ") for i in range(most, most // 3, -1) if units[i - 1] in marks), most)
        yield units[:stop]
        units = units[stop:]
    if units:
        yield units


def _read_all(front: FrontEnd, texts: Sequence[str]) -> list[list[str] | None]:
    """The units of each text; None where nothing in it can be spoken."""
    pinyin = front.name == "zh-pinyin"
    try:
        return [units(symbols, pinyin) for symbols, _ in front.read_all(texts)]
    except UserError:
        if len(texts) < 2:
            return [None] * len(texts)
    half = len(texts) // 2
    return [*_read_all(front, texts[:half]), *_read_all(front, texts[half:])]


def _in_threads(made: Callable[[int], Any], items: Sequence[int]) -> Iterator[Any]:
    """Of each item in order, some at once."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for start in range(0, len(items), 64):
            yield from pool.map(made, items[start : start + 64])
