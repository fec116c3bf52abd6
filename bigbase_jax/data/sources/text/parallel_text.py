"""Parallel text for translation: pairs of files line by line (``train.en``, ``train.de``), or tables and JSON.

Pairs -> splits -> tokenizers -> tokens, which are kept in the cache. An example is, with S = ``source_length``, T =
``target_length`` and R bytes of the longest reference:

- ``source`` i32[S]: the text and the end token, padded with ``source_pad_id`` (0 where there is none);
- ``source_segments`` i32[S]: 1 for tokens, 0 for padding;
- ``target_in`` i32[T]: the start token and the text, what a decoder reads; padded with ``pad_id`` (or 0);
- ``target_out`` i32[T]: the text and the end token, what it is to write after each; -1 is padding of both;
- ``reference`` u8[R]: the target text as it stands, in UTF-8, padded with 0 (see ``reference_of``).

Facts, of the target's tokenizer: ``vocab_size``, ``tokenizer``, ``start_id``, ``end_id``, ``pad_id``; of the source's:
``source_vocab_size``, ``source_tokenizer``, ``source_end_id``, ``source_pad_id``; and ``target_vocab_size``,
``source_length``, ``target_length``, ``length`` (the larger), ``shared`` (one tokenizer for both), ``source_language``,
``target_language``. A published tokenizer without a start token starts with its padding, or else its end.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Example, Fields, Source, UserError
from bigbase_jax.data import cache as caches
from bigbase_jax.data import ragged
from bigbase_jax.data.documents import Format
from bigbase_jax.data.files import LIMITS, File, Limits, by_split, file_at, named_after, one_sentence, unused, walk
from bigbase_jax.data.ragged import Ragged
from bigbase_jax.data.rows import Row, checked, first_line, lines_of, rows, tables
from bigbase_jax.data.sources.splits import digest, stratified, to_split_off
from bigbase_jax.data.sources.text.text import given_text, key_of, named
from bigbase_jax.text.tokenizer import Subwords, Tokenizer, load, sides

ROLES = ("pad", "start")
"""Special tokens that a tokenizer learned here has, beside the end."""
SUBWORDS = Subwords("bpe", 8192)
PADDING = -1
SEQUENCES = ("source", "source_segments", "target_in", "target_out")
_CODE = (
    "data.files",
    "data.rows",
    "data.ragged",
    "text.tokenizer",
    "data.sources.splits",
    "data.sources.text.parallel_text",
)
_BATCH = 1 << 20  # characters that are encoded at once
_FIRST = ("train", "val", "test")


class Pair(NamedTuple):
    """A text, what it is in the other language, and where it stands."""

    source: str
    target: str
    where: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelText:
    """Texts in two languages; ``prepare`` reads them.

    Files named after splits (``train.en``, ``val.en.gz``, ``test_2016.en``) keep them; a missing val is taken from
    train, and a missing test where there is nothing but train: equal sources to the same split. Of several test sets
    the first by name is ``test`` and the others are splits of their own names. Training pairs that are too long, or of
    which a side is empty, are left out; for evaluation what is too long is cut, but the reference is whole.

    Attributes:
      root: a folder of files line by line; or a file or folder of tables or JSON (see ``rows``), with a column for each
        language, or both in one called "translation". A table without a header has the source first: its two columns,
        or those two that are neither numbers nor Tatoeba's licences.
      source_language, target_language: as the files or columns are called; or the columns' numbers from 0, in a table
        without a header.
      tokenizer: fitted to both sides of the training text, or read (``TokenizerFile``); a Marian folder's reads each
        side in its own way (``tokenizer.sides``).
      target_tokenizer: one of its own for the target, each then fitted to its side; None: the same for both.
      source_length, target_length: S and T, special tokens included.
      train, val, test: what the files of the split are called, where not after it (``test="test_2017_flickr"``).
      val_fraction, test_fraction: shares of the pairs.
      seed: of the dealing.
      encoding: of all but Parquet and Arrow.
      limits: of reading a file.

    Raises:
      UserError: a value out of its range.
    """

    root: str
    source_language: str = "en"
    target_language: str = "de"
    tokenizer: Any = SUBWORDS
    target_tokenizer: Any = None
    source_length: int = 64
    target_length: int = 64
    train: str | None = None
    val: str | None = None
    test: str | None = None
    val_fraction: float = 0.05
    test_fraction: float = 0.05
    seed: int = 0
    encoding: str = "utf-8"
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        Format(encoding=self.encoding)
        for name in ("source_length", "target_length"):
            if getattr(self, name) < 2:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 2.")
        if self.source_language == self.target_language:
            raise UserError(
                f"source_language and target_language are both {self.source_language!r}; give two languages."
            )

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Parallel:
        """Reads and tokenises the pairs, unless that is in the cache; see ``core.RawDataset``.

        Raises:
          UserError: no pairs, unequal numbers of lines, or what cannot be read.
        """
        sets = _sets(self)
        key = key_of(_CODE, [self.tokenizer, self.target_tokenizer], [self.file_signature(sets), self.dealing()])
        found = ragged.find(cache, key) if limit_bytes > 0 else None
        if found is None:
            say(f"data: reading {self.root} once, to tokenise it")
            survey = _Survey(self, sets)
            both = ("source", "target")
            if self.target_tokenizer is None:
                fitted = self.tokenizer.fit(survey.texts("train", both), survey.texts("", both), True, ROLES)
                source, target = sides(fitted)
            else:
                source, target = (
                    spec.fit(survey.texts("train", (side,)), survey.texts("", (side,)), True, ROLES)
                    for spec, side in zip((self.tokenizer, self.target_tokenizer), both, strict=True)
                )
            dtypes: dict[str, Any] = {"source": np.min_scalar_type(source.size - 1)}
            dtypes |= {"target": np.min_scalar_type(target.size - 1), "reference": "u1", "split": "u1"}
            where = (cache, key) if limit_bytes > 0 else None
            found = ragged.make(functools.partial(survey.write, source, target), dtypes, where, limit_bytes, say)
            if where is not None:
                caches.prune(cache, limit_bytes, [cache / f"cache-{key}"])
        return Parallel(self, found, sets)

    def file_signature(self, sets: _Sets) -> list[Any]:
        """What changes when the texts change, and all that says how to read them."""
        files = [[split, *file.file_signature] for split, found in sets.files.items() for file in found]
        return [files, [self.source_language, self.target_language, self.encoding]]

    def dealing(self) -> list[Any]:
        """What the splits depend on."""
        return [self.val_fraction, self.test_fraction, self.seed]

    @staticmethod
    def fields(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Fields:
        """The source language's column, or both languages' one; a text is rows by line."""
        known = dataset_info.get("column") or config.get("source_language", "number")
        names = [(name,) for name in (known, "translation", "source", "src", "text")]
        return Fields({"source": names}, True, encoding=config.get("encoding", "utf-8"), header=not known.isdigit())

    @staticmethod
    def read(given: str | Mapping[str, Any], dataset_info: Mapping[str, Any], limits: Limits = LIMITS) -> list[Example]:
        """See ``read_lines``."""
        return read_lines(given, dataset_info, limits)


class Parallel:
    """A ``Dataset`` of parallel text that was read; see the top of this file for what is in an example and the facts.

    ``description`` says how many pairs are left out and how many are cut.
    """

    def __init__(self, data: ParallelText, pairs_N: Ragged, sets: _Sets):
        self._data, self._pairs, self._sets = data, pairs_N, sets
        about = pairs_N.about
        source, target = load(about["source_tokenizer"]), load(about["target_tokenizer"])
        self.dataset_info: Mapping[str, Any] = {
            **pair_dataset_info(source, target, data.source_length, data.target_length),
            "shared": data.target_tokenizer is None,
            "source_language": data.source_language,
            "target_language": data.target_language,
            **({"column": sets.columns[0]} if sets.columns else {}),
        }
        size_N = {side: pairs_N.lengths(side) for side in ("source", "target")}
        most = {"source": data.source_length, "target": data.target_length}
        long_N = {side: size_N[side] + 1 > most[side] for side in most}
        empty_N = (size_N["source"] == 0) | (size_N["target"] == 0)
        split_N = np.asarray(pairs_N.values["split"])
        width = 1
        kept: dict[str, np.ndarray] = {}
        notes = []
        for i, split in enumerate(about["splits"]):
            here_N = split_N == i
            if split == "train":
                too_long_N = here_N & ~empty_N & (long_N["source"] | long_N["target"])
                notes.append(
                    f"{int(too_long_N.sum()):,} training pairs too long for {most['source']} and {most['target']}"
                    f" tokens, and {int((here_N & empty_N).sum()):,} with an empty side, left out"
                )
                here_N = here_N & ~empty_N & ~too_long_N
            elif (cut := int((here_N & (long_N["source"] | long_N["target"])).sum())) > 0:
                notes.append(f"{cut:,} pairs of {split} cut")
            kept[split] = np.flatnonzero(here_N)
            if kept[split].size:
                width = max(width, int(pairs_N.lengths("reference")[kept[split]].max()))
        if not kept["train"].size:
            raise UserError(
                f"no training pair of {data.root} fits source_length={data.source_length} and "
                f"target_length={data.target_length}; raise them."
            )
        encode = Encoder(self.dataset_info)
        self.splits: Mapping[str, Source] = {
            split: _Pairs(pairs_N, indices, encode, width, split) for split, indices in kept.items() if indices.size
        }
        counts = ", ".join(f"{split} {len(indices):,}" for split, indices in kept.items())
        words = f"{target.size:,}" if data.target_tokenizer is None else f"{source.size:,} and {target.size:,}"
        pairs = f"{data.source_language} to {data.target_language}, pairs: {counts}"
        parts = [f"{data.root}: {pairs}", f"a vocabulary of {words}", *notes]
        parts += [f"{count:,} of the {split} sources are in train too" for split, count in about["shared"].items()]
        if sets.columns:
            places = zip((data.source_language, data.target_language), sets.columns, strict=True)
            parts.append(f"without a header, {' and '.join(f'{name} in column {i}' for name, i in places)} (from 0)")
        if sets.test:
            parts.append(f"test is {sets.test}")
        if sets.unused:
            parts.append(f"not used: {', '.join(sets.unused)}")
        self.description = "; ".join(parts)

    def fingerprint(self) -> str:
        """A digest of the texts, the splits, the tokenizers and the lengths."""
        about, data = self._pairs.about, self._data
        tokenizers = [about["source_tokenizer"], about["target_tokenizer"]]
        return digest(
            [data.file_signature(self._sets), data.dealing(), data.source_length, data.target_length, *tokenizers]
        )

    def read(self, given: str | Mapping[str, Any]) -> list[Example]:
        """See ``read_lines``."""
        return read_lines(given, self.dataset_info)


def pair_dataset_info(source: Tokenizer, target: Tokenizer, source_length: int, target_length: int) -> dict[str, Any]:
    """The facts (see the top of this file) that ``Encoder`` and ``tasks.translation`` read."""
    return {
        **_facts(target, ""),
        **_facts(source, "source_"),
        "target_vocab_size": target.size,
        "start_id": target.special.get("start", target.special.get("pad", target.end)),
        "source_length": source_length,
        "target_length": target_length,
        "length": max(source_length, target_length),
    }


def _facts(tokenizer: Tokenizer, side: str) -> dict[str, Any]:
    found = {"vocab_size": tokenizer.size, "tokenizer": tokenizer.state(), "end_id": tokenizer.end}
    found["pad_id"] = tokenizer.special.get("pad", 0)
    return {side + name: value for name, value in found.items()}


def reference_of(reference_R: np.ndarray) -> str:
    """The text of an example's ``reference``."""
    return bytes(np.asarray(reference_R, np.uint8)).rstrip(b"\0").decode()


class Encoder:
    """Tokens of a pair, without special ones, as the arrays of an example; without a target, for prediction."""

    def __init__(self, dataset_info: Mapping[str, Any]):
        self._facts = dataset_info

    def __call__(self, source_S: np.ndarray, target_T: np.ndarray | None) -> Example:
        dataset_info = self._facts
        S, T = dataset_info["source_length"], dataset_info["target_length"]
        source_S = source_S[: S - 1]
        n = len(source_S) + 1
        source, segment_ids = np.full(S, dataset_info["source_pad_id"], np.int32), np.zeros(S, np.int32)
        source[:n] = [*source_S, dataset_info["source_end_id"]]
        segment_ids[:n] = 1
        target_in, target_out = np.full(T, dataset_info["pad_id"], np.int32), np.full(T, PADDING, np.int32)
        target_in[0] = dataset_info["start_id"]
        if target_T is not None:
            m = len(target_T)
            target_in[1 : m + 1] = target_T[: T - 1]
            target_out[: m + 1] = [*target_T, dataset_info["end_id"]][:T]
        return {"source": source, "source_segments": segment_ids, "target_in": target_in, "target_out": target_out}


class _Pairs:
    """The ``Source`` of one split.

    Attributes:
      in_memory: where the tokens are.
      lengths, sequences: see ``core.Source``; the longer side counts.
    """

    sequences = SEQUENCES

    def __init__(self, pairs_N: Ragged, indices: np.ndarray, encode: Encoder, width: int, split: str):
        self._pairs, self._indices, self._encode, self._width, self._split = pairs_N, indices, encode, width, split
        self.in_memory: str = pairs_N.kept
        self.lengths = np.maximum(pairs_N.lengths("source"), pairs_N.lengths("target"))[indices] + 1

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self._split} has {len(self)} pairs; there is no {index}")
        at = int(self._indices[index])
        reference = np.zeros(self._width, np.uint8)
        text = self._pairs.get("reference", at)
        reference[: len(text)] = text
        example = self._encode(self._pairs.get("source", at), self._pairs.get("target", at))
        return {**example, "reference": reference}

    def name(self, index: int) -> str:
        """Such as ``val[17]``."""
        return f"{self._split}[{index}]"


def read_lines(
    given: str | Mapping[str, Any], dataset_info: Mapping[str, Any], limits: Limits = LIMITS
) -> list[Example]:
    """The ``source`` of a row, or every line of a user's file that is not empty; without targets or references.

    Raises:
      UserError: unreadable, or nothing but empty lines.
    """
    if isinstance(given, Mapping) and isinstance(pair := given["source"], Mapping):
        given = {"source": pair.get(dataset_info.get("source_language", ""), "")}
    text = given_text(given, dataset_info, "source", limits)
    texts = [line.strip() for line in text.splitlines() if line.strip()] if isinstance(given, str) else [text.strip()]
    tokenizer, encode = load(dataset_info["source_tokenizer"]), Encoder(dataset_info)
    with named(given):
        return [encode(tokens_T, None) for tokens_T, _ in tokenizer.encode_batch(texts)]


# --- pairs ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Sets:
    """The files of each split.

    Attributes:
      files: the two files line by line, or tables; under "" where everything is to be dealt.
      lines: whether they are files line by line.
      test: what the test set is called, where there are several.
      unused: what files are called that are in no split.
      columns: of source and target in tables that have no header; () where they have one.
    """

    files: Mapping[str, Sequence[File]]
    lines: bool
    test: str
    unused: list[str]
    columns: tuple[str, ...] = ()


def _sets(data: ParallelText) -> _Sets:
    folder = os.path.expanduser(data.root)
    sides = _line_files(data) if os.path.isdir(folder) else {}
    chosen = {"train": data.train, "val": data.val, "test": data.test}
    if not sides:
        try:
            found = tables(data.root, data.encoding, data.limits)
        except UserError as error:
            if os.path.isdir(folder):
                wanted = f"NAME.{data.source_language} and NAME.{data.target_language}"
                raise UserError(f"{data.root} has no files {wanted}, in lines, and no table: {error}") from error
            raise
        used = by_split(found, data.root, chosen)
        source, target, header = _columns(data, found[0])
        return _Sets(used, False, "", unused(found, used), () if header else (source, target))
    both = {stem: pair for stem, pair in sides.items() if len(pair) == 2}
    if not both:
        (stem, pair), *_ = sides.items()
        other = data.target_language if data.source_language in pair else data.source_language
        raise UserError(f"{data.root} has {next(iter(pair.values())).name} but no {stem}.{other} beside it.")
    for split, name in chosen.items():
        if name is not None and name not in both:
            there = f" Of {name!r} one side is there alone." if name in sides else suggest(name, both, "name")
            raise UserError(f"{data.root} has no {name!r} in both languages for {split}.{there}")
    files: dict[str, list[File]] = {}
    if len(both) == 1 and not any(chosen.values()):
        return _Sets({"": [f for pair in both.values() for f in _in_order(pair, data)]}, True, "", [])
    taken = {name: split for split, name in chosen.items() if name is not None}
    tests, left = [], [stem for stem in sides if stem not in both]
    for stem in sorted(both):
        where = taken.get(stem) or named_after(stem)
        if where == "test" and stem not in taken:
            tests.append(stem)
        elif where is None or (stem not in taken and (chosen[where] is not None or where in files)):
            left.append(stem)
        else:
            files[where] = _in_order(both[stem], data)
    if "train" not in files:
        names = ", ".join(sorted(both))
        raise UserError(f"{data.root} has {names} but nothing named train; choose it with train='...'.")
    if tests and data.test is None:
        files["test"] = _in_order(both[tests[0]], data)
    others = tests if data.test is not None else tests[1:]
    test = data.test or (tests[0] if tests else "")
    ordered = {split: files[split] for split in _FIRST if split in files}
    return _Sets({**ordered, **{s: _in_order(both[s], data) for s in others}}, True, test if others else "", left)


def _line_files(data: ParallelText) -> dict[str, dict[str, File]]:
    """Files line by line: {name without language: {language: file}}."""
    found: dict[str, dict[str, File]] = {}
    where: dict[str, str] = {}
    for name, path in walk(os.path.expanduser(data.root)):
        plain = os.path.splitext(name)[0] if name.lower().endswith((".gz", ".zst")) else name
        stem, suffix = os.path.splitext(plain)
        if suffix[1:] in (data.source_language, data.target_language):
            folder, stem = os.path.split(stem)
            if where.setdefault(stem, folder) != folder or suffix[1:] in found.get(stem, {}):
                beside = " and ".join(repr(f or ".") for f in sorted({where[stem], folder}))
                raise UserError(f"{data.root} has {stem}{suffix} twice, in {beside}; name one folder as root.")
            found.setdefault(stem, {})[suffix[1:]] = file_at(name, path, data.limits)
    return found


def _in_order(pair: Mapping[str, File], data: ParallelText) -> list[File]:
    return [pair[data.source_language], pair[data.target_language]]


class _Survey:
    """What one reading of all pairs tells: that they are aligned, and which is in which split."""

    def __init__(self, data: ParallelText, sets: _Sets):
        self._data, self._sets = data, sets
        given: list[str] = []
        print_N: list[bytes] = []
        for split, pair in self._read():
            given.append(split)
            print_N.append(hashlib.blake2b(pair.source.encode(), digest_size=8).digest())
        if not given:
            raise UserError(f"{data.root} holds no pairs.")
        split_N = [split or "train" for split in given]
        fractions = to_split_off(set(given) - {"", "train"}, data.val_fraction, data.test_fraction)
        groups: dict[bytes, list[int]] = {}
        for i, split in enumerate(split_N):
            if split == "train":
                groups.setdefault(print_N[i], []).append(i)
        names = sorted(groups)
        dealt = stratified([name.hex() for name in names], np.zeros(len(names), int), fractions, data.seed)
        for split, chosen in dealt.items():
            for group in chosen:
                for i in groups[names[group]]:
                    split_N[i] = split
        self._split_N = split_N
        trained = {p for p, split in zip(print_N, split_N, strict=True) if split == "train"}
        others = set(split_N) - {"train"}
        self._order = [s for s in (*_FIRST, *sorted(others - set(_FIRST))) if s == "train" or s in others]
        self._shared = {
            s: n
            for s in self._order[1:]
            if (n := sum(p in trained for p, split in zip(print_N, split_N, strict=True) if split == s))
        }

    def _read(self) -> Iterator[tuple[str, Pair]]:
        for split, files in self._sets.files.items():
            if self._sets.lines:
                yield from ((split, pair) for pair in _in_lines(files[0], files[1], self._data.encoding))
            else:
                for file in files:
                    source, target, header = _columns(self._data, file)
                    for row in rows(file, self._data.encoding, header):
                        yield split, Pair(_of_row(row, source), _of_row(row, target), row.where)

    def _pairs(self) -> Iterator[tuple[str, Pair]]:
        for split, (_, pair) in zip(self._split_N, self._read(), strict=True):
            yield split, pair

    def texts(self, split: str, sides: Sequence[str]) -> Callable[[], Iterator[str]]:
        """What gives the texts of these sides, of train, or ("") of the other splits."""

        def found() -> Iterator[str]:
            for s, pair in self._pairs():
                if (s == "train") == (split == "train"):
                    yield from (text for side in sides if (text := getattr(pair, side)))

        return found

    def write(self, source: Tokenizer, target: Tokenizer, add: ragged.Add) -> Mapping[str, Any]:
        """Adds the tokens of all pairs."""
        for waiting in _batches(self._pairs()):
            sources = source.encode_batch([pair.source for _, pair in waiting])
            targets = target.encode_batch([pair.target for _, pair in waiting])
            for (split, pair), (source_S, _), (target_T, _) in zip(waiting, sources, targets, strict=True):
                reference = np.frombuffer(pair.target.encode(), np.uint8)
                add(source=source_S, target=target_T, reference=reference, split=self._order.index(split))
        states = {"source_tokenizer": source.state(), "target_tokenizer": target.state()}
        return {**states, "splits": self._order, "shared": self._shared}


def _batches(pairs: Iterable[tuple[str, Pair]]) -> Iterator[list[tuple[str, Pair]]]:
    waiting, size = [], 0
    for item in pairs:
        waiting.append(item)
        size += len(item[1].source) + len(item[1].target) + 1
        if size >= _BATCH:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def _in_lines(source: File, target: File, encoding: str) -> Iterator[Pair]:
    """Line by line; raises UserError if one has more lines than the other."""
    count = [0, 0]

    def lines(side: int, file: File) -> Iterator[str]:
        with one_sentence(file, encoding):
            for count[side], line in lines_of(file, encoding, "\n"):
                yield line.strip()

    sides = [lines(0, source), lines(1, target)]
    for first, second in itertools.zip_longest(*sides):
        if first is None or second is None:
            for side in sides:
                for _ in side:
                    pass
            raise UserError(
                f"{source} has {count[0]:,} lines and {target} {count[1]:,}; line by line they must be the same texts."
            )
        yield Pair(first, second, f"{source}, line {count[0]}")


def _columns(data: ParallelText, file: File) -> tuple[str, str, bool]:
    """The columns of source and target, and whether a table has a header."""
    names = data.source_language, data.target_language
    line = first_line(file, data.encoding)
    if line is None or any(name in line for name in (*names, "translation")):
        return *names, True
    if all(map(str.isdigit, names)):
        return *names, False
    texts = [i for i, cell in enumerate(line) if re.search(r"[^\W\d]", cell) and not cell.startswith("CC-BY")]
    if len(texts) == 2 and not all(re.fullmatch(r"[A-Za-z][\w-]*", line[i]) for i in texts):  # such are names
        return str(texts[0]), str(texts[1]), False
    return *names, True


def _of_row(row: Row, name: str) -> str:
    values = row.values
    if name not in values and isinstance(values.get("translation"), Mapping):
        values = values["translation"]
    if name not in values:
        raise UserError(
            f"{row.where} has no {name!r}.{suggest(name, values, 'column')} Name the columns after the recipe, as in"
            " :root=...,source=english,target=german, or by number from 0 where a table has no header."
        )
    text = values[name]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{row.where}: {name!r} is {type(text).__name__}, not text.")
    return checked((text or "").strip(), row.where)
