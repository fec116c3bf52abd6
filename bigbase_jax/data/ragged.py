"""Rows of arrays of differing lengths, kept on disk and memory-mapped: any row is reached at once.

One of the folders of ``cache``: ``NAME.bin`` (the rows of one array, one after another), ``NAME.npy`` (where each row
ends) and ``index.json``. Where it cannot be written or exceeds the limit, the rows are held in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.data import cache as caches

Add = Callable[..., None]
"""Appends a row: an array or a number for each name. With ``ends=False`` it is a part of a row, of any of the names."""


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of arrays by name.

    Attributes:
      values: of each name, all rows' elements.
      stops: of each name, i64[N], where each row ends.
      about: what was found out on the way, JSON-able.
      kept: where the rows are, for people.
    """

    values: Mapping[str, np.ndarray]
    stops: Mapping[str, np.ndarray]
    about: Mapping[str, Any]
    kept: str

    def __len__(self) -> int:
        return len(next(iter(self.stops.values())))

    def get(self, name: str, index: int) -> np.ndarray:
        """One row of one array."""
        stops = self.stops[name]
        return self.values[name][(stops[index - 1] if index else 0) : stops[index]]

    def lengths(self, name: str) -> np.ndarray:
        """i64[N], elements of each row."""
        return np.diff(self.stops[name], prepend=0)


def kept(
    key: str,
    begin: Callable[[], tuple[Mapping[str, Any], Callable[[Add], Mapping[str, Any]]]],
    root: pathlib.Path,
    limit_bytes: float,
    say: Callable[[str], None],
    what: str = "reading the data once",
) -> Ragged:
    """The rows under a key below ``root``; where they are not there, they are made, and older caches make room.

    Args:
      begin: gives ``dtypes`` and ``write`` of ``make``.
      limit_bytes: what all caches may take; 0: keep nothing.
      say: takes lines about progress.
      what: is done where they are made, in words.
    """
    where = (root, key) if limit_bytes > 0 else None
    found = find(*where) if where else None
    if found is None:
        say(f"data: {what}")
        dtypes, write = begin()
        found = make(write, dtypes, where, limit_bytes, say)
        if where is not None:
            caches.prune(root, limit_bytes, [root / f"cache-{key}"])
    return found


def make(
    write: Callable[[Add], Mapping[str, Any]],
    dtypes: Mapping[str, Any],
    cache: tuple[pathlib.Path, str] | None,
    limit_bytes: float,
    say: Callable[[str], None],
) -> Ragged:
    """The rows that ``write`` adds, in the cache (root, key), or in memory where that is None or cannot hold them.

    Args:
      write: adds the rows, from the start at each call, and returns ``about``.
      dtypes: of the arrays, by name.
    """
    if cache is not None:
        try:
            return _make(write, dtypes, cache, limit_bytes)
        except caches.NotCacheable as error:
            say(f"data: the tokens are not kept: {error}.")
        except OSError as error:
            why = error.strerror or error
            say(f"warning: the cache folder {cache[0]} cannot be written ({why}); tokens are not kept.")
    return _make(write, dtypes, None, float("inf"))


def _make(
    write: Callable[[Add], Mapping[str, Any]],
    dtypes: Mapping[str, Any],
    cache: tuple[pathlib.Path, str] | None,
    limit_bytes: float,
) -> Ragged:
    folder = caches.Unfinished(*cache) if cache else None
    files: dict[str, BinaryIO] = {}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in dtypes}
    stops: dict[str, list[int]] = {name: [] for name in dtypes}
    at = dict.fromkeys(dtypes, 0)
    size = 0

    def add(ends: bool = True, **row: Any) -> None:
        nonlocal size
        for name, value in row.items():
            array = np.atleast_1d(np.asarray(value)).astype(dtypes[name])
            at[name] += len(array)
            size += array.nbytes
            if folder is None:
                parts[name].append(array)
            else:
                files[name].write(array.tobytes())
        if ends:
            for name in dtypes:
                stops[name].append(at[name])
        if size > limit_bytes:
            raise caches.NotCacheable(f"they take more than {limit_bytes / 1e9:g} GB, the limit data.cache_limit_gb")

    try:
        if folder is not None:
            for name in dtypes:
                files[name] = open(folder.path / f"{name}.bin", "wb", buffering=1 << 20)  # noqa: SIM115
        about = dict(write(add))
        ends = {name: np.array(stops[name], np.int64) for name in dtypes}
        if folder is None:
            empty = [np.zeros(0, np.int64)]
            values = {name: np.concatenate(parts[name] or empty).astype(dtypes[name]) for name in dtypes}
            return Ragged(values, ends, about, "none, the tokens are in memory")
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for name in dtypes:
            np.save(folder.path / f"{name}.npy", ends[name])
        given = {name: np.dtype(dtype).str for name, dtype in dtypes.items()}
        (folder.path / "index.json").write_text(json.dumps({"dtypes": given, "about": about}))
        found = folder.commit(_open)
        folder = None
        return found
    finally:
        for file in files.values():
            with contextlib.suppress(OSError):
                file.close()
        if folder is not None:
            folder.abort()


def find(root: pathlib.Path, key: str) -> Ragged | None:
    """The cache of this key below ``root``, marked as used now, if there is a whole one."""
    found = _open(root / f"cache-{key}")
    if found is not None:
        with contextlib.suppress(OSError):
            os.utime(root / f"cache-{key}")
    return found


def _open(path: pathlib.Path) -> Ragged | None:
    try:
        index = json.loads((path / "index.json").read_text())
        values, stops = {}, {}
        for name, given in index["dtypes"].items():
            dtype = caches.plain_dtype(given)
            stops[name] = np.load(path / f"{name}.npy")
            length = int(stops[name][-1]) if len(stops[name]) else 0
            if (path / f"{name}.bin").stat().st_size != length * dtype.itemsize:
                raise ValueError(f"{path} is damaged")
            empty = np.zeros(0, dtype)
            values[name] = np.memmap(path / f"{name}.bin", dtype, "r", shape=(length,)) if length else empty
        size = sum(array.nbytes for array in values.values()) / 1e6
        return Ragged(values, stops, index["about"], f"{size:,.1f} MB in {path.parent}")
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
