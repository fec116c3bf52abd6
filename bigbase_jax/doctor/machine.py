"""The facts that the doctor judges: versions, what commands say, and what child processes of ``stages.py`` could do."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Machine:
    """The raw facts.

    Attributes:
      versions: of every installed distribution, by name in lower case with dashes.
      pip: exit status (None: no end in time) and words of ``pip check``.
      stages: what the children could do, by name; where something went wrong: ``{"error": ...}``.
      log: what JAX and its libraries printed meanwhile.
    """

    root: pathlib.Path = pathlib.Path("/")
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pip: tuple[int | None, str] = (0, "")
    stages: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    log: str = ""

    def text(self, path: str) -> str:
        """The contents of a file of the system, or nothing."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return ""

    def cards(self, vendor: str, kind: str) -> int:
        """Cards of a vendor on the PCI bus, with or without a driver; ``kind`` is how their class begins."""
        cards = [str(card.relative_to(self.root)) for card in self.root.glob("sys/bus/pci/devices/*")]
        return sum(self.text(f"{c}/vendor") == vendor and self.text(f"{c}/class").startswith(kind) for c in cards)


def look(workdir: str | None) -> Machine:
    """The facts of this machine; takes seconds, and minutes where something hangs."""
    env = dict(os.environ)
    base = os.path.join(env.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bigbase_jax")
    folders = {  # the choices of runtime.compilation and data.cache
        "workdir": workdir or "runs",
        "JAX_COMPILATION_CACHE_DIR": env.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(base, "xla"),
        "BIGBASE_CACHE": env.get("BIGBASE_CACHE") or base,
    }
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        with contextlib.suppress(Exception):  # a half-deleted package has no metadata
            versions.setdefault(re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower(), distribution.version)
    status, *said = ask((sys.executable, "-m", "pip", "check"), 60)
    jax, log = attempt(("import", "devices", "collectives", "step", "environment"), folders, 240)
    host, _ = attempt(("host",), folders, 60)
    return Machine(env=env, versions=versions, pip=(status, "".join(said).strip()), stages={**jax, **host}, log=log)


def ask(command: Sequence[str], limit: float, env: Mapping[str, str] | None = None) -> tuple[int | None, str, str]:
    """Exit status (None: it did not end within so many seconds), standard output and error of a command."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env)
        status: int | None = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:  # not waited for: what sleeps in a broken driver cannot even be killed
            process.kill()
        said = [os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace") for file in (out, err)]
    return status, said[0], said[1]


def attempt(
    names: Sequence[str], folders: Mapping[str, str], limit: float, **env: str
) -> tuple[dict[str, dict[str, Any]], str]:
    """What a child could do of these stages of ``stages.py``, one after the other, and what was printed meanwhile."""
    # -P: the script's folder must not become the first on the import path, where its siblings would shadow others.
    command = [sys.executable, "-P", str(pathlib.Path(__file__).with_name("stages.py").absolute())]
    status, out, err = ask([*command, json.dumps(folders), *names], limit, {**os.environ, **env})
    found: dict[str, dict[str, Any]] = {}
    for line in out.splitlines():
        found |= json.loads(line)
    if status != 0:
        how = f"no answer within {limit:g} s" if status is None else f"ended with status {status}"
        how = f"killed by {signal.Signals(-status).name}" if status is not None and status < 0 else how
        found[names[len(found)]] = {"error": how}
    return found, err
