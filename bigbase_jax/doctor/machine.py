"""The facts that the doctor judges, and how they are gathered: files, packages, nvidia-smi, child processes.

Whatever may hang or crash (starting devices, touching a disk that may be a dead network mount) runs in a child process
with a time limit per stage. Everything that is looked at can be replaced: a root other than ``/``, another environment,
another answer of nvidia-smi.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

US = "bigbase_jax"
JAX_LIMITS = {"import": 120.0, "devices": 180.0, "collectives": 120.0, "cache": 120.0}
DISK_LIMITS = {"workdir": 40.0, "cache": 20.0, "data": 20.0}
"""Seconds that each stage of a child process may take, in their order."""
SMI_LIMIT = 30.0
OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding: a status, one sentence, and where it is wrong the command that mends it."""

    name: str
    status: str
    text: str
    fix: str = ""


@dataclasses.dataclass(frozen=True)
class Package:
    """An installed distribution; ``requires`` are its ``Requires-Dist`` lines."""

    version: str
    requires: tuple[str, ...] = ()
    python: str = ""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command said; ``status`` is None if it did not end in time."""

    status: int | None = 0
    out: str = ""
    err: str = ""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One row of ``nvidia-smi``; memory in MiB."""

    name: str
    memory: int
    used: int
    capability: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Smi:
    """``nvidia-smi``, read; ``error`` is its complaint, ``found`` whether the command exists."""

    found: bool = False
    driver: str = ""
    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Stage:
    """How far a child process came: ``done`` with facts, or ``failed``, ``stuck``, ``died`` with an error.

    ``log`` is the end of its stderr."""

    state: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""
    log: str = ""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The raw facts that the checks judge."""

    root: pathlib.Path = pathlib.Path("/")
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    packages: Mapping[str, Package] = dataclasses.field(default_factory=dict)
    smi: Smi = Smi()
    jax: Mapping[str, Stage] = dataclasses.field(default_factory=dict)
    disk: Mapping[str, Stage] = dataclasses.field(default_factory=dict)
    importable: tuple[str, ...] = ()
    python: str = platform.python_version()
    system: str = ""
    cores: int = 1
    open_files: int | None = None
    shm: int | None = None

    def text(self, path: str) -> str:
        """The contents of a file of the system, or nothing."""
        try:
            return (self.root / path.lstrip("/")).read_text(errors="replace").strip()
        except OSError:
            return ""

    def glob(self, pattern: str) -> list[str]:
        """Files of the system, as absolute names."""
        return sorted("/" + str(p.relative_to(self.root)) for p in self.root.glob(pattern.lstrip("/")))

    def version(self, package: str) -> str:
        """The installed version, or nothing."""
        found = self.packages.get(package)
        return found.version if found else ""

    @property
    def devices(self) -> list[Mapping[str, Any]]:
        """What ``jax.devices()`` gave; empty if it did not get that far."""
        stage = self.jax.get("devices")
        return list(stage.facts.get("devices", ())) if stage and stage.state == "done" else []

    @property
    def in_container(self) -> bool:
        return bool(self.glob("/.dockerenv") or self.glob("/run/.containerenv"))

    @property
    def nvidia_cards(self) -> int:
        """NVIDIA's display and compute cards (PCI class 03) on the bus, with or without a driver."""
        cards = [name.removesuffix("vendor") for name in self.glob("/sys/bus/pci/devices/*/vendor")]
        cards = [card for card in cards if self.text(card + "vendor") == "0x10de"]
        return sum(self.text(card + "class").startswith("0x03") for card in cards)

    @property
    def driver(self) -> str:
        """The NVIDIA driver's version, from nvidia-smi or the kernel module."""
        found = re.search(r"Kernel Module\b.*?\s(\d+\.\d+(?:\.\d+)?)", self.text("/proc/driver/nvidia/version"))
        return self.smi.driver or (found.group(1) if found else "")

    def works_on(self, platform_name: str) -> bool:
        """Whether JAX sees devices of a platform: "gpu", "tpu" or "cpu"."""
        return any(device["platform"] == platform_name for device in self.devices)

    def hides(self, *names: str) -> bool:
        """Whether JAX_PLATFORMS leaves out all of these."""
        asked = [name.strip() for name in self.env.get("JAX_PLATFORMS", "").split(",") if name.strip()]
        return bool(asked) and not set(asked) & set(names)


# ---------------------------------------------------------------------------------------------------------- to look


def look(workdir: str | None) -> Machine:
    """The facts of this machine; takes seconds, and minutes where something hangs."""
    env = dict(os.environ)
    folders = {
        "workdir": workdir or "runs",
        "cache": compilation_cache(env),
        "data": {name: str(folder) for name, folder in data_folders(env).items()},
    }
    child = {**env, "XLA_PYTHON_CLIENT_PREALLOCATE": env.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false")}
    smi = read_smi(ask)  # before JAX takes memory
    return Machine(
        env=env,
        packages=installed(),
        smi=smi,
        jax=watch(_child("jax", folders), JAX_LIMITS, child),
        disk=watch(_child("disk", folders), DISK_LIMITS, env),
        importable=tuple(name for name in ("tensorflow", "torch") if _importable(name)),
        system=f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}".strip(
            ", "
        ),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        open_files=_open_files(),
        shm=_total_space("/dev/shm"),
    )


def installed() -> dict[str, Package]:
    """Every installed distribution, by normalised name; the first on the path wins, as in an import."""
    found: dict[str, Package] = {}
    for distribution in importlib.metadata.distributions():
        with contextlib.suppress(Exception):  # a half-deleted package has no metadata
            name = normal(distribution.metadata["Name"])
            python = next((v for k, v in distribution.metadata.items() if k == "Requires-Python"), "")  # type: ignore
            found.setdefault(name, Package(distribution.version, tuple(distribution.requires or ()), python))
    return found


def compilation_cache(env: Mapping[str, str]) -> str:
    """Where compiled programs are kept: the same choice as ``runtime.compilation.setup``."""
    base = env.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return env.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(base, US, "xla")


def data_folders(env: Mapping[str, str]) -> dict[str, pathlib.Path]:
    """The folders data is looked for in, by the variable that names them."""
    base = env.get("XDG_CACHE_HOME") or "~/.cache"
    folders = {
        "BIGBASE_CACHE": env.get("BIGBASE_CACHE") or os.path.join(base, US),
        "TFDS_DATA_DIR": env.get("TFDS_DATA_DIR") or "~/tensorflow_datasets",
    }
    if env.get("BIGBASE_DATA"):
        folders["BIGBASE_DATA"] = env["BIGBASE_DATA"]
    return {name: pathlib.Path(folder).expanduser() for name, folder in folders.items()}


def settings(env: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that change what JAX does; none that hold addresses or secrets."""
    shown = re.compile(
        r"^(JAX|XLA|NCCL|TPU|BIGBASE|TFDS)_|^(LD_LIBRARY_PATH|LD_PRELOAD|CUDA_VISIBLE_DEVICES|CUDA_HOME|LIBTPU_INIT_ARGS"
        r"|NVIDIA_VISIBLE_DEVICES|TF_CPP_MIN_LOG_LEVEL|PYTHONPATH|OMP_NUM_THREADS|MALLOC_CONF)$"
    )
    hidden = re.compile(r"HOST|ADDRESS|TOKEN|KEY|SECRET|PASS|NAME|PROJECT|USER", re.IGNORECASE)
    return {name: value for name, value in sorted(env.items()) if shown.search(name) and not hidden.search(name)}


def ask(command: Sequence[str], limit: float = SMI_LIMIT) -> Answer | None:
    """What a command says; None if there is no such command.

    A process that sleeps in a broken driver cannot even be killed, so after the limit it is left behind."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    except OSError:
        return None
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        _abandon(process)
        return Answer(None)
    return Answer(process.returncode, out, err)


def read_smi(ask: Callable[[Sequence[str]], Answer | None]) -> Smi:
    """``nvidia-smi``, asked three times: its header tells CUDA, and old drivers do not know ``compute_cap``."""
    header = ask(["nvidia-smi"])
    if header is None:
        return Smi()
    if header.status is None:
        return Smi(found=True, error=f"nvidia-smi did not answer within {SMI_LIMIT:.0f} s")
    if header.status != 0 or "No devices were found" in header.out:
        said = (header.out.strip() or header.err.strip()).splitlines()
        return Smi(found=True, error=said[0] if said else f"nvidia-smi ended with status {header.status}")
    rows = ask(
        ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader,nounits"]
    )
    capabilities = ask(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    found = [line.strip() for line in capabilities.out.splitlines()] if capabilities and not capabilities.status else []
    gpus, driver = [], ""
    for i, line in enumerate(rows.out.splitlines() if rows and rows.status == 0 else ()):
        name, driver, total, used = [cell.strip() for cell in line.split(",")]
        gpus.append(Gpu(name, _whole(total), _whole(used), numbers(found[i]) if i < len(found) else ()))
    cuda = re.search(r"CUDA (?:UMD )?Version:\s*(\d+\.\d+)", header.out)
    return Smi(True, driver, cuda.group(1) if cuda else "", tuple(gpus))


def watch(
    command: Sequence[str], limits: Mapping[str, float], env: Mapping[str, str] | None = None
) -> dict[str, Stage]:
    """Runs a child that prints one JSON line per stage, and never waits longer than each stage's limit.

    Args:
      limits: seconds by stage, in the order in which the child goes through them.

    Returns:
      The stages that were reached; the last one may be ``failed``, ``stuck`` or ``died``.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=env,
            start_new_session=True,
        )
    except OSError as error:
        return {next(iter(limits)): Stage("died", error=str(error))}
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    log: deque[str] = deque(maxlen=400)
    readers = [
        threading.Thread(target=_pump, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=_pump, args=(process.stderr, lambda line: log.append(line or "")), daemon=True),
    ]
    for reader in readers:
        reader.start()
    stages: dict[str, Stage] = {}
    try:
        for name, limit in limits.items():
            try:
                line = lines.get(timeout=limit)
            except queue.Empty:
                stages[name] = Stage("stuck", error=f"no answer within {limit:g} s", log="".join(log))
                break
            if line is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                readers[1].join(2)
                if process.returncode != 0:
                    stages[name] = Stage("died", error=_death(process.returncode), log="".join(log))
                break
            said = json.loads(line)
            stages[name] = Stage(said["state"], said["facts"], said["error"], "".join(log))
    finally:
        _abandon(process)
    return stages


def _child(kind: str, folders: Mapping[str, Any]) -> list[str]:
    """-P: the script's folder must not become the first on the import path, where its siblings would shadow others."""
    script = pathlib.Path(__file__).with_name("stages.py").absolute()
    return [sys.executable, "-P", str(script), kind, json.dumps(folders)]


def _pump(stream: Any, put: Callable[[str | None], None]) -> None:
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            put(line)
    put(None)


def _abandon(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        if process.poll() is None and hasattr(os, "killpg") and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)


def _death(status: int | None) -> str:
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _importable(name: str) -> bool:
    """Whether a package would be found; it is not imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _total_space(folder: str) -> int | None:
    try:
        return shutil.disk_usage(folder).total
    except OSError:
        return None


# ------------------------------------------------------------------------------------------- versions and requirements


def violation(m: Machine, requirement: Any) -> str:
    """What is wrong with a requirement, or nothing."""
    name = normal(requirement.name)
    version = m.version(name)
    if not version:
        return f"{name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{name} {version} is outside of {requirement.specifier}"
    return ""


def closure(m: Machine, requires: Sequence[str]) -> list[str]:
    """The installed packages that these requirements pull in, in breadth-first order."""
    found: list[str] = []
    waiting = deque(normal(r.name) for r in requirements(requires))
    while waiting:
        name = waiting.popleft()
        if name in m.packages and name not in found:
            found.append(name)
            waiting.extend(normal(r.name) for r in requirements(m.packages[name].requires))
    return found


def requirements(lines: Iterable[str], extra: str = "") -> Iterator[Any]:
    """The requirements that apply on this machine: those without an extra, or those that only this extra adds."""
    for line in lines:
        requirement = _packaging("requirements").Requirement(line)
        marker = requirement.marker
        plain = marker is None or marker.evaluate({"extra": ""})
        if (plain and not extra) or (extra and not plain and marker.evaluate({"extra": extra})):
            yield requirement


def allows(specifier: str, version: str) -> bool:
    """Whether a version lies in a range such as ``>=3.11``."""
    return _packaging("specifiers").SpecifierSet(specifier).contains(version, prereleases=True)


def _packaging(module: str) -> Any:
    """``packaging`` comes with our requirements; pip carries a copy for when it does not."""
    try:
        return importlib.import_module(f"packaging.{module}")
    except ImportError:
        return importlib.import_module(f"pip._vendor.packaging.{module}")


def normal(name: str) -> str:
    """A distribution's name as metadata compares it: ``array_record`` is ``array-record``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> tuple[int, ...]:
    """The dotted numbers that a version begins with."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else 0


def plural(number: int, one: str, many: str = "") -> str:
    """``"1 file"``, ``"2 files"``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def amount(value: float) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"
