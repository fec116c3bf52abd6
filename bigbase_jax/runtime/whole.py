"""Files that appear when they are whole: until then they have a name of the writing process's own.

What a kill leaves under such a name is removed by the next process that writes the same file.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import BinaryIO

from bigbase_jax.core import UserError

_PARTIAL = re.compile(r"\.(.+)\.(\d{1,9})\.tmp")


@contextlib.contextmanager
def written(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of ``path`` once everything is on disk; its folder is made.

    Raises:
      UserError: the disk refuses; ``path`` is as it was.
    """
    unfinished = partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}.") from error
        raise


@contextlib.contextmanager
def folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into, which takes the place of ``path``, a folder or nothing, once the block has ended well.

    Raises:
      UserError: the disk refuses; ``path`` is as it was.
    """
    unfinished = partial(path)
    before = unfinished.with_suffix(".old")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        if path.is_dir():
            os.replace(path, before)
        os.replace(unfinished, path)
        shutil.rmtree(before, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if before.is_dir() and not path.exists():
            os.replace(before, path)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}.") from error
        raise


def partial(path: pathlib.Path) -> pathlib.Path:
    """The name under which this process may write ``path``, a file or a folder, until it is whole."""
    clean(path.parent, path.name)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def clean(folder: pathlib.Path, name: str | None = None) -> None:
    """Removes what processes of this machine that are gone have left unfinished in a folder.

    Args:
      name: of the one file or folder that they were writing; None: of any, for a folder that is ours alone.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            found = _PARTIAL.fullmatch(path.name)
            if found and name in (None, found[1]) and not _alive(int(found[2])):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _alive(process: int) -> bool:
    """Whether it is another process that lives; our own begins anew."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return process != os.getpid()
