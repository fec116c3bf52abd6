"""What a sweep has left in its folder: what it searched for, how its trials ended, and its optuna study."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from bigbase_jax.core import UserError
from bigbase_jax.runtime import redact
from bigbase_jax.runtime.untrusted import read_object

_TRIAL = re.compile(r"trial-(\d+)")


def objective(folder: pathlib.Path) -> tuple[str, bool] | None:
    """The metric that a sweep searched for, and whether less of it is better; None where it left no summary."""
    try:
        found = read_object(folder / "summary.json")
        return str(found["metric"]), found["mode"] == "min"
    except (OSError, KeyError, UserError):
        return None


def studies(folder: pathlib.Path, storage: str | None = None) -> list[Any]:
    """The studies of the journals in a folder, those with the most trials first; none without optuna.

    Args:
      storage: where the study is if the folder has no journal; None: it is not read. What the folder itself names is
        never opened, since anybody may have written it.

    Raises:
      UserError: ``storage`` does not open, or has no such study.
    """
    if importlib.util.find_spec("optuna") is None:
        return []
    paths = list(_journals(folder))
    if not paths:
        found, _ = _elsewhere(folder, storage)
        return found
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = []
    for path in paths:
        with contextlib.suppress(Exception):  # a journal of another version, say: the runs are compared without it
            journal = JournalStorage(JournalFileBackend(str(path)))
            names = [summary.study_name for summary in optuna.get_all_study_summaries(journal)]
            found += [optuna.load_study(study_name=name, storage=journal) for name in names]
    return sorted(found, key=lambda study: -len(study.get_trials(deepcopy=False)))


def unread(folder: pathlib.Path, storage: str | None = None) -> str | None:
    """The sentence for a sweep whose study is elsewhere and is not read; see ``studies``."""
    if importlib.util.find_spec("optuna") is None or any(_journals(folder)):
        return None
    return _elsewhere(folder, storage)[1]


def _elsewhere(folder: pathlib.Path, storage: str | None) -> tuple[list[Any], str | None]:
    """The study of a sweep without a journal, and why there is none."""
    try:
        word = read_object(folder / "storage.json")
        remembered, name = str(word["storage"]), str(word["study"])
    except (OSError, KeyError, UserError):
        remembered, name = None, folder.resolve().name
    if storage is None:
        said = redact.hide(repr(remembered))
        return [], remembered and f"the study of {folder} is not in it; --sweep_storage={said} reads it from there."
    study, why = _opened(storage, name)
    if study is None:
        raise UserError(f"--sweep_storage does not give the study {name!r} of {folder}: {why}.")
    return [study], None


@functools.lru_cache
def _opened(url: str, name: str) -> tuple[Any, str]:
    """The study, which reads its storage anew when it is asked; else None and why."""
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = url.partition(":///")[2].partition("?")[0] if url.startswith("sqlite") else "" if "://" in url else url
    if path and not os.path.exists(path):  # either would make it
        return None, f"there is no file {path}"
    try:
        storage: Any = (
            RDBStorage(url, skip_table_creation=True) if "://" in url else JournalStorage(JournalFileBackend(url))
        )
        return optuna.load_study(study_name=name, storage=storage), ""
    except KeyError:
        return None, "it has no such study"
    except Exception as error:  # whatever a driver raises; its words may hold the password
        return None, f"it does not open ({type(error).__name__})"


def endings(folder: pathlib.Path, storage: str | None = None) -> dict[int, str]:
    """How trials that were pruned or failed ended, by their numbers, in words; see ``studies``."""
    found: dict[int, str] = {}
    for study in studies(folder, storage)[:1]:
        for trial in study.get_trials(deepcopy=False):
            if trial.state.name in ("PRUNED", "FAIL"):
                word = "pruned" if trial.state.name == "PRUNED" else "failed"
                reason = trial.user_attrs.get("reason")
                found[trial.number] = f"{word}: {reason}" if reason else word
    return found


def choices(folder: pathlib.Path, storage: str | None = None) -> dict[int, dict[str, Any]]:
    """What the study has chosen for each trial: a number, or the name of a choice, by key of the config; see
    ``studies``."""
    found: dict[int, dict[str, Any]] = {}
    for study in studies(folder, storage)[:1]:
        for trial in study.get_trials(deepcopy=False):
            found[trial.number] = {name.partition(" ")[0]: value for name, value in trial.params.items()}
    return found


def trial_number(path: pathlib.Path, folder: pathlib.Path) -> int | None:
    """The number of the trial whose folder ``path`` is, or is in."""
    match = _TRIAL.fullmatch(path.relative_to(folder).parts[0]) if path != folder else None
    return int(match.group(1)) if match else None


def _journals(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Files in a folder that begin as optuna's journals do."""
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink()):
        try:
            with open(path, "rb") as file:
                first = json.loads(file.readline(65536))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(first, dict) and "op_code" in first:
            yield path
