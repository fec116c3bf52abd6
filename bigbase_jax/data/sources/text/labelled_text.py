"""Texts, or pairs of texts, with a class each: tables and JSON of any kind, Hugging Face's folders (see ``files``), and
a folder of texts for each class.

Rows -> splits -> tokenizer -> tokens, which are kept in the cache. An example is, with L = ``length``:

- ``tokens`` i32[L]: the text with the special tokens around it, as the tokenizer was published, else ``[CLS]`` text
  ``[SEP]`` (text ``[SEP]``); cut to L, padded with ``pad_id`` (0 where there is none);
- ``segment_ids`` i32[L]: 1 for tokens, 0 for padding;
- ``token_type_ids`` i32[L]: which text a token belongs to, 0 or 1 (as published; RoBERTa has 0 alone);
- ``label`` i32: the class.

Facts: ``num_classes``, ``class_names``, ``length``, ``vocab_size``, ``tokenizer``, ``pair``, and the ids of the special
tokens that there are (``pad_id``, ``cls_id``, ``sep_id``, ``mask_id``, ``end_id``).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Example, Fields, Source, UserError
from bigbase_jax.data import cache as caches
from bigbase_jax.data import ragged
from bigbase_jax.data.documents import Format, whole_text
from bigbase_jax.data.files import (
    LIMITS,
    TABLES,
    File,
    Limits,
    by_split,
    common_folders,
    kind_of,
    list_files,
    named_after,
    one_file,
    refuse_alike,
    unused,
)
from bigbase_jax.data.ragged import Ragged
from bigbase_jax.data.rows import Row, checked, class_names, first_line, rows, tables
from bigbase_jax.data.sources.splits import digest, stratified, to_split_off
from bigbase_jax.data.sources.text.text import given_text, key_of, named
from bigbase_jax.text.tokenizer import Subwords, Tokenizer, compose, dataset_info_of, load

ROLES = ("pad", "cls", "sep", "mask")
"""Special tokens that a tokenizer learned here has."""
SUBWORDS = Subwords("bpe", 8192)
SEQUENCES = ("tokens", "segment_ids", "token_type_ids")
_CODE = (
    "data.files",
    "data.rows",
    "data.ragged",
    "text.tokenizer",
    "data.sources.splits",
    "data.sources.text.labelled_text",
)
_SPLITS = ("train", "val", "test")
_BATCH = 1 << 20  # characters that are encoded at once
_TEXTS: tuple[tuple[str, str | None], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    *((name, None) for name in ("text", "sentence", "review", "content", "comment", "sms", "tweet", "title")),
)
_LABELS = ("label", "labels", "class", "target", "sentiment", "category", "coarse_label", "intent", "stars", "rating")
_UNLABELLED = {"unsup", "unsupervised", "unlabelled", "unlabeled"}  # folders beside those of classes


class Columns(NamedTuple):
    """Which columns hold what; ``header``: whether tables name theirs in the first line."""

    text: tuple[str, ...]
    text_pair: tuple[str, ...]
    label: str
    header: bool


class Files(NamedTuple):
    """What is read.

    Attributes:
      splits: files by split, all of them under "" where there are no splits.
      unused: what others are called.
      class_of: where each file is one text, its class by its name.
    """

    splits: dict[str, list[File]]
    unused: list[str]
    class_of: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledText:
    """Rows of a text, or two, and a class; ``prepare`` reads them. Where there are no tables, ``CLASS/*.txt``, or
    ``{train,val,test}/CLASS/*.txt``, are texts of the class after which their folder is called.

    Files or folders named after splits (``train.tsv``, ``dev.tsv``, ``test/...``) keep them; a missing val is taken
    from train, and a missing test where there is nothing but train: dealt by class, equal texts to the same split. Rows
    without text are left out, and so is a split without labels, which is said.

    Attributes:
      root: a file, an archive or a folder.
      text, text_pair, label: names of the columns, or their numbers from 0 in tables without a header; None: the usual
        names, where there are such, and in a table of two columns without a header the label is the whole number. A
        text may be several columns, joined by line ends: "title+body".
      class_names: a file with the name of a class in each line, for labels that are numbers from 0 or 1; it may lie in
        ``root``. None: ``classes.txt`` there, if there is one.
      tokenizer: fitted to the training texts, or read (``TokenizerFile``).
      length: L; what is longer is cut.
      train, val, test: what the files of the split are called, where not after it (``val="validation_matched"``).
      val_fraction, test_fraction: shares of the rows.
      seed: of the dealing.
      encoding: of all but Parquet and Arrow.
      limits: of reading a file.

    Raises:
      UserError: a value out of its range.
    """

    root: str
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    class_names: str | None = None
    tokenizer: Any = SUBWORDS
    length: int = 128
    train: str | None = None
    val: str | None = None
    test: str | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0
    encoding: str = "utf-8"
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        Format(encoding=self.encoding)
        if self.length < 4:
            raise UserError(f"length is {self.length}; it must be at least 4.")

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Labelled:
        """Reads and tokenises the rows, unless that is in the cache; see ``core.RawDataset``.

        Raises:
          UserError: no rows, a column that is not there, or a row that cannot be read.
        """
        key = self._key()
        found = ragged.find(cache, key) if limit_bytes > 0 else None
        if found is None:
            say(f"data: reading {self.root} once, to tokenise it")
            survey = _Survey(self)
            tokenizer = self.tokenizer.fit(
                functools.partial(survey.texts, ("train",)),
                functools.partial(survey.texts, ("val", "test")),
                False,
                ROLES,
            )
            kind = np.min_scalar_type(tokenizer.size - 1)
            dtypes = {"first": kind, "second": kind, "label": "<i4", "split": "u1"}
            where = (cache, key) if limit_bytes > 0 else None
            write = functools.partial(survey.write, tokenizer)
            found = ragged.make(write, dtypes, where, limit_bytes, say)
            if where is not None:
                caches.prune(cache, limit_bytes, [cache / f"cache-{key}"])
        return Labelled(self, found)

    def files(self) -> Files:
        """The files by split."""
        chosen = {"train": self.train, "val": self.val, "test": self.test}
        listed = list_files(self.root, self.limits)
        class_of = _class_folders(listed, self.root)
        if not class_of:
            try:
                found = tables(self.root, self.encoding, self.limits)
            except UserError as error:
                wanted = "neither a table nor a folder of texts for each class (CLASS/*.txt, train/CLASS/*.txt)"
                raise UserError(f"{self.root} is {wanted}: {error}") from error
            used = by_split(found, self.root, chosen)
            return Files(used, unused(found, used), {})
        used = by_split([file for file in listed if file.name in class_of], self.root, chosen)
        others = {part for file in listed if file.name not in class_of for part in _place(file)}
        return Files(used, sorted(others), class_of)

    def names(self) -> list[str] | None:
        """The names of the classes, where a file has them; see ``class_names``."""
        wanted = self.class_names or "classes.txt"
        if self.class_names and os.path.isfile(os.path.expanduser(wanted)):
            found = [one_file(wanted, self.limits)]
        else:
            found = [file for file in list_files(self.root, self.limits) if os.path.basename(file.name) == wanted]
        if not found and self.class_names:
            raise UserError(
                f"there is no file {wanted}, nor one of that name in {self.root}, to read class_names from."
            )
        lines = Format(unit="line", encoding=self.encoding).documents(found[0]) if found else None
        return None if lines is None else ["".join(line.blocks).strip() for line in lines]

    def file_signature(self) -> list[Any]:
        """What changes when the rows change, and all that says how to read them."""
        files = [[split, *file.file_signature] for split, given in self.files().splits.items() for file in given]
        names = self.names()
        return [files, [self.text, self.text_pair, self.label, self.encoding, *([names] if names else [])]]

    def dealing(self) -> list[Any]:
        """What the splits depend on."""
        return [self.val_fraction, self.test_fraction, self.seed]

    def _key(self) -> str:
        return key_of(_CODE, [self.tokenizer], [self.file_signature(), self.dealing()])

    @staticmethod
    def fields(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Fields:
        """The columns of the training data, or the usual names where the run has not kept them; a text is rows by line,
        but one row (see ``read_text``) where the model reads pairs, or was trained on files of one text each."""
        known = {
            name: dataset_info.get(f"{name}_columns") or _several(config.get(name)) for name in ("text", "text_pair")
        }
        usual = {"text": [(a,) for a, b in _TEXTS if bool(b) == dataset_info["pair"]]}
        usual |= {"text_pair": [(b,) for _, b in _TEXTS if b is not None]} if dataset_info["pair"] else {}
        columns = {entry: [tuple(known[entry])] if known.get(entry) else names for entry, names in usual.items()}
        lines = not (dataset_info["pair"] or dataset_info.get("text_files"))
        header = dataset_info.get("header", not all(name.isdigit() for name in known["text"] or ("text",)))
        return Fields(columns, lines, encoding=config.get("encoding", "utf-8"), header=header)

    @staticmethod
    def read(given: str | Mapping[str, Any], dataset_info: Mapping[str, Any], limits: Limits = LIMITS) -> Example:
        """See ``read_text``."""
        return read_text(given, dataset_info, limits)


class Labelled:
    """A ``Dataset`` of labelled texts that were read; see the top of this file for what is in an example."""

    def __init__(self, data: LabelledText, rows_N: Ragged):
        self._data, self._rows = data, rows_N
        about = rows_N.about
        self._tokenizer = load(about["tokenizer"])
        self.dataset_info: Mapping[str, Any] = {
            **dataset_info_of(self._tokenizer),
            "length": data.length,
            "num_classes": len(about["class_names"]),
            "class_names": tuple(about["class_names"]),
            "pair": about["pair"],
            **about["columns"],
        }
        encode = Encoder(self.dataset_info)
        split_N = np.asarray(rows_N.values["split"])
        sources = {}
        for i, split in enumerate(_SPLITS):
            indices = np.flatnonzero(split_N == i)
            if indices.size:
                sources[split] = _Rows(rows_N, indices, encode, split)
        self.splits: Mapping[str, Source] = sources
        self.description = self._describe(encode)

    def _describe(self, encode: Encoder) -> str:
        about, n = self._rows.about, len(self._rows)
        long = int((self._rows.lengths("first") + self._rows.lengths("second") > encode.room).sum())
        kinds = "pairs of texts" if about["pair"] else "texts"
        parts = [
            f"{self._data.root}: {n:,} {kinds} in {len(about['class_names'])} classes",
            f"a vocabulary of {self._tokenizer.size:,}",
            f"{long:,} ({long / n:.1%}) cut to {self._data.length} tokens",
        ]
        if about["empty"]:
            parts.append(f"{about['empty']:,} without text left out")
        parts += [f"the {split} split has no labels and is left out" for split in about["unlabelled"]]
        parts += [f"{count:,} of the {split} texts are in train too" for split, count in about["shared"].items()]
        if about["unused"]:
            parts.append(f"not used: {', '.join(about['unused'])}")
        return "; ".join(parts)

    def fingerprint(self) -> str:
        """A digest of the rows, the splits, the tokenizer and the length."""
        return digest(
            [self._data.file_signature(), self._data.dealing(), self._data.length, self._rows.about["tokenizer"]]
        )

    def examples(self) -> str:
        """A digest of the rows and the splits, whatever reads them."""
        return digest([self._data.file_signature(), self._data.dealing()])

    def read(self, given: str | Mapping[str, Any]) -> Example:
        """See ``read_text``."""
        return read_text(given, self.dataset_info)


class Encoder:
    """Tokens of a text, or two, as an example.

    Attributes:
      room: tokens of text that fit into an example.
    """

    def __init__(self, dataset_info: Mapping[str, Any]):
        """``dataset_info``: ``tokenizer``, ``length``, ``pair``."""
        tokenizer = load(dataset_info["tokenizer"])
        self._layout = tokenizer.layout(dataset_info["pair"])
        self._length: int = dataset_info["length"]
        self._pair: bool = dataset_info["pair"]
        self._pad = tokenizer.special.get("pad", 0)
        self.room = self._length - sum(token >= 0 for token in self._layout.tokens)

    def lengths(self, text_N: np.ndarray) -> np.ndarray:
        """i64[N], of examples with so many tokens of text."""
        return np.minimum(text_N, self.room) + self._length - self.room

    def __call__(self, first_T: np.ndarray, second_T: np.ndarray) -> Example:
        tokens_T, types_T = compose(self._layout, first_T, second_T if self._pair else None, self._length)
        T = len(tokens_T)
        example = {name: np.zeros(self._length, np.int32) for name in SEQUENCES}
        example["tokens"][:T] = tokens_T
        example["tokens"][T:] = self._pad
        example["segment_ids"][:T] = 1
        example["token_type_ids"][:T] = types_T
        return example


class _Rows:
    """The ``Source`` of one split.

    Attributes:
      labels: i32[N].
      in_memory: where the tokens are.
      lengths, sequences: see ``core.Source``.
    """

    sequences = SEQUENCES

    def __init__(self, rows_N: Ragged, indices: np.ndarray, encode: Encoder, split: str):
        self._rows, self._indices, self._encode, self._split = rows_N, indices, encode, split
        self.labels = np.asarray(rows_N.values["label"])[indices]
        self.in_memory: str = rows_N.kept
        self.lengths = encode.lengths((rows_N.lengths("first") + rows_N.lengths("second"))[indices])

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self._split} has {len(self)} texts; there is no {index}")
        row = int(self._indices[index])
        example = self._encode(self._rows.get("first", row), self._rows.get("second", row))
        return {**example, "label": self.labels[index]}

    def name(self, index: int) -> str:
        """Such as ``val[17]``."""
        return f"{self._split}[{index}]"


def read_text(given: str | Mapping[str, Any], dataset_info: Mapping[str, Any], limits: Limits = LIMITS) -> Example:
    """A row with ``text`` (and ``text_pair``), or a user's file, as an example without label. All of a file is the
    text; where the model reads pairs, the first line is the first text.

    Raises:
      UserError: unreadable, empty, or a pair that is not there.
    """
    first, second = given_text(given, dataset_info, limits=limits).strip(), ""
    if dataset_info["pair"]:
        whole = isinstance(given, str)
        first, _, second = first.partition("\n") if whole else (first, "", given_text(given, dataset_info, "text_pair"))
        if not second.strip():
            raise UserError(f"{given} has one line; this model reads two texts: the first line, and what follows it.")
    with named(given):
        (first_T, _), (second_T, _) = load(dataset_info["tokenizer"]).encode_batch([first.strip(), second.strip()])
    return Encoder(dataset_info)(first_T, second_T)


# --- rows -------------------------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """A row that is used."""

    texts: tuple[str, str]
    label: Any
    row: Row


class _Survey:
    """What one reading of all rows tells: columns, classes, and which row is in which split."""

    def __init__(self, data: LabelledText):
        self._data = data
        self._files, self._unused, self._class_of_file = data.files()
        first = next(file for files in self._files.values() for file in files)
        folders = Columns(("text",), (), "label", True)
        self.columns = folders if self._class_of_file else _columns(data, first)
        self._names = class_names(first, self.columns.label)
        self._empty = 0
        given: list[str] = []
        print_N: list[bytes] = []
        label_N: list[Any] = []
        where: dict[Any, str] = {}
        for split, kept in self._read(count=True):
            given.append(split)
            print_N.append(hashlib.blake2b("\0".join(kept.texts).encode(), digest_size=8).digest())
            label_N.append(kept.label)
            where.setdefault(kept.label, kept.row.where)
        if not given:
            raise UserError(f"{data.root} has no row with text.")
        unlabelled = {split for split, label in zip(given, label_N, strict=True) if label is None}
        for split in unlabelled:
            if split in ("", "train") or any(
                s == split and label is not None for s, label in zip(given, label_N, strict=True)
            ):
                raise UserError(f"{where[None]} has no label in {self.columns.label!r}; give it one or delete the row.")
        self._unlabelled = sorted(unlabelled)
        base = 0
        if self._names is None and (listed := data.names()):
            number = _first_label(listed, set(label_N) - {None}, data)
            base, self._names = (0, None) if number is None else (number, listed)
        self.class_names, self._class_of = _classes(label_N, self._names, base, self.columns.label, where, data.root)
        self._split_N = self._deal(given, print_N, label_N)

    def _read(self, count: bool = False) -> Iterator[tuple[str, _Kept]]:
        """(its split by its file, row) of every row that has text."""
        text, pair, label, header = self.columns
        for split, files in self._files.items():
            for file in files:
                for row in self._rows(file, header):
                    for name in (*text, *pair, label):
                        if name not in row.values:
                            raise UserError(f"{row.where} has no {name!r}.{suggest(name, row.values, 'column')}")
                    first, second = (_text(row, names) for names in (text, pair))
                    if not first or (pair and not second):
                        self._empty += count
                        continue
                    found = self._class_of_file.get(file.name) or _label(row, label, self._names is not None)
                    yield split, _Kept((first, second), found, row)

    def _rows(self, file: File, header: bool) -> Iterator[Row]:
        if not self._class_of_file:
            return rows(file, self._data.encoding, header)
        text = whole_text(file, self._data.encoding)
        return iter([Row(1, {"text": text, "label": self._class_of_file[file.name]}, file)])

    def _deal(self, given: list[str], print_N: list[bytes], label_N: list[Any]) -> list[str]:
        """The split of each row; "" where it is left out."""
        split_N = ["" if split in self._unlabelled else split or "train" for split in given]
        found = {split for split in given if split}
        fractions = to_split_off(found - set(self._unlabelled), self._data.val_fraction, self._data.test_fraction)
        if self._unlabelled:
            fractions.pop("test", None)  # the test data is elsewhere
        groups: dict[bytes, list[int]] = {}
        for i, split in enumerate(split_N):
            if split == "train":
                groups.setdefault(print_N[i], []).append(i)
        names = sorted(groups)
        classes = np.array([min(self._class_of[label_N[i]] for i in groups[name]) for name in names])
        for split, chosen in stratified([n.hex() for n in names], classes, fractions, self._data.seed).items():
            for group in chosen:
                for i in groups[names[group]]:
                    split_N[i] = split
        train = {p for p, split in zip(print_N, split_N, strict=True) if split == "train"}
        trained = {self._class_of[label] for label, s in zip(label_N, split_N, strict=True) if s == "train"}
        for label, index in self._class_of.items():
            if index not in trained and self._names is None:
                raise UserError(f"no training row of {self._data.root} has the label {label!r}, which others have.")
        self._shared = Counter(
            s for p, s in zip(print_N, split_N, strict=True) if s not in ("", "train") and p in train
        )
        return split_N

    def texts(self, splits: Sequence[str]) -> Iterator[str]:
        """All texts of some splits."""
        for split, (_, kept) in zip(self._split_N, self._read(), strict=True):
            if split in splits:
                yield from (text for text in kept.texts if text)

    def write(self, tokenizer: Tokenizer, add: ragged.Add) -> Mapping[str, Any]:
        """Adds the tokens of all rows."""
        for waiting in _batches((s, kept) for s, (_, kept) in zip(self._split_N, self._read(), strict=True) if s):
            found = tokenizer.encode_batch([text for _, kept in waiting for text in kept.texts])
            for i, (split, kept) in enumerate(waiting):
                (first, _), (second, _) = found[2 * i : 2 * i + 2]
                add(first=first, second=second, label=self._class_of[kept.label], split=_SPLITS.index(split))
        return {
            "tokenizer": tokenizer.state(),
            "class_names": self.class_names,
            "pair": bool(self.columns.text_pair),
            "columns": {
                "text_columns": self.columns.text,
                "text_pair_columns": self.columns.text_pair,
                "header": self.columns.header,
                "text_files": bool(self._class_of_file),
            },
            "empty": self._empty,
            "unlabelled": self._unlabelled,
            "shared": dict(self._shared),
            "unused": self._unused,
        }


def _batches(kept: Iterable[tuple[str, _Kept]]) -> Iterator[list[tuple[str, _Kept]]]:
    waiting, size = [], 0
    for item in kept:
        waiting.append(item)
        size += sum(map(len, item[1].texts)) + 1
        if size >= _BATCH:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def _place(file: File) -> tuple[str, ...]:
    """What says where a file lies that is no text of a class: the folder of texts without one, or its own name."""
    folders = [part for part in file.name.split("/") if part in _UNLABELLED]
    return tuple(folders[:1]) or (file.name,)


def _class_folders(files: Sequence[File], root: str) -> dict[str, str]:
    """The class of each text that lies in a folder for its class, by name; nothing where there are tables, or no such
    folders.

    Raises:
      UserError: the folders of splits have names that nobody knows, so that they would be classes.
    """
    if any(kind_of(file.name) in TABLES for file in files):
        return {}
    depth = common_folders(files)
    parts = {file.name: file.name.split("/")[depth:] for file in files}
    for p in parts.values():  # training_set/training_set/CLASS
        if len(p) > 2 and named_after(p[0], whole=True) == named_after(p[1], whole=True) is not None:
            del p[1]
    if any(len(p) > 2 and named_after(p[0], whole=True) == "train" for p in parts.values()):
        found = {name: p[1] for name, p in parts.items() if len(p) > 2 and named_after(p[0], whole=True)}
    else:
        found = {name: p[0] for name, p in parts.items() if len(p) > 1}
        below: dict[str, set[str]] = {}
        for name, folder in found.items():
            below.setdefault(folder, set()).update(set(parts[name][1:-1][:1]) - _UNLABELLED)
        refuse_alike(root, below)
    found = {name: folder for name, folder in found.items() if folder not in _UNLABELLED}
    return found if any(not named_after(folder) for folder in found.values()) and len(set(found.values())) > 1 else {}


def _columns(data: LabelledText, file: File) -> Columns:
    """The columns to read: those that the config names, and the usual ones for the rest."""
    line = first_line(file, data.encoding)
    given = [name for name in (data.text, data.text_pair, data.label) if name is not None]
    numbers = all(part.strip().isdigit() for name in given for part in name.split("+"))
    if line is not None and data.text is not None and data.label is not None and numbers:
        return Columns(_several(data.text), _several(data.text_pair), data.label, False)
    if line is not None and not given and len(line) == 2 and sum(map(_is_whole, line)) == 1:
        place = [_is_whole(cell) for cell in line].index(True)
        return Columns((str(1 - place),), (), str(place), False)
    first = next(rows(file, data.encoding), None)
    names = list(first.values) if first is not None else line or []
    text, pair, label = _several(data.text, names), _several(data.text_pair, names), data.label
    named = [*text, *pair, *([] if label is None else [label])]
    for name in named:
        if names and name not in names:
            raise UserError(f"{file} has no column {name!r}.{suggest(name, names, 'column')}")
    if not names:
        raise UserError(f"{file} has no rows.")
    if not text:
        free = [name for name in names if name not in named]
        usual = next(((a, b) for a, b in _TEXTS if a in free and (b is None or (b in free and not pair))), None)
        if usual is not None:
            text, pair = (usual[0],), pair or _several(usual[1])
    if label is None:
        label = next((name for name in _LABELS if name in names and name not in (*text, *pair)), None)
    if not text or label is None:
        what = " and ".join(w for w, name in (("text", text), ("label", label)) if not name)
        shown = ", ".join(repr(name if len(name) < 30 else name[:27] + "...") for name in names[:8])
        raise UserError(
            f"{file} has the columns {shown}; name the one of the {what} after the recipe, as in"
            " :root=...,text=title+body,label=topic, by number from 0 where a table has no header."
        )
    return Columns(text, pair, label, True)


def _several(given: str | None, names: Sequence[str] = ()) -> tuple[str, ...]:
    """The columns that a text is joined of: ``a+b``, unless one is called so."""
    if given is None or given in names:
        return () if given is None else (given,)
    return tuple(name.strip() for name in given.split("+"))


def _is_whole(cell: str) -> bool:
    return re.fullmatch(r"-?\d+(\.0+)?", cell.strip(), re.ASCII) is not None


def _text(row: Row, names: Sequence[str]) -> str:
    values = {name: row.values[name] for name in names if row.values[name] is not None}
    for name, value in values.items():
        if not isinstance(value, str):
            raise UserError(f"{row.where}: {name!r} is {type(value).__name__}, not text.")
    return checked("\n".join(values.values()).strip(), row.where)


def _label(row: Row, name: str, has_names: bool) -> Any:
    """A whole number or a word; None where there is none."""
    value = row.values[name]
    if isinstance(value, str):
        value = value.strip()
        whole = value.partition(".")[0]
        if _is_whole(value) and len(whole) > 18:
            raise UserError(f"{row.where}: {name!r} is a number of {len(whole):,} digits, and so no class.")
        return int(whole) if _is_whole(value) else value or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (has_names and value == -1):
        return None
    if isinstance(value, int):
        return int(value)
    raise UserError(f"{row.where}: {name!r} is {value!r}, neither a word nor a whole number, and so no class.")


def _first_label(names: Sequence[str], found: set[Any], data: LabelledText) -> int | None:
    """The number that the first of the names in a file stands for, 0 or 1; None where the labels are names already.

    Raises:
      UserError: they are other numbers, or may be either.
    """
    if data.class_names is None and any(isinstance(label, str) for label in found):
        return None
    n = len(names)
    fits = [base for base in (0, 1) if found <= set(range(base, base + n))]
    if len(fits) == 1:
        return fits[0]
    shown = ", ".join(map(repr, sorted(found, key=str)[:6]))
    raise UserError(
        f"{data.class_names or 'classes.txt'} names {n} classes, for labels 0 to {n - 1} or 1 to {n}, but {data.root}"
        f" has {shown}{', which may be either: leave only the names that occur' if fits else ''}."
    )


def _classes(
    label_N: Sequence[Any], names: Sequence[str] | None, base: int, column: str, where: Mapping[Any, str], root: str
) -> tuple[list[str], dict[Any, int]]:
    """The names of the classes, and the class of each label: numbers in their order, words by alphabet.

    Args:
      names: of the classes that numbers from ``base`` on stand for, if they are known.
    """
    found = {label for label in label_N if label is not None}
    if names is not None:
        for label in found:
            if not isinstance(label, int) or not base <= label < base + len(names):
                raise UserError(f"{where[label]} has the label {label!r}; {column!r} has {len(names)} classes from 0.")
        return list(names), {base + i: i for i in range(len(names))}
    if len(found) < 2:
        raise UserError(f"all rows of {root} have the label {next(iter(found))!r}; two classes are the least.")
    if len(found) > max(20, len(label_N) // 2):
        raise UserError(
            f"the column {column!r} of {root} has {len(found):,} different values in {len(label_N):,} rows; name the"
            " column of the classes with label='...'."
        )
    words = sorted(label for label in found if isinstance(label, str))
    if 0 < len(words) < len(found):
        number = min(label for label in found if isinstance(label, int))
        raise UserError(
            f"{where[number]} has the label {number}, a number, but {where[words[0]]} {words[0]!r}, a word."
        )
    order = sorted(found)
    return [str(label) for label in order], {label: i for i, label in enumerate(order)}
