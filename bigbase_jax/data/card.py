"""What a config says of where a run's data is from: its files' licence, how they were cleaned, and who consents."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from bigbase_jax.core import UserError
from bigbase_jax.runtime.untrusted import read_object

_LICENCE = re.compile(r"(licen[cs]e|copying)\b", re.IGNORECASE)
_LINE = 100  # characters of a licence's first line


def origin(config: Mapping[str, Any]) -> dict[str, str]:
    """Of each file or folder that a ``data`` node names: ``licence``, the first line of the one beside it; ``cleaned``,
    what ``--mode=clean`` says of it; and ``consent`` and ``retention``, the columns by which rows were read."""
    found: dict[str, dict[str, None]] = {}
    for name, value in leaves(config):
        if name in ("consent", "retention"):
            found.setdefault(name, {})[f"by the column {value}"] = None
        elif name in ("root", "path") and os.path.exists(path := os.path.expanduser(value)):
            folder = pathlib.Path(path if os.path.isdir(path) else os.path.dirname(path))
            for key, told in (("licence", _licence(folder)), ("cleaned", _cleaned(folder))):
                if told:
                    found.setdefault(key, {})[told] = None
    return {name: "; ".join(values) for name, values in found.items()}


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The texts of a config by their last name."""
    if isinstance(value, str) and value:
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, key)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part, name)


def _licence(folder: pathlib.Path) -> str | None:
    for path in sorted(folder.iterdir()):
        if _LICENCE.match(path.name) and path.is_file():
            with open(path, encoding="utf-8", errors="replace") as file:
                line = next((line.strip() for line in file.read(4096).splitlines() if line.strip()), "")
            return f"{path.name}: {line[:_LINE]}"
    return None


def _cleaned(folder: pathlib.Path) -> str | None:
    try:
        manifest = read_object(folder / ".clean" / "manifest.json")
        first, *steps = manifest["steps"]
        dropped = [f"{sum(step['dropped'].values()):,} by {step['step']}" for step in steps if step["dropped"]]
        kept = sum(file["rows"] for file in manifest["files"])
        licences = [f"{name} {count:,}" for name, count in manifest["kept"].get("license", {}).items()]
        parts = [f"{kept:,} of {first['rows']:,} documents", *dropped, f"{manifest['forgotten']:,} forgotten"]
        return ", ".join([*parts, *(["licences " + " ".join(licences)] if licences else [])])
    except (OSError, UserError, LookupError, TypeError, ValueError):
        return None
