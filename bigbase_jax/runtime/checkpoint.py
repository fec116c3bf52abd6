"""Checkpoints of a run: asynchronous, atomic, and never half-read. The only file that imports orbax.

A checkpoint is a flat mapping ``"params.conv1.kernel" -> array`` plus a small JSON (the progress of the loop: data
position, best metric so far). Flat names make it readable without the code that wrote it, let evaluation load the
parameters without the optimizer, and make a checkpoint of another model an error that lists the names that differ.
Orbax writes into a temporary folder and renames it when everything is on disk, so an interrupted save leaves nothing
that could be mistaken for a checkpoint. Orbax does not notice a changed byte of an array, so each checkpoint gets the
sizes and CRC-32 of its files (``checksums.json``) in the same background; whoever restores it compares them first. One
without (of an earlier version, or of a process that was killed in between) is read as far as orbax can.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from bigbase_jax.core import PyTree, UserError, flatten, some
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.untrusted import read_object
from bigbase_jax.runtime.whole import clean, written

_BASE = re.compile(r"^(model_state|ema)\.base\.")
_COMMON = 64  # checkpoints, the latest, among which processes look for one that all see
_METADATA = "_CHECKPOINT_METADATA"  # orbax's name for what is to be known of a whole checkpoint; ours within: progress
_CHECKSUMS = "checksums.json"


class Damaged(UserError):
    """A checkpoint that is there but cannot be read."""


class Checkpoints:
    """The checkpoints below one folder, one numbered folder each.

    Args:
      directory: where they are; created by the first save.
      keep: how many of the latest stay.
      keep_best: the last one that was saved as ``best`` stays too.
      read_only: only read: nothing is created, cleaned up or deleted (a trainer may be writing).

    Raises:
      UserError: the folder cannot be written, or is not the same folder for all processes.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2, keep_best: bool = False, read_only: bool = False):
        self.directory = pathlib.Path(os.path.abspath(directory))
        self._pending: concurrent.futures.Future[None] | None = None
        self._pending_step = -1
        self._sealing = concurrent.futures.ThreadPoolExecutor(1, "checksums")
        self._checkpointer = None
        logging.getLogger("absl").addFilter(_not_orbax)
        if read_only:
            return
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_best:
            kept.append(policies.BestN(get_metric_fn=lambda metrics: metrics["best"], n=1))
        with _sentences(f"cannot use {self.directory} for checkpoints"):
            if jax.process_index() == 0:
                self._clean_up(keep)
            _meet("checkpoints cleaned up")
            if not _appears(self.directory):
                raise UserError(
                    f"process {jax.process_index()} does not see {self.directory}, which process 0 has made; the run "
                    "folder (--workdir) must be on storage that all hosts share."
                )
            if not os.access(self.directory, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            with _quiet():
                self._checkpointer = ocp.training.Checkpointer(
                    self.directory,
                    save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                    preservation_policy=policies.AnyPreservationPolicy(kept),
                )

    def _clean_up(self, keep: int) -> None:
        """Removes what an interrupted save or removal left, and sets aside what orbax cannot open the folder with."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        sound: list[int] = []
        for step in reversed(self._folders()):
            folder = self.directory / str(step)
            clean(folder)
            fault = _fault(folder, lambda name: not name.startswith("state/"))
            if fault is None:
                sound.append(step)
            elif len(sound) >= keep and self.progress(sound[0]).get("best_step") != step:
                shutil.rmtree(folder, ignore_errors=True)  # it was being removed
            else:
                self._set_aside(step, str(self._damaged(step, fault)))

    def _folders(self) -> list[int]:
        """Steps of all checkpoints, be they complete or not, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(child.name) for child in self.directory.iterdir() if child.name.isdigit())

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return [step for step in self._folders() if _is_complete(self.directory / str(step))]

    def common_steps(self) -> list[int]:
        """Steps, as all processes see them: a network's file system may show a new folder to some of them late."""
        mine = self._folders()[-_COMMON:]
        if jax.process_count() == 1:
            return mine
        padded = np.full(_COMMON, -1, np.int32)
        padded[: len(mine)] = mine
        seen = np.asarray(multihost_utils.process_allgather(padded))
        return sorted(set.intersection(*(set(row.tolist()) for row in seen)) - {-1})

    def save(self, step: int, state: PyTree, progress: Mapping[str, Any], best: bool = False) -> None:
        """Starts saving ``state`` as ``step`` and returns as soon as the arrays may be overwritten (donated).

        An earlier save still under way is waited for, and its failure is raised here. A damaged folder of the same
        step (left by a disk that was full) is replaced.

        Raises:
          UserError: this or the save before it failed (disk full, no permission).
        """
        assert self._checkpointer is not None, "these checkpoints are read only"
        self.wait()
        arrays = _snapshot({name: _raw(x) for name, x in flatten(state).items()})
        rank = {"best": step if best else -1}
        with _sentences(f"cannot save the checkpoint of step {step} under {self.directory}", self._intact), _quiet():
            saving = self._checkpointer.save_async(
                step, arrays, force=True, overwrite=step in self.steps(), metrics=rank, custom_metadata=dict(progress)
            )
            self._pending = self._sealing.submit(self._seal, saving, step)
            self._pending_step = step

    def _seal(self, saving: Any, step: int) -> None:
        """Waits for orbax, and writes the checksums of what it wrote; orbax's one-thread rule holds, as all others wait
        for this."""
        saving.result()
        if jax.process_index() == 0:
            folder = self.directory / str(step)
            sizes = _sizes(folder)
            crcs = _crcs(folder, sizes)
            with written(folder / _CHECKSUMS) as file:
                file.write(json.dumps({name: [size, crcs[name]] for name, size in sizes.items()}, indent=0).encode())

    def wait(self) -> None:
        """Blocks until the save under way is on disk.

        Raises:
          UserError: it failed; older checkpoints are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            what = f"cannot save the checkpoint of step {self._pending_step} under {self.directory}"
            with _sentences(what, self._intact):
                pending.result()

    def progress(self, step: int) -> dict[str, Any]:
        """The JSON saved with ``step``.

        Raises:
          Damaged: it cannot be read.
        """
        folder = self.directory / str(step)
        with self._reading(step):
            if fault := _fault(folder, lambda name: name == _METADATA):
                raise self._damaged(step, fault)
            return _progress(folder)

    def restore_latest(self, abstract: PyTree) -> tuple[PyTree | None, dict[str, Any]]:
        """The newest checkpoint that can be read, and its progress; ``(None, {})`` where there is none.

        An older one gives the same bits in the end, so those that are damaged are said and set aside.
        """
        for step in reversed(self.common_steps()):
            try:
                return self.restore(abstract, step), self.progress(step)
            except Damaged as damaged:
                self._discard(step, damaged)
        if any(self.directory.glob("*.damaged*")):
            say(f"no checkpoint in {self.directory} can be read; the run begins anew.")
        return None, {}

    def restore_best(self, abstract: PyTree) -> tuple[PyTree, int]:
        """The checkpoint that the newest one calls the best, else the newest itself; and its step.

        What is damaged is said (and set aside, unless these are read only), and so is what is read in its place.

        Raises:
          UserError: there is none, or none can be read, or it is of another model.
        """
        damaged: dict[int, Damaged] = {}
        while steps := [step for step in self.common_steps() if step not in damaged]:
            step = steps[-1]
            try:
                best = self.progress(step).get("best_step", step)
                step = best if best in self._folders() and best not in damaged else step
                restored = self.restore(abstract, step)
            except Damaged as error:
                damaged[step] = error
                self._discard(step, error)
                continue
            if step != best:
                say(
                    f"the best checkpoint, of step {best}, is {'damaged' if best in damaged else 'not there'}; the "
                    f"newest is used, of step {step}."
                )
            elif damaged:
                say(f"the checkpoint of step {step} is used.")
            return restored, step
        if damaged:
            raise UserError(f"no checkpoint in {self.directory} can be read; all of them ({len(damaged)}) are damaged.")
        raise UserError(f"there is no checkpoint in {self.directory} yet.")

    def signature(self, step: int | None = None) -> str:
        """A text that is the same for the same files of a checkpoint, or of that which ``restore_best`` reads (None).

        Raises:
          UserError: there is none, or it cannot be read.
        """
        if not (steps := self.common_steps()):
            raise UserError(f"there is no checkpoint in {self.directory} yet.")
        if step is None:
            step = best if (best := self.progress(steps[-1]).get("best_step")) in steps else steps[-1]
        folder = self.directory / str(step)
        with self._reading(step):
            return f"{step} {sorted(_crcs(folder, _sizes(folder)).items())}"

    def restore(self, abstract: PyTree, step: int) -> PyTree:
        """The state of ``step`` with the structure, dtypes and shardings of ``abstract``.

        Args:
          abstract: a tree of ``jax.ShapeDtypeStruct`` with shardings; any part of what was saved may be left out.

        Raises:
          UserError: the checkpoint is of another model: lists names and shapes that differ.
          Damaged: the checkpoint cannot be read, be it by one of several processes.
        """
        self._together(step, lambda: self._verify(step))
        return self._together(step, lambda: self._restore(abstract, step))

    def _together(self, step: int, read: Callable[[], PyTree]) -> PyTree:
        """What ``read`` gives; if it is damaged for one of several processes, it is for all of them."""
        damaged: Damaged | None = None
        result = None
        try:
            result = read()
        except Damaged as error:
            damaged = error
        if jax.process_count() > 1:
            failed = np.asarray(multihost_utils.process_allgather(np.asarray(damaged is not None)))
            if failed.any() and damaged is None:
                which = ", ".join(map(str, np.flatnonzero(failed)))
                damaged = Damaged(f"process {which} cannot read the checkpoint {self.directory / str(step)}.")
        if damaged is not None:
            raise damaged
        return result

    def _verify(self, step: int) -> None:
        """Compares the checksums; of several processes, each reads its share of the files."""
        with self._reading(step):
            turn = itertools.count()
            mine = (jax.process_index(), jax.process_count())
            if fault := _fault(self.directory / str(step), lambda _: next(turn) % mine[1] == mine[0]):
                raise self._damaged(step, fault)

    def _restore(self, abstract: PyTree, step: int) -> PyTree:
        keys = [name for name, x in flatten(abstract).items() if _is_key(x)]
        wanted = {name: _raw(x) for name, x in flatten(abstract).items()}
        folder = self.directory / str(step)
        with self._reading(step), _quiet():
            kept = ocp.metadata(folder).metadata
            name_of = {_renewed(name, wanted): name for name in kept}
            saved = {name: kept[earlier] for name, earlier in name_of.items()}
            differences = _differences(wanted, saved)
            if differences:
                raise UserError(f"the checkpoint {folder} is of another model: {differences}.")
            target = {earlier: wanted.get(name, ocp.PLACEHOLDER) for name, earlier in name_of.items()}
            found = ocp.load(folder, target)
            loaded = {name: found[earlier] for name, earlier in name_of.items()}
        loaded.update({name: jax.random.wrap_key_data(loaded[name]) for name in keys})
        return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[name] for name in wanted])

    def _discard(self, step: int, damaged: Damaged) -> None:
        """Says that a checkpoint is damaged and sets it aside, unless these are read only (or closed)."""
        if self._checkpointer is None:
            say(str(damaged))
            return
        with _sentences(f"cannot set {self.directory / str(step)} aside, which is damaged"):
            if jax.process_index() == 0:
                self._set_aside(step, str(damaged))
            _meet(f"checkpoint {step} set aside")
            self._checkpointer.reload()

    def _set_aside(self, step: int, why: str) -> None:
        """Renames a damaged checkpoint to ``STEP.damaged``, ``STEP.damaged-2``, ...; nothing is deleted."""
        names = (f"{step}.damaged{f'-{i}' if i > 1 else ''}" for i in itertools.count(1))
        name = next(name for name in names if not (self.directory / name).exists())
        (self.directory / str(step)).rename(self.directory / name)
        say(f"{why.removesuffix('.')}; it is set aside as {name}.")

    def _damaged(self, step: int, fault: str) -> Damaged:
        return Damaged(f"the checkpoint {self.directory / str(step)} cannot be read ({fault}).")

    def close(self) -> None:
        """Waits for the save under way and releases the background threads; reading goes on to work."""
        try:
            self.wait()
        finally:
            self._sealing.shutdown()
            checkpointer, self._checkpointer = self._checkpointer, None
            if checkpointer is not None:
                with contextlib.suppress(Exception):  # a failed save was already raised by wait()
                    checkpointer.close()

    def _intact(self) -> str:
        steps = self.steps()
        return f"; the checkpoints of steps {steps} are intact" if steps else "; there is no earlier checkpoint"

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        if step not in self._folders():
            have = f"steps {self.steps()} are there" if self.steps() else "there are none"
            raise UserError(f"there is no checkpoint of step {step} in {self.directory}; {have}.")
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise self._damaged(step, reason) from error


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _raw(x: Any) -> Any:
    """A PRNG key (or its shape) as the u32 data that is saved of it; anything else as it is."""
    if not _is_key(x):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, x)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)
    return jax.random.key_data(x)


def _snapshot(arrays: dict[str, Any]) -> dict[str, Any]:
    """On the CPU backend a jax.Array and its numpy view share memory, which a donating step would overwrite while the
    writer thread reads it; so copy there. Accelerators are copied to the host by orbax before it returns."""
    if jax.default_backend() != "cpu":
        return arrays
    return {name: jnp.copy(x) if isinstance(x, jax.Array) else np.array(x) for name, x in arrays.items()}


def _renewed(name: str, wanted: Collection[str]) -> str:
    """Today's name of an array of an earlier run, whose frozen parameters were the collection ``base``."""
    return name if name in wanted else _BASE.sub(r"\1.frozen.", name)


def _differences(wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    missing = sorted(set(wanted) - set(saved))
    roots = {name.partition(".")[0] for name in wanted}
    extra = sorted(name for name in set(saved) - set(wanted) if name.partition(".")[0] in roots)
    shapes = [
        f"{name} is {tuple(saved[name].shape)} there and {tuple(wanted[name].shape)} here"
        for name in wanted
        if name in saved and tuple(saved[name].shape) != tuple(wanted[name].shape)
    ]
    parts = [f"it lacks {some(missing, 5)}"] if missing else []
    parts += [f"it also has {some(extra, 5)}"] if extra else []
    return "; ".join([*parts, *([some(shapes, 5)] if shapes else [])])


def _is_complete(folder: pathlib.Path) -> bool:
    return (folder / _METADATA).is_file()


def _progress(folder: pathlib.Path) -> dict[str, Any]:
    """What ``save`` was given. Orbax would take metadata that it cannot read for none."""
    return dict(read_object(folder / _METADATA)["custom_metadata"] or {})


def _sizes(folder: pathlib.Path) -> dict[str, int]:
    """The files of a checkpoint but the checksums, by name, and their bytes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _CHECKSUMS]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _crcs(folder: pathlib.Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """CRC-32 of so many bytes of each file, on some threads; Python runs on meanwhile."""

    def crc(name: str, size: int, value: int = 0) -> int:
        with open(folder / name, "rb") as file:
            while size > 0 and (block := file.read(min(size, 1 << 22))):
                value, size = zlib.crc32(block, value), size - len(block)
        return value

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(sizes, pool.map(crc, sizes, sizes.values()), strict=True))


def _fault(folder: pathlib.Path, reads: Callable[[str], bool]) -> str | None:
    """What is wrong with a checkpoint, or None: it is not complete, its progress or rank cannot be read, or a file is
    not what the checksums say: the size of each, and the contents of those that ``reads`` names."""
    if not _is_complete(folder):
        return f"{_METADATA} is missing"
    sizes = _sizes(folder)
    try:
        saved = read_object(folder / _CHECKSUMS)
        wrong = [name for name, (size, _) in saved.items() if sizes.get(name) != size]
        if not wrong:
            crcs = _crcs(folder, {name: sizes[name] for name in saved if reads(name)})
            wrong = [name for name, crc in crcs.items() if crc != saved[name][1]]
        if wrong:
            return f"{wrong[0]} is {'not what was saved' if wrong[0] in sizes else 'missing'}"
    except FileNotFoundError:
        pass
    except (OSError, UserError, ValueError, TypeError):
        return f"{_CHECKSUMS} cannot be read"
    for name, read in ((_METADATA, _progress), ("metrics/metrics", _rank)):
        try:
            read(folder)
        except Exception as error:
            return f"{name} is damaged: {error}"
    return None


def _rank(folder: pathlib.Path) -> float | None:
    """What ``BestN`` compares; None: it was saved without."""
    path = folder / "metrics" / "metrics"
    return float(read_object(path)["best"]) if path.is_file() else None


def _meet(what: str) -> None:
    """Waits until all processes are here; they share the folder."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _appears(folder: pathlib.Path, within: float = 10.0) -> bool:
    """Whether ``folder`` is there, or is in some seconds: a network's file system may show it late."""
    deadline = time.monotonic() + within
    while not folder.is_dir():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@contextlib.contextmanager
def _sentences(what: str, also: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turns a failing disk into one sentence; anything else keeps its traceback."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        raise UserError(f"{what}: {reason}{also()}.") from error


def disk_error(error: BaseException | None) -> str | None:
    """The operating system's words for a full, missing or forbidden disk anywhere in the error's chain, or None."""
    codes = (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.EFBIG,
        errno.ENOTDIR,
        errno.EEXIST,
    )
    while error is not None:
        if isinstance(error, OSError) and error.errno in codes:
            return os.strerror(error.errno)
        for code in codes[:-1]:  # tensorstore reports errno as text
            if os.strerror(code) in str(error):
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax's warnings of its own API's future say nothing to the user of a run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _not_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs the traceback of a failed save in every one of its threads; it reaches us as an exception anyway."""
    return "orbax" not in record.pathname
