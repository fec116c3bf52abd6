"""Documents as tokens, memory-mapped: any window of them is reached at once, however many there are.

A token cache is one of the folders of ``cache``: ``tokens.bin`` (all documents' tokens, one after another, in the
smallest unsigned type), ``counts.bin`` (how many bytes of text each stands for, where the tokenizer does not know by
itself), ``documents.npy`` (where each document ends, and its split) and ``index.json`` (lengths, tokenizer, totals).
Where it cannot be written or exceeds the limit, the tokens are held in memory.

Axes: T tokens of all documents, D documents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO

import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.data import cache as caches
from bigbase_jax.text.tokenizer import Tokenizer, load

SPLITS = ("train", "val", "test")
_BATCH = 1 << 20  # characters that are encoded at once


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


def make(
    documents: Iterable[tuple[str, Iterable[str]]],
    tokenizer: Tokenizer,
    cache: tuple[pathlib.Path, str] | None,
    limit_bytes: float,
    say: Callable[[str], None],
) -> Tokens | None:
    """Tokens of (split, blocks of text) documents, in the cache (root, key), or in memory where that is None.

    Returns:
      None: the cache cannot hold them, as ``say`` was told; try without.

    Raises:
      UserError: a text cannot be written with the tokenizer.
    """
    try:
        writer = _Writer(tokenizer, cache, limit_bytes)
        try:
            for split, blocks in documents:
                writer.add(split, blocks)
            return writer.finish()
        finally:
            writer.abort()
    except caches.NotCacheable as error:
        say(f"data: the tokens are not kept: {error}.")
    except OSError as error:
        if cache is None:
            raise
        say(f"warning: the cache folder {cache[0]} cannot be written ({error.strerror or error}); tokens are not kept.")
    return None


class _Writer:
    """Collects documents, in files or in memory."""

    def __init__(self, tokenizer: Tokenizer, cache: tuple[pathlib.Path, str] | None, limit_bytes: float):
        self._tokenizer, self._limit = tokenizer, limit_bytes if cache else float("inf")
        self._dtype = np.min_scalar_type(tokenizer.size - 1)
        self._folder = caches.Unfinished(*cache) if cache else None
        self._parts: dict[str, list[np.ndarray]] = {"tokens": [], "counts": []}
        self._files: dict[str, BinaryIO] = {}
        if self._folder is not None:
            for name in self._parts if tokenizer.token_bytes is None else ("tokens",):
                self._files[name] = open(self._folder.path / f"{name}.bin", "wb", buffering=1 << 20)  # noqa: SIM115
        self._length = 0
        self._stops: list[int] = []
        self._split: list[int] = []
        self._totals = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
        self._waiting: list[tuple[str, bool]] = []  # blocks to encode, and whether each ends its document
        self._size = self._owed = 0
        if tokenizer.end is not None:
            self._put(np.array([tokenizer.end]), np.array([0]))

    def add(self, split: str, blocks: Iterable[str]) -> None:
        """Appends a document."""
        self._split.append(SPLITS.index(split))
        last = ""
        for block in blocks:
            if last:
                self._wait(last, False)
            last = block
        self._wait(last, True)

    def _wait(self, block: str, ends: bool) -> None:
        self._waiting.append((block, ends))
        self._size += len(block)
        if self._size >= _BATCH or len(self._waiting) >= _BATCH:
            self._encode()

    def _encode(self) -> None:
        """Encodes what waits, many texts at once."""
        found = self._tokenizer.encode_batch([block for block, _ in self._waiting])
        for (block, ends), (tokens_T, counts_T) in zip(self._waiting, found, strict=True):
            totals = self._totals[SPLITS[self._split[len(self._stops)]]]
            totals["tokens"] += len(tokens_T)
            nbytes = len(block.encode())
            totals["bytes"] += nbytes
            # Text without any token (spaces, for some tokenizers) is owed to the next token, or to the document's end.
            self._owed += nbytes - int(counts_T.sum())
            if self._owed and len(tokens_T):
                counts_T = counts_T.copy()
                counts_T[0] += self._owed
                self._owed = 0
            self._put(tokens_T, counts_T)
            if ends:
                totals["documents"] += 1
                self._stops.append(self._length)
                if self._tokenizer.end is not None:
                    self._put(np.array([self._tokenizer.end]), np.array([self._owed]))
                self._owed = 0
        self._waiting, self._size = [], 0

    def _put(self, tokens_T: np.ndarray, counts_T: np.ndarray) -> None:
        self._length += len(tokens_T)
        arrays = {"tokens": tokens_T.astype(self._dtype)}
        if self._tokenizer.token_bytes is None:
            arrays["counts"] = counts_T.astype(np.uint32)
        size = self._length * sum(array.itemsize for array in arrays.values())
        if size > self._limit:
            raise caches.NotCacheable(f"they take more than {self._limit / 1e9:g} GB, the limit data.cache_limit_gb")
        for name, array in arrays.items():
            if self._files:
                self._files[name].write(array.tobytes())
            else:
                self._parts[name].append(array)

    def finish(self) -> Tokens:
        """All documents' tokens, from the cache's final folder or from memory."""
        self._encode()
        about = {split: totals for split, totals in self._totals.items() if totals["documents"]}
        stops, split = np.array([self._stops, self._split], np.int64)
        if self._folder is None:
            tokens, counts = (np.concatenate(p) if p else None for p in self._parts.values())
            assert tokens is not None
            kept = "none, the tokens are in memory"
            return Tokens(tokens, counts, stops, split, self._tokenizer, about, kept)
        index = {"dtype": self._dtype.str, "length": self._length, "counts": len(self._files) > 1, "about": about}
        index["tokenizer"] = self._tokenizer.state()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        np.save(self._folder.path / "documents.npy", np.stack([stops, split]))
        (self._folder.path / "index.json").write_text(json.dumps(index))
        found = self._folder.commit(_open)
        self._folder = None
        return found

    def abort(self) -> None:
        """Removes what was written, unless ``finish`` is through."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        if self._folder is not None:
            self._folder.abort()


def find(root: pathlib.Path, key: str) -> Tokens | None:
    """The cache of this key below ``root``, marked as used now, if there is a whole one."""
    found = _open(root / f"cache-{key}")
    if found is not None:
        with contextlib.suppress(OSError):
            os.utime(root / f"cache-{key}")
    return found


def _open(path: pathlib.Path) -> Tokens | None:
    try:
        index = json.loads((path / "index.json").read_text())
        stops, split = np.load(path / "documents.npy")
        tokens = _map(path / "tokens.bin", caches.plain_dtype(index["dtype"]), index["length"])
        counts = _map(path / "counts.bin", np.dtype("<u4"), index["length"]) if index["counts"] else None
        size = (tokens.nbytes + (0 if counts is None else counts.nbytes)) / 1e6
        about = index["about"]
        return Tokens(tokens, counts, stops, split, load(index["tokenizer"]), about, f"{size:,.1f} MB in {path.parent}")
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def _map(path: pathlib.Path, dtype: np.dtype, length: int) -> np.ndarray:
    """Maps a file whose size must be right; raises ValueError if it is not."""
    if path.stat().st_size != length * dtype.itemsize:
        raise ValueError(f"{path} is damaged")
    return np.memmap(path, dtype, "r", shape=(length,)) if length else np.zeros(0, dtype)


def of_text(text: str, tokenizer: Tokenizer) -> Tokens:
    """The tokens of one text, in memory, as if it were a document of a data set (of its train split)."""
    made = make([("train", [text])], tokenizer, None, float("inf"), lambda line: None)
    assert made is not None
    return made
