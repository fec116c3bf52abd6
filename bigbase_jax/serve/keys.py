"""Who may ask: keys, of which a file has the hashes alone, and how often each may.

A line of the file is ``NAME sha256:HEX``, and may end in requests per second: ``NAME sha256:HEX 20``. A key has 256
random bits, so that a plain hash of it is as good as a slow one.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import pathlib
import re
import secrets
import time

from bigbase_jax.core import UserError
from bigbase_jax.runtime.untrusted import read_regular

_LINE = re.compile(r"([\w.@-]{1,64})\s+sha256:([0-9a-f]{64})(?:\s+(\d+(?:\.\d+)?))?", re.ASCII)
_BURST = 2.0  # seconds' worth of requests that may come at once


class Keys:
    """The keys of a file, which is read again when it changes.

    Args:
      path: of the file.
      rate: requests per second of each key whose line says none; 0: any number.

    Raises:
      UserError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike, rate: float = 0.0):
        self._path, self._rate = pathlib.Path(path).expanduser(), rate
        self._looked, self._signature = time.monotonic(), (0, 0)
        self._left: dict[str, tuple[float, float]] = {}  # requests that a key has left, and when that was so
        self._read()

    @property
    def names(self) -> set[str]:
        """Of those who hold a key."""
        return {name for name, _, _ in self._lines}

    def holder(self, key: str) -> str | None:
        """The name of the key's holder; None: it is none of the file's. The time that this takes tells nothing."""
        if time.monotonic() - self._looked > 1:
            self._looked = time.monotonic()
            self._read(again=True)
        given, found = _hashed(key), None
        for name, hashed, _ in self._lines:
            if hmac.compare_digest(hashed, given):
                found = name
        return found

    def wait(self, name: str) -> float:
        """Seconds until a holder may ask again; 0: now, and this is counted."""
        rate = next((rate for holder, _, rate in self._lines if holder == name), self._rate)
        if not rate:
            return 0.0
        now, most = time.monotonic(), max(rate * _BURST, 1.0)
        left, then = self._left.get(name, (most, now))
        left = min(left + (now - then) * rate, most)
        self._left[name] = (left - 1 if left >= 1 else left), now
        return 0.0 if left >= 1 else (1 - left) / rate

    def _read(self, again: bool = False) -> None:
        try:
            about = os.stat(self._path)
            signature = about.st_mtime_ns, about.st_size
            if signature != self._signature:
                lines = read_regular(self._path).decode().splitlines()
                self._lines = [self._parsed(line) for line in lines if line.strip() and not line.startswith("#")]
                self._signature = signature
        except (OSError, UnicodeDecodeError, UserError) as error:
            if again:  # being written; those of before are good until it is whole
                return
            if isinstance(error, UserError):
                raise
            raise UserError(f"--api_keys={self._path} cannot be read ({error}); --add_key=NAME makes it.") from error

    def _parsed(self, line: str) -> tuple[str, str, float]:
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise UserError(f"{self._path} has a line that is not NAME sha256:HEX; --add_key=NAME writes one.")
        return found[1], found[2], float(found[3]) if found[3] else self._rate


def add(path: str | os.PathLike, name: str) -> str:
    """Makes a key for ``name``, keeps its hash in the file, and returns it: it cannot be read anywhere later.

    Raises:
      UserError: the name is taken or is none, or the file cannot be written.
    """
    path = pathlib.Path(path).expanduser()
    if not re.fullmatch(r"[\w.@-]{1,64}", name, re.ASCII):
        raise UserError(f"--add_key={name} is no name: up to 64 letters, digits, '.', '_', '-' and '@'.")
    if path.exists() and Keys(path).names & {name}:
        raise UserError(f"{path} has a key of {name!r}; delete that line first.")
    key = "bb-" + secrets.token_urlsafe(32)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as file:
            file.write(f"{name} sha256:{_hashed(key)}\n")
    except OSError as error:
        raise UserError(f"--api_keys={path} cannot be written ({error}).") from error
    return key


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
