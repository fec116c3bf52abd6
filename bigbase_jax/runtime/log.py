"""What a person sees while a run runs: lines or a progress bar on stderr, ``metrics.jsonl``, TensorBoard, W&B, MLflow.

The host never waits for the newest step: the sums of a step are kept on the device, and an interval is fetched at once
after the first step of the next one is dispatched. Sums are merged in float64, so a row holds the exact mean over all
examples of its interval.

``metrics.jsonl`` holds one JSON object a line, each with ``step`` and ``kind``:

- ``train``: ``epoch``, one mean per sum (``loss``, ...), ``examples_per_second``, ``step_seconds``, ``data_wait``
  (share of the time, 0 to 1), ``mfu`` (where the device's peak is known), ``memory_gb`` (peak so far, 1e9 bytes),
  ``seconds`` (of all starts of the run together);
- ``eval``: ``split``, ``seconds``, and every metric, nested ones whole;
- ``compile``: ``compile_seconds``; ``diverged``: the ``loss`` that ended the run.

JSON has no token for numbers that are not finite: they are the strings "nan", "inf" and "-inf".

However often a run is killed and started again, its rows are those of one that never was, but for what they say of
time and memory: what follows the checkpoint is dropped, and the checkpoint holds the sums of an interval in progress.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib
import json
import math
import os
import pathlib
import re
import resource
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import PyTree, Sum, UserError, flatten
from bigbase_jax.runtime import chips, redact

PLAIN = "BIGBASE_PLAIN"
"""Environment variable: anything but "" or "0" means plain lines also on a terminal."""

_live: Any = None  # the console of the progress bar on screen


class Diverged(UserError):
    """The loss or the parameters became NaN or infinite.

    Attributes:
      step: the first step at which that was seen.
    """

    def __init__(self, step: int, what: str):
        self.step = step
        super().__init__(
            f"{what} at step {step}; lower the learning rate (config.optim.learning_rate) or clip gradients "
            "(config.optim.clip_norm)."
        )


def say(text: str) -> None:
    """Prints one line for a person on stderr, above the progress bar if there is one; of several processes, once."""
    if jax.distributed.is_initialized() and jax.process_index():
        return
    text = redact.hide(text)
    with contextlib.suppress(OSError):  # nobody reads any more
        if _live is not None:
            _live.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


class Log:
    """The log of one start of a run. Process 0 writes; all processes read, so that all stop together.

    Args:
      workdir: the run folder; ``metrics.jsonl`` and ``tensorboard/`` are in it.
      total_steps: the last step of the run.
      every: steps between rows.
      start_step: the step that this start goes on from; what an earlier start logged after it is dropped.
      interval: what ``interval()`` told of the interval that was in progress at that step; None: nothing.
      steps_per_epoch: to show epochs; None: not shown.
      batch_size: examples per step over all devices; 0: examples/s is not shown.
      writers: besides metrics.jsonl, any of "tensorboard", "wandb", "mlflow". W&B stays offline unless WANDB_MODE says
        otherwise; MLflow writes to ``workdir/mlruns`` unless MLFLOW_TRACKING_URI says otherwise.
      name: of the run, for the writers.
      config: of the run, for the writers.
      devices: how many devices a step runs on; None: all.
      plain: lines instead of a progress bar; None: unless stderr is a terminal (see ``PLAIN``).

    Raises:
      UserError: an unknown writer, one whose package is missing, or a folder that cannot be written.
    """

    def __init__(
        self,
        workdir: str,
        total_steps: int,
        every: int = 50,
        start_step: int = 0,
        interval: Mapping[str, Any] | None = None,
        steps_per_epoch: float | None = None,
        batch_size: int = 0,
        writers: tuple[str, ...] = ("tensorboard",),
        name: str = "",
        config: Mapping[str, Any] | None = None,
        devices: int | None = None,
        plain: bool | None = None,
    ):
        self._total, self._every, self._start = total_steps, max(1, every), start_step
        self._steps_per_epoch, self._batch_size = steps_per_epoch, batch_size
        self._peak = (peak_flops() or 0.0) * (devices or jax.device_count())
        self._rows: _Rows | None = None
        self._writers: dict[str, _Writer] = {}
        for writer in writers:
            if writer not in _WRITERS:
                raise UserError(f"config.train.writers names {writer!r}.{suggest(writer, _WRITERS, 'writer')}")
        if jax.process_index() == 0:
            self._rows = _Rows(os.path.join(workdir, "metrics.jsonl"), start_step)
            for writer in writers:
                with _disk(f"{workdir}/{writer}"):
                    self._writers[writer] = _WRITERS[writer](workdir, name, config or {}, start_step)
        self._seconds_before = self._rows.seconds if self._rows else 0.0

        self._pending: list[tuple[int, Mapping[str, Sum]]] = []  # dispatched, not yet read
        begun = interval or {"sums": {}, "steps": 0, "seconds": 0.0, "waited": 0.0}
        self._merged: dict[str, tuple[Any, Any]] = {  # total and weight of what was read of the interval
            name: (np.asarray(total, np.float64), np.asarray(weight, np.float64))
            for name, (total, weight) in begun["sums"].items()
        }
        self._read_steps, self._last_read = begun["steps"], start_step
        self._began = time.perf_counter()
        self._paused = self._waited = 0.0
        self._frozen: float | None = None  # the training seconds at the start of the pause that lasts
        # Training seconds and data wait at the last row.
        self._mark = (self._training_seconds() - begun["seconds"], -begun["waited"])
        self._closed = False
        if plain is None:
            plain = os.environ.get(PLAIN, "0") not in ("", "0") or not sys.stderr.isatty()
        self._bar = None if plain or jax.process_index() else _Bar(total_steps, start_step)

    # ------------------------------------------------------------------------------------------------- training

    def step(self, step: int, sums: Mapping[str, Sum], flops: float = 0.0, **extras: float) -> None:
        """Keeps the sums of a step that was just dispatched, and logs the interval that ended with the one before.

        The host is held back only where it would run more than two steps ahead of the device.

        Args:
          step: its number, from 1.
          sums: of the step, on the device.
          flops: floating-point operations of the step over all devices; 0: unknown.
          **extras: floats of the host, averaged over the interval like the sums.

        Raises:
          Diverged: the loss of a step of that interval is NaN or infinite.
          UserError: the disk is full.
        """
        extras["flops"] = flops
        hosted = {name: Sum(np.asarray(value, np.float64), np.ones(())) for name, value in extras.items()}
        self._pending.append((step, {**sums, **hosted}))
        if len(self._pending) > 2:
            jax.block_until_ready(self._pending[-3][1])
        if self._ends_interval(step - 1):
            self._read(step - 1)
        if self._bar is not None:
            self._bar.step(step)

    def check(self, step: int, last: bool = False) -> None:
        """Waits for everything up to ``step`` and verifies it, as before a checkpoint.

        Args:
          last: no step follows: logs the interval that has not ended, too.

        Raises:
          Diverged: the loss of a step up to it is NaN or infinite.
        """
        self._read(step)
        if last and self._read_steps:
            self._row()

    def interval(self) -> dict[str, Any]:
        """The interval that has not ended, up to the step that was checked, as plain data that loses no bit in JSON."""
        seconds, waited = self._training_seconds() - self._mark[0], self._waited - self._mark[1]
        return jsonable({"sums": self._merged, "steps": self._read_steps, "seconds": seconds, "waited": waited})

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Around ``next(data)``: time that the device may have stood still for want of data.

        Nothing is counted while the device still has a step to do, so this is an upper bound that is zero where the
        pipeline keeps up.
        """
        began = time.perf_counter()
        yield
        if not self._busy():
            self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around evaluations and checkpoints, which do not count in examples/s. First the device finishes its steps."""
        if self._pending:
            jax.block_until_ready(self._pending[-1][1])
        began = time.perf_counter()
        self._frozen = self._training_seconds()
        try:
            yield
        finally:
            self._frozen = None
            self._paused += time.perf_counter() - began

    def compiled(self, seconds: float) -> None:
        """Says how long the training step took to compile; the first start of a run logs it."""
        say(f"compiled the training step in {seconds:.1f} s")
        if self._rows is not None and self._rows.empty:
            self._write({"step": self._start, "kind": "compile", "compile_seconds": seconds})

    # ------------------------------------------------------------------------------------------------- evaluation

    def metrics(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Logs an evaluation: everything to metrics.jsonl, the scalars among it to the writers and the screen.

        Raises:
          Diverged: the loss of a step up to it is NaN or infinite.
        """
        self._read(step)
        self._write({"step": step, "kind": "eval", "split": split, "seconds": self._seconds(), **metrics})
        scalars = {name: float(value) for name, value in metrics.items() if _is_scalar(value)}
        self._scalars(step, split, scalars)
        if jax.process_index() == 0:
            say(f"{split} @ {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in scalars.items()))

    # ------------------------------------------------------------------------------------------------- the end

    def close(self) -> None:
        """Reads everything so far, and gives up the screen, files and writers; closing twice does nothing.

        An interval that has not ended is not logged: the next start goes on with it.

        Raises:
          Diverged: the loss of a step so far is NaN or infinite.
        """
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as stack:
            for part in (self._rows, *self._writers.values(), self._bar):
                if part is not None:
                    stack.callback(part.close)
            if self._pending:
                self._read(self._pending[-1][0])

    # ------------------------------------------------------------------------------------------------- inside

    def _ends_interval(self, step: int) -> bool:
        return step > self._start and (step % self._every == 0 or step == self._total)

    def _busy(self) -> bool:
        """Whether the device surely has something to do."""
        if not self._pending:
            return False
        leaves = jax.tree.leaves(self._pending[-1][1])
        return not all(leaf.is_ready() for leaf in leaves if hasattr(leaf, "is_ready"))

    def _read(self, upto: int) -> None:
        """Fetches the steps up to ``upto`` in one go; writes the row if it ends an interval."""
        due = [(step, sums) for step, sums in self._pending if step <= upto]
        self._pending = [(step, sums) for step, sums in self._pending if step > upto]
        for step, sums in jax.device_get(due):
            loss = sums.get("loss")
            if loss is not None and not np.all(np.isfinite(loss.total)):
                self._pending = []
                value = float(np.sum(loss.total))
                if self._read_steps:
                    self._row()
                self._write({"step": step, "kind": "diverged", "loss": value, "seconds": self._seconds()})
                raise Diverged(step, f"the loss became {value}")
            for name, (total, weight) in sums.items():
                before = self._merged.get(name, (0.0, 0.0))
                self._merged[name] = (
                    before[0] + np.asarray(total, np.float64),
                    before[1] + np.asarray(weight, np.float64),
                )
            self._last_read = step
            self._read_steps += 1
        if due and self._ends_interval(upto):
            self._row()

    def _row(self) -> None:
        """Writes the row of the steps read since the last one."""
        step, steps = self._last_read, self._read_steps
        training, waited = self._training_seconds(), self._waited
        seconds = max(training - self._mark[0], 1e-9)
        flops, _ = self._merged.pop("flops", (0.0, 0.0))
        weighed = {name: (total, weight) for name, (total, weight) in self._merged.items() if np.all(weight != 0)}
        weighed = {name: weighed[name] for name in sorted(weighed, key=lambda name: name != "loss")}  # the loss first
        row: dict[str, Any] = {name: (total / weight).tolist() for name, (total, weight) in weighed.items()}
        if self._batch_size:
            row["examples_per_second"] = self._batch_size * steps / seconds
        row["step_seconds"] = seconds / steps
        row["data_wait"] = min(1.0, max(0.0, (waited - self._mark[1]) / seconds))
        if flops and self._peak:
            row["mfu"] = float(flops) / seconds / self._peak
        row["memory_gb"] = memory_gb()
        epoch = {} if not self._steps_per_epoch else {"epoch": step / self._steps_per_epoch}
        self._write({"step": step, **epoch, "kind": "train", **row, "seconds": self._seconds()})
        self._scalars(step, "train", {name: value for name, value in {**epoch, **row}.items() if _is_scalar(value)})
        self._merged, self._read_steps, self._mark = {}, 0, (training, waited)
        if self._bar is not None:
            self._bar.row(row)
        elif jax.process_index() == 0:
            say(self._line(step, {**epoch, **row}))

    def _line(self, step: int, row: Mapping[str, Any]) -> str:
        parts = [f"step {step}/{self._total}"]
        if "epoch" in row:
            parts.append(f"epoch {row['epoch']:.2f}")
        if "loss" in row:
            parts.append(f"loss {row['loss']:.4f}")
        if "learning_rate" in row:
            parts.append(f"learning rate {row['learning_rate']:.3g}")
        if "examples_per_second" in row:
            parts.append(f"{_rate(row['examples_per_second'])} examples/s")
        parts.append(f"data wait {100 * row['data_wait']:.1f} %")
        if "mfu" in row:
            parts.append(f"MFU {100 * row['mfu']:.1f} %")
        parts.append(f"memory {row['memory_gb']:.1f} GB")
        if step < self._total:
            per_step = (time.perf_counter() - self._began) / max(1, step - self._start)
            parts.append(f"eta {duration(per_step * (self._total - step))}")
        return "  ".join(parts)

    def _training_seconds(self) -> float:
        """Seconds since the start without the pauses; it stands still during one."""
        return self._frozen if self._frozen is not None else time.perf_counter() - self._began - self._paused

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._began

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._rows is not None:
            self._rows.write(row)

    def _scalars(self, step: int, prefix: str, scalars: Mapping[str, float]) -> None:
        for name, writer in self._writers.items():
            with _disk(name):
                writer.scalars(step, {f"{prefix}/{name}": value for name, value in scalars.items()})


# ----------------------------------------------------------------------------------------------------- metrics.jsonl


class _Rows:
    """``metrics.jsonl``, open for appending; opening cuts off the rows after ``start_step`` and half a row at the end.

    Rows are in the order of their steps, so the place to cut is found by halving: a long log opens as fast as a short.

    Attributes:
      empty: there was no row.
      seconds: of the last row that was kept.
    """

    def __init__(self, path: str, start_step: int):
        self.path = path
        with _disk(path):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115
            bytes_ = range(self._file.seek(0, os.SEEK_END) + 1)
            place = bisect.bisect_left(bytes_, True, key=lambda place: self._follows(place, start_step))
            self._file.seek(max(0, place - 1))  # the beginning of the last row to keep
            last = _parse(self._file.readline()) if place else None
            self._file.truncate(self._file.tell())
        self.empty = last is None
        self.seconds = float((last or {}).get("seconds", 0.0))

    def _follows(self, place: int, step: int) -> bool:
        """Whether the first whole row that begins at this byte or later is of a later step, or there is none."""
        self._file.seek(max(0, place - 1))
        if place:
            self._file.readline()
        rows = (_parse(line) for line in self._file if line.endswith(b"\n"))
        row = next((row for row in rows if row is not None), None)
        return row is None or row.get("step", 0) > step

    def write(self, row: Mapping[str, Any]) -> None:
        with _disk(self.path):
            self._file.write(json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # all rows were flushed, or ``write`` has said why not
            self._file.close()


@contextlib.contextmanager
def _disk(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; make room or permit writing there, then repeat the "
            "command, which goes on from the last checkpoint."
        ) from error


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl`` that may still be written to; lines that are not whole are left out."""
    try:
        with open(path, "rb") as file:
            rows = [_parse(line) for line in file]
    except FileNotFoundError:
        return []
    return [row for row in rows if row is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def jsonable(value: Any) -> Any:
    """Plain JSON data: arrays as lists, and floats that are not finite as the strings "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return jsonable(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


# ----------------------------------------------------------------------------------------------------- the screen


class _Bar:
    """A progress bar on stderr; ``say`` prints above it."""

    def __init__(self, total: int, start: int):
        from rich import progress
        from rich.console import Console

        global _live
        console = Console(stderr=True)
        self._progress = progress.Progress(
            progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.description}"),
            progress.TextColumn("eta"),
            progress.TimeRemainingColumn(compact=True),
            console=console,
            refresh_per_second=4,
            redirect_stdout=False,
        )
        self._task = self._progress.add_task("", total=total, completed=start)
        self._progress.start()
        _live = console

    def step(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def row(self, row: Mapping[str, Any]) -> None:
        parts = [f"loss {row['loss']:.4f}"] if "loss" in row else []
        parts += [f"{_rate(row['examples_per_second'])} examples/s"] if "examples_per_second" in row else []
        parts += [f"waiting for data {100 * row['data_wait']:.0f} %"] if row["data_wait"] >= 0.02 else []
        self._progress.update(self._task, description="  ".join(parts))

    def close(self) -> None:
        global _live
        _live = None
        with contextlib.suppress(OSError):
            self._progress.stop()


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """``"2:15"`` or ``"1:02:15"``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:.0f}:{minutes:02.0f}:{seconds:02.0f}" if hours else f"{minutes:.0f}:{seconds:02.0f}"


def engineering(value: float, digits: int = 4) -> str:
    """``"1.234 G"``: what comes before a unit."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.{digits}g} {prefix}"
    return f"{value:.{digits}g} "


# ----------------------------------------------------------------------------------------------------- writers


class _Writer(Protocol):
    """Takes scalars by ``"split/name"``."""

    def __init__(self, workdir: str, name: str, config: Mapping[str, Any], start_step: int) -> None: ...

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def tensorboard() -> tuple[Any, Any, Any]:
    """Modules of tensorboardX, which imports torch where it finds it: seconds, and memory that nothing here uses."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        from tensorboardX import event_file_writer, proto, summary
    finally:
        if hidden:
            del sys.modules["torch"]
    return event_file_writer, proto, summary


class _TensorBoard:
    """Without tensorboardX's own thread: where the disk is full it dies, and training then waits for it for ever."""

    def __init__(self, workdir: str, name: str, config: Mapping[str, Any], start_step: int):
        event_file_writer, proto, summary = tensorboard()
        self._proto, self._scalar = proto.event_pb2, summary.scalar
        folder = os.path.join(workdir, "tensorboard")
        os.makedirs(folder, exist_ok=True)
        self._file = event_file_writer.EventsWriter(os.path.join(folder, "events"))
        began = self._proto.SessionLog(status=self._proto.SessionLog.START)  # what an earlier start wrote after it goes
        self._write(start_step + 1, session_log=began)

    def _write(self, step: int, **what: Any) -> None:
        self._file.write_event(self._proto.Event(step=step, wall_time=time.time(), **what))

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            if math.isfinite(value):
                self._write(step, summary=self._scalar(name, value))
        self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


class _Wandb:
    def __init__(self, workdir: str, name: str, config: Mapping[str, Any], start_step: int):
        wandb = _optional("wandb")
        file = pathlib.Path(workdir, "wandb-id.txt")
        identity = _earlier(file, start_step) or secrets.token_hex(8)
        file.write_text(identity + "\n")
        with _starting("wandb"):
            self._run = wandb.init(
                project="bigbase_jax",
                name=name or None,
                dir=workdir,
                config=jsonable(config),
                mode=os.environ.get("WANDB_MODE") or "offline",
                id=identity,
                resume="allow",
            )

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, workdir: str, name: str, config: Mapping[str, Any], start_step: int):
        local = not os.environ.get("MLFLOW_TRACKING_URI")
        if local:  # MLflow 3 asks for this where no database is installed
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._mlflow = _optional("mlflow")
        with _starting("mlflow"):
            if local:
                self._mlflow.set_tracking_uri(pathlib.Path(workdir, "mlruns").absolute().as_uri())
            self._mlflow.set_experiment("bigbase_jax")
            file = pathlib.Path(workdir, "mlflow-id.txt")
            run_id = _earlier(file, start_step)
            run = self._mlflow.start_run(run_id=run_id, run_name=None if run_id else name or None)
            if run_id is None:
                file.write_text(run.info.run_id + "\n")
                self._mlflow.log_dict(jsonable(config), "config.json")

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(scalars), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_WRITERS: dict[str, type[_Writer]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow}


def _optional(package: str) -> Any:
    """The package of an extra of the same name."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"config.train.writers names {package!r}, which is not installed; pip install 'bigbase_jax[{package}]', "
            "or leave it out."
        ) from error


@contextlib.contextmanager
def _starting(writer: str) -> Iterator[None]:
    """A service that does not answer, or a missing login, is the user's to mend."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"the writer {writer!r} does not start ({error}); mend its settings, or drop it from config.train.writers."
        ) from error


def _earlier(file: pathlib.Path, start_step: int) -> str | None:
    """The id under which an earlier start of this run reported; none for a run that begins anew."""
    return (file.read_text().strip() or None) if start_step and file.exists() else None


# --------------------------------------------------------------------------------------------- the machine, the model


def peak_flops(device: Any = None) -> float | None:
    """Peak dense 16-bit FLOP/s of a device (None: the first); None where it is not known."""
    return chips.peak_flops((device or jax.devices()[0]).device_kind)


def memory_gb() -> float:
    """Peak memory so far in 1e9 bytes: of the fullest local device where it tells, else of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def environment_lines() -> list[str]:
    """What this machine is: devices, JAX and Python versions, cores and memory."""
    devices = jax.devices()
    device = f"{len(devices)} x {devices[0].device_kind}" if len(devices) > 1 else devices[0].device_kind
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    peak = peak_flops()
    details = [jax.default_backend()]
    details += [f"{limit / 1e9:.0f} GB each" if len(devices) > 1 else f"{limit / 1e9:.0f} GB"] if limit else []
    details += [f"peak {peak / 1e12:.0f} TFLOP/s in 16 bit"] if peak else []
    details += [f"{jax.process_count()} processes"] if jax.process_count() > 1 else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    python = ".".join(map(str, sys.version_info[:3]))
    return [
        f"devices: {device} ({', '.join(details)})",
        f"host: {cores} cores, {memory:.0f} GB memory; JAX {jax.__version__}, Python {python}",
    ]


def model_table(
    params: PyTree, flops_per_example: float | None = None, rows: int = 32, frozen: PyTree | None = None
) -> str:
    """A table of a model's parameters, one line per module, alike neighbours (``block0``, ``block1``) in one.

    Args:
      params: those that are trained: arrays, or anything with ``shape`` and ``dtype``.
      flops_per_example: of the forward pass of one example, for the last line.
      rows: modules are shown to a depth of two, or of one where that gives more lines than this.
      frozen: parameters that are not trained, which are counted alone; None or empty: there are none.
    """
    leaves = flatten(params)
    for depth in (2, 1):
        groups: dict[str, dict[str, Any]] = {}
        for path, leaf in leaves.items():
            *modules, name = path.split(".")
            module = ".".join(modules[:depth]) or name
            groups.setdefault(module, {})[".".join([*modules[depth:], name])] = leaf
        lines = _alike(groups)
        if len(lines) <= rows:
            break
    parts = {"trained": params, "frozen": frozen} if jax.tree.leaves(frozen) else {}
    sizes = {name: _size(tree) for name, tree in {**parts, "total": (params, frozen)}.items()}
    width = max(map(len, ["module", *(name for name, _, _ in lines), *sizes]))
    counts = max(len("parameters"), len(f"{sizes['total'][0]:,}"))
    table = [f"{'module':<{width}}  {'parameters':>{counts}}  shapes"]
    table += [f"{name:<{width}}  {count:>{counts},}  {shapes}" for name, count, shapes in lines]
    table += [f"{name:<{width}}  {count:>{counts},}  {nbytes / 1e6:,.2f} MB" for name, (count, nbytes) in sizes.items()]
    if flops_per_example:
        table += [f"forward pass: {engineering(flops_per_example, 3)}FLOPs per example"]
    return "\n".join(table)


def _size(params: PyTree) -> tuple[int, int]:
    """How many numbers, and bytes."""
    leaves = jax.tree.leaves(params)
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    return count, sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def _alike(groups: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, int, str]]:
    """Name, parameter count and shapes per line; neighbours that differ by a number only share a line."""
    lines: list[tuple[str, int, str]] = []
    previous: tuple[Any, ...] | None = None
    first, times = "", 0
    for module, arrays in groups.items():
        shapes = {name: tuple(leaf.shape) for name, leaf in arrays.items()}
        count = sum(math.prod(shape) for shape in shapes.values())
        signature = (re.sub(r"\d+", "#", module), tuple(shapes.items()))
        if len(shapes) <= 3:
            text = ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in shapes.items())
        else:
            name, shape = max(shapes.items(), key=lambda item: math.prod(item[1]))
            text = f"{len(shapes)} arrays, largest {name} {'x'.join(map(str, shape))}"
        if signature == previous:
            times += 1
            lines[-1] = (f"{first} ... {module}", count * times, f"{times} x ({text})")
        else:
            previous, first, times = signature, module, 1
            lines.append((module, count, text))
    return lines
