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
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Codec, Example, Fields, UserError
from bigbase_jax.data.cache import Store, Writer
from bigbase_jax.data.files import (
    LIMITS,
    File,
    Limits,
    by_split,
    file_at,
    limits_of,
    named_after,
    one_sentence,
    unused,
    walk,
)
from bigbase_jax.data.rows import Row, checked, first_line, lines_of, rows, tables
from bigbase_jax.data.sources.splits import also_in_train
from bigbase_jax.data.sources.text.base import (
    SPLITS,
    Opened,
    TextCodec,
    TextRowFiles,
    TextRows,
    Write,
    given_text,
    named,
    narrow,
    split_indices,
    splits_of,
)
from bigbase_jax.text.tokenizer import Subwords, Tokenizer, load, source_tokenizer

ROLES = ("pad", "start")
"""Special tokens that a tokenizer learned here has, beside the end."""
SUBWORDS = Subwords("bpe", 8192)
PADDING = -1
SEQUENCES = ("source", "source_segments", "target_in", "target_out")


class Pair(NamedTuple):
    """A text, what it is in the other language, and where it stands."""

    source: str
    target: str
    where: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelTexts(TextRows):
    """Pairs of texts, and how examples are made of them; see ``TextRows``. Subclasses say where they come from.

    Pairs of equal sources go to the same split. Training pairs that are too long, or of which a side is empty, are left
    out; for evaluation what is too long is cut, but the reference is whole.

    Attributes:
      tokenizer: fitted to both sides of the training text, or read (``TokenizerFile``); a Marian folder's reads each
        side in its own way (``source_tokenizer``).
      target_tokenizer: one of its own for the target, each then fitted to its side; None: the same for both.
      source_length, target_length: S and T, special tokens included.

    Raises:
      UserError: a value out of its range.
    """

    tokenizer: Any = SUBWORDS
    target_tokenizer: Any = None
    source_length: int = 64
    target_length: int = 64
    val_fraction: float = 0.05
    test_fraction: float = 0.05

    code: ClassVar[tuple[str, ...]] = ("data.sources.text.parallel_text",)
    least: ClassVar[Mapping[str, int]] = {"source_length": 2, "target_length": 2}
    cuts: ClassVar[bool] = True
    """Whether what is too long for evaluation is cut, or else left out."""

    # -- what subclasses say ---------------------------------------------------------------------------------------

    def pairs(self) -> Iterator[tuple[str, Pair]]:
        """(split, or "" where it is to be dealt, pair) of each, from the start at each call."""
        raise NotImplementedError

    def languages(self) -> dict[str, Any]:
        """``source_language`` and ``target_language``, and what else is known of the columns."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """What else the description says."""
        return []

    # -- reading ---------------------------------------------------------------------------------------------------

    def tokenizers(self) -> list[Any]:
        return [self.tokenizer, self.target_tokenizer]

    def begin(self) -> Write:
        """
        Raises:
          UserError: no pairs, unequal numbers of lines, or what cannot be read.
        """
        survey = self.dealt(
            self.pairs, lambda pair: hashlib.blake2b(pair.source.encode(), digest_size=8).hexdigest(), "pairs"
        )
        others = set(survey.split_N) - {"train"}
        order = [s for s in (*SPLITS, *sorted(others - set(SPLITS))) if s == "train" or s in others]
        if self.target_tokenizer is None:
            target = survey.fit(self.tokenizer, _sides, True, ROLES)
            source = source_tokenizer(target)
        else:
            source = survey.fit(self.tokenizer, lambda pair: [pair.source], True, ROLES)
            target = survey.fit(self.target_tokenizer, lambda pair: [pair.target], True, ROLES)

        def write(writer: Writer) -> Mapping[str, Any]:
            for waiting in survey.batches(_sides):
                sources = source.encode_batch([pair.source for _, pair in waiting])
                targets = target.encode_batch([pair.target for _, pair in waiting])
                for (split, pair), (source_S, _), (target_T, _) in zip(waiting, sources, targets, strict=True):
                    tokens = {"source": narrow(source_S, source), "target": narrow(target_T, target)}
                    reference = np.frombuffer(pair.target.encode(), np.uint8)
                    writer.add({**tokens, "reference": reference, "split": np.uint8(order.index(split))})
            states = {"source_tokenizer": source.state(), "target_tokenizer": target.state()}
            return {**states, "splits": order, "shared": also_in_train(survey.split_N, survey.name_N)}

        return write

    def opened(self, rows_N: Store) -> Opened:
        """``description`` says how many pairs are left out and how many are cut.

        Raises:
          UserError: no training pair fits the lengths.
        """
        about = rows_N.about
        source, target = load(about["source_tokenizer"]), load(about["target_tokenizer"])
        info = {
            **pair_dataset_info(source, target, self.source_length, self.target_length),
            "shared": self.target_tokenizer is None,
            **self.languages(),
        }
        size_N = {side: rows_N.lengths(side) for side in ("source", "target")}
        most = {"source": self.source_length, "target": self.target_length}
        long_N = (size_N["source"] + 1 > most["source"]) | (size_N["target"] + 1 > most["target"])
        empty_N = (size_N["source"] == 0) | (size_N["target"] == 0)
        kept = split_indices(rows_N, about["splits"])
        here = kept.get("train", np.zeros(0, np.int64))
        width = max(1, int(rows_N.lengths("reference").max())) if not self.cuts else 1
        kept = {"train": here[~empty_N[here] & ~long_N[here]], **{s: kept[s] for s in about["splits"] if s != "train"}}
        if not self.cuts:
            kept = {split: rows[~long_N[rows]] for split, rows in kept.items()}
        notes = [
            f"{int((~empty_N & long_N)[here].sum()):,} training pairs too long for {most['source']} and"
            f" {most['target']} tokens, and {int(empty_N[here].sum()):,} with an empty side, left out"
        ]
        notes += [
            f"{n:,} pairs of {s} cut" for s, rows in kept.items() if s != "train" and (n := int(long_N[rows].sum()))
        ]
        if short := next((split for split, rows in kept.items() if not rows.size), None):
            kind = "training" if short == "train" else short
            raise UserError(
                f"no {kind} pair of {self.origin()} fits source_length={self.source_length} and "
                f"target_length={self.target_length}; raise them."
            )
        width = max(width, *(int(rows_N.lengths("reference")[rows].max(initial=0)) for rows in kept.values()))

        def example(row: int) -> Example:
            reference = np.zeros(width, np.uint8)
            text = rows_N.get("reference", row)
            reference[: len(text)] = text
            return {**encoded(info, rows_N.get("source", row), rows_N.get("target", row)), "reference": reference}

        longer_N = np.maximum(size_N["source"], size_N["target"]) + 1
        splits = splits_of(rows_N, example, kept, lengths=longer_N, sequences=SEQUENCES)
        counts = ", ".join(f"{split} {len(indices):,}" for split, indices in kept.items())
        sizes = f"{target.size:,}" if self.target_tokenizer is None else f"{source.size:,} and {target.size:,}"
        pairs = f"{info['source_language']} to {info['target_language']}, pairs: {counts}"
        parts = [f"{self.origin()}: {pairs}", f"a vocabulary of {sizes}", *notes]
        parts += [f"{n:,} of the {split} sources are in train too" for split, n in about["shared"].items()]
        return Opened(splits, info, "; ".join([*parts, *self.notes()]), self.identity(info))

    def identity(self, dataset_info: Mapping[str, Any]) -> list[Any]:
        """What the fingerprint depends on."""
        tokenizers = [dataset_info["source_tokenizer"], dataset_info["tokenizer"]]
        return [self.file_signature(), self.dealing(), self.source_length, self.target_length, *tokenizers]

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """Of the source language's column, or both languages' one; a text is rows by line."""
        known = dataset_info.get("column") or config.get("source_language", "number")
        names = [(name,) for name in (known, "translation", "source", "src", "text")]
        encoding = config.get("encoding", "utf-8")
        fields = Fields({"source": names}, True, encoding=encoding, header=not known.isdigit())
        return TextCodec(fields, read_lines, dataset_info, limits_of(config), ("source_segments", "source"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelText(ParallelTexts, TextRowFiles):
    """Texts in two languages, in files; see ``TextRowFiles`` and ``ParallelTexts``.

    Files named after splits (``train.en``, ``val.en.gz``, ``test_2016.en``) keep them; a missing val is taken from
    train, and a missing test where there is nothing but train. Of several test sets the first by name is ``test`` and
    the others are splits of their own names.

    Attributes:
      root: a folder of files line by line; or a file or folder of tables or JSON (see ``rows``), with a column for each
        language, or both in one called "translation". A table without a header has the source first: its two columns,
        or those two that are neither numbers nor Tatoeba's licences.
      source_language, target_language: as the files or columns are called; or the columns' numbers from 0, in a table
        without a header.
    """

    source_language: str = "en"
    target_language: str = "de"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source_language == self.target_language:
            raise UserError(
                f"source_language and target_language are both {self.source_language!r}; give two languages."
            )

    @functools.cached_property
    def sets(self) -> _Sets:
        """The files of each split, as they were when this was first asked for."""
        return _sets(self)

    def pairs(self) -> Iterator[tuple[str, Pair]]:
        for split, files in self.sets.files.items():
            if self.sets.lines:
                yield from ((split, pair) for pair in _in_lines(files[0], files[1], self.encoding))
            else:
                for file in files:
                    source, target, header = _columns(self, file)
                    for row in rows(file, self.encoding, header):
                        yield split, Pair(_of_row(row, source), _of_row(row, target), row.where)

    def file_signature(self) -> list[Any]:
        files = [[split, *file.file_signature] for split, found in self.sets.files.items() for file in found]
        return [files, [self.source_language, self.target_language, self.encoding]]

    def languages(self) -> dict[str, Any]:
        column = {"column": self.sets.columns[0]} if self.sets.columns else {}
        return {"source_language": self.source_language, "target_language": self.target_language, **column}

    def notes(self) -> list[str]:
        parts, sets = [], self.sets
        if sets.columns:
            places = zip((self.source_language, self.target_language), sets.columns, strict=True)
            parts.append(f"without a header, {' and '.join(f'{name} in column {i}' for name, i in places)} (from 0)")
        if sets.test:
            parts.append(f"test is {sets.test}")
        if sets.unused:
            parts.append(f"not used: {', '.join(sets.unused)}")
        return parts


def _sides(pair: Pair) -> tuple[str, str]:
    return pair.source, pair.target


def pair_dataset_info(source: Tokenizer, target: Tokenizer, source_length: int, target_length: int) -> dict[str, Any]:
    """The facts (see the top of this file) that ``encoded`` and ``tasks.translation`` read."""
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


def encoded(dataset_info: Mapping[str, Any], source_S: np.ndarray, target_T: np.ndarray | None) -> Example:
    """Tokens of a pair, without special ones, as the arrays of an example; without a target, for prediction."""
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


def read_lines(given: Any, dataset_info: Mapping[str, Any], limits: Limits = LIMITS) -> list[Example]:
    """The ``source`` of a row, or every line of a user's file that is not empty; without targets or references.

    Raises:
      UserError: unreadable, or nothing but empty lines.
    """
    if isinstance(given, Mapping) and isinstance(pair := given.get("source"), Mapping):
        given = {"source": pair.get(dataset_info.get("source_language", ""), "")}
    text = given_text(given, dataset_info, "source", limits)
    lines = [text] if isinstance(given, Mapping) else text.splitlines()
    texts = [line.strip() for line in lines if line.strip()]
    tokenizer = load(dataset_info["source_tokenizer"])
    with named(given):
        return [encoded(dataset_info, tokens_T, None) for tokens_T, _ in tokenizer.encode_batch(texts)]


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
    ordered = {split: files[split] for split in SPLITS if split in files}
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
