"""Secrets: never in what is kept or said. Passwords in URLs, and what flags, keys and variables of such names hold.

Text that leaves the process (a line, a sentence, a traceback, the command in ``lineage.json``) goes through ``hide`` or
``command``. It finds secrets by their form, and those of this process's arguments and environment wherever they stand.
A config is kept whole, since it has to reproduce the run; so ``refuse`` takes none that holds a secret.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import sys
import traceback
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bigbase_jax.core import UserError

HIDDEN = "***"
_ARGUMENTS = "BIGBASE_ARGUMENTS"  # tells a process that ``child`` starts its arguments
_SECRET = re.compile(
    r"(password|passwd|passphrase|pwd|secrets?|credentials?|apikey|odbc_connect)$|^(key|token)$"
    r"|(access|account|api|auth|bearer|client|encryption|hf|id|private|refresh|secret|session|sign|signing|ssh|storage)"
    r"_?(key|token)$"
)
_MAYBE = re.compile(r"(key|token)$")  # as in image_key and pad_token: by the looks of the value
_RANDOM = re.compile(r"(?=\S*\d)(?=\S*[A-Za-z])[\w.+/=~-]{12,}")
_URL = re.compile(r"://(?P<user>[^\s/:@]*)(?::(?P<value>\S*))?@")
_PAIR = re.compile(r"(?P<name>[A-Za-z][\w.-]*)(?P<between>=[\"']?|[\"']\s*:\s*[\"'])(?P<value>[^\s&,;\"']+)")
_SHORT = 6  # characters; what is shorter is hidden where its form shows it, not wherever it stands


def is_secret(name: str, value: str) -> bool:
    """Whether a flag, key or variable of this name holds a secret: ``password``, ``--config.data.token``, ..."""
    word = re.sub(r"(?<=[a-z])(?=[A-Z])|-", "_", name.lstrip("-").rpartition(".")[2]).lower()
    return bool(value) and bool(_SECRET.search(word) or (_MAYBE.search(word) and _RANDOM.fullmatch(value)))


def hide(text: str) -> str:
    """The text with *** for each secret."""
    for known in _known(tuple(sys.argv), frozenset(os.environ.items())):
        text = text.replace(known, HIDDEN)

    def pair(found: re.Match[str]) -> str:
        return f"{found['name']}{found['between']}{HIDDEN}" if is_secret(found["name"], found["value"]) else found[0]

    def url(found: re.Match[str]) -> str:
        if found["value"]:
            return f"://{found['user']}:{HIDDEN}@"
        return f"://{HIDDEN}@" if _RANDOM.fullmatch(found["user"]) else found[0]

    return _PAIR.sub(pair, _URL.sub(url, text))


def command(argv: Sequence[str]) -> list[str]:
    """The arguments of a command, with *** for each secret."""
    shown = []
    for before, argument in zip(["", *argv], argv, strict=False):
        flag, equals, value = argument.partition("=")
        if equals and is_secret(flag, value):
            shown.append(f"{flag}={HIDDEN}")
        elif before.startswith("-") and "=" not in before and is_secret(before, argument):
            shown.append(HIDDEN)
        else:
            shown.append(hide(argument))
    return shown


def hide_setting(name: str, value: Any) -> Any:
    """The value of a config's key, to be shown."""
    if not isinstance(value, str):
        return value
    return HIDDEN if is_secret(name, value) else hide(value)


def refuse(config: Any, path: str = "config", within: bool = False) -> None:
    """
    Args:
      config: plain data; a name with dots in it is a key with what a sweep tries for it.
      within: everything in it is a value of ``path``.

    Raises:
      UserError: it holds a secret, which ``config.json`` and pages would show.
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            dotted = "." in str(name) and is_secret(str(name), HIDDEN)
            refuse(value, path if within else f"{path}.{name}", within or dotted)
    elif isinstance(config, (list, tuple)):
        for value in config:
            refuse(value, path, within)
    elif isinstance(config, str) and (is_secret(path, config) or any(_inside(config))):
        raise UserError(
            f"{path} holds a secret, which the run's folder would keep in config.json and show in its report; let the "
            "code that needs it read it from an environment variable."
        )


def child(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """A command like ``argv`` for a process of ours, and variables of its environment: every user of a machine can read
    the arguments of every process, but not the environment."""
    shown = command(argv)
    return (list(argv), {}) if shown == list(argv) else (shown, {_ARGUMENTS: json.dumps(list(argv[1:]))})


def receive() -> None:
    """In a process that ``child`` has started: makes ``sys.argv`` what it was meant to be."""
    if _ARGUMENTS in os.environ:
        sys.argv[1:] = json.loads(os.environ.pop(_ARGUMENTS))


def print_exception(kind: type[BaseException], error: BaseException | None, trace: Any) -> None:
    """A ``sys.excepthook`` without secrets; also for threads."""
    if kind is SystemExit:
        return
    sys.stderr.write(hide("".join(traceback.format_exception(kind, error, trace))))
    sys.stderr.flush()


def _inside(value: str) -> Iterator[str]:
    """Secrets in a value: passwords of URLs, and those of names in it."""
    for found in _URL.finditer(value):
        if found["value"]:
            yield found["value"]
        elif _RANDOM.fullmatch(found["user"]):
            yield found["user"]
    yield from (found["value"] for found in _PAIR.finditer(value) if is_secret(found["name"], found["value"]))


@functools.lru_cache(maxsize=1)
def _known(argv: tuple[str, ...], env: frozenset[tuple[str, str]]) -> list[str]:
    """Secrets of a process's arguments and environment, as they are and as URLs and drivers write them."""
    given = [argument.partition("=")[::2] for argument in argv]
    given += [*itertools.pairwise(argv), *((name, v) for name, v in env if name not in ("PWD", "OLDPWD"))]
    found: set[str] = set()
    for name, value in given:
        found |= {value} if is_secret(name, value) else set(_inside(value))
    forms = (str, urllib.parse.unquote, urllib.parse.unquote_plus, urllib.parse.quote, urllib.parse.quote_plus)
    known = {form(value) for value in found for form in forms}
    return sorted((value for value in known if len(value) >= _SHORT), key=len, reverse=True)
