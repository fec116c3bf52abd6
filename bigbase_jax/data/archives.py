"""Members of zip and tar archives, read where they lie: nothing is ever unpacked to where their names say."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import posixpath
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

_HEADER = 1 << 20  # bytes of a member's name and the like


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
      size: in bytes, as the archive says.
      packed: bytes that it takes in the archive.
      hindrance: why it cannot be read, such as "is a link"; "" where it can.
      open: gives its bytes; several may be read at once.
    """

    size: int
    packed: int
    hindrance: str
    open: Callable[[], Any]


def members(raw: Any, is_zip: bool) -> dict[str, Member]:
    """The files in an archive by name, with "/", as it has them but for a leading "./".

    Args:
      raw: a seekable binary file, kept open as long as what is returned is there.

    Raises:
      OSError, ValueError, EOFError, zipfile.BadZipFile, tarfile.TarError: it is no such archive, or a broken one.
    """
    found: dict[str, Member] = {}
    raw.seek(0)
    if is_zip:
        archive = zipfile.ZipFile(raw)
        for info in archive.infolist():
            if not info.is_dir():
                hindrance = "is locked with a password" if info.flag_bits & 1 else ""
                unpack = functools.partial(archive.open, info)
                found[posixpath.normpath(info.filename)] = Member(info.file_size, info.compress_size, hindrance, unpack)
        return found
    headers: Any = _Headers(raw)
    with tarfile.open(fileobj=headers, mode="r:") as tar:
        for entry in tar:
            if not entry.isdir():
                hindrance = "" if entry.isreg() and not entry.issparse() else "is a link, a device or sparse"
                part = functools.partial(_Part, raw, entry.offset_data, entry.size)
                found[posixpath.normpath(entry.name)] = Member(entry.size, entry.size, hindrance, part)
    return found


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file or folder in an archive, in the words of ``os.DirEntry``."""

    name: str
    path: str
    st_size: int = 0
    st_mtime_ns: int = 0
    folder: bool = False

    def is_dir(self) -> bool:
        return self.folder

    def stat(self) -> Entry:
        return self


def folders(files: Iterable[tuple[str, int, int]]) -> dict[str, list[Entry]]:
    """What is in each folder of (name, size, time in ns), the first being ""."""
    found: dict[str, dict[str, Entry]] = {"": {}}
    for path, size, mtime_ns in files:
        above, name = posixpath.split(path)
        found.setdefault(above, {})[name] = Entry(name, path, size, mtime_ns)
        while above:
            path, (above, name) = above, posixpath.split(above)
            found.setdefault(above, {})[name] = Entry(name, path, folder=True)
    return {folder: list(entries.values()) for folder, entries in found.items()}


class _Headers:
    """An archive of which headers alone are read, so that none can ask for all of memory."""

    def __init__(self, raw: Any):
        self._raw = raw
        self.seek, self.tell = raw.seek, raw.tell

    def read(self, size: int) -> bytes:
        if size > _HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return bytes(self._raw.read(size))


class _Part(io.RawIOBase):
    """Some bytes of a file that others read too."""

    def __init__(self, raw: Any, start: int, size: int):
        self._file, self._start, self._size, self._at = raw.fileno(), start, size, 0
        self._raw = raw  # keeps it open

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        data = os.pread(self._file, count, self._start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at
