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
class Answer:
    """What a command said; ``status`` is None if it did not end in time, 127 if there is no such command."""

    status: int | None = 0
    out: str = ""
    err: str = ""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The raw facts.

    Attributes:
      versions: of every installed distribution, by name in lower case with dashes.
      pip, smi: of ``pip check`` and of ``nvidia-smi``, asked for the driver's version.
      stages: what the children could do, by name; where something went wrong: ``{"error": ...}``.
      log: what JAX and its libraries printed meanwhile.
    """

    root: pathlib.Path = pathlib.Path("/")
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pip: Answer = Answer()
    smi: Answer = Answer(127)
    stages: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    log: str = ""

    def text(self, path: str) -> str:
        """The contents of a file of the system, or nothing."""
        try:
            return (self.root / path.lstrip("/")).read_text(errors="replace").strip()
        except OSError:
            return ""

    def cards(self, vendor: str, kind: str) -> int:
        """Cards of a vendor on the PCI bus, with or without a driver; ``kind`` is how their class begins."""
        cards = [f"/{card.relative_to(self.root)}/" for card in self.root.glob("sys/bus/pci/devices/*")]
        return sum(self.text(c + "vendor") == vendor and self.text(c + "class").startswith(kind) for c in cards)

    @property
    def platforms(self) -> list[str]:
        """Of each device that JAX started: "cpu", "gpu", "tpu"."""
        return [device["platform"] for device in self.stages.get("devices", {}).get("devices", ())]

    @property
    def driver(self) -> str:
        """The NVIDIA driver's version, from nvidia-smi or the kernel module."""
        found = re.search(r"Kernel Module\b.*?\s(\d+\.\d+(?:\.\d+)?)", self.text("/proc/driver/nvidia/version"))
        said = self.smi.out.split() if self.smi.status == 0 else []
        return said[0] if said and said[0][0].isdigit() else found.group(1) if found else ""


def look(workdir: str | None) -> Machine:
    """The facts of this machine; takes seconds, and minutes where something hangs."""
    env = dict(os.environ)
    base = os.path.join(env.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bigbase_jax")
    folders = {  # the choices of runtime.compilation and data.cache
        "workdir": workdir or "runs",
        "JAX_COMPILATION_CACHE_DIR": env.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(base, "xla"),
        "BIGBASE_CACHE": env.get("BIGBASE_CACHE") or base,
        **{name: env[name] for name in ("BIGBASE_DATA", "TFDS_DATA_DIR") if env.get(name)},
    }
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        with contextlib.suppress(Exception):  # a half-deleted package has no metadata
            versions.setdefault(re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower(), distribution.version)
    smi = ask(("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"), 30)
    jax, log = attempt(("import", "devices", "collectives", "step", "environment"), folders, 240)
    disk, _ = attempt(("disk",), folders, 60)
    pip = ask((sys.executable, "-m", "pip", "check"), 60)
    return Machine(env=env, versions=versions, pip=pip, smi=smi, stages={**jax, **disk}, log=log)


def ask(command: Sequence[str], limit: float, env: Mapping[str, str] | None = None) -> Answer:
    """What a command says within so many seconds."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env)
        except OSError as error:
            return Answer(127, err=str(error))
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:  # not waited for: what sleeps in a broken driver cannot even be killed
            status = None
            process.kill()
        said = [os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace") for file in (out, err)]
    return Answer(status, *said)


def attempt(
    names: Sequence[str], folders: Mapping[str, str], limit: float, **env: str
) -> tuple[dict[str, dict[str, Any]], str]:
    """What a child could do of these stages of ``stages.py``, one after the other, and what was printed meanwhile."""
    # -P: the script's folder must not become the first on the import path, where its siblings would shadow others.
    command = [sys.executable, "-P", str(pathlib.Path(__file__).with_name("stages.py").absolute())]
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, **env}
    said = ask([*command, json.dumps(folders), *names], limit, env)
    found: dict[str, dict[str, Any]] = {}
    for line in said.out.splitlines():
        found |= json.loads(line)
    if said.status is None:
        found[names[len(found)]] = {"error": f"no answer within {limit:g} s"}
    elif said.status:
        how = f"ended with status {said.status}"
        found[names[len(found)]] = {
            "error": how if said.status > 0 else f"killed by {signal.Signals(-said.status).name}"
        }
    return found, said.err
