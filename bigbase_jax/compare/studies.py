"""What a sweep has left in its folder: what it searched for, how its trials ended, and its optuna study."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

_TRIAL = re.compile(r"trial-(\d+)")


def objective(folder: pathlib.Path) -> tuple[str, bool] | None:
    """The metric that a sweep searched for, and whether less of it is better; None where it left no summary."""
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return str(found["metric"]), found["mode"] == "min"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def studies(folder: pathlib.Path) -> list[Any]:
    """The studies of the journals in a folder, those with the most trials first; none without optuna."""
    paths = list(_journals(folder))
    if not paths or importlib.util.find_spec("optuna") is None:
        return []
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = []
    for path in paths:
        with contextlib.suppress(Exception):  # a journal of another version, say: the runs are compared without it
            storage = JournalStorage(JournalFileBackend(str(path)))
            names = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
            found += [optuna.load_study(study_name=name, storage=storage) for name in names]
    return sorted(found, key=lambda study: -len(study.get_trials(deepcopy=False)))


def endings(folder: pathlib.Path) -> dict[int, str]:
    """How trials that were pruned or failed ended, by their numbers, in words."""
    found: dict[int, str] = {}
    for study in studies(folder)[:1]:
        for trial in study.get_trials(deepcopy=False):
            if trial.state.name in ("PRUNED", "FAIL"):
                word = "pruned" if trial.state.name == "PRUNED" else "failed"
                reason = trial.user_attrs.get("reason")
                found[trial.number] = f"{word}: {reason}" if reason else word
    return found


def trial_number(path: pathlib.Path, folder: pathlib.Path) -> int | None:
    """The number of the trial whose folder ``path`` is, or is in."""
    match = _TRIAL.fullmatch(path.relative_to(folder).parts[0]) if path != folder else None
    return int(match.group(1)) if match else None


def _journals(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Files in a folder that begin as optuna's journals do."""
    for path in sorted(folder.iterdir()):
        try:
            with open(path, "rb") as file:
                first = json.loads(file.readline(65536))
        except (OSError, ValueError):
            continue
        if isinstance(first, dict) and "op_code" in first:
            yield path
