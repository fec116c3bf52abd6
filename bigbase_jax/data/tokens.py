"""Documents as tokens, memory-mapped: any window of them is reached at once, however many there are.

They are kept in a ``Store``, a row for each document: ``tokens`` in the smallest unsigned type, ``counts``, the bytes
of text that each stands for, where the tokenizer does not know by itself, and the ``split``.

Axes: T tokens of all documents, D documents.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from bigbase_jax.data import cache as caches
from bigbase_jax.data.cache import Store, Writer
from bigbase_jax.data.sources.text.base import SPLITS, batches
from bigbase_jax.text.tokenizer import Tokenizer, load


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of documents.

    Where the tokenizer has an end, one is before the first document and one after each.

    Attributes:
      tokens: unsigned [T].
      counts: u32[T], bytes of text that each token stands for; None: as the tokenizer says.
      stops: i64[D], where each document's own tokens stop (its end token not counted).
      split: i64[D], places in ``SPLITS``.
      tokenizer: of these tokens.
      about: of each split that has documents: how many ``documents``, ``tokens`` and ``bytes`` of text.
      kept: where the tokens are, for people.
    """

    tokens: np.ndarray
    counts: np.ndarray | None
    stops: np.ndarray
    split: np.ndarray
    tokenizer: Tokenizer
    about: Mapping[str, Mapping[str, int]]
    kept: str

    def spans(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """(first, last) i64 of each document of a split that has something to predict.

        ``tokens[first:last]`` are inputs, and ``tokens[first + 1 : last + 1]`` their targets: with an end token, from
        the one before the document to the one after it; otherwise the document's tokens alone.
        """
        first = np.concatenate([[0], self.stops[:-1]])
        last = self.stops if self.tokenizer.end is not None else self.stops - 1
        chosen = (self.split == SPLITS.index(split)) & (last > first)
        return first[chosen], last[chosen]

    def bytes_of(self, start: int, stop: int) -> np.ndarray:
        """i32: bytes of text that ``tokens[start:stop]`` stand for, each."""
        if self.counts is not None:
            return self.counts[start:stop].astype(np.int32)
        table_V = self.tokenizer.token_bytes
        assert table_V is not None
        return table_V[self.tokens[start:stop]]


Documents = Callable[[], Iterable[tuple[str, Iterable[str]]]]
"""Gives (split, blocks of text) of each document, from the start at each call."""


def of_rows(rows: Store) -> Tokens:
    """The tokens that ``write`` added."""
    tokenizer = load(rows.about["tokenizer"])
    counts = rows.values("counts") if tokenizer.token_bytes is None else None
    stops, split = rows.stops("tokens") - (tokenizer.end is not None), rows.values("split").astype(np.int64)
    return Tokens(rows.values("tokens"), counts, stops, split, tokenizer, rows.about["splits"], rows.kept)


def write(documents: Documents, tokenizer: Tokenizer, writer: Writer) -> dict[str, Any]:
    """Adds a row for each document: its tokens, and the end token where there is one; the first has one before it too.

    Raises:
      UserError: a text cannot be written with the tokenizer.
    """
    totals = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    end = np.array([] if tokenizer.end is None else [tokenizer.end], np.int32)
    before, owed = end, 0
    for waiting in batches(_blocks(documents()), lambda item: len(item[1])):
        encoded = tokenizer.encode_batch([block for _, block, _ in waiting])
        for (split, block, ends), (tokens_T, counts_T) in zip(waiting, encoded, strict=True):
            nbytes = len(block.encode())
            for name, more in (("documents", ends), ("tokens", len(tokens_T)), ("bytes", nbytes)):
                totals[split][name] += more
            # Text without any token (spaces, for some tokenizers) is owed to the next token, or to the document's end.
            owed += nbytes - int(counts_T.sum())
            if owed and len(tokens_T):
                counts_T = counts_T.copy()
                counts_T[0] += owed
                owed = 0
            after = end if ends else end[:0]
            row = {"tokens": np.concatenate([before, tokens_T, after]).astype(np.min_scalar_type(tokenizer.size - 1))}
            if tokenizer.token_bytes is None:
                row["counts"] = np.concatenate([0 * before, counts_T, np.full(len(after), owed)]).astype(np.uint32)
            row["split"] = np.full(int(ends), SPLITS.index(split), np.uint8)
            (writer.add if ends else writer.extend)(row)
            before, owed = end[:0], 0 if ends else owed
    splits = {split: counts for split, counts in totals.items() if counts["documents"]}
    return {"tokenizer": tokenizer.state(), "splits": splits}


def _blocks(documents: Iterable[tuple[str, Iterable[str]]]) -> Iterator[tuple[str, str, bool]]:
    """(split, block, whether it ends its document) of each block, and of an empty one where a document has none."""
    for split, blocks in documents:
        last = ""
        for block in blocks:
            if last:
                yield split, last, False
            last = block
        yield split, last, True


def of_text(text: str, tokenizer: Tokenizer) -> Tokens:
    """The tokens of one text, in memory, as if it were a document of a data set (of its train split)."""
    adding = functools.partial(write, lambda: [("train", [text])], tokenizer)
    return of_rows(caches.keep(adding, None, float("inf"), lambda line: None))
