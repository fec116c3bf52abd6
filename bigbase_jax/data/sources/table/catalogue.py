"""Tables of what is known of items or of users, one to a row: titles, and all columns as words.

A category, or several between ``|``, is a word of its column, such as ``genre=drama``; a number is that of the tenth of
the table in which it lies; of a text, each word is one. Words are hashed into buckets (Weinberger et al. 2009), so that
what comes later needs no vocabulary, and a model that reads them knows something of an item that nobody has chosen yet.
Vectors of texts may come from a trained encoder besides (``--mode=embed --output=FILE.npy``).

Legend: N rows of the table, I names, T words, F width of the vectors.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bigbase_jax.core import Batch, UserError
from bigbase_jax.data.columns import Column, read_columns, table_files
from bigbase_jax.runtime.untrusted import open_regular

_TITLES = ("title", "name", "headline")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of I + 1 things, of which the first is none.

    Attributes:
      words: i32[I + 1, T], from 1 on, 0 behind them.
      buckets: the largest word.
      features: f32[I + 1, F]; None: there are no vectors.
      titles: [I] of the others; "" where there is none; empty: there are none at all.
    """

    words: np.ndarray
    buckets: int
    features: np.ndarray | None = None
    titles: tuple[str, ...] = ()

    def batch(self, side: str, rows: np.ndarray) -> Batch:
        """``SIDE_words`` and ``SIDE_features`` of rows i64[n]."""
        found = {f"{side}_words": self.words[rows]}
        return found if self.features is None else {**found, f"{side}_features": self.features[rows]}


@dataclasses.dataclass(frozen=True)
class Attributes:
    """A table of items or of users.

    Attributes:
      root: the file: csv, tsv, Parquet, ...
      id: the column with the names that the log has; None: the first.
      title: the column that is shown to people; None: one that is called title, name or headline, where there is one.
      columns: what else is read, and of what kind (``columns.KINDS``); empty: all columns, of the kinds that they seem.
      vectors: a file .npy f32[N,F] with a vector for each row, in their order.
      words: T: of more, the first.
      buckets: that words are hashed into.

    Raises:
      UserError: a value out of its range.
    """

    root: str
    id: str | None = None
    title: str | None = None
    columns: tuple[str, ...] = ()
    vectors: str | None = None
    words: int = 24
    buckets: int = 16384

    def __post_init__(self) -> None:
        if self.words < 1 or self.buckets < 1:
            raise UserError(f"words is {self.words} and buckets {self.buckets}; both must be at least 1.")

    def file_signature(self) -> list[Any]:
        """What changes when the table does."""
        signatures = [file.file_signature for file in table_files(self.root)]
        return [signatures, table_files(self.vectors)[0].file_signature if self.vectors else None]

    def read(self, names: Sequence[str], grows: bool = False) -> tuple[list[str], Known]:
        """What the table says of these names; where ``grows``, also of those of its own, which come behind them.

        Returns:
          the names [I], and what is known of each.

        Raises:
          UserError: a file that cannot be read, no such column, or not one vector for each row.
        """
        table = read_columns(table_files(self.root), say=lambda line: None)
        key = table[self.id] if self.id else next(iter(table.values()))
        ids = [*_texts(key)]
        found = [*names]
        place = {name: 1 + i for i, name in enumerate(found)}
        if grows:
            for name in dict.fromkeys(ids):
                if name and name not in place:
                    found.append(name)
                    place[name] = len(found)
        row = np.zeros(len(found) + 1, np.int64) - 1
        for i, name in enumerate(ids):
            row[place.get(name, 0)] = i
        row[0] = -1
        known = row >= 0
        if not known[: len(names) + 1].any():
            raise UserError(f"{self.root}: its column {key.name!r} has none of the log's names, such as {found[0]!r}.")
        chosen = [table[name] for name in self.columns or table if name != key.name]
        words = np.zeros((len(found) + 1, self.words), np.int32)
        of_columns = [_words(column, self.buckets) for column in chosen]
        for place_i in np.flatnonzero(known).tolist():
            own = [word for of_row in of_columns for word in of_row(row[place_i])][: self.words]
            words[place_i, : len(own)] = own
        titled = self.title or next((name for name in table if name.lower() in _TITLES), None)
        titles: tuple[str, ...] = ()
        if titled is not None:
            texts = [*_texts(table[titled])]
            titles = tuple(texts[r] if r >= 0 else "" for r in row[1:])
        return found, Known(words, self.buckets, self._features(row, len(ids)), titles)

    def _features(self, row: np.ndarray, count: int) -> np.ndarray | None:
        if self.vectors is None:
            return None
        try:
            with open_regular(self.vectors) as file:
                vectors = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.vectors} is no file of vectors ({error}).") from error
        if vectors.ndim != 2 or len(vectors) != count or not np.issubdtype(vectors.dtype, np.floating):
            raise UserError(
                f"{self.vectors} holds {vectors.dtype}{list(vectors.shape)}; {self.root} has {count} rows, and needs a"
                f" vector for each: --mode=embed --input={self.root} --output={self.vectors}."
            )
        known = np.where(row[:, None] >= 0, vectors[np.maximum(row, 0)], 0.0)
        return np.where(np.isfinite(known), known, 0.0).astype(np.float32)


def known_of(texts: Sequence[str], words: int = 8, buckets: int = 1024) -> Known:
    """Of things of which a text each is known."""
    found = np.zeros((len(texts) + 1, words), np.int32)
    for i, text in enumerate(texts, 1):
        own = [_hash(word, buckets) for word in _WORD.findall(text.lower())][:words]
        found[i, : len(own)] = own
    return Known(found, buckets)


def _texts(column: Column) -> Iterable[str]:
    """A column's values as the names of a log are written; "" where one is missing."""
    if column.kind == "category":
        return (column.names[code] if code >= 0 else "" for code in column.values.tolist())
    if column.kind == "number":
        return ("" if x != x else str(int(x)) if x == int(x) else str(x) for x in column.values.tolist())
    return map(str, column.values)


def _words(column: Column, buckets: int) -> Callable[[int], list[int]]:
    """What gives the hashed words of a row."""
    if column.kind == "text":
        return lambda row: [_hash(word, buckets) for word in _WORD.findall(column.values[int(row)].lower())]
    if column.kind == "category":
        of_code = [
            [_hash(f"{column.name}={part.strip().lower()}", buckets) for part in name.split("|") if part.strip()]
            for name in column.names
        ]
        return lambda row: of_code[column.values[row]] if column.values[row] >= 0 else []
    value = column.values.astype(np.float64)
    tenths = np.quantile(value[np.isfinite(value)], np.arange(1, 10) / 10) if np.isfinite(value).any() else np.zeros(9)
    missing = np.isnan(value) if column.kind == "number" else np.isnat(column.values)

    def of(row: int) -> list[int]:
        return [] if missing[row] else [_hash(f"{column.name}~{np.searchsorted(tenths, value[row])}", buckets)]

    return of


def _hash(word: str, buckets: int) -> int:
    return 1 + zlib.crc32(word.encode()) % buckets
