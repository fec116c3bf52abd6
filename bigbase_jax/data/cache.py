"""Decoded examples kept on disk and memory-mapped: the second epoch, and the second start, decode nothing.

A cache is a folder with ``data.bin`` (the arrays of all readable examples, one after another), ``rows.bin`` (where each
example begins, and the shapes that differ from example to example) and ``index.json`` (names, dtypes, common shapes,
unreadable examples). It is written under a temporary name and renamed when everything is on disk, so a folder with a
final name is whole. Of the processes that share the folder, one builds a cache, and the others wait for it
(``one_builder``); where they cannot, all write, and whoever comes second takes the first's.
Its name is a digest of everything that its contents depend on, so a changed file or transform means another name.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import mmap
import os
import pathlib
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

import numpy as np
import PIL

from bigbase_jax.core import Example, Source, Transform

FORMAT = 2
_ALIGN = 16  # bytes; every array begins at a multiple, so that any dtype can be mapped in place
_ABANDONED = 3600.0  # seconds without a write after which a temporary folder belongs to a process that died
_ATTEMPTS = 20  # to rename a finished cache, where others replace a damaged one at the same time
_FORGOTTEN = 90 * 86400.0  # seconds without use after which a verdict is deleted
_BEAT = 1.0  # seconds between a builder's signs of life
_STALLED = 60.0  # seconds without one after which nobody waits for it any more
_DONE = b"done"

_T = TypeVar("_T")

Bad = list[tuple[int, str]]
"""Unreadable examples of a split: (index in the dataset's source, why)."""


class NotCacheable(Exception):
    """The examples cannot be kept in this format (objects, texts of differing lengths, keys that come and go)."""


class Cache:
    """The readable examples of a split, as read-only views into a memory-mapped file; safe for many threads.

    Attributes:
      directory: the cache's folder.
      bad: the examples that were left out.
      transforms: how many of the transforms in its key were applied.
      nbytes: size of the data in bytes.
    """

    def __init__(self, directory: pathlib.Path):
        """Opens a cache that ``Writer`` has completed.

        Raises:
          OSError, ValueError, KeyError: there is none, or it is damaged.
        """
        self.directory = directory
        index = json.loads((directory / "index.json").read_text())
        self.nbytes: int = index["bytes"]
        self.transforms: int = index["transforms"]
        self.bad: Bad = [(int(i), str(why)) for i, why in index["bad"]]
        self._entries = [
            (name, plain_dtype(e["dtype"]), None if e["shape"] is None else tuple(e["shape"]), e["ndim"])
            for name, e in index["entries"].items()
        ]
        self._length: int = index["length"]
        self._rows = np.fromfile(directory / "rows.bin", "<i8").reshape(self._length, index["columns"])
        least = min([0, self._rows.min(initial=0), *(n for _, _, shape, _ in self._entries for n in shape or ())])
        if (directory / "data.bin").stat().st_size != self.nbytes or least < 0:  # numpy would read before the data
            raise ValueError(f"{directory} is damaged")
        with open(directory / "data.bin", "rb") as file:
            self._data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.nbytes else b""

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index].tolist()
        offset, column = row[0], 1
        example: Example = {}
        for name, dtype, shape, ndim in self._entries:
            if shape is None:
                shape = tuple(row[column : column + ndim])
                column += ndim
            array = np.ndarray(shape, dtype, self._data, offset)
            example[name] = array
            offset += _padded(array.nbytes)
        return example


def plain_dtype(name: str) -> np.dtype:
    """A dtype that a file names; raises ValueError for one of Python objects, whose addresses a file must not say."""
    if (dtype := np.dtype(name)).hasobject:
        raise ValueError(f"{name!r} holds Python objects")
    return dtype


class Unfinished:
    """A cache folder that is being written, under a temporary name until ``commit``.

    Any method may raise OSError (disk full, folder not writable); ``abort`` is then the caller's answer.

    Attributes:
      path: where to write; what is large goes into files ``*.bin``.
      final: where it will be.
    """

    def __init__(self, root: pathlib.Path, key: str):
        """Begins the cache ``key`` below ``root``."""
        root.mkdir(parents=True, exist_ok=True)
        self.final = root / f"cache-{key}"
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="tmp-", dir=root))

    def commit(self, open_folder: Callable[[pathlib.Path], _T | None]) -> _T:
        """Gives the folder, whose files must be on disk, its final name.

        Where another process has completed it meanwhile, the other's stays.

        Args:
          open_folder: opens the cache in a folder; None if there is no whole one.

        Returns:
          The cache, opened. Ours is opened before it has its final name, since others, who were about to replace a
          damaged one, may replace ours as well at any time: what is mapped stays readable whatever becomes of its name.
        """
        ours = open_folder(self.path)
        if ours is None:
            raise OSError(f"{self.path} cannot be read back")
        attempts = 0
        while True:
            try:
                os.rename(self.path, self.final)
                return ours
            except OSError:
                theirs = open_folder(self.final)
                if theirs is not None:  # another process was first
                    self.abort()
                    return theirs
                attempts += 1
                if attempts == _ATTEMPTS:  # a real failure
                    raise
                discard(self.final)  # damaged, and perhaps being replaced by another process too

    def abort(self) -> None:
        """Removes what was written."""
        shutil.rmtree(self.path, ignore_errors=True)


class Writer:
    """Writes a cache example by example; ``commit`` makes it visible, ``abort`` leaves nothing behind.

    Any method may raise OSError (disk full, folder not writable); ``abort`` is then the caller's answer.
    """

    def __init__(self, root: pathlib.Path, key: str, transforms: int = 0):
        """Begins the cache ``key`` of examples to which the first ``transforms`` transforms were applied."""
        self._folder = Unfinished(root, key)
        self._file: BinaryIO = open(self._folder.path / "data.bin", "wb", buffering=1 << 20)  # noqa: SIM115
        self._rows: list[tuple[int, list[tuple[int, ...]]]] = []
        self._dtypes: dict[str, np.dtype] = {}
        self._offset = 0
        self._transforms = transforms

    def add(self, example: Example) -> None:
        """Appends an example.

        Raises:
          NotCacheable: it has no fixed binary form, or other keys, dtypes or ranks than the first one.
        """
        arrays = {name: as_array(value) for name, value in example.items()}
        dtypes = {name: array.dtype for name, array in arrays.items()}
        if not self._rows:
            self._dtypes = dtypes
        ranks = [a.ndim for a in arrays.values()]
        if any(d.hasobject for d in dtypes.values()):
            raise NotCacheable("they hold Python objects")
        if list(dtypes.items()) != list(self._dtypes.items()) or (
            self._rows and ranks != [len(shape) for shape in self._rows[0][1]]
        ):
            raise NotCacheable("their entries, dtypes or ranks differ")
        self._rows.append((self._offset, [a.shape for a in arrays.values()]))
        for array in arrays.values():
            self._write(np.ascontiguousarray(array).tobytes() if array.nbytes < 4096 else np.ascontiguousarray(array))
            self._write(bytes(_padded(array.nbytes) - array.nbytes))
            self._offset += _padded(array.nbytes)

    def commit(self, bad: Bad) -> Cache:
        """Completes the cache and opens it (or the one that another process has completed meanwhile)."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        shapes = list(zip(*(shapes for _, shapes in self._rows), strict=True))
        entries, ragged = {}, []
        for (name, dtype), seen in zip(self._dtypes.items(), shapes, strict=True):
            common = len(set(seen)) == 1
            entries[name] = {"dtype": dtype.str, "ndim": len(seen[0]), "shape": seen[0] if common else None}
            if not common:
                ragged.append(seen)
        rows = [[offset, *(n for seen in ragged for n in seen[i])] for i, (offset, _) in enumerate(self._rows)]
        np.asarray(rows, "<i8").tofile(self._folder.path / "rows.bin")
        index = {"length": len(rows), "bytes": self._offset, "entries": entries, "bad": bad}
        index |= {"columns": 1 + sum(len(seen[0]) for seen in ragged), "transforms": self._transforms}
        (self._folder.path / "index.json").write_text(json.dumps(index))
        cache = self._folder.commit(open_cache)
        cache.directory = self._folder.final
        return cache

    def abort(self) -> None:
        """Removes what was written."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._folder.abort()

    def _write(self, data: Any) -> None:
        self._file.write(data)


def open_cache(path: pathlib.Path) -> Cache | None:
    """The cache at ``path``, marked as used now; None if there is no whole one."""
    try:
        found = Cache(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return found


def find(root: pathlib.Path, key: str) -> Cache | None:
    """The cache of this key below ``root``, if there is one."""
    return open_cache(root / f"cache-{key}")


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
                if path.name.startswith("cache-") and _holds_only_data(path):
                    size = sum(file.stat().st_size for file in path.glob("*.bin"))
                    found.append((path in kept, path.stat().st_mtime, size, path))
                elif path.name.startswith("tmp-") and _holds_only_data(path):
                    last_write = max(p.stat().st_mtime for p in (path, *path.iterdir()))
                    if now - last_write > _ABANDONED:
                        shutil.rmtree(path, ignore_errors=True)
                elif (
                    re.fullmatch("checked-.*[.]json|lock-[0-9a-f]+", path.name)
                    and now - path.stat().st_mtime > _FORGOTTEN
                ):
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


# --- verdicts: which examples are unreadable, for sets that are not cached -------------------------------------------


def read_verdict(root: pathlib.Path, key: str) -> Bad | None:
    """The unreadable examples found by an earlier check of the same data, or None if it was never checked."""
    path = root / f"checked-{key}.json"
    try:
        bad = [(int(i), str(why)) for i, why in json.loads(path.read_text())]
        os.utime(path)
    except (OSError, ValueError, TypeError):
        return None
    return bad


def write_verdict(root: pathlib.Path, key: str, bad: Bad) -> None:
    """Remembers the outcome of a check; raises OSError if the folder cannot be written."""
    root.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix="tmp-", dir=root)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(bad, file)
        os.replace(temporary, root / f"checked-{key}.json")
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


# --- keys ------------------------------------------------------------------------------------------------------------


def default_root(cache_dir: str | None) -> pathlib.Path:
    """``cache_dir``, or ``$BIGBASE_CACHE``, or ``bigbase_jax`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if cache_dir or os.environ.get("BIGBASE_CACHE"):
        return pathlib.Path(cache_dir or os.environ["BIGBASE_CACHE"]).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser().absolute() / "bigbase_jax"


def key_of(fingerprint: str, split: str, source: Source, transforms: Sequence[Transform] = ()) -> str:
    """A digest of what decoded examples depend on: the data, the decoder's and the transforms' code and arguments."""
    parts = [FORMAT, PIL.__version__, np.__version__.split(".")[0], fingerprint, split, _code(source)]
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


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
