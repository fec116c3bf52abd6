"""Recordings and what is said in them, from the layouts that corpora come in.

What ``root`` may be, a folder or an archive (zip, tar):

- a table (CSV, JSON lines, ...), or a folder with some, with a row for each utterance: its file, its text, and where
  there are such columns ``offset`` and ``duration`` in seconds, ``split`` and ``speaker`` (NeMo's manifests, Common
  Voice); also JSON of utterances by name, as SpeechBrain has it;
- LibriSpeech: ``ID.flac`` and ``*.trans.txt``;
- Sphinx (AN4): ``*.transcription``, and ``*.fileids``;
- Kaldi: folders with ``wav.scp`` and ``text``, and where there are such ``segments`` and ``utt2spk``;
- ``NAME.txt`` beside each recording;
- LJSpeech: ``metadata.csv`` of lines ``ID|TEXT`` or ``ID|TEXT|AS SPOKEN``, without a header;
- yesno: recordings whose names are what is said, ``1_0_0_1.wav``;
- digits: ``DIGIT_SPEAKER_TAKE.wav``, of which takes 0 to 4 are the test split (FSDD).

Legend: T samples, U tokens of a transcript, R bytes of the longest reference, N utterances.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbase_jax.audio.files import SUFFIXES, decode, length, pcm16, resampled
from bigbase_jax.core import Codec, Example, Fields, Source, UserError
from bigbase_jax.data.files import (
    LIMITS,
    TABLES,
    Limits,
    existing,
    files_of,
    given_file,
    is_archive,
    kind_of,
    named_after,
    one_file,
    open_file,
)
from bigbase_jax.data.rows import Row, checked, lines_of, rows
from bigbase_jax.data.sources.audio.audio import COLUMNS, column, read
from bigbase_jax.data.sources.splits import Split, deal, digest, to_split_off
from bigbase_jax.text import ngram
from bigbase_jax.text.normalise import check_kind, normalise, words
from bigbase_jax.text.normalise import kind_of as normalisation_of
from bigbase_jax.text.tokenizer import Characters, Symbols, Tokenizer, dataset_info_of

_PATHS = ("audio_filepath", *COLUMNS)
_TEXTS = ("text", "transcript", "transcription", "sentence", "wrd", "words", "normalized_text")
_SPEAKERS = ("speaker", "speaker_id", "spk_id", "client_id")
_LISTS = frozenset({".transcription", ".fileids", ".txt", ".scp", "", *TABLES})
_YESNO = re.compile(r"[01](_[01])+")
_DIGIT = re.compile(r"[0-9]_[A-Za-z]+_[0-9]{1,4}")
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_FEW = 4  # speakers, of whom none is set apart
_MOST_GRAMS = 300_000  # of a language model that a run keeps among the facts of its data


class Utterance(NamedTuple):
    """What is said in a recording, or in a part of it.

    Attributes:
      name: of its file, relative to the root.
      text: as it was transcribed.
      split: what its list or folder is called; "" where none is named.
      speaker: "" where that is not known.
      offset, duration: of the part, in seconds; None: all that follows.
    """

    name: str
    text: str
    split: str = ""
    speaker: str = ""
    offset: float = 0.0
    duration: float | None = None


class Transcribed:
    """A data set of utterances, from whatever gives their samples: tokens, splits, facts and a language model.

    An example is ``audio`` i16[T] of its own length, ``audio_length`` i32[], ``labels`` i32[U], 0 behind the end,
    ``labels_length`` i32[], and ``reference`` u8[R], the transcript in UTF-8 and zeros.

    Attributes:
      splits: of examples, with ``lengths`` in samples; ``train`` has each as often as there are speeds.
      dataset_info: ``rate``, ``normalisation``, ``vocab_size`` and ``tokenizer``; ``language_model``, an ARPA file of
        the training transcripts or of the user's; ``frame_seconds``.
      description: what there is, and what was left out, by count.
    """

    def __init__(
        self,
        utterances: Mapping[str, Sequence[Utterance]],
        seconds_of: Callable[[Utterance], float],
        read: Callable[[Utterance], np.ndarray],
        what: str,
        settings: Settings,
        signature: Sequence[object] = (),
        in_memory: str = "",
    ):
        """
        Args:
          utterances: by split.
          seconds_of: how long one is.
          read: its samples, f32[T].
          what: the data, in words.
          settings: what is made of it.
          signature: of the files, for the fingerprint.
          in_memory: see ``core.Source``.

        Raises:
          UserError: nothing is left to train on, or an utterance of another split is too long.
        """
        s = settings
        texts = [u.text for u in utterances["train"]]
        kind = s.normalisation or normalisation_of(texts)
        said = {name: [normalise(u.text, kind) for u in some] for name, some in utterances.items()}
        others = [text for name, some in said.items() if name != "train" for text in some]
        if not any(said["train"]):
            raise UserError(f"{what}: no training transcript has a word in it.")
        tokenizer = s.tokenizer.fit(lambda: iter(said["train"]), lambda: iter(others), False)
        tokens, unknown = _tokens(tokenizer, said)
        apart = f"; {unknown:,} of other splits have characters that training lacks" if unknown else ""
        rows: dict[str, list[tuple[int, float]]] = {}
        seconds = {name: np.array([seconds_of(u) for u in some]) for name, some in utterances.items()}
        for name in utterances:
            if name != "train":
                if (seconds[name] > s.seconds).any():
                    n = int(np.argmax(seconds[name] > s.seconds))
                    raise UserError(
                        f"{utterances[name][n].name} of the {name} split has {seconds[name][n]:.1f} seconds, and"
                        f" seconds={s.seconds:g} is the most; raise that, or cut it by offset and duration."
                    )
                rows[name] = [(n, 1.0) for n in range(len(tokens[name]))]
        rows["train"], left_out = _trainable(tokens["train"], seconds["train"], s)
        notes = [f"{count:,} {why}" for why, count in left_out.items() if count]
        if not rows["train"]:
            raise UserError(f"{what}: no utterance is left to train on ({', '.join(notes)}).")
        most = max(len(t) for some in tokens.values() for t in some)
        size = max(len(u.text.encode()) for some in utterances.values() for u in some)

        def source(split: str) -> Source:
            def example(i: int) -> Example:
                n, speed = rows[split][i]
                u, labels = utterances[split][n], tokens[split][n]
                x_T = read(u)
                if speed != 1:
                    x_T = resampled(x_T, 8000, round(8000 / speed))
                reference = np.frombuffer(u.text.encode(), np.uint8)
                return {
                    "audio": pcm16(x_T),
                    "audio_length": np.int32(len(x_T)),
                    "labels": np.pad(labels, (0, most - len(labels))).astype(np.int32),
                    "labels_length": np.int32(len(labels)),
                    "reference": np.pad(reference, (0, size - len(reference))),
                }

            samples = [math.ceil(seconds[split][n] / speed * s.rate) + 1 for n, speed in rows[split]]
            names = [utterances[split][n].name for n, _ in rows[split]]
            lengths, name = np.array(samples), names.__getitem__
            return Split(split, len(names), example, in_memory, lengths=lengths, sequences=("audio",), name=name)

        self.splits: Mapping[str, Source] = {
            name: source(name) for name in ("train", "val", "test", *sorted(rows)) if name in rows
        }
        self.dataset_info: Mapping[str, Any] = {
            **dataset_info_of(tokenizer),
            "rate": s.rate,
            "normalisation": kind,
            "frame_seconds": s.frame_seconds,
            "language_model": s.language_model_of([words(text, kind) for text in said["train"]]),
        }
        count, hours = sum(map(len, utterances.values())), sum(x.sum() for x in seconds.values()) / 3600
        left = f"; left out of training: {', '.join(notes)}" if notes else ""
        self.description = f"{count:,} utterances ({hours:.2f} hours) in {what}{left}{apart}"
        listed = [(name, *map(tuple, some)) for name, some in sorted(utterances.items())]
        self._examples = digest([*listed, *signature])
        self._encoded = digest([self._examples, tokenizer.state(), rows, s.rate, kind, *self.dataset_info.values()])

    def fingerprint(self) -> str:
        """Of texts, files and how they become examples."""
        return self._encoded

    def examples(self) -> str:
        """Of texts and files."""
        return self._examples


@dataclasses.dataclass(eq=False, kw_only=True)
class Settings:
    """What is made of utterances.

    Attributes:
      rate: samples per second.
      seconds: that an utterance may have; longer ones are left out of training.
      speeds: at which each training utterance is heard in an epoch (Ko et al. 2015).
      frame_seconds: between the frames that a model says one token each in: of too few there is no alignment.
      normalisation: see ``text.normalise``; None: by what script it is.
      tokenizer: fitted to the normalised training transcripts.
      order: of the language model of words (of characters, without spaces) that is learned from these; 0: none.
      language_model: an ARPA file to take instead.
    """

    rate: int = 16_000
    seconds: float = 16.0
    speeds: tuple[float, ...] = (1.0,)
    frame_seconds: float = 0.04
    normalisation: str | None = None
    tokenizer: Any = Characters(False)  # noqa: RUF009
    order: int = 4
    language_model: str | None = None

    def __post_init__(self) -> None:
        if not self.speeds or not all(0.5 <= speed <= 2 for speed in self.speeds):
            raise UserError(f"speeds is {self.speeds}; it holds factors from 0.5 to 2, such as (0.9, 1.0, 1.1).")
        if not self.seconds > 0 or not self.frame_seconds > 0:
            raise UserError(f"seconds is {self.seconds} and frame_seconds {self.frame_seconds}; both are above 0.")
        if self.normalisation is not None:
            check_kind(self.normalisation)

    def language_model_of(self, sentences: Sequence[Sequence[str]]) -> str | None:
        """As an ARPA file, small enough to be kept with a run."""
        if self.language_model is not None:
            with open_file(one_file(self.language_model)) as file:
                text = str(file.read(ngram.MOST + 1).decode(errors="replace"))
            ngram.from_arpa(text, self.language_model)
            return text
        order, least = self.order, 1
        while order:
            model = ngram.fit(sentences, order, least)
            if len(model.log_p) <= _MOST_GRAMS:
                return model.arpa()
            order, least = (order, least + 1) if least < 3 else (order - 1, 2)
        return None


@dataclasses.dataclass(eq=False)
class TranscribedAudio(Settings, Transcribed):
    """A corpus of transcribed speech in one of the layouts above, or an archive of one; see ``Transcribed``.

    Splits are called after folders, lists or a column; of several of one kind (``test-clean``, ``test-other``) the
    first by alphabet has its name and the others keep theirs. What lacks is taken from train, by speakers where these
    are known and no fewer than four.

    Attributes:
      root: of which the lists and the headers of recordings are read.
      path, text: columns of a table; None: the usual names.
      val_fraction, test_fraction: of the speakers, or else of the utterances.
      seed: of the splits.
      limits: of archives and tables.

    Raises:
      UserError: none of these layouts, a list that names a recording that is not there, or what ``Transcribed`` says.
    """

    root: str
    _: dataclasses.KW_ONLY
    path: str | None = None
    text: str | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    seed: int = 0
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        super().__post_init__()
        root, fractions = self.root, {"val": self.val_fraction, "test": self.test_fraction}
        corpus = Corpus(root, (self.path, self.text), self.limits)
        found = list(corpus.utterances())
        if not found:
            raise UserError(f"{root} holds no utterance.")
        split_N, dealt = _splits(found, corpus.yesno, fractions, self.seed)
        utterances: dict[str, list[Utterance]] = defaultdict(list)
        for u, split in zip(found, split_N, strict=True):
            utterances[split].append(u)
        if "train" not in utterances:
            raise UserError(f"{root} has the splits {', '.join(sorted(utterances))} and none to train on.")
        signature = [(f.name, f.size, f.mtime_ns) for f in corpus.files.values() if kind_of(f.name) in SUFFIXES]
        read = lambda u: corpus.read(u, self.rate)  # noqa: E731
        Transcribed.__init__(self, utterances, corpus.seconds, read, f"{root}{dealt}", self, signature)

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """Recordings at the rate of the training."""
        return TranscribedCodec(int(dataset_info["rate"]))


@dataclasses.dataclass(frozen=True)
class TranscribedCodec(Codec):
    """A user's recording: a file, its bytes, or a row whose ``audio`` is these in base64; a table names files.

    Attributes:
      rate: samples per second that the model was trained on.
    """

    rate: int

    fields = Fields({"audio": [(name,) for name in _PATHS]}, files=True)
    padded = ("audio",)
    length = "audio_length"

    @property
    def least(self) -> int:
        """A second."""
        return self.rate

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """``audio`` i16[T] and ``audio_length`` i32[].

        Raises:
          UserError: it does not decode.
        """
        x_T = pcm16(decode(given_file(given, "audio", "sound"), self.rate))
        return [{"audio": x_T, "audio_length": np.int32(len(x_T))}]

    def fit(self, example: Example, shapes: Mapping[str, tuple[int, ...]]) -> Example:
        """Silence behind the end.

        Raises:
          UserError: it is longer than the model takes.
        """
        audio, most = example["audio"], shapes["audio"][0]
        if int(example["audio_length"]) > most:
            raise UserError(
                f"it has {int(example['audio_length']) / self.rate:.1f} seconds, and the model takes"
                f" {most / self.rate:.1f}; train with a larger seconds=, or cut it."
            )
        return {**example, "audio": np.pad(audio[:most], (0, max(most - len(audio), 0)))}


def _tokens(tokenizer: Tokenizer, said: Mapping[str, Sequence[str]]) -> tuple[dict[str, list[np.ndarray]], int]:
    """The tokens of all transcripts, and how many hold characters that have none, and were left out."""
    known = set(tokenizer.characters) if isinstance(tokenizer, Symbols) and not tokenizer.fallback else None
    unknown, found = 0, {}
    for name, texts in said.items():
        if known is not None:
            unknown += sum(not set(text) <= known for text in texts)
            texts = ["".join(c for c in text if c in known) for text in texts]
        found[name] = [tokens_U for tokens_U, _ in tokenizer.encode_batch(texts)]
    return found, unknown


def _trainable(
    tokens: Sequence[np.ndarray], seconds_N: np.ndarray, settings: Settings
) -> tuple[list[tuple[int, float]], dict[str, int]]:
    """(utterance, speed) of what CTC can be trained on, and how many utterances are not, by reason."""
    left = {"without a word": 0, f"longer than {settings.seconds:g} s": 0, "shorter than their tokens": 0}
    empty, long, short = left
    rows = []
    for n, (labels, seconds) in enumerate(zip(tokens, seconds_N, strict=True)):
        needed = len(labels) + int(np.sum(labels[1:] == labels[:-1]))  # a blank between two of a kind
        speeds = [speed for speed in settings.speeds if seconds / speed <= settings.seconds]
        possible = [speed for speed in speeds if seconds / speed // settings.frame_seconds >= needed]
        if not len(labels):
            left[empty] += 1
        elif seconds > settings.seconds or not speeds:
            left[long] += 1
        elif not possible:
            left[short] += 1
        else:
            rows += [(n, speed) for speed in possible]
    return rows, left


def _splits(
    found: Sequence[Utterance], yesno: bool, fractions: Mapping[str, float], seed: int
) -> tuple[list[str], str]:
    """The split of each utterance, and how they were dealt, in words."""
    names: dict[str, str] = {"": "train"}
    for split in sorted({u.split for u in found} - {""}):
        kind = named_after(split)
        if kind is None:
            raise UserError(f"there is a split {split!r}; known are those called after train, val (dev) and test.")
        names[split] = kind if kind == "train" or kind not in names.values() else split
    split_N = [names[u.split] for u in found]
    wanted = to_split_off(set(split_N) - {"train"}, fractions["val"], fractions["test"])
    if yesno:
        wanted["test"] = 0.5
    speakers = {u.speaker for u, split in zip(found, split_N, strict=True) if split == "train"}
    by_speaker = len(speakers) >= _FEW and "" not in speakers
    of_N = [u.speaker if by_speaker else f"{u.name} {u.offset}" for u in found]
    dealt = f", {' and '.join(wanted)} taken from train" + " by speakers" * by_speaker if wanted else ""
    return deal(split_N, of_N, wanted, seed), dealt


class Corpus:
    """The files below a root, and the utterances that its lists name.

    Attributes:
      files: by name relative to the root.
      yesno: whether the names of recordings are what is said.
    """

    def __init__(self, root: str, columns: tuple[str | None, str | None], limits: Limits):
        self._root, self._columns, self.yesno = root, columns, False
        table = ""
        if not is_archive(root):
            if kind_of(root) in TABLES:
                table = os.path.abspath(existing(root, "file"))
            root = os.path.dirname(table) if table else existing(root)
        self.files = {file.name: file for file in files_of(root, SUFFIXES | _LISTS, limits)}
        self._table = os.path.basename(table)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for name in self.files:
            if kind_of(name) in SUFFIXES:
                self._by_stem[_stem(name)].append(name)

    def read(self, u: Utterance, rate: int) -> np.ndarray:
        """f32[T]; raises UserError naming a file that does not decode."""
        return read(self.files[u.name], rate, u.offset, u.duration)

    def seconds(self, u: Utterance) -> float:
        """By the header; of what cannot be read, 0: whoever reads it says so."""
        if u.duration is not None:
            return u.duration
        file = self.files[u.name]
        try:
            if file.member:
                with open_file(file) as opened:
                    return max(length(opened.read()) - u.offset, 0.0)
            return max(length(file.path) - u.offset, 0.0)
        except UserError:
            return 0.0

    def utterances(self) -> Iterator[Utterance]:
        """Of the first layout that fits; raises UserError where none does."""
        tables = [self._table] if self._table else [name for name in self.files if kind_of(name) in TABLES]
        by_kind = defaultdict(list)
        for name in self.files:
            by_kind["trans" if name.endswith(".trans.txt") else kind_of(name) or os.path.basename(name)].append(name)
        if not self._by_stem and not self._table:
            raise UserError(f"{self._root} holds no recordings; {' '.join(sorted(SUFFIXES))} are read.")
        texts = {_stem(name): name for name in by_kind[".txt"]}
        if self._table:
            return self._of_tables(tables)
        if by_kind["trans"]:
            return self._of_lists(by_kind["trans"])
        if by_kind[".transcription"]:
            return self._of_sphinx(by_kind[".transcription"])
        if any(os.path.basename(name) == "wav.scp" for name in by_kind[".scp"]):
            return self._of_kaldi([name for name in by_kind[".scp"] if os.path.basename(name) == "wav.scp"])
        if (lines := self._ljspeech(tables)) is not None:
            return lines
        if tables:
            return self._of_tables(tables)
        if all(stem in texts for stem in self._by_stem):
            return self._beside(texts)
        if all(map(_YESNO.fullmatch, self._by_stem)):
            self.yesno = True
            return self._named_by_what_is_said()
        if digits := [name for stem, names in self._by_stem.items() if _DIGIT.fullmatch(stem) for name in names]:
            return self._digits(sorted(digits))
        raise UserError(
            f"{self._root} has recordings and nothing that says what is said in them: a table with the columns path and"
            " text, *.trans.txt (LibriSpeech), *.transcription (Sphinx), wav.scp and text (Kaldi), or NAME.txt beside"
            " each."
        )

    def _lines(self, name: str) -> Iterator[tuple[str, str]]:
        """(where, line) of a list."""
        for number, line in lines_of(self.files[name], "utf-8"):
            if line.strip():
                where = f"{self.files[name]}, line {number}"
                yield where, checked(line.strip(), where)

    def _file(self, path: str, where: str, table: str = "") -> str:
        """The recording below the root that a path, with or without suffix, means: as seen from the list's folder, or
        the only one whose name ends so."""
        path = re.sub(r"\{\w+\}/?", "", path).replace("\\", "/")
        beside = os.path.normpath(os.path.join(os.path.dirname(table), path))
        for name in (beside, os.path.normpath(path)):
            if name in self.files and kind_of(name) in SUFFIXES:
                return name
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        wanted = "/".join(parts)
        same = self._by_stem.get(_stem(wanted), []) if parts else []
        for start in range(len(parts)):  # of absolute paths, what is left of them here
            tail = _bare("/".join(parts[start:]))
            some = [name for name in same if f"/{_bare(name)}".endswith(f"/{tail}")]
            if len(some) == 1:
                return some[0]
            if some:
                raise UserError(f"{where} names {path}, which {some[0]} and {some[1]} may be.")
        raise UserError(f"{where} names {path or 'no recording'}, which is not below {self._root}.")

    def _of_lists(self, names: Sequence[str]) -> Iterator[Utterance]:
        for name in names:
            for where, line in self._lines(name):
                key, _, text = line.partition(" ")
                yield Utterance(self._file(key, where, name), text, _split_of(name), key.partition("-")[0])

    def _of_sphinx(self, names: Sequence[str]) -> Iterator[Utterance]:
        for name in names:
            beside = name.removesuffix(".transcription") + ".fileids"
            ids = [line for _, line in self._lines(beside)] if beside in self.files else []
            paths = {os.path.basename(path): path for path in ids}
            for where, line in self._lines(name):
                match = re.fullmatch(r"(.*)\((\S+)\)", line)
                if match is None:
                    raise UserError(f"{where} does not end with the name of its recording in brackets.")
                text = re.sub(r"</?s>|<sil>|\+\+\w+\+\+", " ", match[1]).strip()
                file = self._file(paths.get(os.path.basename(match[2]), match[2]), where, name)
                yield Utterance(file, text, _split_of(name), os.path.basename(os.path.dirname(file)))

    def _of_kaldi(self, names: Sequence[str]) -> Iterator[Utterance]:
        for name in names:
            folder = os.path.dirname(name)

            def table(kind: str, folder: str = folder) -> dict[str, tuple[str, str]]:
                path = os.path.join(folder, kind)
                found = self._lines(path) if path in self.files else iter(())
                return {line.split(maxsplit=1)[0]: (where, " ".join(line.split()[1:])) for where, line in found}

            paths, texts, parts, speakers = (table(kind) for kind in ("wav.scp", "text", "segments", "utt2spk"))
            for key, (where, text) in texts.items():
                cell = parts.get(key, (where, f"{key} 0"))
                try:
                    recording, start, *stop = cell[1].split()
                    offset, duration = float(start), float(stop[0]) - float(start) if stop else None
                    whose, path = paths[recording]
                except (KeyError, ValueError) as error:
                    raise UserError(f"{cell[0]}: {key} is in no line of wav.scp or segments.") from error
                if path.endswith("|"):
                    raise UserError(f"{whose} is a command, and none is run; name the file itself.")
                speaker = speakers.get(key, ("", ""))[1]
                yield Utterance(self._file(path, whose, name), text, _split_of(name), speaker, offset, duration)

    def _beside(self, texts: Mapping[str, str]) -> Iterator[Utterance]:
        for stem, names in self._by_stem.items():
            for name in names:
                text = " ".join(line for _, line in self._lines(texts[stem]))
                yield Utterance(name, text, _split_of(name), os.path.basename(os.path.dirname(name)))

    def _ljspeech(self, tables: Sequence[str]) -> Iterator[Utterance] | None:
        """Where the first line of the only table names a recording, and no columns."""
        lines = self._lines(tables[0]) if [os.path.basename(name) for name in tables] == ["metadata.csv"] else iter(())
        if (first := next(lines, ("", ""))[1].partition("|"))[1] and first[0] in self._by_stem:
            cells = ((where, line.split("|")) for where, line in self._lines(tables[0]))
            return (Utterance(self._file(line[0], where, tables[0]), line[-1]) for where, line in cells)
        return None

    def _digits(self, names: Sequence[str]) -> Iterator[Utterance]:
        for name in names:
            digit, speaker, take = _stem(name).split("_")
            yield Utterance(name, _DIGITS[int(digit)], "test" if int(take) < 5 else "", speaker)

    def _named_by_what_is_said(self) -> Iterator[Utterance]:
        for stem, names in sorted(self._by_stem.items()):
            for name in names:
                yield Utterance(name, " ".join(("NO", "YES")[int(c)] for c in stem.split("_")))

    def _of_tables(self, names: Sequence[str]) -> Iterator[Utterance]:
        for name in names:
            for row in self._rows(name):
                kinds = zip(self._columns, (_PATHS, _TEXTS), ("of recordings", "of texts"), strict=True)
                path, text = (str(row.values[column(row.where, row.values, *kind)] or "").strip() for kind in kinds)
                speaker = next((str(row.values[key]) for key in _SPEAKERS if row.values.get(key)), "")
                split = str(row.values.get("split") or "") or _split_of(name)
                part = [_number(row, key) for key in ("offset", "duration")]
                found = self._file(path, row.where, name)
                yield Utterance(found, checked(text, row.where), split, speaker, part[0] or 0.0, part[1])

    def _rows(self, name: str) -> Iterator[Row]:
        for row in rows(self.files[name]):
            if row.values and all(isinstance(value, Mapping) for value in row.values.values()):
                yield from (row._replace(values=value) for value in row.values.values())
            else:
                yield row


def _number(row: Row, name: str) -> float | None:
    value = row.values.get(name)
    if value in (None, ""):
        return None
    try:
        number = float(value)
        if not 0 <= number < math.inf:
            raise ValueError
    except (TypeError, ValueError) as error:
        raise UserError(f"{row.where}: {name} is {value!r}, not seconds.") from error
    return number


def _split_of(name: str) -> str:
    """What of a file's name, or of its folders', is called after a split."""
    for part in _bare(name).split("/"):
        for word in (part, *part.split("_")):
            if named_after(word) is not None:
                return word
    return ""


def _bare(name: str) -> str:
    return os.path.splitext(name)[0] if kind_of(name) in SUFFIXES | _LISTS else name


def _stem(name: str) -> str:
    return os.path.basename(_bare(name))
