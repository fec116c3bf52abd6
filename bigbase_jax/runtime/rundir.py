"""The run folder: everything one run knows of itself, readable without the package.

``config.json`` the config as it was run; ``lineage.json`` where it comes from: the data, and of each start that trained
the command, commit, versions, devices, first and last step and how it ended; ``data.json`` what predicting needs to
know of the data; ``start/`` what was kept of ``config.init_from`` and of a teacher; ``metrics.jsonl`` the log;
``tensorboard/``; ``checkpoints/STEP/``; ``eval-SPLIT.json`` and ``predictions-SPLIT.npz`` the last evaluation;
``report.html``; ``reference.npz`` what predictions in service are held against.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bigbase_jax.build import renewed
from bigbase_jax.core import UserError, some
from bigbase_jax.runtime import redact
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.untrusted import read_object
from bigbase_jax.runtime.whole import clean, written

MACHINERY = re.compile(
    r"config\.(train\.(devices|mesh|sharding|watchdog)|data\.(workers|prefetch|cache_dir|cache_limit_gb))\b"
)
"""What a run may change between its starts: where it computes, not what."""
_PACKAGES = (
    "bigbase_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pillow",
    "scikit-learn",
)


_BEFORE_A_RUN = re.compile(r"\..*|lost\+found|output\.txt|.*\.(log|out|err)")  # what a new run's folder may hold
_LOCK = ".lock"
_locks: set[IO[str]] = set()  # held by this process; a forked one, which may outlive it, lets go of them
os.register_at_fork(after_in_child=lambda: [file.close() for file in _locks])


_ENTRIES = {"segments": "segment_ids", "types": "token_type_ids"}  # what earlier runs called entries of a batch


class InUse(UserError):
    """Another process trains in the folder."""


class RunDir:
    """One run's folder.

    Args:
      workdir: where it is; ``create`` makes it.
    """

    def __init__(self, workdir: str | os.PathLike):
        self.path = pathlib.Path(workdir)

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of numbered checkpoint folders."""
        return self.path / "checkpoints"

    @property
    def begun(self) -> bool:
        """Whether training has left something here that another run would spoil."""
        return any(child.name[0].isdigit() for child in self.checkpoints.glob("*"))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps all but this process (of several, the first stands for all) from training here.

        The folder is made if it is not there, and removed again if nothing was written into it. The operating system
        ends the lock with the process, however that ends; on a network's file system its server does, which may take
        it a while. A file system without locks is said, and nothing is kept.

        Raises:
          InUse: another process trains here: says which.
          UserError: the folder holds what is no run, or cannot be written.
        """
        if jax.process_index():
            yield
            return
        try:
            if not (made := not self.path.exists()) and not self._is_run():
                refuse_filled(self.path, "run")
            self.path.mkdir(parents=True, exist_ok=True)
            file = self._lock()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}.") from error
        with file:
            _locks.add(file)
            try:
                yield
            finally:
                _locks.discard(file)
                with contextlib.suppress(OSError):
                    if os.listdir(self.path) == [_LOCK]:
                        (self.path / _LOCK).unlink()
                        self.path.rmdir() if made else None
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_UN)  # for good, though a process forked just now has not let go of it

    def _is_run(self) -> bool:
        with contextlib.suppress(UserError):
            return {"data", "task", "train"} <= self.config_json().keys()
        return False

    def _lock(self) -> IO[str]:
        """The open file that holds the lock; what this process starts does not inherit it."""
        while True:
            file = open(self.path / _LOCK, "a+")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                who = file.read() or "another process"
                file.close()
                raise InUse(
                    f"{self.path} is in use by {who}; wait for it, stop it, or give this run its own --workdir."
                ) from error
            except OSError as error:
                say(f"{self.path} has no locks ({error.strerror}); see to it that one process at a time trains there.")
                return file
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path / _LOCK)):  # else it was just removed
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()} since {now()} ({_command()})")
                    file.flush()
                    return file
            file.close()

    def refuse_other(self, config: ConfigDict) -> None:
        """
        Raises:
          UserError: the folder holds a run that has begun with another config; lists what differs. Where it computes
            (devices, mesh, caches) may differ. Or the config holds a secret.
        """
        redact.refuse(as_json(config))
        if not self.begun:
            return
        if not (self.path / "config.json").exists():
            raise UserError(f"{self.path} holds checkpoints but no config.json; give this run its own --workdir.")
        differences = [text for text in differing(self.config_json(), as_json(config)) if not MACHINERY.match(text)]
        if differences:
            raise UserError(
                f"{self.path} holds a run with another config ({'; '.join(differences)}); "
                "give this one its own --workdir, or repeat that one's command."
            )

    def create(self, config: ConfigDict, fingerprint: str) -> None:
        """Makes the folder for this config and data; one that has not begun (its command had a mistake) is made anew.

        Raises:
          UserError: it holds a run of another config or of other data, or cannot be written.
        """
        self.refuse_other(config)
        clean(self.path)
        if not self.begun:
            self.write_json("config.json", as_json(config))
        elif self.read_json("lineage.json")["data"]["fingerprint"] != fingerprint:
            raise UserError(
                f"the data changed since the run in {self.path} began; restore it or give this run its own --workdir."
            )

    def keep_data(self, kept: Mapping[str, Any]) -> None:
        """Writes ``data.json``, unless the run has begun with one."""
        if not (self.begun and (self.path / "data.json").exists()):
            self.write_json("data.json", kept)

    def data_json(self) -> dict[str, Any]:
        """What ``keep_data`` has kept, in today's names.

        Raises:
          UserError: there is nothing.
        """
        found = self.read_json("data.json")
        if "facts" in found:
            found["dataset_info"] = found.pop("facts")
        if isinstance(batch := found.get("batch"), dict):
            found["batch"] = {_ENTRIES.get(name, name): shape for name, shape in batch.items()}
        return found

    def config_json(self) -> dict[str, Any]:
        """The config as plain data, in today's names.

        Raises:
          UserError: there is no run here.
        """
        return renewed(self.read_json("config.json", f"{self.path} is not a run folder: it has no config.json"))

    def config(self) -> ConfigDict:
        """The config of the run, ready to build from (what it may name: ``build.locate``).

        Raises:
          UserError: there is no run here, or no config of one.
        """
        found = self.config_json()
        try:
            return ConfigDict(found)
        except (KeyError, TypeError, ValueError) as error:  # a key that no config has
            raise UserError(f"{self.path / 'config.json'} holds no config ({error}).") from error

    def read_json(self, name: str, otherwise: str | None = None) -> dict[str, Any]:
        """
        Raises:
          UserError: the file is missing or broken; see ``untrusted.read_object``.
        """
        try:
            return read_object(self.path / name)
        except FileNotFoundError as error:
            raise UserError(f"{otherwise or f'{self.path} has no {name}'}.") from error

    def write_json(self, name: str, value: Any) -> None:
        """Writes atomically, numbers in full precision; of several processes the first writes.

        Raises:
          UserError: the disk refuses.
        """
        text = json.dumps(value, indent=2, default=_default, ensure_ascii=False)
        self._write(name, lambda file: file.write(text.encode()))

    def write_npz(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes atomically, compressed; of several processes the first writes.

        Raises:
          UserError: the disk refuses.
        """
        self._write(name, lambda file: np.savez_compressed(file, **dict(arrays)))  # type: ignore[arg-type]

    def _write(self, name: str, write: Any) -> None:
        if jax.process_index():
            return
        with written(self.path / name) as file:
            write(file)

    @contextlib.contextmanager
    def training(self, step: int, mesh_devices: int, data: Mapping[str, Any]) -> Iterator[None]:
        """Around the loop that goes on from ``step``: records this start, and the error that ends it, in the lineage.

        The record is the last of ``starts``; what it says of this process stands at the top too.
        """
        if jax.process_index():
            yield
            return
        lineage = self.read_json("lineage.json") if (self.path / "lineage.json").exists() else {}
        before = [start if isinstance(start, dict) else {"started": start} for start in lineage.get("starts", [])]
        here = {
            "command": _command(),
            "git_commit": _git("rev-parse", "HEAD"),
            "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
            "versions": {"python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}},
            "devices": {
                "backend": jax.default_backend(),
                "kind": jax.devices()[0].device_kind,
                "count": mesh_devices,
                "processes": jax.process_count(),
            },
            "host": {"name": socket.gethostname(), "cores": os.cpu_count(), "system": platform.platform()},
        }
        starts = [*before, {"started": now(), "from_step": step, **here}]
        self.write_json("lineage.json", {**here, "data": dict(data), "started": starts[0]["started"], "starts": starts})
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(UserError):  # the disk may be what ended it
                self.ended(None, redact.hide((str(error) or type(error).__name__).splitlines()[0]))
            raise

    def ended(self, step: int | None, how: str, finished: bool = False) -> None:
        """Notes in the lineage how and after which step the last start ended; ``finished``: and the run with it."""
        if jax.process_index() or "finished" in (lineage := self.read_json("lineage.json")):
            return
        last = (lineage.get("starts") or [None])[-1]
        if isinstance(last, dict) and "how" not in last:
            last.update({"ended": now(), "how": how} | ({} if step is None else {"to_step": step}))
        self.write_json("lineage.json", lineage | ({"finished": now()} if finished else {}))


def refuse_filled(folder: pathlib.Path, what: str) -> None:
    """
    Raises:
      UserError: a folder that holds no ``what`` is not empty: its files are somebody's, and not to be written among.
    """
    found = [name for name in sorted(os.listdir(folder)) if not _BEFORE_A_RUN.fullmatch(name)]
    if found:
        held = some(found, 3)
        raise UserError(
            f"{folder} is not empty and holds no {what} ({held} in it); give --workdir a new or an empty folder."
        )


def as_json(config: ConfigDict) -> dict[str, Any]:
    """A config as plain data, tuples as lists, as it reads back from ``config.json``."""
    return json.loads(config.to_json_best_effort())


def differing(old: Any, new: Any, path: str = "config") -> list[str]:
    """``"config.optim.learning_rate is 0.1 there and 0.2 here"`` for each difference."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(set(old) | set(new)):
            if key not in old or key not in new:
                found.append(f"{path}.{key} is {'missing there' if key not in old else 'missing here'}")
            else:
                found += differing(old[key], new[key], f"{path}.{key}")
        return found
    return [] if old == new else [f"{path} is {old!r} there and {new!r} here"]


def _default(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return str(value)


def _command() -> str:
    return shlex.join([os.path.basename(sys.executable), *redact.command(sys.argv)])


def now() -> str:
    """The time, to the second, with its zone."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    """Git's answer about the checkout the package runs from; None outside of one."""
    try:
        here = pathlib.Path(__file__).parent
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
