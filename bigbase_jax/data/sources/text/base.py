"""What the sources of text share: rows are read once to deal them to splits, and once more to tokenise them into one
store (``data.cache``), which later starts find there.

Axes: N rows of all splits, T tokens of one text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from bigbase_jax.core import Codec, Example, Fields, Source, UserError
from bigbase_jax.data.cache import Store, Write, kept, source_digest
from bigbase_jax.data.documents import Format, as_text, whole_text
from bigbase_jax.data.files import LIMITS, File, Limits, by_split, one_file, readable, too_long, unused
from bigbase_jax.data.rows import checked, tables
from bigbase_jax.data.sources.splits import Opened, Read, Split, deal, digest, to_split_off
from bigbase_jax.text.tokenizer import Texts, Tokenizer, TokenizerFile, load

SPLITS = ("train", "val", "test")
_BATCH = 1 << 20  # characters that are encoded at once
_CODE = ("data.files", "data.rows", "data.documents", "data.cache", "text.tokenizer", "data.sources.splits")
ROLES = ("pad", "cls", "sep", "mask")
"""Special tokens that a tokenizer has which is learned here for an encoder."""

R = TypeVar("R")


# --- reading, dealing, tokenising -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRows(Read):
    """Rows of text, and how examples are made of them; ``prepare`` reads them. Subclasses say where they come from.

    Attributes:
      tokenizer: fitted to the training rows, or read (``TokenizerFile``).
      val_fraction, test_fraction: shares of the rows that are taken from train where the data has no such split; equal
        rows go to the same one.
      seed: of the dealing.
    """

    tokenizer: Any
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0

    code: ClassVar[tuple[str, ...]] = ()
    """Modules of ours, beside those that all share, of which what is kept depends."""

    least: ClassVar[Mapping[str, int]] = {}
    """Of attributes, the least that they may be."""

    def __post_init__(self) -> None:
        for name, least in self.least.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}.")

    # -- what subclasses say ---------------------------------------------------------------------------------------

    def begin(self) -> Write:
        """Reads the rows once; what then tokenises them."""
        raise NotImplementedError

    def opened(self, rows_N: Store) -> Opened:
        """The data set of rows that were read."""
        raise NotImplementedError

    def tokenizers(self) -> list[Any]:
        """All that are fitted."""
        return [self.tokenizer]

    def dealing(self) -> list[Any]:
        """What the splits depend on."""
        return [self.val_fraction, self.test_fraction, self.seed]

    def kept_for(self) -> list[Any]:
        """What else the tokens depend on."""
        return []

    def dealt(self, read: Callable[[], Iterable[tuple[str, R]]], name: Callable[[R], str], rows: str) -> Survey[R]:
        """Which row is in which split, of (split, or "" where it is to be dealt, row) of each.

        Args:
          name: of a row: those of one name are in one split.
          rows: what they are called.

        Raises:
          UserError: there are none.
        """
        split_N, name_N = [], []
        for split, row in read():
            split_N.append(split or "train")
            name_N.append(name(row))
        if not split_N:
            raise UserError(f"{self.origin()} holds no {rows}.")
        fractions = to_split_off(set(split_N) - {"train"}, self.val_fraction, self.test_fraction)
        return Survey(read, deal(split_N, name_N, fractions, self.seed), name_N)

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Any:
        """Reads and tokenises the rows, unless that is in the cache; see ``core.RawDataset``.

        Raises:
          UserError: there are none, or one that cannot be read.
        """
        parts = [type(self).__name__, self.file_signature(), self.dealing(), self.kept_for()]
        key = key_of((*_CODE, "data.sources.text.base", *self.code), self.tokenizers(), parts)
        what = f"reading {self.origin()} once, to tokenise it"
        return self.opened(kept(key, self.begin, cache, limit_bytes, say, what))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRowFiles(TextRows):
    """Rows in files. Those named after splits (``train.tsv``, ``dev.tsv``, ``test/...``) keep them.

    Attributes:
      root: a file, an archive or a folder.
      train, val, test: what the files of the split are called, where not after it (``val="validation_matched"``).
      encoding: of all but Parquet and Arrow.
      limits: of reading a file.
    """

    root: str
    train: str | None = None
    val: str | None = None
    test: str | None = None
    encoding: str = "utf-8"
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        Format(encoding=self.encoding)
        super().__post_init__()

    def listed(self) -> Sequence[File]:
        """All files that may be read."""
        return tables(self.root, self.encoding, self.limits)

    def files(self) -> tuple[dict[str, list[File]], list[str]]:
        """Files by split, all of them under "" where there are no splits; and what unused ones are called."""
        found = self.listed()
        used = by_split(found, self.root, {"train": self.train, "val": self.val, "test": self.test})
        return used, unused(found, used)

    def origin(self) -> str:
        return self.root

    def files_signature(self) -> list[Any]:
        """Names, sizes and times of the files, with their splits."""
        return [[split, *file.file_signature] for split, given in self.files()[0].items() for file in given]


class Survey(Generic[R]):
    """Which row is in which split: ``split_N``, "" where it is left out. ``read`` gives the rows anew at each call;
    ``name_N``: their names, where they were dealt by these."""

    def __init__(self, read: Callable[[], Iterable[tuple[str, R]]], split_N: Sequence[str], name_N: Sequence[str] = ()):
        self._read, self.split_N, self.name_N = read, split_N, name_N

    def rows(self) -> Iterator[tuple[str, R]]:
        """(split, row) of all that are in one."""
        for split, (_, row) in zip(self.split_N, self._read(), strict=True):
            if split:
                yield split, row

    def texts(self, of: Callable[[R], Iterable[str]], train: bool) -> Texts:
        """What gives the texts, not empty, of the rows of train, or of those of the other splits."""
        return lambda: (text for s, row in self.rows() if (s == "train") == train for text in of(row) if text)

    def fit(self, tokenizer: Any, of: Callable[[R], Iterable[str]], end: bool, roles: Sequence[str]) -> Any:
        """A tokenizer fitted to the texts of the rows of train."""
        return tokenizer.fit(self.texts(of, True), self.texts(of, False), end, roles)

    def batches(self, of: Callable[[R], Iterable[str]]) -> Iterator[list[tuple[str, R]]]:
        """The rows, about so many at once as are best encoded together."""
        return batches(self.rows(), lambda item: sum(map(len, of(item[1]))))


def batches(items: Iterable[R], size: Callable[[R], int]) -> Iterator[list[R]]:
    """Lists of so many items as have about ``_BATCH`` characters."""
    waiting: list[R] = []
    total = 0
    for item in items:
        waiting.append(item)
        total += size(item) + 1
        if total >= _BATCH:
            yield waiting
            waiting, total = [], 0
    if waiting:
        yield waiting


def splits_of(
    store: Store,
    example: Callable[[int], Example],
    rows: Mapping[str, np.ndarray] | None = None,
    labels: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    sequences: Sequence[str] = (),
) -> dict[str, Source]:
    """The splits of a store of which each row is an example.

    Args:
      example: of a row.
      rows: of each split; None: all that it has.
      labels, lengths: [N], of all rows.
    """

    def source(split: str, indices: np.ndarray) -> Source:
        label_n, length_n = (None if of_N is None else of_N[indices] for of_N in (labels, lengths))
        found = functools.partial(of_row, indices)
        return Split(split, len(indices), found, store.kept, label_n, length_n, sequences)

    def of_row(indices: np.ndarray, index: int) -> Example:
        return example(int(indices[index]))

    return {split: source(split, indices) for split, indices in (rows or split_indices(store)).items()}


def key_of(modules: Iterable[str], tokenizers: Iterable[Any], parts: Sequence[Any]) -> str:
    """The name of a cache of tokens: of the code (modules of ours), the tokenizers, and what else it depends on."""
    given = [(repr(t), t.file_signature() if isinstance(t, TokenizerFile) else None) for t in tokenizers]
    return digest([*map(source_digest, modules), *given, *parts])


# --- what a user gives ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TextCodec(Codec):
    """A user's file, its bytes, or a row, as a function reads them.

    Attributes:
      fields: see ``core.Fields``.
      read: ``(given, dataset_info, limits)`` -> an example, or several.
      dataset_info: what a run has kept of its data; the encoding is that of ``fields``.
      limits: of reading a file.
      padded: see ``core.Codec``.
    """

    fields: Fields
    read: Callable[..., Example | list[Example]]
    dataset_info: Mapping[str, Any]
    limits: Limits = LIMITS
    padded: tuple[str, ...] = ()

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """
        Raises:
          UserError: unreadable, empty, or with nothing in it that the model could read.
        """
        found = self.read(given, {**self.dataset_info, "encoding": self.fields.encoding}, self.limits)
        return found if isinstance(found, list) else [found]


def given_text(
    given: bytes | str | Mapping[str, Any],
    dataset_info: Mapping[str, Any],
    entry: str = "text",
    limits: Limits = LIMITS,
) -> str:
    """All the text of a file or of its bytes, in the encoding that ``dataset_info`` may have, or an entry of a row.

    Raises:
      UserError: unreadable, no text, or an empty one.
    """
    encoding = dataset_info.get("encoding", "utf-8")
    if isinstance(given, Mapping):
        text = checked(as_text(given.get(entry), repr(entry)), repr(entry))
    elif isinstance(given, bytes):
        text = text_of_bytes(given, encoding, limits)
    else:
        text = whole_text(plain_file(given, limits), encoding)
    if not text.strip():
        raise UserError(f"{given if isinstance(given, str) else f'the {entry}'} is empty.")
    return text


def text_of_bytes(given: bytes, encoding: str, limits: Limits = LIMITS) -> str:
    """
    Raises:
      UserError: not in this encoding, or too long.
    """
    try:
        text = io.TextIOWrapper(io.BytesIO(given), "utf-8-sig" if encoding == "utf-8" else encoding, newline="").read()
    except UnicodeDecodeError as error:
        raise UserError(f"the text is not valid {encoding} ({error.reason}).") from error
    if len(text) > limits.most_text:
        raise too_long("the text", limits)
    return text


@contextlib.contextmanager
def named(given: Any) -> Iterator[None]:
    """Around the reading of a file: mistakes begin with its path."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{given}: {error}") if isinstance(given, str) else error from error


def plain_file(path: str, limits: Limits = LIMITS) -> File:
    """A file that is read as text, whatever it is called."""
    file = readable(one_file(path, limits))
    name = file.name.lower()
    return file._replace(name="text" + next((suffix for suffix in (".gz", ".zst") if name.endswith(suffix)), ".txt"))


def narrow(tokens_T: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Tokens in the smallest type that holds the vocabulary."""
    return tokens_T.astype(np.min_scalar_type(tokenizer.size - 1))


def split_indices(rows_N: Store, splits: Sequence[str] = SPLITS) -> dict[str, np.ndarray]:
    """i64, the rows of each split that has some; ``split`` of a row is a place in ``splits``."""
    split_N = rows_N.values("split")
    found = {split: np.flatnonzero(split_N == i) for i, split in enumerate(splits)}
    return {split: indices for split, indices in found.items() if indices.size}


def tokenizer_of(rows_N: Store) -> Any:
    """That of the rows."""
    return load(rows_N.about["tokenizer"])
