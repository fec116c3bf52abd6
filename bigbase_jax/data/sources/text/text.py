"""Text for language modelling: files of documents, or the language reference that comes with every Python.

Documents -> splits -> tokenizer -> token cache -> windows: the modules ``documents``, ``tokenizer``, ``tokens`` and
``windows``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from bigbase_jax.core import Codec, Example, Fields, UserError
from bigbase_jax.data import tokens as token_rows
from bigbase_jax.data.cache import Store, Write
from bigbase_jax.data.documents import COLUMNS, Document, Format
from bigbase_jax.data.files import LIMITS, Limits, limits_of, list_files, split_of, stems_of
from bigbase_jax.data.sources.splits import digest, to_split_off
from bigbase_jax.data.sources.text.base import SPLITS, Opened, TextCodec, TextRows, given_text, named
from bigbase_jax.data.tokens import Tokens
from bigbase_jax.data.windows import Windows
from bigbase_jax.text.tokenizer import Bytes, Texts, Tokenizer, dataset_info_of, load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus(TextRows):
    """Documents, and how windows are made of them; see ``TextRows``. Subclasses say where documents come from.

    Attributes:
      tokenizer: ``Bytes``, ``Characters``, ``Subwords`` or ``TokenizerFile``, fitted to the training documents.
      length: tokens of a window.
      stride: where the training text is one document: tokens from one window to the next, so that windows overlap and
        an epoch sees the text at many offsets (1: at all). None: ``length``, as always with several documents, where
        overlap would give the long ones more weight.
      val_fraction, test_fraction: shares of the characters that become val and test where the data has no splits; 0:
        none. Documents are dealt whole, equal ones to the same split; a single text is cut, its end being val (and
        what comes after that, test).
      separate: have an end token between documents, predict their first token from it, and it from their last. None:
        where there are several documents to train on.

    Raises:
      UserError: a value out of its range.
    """

    tokenizer: Any = Bytes()
    length: int = 256
    stride: int | None = None
    test_fraction: float = 0.0
    separate: bool | None = None

    code: ClassVar[tuple[str, ...]] = ("data.tokens", "data.sources.text.text")
    least: ClassVar[Mapping[str, int]] = {"length": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride is not None and not 1 <= self.stride <= self.length:
            raise UserError(f"stride is {self.stride}; it lies between 1 and the length, {self.length}.")
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1.")
        if self.val_fraction + self.test_fraction >= 1:
            raise UserError("val_fraction and test_fraction leave nothing to train on; use a sum below 1.")

    def documents(self) -> Iterator[tuple[str | None, Document]]:
        """(its split, or None where it is to be dealt, document) of every document, from the start at each call."""
        raise NotImplementedError

    def dealing(self) -> list[Any]:
        return [*super().dealing(), self.separate]

    def begin(self) -> Write:
        """
        Raises:
          UserError: no documents, or one that cannot be read or tokenised.
        """
        plan = _survey(self)
        texts = functools.partial(_texts, self, plan, ("train",))
        others = functools.partial(_texts, self, plan, ("val", "test"))
        separate = plan.separate if self.separate is None else self.separate
        tokenizer: Tokenizer = self.tokenizer.fit(texts, others, separate)
        return functools.partial(token_rows.write, functools.partial(_parts, self, plan), tokenizer)

    def identity(self, tokenizer: Tokenizer) -> list[Any]:
        """What the fingerprint depends on."""
        return [*self.file_signature(), *self.dealing(), self.length, self.stride, tokenizer.state()]

    def opened(self, rows_N: Store) -> Opened:
        """
        Raises:
          UserError: a split is too short.
        """
        return Text(self, token_rows.of_rows(rows_N))

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """A row has one entry, ``text``; a text is a row by line where the documents were lines, else it is one."""
        return text_codec(config, dataset_info, read_text)


class Text(Opened):
    """A ``Dataset`` of windows over a corpus that was read.

    Attributes:
      splits: ``inputs``, ``targets``, ``segment_ids``, ``positions`` and ``bytes``, i32[L] each; see ``Windows``.
      dataset_info: ``vocab_size``, ``length``, ``tokenizer`` (its ``state()``) and ids of special tokens (``end_id``).
      description: what the text is, and how full its windows are.
      tokens: of all documents.
    """

    def __init__(self, corpus: Corpus, tokens: Tokens):
        self.tokens, counts, tokenizer = tokens, tokens.about, tokens.tokenizer
        windows: dict[str, Windows] = {}
        if "train" not in counts:
            raise UserError(f"{corpus.origin()} is too short to be split; set val_fraction=0.")
        for split in (split for split in SPLITS if split in counts):
            single = split == "train" and counts[split]["documents"] == 1
            windows[split] = Windows(tokens, split, corpus.length, corpus.stride if single else None)
            if not len(windows[split]):
                raise UserError(f"the {split} split of {corpus.origin()} is too short: it has nothing to predict.")
        parts = [f"{documents(c)} of {c['tokens']:,} tokens ({c['bytes']:,} bytes)" for c in counts.values()]
        told = "; ".join(f"{split} {part}" for split, part in zip(counts, parts, strict=True))
        description = (
            f"{corpus.origin()}: {told}; a vocabulary of {tokenizer.size:,}; windows of {corpus.length}, "
            f"{windows['train'].fill:.1%} filled"
        )
        info = {**dataset_info_of(tokenizer), "length": corpus.length}
        super().__init__(windows, info, description, corpus.identity(tokenizer))

    def read(self, text: str) -> list[Example]:
        """The windows of a text, as an evaluation would make them; raises UserError where it cannot be encoded."""
        return read_text({"text": text}, self.dataset_info)


def documents(counts: Mapping[str, int]) -> str:
    """How many there are, in words."""
    return f"{counts['documents']:,} document{'s' * (counts['documents'] != 1)}"


def text_codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any], read: Callable[..., Any]) -> TextCodec:
    """Of texts as a ``Format`` finds them; of a mixture, as in its first part."""
    form = next(iter((config.get("parts") or {"": config}).values())).get("format") or {}
    names = tuple(form.get("columns", ()))
    header = not (names and all(name.isdigit() for name in names))
    lines, encoding = form.get("unit") == "line", form.get("encoding", "utf-8")
    fields = Fields({"text": (names,) if names else COLUMNS}, lines, encoding=encoding, header=header)
    return TextCodec(fields, read, dataset_info, limits_of(config))


def read_text(given: Any, dataset_info: Mapping[str, Any], limits: Limits = LIMITS) -> list[Example]:
    """A user's file, or the ``text`` of a row, as the windows that an evaluation would make of it, in order.

    Raises:
      UserError: unreadable, not UTF-8, a character without a token, or too short to predict anything.
    """
    text, tokenizer = given_text(given, dataset_info, limits=limits), load(dataset_info["tokenizer"])
    with named(given):
        windows = Windows(token_rows.of_text(text, tokenizer), "train", dataset_info["length"])
    if not len(windows):
        what = given if isinstance(given, str) else "the text"
        raise UserError(f"{what} is too short: with this vocabulary it is one token, and none is left to predict.")
    return [windows[i] for i in range(len(windows))]


# --- splits -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which document is in which split.

    Attributes:
      split_D: of each document.
      cut: the document that is cut, and the (split, first, last character) of its parts.
      separate: whether there are several documents to train on.
    """

    split_D: list[str]
    cut: tuple[int, list[tuple[str, int, int]]] | None
    separate: bool


def _survey(corpus: Corpus) -> _Plan:
    """Reads all documents once: how long they are, which are alike, and so which is in which split."""
    given: list[str | None] = []
    size_D: list[int] = []
    print_D: list[bytes] = []
    for split, document in corpus.documents():
        state, size = hashlib.blake2b(str(corpus.seed).encode() + b"/", digest_size=8), 0
        for block in document.blocks:
            state.update(block.encode())
            size += len(block)
        given.append(split)
        size_D.append(size)
        print_D.append(state.digest())
    if not given:
        raise UserError(f"{corpus.origin()} holds no text.")
    split_D = [split or "train" for split in given]
    found = {split for split in given if split is not None}
    fractions = to_split_off(found, corpus.val_fraction, corpus.test_fraction)
    fractions = {split: fraction for split, fraction in fractions.items() if fraction > 0}
    mine = [d for d, split in enumerate(split_D) if split == "train"]
    if len(mine) == 1:
        return _Plan(split_D, (mine[0], _cuts(size_D[mine[0]], fractions)), False)
    by_print: dict[bytes, list[int]] = {}
    for d in mine:
        by_print.setdefault(print_D[d], []).append(d)
    groups = [by_print[key] for key in sorted(by_print)]
    total = sum(size_D[d] for d in mine)
    for split, fraction in fractions.items():
        _deal(groups, split, fraction * total, size_D, split_D)
    return _Plan(split_D, None, True)


def _deal(groups: list[list[int]], split: str, goal: float, size_D: list[int], split_D: list[str]) -> None:
    """Moves the first groups of equal documents that fit into ``goal`` characters, and one at least, to a split."""
    taken = 0
    rest: list[list[int]] = []
    for i, group in enumerate(groups):
        size = sum(size_D[d] for d in group)
        last = i + 1 == len(groups) and not rest  # which stays in train
        if not last and (taken + size <= goal or (not taken and i + 1 == len(groups))):
            taken += size
            for d in group:
                split_D[d] = split
        else:
            rest.append(group)
    groups[:] = rest


def _cuts(size: int, fractions: Mapping[str, float]) -> list[tuple[str, int, int]]:
    """Train first, then val, then test, as characters of one text; with val alone, ``text[: int(0.9 * len(text))]``."""
    val, test = (fractions.get(split, 0.0) for split in ("val", "test"))
    ends = {"train": int(size * (1 - val - test)), "val": int(size * (1 - test)), "test": size}
    cuts, start = [], 0
    for split in SPLITS:
        stop = ends[split] if split == "train" or split in fractions else start
        if stop > start:
            cuts.append((split, start, stop))
            start = stop
    return cuts


def _parts(corpus: Corpus, plan: _Plan) -> Iterator[tuple[str, Iterable[str]]]:
    """(split, blocks) of each document, or of each part of the one that is cut."""
    for d, (_, document) in enumerate(corpus.documents()):
        if plan.cut is None or plan.cut[0] != d:
            yield plan.split_D[d], document.blocks
            continue
        for split, first, last in plan.cut[1]:
            for i, (_, again) in enumerate(corpus.documents()):  # blocks can be read once
                if i == d:
                    yield split, _slice(again.blocks, first, last)
                    break


def _slice(blocks: Iterable[str], first: int, last: int) -> Iterator[str]:
    """Characters ``first`` to ``last`` of a text."""
    at = 0
    for block in blocks:
        part = block[max(first - at, 0) : max(last - at, 0)]
        if part:
            yield part
        at += len(block)
        if at >= last:
            return


def _texts(corpus: Corpus, plan: _Plan, splits: tuple[str, ...]) -> Iterator[str]:
    for split, blocks in _parts(corpus, plan):
        if split in splits:
            yield from blocks


def texts_of(corpus: Corpus, splits: tuple[str, ...]) -> Texts:
    """What gives the texts of some splits of a corpus."""
    plan: list[_Plan] = []

    def found() -> Iterator[str]:
        if not plan:
            plan.append(_survey(corpus))
        return _texts(corpus, plan[0], splits)

    return found


# --- where documents come from ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles(Corpus):
    """Documents in a file, or in all files below a folder; see ``Format`` and ``Corpus``.

    Files named after splits (``train.tsv``, ``valid.txt``, ``test/...``) keep them; a missing val is taken from train.
    Of a folder that ``datasets`` has saved, splits of other names are left out, which the description says.

    Attributes:
      root: the file or folder.
      format: of the files.
      limits: of reading one.
    """

    root: str
    format: Format = Format()
    limits: Limits = LIMITS

    def documents(self) -> Iterator[tuple[str | None, Document]]:
        files = list_files(self.root, self.limits)
        splits = split_of(files, self.root)
        for file in files:
            split = splits.get(file.name)
            if split != "":
                for document in self.format.documents(file):
                    yield split, document

    def file_signature(self) -> list[Any]:
        files = list_files(self.root, self.limits)
        return [*([f.name, f.size, f.mtime_ns, *f.permission] for f in files), repr(self.format)]

    def origin(self) -> str:
        files = list_files(self.root)
        splits = split_of(files, self.root)
        stems = stems_of(files)
        left = sorted({stems[name] for name, split in splits.items() if not split})
        return f"{self.root} (without {', '.join(left)})" if left else self.root


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonReference(Corpus):
    """The language reference that every Python interpreter brings along (``pydoc_data.topics``), one document a topic.

    No network, no files of yours. The text differs between versions of Python.
    """

    test_fraction: float = 0.1

    def documents(self) -> Iterator[tuple[str | None, Document]]:
        for name, text in sorted(self._topics().items()):
            yield None, Document(name, (text,))

    def file_signature(self) -> list[Any]:
        return [digest([sorted(self._topics().items())])]

    def origin(self) -> str:
        return f"the language reference inside Python {platform.python_version()} (pydoc_data.topics)"

    def _topics(self) -> Mapping[str, str]:
        return importlib.import_module("pydoc_data.topics").topics
