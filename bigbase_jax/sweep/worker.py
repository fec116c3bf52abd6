"""One process that runs trials one after the other, each an ordinary run in a folder of its own.

What a trial prints goes to ``output.txt`` in its folder. A failure that is the trial's own is noted with its reason,
and the next one begins; what would hit every trial (a full disk, a storage that does not answer) ends the worker.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from ml_collections import ConfigDict
from optuna.trial import FrozenTrial, TrialState

from bigbase_jax import pretrained
from bigbase_jax.build import suggest
from bigbase_jax.core import UserError
from bigbase_jax.runtime import distributed, redact, signals
from bigbase_jax.runtime.checkpoint import disk_error
from bigbase_jax.runtime.log import read_rows
from bigbase_jax.runtime.rundir import InUse, RunDir
from bigbase_jax.sweep import space
from bigbase_jax.sweep.space import Sweep
from bigbase_jax.sweep.study import Claim, Stop, Study

Observe = Callable[[int, Mapping[str, Any]], str | None]
Execute = Callable[[ConfigDict, str, str, Observe], Mapping[str, Any]]
"""``(config, folder, name, observe) -> result``, as ``verbs.train``."""
AGAIN = 76
"""Exit status of a worker that wants to begin anew: its device's memory ran out and may be in pieces."""
OUTPUT = "output.txt"
_POLL = 1.0  # seconds between looks at trials that others run


class _Interrupted(BaseException):
    """A signal outside of a training loop, which ends after a step instead."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class _OutOfMemory(Exception):
    """What the worker's own memory may suffer from after a trial."""


def work(study: Study, config: ConfigDict, execute: Execute, only: int | None = None, parent: int | None = None) -> int:
    """Runs trials until all are finished; returns the exit status.

    Args:
      execute: runs one configuration.
      only: the number of the one trial to run.
      parent: the process without which it is not to go on.

    Raises:
      Stop: what would hit every trial.
    """
    try:
        with signals.caught(_interrupt), _Pulse(study.lost_after / 6, parent) as pulse:
            while True:
                gone = pretrained.missing_origin(config)
                claim = study.claim(only, functools.partial(_begun, study) if gone else None)
                if claim is None:
                    left = [t for t in study.trials() if only in (None, t.number) and not t.state.is_finished()]
                    if not left:
                        return 0
                    if gone and not any(_begun(study, trial) for trial in left):
                        raise Stop(gone)
                    time.sleep(_POLL)
                    continue
                try:
                    with pulse.beating(claim):
                        stopped_by = _run(claim, study, config, execute)
                except InUse as busy:  # by a process that was taken for dead
                    if only is not None:
                        raise
                    os.write(2, f"{busy}\n".encode())
                    time.sleep(_POLL)
                    continue
                if stopped_by:
                    return 128 + stopped_by
                if only is not None:
                    return 0
    except _Interrupted as interrupted:
        return 128 + interrupted.number
    except _OutOfMemory:
        return AGAIN if only is None else 0


def _place(study: Study, number: int, seed: int) -> pathlib.Path:
    """The folder of a run."""
    return study.path(number) / f"seed-{seed}" if study.sweep.seeds > 1 else study.path(number)


def _begun(study: Study, trial: FrozenTrial) -> bool:
    """Whether the run that a trial goes on with has weights of its own."""
    seed = next((i for i in range(study.sweep.seeds) if str(i) not in trial.user_attrs.get("values", {})), None)
    return seed is None or RunDir(_place(study, trial.number, seed)).begun


def _interrupt(number: int, _: FrameType | None) -> None:
    raise _Interrupted(number)


def _run(claim: Claim, study: Study, config: ConfigDict, execute: Execute) -> int | None:
    """Runs a claimed trial to its end or to a signal, whose number it returns."""
    sweep, folder = study.sweep, study.path(claim.number)
    try:
        overrides = sweep.overrides(claim.trial)
        claim.note(overrides=space.plain(overrides))
        chosen = space.override(config, overrides)
        values: dict[str, float] = dict(claim.attrs.get("values", {}))
        began = time.monotonic()
        for index in range(sweep.seeds):
            if str(index) in values:
                continue
            place = _place(study, claim.number, index)
            if pretrained.missing_origin(config) and not RunDir(place).begun:
                claim.release()
                return None
            observe = functools.partial(_observe, claim, sweep, place, index)
            with _output(folder / OUTPUT):
                try:
                    name = f"{study.name}-{claim.number:04d}"
                    result = execute(space.seeds(sweep, chosen, index), str(place), name, observe)
                except Exception:
                    os.write(2, redact.hide(traceback.format_exc()).encode())
                    raise
            if "signal" in result:
                claim.release()
                return int(result["signal"])
            if "stopped" in result:
                claim.finish(TrialState.PRUNED, reason=result["stopped"], seconds=time.monotonic() - began)
                return None
            values[str(index)] = outcome(place, sweep, chosen)
            claim.note(values=values)
        found = summarise(list(values.values()), sweep)
        claim.finish(TrialState.COMPLETE, found.pop("value"), **found, seconds=time.monotonic() - began)
    except (Stop, InUse, _Interrupted):
        with contextlib.suppress(UserError):
            claim.release()
        raise
    except Exception as error:
        refused = disk_error(error)
        if refused is not None:
            with contextlib.suppress(UserError):
                claim.release()
            said = str(error).strip().splitlines()[0] if isinstance(error, UserError) else f"{folder}: {refused}"
            raise Stop(f"trial {claim.number} cannot go on: {said}") from error
        exhausted = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        claim.finish(TrialState.FAIL, reason=_reason(error, exhausted))
        if exhausted:
            raise _OutOfMemory from None
    finally:
        gc.collect()
    return None


def _reason(error: Exception, exhausted: bool) -> str:
    first = redact.hide((str(error).strip() or "no message").splitlines()[0])[:500]
    if exhausted:
        return f"out of memory ({first})"
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def _observe(
    claim: Claim, sweep: Sweep, folder: pathlib.Path, seed: int, step: int, metrics: Mapping[str, Any]
) -> str | None:
    """After each evaluation: notes it, and says why the run should stop, if it should."""
    value = _number(metrics, sweep.metric)
    if seed > 0:
        return None
    count = sum(row["step"] <= step for row in _evaluations(folder, sweep))
    if claim.report(count, value) and sweep.pruner is not None:
        return f"pruned at evaluation {count}: {sweep.metric} {value:.4g} is behind other trials"
    return None


def _evaluations(folder: pathlib.Path, sweep: Sweep) -> list[dict[str, Any]]:
    """The rows of a run's evaluations by what measures the sweep's metric: on the validation split, or an evaluator."""
    where = sweep.metric.rpartition("/")[0] or "val"
    return [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "eval" and row["split"] == where]


def _number(metrics: Mapping[str, Any], name: str) -> float:
    value = metrics.get(name)
    if name not in metrics:
        known = [key for key, found in metrics.items() if isinstance(found, (int, float))]
        raise Stop(f"the sweep's metric {name!r} is not measured.{suggest(name, known, 'metric')}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{name} is {value}, which is no number to compare.")
    return float(value)


def outcome(folder: pathlib.Path, sweep: Sweep, config: ConfigDict) -> float:
    """The value of a finished run: its best where it keeps the best checkpoint by the metric, otherwise its last.

    Raises:
      UserError: it measured no such metric on a validation split.
    """
    values = [_number(row, sweep.metric.rpartition("/")[2]) for row in _evaluations(folder, sweep)]
    if not values:
        raise Stop(
            f"nothing measures {sweep.metric} while a trial trains: the recipe's data has no validation split to judge "
            "trials by, or the evaluator is final; a sweep must not choose by the test split."
        )
    if (config.train.best_metric, config.train.best_mode) == (sweep.metric, sweep.mode):
        return max(values) if sweep.mode == "max" else min(values)
    return values[-1]


def summarise(values: list[float], sweep: Sweep) -> dict[str, Any]:
    """``value``, the objective; of several seeds also ``mean``, ``std`` and the 95 % ``interval`` of the mean."""
    from bigbase_jax.compare.statistics import spread  # takes a second to import

    found = spread(values)
    if found.deviation is None:
        return {"value": found.mean}
    bound = found.low if sweep.mode == "max" else found.high
    value = bound if sweep.objective == "bound" else found.mean
    return {"value": value, "mean": found.mean, "std": found.deviation, "interval": [found.low, found.high]}


@contextlib.contextmanager
def _output(path: pathlib.Path) -> Iterator[None]:
    """Sends standard output and error, that of libraries too, to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    sys.stderr.flush()
    with open(path, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, keep in zip((1, 2), kept, strict=True):
            with contextlib.suppress(OSError):
                (sys.stdout, sys.stderr)[number - 1].flush()
            os.dup2(keep, number)
            os.close(keep)


class _Pulse:
    """A thread that beats for the trial in hand, and asks the process to end when its parent is gone."""

    def __init__(self, every: float, parent: int | None):
        self._every, self._parent = every, parent
        self._claim: Claim | None = None
        self._over = threading.Event()
        self._errors = os.dup(2)
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> _Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        os.close(self._errors)

    @contextlib.contextmanager
    def beating(self, claim: Claim) -> Iterator[None]:
        """While a trial runs."""
        self._claim = claim
        try:
            yield
        finally:
            self._claim = None

    def _beat(self) -> None:
        count, last = 0, -math.inf
        while not self._over.wait(min(1.0, self._every)):
            if self._parent is not None and os.getppid() != self._parent:
                self._parent = None
                os.kill(os.getpid(), signal.SIGTERM)
            claim = self._claim
            if claim is None or time.monotonic() - last < self._every:
                continue
            count, last = count + 1, time.monotonic()
            alive = True
            with contextlib.suppress(Exception):  # finished meanwhile, or no answer: the main thread will say so
                alive = claim.beat(count)
            if not alive and claim is self._claim:
                told = f"error: trial {claim.number} was taken over by another machine after a silence of this one.\n"
                os.write(self._errors, told.encode())
                os._exit(distributed.LOST)
