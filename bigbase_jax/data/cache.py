"""One store for what is decoded or tokenised once: arrays by name, on disk and memory-mapped, row by row or by columns.

A store is a folder with, for entry k, ``k.bin`` (its rows, one after another), ``k.npy`` (their shapes, where these
differ from row to row) and ``index.json`` (names, dtypes, common shapes, what else the writer noted). It is written
under a temporary name and renamed when everything is on disk, so a folder with a final name is whole. Of the processes
that share the folder, one builds a store, and the others wait for it (``one_builder``); where they cannot, all write,
and whoever comes second takes the first's. Its name is a digest of everything that its contents depend on, so a changed
file or transform means another name. Where it is not to be kept, or cannot be, the same store is in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import math
import mmap
import os
import pathlib
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from bigbase_jax.core import Batch, Example, Source, Transform

FORMAT = 3
_ABANDONED = 3600.0  # seconds without a write after which a temporary folder belongs to a process that died
_ATTEMPTS = 20  # to rename a finished cache, where others replace a damaged one at the same time
_FORGOTTEN = 90 * 86400.0  # seconds without use after which a store without rows is deleted, or a lock
_BEAT = 1.0  # seconds between a builder's signs of life
_STALLED = 60.0  # seconds without one after which nobody waits for it any more
_DONE = b"done"

Bad = list[tuple[int, str]]
"""Unreadable examples of a split: (index in the dataset's source, why)."""


class NotCacheable(Exception):
    """The examples cannot be kept in this format (objects, texts of differing lengths, keys that come and go)."""


class _Column(NamedTuple):
    """All rows of one entry: ``values`` [N, *shape], or, where shapes differ, flat, with N shapes and N + 1 bounds."""

    values: np.ndarray
    shapes: np.ndarray | None = None
    bounds: np.ndarray | None = None


class Store:
    """Rows of arrays by name, read-only; safe for many threads.

    Attributes:
      about: what its writer noted, JSON-able.
      directory: its folder; None: it is in memory.
      nbytes: size of the data in bytes.
    """

    def __init__(
        self,
        values: Mapping[str, np.ndarray],
        shapes: Mapping[str, np.ndarray],
        length: int,
        about: Mapping[str, Any],
        directory: pathlib.Path | None = None,
    ):
        """``values`` is flat; ``shapes`` are i64[N, rank] where they differ, i64[1, rank] where all rows have one.

        Raises:
          ValueError: it is damaged: there are more or fewer values than the shapes say.
        """
        self.about, self.directory, self._length = about, directory, length
        self.nbytes = sum(array.nbytes for array in values.values())
        self._columns: dict[str, _Column] = {}
        for name, array in values.items():
            counts = shapes[name].prod(1)
            bounds = np.concatenate([[0], counts.cumsum()]) if len(counts) != 1 else np.array([0, counts[0] * length])
            if shapes[name].min(initial=0) < 0 or bounds[-1] != len(array):
                raise ValueError(f"{directory} is damaged")
            if len(counts) == 1:
                self._columns[name] = _Column(array.reshape(length, *shapes[name][0]))
            else:
                self._columns[name] = _Column(array, shapes[name], bounds)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        return {name: self.get(name, index) for name in self._columns}

    def get(self, name: str, index: int) -> np.ndarray:
        """One row of one entry."""
        values, shapes, bounds = self._columns[name]
        if shapes is None or bounds is None:
            return values[index, ...]
        return values[bounds[index] : bounds[index + 1]].reshape(shapes[index])

    @property
    def batch(self) -> Callable[[np.ndarray], Batch] | None:
        """Several rows at once, ``Source.batch``; None: their shapes differ."""
        return None if any(column.shapes is not None for column in self._columns.values()) else self._batch

    def _batch(self, indices: np.ndarray) -> Batch:
        return {name: column.values[indices] for name, column in self._columns.items()}

    def values(self, name: str) -> np.ndarray:
        """All rows' elements, one after another."""
        return self._columns[name].values.reshape(-1)

    def stops(self, name: str) -> np.ndarray:
        """i64[N]: where in ``values`` each row ends."""
        values, _, bounds = self._columns[name]
        return np.arange(1, self._length + 1) * values[:1].size if bounds is None else bounds[1:]

    def lengths(self, name: str) -> np.ndarray:
        """i64[N]: elements of each row."""
        return np.diff(self.stops(name), prepend=0)

    @property
    def kept(self) -> str:
        """Where it is, for people."""
        where = self.directory and self.directory.parent
        return f"{self.nbytes / 1e6:,.1f} MB in {where}" if where else "none, it is all in memory"


def plain_dtype(name: str) -> np.dtype:
    """A dtype that a file names; raises ValueError for one of Python objects, whose addresses a file must not say."""
    if (dtype := np.dtype(name)).hasobject:
        raise ValueError(f"{name!r} holds Python objects")
    return dtype


class Writer:
    """Writes a store row by row; ``commit`` makes it visible, ``abort`` leaves nothing behind.

    Any method may raise OSError (disk full, folder not writable); ``abort`` is then the caller's answer.
    """

    def __init__(self, root: pathlib.Path | None, key: str = "", limit_bytes: float = float("inf")):
        """Begins the store ``key`` below ``root``, or, where that is None, one in memory."""
        self._folder: pathlib.Path | None = None  # under a temporary name
        if root is not None:
            root.mkdir(parents=True, exist_ok=True)
            self._final = root / f"cache-{key}"
            self._folder = pathlib.Path(tempfile.mkdtemp(prefix="tmp-", dir=root))
        self._limit = limit_bytes
        self._dtypes: dict[str, np.dtype] = {}
        self._files: dict[str, BinaryIO] = {}  # of a store on disk
        self._parts: dict[str, list[np.ndarray]] = {}  # of one in memory
        self._shapes: dict[str, list[tuple[int, ...]]] = {}
        self._begun: dict[str, int] = {}  # elements of the row that is not whole yet
        self._size = 0

    def add(self, example: Example) -> None:
        """Appends a row, or the last part of one that ``extend`` has begun.

        Raises:
          NotCacheable: it has no fixed binary form, or other entries, dtypes or ranks than the first one, or all takes
            more than the limit.
        """
        arrays = self._arrays(example)
        ranks = {name: array.ndim for name, array in arrays.items()}
        if any(shapes and len(shapes[0]) != ranks[name] for name, shapes in self._shapes.items()):
            raise NotCacheable("their entries, dtypes or ranks differ")
        for name, array in arrays.items():
            self._write(name, array)
            begun = self._begun.pop(name, 0)
            self._shapes[name].append((begun + len(array),) if begun else array.shape)

    def extend(self, example: Example) -> None:
        """Begins or continues a row whose entries are [T]: what ``add`` gives goes behind it. Raises as ``add``."""
        for name, array in self._arrays(example).items():
            self._write(name, array)
            self._begun[name] = self._begun.get(name, 0) + len(array)

    def reserve(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Callable[[int, np.ndarray], None]:
        """Begins an entry of a store that has one row, whose elements come in any order: what is returned writes some,
        from a place among all of them on. All entries of such a store are reserved, and none is added.

        Raises:
          NotCacheable: all takes more than the limit.
        """
        dtype, count = np.dtype(dtype), math.prod(shape)
        self._count(count * dtype.itemsize)
        self._dtypes[name], self._shapes[name] = dtype, [shape]
        if self._folder is None:
            array = np.zeros(count, dtype)
            self._parts[name] = [array]

            def fill(start: int, values: np.ndarray) -> None:
                array[start : start + values.size] = values.ravel()

            return fill
        file = open(f"{self._folder}/{len(self._dtypes) - 1}.bin", "wb", buffering=0)  # noqa: SIM115
        file.truncate(count * dtype.itemsize)
        self._files[name] = file

        def write(start: int, values: np.ndarray) -> None:
            left: Any = np.ascontiguousarray(values, dtype).reshape(-1).view(np.uint8).data
            place = start * dtype.itemsize
            while left:
                done = os.pwrite(file.fileno(), left, place)
                left, place = left[done:], place + done

        return write

    def _count(self, nbytes: int) -> None:
        self._size += nbytes
        if self._size > self._limit:
            raise NotCacheable(f"they take more than {self._limit / 1e9:g} GB, the limit data.cache_limit_gb")

    def _arrays(self, example: Example) -> dict[str, np.ndarray]:
        arrays = {name: as_array(value) for name, value in example.items()}
        dtypes = {name: array.dtype for name, array in arrays.items()}
        if any(d.hasobject for d in dtypes.values()):
            raise NotCacheable("they hold Python objects")
        if not self._dtypes:
            self._dtypes = dtypes
            self._shapes, self._parts = {name: [] for name in dtypes}, {name: [] for name in dtypes}
            for k, name in enumerate(dtypes if self._folder else ()):
                self._files[name] = open(f"{self._folder}/{k}.bin", "wb", buffering=1 << 20)  # noqa: SIM115
        if list(dtypes.items()) != list(self._dtypes.items()):
            raise NotCacheable("their entries, dtypes or ranks differ")
        self._count(sum(array.nbytes for array in arrays.values()))
        return arrays

    def commit(self, about: Mapping[str, Any]) -> Store:
        """Completes the store and opens it (or the one that another process has completed meanwhile)."""
        shapes, length = {}, 0
        for name, seen in self._shapes.items():
            length = len(seen)
            shapes[name] = np.array(seen[:1] if len(set(seen)) == 1 else seen, np.int64)
        if self._folder is None:
            values = {}
            for name, parts in self._parts.items():
                values[name] = np.concatenate([np.zeros(0, self._dtypes[name]), *map(np.ravel, parts)])
                values[name].flags.writeable = False
            return Store(values, shapes, length, about)
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        entries = {}
        for k, (name, dtype) in enumerate(self._dtypes.items()):
            entries[name] = {"dtype": dtype.str, "shape": shapes[name][0].tolist() if len(shapes[name]) == 1 else None}
            if entries[name]["shape"] is None:
                np.save(self._folder / f"{k}.npy", shapes[name])
        index = {"length": length, "entries": entries, "about": about}
        (self._folder / "index.json").write_text(json.dumps(index))
        return self._named(self._folder)

    def _named(self, folder: pathlib.Path) -> Store:
        """Gives the folder its final name; where another process has completed it meanwhile, the other's stays.

        Ours is opened before it has its final name, since others, who were about to replace a damaged one, may replace
        ours as well at any time: what is mapped stays readable whatever becomes of its name.
        """
        ours = open_store(folder)
        if ours is None:
            raise OSError(f"{folder} cannot be read back")
        ours.directory = self._final
        attempts = 0
        while True:
            try:
                os.rename(folder, self._final)
                return ours
            except OSError:
                theirs = open_store(self._final)
                if theirs is not None:  # another process was first
                    self.abort()
                    return theirs
                attempts += 1
                if attempts == _ATTEMPTS:  # a real failure
                    raise
                discard(self._final)  # damaged, and perhaps being replaced by another process too

    def abort(self) -> None:
        """Removes what was written."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, name: str, array: np.ndarray) -> None:
        if self._folder is None:
            self._parts[name].append(array)
        else:
            self._files[name].write(np.ascontiguousarray(array).data)


Write = Callable[[Writer], Mapping[str, Any]]
"""Adds all rows to a store, from the first one at each call, and returns what is kept beside them."""


def keep(
    write: Write,
    cache: tuple[pathlib.Path, str] | None,
    limit_bytes: float,
    say: Callable[[str], None],
) -> Store:
    """The store that ``write`` fills, at (root, key), or in memory where that is None or cannot hold it.

    Args:
      write: adds all rows to a writer, from the first one at each call, and returns ``about``.
      limit_bytes: what it may take on disk.
      say: takes why it is not kept.
    """
    if cache is not None:
        try:
            return _written(write, Writer(*cache, limit_bytes))
        except NotCacheable as error:
            say(f"data: the examples are not kept: {error}.")
        except OSError as error:
            why = error.strerror or error
            say(f"warning: the cache folder {cache[0]} cannot be written ({why}); the examples are not kept.")
    return _written(write, Writer(None))


def _written(write: Callable[[Writer], Mapping[str, Any]], writer: Writer) -> Store:
    try:
        return writer.commit(write(writer))
    except BaseException:
        writer.abort()
        raise


def open_store(path: pathlib.Path) -> Store | None:
    """The store at ``path``, marked as used now; None if there is no whole one."""
    try:
        index = json.loads((path / "index.json").read_text())
        length, values, shapes = int(index["length"]), {}, {}
        for k, (name, entry) in enumerate(index["entries"].items()):
            values[name] = _mapped(path / f"{k}.bin", plain_dtype(entry["dtype"]))
            shape = entry["shape"]
            shapes[name] = np.array([shape] if shape is not None else np.load(path / f"{k}.npy"), np.int64)
            if length < 0 or shapes[name].ndim != 2 or (shape is None and len(shapes[name]) != length):
                return None
        found_store = Store(values, shapes, length, dict(index["about"]), path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return found_store


def _mapped(path: pathlib.Path, dtype: np.dtype) -> np.ndarray:
    """A file as a flat array; raises ValueError where its size is no multiple of the dtype's."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return np.zeros(0, dtype)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def release(array: np.ndarray) -> None:
    """Gives back the memory of all that is mapped with an array; it is read again where it is asked for."""
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def find(root: pathlib.Path, key: str) -> Store | None:
    """The store of this key below ``root``, if there is one."""
    return open_store(root / f"cache-{key}")


def discard(path: pathlib.Path) -> None:
    """Deletes a cache so that nobody sees half of it; a process that has it mapped keeps its data."""
    doomed = path.with_name(f"tmp-old-{os.getpid()}-{time.time_ns()}")
    with contextlib.suppress(OSError):
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def prune(root: pathlib.Path, limit_bytes: float, keep: Iterable[pathlib.Path] = ()) -> None:
    """Deletes the least recently used caches below ``root`` until those left fit ``limit_bytes``, and dead leftovers.

    Args:
      root: the folder of all caches.
      limit_bytes: what the caches may take together.
      keep: caches in use, which stay whatever their size.
    """
    kept, found, now = set(keep), [], time.time()
    with contextlib.suppress(OSError):
        for path in root.iterdir():
            with contextlib.suppress(OSError):
                old = now - path.stat().st_mtime > _FORGOTTEN
                if path.name.startswith("cache-") and _holds_only_data(path):
                    size = sum(file.stat().st_size for file in path.glob("*.bin"))
                    if size or path in kept:
                        found.append((path in kept, path.stat().st_mtime, size, path))
                    elif old:
                        discard(path)
                elif path.name.startswith("tmp-") and _holds_only_data(path):
                    last_write = max(p.stat().st_mtime for p in (path, *path.iterdir()))
                    if now - last_write > _ABANDONED:
                        shutil.rmtree(path, ignore_errors=True)
                elif old and re.fullmatch("checked-.*[.]json|lock-[0-9a-f]+", path.name):
                    path.unlink()
    total = 0
    for used, _, size, path in sorted(found, reverse=True):
        total += size
        if total > limit_bytes and not used:
            discard(path)


def _holds_only_data(path: pathlib.Path) -> bool:
    """Whether a folder may be one of ours: a config may name any place for caches, and all else there stays."""
    return path.is_dir() and all(p.suffix in (".bin", ".npy", ".json") and p.is_file() for p in path.iterdir())


def free_bytes(root: pathlib.Path) -> float:
    """What the disk of ``root``, which need not exist yet, can take; infinity if that cannot be found out."""
    for path in (root, *root.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(path).free
    return float("inf")


# --- one builder ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_builder(root: pathlib.Path, key: str, say: Callable[[str], None]) -> Iterator[None]:
    """Around looking below ``root`` for what belongs to ``key``, and making it where it is not.

    One of the processes that share the folder is inside; those that come meanwhile wait until it is through, and then
    find what it has made. If it dies, one of them takes its place. Nobody waits for one that gives no sign of life,
    or in a folder that knows no locks: then each does the work.

    Args:
      say: takes a line where this process waits.
    """
    path = root / f"lock-{key}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b", buffering=0)  # noqa: SIM115
    except OSError:
        yield
        return
    with file:  # closing it gives up the lock, and so does the end of the process
        if not _is_builder(file.fileno(), say):
            yield
            return
        over = threading.Event()

        def live() -> None:
            while not over.wait(_BEAT):
                with contextlib.suppress(OSError):
                    os.utime(file.fileno())

        alive = threading.Thread(target=live, daemon=True)
        with contextlib.suppress(OSError):
            file.truncate(0)
        alive.start()
        try:
            yield
        finally:
            over.set()
            alive.join()
            with contextlib.suppress(OSError):
                file.write(_DONE)  # for those that have it open; others find what was made
                path.unlink()


def _is_builder(file: int, say: Callable[[str], None]) -> bool:
    """Waits for the lock on an open file; False as soon as another process, which had it, is through or has stalled."""
    waits, seen, since = 0, -1, 0.0
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            locked = False
        except OSError:  # this folder knows no locks
            return False
        try:
            sign, done = os.fstat(file).st_mtime_ns, os.pread(file, len(_DONE), 0) == _DONE
        except OSError:  # deleted on another host
            return False
        if locked or (waits and done):
            return not (waits and done)
        if sign != seen:
            seen, since = sign, time.monotonic()
        elif time.monotonic() - since > _STALLED:
            say(f"warning: the process that reads this data has stood still for {_STALLED:.0f} s; reading it here too.")
            return False
        waits += 1
        if waits == 10:
            say("data: another process reads it already; waiting until it is through")
        time.sleep(_BEAT / 10)


# --- keys ------------------------------------------------------------------------------------------------------------


def default_root(cache_dir: str | None) -> pathlib.Path:
    """``cache_dir``, or ``$BIGBASE_CACHE``, or ``bigbase_jax`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if cache_dir or os.environ.get("BIGBASE_CACHE"):
        return pathlib.Path(cache_dir or os.environ["BIGBASE_CACHE"]).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser().absolute() / "bigbase_jax"


def key_of(fingerprint: str, split: str, source: Source, transforms: Sequence[Transform] = ()) -> str:
    """A digest of what decoded examples depend on: the data, the decoder's and the transforms' code and arguments."""
    decoders = [importlib.metadata.version(package) for package in ("pillow", "simplejpeg")]
    parts = [FORMAT, *decoders, np.__version__.split(".")[0], fingerprint, split, _code(source)]
    parts += [(repr(t), _code(t)) for t in transforms]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def has_stable_name(transform: Transform) -> bool:
    """Whether ``repr`` tells a transform's arguments, as a dataclass's does (a function's tells an address)."""
    return " at 0x" not in repr(transform)


def _code(thing: Any) -> str:
    """The class of an object and a digest of the file that defines it, so that an edited decoder is another decoder."""
    module = sys.modules.get(type(thing).__module__)
    try:
        code = inspect.getsource(module) if module else ""
    except (OSError, TypeError):
        code = ""
    return f"{type(thing).__module__}.{type(thing).__qualname__}:{hashlib.sha256(code.encode()).hexdigest()[:16]}"


def as_array(value: Any) -> np.ndarray:
    """An entry of an example as an array; Python numbers become i32, f32 or bool, arrays keep their dtype."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, bool | np.generic):
        return np.asarray(value)
    if isinstance(value, int):
        return np.asarray(value, np.int32)
    if isinstance(value, float):
        return np.asarray(value, np.float32)
    return np.asarray(value)


def kept(
    key: str,
    begin: Callable[[], Write],
    root: pathlib.Path,
    limit_bytes: float,
    say: Callable[[str], None],
    what: str,
) -> Store:
    """The store of this key below ``root``; where it is not there, it is made, and older ones make room.

    Args:
      begin: gives what adds the rows.
      limit_bytes: what all stores may take; 0: keep nothing.
      say: takes lines about progress.
      what: is done where it is made, in words.
    """
    where = (root, key) if limit_bytes > 0 else None
    found = find(*where) if where else None
    if found is None:
        say(f"data: {what}")
        found = keep(begin(), where, limit_bytes, say)
        if where is not None:
            prune(root, limit_bytes, [root / f"cache-{key}"])
    return found


@functools.cache
def source_digest(module: str) -> str:
    """A digest of the code of a module of the package, so that edited code makes another cache."""
    try:
        code = inspect.getsource(importlib.import_module(f"bigbase_jax.{module}"))
    except OSError:
        code = ""
    return hashlib.sha256(code.encode()).hexdigest()[:16]
