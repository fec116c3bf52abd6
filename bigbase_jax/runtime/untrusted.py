"""Files that somebody sent: only regular files of their folder are opened, only so much of them is read, and what they
have computed is limited in time and memory.

``limits`` says how much.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import select
import signal
import stat
import subprocess
import sys
import threading
from typing import Any, BinaryIO

from bigbase_jax.core import UserError
from bigbase_jax.runtime.limits import MEMORY, MOST_BYTES, MOST_VALUES, limit, too_much

_DEPTH = 64  # of the objects and lists of a config
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))


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
    if sum(map(data.count, marks)) > limit(MOST_VALUES):  # type: ignore[arg-type]
        raise too_much(f"{name} holds more than {limit(MOST_VALUES):,} values")
    try:
        return json.loads(data, object_pairs_hook=_unique if unique else None)
    except RecursionError as error:
        raise UserError(f"{name} cannot be read: its lists and objects are nested too deep.") from error
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise UserError(f"{name} cannot be read as JSON ({error}).") from error


def file_in(folder: str | os.PathLike, name: str) -> pathlib.Path | None:
    """The path of a regular file of a folder, to be copied; None: it has none of this name. See ``open_regular``."""
    path = pathlib.Path(folder) / name
    try:
        open_regular(path, folder).close()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    return path


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file, which has to be in the folder where it seems to be.

    Raises:
      FileNotFoundError: there is none.
      UserError: it cannot be read, is too large or nested too deep, or holds something else.
    """
    try:
        data = read_regular(path, os.path.dirname(path) or ".")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    found = parse_json(data, path)
    level = [found]
    for _ in range(_DEPTH):
        inner = [x for x in level if isinstance(x, (dict, list))]
        level = [y for x in inner for y in (x.values() if isinstance(x, dict) else x)]
    if level:
        raise UserError(f"{path} is nested deeper than {_DEPTH} levels, which no config is.")
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{collections.Counter(key for key, _ in pairs).most_common(1)[0][0]!r} is there twice")
    return found


# ----------------------------------------------------------------------------------------------------- what it computes


class Refused(Exception):
    """What came in a folder raised an error of its own; ``kind`` is the name of its class."""

    def __init__(self, kind: str, text: str):
        super().__init__(text.rstrip(".").partition("\n")[0] or kind)
        self.kind = kind


_BUSY = 10  # seconds that pass on a busy machine for one of computing
_lock = threading.Lock()
_process: tuple[int, int, subprocess.Popen] | None = None  # whose it is, its memory, and itself


def ask(what: str, name: str, seconds: float, **arguments: Any) -> Any:
    """What a function of ``sandbox`` gives, computed in a process whose time and memory are limited.

    Args:
      what: that came in a folder, for sentences.
      name: of the function.
      seconds: of computing that it may take.
      arguments: that JSON can hold.

    Raises:
      Refused: the function raised an error.
      UserError: it takes too long or too much memory, or it crashes.
    """
    global _process
    with _lock:
        seconds, memory = limit(seconds), limit(MEMORY)
        ours = os.getpid(), memory  # after a fork, the other process is our parent's
        if _process is None or _process[:2] != ours or _process[2].poll() is not None:
            command = [sys.executable, "-P", os.path.join(os.path.dirname(__file__), "sandbox.py"), str(memory)]
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}  # each thread would reserve memory
            pipe, null = subprocess.PIPE, subprocess.DEVNULL
            started = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, env=environment)
            _process = *ours, started
        process = _process[2]
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([name, seconds, arguments]).encode() + b"\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], _BUSY * seconds)[0]:
                process.send_signal(signal.SIGPROF)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # such as Ctrl-C: its answer would be taken for that to the next question
            process.kill()
            _process = None
            raise
        if not line:
            _process = None
    if not line:
        code = -process.wait()
        if code == signal.SIGPROF:
            raise too_much(f"{what} takes more than {seconds} seconds")
        raise too_much(f"{what} takes more than {memory:,} bytes of memory, or crashes (signal {code})")
    answer = json.loads(line)
    if "found" in answer:
        return answer["found"]
    if answer["kind"] == "MemoryError":
        raise too_much(f"{what} takes more than {memory:,} bytes of memory")
    raise Refused(answer["kind"], answer["error"])
