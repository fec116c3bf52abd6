"""``python launch.py --config=RECIPE --sweep=FILE``: starts workers on disjoint devices, shows what they do, sums up.

A worker is the same command again, with its place in the environment. The parent computes nothing and touches no
device; what it shows it reads in the study, so that trials of other machines appear too.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from bigbase_jax.core import UserError
from bigbase_jax.runtime import redact, signals
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.rundir import as_json, refuse_filled
from bigbase_jax.runtime.whole import written
from bigbase_jax.sweep import space
from bigbase_jax.sweep.space import Sweep

if TYPE_CHECKING:
    from bigbase_jax.sweep.study import Study

_WORKER = "BIGBASE_SWEEP_WORKER"  # tells a worker its parent's process number
_PATIENCE = 60.0  # seconds for workers to end after a signal, before they are killed
_DEATHS = 5  # of workers in a row, without a trial that ends, after which the sweep stops
_SHOWN = 20  # rows of the final table
_BRIEF = 40  # characters of a value in a line


def default_folder(path: str) -> str:
    """``experiments/STUDY/sweep.py`` -> ``runs/STUDY``; another file's name is added: ``runs/STUDY-random``."""
    file = pathlib.Path(path).resolve()
    return os.path.join("runs", file.parent.name if file.stem == "sweep" else f"{file.parent.name}-{file.stem}")


def run(
    config: ConfigDict,
    path: str,
    workdir: str = "",
    workers: int = 1,
    storage: str | None = None,
    index: int | None = None,
    lost_after: float = 30.0,
) -> int:
    """Does the sweep that the file at ``path`` declares, or goes on with it; prints a JSON line and returns the status.

    Args:
      config: the recipe's, with the command line's overrides.
      workdir: the sweep's folder; "": see ``default_folder``.
      workers: processes on this machine.
      storage: of the study: the URL of a database, or a path; None: a journal file in the folder.
      index: run this one trial here, and nothing else.
      lost_after: seconds after which the silent worker of another machine is given up.

    Raises:
      UserError: whatever the user can mend.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UserError("--sweep needs the package optuna; pip install 'bigbase_jax[sweep]'.")
    sweep = space.load(path)
    space.check(sweep, config)
    from bigbase_jax import pretrained  # these take seconds to import
    from bigbase_jax.sweep import study as studies
    from bigbase_jax.sweep import worker

    folder = pathlib.Path(workdir or default_folder(path))
    if folder.is_dir() and not any(next(folder.glob(w), 0) for w in (studies.JOURNAL, studies.STORAGE, "trial-*")):
        refuse_filled(folder, "sweep")
    redact.refuse(as_json(config))
    redact.refuse(sweep.definition(), "sweep")
    config = pretrained.resolve(config, pretrained.recorded_by_sweep(folder, config))
    drawn = studies.drawn(sweep)
    space.check(sweep, config, drawn)
    if config.get("init_from"):
        space.refuse_of_the_model(sweep, pretrained.FROM_RECIPE, drawn)
    if index is not None and not 0 <= index < sweep.count():
        last = sweep.count() - 1
        raise UserError(f"--sweep_index={index} is not one of the {last + 1} trials, from 0 to {last}.")
    if workers < 1:
        raise UserError(f"--workers={workers} is no number of processes; it must be at least 1.")
    places = _places(workers) if index is None else []
    study = studies.Study(sweep, config, folder, storage, lost_after)
    pretrained.record_by_sweep(folder, config)
    if _WORKER in os.environ or index is not None:
        from bigbase_jax import verbs

        parent = int(os.environ[_WORKER]) if _WORKER in os.environ else None
        status = worker.work(study, config, verbs.train, index, parent)
        if parent is None and index is not None:
            print(json.dumps(_row(study, study.get(index)), ensure_ascii=False), flush=True)
        return status
    return _Parent(study, places).watch()


# ------------------------------------------------------------------------------------------------------------- devices


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a worker computes: variables of its environment, and the processor's cores."""

    env: Mapping[str, str]
    cores: frozenset[int]


def _places(workers: int) -> list[_Place]:
    """Disjoint accelerators, and disjoint cores, for so many workers.

    Raises:
      UserError: there are fewer accelerators than workers.
    """
    kind, devices = _accelerators()
    if devices and len(devices) < workers:
        raise UserError(
            f"--workers={workers} needs as many devices, and there are {len(devices)} {kind}s; use "
            f"--workers={len(devices)} or fewer."
        )
    each = len(devices) // workers
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    places = []
    for i in range(workers):
        share = (
            cores[i * len(cores) // workers : (i + 1) * len(cores) // workers] or cores[i % max(len(cores), 1) :][:1]
        )
        env = {"OMP_NUM_THREADS": str(max(1, len(share)))}
        own = devices[i * each : (i + 1) * each]
        if kind == "GPU":
            env["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        elif kind == "TPU chip":
            bounds = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}.get(each)
            if bounds is None:
                raise UserError(f"--workers={workers} gives each {each} TPU chips; it must be 1, 2, 4 or 8.")
            if workers > 1:
                port = str(8476 + i)
                env |= {"TPU_VISIBLE_DEVICES": ",".join(own), "TPU_VISIBLE_CHIPS": ",".join(own)}
                env |= {"TPU_CHIPS_PER_PROCESS_BOUNDS": bounds, "TPU_PROCESS_BOUNDS": "1,1,1"}
                env |= {"TPU_MESH_CONTROLLER_ADDRESS": f"localhost:{port}", "TPU_MESH_CONTROLLER_PORT": port}
        places.append(_Place(env, frozenset(share)))
    return places


def _accelerators() -> tuple[str, list[str]]:
    """("GPU" or "TPU chip", its names) that JAX would use here, found without starting it; ("", []) on processors."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked in ("", "tpu") and importlib.util.find_spec("libtpu"):
        chips = [p for p in pathlib.Path("/dev").glob("accel*") if re.fullmatch(r"accel\d+", p.name)]
        chips = chips or [p for p in pathlib.Path("/dev/vfio").glob("*") if p.name.isdigit()]
        if chips:
            return "TPU chip", [str(i) for i in range(len(chips))]
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if asked.split(",")[0] in ("", "cuda", "gpu") and any(map(importlib.util.find_spec, plugins)):
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            return "GPU", [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
        count = sum(bool(re.fullmatch(r"nvidia\d+", p.name)) for p in pathlib.Path("/dev").glob("nvidia*"))
        return "GPU", [str(i) for i in range(count)]
    return "", []


# -------------------------------------------------------------------------------------------------------------- parent


class _Child:
    """A worker process, and the lines it wrote to standard error."""

    def __init__(self, index: int, place: _Place):
        self.index, self.place = index, place
        self.lines: list[str] = []
        command, arguments = redact.child([sys.executable, *sys.argv])
        env = {**os.environ, **place.env, **arguments, _WORKER: str(os.getpid()), "BIGBASE_PLAIN": "1"}
        mine = os.sched_getaffinity(0) if place.cores else set()
        try:
            if place.cores:  # inherited: XLA's and the data pipeline's threads are as many as a process's cores
                os.sched_setaffinity(0, place.cores)
            self.process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                process_group=0,  # else the terminal's Ctrl-C would reach it twice
            )
        finally:
            if place.cores:
                os.sched_setaffinity(0, mine)
        self._pump = threading.Thread(target=self._read, daemon=True)
        self._pump.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.lines.append(line.rstrip())

    def mistake(self) -> str:
        """What it said last."""
        self._pump.join(5)
        said = [line for line in self.lines if line.startswith("error: ")] or self.lines or ["it said nothing"]
        return said[-1].removeprefix("error: ")


class _Parent:
    """Starts workers, replaces those that die, and tells what happens."""

    def __init__(self, study: Study, places: list[_Place]):
        self._study, self._places = study, places
        self._seen: dict[int, tuple[str, Any]] = {}
        self._signal: int | None = None
        self._heard = False
        self._children: list[_Child] = []
        self._deaths = 0

    def watch(self) -> int:
        """See ``_watch``; signals go to the workers."""
        with signals.caught(self._forward, self._hear):
            return self._watch()

    def _watch(self) -> int:
        """Until all trials are finished or a signal comes; prints the summary and returns the exit status."""
        from bigbase_jax.sweep.worker import AGAIN

        study, folder = self._study, self._study.folder
        trials = study.trials()
        open_ = sum(not t.state.is_finished() for t in trials)
        say(f"sweep {folder}: {len(trials)} trials, {open_} of them to run with {len(self._places)} workers")
        for trial in trials:
            self._seen[trial.number] = (trial.state.name, trial.user_attrs.get("worker"))
        self._children = [_Child(i, place) for i, place in enumerate(self._places[:open_])]
        mistake, deadline = None, float("inf")
        try:
            while self._children:
                time.sleep(0.5)
                self._tell()
                for child in [c for c in self._children if c.process.poll() is not None]:
                    self._children.remove(child)
                    code = child.process.returncode
                    if code == 2 and mistake is None:
                        mistake, deadline = child.mistake(), time.monotonic() + _PATIENCE
                        self._stop()
                    elif code == AGAIN and not self._signal and mistake is None:
                        self._children.append(_Child(child.index, child.place))
                    elif code not in (0, 2) and not self._signal and mistake is None:
                        mistake = self._died(child)
                        if mistake is not None:
                            self._stop()
                mistake = mistake or self._all_alike()
                if (self._signal or mistake) and deadline == float("inf"):
                    deadline = time.monotonic() + _PATIENCE
                    self._stop()
                if time.monotonic() > deadline:
                    for child in self._children:
                        child.process.kill()
        finally:
            for child in self._children:
                child.process.kill()
        self._tell()
        if mistake is not None:
            raise UserError(mistake)
        return self._sum_up()

    def _hear(self, number: int) -> None:
        again = "; Ctrl-C again ends them at once, without" if number == signal.SIGINT else ""
        if not self._heard:
            say(f"{signal.Signals(number).name}: the workers stop after their steps, with checkpoints{again}")
        self._heard = True

    def _forward(self, number: int, _: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            for child in self._children:
                child.process.kill()
        self._signal = number
        self._stop()

    def _stop(self) -> None:
        for child in self._children:
            if child.process.poll() is None:
                child.process.terminate()

    def _died(self, child: _Child) -> str | None:
        """Replaces a worker that died; after several in a row, says why the sweep stops instead."""
        code = child.process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        number = self._study.note_death(child.process.pid)
        while_ = "" if number is None else f" while it ran trial {number}"
        self._deaths += 1
        if self._deaths >= _DEATHS:
            return f"{_DEATHS} workers died in a row, the last one {how}{while_}: {child.mistake()}"
        say(f"worker {child.index} {how}{while_}; another takes its place")
        if code > 0:
            say("\n".join(child.lines[-20:]))
        self._children.append(_Child(child.index, child.place))
        return None

    def _all_alike(self) -> str | None:
        """The reason that the first three trials to end had in common, if they failed and nothing else has ended."""
        trials = self._study.trials()
        ended = [t for t in trials if t.state.is_finished()]
        reasons = {t.user_attrs.get("reason") for t in ended if t.state.name == "FAIL"}
        if len(ended) < 3 or len(reasons) != 1 or any(t.state.name != "FAIL" for t in ended):
            return None
        if len(ended) == len(trials):
            return None
        return (
            f"the first {len(ended)} trials of {self._study.folder} all failed: {reasons.pop()} Mend that, and give "
            "the sweep a new --workdir."
        )

    def _tell(self) -> None:
        """A line for each trial whose state has changed."""
        trials = self._study.trials()
        for trial in trials:
            state = (trial.state.name, trial.user_attrs.get("worker"))
            if state == self._seen.get(trial.number) or "overrides" not in trial.user_attrs:
                continue
            self._seen[trial.number] = state
            row = _row(self._study, trial)
            owner = trial.user_attrs.get("worker") or {}
            running = row["state"] == "running"
            line = f"trial {trial.number:4d}  {'stopped' if running and owner.get('free') else row['state']:<8}  "
            if running:
                line += f"start {owner['starts']} " if owner.get("starts", 1) > 1 else ""
                line += "  ".join(f"{key}={_brief(value)}" for key, value in row["settings"].items())
            else:
                self._deaths = 0
                line += f"{self._study.sweep.metric} {row['value']:.4g}  " if row["value"] is not None else ""
                line += row.get("reason", "") or f"in {row.get('seconds', 0):.0f} s"
                line += f"  ({self._standing(trials)})"
            say(line)

    def _standing(self, trials: list[Any]) -> str:
        ended = sum(t.state.is_finished() for t in trials)
        best = _best(self._study.sweep, trials)
        return f"{ended} of {len(trials)} ended" + (f"; best {best.value:.4g}: trial {best.number}" if best else "")

    def _sum_up(self) -> int:
        study = self._study
        trials = study.trials()
        rows = [_row(study, trial) for trial in trials]
        best = _best(study.sweep, trials)
        sign = -1 if study.sweep.mode == "max" else 1
        order = {"complete": 0, "pruned": 1, "failed": 2}
        ranked = sorted(rows, key=lambda r: (order.get(r["state"], 3), sign * (r["value"] or 0.0), r["trial"]))
        for line in table(ranked[:_SHOWN], study.sweep.metric):
            say(line)
        states = ("complete", "pruned", "failed", "running", "waiting")
        counts = {name: sum(row["state"] == name for row in rows) for name in states}
        summary = {
            "sweep": str(study.folder),
            "metric": study.sweep.metric,
            "mode": study.sweep.mode,
            "trials": len(rows),
            **counts,
            "best": None if best is None else _row(study, best),
        }
        try:
            with written(study.folder / "summary.json") as file:
                file.write(json.dumps({**summary, "rows": rows}, indent=2, ensure_ascii=False).encode() + b"\n")
        except UserError as error:  # the study has all of it, so a full disk is only said
            say(str(error))
        stopped = self._signal if counts["running"] + counts["waiting"] else None
        if stopped:
            say(f"stopped by {signal.Signals(stopped).name}; the same command continues from there")
            summary["signal"] = stopped
        print(json.dumps(summary, ensure_ascii=False), flush=True)
        return 128 + stopped if stopped else 0 if counts["complete"] else 1


def _best(sweep: Sweep, trials: list[Any]) -> Any:
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    return (max if sweep.mode == "max" else min)(complete, key=lambda t: t.value, default=None)


def _settings(sweep: Sweep, trial: Any) -> dict[str, Any]:
    """What was chosen, under short values: numbers and the names of choices; else the overrides."""
    params = trial.params if space.SETTING not in trial.params else trial.user_attrs.get("overrides", {})
    chosen = {key: value for name, value in params.items() if not sweep.fixes(key := space.key_of(name))}
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in chosen.items()}


def _brief(value: Any) -> str:
    """A value, such as a list of transforms, in as many characters as a line has for it."""
    text = str(value)
    return text if len(text) <= _BRIEF else f"{text[: _BRIEF - 3]}..."


def _row(study: Study, trial: Any) -> dict[str, Any]:
    """One trial as plain data."""
    names = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
    kept = ("mean", "std", "interval", "values", "reason", "seconds", "overrides")
    return {
        "trial": trial.number,
        "state": names[trial.state.name],
        "value": trial.value if trial.state.name in ("COMPLETE", "PRUNED") else None,
        "folder": str(study.path(trial.number)),
        "settings": _settings(study.sweep, trial),
        **{key: trial.user_attrs[key] for key in kept if key in trial.user_attrs},
        "evaluations": len(trial.intermediate_values),
    }


def table(rows: list[dict[str, Any]], metric: str) -> Iterator[str]:
    """Lines of a table of trials."""
    keys = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    several = any("std" in row for row in rows)
    head = ["trial", "state", metric, *(["± std"] if several else []), *keys]
    cells = [head]
    for row in rows:
        value = "" if row["value"] is None else f"{row['value']:.5g}"
        std = [f"{row['std']:.2g}" if "std" in row else ""] if several else []
        settings = (_brief(row["settings"].get(key, "")) for key in keys)
        cells.append([str(row["trial"]), row["state"], value, *std, *settings])
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
