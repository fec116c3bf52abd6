"""The runs to compare: found in folders, read from their files, grouped where only the seed differs.

Nothing here needs checkpoints, data or devices. What cannot be used is said in one sentence, and the rest goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import itertools
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.build import build, suggest
from bigbase_jax.compare.numbers import finite
from bigbase_jax.compare.studies import choices, endings, objective, trial_number, unread
from bigbase_jax.core import Evaluated, Evaluator, Metric, Task, UserError, some
from bigbase_jax.runtime import redact
from bigbase_jax.runtime.log import read_rows, say
from bigbase_jax.runtime.restored import dataset_info, evaluator, metrics
from bigbase_jax.runtime.rundir import MACHINERY, RunDir
from bigbase_jax.runtime.untrusted import read_object

SPLITS = ("test", "val", "train")
"""Splits in the order in which a reader wants them."""
SEEDS = ("seed", "data.seed")
"""Settings that make another sample of the same experiment."""
ABSENT = "–"
"""What stands for a setting that a run does not have."""
_DEPTH = 4  # folders below a given one in which runs are looked for
_BROKEN = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile)


@dataclasses.dataclass(frozen=True)
class Run:
    """What the files of a run folder say; of those that are missing or broken, nothing.

    Attributes:
      path: the folder.
      name: as short as tells it from the others.
      sweep: the number of the argument that named a folder of runs, with this one in it; None: named itself.
      config, lineage, rows: of ``config.json``, ``lineage.json`` and ``metrics.jsonl``.
      evals: of ``eval-SPLIT.json``, by split, in the order of ``SPLITS``.
      ending: how it ended, where that is known from elsewhere.
      chosen: what a sweep chose for it, by key of the config; {}: unknown, or it is not of one sweep alone.
    """

    path: pathlib.Path
    name: str
    sweep: int | None
    config: dict[str, Any]
    lineage: dict[str, Any]
    rows: list[dict[str, Any]]
    evals: dict[str, dict[str, Any]]
    ending: str | None = None
    chosen: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def look(cls, path: pathlib.Path, name: str = "", sweep: int | None = None, ending: str | None = None) -> Run:
        """Reads a folder, whatever is in it."""
        evals = {}
        for file in path.glob("eval-*.json"):
            if found := _object(file):
                evals[str(found.get("split") or file.stem.removeprefix("eval-"))] = found
        config, lineage = (_object(path / f"{file}.json") or {} for file in ("config", "lineage"))
        rows = read_rows(path / "metrics.jsonl")
        ordered = {split: evals[split] for split in sorted(evals, key=rank)}
        return cls(path, name or path.resolve().name, sweep, config, lineage, rows, ordered, ending)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The config by dotted path, without what only says where the run computes."""
        return {key: value for key, value in settings(self.config) if not MACHINERY.match(f"config.{key}")}

    @functools.cached_property
    def state(self) -> str:
        """In words."""
        steps = [int(row["step"]) for row in self.rows if isinstance(row.get("step"), int)]
        diverged = [row for row in self.rows if row.get("kind") == "diverged"]
        if self.lineage.get("finished"):
            return "finished"
        if self.ending:
            return f"{self.ending} (step {max(steps):,})" if steps else self.ending
        if diverged:
            return f"diverged at step {diverged[-1].get('step')}"
        return f"not finished, at step {max(steps):,}" if steps else "not begun"

    @functools.cached_property
    def task(self) -> Task | None:
        """Its task; None, and a line that says why, where that cannot be built, or names what is not trusted."""
        try:
            return task_of(RunDir(self.path))
        except (UserError, *_BROKEN) as error:
            say(f"the task of {self.name} is not known, so its figures are left out: {error}")
            return None

    def evaluator(self, name: str) -> Evaluator | None:
        """``config.evaluators.NAME``; None where there is none, or, with a line that says why, it cannot be built."""
        if not isinstance(own := self.config.get("evaluators"), dict) or name not in own:
            return None
        try:
            return evaluator(RunDir(self.path), name)
        except (UserError, *_BROKEN) as error:
            say(f"the evaluator {name} of {self.name} is not known, so its figures are left out: {error}")
            return None

    @functools.cached_property
    def metrics(self) -> Mapping[str, Metric]:
        """What its metrics mean, in the order of its task; nothing where neither its files nor its task say it."""
        try:
            return metrics(RunDir(self.path))
        except (UserError, *_BROKEN):
            return {}

    @functools.cached_property
    def proofs(self) -> dict[str, dict[str, Any]]:
        """``proof.json`` of the run itself, where it was compressed (""), and of each of its exports, by format."""
        places = {"": self.path, **{path.name: path for path in sorted(self.path.glob("export/*")) if path.is_dir()}}
        return {name: found for name, path in places.items() if (found := _object(path / "proof.json"))}

    def evaluated(self, split: str) -> Evaluated:
        """What its last evaluation on a split has kept: nothing where that is not there, or broken."""
        try:
            with np.load(self.path / f"predictions-{split}.npz") as file:
                arrays = {name: file[name] for name in file.files}
        except _BROKEN:
            arrays = {}
        return Evaluated(split, self.evals.get(split, {}), arrays)

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    @property
    def seed(self) -> tuple[Any, ...]:
        return tuple(self.settings.get(name) for name in SEEDS)

    @property
    def design(self) -> dict[str, Any]:
        """The settings but for the seeds."""
        return {name: value for name, value in self.settings.items() if name not in SEEDS}

    @property
    def shown(self) -> dict[str, Any]:
        """The settings but for the seeds; what a sweep chose goes by the name that it has there."""
        rest = {
            path: value for path, value in self.design.items() if not any(_within(path, key) for key in self.chosen)
        }
        return rest | {key: value for key, value in self.chosen.items() if key not in SEEDS}

    @property
    def origin(self) -> dict[str, Any]:
        """What else may explain a difference: code, versions, devices, data."""
        named = ("versions", "devices", "data")
        parts = {key: value if isinstance(value := self.lineage.get(key), dict) else {} for key in named}
        commit = self.lineage.get("git_commit")
        dirty = " with changes" if self.lineage.get("git_dirty") else ""
        found = {"git commit": f"{str(commit)[:10]}{dirty}" if commit else None}
        found |= {f"{package} version": version for package, version in parts["versions"].items()}
        if parts["devices"]:
            found["devices"] = f"{parts['devices'].get('count', 1)} x {parts['devices'].get('kind')}"
        found |= {"data": parts["data"].get("description"), "data fingerprint": parts["data"].get("fingerprint")}
        return found

    @property
    def fingerprint(self) -> str | None:
        """Of the data as the model saw it."""
        data = self.lineage.get("data")
        return data.get("fingerprint") if isinstance(data, dict) else None

    @property
    def examples(self) -> str | None:
        """The fingerprint of the examples, however they were encoded."""
        data = self.lineage.get("data")
        return data.get("examples", self.fingerprint) if isinstance(data, dict) else None

    def curve(self, kind: str, metric: str, split: str | None = None) -> list[tuple[float, float]]:
        """(step, value) of the log where both are numbers."""
        found = []
        for row in self.rows:
            if row.get("kind") == kind and (split is None or row.get("split") == split):
                step, value = finite(row.get("step")), finite(row.get(metric))
                if step is not None and value is not None:
                    found.append((step, value))
        return found

    def scalars(self, split: str) -> dict[str, float]:
        """The metrics of an evaluation that are numbers."""
        found = self.evals.get(split, {})
        return {k: v for k, x in found.items() if k not in ("step", "split") and (v := finite(x)) is not None}


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ only by their seeds; mostly one."""

    name: str
    runs: tuple[Run, ...]

    @property
    def model(self) -> str | None:
        """The class of its model."""
        found = (v for k, v in self.runs[0].settings.items() if re.fullmatch(r"task\.(task\.)*model\.target", k))
        return next((str(value).rpartition(":")[2] for value in found), None)

    def values(self, split: str, metric: str) -> list[float]:
        """The metric of each run that has it."""
        return [run.scalars(split)[metric] for run in self.runs if metric in run.scalars(split)]


@dataclasses.dataclass(frozen=True)
class Goal:
    """What the runs were tuned for.

    Attributes:
      metric: measured while training on the validation split, or by an evaluator: ``NAME/METRIC``.
      lower: whether less of it is better.
    """

    metric: str
    lower: bool

    def value(self, run: Run) -> float | None:
        """Its best value, of a run that kept its best checkpoint; else its last."""
        evaluator, _, metric = self.metric.rpartition("/")
        values = [value for _, value in run.curve("eval", metric, evaluator or "val")]
        if not values:
            return None
        best = run.settings.get("train.best_metric"), run.settings.get("train.best_mode", "max")
        if best == (self.metric, "min" if self.lower else "max"):
            return min(values) if self.lower else max(values)
        return values[-1]

    def mean(self, group: Group) -> float | None:
        """Over the runs of a group that have it."""
        values = [value for run in group.runs if (value := self.value(run)) is not None]
        return sum(values) / len(values) if values else None


def _within(path: str, key: str) -> bool:
    """Whether a setting belongs to a key of the config."""
    return path.startswith(key) and path[len(key) : len(key) + 1] in ("", ".", "[")


def task_of(run: RunDir) -> Task:
    """The task of a run, without its parameters.

    Raises:
      UserError: its config is broken, or names what is not trusted.
    """
    return build(run.config().task, dataset_info(run), _path="config.task")


def rank(split: str) -> tuple[int, str]:
    """A key that sorts splits as ``SPLITS``, others after them."""
    return (SPLITS.index(split) if split in SPLITS else len(SPLITS), split)


def settings(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted path, as the command line names them after ``--config.``"""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from settings(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        for i, item in enumerate(node):
            yield from settings(item, f"{path}[{i}]")
    else:
        yield path, redact.hide_setting(path, node)


def goal_of(runs: Sequence[Run], sweeps: Sequence[pathlib.Path] = ()) -> Goal | None:
    """What a sweep searched for; else ``config.train.best_metric`` where the runs agree on it; else the loss.

    None where no run has been validated.
    """
    searched = {objective(folder) for folder in sweeps}
    if len(searched) == 1 and (found := next(iter(searched))) is not None:
        goal = Goal(*found)
        return goal if any(goal.value(run) is not None for run in runs) else None
    named = {run.settings.get("train.best_metric") for run in runs}
    metric = next(iter(named)) if len(named) == 1 else None
    modes = {run.settings.get("train.best_mode") for run in runs}
    goal = Goal(metric, modes == {"min"}) if isinstance(metric, str) else Goal("loss", True)
    return goal if any(goal.value(run) is not None for run in runs) else None


# ----------------------------------------------------------------------------------------------------- finding


def load(workdirs: Sequence[str], storage: str | None = None) -> tuple[list[Run], list[pathlib.Path], list[str]]:
    """The runs that folders and patterns name, in that order; those of a folder of runs by their names.

    Args:
      storage: see ``studies``.

    Returns:
      The runs; the folders that held several; and a sentence for each that cannot be used, or only in part.

    Raises:
      UserError: there is no run at all, or ``storage`` does not give a sweep's study.
    """
    found: list[tuple[pathlib.Path, int | None]] = []
    sweeps: list[pathlib.Path] = []
    notes: list[str] = []
    ended: dict[tuple[pathlib.Path, int], str] = {}
    for i, given in enumerate(_expanded(workdirs)):
        path = pathlib.Path(given)
        if not path.is_dir():
            beside = [str(p) for p in path.parent.glob("*") if p.is_dir()] if path.parent.is_dir() else []
            notes.append(f"there is no folder {given}.{suggest(given, beside, 'folder') if len(beside) < 20 else ''}")
        elif (path / "config.json").exists():
            found.append((path, None))
        else:
            below = sorted(_runs_below(path, _DEPTH), key=natural)
            if not below:
                what = "holds no run: no config.json is in it or below" if any(path.iterdir()) else "is empty"
                notes.append(f"{given} {what}.")
            else:
                sweeps.append(path)
                ended |= {(path, number): ending for number, ending in endings(path, storage).items()}
                notes += [sentence] if (sentence := unread(path, storage)) else []
                notes += _empty_children(path, below, ended)
            found += [(p, i) for p in below]
    seen: dict[pathlib.Path, tuple[pathlib.Path, int | None]] = {}
    for path, sweep in found:
        if path.resolve() in seen:
            notes.append(f"{path} is named twice; it counts once.")
        seen.setdefault(path.resolve(), (path, sweep))
    names = _names(list(seen))
    runs, pruned = [], []
    for name, (path, sweep) in zip(names, seen.values(), strict=True):
        run = read(path, name, sweep, _ending(path, ended))
        if isinstance(run, str):
            notes.append(run)
            continue
        if not run.rows and not run.evals:
            notes.append(f"{name} has neither a log nor an evaluation ({run.state}); it is left out.")
            continue
        if not run.evals and run.state.startswith("pruned"):
            pruned.append(f"{name} has not been evaluated ({run.state})")
        elif not run.evals:
            notes.append(f"{name} has not been evaluated ({run.state}); only its settings and curves are shown.")
        elif not run.finished:
            notes.append(f"{name}: {run.state}; its evaluation is of a checkpoint before the end.")
        runs.append(run)
    if pruned:
        many = f"{len(pruned)} runs were pruned and have not been evaluated; only their settings and curves are shown."
        notes.append(f"{pruned[0]}; only its settings and curves are shown." if len(pruned) == 1 else many)
    if len(sweeps) == 1 and all(run.sweep is not None for run in runs):
        runs = _with_choices(runs, sweeps[0], storage)
    if not runs:
        said = " ".join(notes) if notes else "give --workdir once for each run, or the folder of a sweep."
        raise UserError(f"there is no run to compare: {said}")
    return runs, sweeps, notes


def _expanded(workdirs: Sequence[str]) -> Iterator[str]:
    for given in workdirs:
        matches = sorted(glob.glob(given), key=natural) if glob.has_magic(given) and not os.path.exists(given) else []
        yield from (m for m in matches if os.path.isdir(m)) if matches else [given]


def _runs_below(path: pathlib.Path, depth: int) -> Iterator[pathlib.Path]:
    """Folders with a config.json, but for those inside another such."""
    try:
        children = [child for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")]
    except OSError:
        return
    for child in children:
        if (child / "config.json").exists():
            yield child
        elif depth > 1:
            yield from _runs_below(child, depth - 1)


def natural(path: os.PathLike | str) -> list[tuple[int, int, str]]:
    """A key that sorts ``trial-9`` before ``trial-10``."""
    return [(0, int(x), "") if x.isdecimal() else (1, 0, x) for x in re.split(r"(\d+)", str(path)) if x]


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """Relative to the folder that they share, and without folders at the end that they share."""
    if len(paths) == 1:
        return [paths[0].name]
    if not paths:
        return []
    shared = os.path.commonpath([p.parent for p in paths])
    return [p.relative_to(shared).as_posix() for p in paths]


def _ending(path: pathlib.Path, ended: Mapping[tuple[pathlib.Path, int], str]) -> str | None:
    """What a study says of how a run ended."""
    for (folder, number), ending in ended.items():
        if path.is_relative_to(folder) and trial_number(path, folder) == number:
            return ending
    return None


def _with_choices(runs: Sequence[Run], folder: pathlib.Path, storage: str | None) -> list[Run]:
    """The runs of one sweep with what was chosen for each, if that is known of all and names keys of their configs.

    A key with one choice only, even if that exists for some runs alone, follows from the others: it counts as the same
    in all.
    """
    found = choices(folder, storage)
    chosen = [found.get(number, {}) if (number := trial_number(run.path, folder)) is not None else {} for run in runs]
    for run, mine in zip(runs, chosen, strict=True):
        if not mine or not all(any(_within(path, key) for path in run.settings) for key in mine):
            return list(runs)
    labels = {key: [mine[key] for mine in chosen if key in mine] for key in _union(chosen)}
    alike = {key: values[0] for key, values in labels.items() if all(value == values[0] for value in values)}
    return [dataclasses.replace(run, chosen=alike | mine) for run, mine in zip(runs, chosen, strict=True)]


def _empty_children(
    folder: pathlib.Path, below: Sequence[pathlib.Path], ended: Mapping[tuple[pathlib.Path, int], str]
) -> list[str]:
    """A sentence on each folder beside the runs that holds none."""
    notes = []
    for child in sorted(folder.iterdir(), key=natural):
        if child.is_dir() and not child.name.startswith(".") and not any(p.is_relative_to(child) for p in below):
            what = _ending(child, ended) or ("holds no run" if any(child.iterdir()) else "is empty")
            notes.append(f"{child} {what}.")
    return notes


def read(path: pathlib.Path, name: str, sweep: int | None, ending: str | None = None) -> Run | str:
    """A run, or the sentence why it is none; ``ending`` is how it ended, where that is known from elsewhere."""
    config = _object(path / "config.json")
    if config is None:
        return f"{path / 'config.json'} cannot be read; {name} is left out."
    if not all(isinstance(config.get(key), dict) for key in ("data", "task", "train")):
        return f"{name} is no run of this project: its config.json has no data, task and train."
    return Run.look(path, name, sweep, ending)


def _object(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return read_object(path)
    except (FileNotFoundError, UserError):
        return None


# ----------------------------------------------------------------------------------------------------- grouping


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs of the same settings and data but different seeds together, in the order of their first.

    The same settings and seed once more (after a change of the code, say) begin another group, and so do the runs of
    another folder of runs.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        key = json.dumps([run.sweep, run.fingerprint, run.design], sort_keys=True)
        for turn in range(len(runs)):
            members = groups.setdefault((key, turn), [])
            if run.seed not in [member.seed for member in members]:
                members.append(run)
                break
    found: dict[str, Group] = {}
    for members in groups.values():
        name = base = _shared_name([run.name for run in members])
        count = 1
        while name in found:
            count += 1
            name = f"{base} ({count})"
        found[name] = Group(name, tuple(members))
    return list(found.values())


def _shared_name(names: Sequence[str]) -> str:
    """What the names of a group's runs have in common, or the first."""
    if len(names) == 1:
        return names[0]
    words = [re.findall(r"\d+|\D+", name) for name in names]
    shared = "".join(column[0] for column in itertools.takewhile(lambda c: len(set(c)) == 1, zip(*words, strict=False)))
    shared = re.sub(r"([-_./ =]|\bseed)+$", "", shared)
    return shared or f"{names[0]} and {len(names) - 1} more"


def differences(groups: Sequence[Group]) -> dict[str, dict[str, list[Any]]]:
    """What differs between groups: part of the config (or "origin") -> path -> a value for each group."""
    found: dict[str, dict[str, list[Any]]] = {}
    designs = [group.runs[0].shown for group in groups]
    for path in _union(designs):
        values = [design.get(path, ABSENT) for design in designs]
        if any(value != values[0] for value in values):
            part = path.partition(".")[0]
            found.setdefault(part if part in ("data", "task", "optim", "train") else "other", {})[path] = values
    origins = [[run.origin for run in group.runs] for group in groups]
    for key in _union([origin for members in origins for origin in members]):
        known = [[ABSENT if (x := origin.get(key)) is None else str(x) for origin in members] for members in origins]
        values = [some(list(dict.fromkeys(words)), 3) for words in known]
        if any(value != values[0] for value in values):
            found.setdefault("origin", {})[key] = values
    return found


def _union(tables: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(tables)))


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Each path by as few of its last parts as tell it from the others."""
    found = {}
    for path in paths:
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            tail = ".".join(parts[-count:])
            if sum(other == tail or other.endswith("." + tail) for other in paths) == 1:
                break
        found[path] = tail
    return found


def choose_split(runs: Sequence[Run], wanted: str | None) -> str | None:
    """The split to compare on: the one asked for, else the one that most runs were evaluated on, test first.

    Raises:
      UserError: none was evaluated on the one asked for.
    """
    counts: dict[str, int] = {}
    for run in runs:
        for split in run.evals:
            counts[split] = counts.get(split, 0) + 1
    if wanted is not None:
        if wanted not in counts:
            raise UserError(f"no run was evaluated on the split {wanted!r}.{suggest(wanted, counts, 'split')}")
        return wanted
    return min(counts, key=lambda split: (-counts[split], rank(split)), default=None)
