"""What a run keeps of where it began from: its folder's ``start/``, so that nothing later needs ``config.init_from``.

Those are the small files that say what the model is and what it reads: the ``config.json``, the tokenizer and how
pictures are normalised; or of another run its config and its facts. The weights are in the run's own checkpoints.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pathlib
import shutil

import jax
from ml_collections import ConfigDict

from bigbase_jax.build import TARGET, import_path
from bigbase_jax.core import UserError
from bigbase_jax.pretrained import files
from bigbase_jax.pretrained.folder import describe
from bigbase_jax.pretrained.start import SIGNATURE, TEACHER, RunTokenizer, is_run
from bigbase_jax.runtime.checkpoint import disk_error
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.runtime.untrusted import file_in
from bigbase_jax.runtime.whole import partial
from bigbase_jax.text.tokenizer import TokenizerFile
from bigbase_jax.wrappers.adapter import CONFIG as ADAPTER

_OF_A_RUN = (files.CONFIG, "data.json")
_OF_A_FOLDER = (files.PREPROCESSOR, files.GENERATION, *files.TOKENIZER)


@dataclasses.dataclass(frozen=True, repr=False)
class RecordedFile(TokenizerFile):
    """A published tokenizer in ``start/``. Caches know it by its files, and by where these came from.

    Attributes:
      origin: where they came from.
    """

    origin: str = ""

    def __repr__(self) -> str:
        return repr(TokenizerFile(self.origin, self.lowercase))


@dataclasses.dataclass(frozen=True, repr=False)
class RecordedRun(RunTokenizer):
    """The tokenizer of another run, in ``start/``; see ``RecordedFile``."""

    origin: str = ""

    def __repr__(self) -> str:
        return repr(RunTokenizer(self.origin))


_RECORDED = {
    import_path(TokenizerFile): import_path(RecordedFile),
    import_path(RunTokenizer): import_path(RecordedRun),
}


def recorded_origin(run: RunDir) -> str | None:
    """The folder to read in the place of ``config.init_from``; None: the run has not begun, and has to read that."""
    place = run.path / "start"
    return str(place) if run.begun and place.is_dir() else None


def record_origin(run: RunDir, config: ConfigDict) -> None:
    """Copies what ``recorded_origin`` is to hold, unless the run has begun; of several processes the first does.

    Raises:
      UserError: the disk refuses.
    """
    if run.begun or jax.process_index():
        return
    place = run.path / "start"
    shutil.rmtree(place, ignore_errors=True)  # of a start that had a mistake
    if config.get("init_from") or config.get("adapter") or config.get("teacher"):
        _copy(config, place)


def _copy(config: ConfigDict, place: pathlib.Path) -> None:
    """The small files of where a run begins, and of its teacher; the folder ``place`` appears when it is whole."""
    unfinished = partial(place)
    try:
        unfinished.mkdir(parents=True)
        if path := config.get("init_from"):
            _copy_small(path, unfinished)
        if (adapter := config.get("adapter")) and (file := file_in(os.path.expanduser(adapter), ADAPTER)):
            shutil.copy2(file, unfinished / file.name)
        if path := config.get("teacher"):
            _copy_small(path, unfinished / TEACHER)
            task = config.task
            while "teacher" not in task:
                task = task.task
            files.write_json(unfinished / TEACHER / SIGNATURE, {"fingerprint": task.teacher.fingerprint})
        os.replace(unfinished, place)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not place.is_dir():  # else another process was first
            raise UserError(f"cannot write {place}: {disk_error(error) or error}.") from error


def _copy_small(path: str, place: pathlib.Path) -> None:
    """What says what the model in the folder ``path`` is and reads."""
    origin, names = pathlib.Path(os.path.expanduser(path)), set(_OF_A_RUN)
    place.mkdir(exist_ok=True)
    if not is_run(path):
        names = set(_OF_A_FOLDER)
        names |= {name for name in os.listdir(origin) if name.endswith(".model")} if origin.is_dir() else set()
        files.write_json(place / files.CONFIG, describe(path)[1])
    for file in filter(None, (file_in(origin, name) for name in names)):
        shutil.copy2(file, place / file.name)  # with its time, which caches look at


def missing_origin(config: ConfigDict) -> str | None:
    """The sentence for a ``config.init_from`` that is gone; None: it is there, or there is none."""
    for path in (config.get("init_from"), config.get("adapter")):
        if path and not os.path.exists(os.path.expanduser(path)):
            return (
                f"config.init_from={path!r} is gone, and what has not begun needs its weights; put it back, and the"
                " same command goes on."
            )
    return None


def recorded_by_sweep(folder: pathlib.Path, config: ConfigDict) -> str | None:
    """What a sweep has kept of ``config.init_from``, where that is gone; see ``recorded_origin``."""
    place = folder / "start"
    return str(place) if missing_origin(config) and place.is_dir() else None


def record_by_sweep(folder: pathlib.Path, config: ConfigDict) -> None:
    """Copies what ``recorded_by_sweep`` is to hold, at the first start.

    Raises:
      UserError: the disk refuses.
    """
    begins = config.get("init_from") or config.get("adapter")
    if begins and not missing_origin(config) and not (folder / "start").is_dir():
        _copy(config, folder / "start")


def data_of(run: RunDir, config: ConfigDict) -> ConfigDict:
    """``config.data``, to build from; where the tokenizer is that of ``init_from`` or of the teacher, it is read from
    what was kept."""
    place, dataset = recorded_origin(run), config.data.get("dataset")
    node = dataset.get("tokenizer") if isinstance(dataset, ConfigDict) else None
    if place is None or not isinstance(node, ConfigDict) or not (origin := node.get("path")):
        return config.data
    if origin != config.get("init_from"):
        if origin != config.get("teacher"):
            return config.data
        place = os.path.join(place, TEACHER)
    if node.get(TARGET) not in _RECORDED:  # a tokenizer of the user's own
        return config.data
    data = copy.deepcopy(config.data)
    data.unlock()
    data.dataset.tokenizer.update({TARGET: _RECORDED[node[TARGET]], "path": place, "origin": origin})
    return data
