"""Predictions in service, sampled into Parquet files: what was answered when, and numbers to watch; contents by choice.

``FOLDER/YYYY-MM-DD/HHMMSS-....parquet``, whole files, the oldest of which are removed by age and size. A row is an
example: ``request`` (the id that the response carries), ``at`` (seconds since 1970), ``model``, ``version``, ``label``
(the answer, where it is one), ``features`` (JSON; see ``features.features``), and, by choice, ``answer`` (JSON).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import random
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from bigbase_jax.core import UserError
from bigbase_jax.ops.features import features
from bigbase_jax.runtime.limits import MOST_BYTES, limit
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.untrusted import open_regular
from bigbase_jax.runtime.whole import written

_TEXTS = ("request", "model", "version", "label", "features", "answer")
_SCHEMA = pa.schema([("at", pa.float64()), *((name, pa.string()) for name in _TEXTS)])
_WAITING = 10_000  # rows that are held, at most, while the disk refuses


@dataclasses.dataclass
class Sampler:
    """Takes predictions, from any thread, and writes a share of them; it never fails a request.

    Attributes:
      folder: where the files go.
      share: of the requests that are kept; 1: all.
      contents: whether answers are kept whole.
      rows, seconds: after which a file is written.
      most_mb, days: of what is kept.
    """

    folder: str | os.PathLike
    share: float = 0.1
    contents: bool = False
    rows: int = 1000
    seconds: float = 60.0
    most_mb: float = 1024.0
    days: float = 30.0

    def __post_init__(self) -> None:
        for name, value, most in (("share", self.share, 1), ("mb", self.most_mb, np.inf), ("days", self.days, np.inf)):
            if not 0 < value <= most:
                raise UserError(f"--samples_{name}={value:g} is not above 0{'' if most > 1 else ' and at most 1'}.")
        self._home = pathlib.Path(self.folder).expanduser()
        try:
            self._home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self._home}: {error.strerror}.") from error
        self._held: list[dict[str, Any]] = []
        self._failed = False
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="samples", daemon=True)
        self._thread.start()

    def wanted(self) -> bool:
        """Whether the next prediction is to be kept: by chance, and while there is room."""
        return random.random() < self.share and len(self._held) < _WAITING

    def keep(
        self,
        request: str,
        model: str,
        version: str,
        inputs: Sequence[Mapping[str, Any]],
        outputs: Sequence[Mapping[str, Any]],
        answers: Sequence[Mapping[str, Any]],
    ) -> None:
        """Takes a prediction: its examples as the model reads them, what it gave of each, and the answers."""
        about = {"request": request, "at": time.time(), "model": model, "version": version}
        if len(answers) == 1 and isinstance(label := answers[0].get("label"), str):
            about["label"] = label
        try:
            if self.contents:
                about["answer"] = json.dumps(answers, ensure_ascii=False, default=str)
            rows = [{**about, "features": json.dumps(features(*pair))} for pair in zip(inputs, outputs, strict=True)]
        except Exception as error:  # of a task that is not foreseen
            if not self._failed:
                say(f"predictions of {model} are not sampled: {error!r}")
            self._failed = True
            return
        with self._lock:
            self._held += rows

    def close(self) -> None:
        """Writes what is held, and ends."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._ended.wait(0.2):
            if len(self._held) >= self.rows or time.monotonic() - began >= self.seconds:
                self._write()
                began = time.monotonic()
        self._write()

    def _write(self) -> None:
        with self._lock:
            rows, self._held = self._held, []
        if not rows:
            return
        now = datetime.datetime.now(datetime.UTC)
        path = self._home / f"{now:%Y-%m-%d}" / f"{now:%H%M%S}-{secrets.token_hex(4)}.parquet"
        try:
            with written(path) as file:
                parquet.write_table(pa.Table.from_pylist(rows, _SCHEMA), file, compression="zstd")
            self._retain()
        except Exception as error:  # the requests go on
            say(f"samples are not kept: {error}")
            with self._lock:
                self._held = (rows + self._held)[:_WAITING]

    def _retain(self) -> None:
        """Removes the oldest files beyond the limits."""
        files = sorted(self._home.glob("*/*.parquet"))
        sizes = {path: path.stat() for path in files}
        kept = sum(about.st_size for about in sizes.values())
        for path, about in sizes.items():
            if kept <= self.most_mb * 1e6 and time.time() - about.st_mtime <= self.days * 86400:
                continue
            kept -= about.st_size
            with contextlib.suppress(OSError):
                path.unlink()
                path.parent.rmdir()  # where it is empty


@dataclasses.dataclass(frozen=True)
class Samples:
    """The latest predictions of a folder.

    Attributes:
      rows: in the order in which they were made: ``request``, ``at``, ``model``, ``version``, ``label``.
      features: f64[M] by name, NaN where a row has none.
    """

    rows: list[dict[str, Any]]
    features: dict[str, np.ndarray]


def read(folder: str | os.PathLike, most: int, model: str | None = None, version: str | None = None) -> Samples:
    """At most so many of the latest rows, of one version of one model.

    Args:
      model: None: the only one there is.
      version: None: the one that made the latest of them.

    Raises:
      UserError: there are none, or of several models, or a file holds something else.
    """
    home = pathlib.Path(folder).expanduser()
    rows: list[dict[str, Any]] = []
    models: set[str] = set()
    for path in sorted(home.glob("*/*.parquet"), reverse=True):
        if len(rows) >= most:
            break
        try:
            with open_regular(path, home) as file:
                if os.fstat(file.fileno()).st_size > limit(MOST_BYTES):
                    raise ValueError("it is too large")
                table = parquet.ParquetFile(file)
                if table.metadata.num_rows > _WAITING:
                    raise ValueError(f"it has more than {_WAITING:,} rows")
                found = table.read([name for name in _SCHEMA.names if name != "answer"]).to_pylist()
            for row in found:
                row["features"] = {str(k): float(v) for k, v in json.loads(row["features"]).items()}
        except (OSError, ValueError, TypeError, AttributeError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{path} holds no samples ({str(error).splitlines()[0]:.200}).") from error
        models |= {row["model"] for row in found}
        found = [row for row in found if model in (None, row["model"])]
        version = version or (found[-1]["version"] if found else None)
        rows = [row for row in found if row["version"] == version] + rows
    if len(models) > 1 and model is None:
        raise UserError(f"{home} holds samples of {', '.join(sorted(map(str, models)))}; choose one by --model=NAME.")
    if not rows:
        what = "no samples" if model is None else f"no samples of {model}{f':{version}' if version else ''}"
        raise UserError(f"{home} holds {what}; --mode=serve --samples={home} writes them.")
    rows = rows[-most:]
    names = dict.fromkeys(name for row in rows for name in row["features"])
    columns = {name: np.array([row["features"].get(name, np.nan) for row in rows]) for name in names}
    return Samples(rows, columns)
