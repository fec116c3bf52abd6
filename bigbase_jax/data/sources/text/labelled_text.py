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
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Codec, Example, Fields, UserError
from bigbase_jax.data.cache import Store, Writer
from bigbase_jax.data.documents import Format, whole_text
from bigbase_jax.data.files import (
    LIMITS,
    TABLES,
    File,
    Limits,
    by_split,
    common_folders,
    kind_of,
    limits_of,
    list_files,
    named_after,
    one_file,
    refuse_alike,
)
from bigbase_jax.data.rows import Row, checked, class_names, first_line, rows
from bigbase_jax.data.sources.splits import also_in_train, deal, to_split_off
from bigbase_jax.data.sources.text.base import (
    ROLES,
    SPLITS,
    Opened,
    Survey,
    TextCodec,
    TextRowFiles,
    TextRows,
    Write,
    given_text,
    named,
    narrow,
    splits_of,
    tokenizer_of,
)
from bigbase_jax.text.tokenizer import Encoder, Subwords, Tokenizer, dataset_info_of, load

SUBWORDS = Subwords("bpe", 8192)
SEQUENCES = ("tokens", "segment_ids", "token_type_ids")
_TEXTS: tuple[tuple[str, str | None], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    *((name, None) for name in ("text", "sentence", "review", "content", "comment", "sms", "tweet", "title")),
)
_LABELS = ("label", "labels", "class", "target", "sentiment", "category", "coarse_label", "intent", "stars", "rating")
_ENTRIES = ("text", "text_pair")
_UNLABELLED = {"unsup", "unsupervised", "unlabelled", "unlabeled"}  # folders beside those of classes


class Columns(NamedTuple):
    """Which columns hold what; ``header``: whether tables name theirs in the first line."""

    text: tuple[str, ...]
    text_pair: tuple[str, ...]
    label: str
    header: bool


class Labelled(NamedTuple):
    """A text, or two (the second is else empty), and its class: a number or a word, or None where there is none."""

    texts: tuple[str, str]
    label: Any
    where: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledTexts(TextRows):
    """Texts with a class each, and how examples are made of them; see ``TextRows``. Subclasses say where they come
    from.

    Attributes:
      length: L; what is longer is cut.

    Raises:
      UserError: a value out of its range.
    """

    tokenizer: Any = SUBWORDS
    length: int = 128

    code: ClassVar[tuple[str, ...]] = ("data.sources.text.labelled_text",)
    least: ClassVar[Mapping[str, int]] = {"length": 4}

    def tokenised(self, survey: Survey[Labelled], class_of: Mapping[Any, int], about: Mapping[str, Any]) -> Write:
        """What ``begin`` gives; ``about``: ``class_names``, ``pair``, ``columns`` and what ``describe`` reads."""
        tokenizer: Tokenizer = survey.fit(self.tokenizer, _texts, False, ROLES)

        def write(writer: Writer) -> Mapping[str, Any]:
            for waiting in survey.batches(_texts):
                found = tokenizer.encode_batch([text for _, row in waiting for text in row.texts])
                for i, (split, row) in enumerate(waiting):
                    first, second = (narrow(tokens_T, tokenizer) for tokens_T, _ in found[2 * i : 2 * i + 2])
                    label, number = np.int32(class_of[row.label]), np.uint8(SPLITS.index(split))
                    writer.add({"first": first, "second": second, "label": label, "split": number})
            return {"tokenizer": tokenizer.state(), **about}

        return write

    def opened(self, rows_N: Store) -> Opened:
        tokenizer, about = tokenizer_of(rows_N), rows_N.about
        info = {
            **dataset_info_of(tokenizer),
            "length": self.length,
            "num_classes": len(about["class_names"]),
            "class_names": tuple(about["class_names"]),
            "pair": about["pair"],
            **about["columns"],
        }
        encode = Encoder(tokenizer, self.length, about["pair"])
        names = ("first", "second")[: 1 + about["pair"]]
        size_N = np.sum([rows_N.lengths(name) for name in names], 0)

        def example(row: int) -> Example:
            return {**encoded(encode, [rows_N.get(name, row) for name in names]), "label": label_N[row]}

        label_N, lengths_N = rows_N.values("label"), np.minimum(size_N, encode.room) + self.length - encode.room
        splits = splits_of(rows_N, example, labels=label_N, lengths=lengths_N, sequences=SEQUENCES)
        words = self.describe(about, len(rows_N), int((size_N > encode.room).sum()), tokenizer.size)
        return Opened(splits, info, words, self.identity(about["tokenizer"]), self.content())

    def content(self) -> list[Any] | None:
        """What the rows and the splits depend on; None: as ``identity``."""
        return [self.file_signature(), self.dealing()]

    def identity(self, tokenizer: str) -> list[Any]:
        """What the fingerprint depends on."""
        return [self.file_signature(), self.dealing(), self.length, tokenizer]

    def describe(self, about: Mapping[str, Any], count: int, cut: int, vocabulary: int) -> str:
        """One line about so many rows, of which some are cut."""
        raise NotImplementedError

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """Of the columns of the training data, or the usual names where the run has not kept them; a text is rows by
        line, but one row (see ``read_text``) where the model reads pairs, or was trained on files of one text each."""
        known = {name: dataset_info.get(f"{name}_columns") or _several(config.get(name)) for name in _ENTRIES}
        usual = {"text": [(a,) for a, b in _TEXTS if bool(b) == dataset_info["pair"]]}
        usual |= {"text_pair": [(b,) for _, b in _TEXTS if b is not None]} if dataset_info["pair"] else {}
        columns = {entry: [tuple(known[entry])] if known.get(entry) else names for entry, names in usual.items()}
        lines = not (dataset_info["pair"] or dataset_info.get("text_files"))
        header = dataset_info.get("header", not all(name.isdigit() for name in known["text"] or ("text",)))
        fields = Fields(columns, lines, encoding=config.get("encoding", "utf-8"), header=header)
        return TextCodec(fields, read_text, dataset_info, limits_of(config), ("segment_ids", *SEQUENCES))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledText(LabelledTexts, TextRowFiles):
    """Rows of a text, or two, and a class, in files; see ``TextRowFiles`` and ``LabelledTexts``. Where there are no
    tables, ``CLASS/*.txt``, or ``{train,val,test}/CLASS/*.txt``, are texts of the class after which their folder is
    called.

    A missing val is taken from train, and a missing test where there is nothing but train: dealt by class. Rows without
    text are left out, and so is a split without labels, which is said.

    Attributes:
      text, text_pair, label: names of the columns, or their numbers from 0 in tables without a header; None: the usual
        names, where there are such, and in a table of two columns without a header the label is the whole number. A
        text may be several columns, joined by line ends: "title+body".
      class_names: a file with the name of a class in each line, for labels that are numbers from 0 or 1; it may lie in
        ``root``. None: ``classes.txt`` there, if there is one.
    """

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    class_names: str | None = None

    def listed(self) -> Sequence[File]:
        try:
            return super().listed()
        except UserError as error:
            wanted = "neither a table nor a folder of texts for each class (CLASS/*.txt, train/CLASS/*.txt)"
            raise UserError(f"{self.root} is {wanted}: {error}") from error

    def sorted_files(self) -> tuple[dict[str, list[File]], list[str], dict[str, str]]:
        """``files``; and where each file is one text, its class by its name."""
        listed = list_files(self.root, self.limits)
        class_of = _class_folders(listed, self.root)
        if not class_of:
            return *super().files(), {}
        chosen = {"train": self.train, "val": self.val, "test": self.test}
        used = by_split([file for file in listed if file.name in class_of], self.root, chosen)
        others = {part for file in listed if file.name not in class_of for part in _place(file)}
        return used, sorted(others), class_of

    def files(self) -> tuple[dict[str, list[File]], list[str]]:
        return self.sorted_files()[:2]

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
        names = self.names()
        columns = [self.text, self.text_pair, self.label, self.encoding, *([names] if names else [])]
        return [self.files_signature(), columns]

    def begin(self) -> Write:
        """
        Raises:
          UserError: no rows, a column that is not there, or a row that cannot be read.
        """
        return _begin(self)

    def describe(self, about: Mapping[str, Any], count: int, cut: int, vocabulary: int) -> str:
        kinds = "pairs of texts" if about["pair"] else "texts"
        parts = [
            f"{self.root}: {count:,} {kinds} in {len(about['class_names'])} classes",
            f"a vocabulary of {vocabulary:,}",
            f"{cut:,} ({cut / count:.1%}) cut to {self.length} tokens",
        ]
        if about["empty"]:
            parts.append(f"{about['empty']:,} without text left out")
        parts += [f"the {split} split has no labels and is left out" for split in about["unlabelled"]]
        parts += [f"{n:,} of the {split} texts are in train too" for split, n in about["shared"].items()]
        if about["unused"]:
            parts.append(f"not used: {', '.join(about['unused'])}")
        return "; ".join(parts)


def encoded(encode: Encoder, texts: Sequence[np.ndarray]) -> Example:
    """An example without label."""
    example, _ = encode(texts)
    return {name: example[name] for name in SEQUENCES}


def read_text(given: Any, dataset_info: Mapping[str, Any], limits: Limits = LIMITS) -> Example:
    """A row with ``text`` (and ``text_pair``), or a user's file, as an example without label. All of a file is the
    text; where the model reads pairs, the first line is the first text.

    Raises:
      UserError: unreadable, empty, or a pair that is not there.
    """
    first, second = given_text(given, dataset_info, limits=limits).strip(), ""
    if dataset_info["pair"]:
        if isinstance(given, Mapping):
            second = given_text(given, dataset_info, "text_pair")
        else:
            first, _, second = first.partition("\n")
        if not second.strip():
            raise UserError(f"{given} has one line; this model reads two texts: the first line, and what follows it.")
    texts = [first.strip(), second.strip()][: 1 + dataset_info["pair"]]
    tokenizer = load(dataset_info["tokenizer"])
    with named(given):
        found = tokenizer.encode_batch(texts)
    encode = Encoder(tokenizer, dataset_info["length"], dataset_info["pair"])
    return encoded(encode, [tokens_T for tokens_T, _ in found])


# --- rows -------------------------------------------------------------------------------------------------------------


def _texts(row: Labelled) -> tuple[str, str]:
    return row.texts


def _begin(data: LabelledText) -> Write:
    """Reads all rows once: columns, classes, and which row is in which split."""
    files, unused, class_of_file = data.sorted_files()
    first = next(file for given in files.values() for file in given)
    columns = Columns(("text",), (), "label", True) if class_of_file else _columns(data, first)
    names = class_names(first, columns.label)
    empty = 0

    def read(count: bool = False) -> Iterator[tuple[str, Labelled]]:
        """(its split by its file, row) of every row that has text."""
        nonlocal empty
        for split, file in ((split, file) for split, given in files.items() for file in given):
            class_name = class_of_file.get(file.name)
            whole = None if class_name is None else whole_text(file, data.encoding)
            all_rows = rows(file, data.encoding, columns.header) if whole is None else [Row(1, {"text": whole}, file)]
            for row in all_rows:
                used = (*columns.text, *columns.text_pair, *([columns.label] if class_name is None else []))
                for name in used:
                    if name not in row.values:
                        raise UserError(f"{row.where} has no {name!r}.{suggest(name, row.values, 'column')}")
                texts = _text(row, columns.text), _text(row, columns.text_pair)
                if texts[0] and (texts[1] or not columns.text_pair):
                    label = class_name or _label(row, columns.label, names is not None)
                    yield split, Labelled(texts, label, row.where)
                else:
                    empty += count

    given, print_N, label_N = [], [], []
    where: dict[Any, str] = {}
    for split, row in read(count=True):
        given.append(split)
        print_N.append(hashlib.blake2b("\0".join(row.texts).encode(), digest_size=8).hexdigest())
        label_N.append(row.label)
        where.setdefault(row.label, row.where)
    if not given:
        raise UserError(f"{data.root} has no row with text.")
    unlabelled = {split for split, label in zip(given, label_N, strict=True) if label is None}
    labelled = {split for split, label in zip(given, label_N, strict=True) if label is not None}
    if unlabelled & ({"", "train"} | labelled):
        raise UserError(f"{where[None]} has no label in {columns.label!r}; give it one or delete the row.")
    base, known = 0, names
    if names is None and (listed := data.names()):
        number = _first_label(listed, set(label_N) - {None}, data)
        base, known = (0, None) if number is None else (number, listed)
    classes, class_of = _classes(label_N, known, base, columns.label, where, data.root)
    fractions = to_split_off({s for s in given if s} - unlabelled, data.val_fraction, data.test_fraction)
    if unlabelled:
        fractions.pop("test", None)  # the test data is elsewhere
    split_N = ["" if split in unlabelled else split or "train" for split in given]
    split_N = deal(split_N, print_N, fractions, data.seed, [class_of.get(label, 0) for label in label_N])
    trained = {class_of[label] for label, split in zip(label_N, split_N, strict=True) if split == "train"}
    for label, index in class_of.items():
        if index not in trained and known is None:
            raise UserError(f"no training row of {data.root} has the label {label!r}, which others have.")
    about = {
        "class_names": classes,
        "pair": bool(columns.text_pair),
        "columns": {
            "text_columns": columns.text,
            "text_pair_columns": columns.text_pair,
            "header": columns.header,
            "text_files": bool(class_of_file),
        },
        "empty": empty,
        "unlabelled": sorted(unlabelled),
        "shared": also_in_train(split_N, print_N),
        "unused": unused,
    }
    return data.tokenised(Survey(read, split_N), class_of, about)


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
