"""The run folder: everything one run knows of itself, readable without the package.

``config.json`` the config as it was run; ``lineage.json`` where it comes from (command, commit, versions, devices,
data); ``data.json`` what predicting needs to know of the data; ``start/`` what was kept of ``config.init_from``;
``metrics.jsonl`` the log; ``tensorboard/``; ``checkpoints/STEP/``; ``eval-SPLIT.json`` and ``predictions-SPLIT.npz``
the last evaluation; ``report.html``.
"""

from __future__ import annotations

import datetime
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
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bigbase_jax import redact
from bigbase_jax.core import UserError
from bigbase_jax.untrusted import read_object
from bigbase_jax.whole import clean, written

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

    def config_json(self) -> dict[str, Any]:
        """The config as plain data.

        Raises:
          UserError: there is no run here.
        """
        return self.read_json("config.json", f"{self.path} is not a run folder: it has no config.json")

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

    def write_lineage(self, mesh_devices: int, data: Mapping[str, Any]) -> None:
        """Records where the run comes from; a resumed run keeps the first start and adds its own."""
        started = _now()
        starts = [started]
        if (self.path / "lineage.json").exists():
            starts = [*self.read_json("lineage.json").get("starts", []), started]
        self.write_json(
            "lineage.json",
            {
                "command": shlex.join([os.path.basename(sys.executable), *redact.command(sys.argv)]),
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
                "data": dict(data),
                "started": starts[0],
                "starts": starts,
            },
        )

    def finish_lineage(self) -> None:
        """Notes when the run ended."""
        self.write_json("lineage.json", {**self.read_json("lineage.json"), "finished": _now()})


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


def _now() -> str:
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
