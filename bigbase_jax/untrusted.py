"""Files that somebody sent: only regular files of their folder are opened, and only so much of them is read.

What reading them may cost is limited. ``BIGBASE_LIMITS=2`` in the environment doubles every limit, for this process and
those that it starts.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import stat
from typing import Any, BinaryIO

from bigbase_jax.core import UserError

LIMITS = "BIGBASE_LIMITS"
MOST_BYTES = 64 << 20
"""Of a file that is read whole. The largest published ``tokenizer.json`` has 34 MB."""
_MOST_VALUES = 4_000_000  # of a JSON file, about 100 bytes in memory each; the largest tokenizer.json has 2.3 million
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))


def limit(default: float) -> int:
    """``default`` times what the environment variable ``BIGBASE_LIMITS`` says (1)."""
    given = os.environ.get(LIMITS, "1")
    try:
        return int(default * float(given))
    except (ValueError, OverflowError) as error:
        raise UserError(f"{LIMITS}={given!r} is no number; 2 doubles what files from elsewhere may cost.") from error


def too_much(what: str) -> UserError:
    """The sentence for what is over a limit, with the way to raise it."""
    return UserError(
        f"{what}; if you trust it, set the environment variable {LIMITS}=2 (or 4, ...) to raise the limit."
    )


def open_regular(path: str | os.PathLike, folder: str | os.PathLike | None = None) -> BinaryIO:
    """Opens a regular file; nothing else is opened, as a pipe would wait for ever and a device has no end.

    Args:
      folder: that the file has to be in, after all links; None: it may be anywhere, as the user named it. Hugging
        Face's cache, where ``snapshots/X/FILE`` links to ``blobs/HASH``, counts as one folder.

    Raises:
      OSError: there is none, or it cannot be read.
      UserError: it is not a regular file, or elsewhere.
    """
    real = os.path.realpath(path)
    if folder is not None and not any(real.startswith(os.path.join(home, "")) for home in _homes(folder)):
        raise UserError(
            f"{path} leads to {real}, which is outside of its folder; copy that file there if you trust it."
        )
    mode = os.stat(real).st_mode
    if stat.S_ISREG(mode):
        file = open(os.open(real, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # still
            return file
        file.close()
    raise not_regular(path, mode)


def not_regular(path: str | os.PathLike, mode: int) -> UserError:
    """Says what a path is, by its mode, that is no regular file."""
    kind = next((name for test, name in _KINDS if test(mode)), "a device")
    return UserError(f"{os.fspath(path)} is {kind}, not a file; delete it or move it away.")


def _homes(folder: str | os.PathLike) -> list[str]:
    real = pathlib.Path(os.path.realpath(folder))
    return [str(real), *(str(up.parent / "blobs") for up in real.parents if up.name == "snapshots")]


def read_regular(path: str | os.PathLike, folder: str | os.PathLike | None = None, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file, at most ``limit(most)``; see ``open_regular``."""
    most = limit(most)
    with open_regular(path, folder) as file:
        if os.fstat(file.fileno()).st_size <= most:
            data = file.read(most + 1)  # what tells no size may have more
            if len(data) <= most:
                return data
    raise too_much(f"{path} is larger than {most:,} bytes")


def parse_json(data: bytes | str, name: str | os.PathLike, unique: bool = False) -> Any:
    """The value of a JSON text that somebody sent.

    Args:
      name: of the file, for sentences.
      unique: refuse an object that has a key twice.

    Raises:
      UserError: it is not JSON in UTF-8, or its values are nested too deep or too many.
    """
    marks = (",", ":", "[", "{") if isinstance(data, str) else (b",", b":", b"[", b"{")
    if sum(map(data.count, marks)) > limit(_MOST_VALUES):  # type: ignore[arg-type]
        raise too_much(f"{name} holds more than {limit(_MOST_VALUES):,} values")
    try:
        return json.loads(data, object_pairs_hook=_unique if unique else None)
    except RecursionError as error:
        raise UserError(f"{name} cannot be read: its lists and objects are nested too deep.") from error
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise UserError(f"{name} cannot be read as JSON ({error}).") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{collections.Counter(key for key, _ in pairs).most_common(1)[0][0]!r} is there twice")
    return found
