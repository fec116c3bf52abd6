"""What is known of a sweep's trials, and who runs which: an Optuna study in a journal file or a database.

All trials are there from the start, waiting, so that number and folder belong together, any number of processes may
open the study at once, and trial K can be asked for by its number. Three things keep a trial from being run twice:

- a waiting trial is claimed by the storage's own atomic change of its state;
- its worker holds a lock on a file below the sweep's folder, which ends with the process: so another process of the
  same machine knows at once that a running trial has lost its worker;
- its worker counts a "beat" up in the storage: so another machine knows after a silence. Who then takes it over is
  decided by the order of entries in a second study, which the storage numbers one after the other.

The file is Optuna's journal (one JSON object a line), written so that neither a kill nor a full disk can spoil it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pathlib
import pickle
import re
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import optuna
from ml_collections import ConfigDict
from optuna.storages.journal import BaseJournalBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from bigbase_jax.core import UserError
from bigbase_jax.runtime import redact
from bigbase_jax.runtime.checkpoint import disk_error
from bigbase_jax.runtime.rundir import MACHINERY, as_json, differing
from bigbase_jax.runtime.whole import written
from bigbase_jax.sweep.space import Sweep, judged

JOURNAL = "study.jsonl"
STORAGE = "storage.json"
"""Where the study is, if not in the journal."""
_JUDGEMENT = re.compile(r"sweep\.(metric|pruner|objective)\b")
"""What of a sweep may change as long as no trial was judged by it."""
_PICKLED = {("cmaes._cma", "CMA"), ("cmaes._sepcma", "SepCMA"), ("cmaes._cmawm", "CMAwM")}
_PICKLED |= {("numpy", "ndarray"), ("numpy", "dtype"), ("numpy._core.multiarray", "scalar")}
_PICKLED |= {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
_TRIES = 5  # to open a database that others open too
_PROCESS = threading.Lock()  # a process's locks on a file end when any of its threads closes it

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Stop(UserError):
    """What ends a worker but not its trial, which can go on later: a full disk, a storage that does not answer."""


# ------------------------------------------------------------------------------------------------------------ the files


class Journal(BaseJournalBackend):
    """Lines of JSON in one file, appended under a lock that ends with its process.

    A line that a kill or a full disk left unfinished was never read by anyone; the next one that appends removes it.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = pathlib.Path(path)
        self._offsets = {0: 0}  # where a line begins, by its number
        with _writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """All whole lines from this number on."""
        known = log_number_from if log_number_from in self._offsets else 0
        with _PROCESS, open(self._path, "rb") as file:
            file.seek(self._offsets[known])
            text = file.read()
        position = self._offsets[known]
        for number, line in enumerate(text.splitlines(keepends=True), known):
            if not line.endswith(b"\n"):
                return
            position += len(line)
            self._offsets[number + 1] = position
            if number >= log_number_from:
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise Stop(f"line {number + 1} of {self._path} is not JSON; it was changed by hand.") from error

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Appends whole lines, or raises and leaves at most an unfinished one."""
        data = b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs)
        with _writing(self._path), _PROCESS, open(self._path, "r+b", buffering=0) as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            whole = end
            while whole and os.pread(file.fileno(), 1, whole - 1) != b"\n":
                whole -= 1
            if whole != end:
                file.truncate(whole)
                file.seek(whole)
            while data:
                data = data[file.write(data) :]
            if any("state" in log for log in logs):  # the rest is read again from the trials' folders, if power fails
                os.fsync(file.fileno())


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Stop(
            f"cannot write {path}: {disk_error(error) or error}; nothing is lost, and the same command goes on."
        ) from error


class Lock:
    """A lock on a file, held until ``release`` or the end of the process; child processes do not inherit it."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._file: Any = None

    def acquire(self) -> bool:
        """Whether it is held now; does not wait."""
        with _writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self._path, "ab")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        self._file = file
        return True

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def machine() -> str:
    """This machine since its last start, as other machines do not call themselves."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}/{pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    return socket.gethostname()


def _storage(url: str) -> Any:
    if "://" not in url:
        return JournalStorage(Journal(url))
    scheme = url.partition(":")[0]
    waits = {"connect_args": {"timeout": 60}} if scheme.startswith("sqlite") else {"pool_pre_ping": True}
    for attempt in range(_TRIES):
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=waits)
        except ImportError as error:
            raise UserError(f"--sweep_storage={redact.hide(url)}: {error}; install the database's driver.") from error
        except Exception as error:  # of several that create the tables at once, one does
            if attempt == _TRIES - 1:
                said = str(error).strip().splitlines()[0]
                raise UserError(f"--sweep_storage={redact.hide(url)} does not open: {said}") from error
            time.sleep(0.2 * (attempt + 1))


def without_secrets(url: str) -> str:
    """Without user, password and options; a path, that of SQLite too, is made absolute."""
    if "://" not in url:
        return os.path.abspath(url)
    from sqlalchemy.engine import URL, make_url

    given = make_url(url)
    database = given.database
    if given.get_backend_name() == "sqlite" and database:
        if database.startswith("file:"):  # a URI, with options that it needs
            return redact.hide(url)
        database = os.path.abspath(database)
    return URL.create(given.drivername, host=given.host, port=given.port, database=database).render_as_string()


@contextlib.contextmanager
def answering(what: str) -> Iterator[None]:
    """A storage that fails in the middle ends the worker, not the trial."""
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        said = str(error.__cause__ or error).strip().splitlines()[0]
        raise Stop(f"the sweep's storage does not answer while {what} ({said}); the same command goes on.") from error


# ------------------------------------------------------------------------------------------------------------ the study


class Claim:
    """A trial that this process runs.

    Attributes:
      number: of the trial.
      trial: Optuna's handle.
      starts: how many processes have worked on it, this one included.
    """

    def __init__(self, study: Study, trial: Any, starts: int, lock: Lock):
        self.number, self.trial, self.starts = trial.number, trial, starts
        self._study, self._lock = study, lock

    @property
    def attrs(self) -> dict[str, Any]:
        """What is noted of the trial."""
        return self._study.get(self.number).user_attrs

    def note(self, **values: Any) -> None:
        """Keeps plain values with the trial."""
        with answering("a result is noted"):
            for name, value in values.items():
                self.trial.set_user_attr(name, value)

    def report(self, count: int, value: float) -> bool:
        """Takes the ``count``-th evaluation's value; whether the trial should be given up."""
        with answering("an evaluation is reported"):
            if count not in self._study.get(self.number).intermediate_values:
                self.trial.report(value, count)
            return self.trial.should_prune()

    def finish(self, state: TrialState, value: float | None = None, **notes: Any) -> None:
        """Ends the trial for good.

        Raises:
          Stop: it is this process's no more.
        """
        lost = f"trial {self.number} was taken over or finished by another process meanwhile."
        try:
            if not self._mine():
                raise Stop(lost)
            self.note(**notes)
            with answering("a result is noted"):
                self._study.optuna.tell(self.trial, value, state=state)
        except optuna.exceptions.UpdateFinishedTrialError as error:
            raise Stop(lost) from error
        finally:
            self._lock.release()

    def _mine(self) -> bool:
        return self.attrs.get("worker", {}).get("token") == self._study.me["token"]

    def release(self) -> None:
        """Gives the trial up as it is: the next one that asks goes on with it."""
        try:
            if self._mine():
                self.note(worker={**self._study.me, "starts": self.starts, "free": True})
        finally:
            self._lock.release()

    def beat(self, count: int) -> bool:
        """Says that its worker lives; False: the trial was taken over by another."""
        if not self._mine():
            return False
        self.trial.storage.set_trial_user_attr(self.trial._trial_id, "beat", count)
        return True


class Study:
    """The trials of one sweep.

    Args:
      sweep: what they are.
      config: the recipe's.
      folder: the sweep's; its name is the study's.
      url: of a database, or the path of a journal; None: ``folder/study.jsonl``.
      lost_after: seconds without a beat after which another machine's worker is given up.

    Raises:
      UserError: the storage does not open, or holds a study of the same name with another sweep or recipe.
    """

    def __init__(
        self,
        sweep: Sweep,
        config: ConfigDict,
        folder: str | os.PathLike,
        url: str | None = None,
        lost_after: float = 30,
    ):
        self.sweep = sweep = judged(sweep, config)
        self.folder, self.lost_after = pathlib.Path(folder), lost_after
        self.name = self.folder.name
        self.me = {"machine": machine(), "process": os.getpid(), "token": secrets.token_hex(4)}
        self._heard: dict[int, tuple[Any, float]] = {}  # trial -> what was last seen of its worker, and when that came
        storage = _storage(url or str(self.folder / JOURNAL))
        if url:
            self._remember(url)
        direction = "maximize" if sweep.mode == "max" else "minimize"
        with answering("it is opened"):
            self.optuna = optuna.create_study(
                study_name=self.name, storage=storage, direction=direction, pruner=_pruner(sweep), load_if_exists=True
            )
            self._takeovers = optuna.create_study(
                study_name=f"{self.name}: takeovers", storage=storage, load_if_exists=True
            )
            self._agree("sweep", sweep.definition())
            self._agree("config", as_json(config))
            for _ in range(sweep.count() - len(self.optuna.get_trials(deepcopy=False))):  # too many do no harm
                self.optuna.add_trial(optuna.trial.create_trial(state=TrialState.WAITING))

    def _remember(self, url: str) -> None:
        """Says in the folder where the study is, without secrets, for those who only read it."""
        word = json.dumps({"storage": without_secrets(url), "study": self.name}) + "\n"
        with written(self.folder / STORAGE) as file:
            file.write(word.encode())

    def _agree(self, what: str, here: dict[str, Any]) -> None:
        there = self.optuna.user_attrs.get(what)
        if there is None:
            self.optuna.set_user_attr(what, here)
            return
        differences = [text for text in differing(there, here, what) if not MACHINERY.match(text)]
        judged = any(trial.state.is_finished() for trial in self.optuna.get_trials(deepcopy=False))
        if differences and not judged and all(_JUDGEMENT.match(text) for text in differences):
            self.optuna.set_user_attr(what, here)
            return
        if differences:
            raise UserError(
                f"{self.folder} holds a sweep that was declared otherwise ({'; '.join(differences)}); repeat its own "
                "command, or give this one its own --workdir."
            )

    def path(self, number: int) -> pathlib.Path:
        """The folder of a trial."""
        return self.folder / f"trial-{number:04d}"

    def trials(self) -> list[FrozenTrial]:
        """All that belong to the sweep, by number."""
        with answering("trials are listed"):
            trials = self.optuna.get_trials(deepcopy=False)
        return [t for t in trials if t.number < self.sweep.count() or t.state != TrialState.WAITING]

    def get(self, number: int) -> FrozenTrial:
        """What is known of a trial."""
        return next(trial for trial in self.trials() if trial.number == number)

    def claim(self, number: int | None = None, may: Callable[[FrozenTrial], bool] | None = None) -> Claim | None:
        """A trial to run: one whose worker is gone, or else the next that waits.

        Args:
          number: only this one.
          may: only those of which this is true.

        Returns:
          None: there is none at the moment. ``finished`` says whether there may be later.
        """
        trials = [t for t in self.trials() if number in (None, t.number) and (may is None or may(t))]
        running = [t for t in trials if t.state == TrialState.RUNNING]
        waiting = [t for t in trials if t.state == TrialState.WAITING]
        for trial in [*running, *waiting]:
            lock = Lock(self.folder / ".locks" / f"{trial.number:04d}")
            if not lock.acquire():
                self._heard.pop(trial.number, None)
                continue
            with answering("a trial is claimed"):
                starts = self._take(trial)
                if starts is None:
                    lock.release()
                    continue
                owner = {**self.me, "starts": starts}
                self.optuna._storage.set_trial_user_attr(trial._trial_id, "worker", owner)
                self.optuna.sampler = _sampler(self.sweep, trial.number)
                taken = optuna.trial.Trial(self.optuna, trial._trial_id)
            return Claim(self, taken, starts, lock)
        return None

    def finished(self) -> bool:
        """Whether no trial waits or runs any more."""
        return all(trial.state.is_finished() for trial in self.trials())

    def _take(self, trial: FrozenTrial) -> int | None:
        """How often the trial was started, if this process may run it now. Its lock is held."""
        storage, trial_id = self.optuna._storage, trial._trial_id
        if trial.state == TrialState.WAITING:
            try:
                return 1 if storage.set_trial_state_values(trial_id, TrialState.RUNNING) else None
            except optuna.exceptions.UpdateFinishedTrialError:
                return None
        trial = self.get(trial.number)  # as it is now that the lock is held
        if trial.state != TrialState.RUNNING:
            return None
        owner = trial.user_attrs.get("worker", {})
        claims = self._claims(trial.number)
        last = max([owner.get("starts", 0), *(starts for starts, _ in claims)])
        seen = (owner, trial.user_attrs.get("beat"), last)
        if self._heard.get(trial.number, (None, 0))[0] != seen:
            self._heard[trial.number] = seen, time.monotonic()
        gone = owner.get("starts") == last and (owner.get("free") or owner.get("machine") == self.me["machine"])
        if not gone and time.monotonic() - self._heard[trial.number][1] < self.lost_after:
            return None
        mark = {"trial": trial.number, "starts": last + 1, "token": self.me["token"]}
        self._takeovers.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=mark))
        first = next(token for starts, token in self._claims(trial.number) if starts == last + 1)
        return last + 1 if first == self.me["token"] else None

    def _claims(self, number: int) -> list[tuple[int, str]]:
        """(start, token) of all who wanted to take a trial over, in the storage's order."""
        marks = [t.user_attrs for t in self._takeovers.get_trials(deepcopy=False)]
        return [(mark["starts"], mark["token"]) for mark in marks if mark["trial"] == number]

    def note_death(self, process: int) -> int | None:
        """Notes that a process of this machine died while it ran a trial; gives the trial up after three deaths at the
        same checkpoint. Returns the trial's number."""
        for trial in self.trials():
            owner = trial.user_attrs.get("worker", {})
            mine = (owner.get("machine"), owner.get("process")) == (self.me["machine"], process)
            if trial.state == TrialState.RUNNING and mine and not owner.get("free"):
                steps = [int(p.name) for p in self.path(trial.number).rglob("checkpoints/*") if p.name.isdigit()]
                deaths = [*trial.user_attrs.get("deaths", []), [len(steps), max(steps, default=0)]]
                storage = self.optuna._storage
                storage.set_trial_user_attr(trial._trial_id, "deaths", deaths)
                if len(deaths) >= 3 and deaths[-3:] == [deaths[-1]] * 3:
                    reason = "its worker process died three times at the same point (out of memory?)"
                    storage.set_trial_user_attr(trial._trial_id, "reason", reason)
                    storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                return trial.number
        return None


def _sampler(sweep: Sweep, number: int) -> Any:
    """A sampler of its own for each trial, so that what it draws depends on the trials before and on nothing else."""
    seed = int.from_bytes(hashlib.sha256(f"{sweep.seed}/{number}".encode()).digest()[:4], "big")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if (listed := sweep.listed()) is not None:
            return optuna.samplers.PartialFixedSampler(listed[number], optuna.samplers.RandomSampler())
        if callable(sweep.sampler):
            return sweep.sampler(seed)
        if sweep.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if sweep.sampler == "cmaes":
            return _CmaEs(seed=seed, warn_independent_sampling=False)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


class _CmaEs(optuna.samplers.CmaEsSampler):
    """Keeps its state in the study as a pickle, and a study may come in a folder: of a pickle only arrays are read."""

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        for trial in reversed(completed_trials):
            parts = {k: x for k, x in trial.system_attrs.items() if k.startswith(self._attr_key_optimizer)}
            if parts:
                return _Arrays(io.BytesIO(bytes.fromhex(self._concat_optimizer_attrs(parts)))).load()
        return None


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED:
            raise UserError(f"the study holds a pickle that asks for {module}.{name}, which CMA-ES does not need.")
        return super().find_class(module, name)


def _pruner(sweep: Sweep) -> Any:
    """Evaluations are counted from 1, so one evaluation is the unit of all pruners."""
    if sweep.pruner is None:
        return optuna.pruners.NopPruner()
    if sweep.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4)
    if sweep.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    if sweep.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, reduction_factor=3)
    return sweep.pruner


def drawn(sweep: Sweep, count: int = 32) -> list[dict[str, Any]]:
    """Overrides that a ``suggest`` function gives at random, to try whether they fit the recipe."""
    if sweep.suggest is None:
        return []
    trials = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=sweep.seed))
    return [sweep.overrides(trials.ask()) for _ in range(count)]
