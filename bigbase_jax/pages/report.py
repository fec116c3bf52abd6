"""``report.html`` of a run: one page that needs nothing else, made from the files of the run folder alone.

Every part stands on its own, so a run that has just begun, was stopped or diverged has a page too.
"""

from __future__ import annotations

import json
import pathlib
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bigbase_jax.compare import scores, statistics
from bigbase_jax.compare.numbers import Metrics, finite, plain, proof_rows, si, when
from bigbase_jax.compare.runs import SPLITS, Run, rank, settings
from bigbase_jax.core import UserError
from bigbase_jax.pages import figures
from bigbase_jax.pages.page import Chart, Series, in_order, logged, metric_chart, thin, write_page
from bigbase_jax.runtime import redact
from bigbase_jax.runtime.log import duration

_HIDDEN = ("step", "kind", "split", "seconds", "epoch")
_TILES = 4
_LINEAGE = ("command", "git_commit", "git_dirty", "data", "started", "starts", "finished")
_TABLES = ("data_card", "privacy", "devices", "host", "versions")


def write(workdir: str, pictures: Callable[[], figures.Pictures] | None = None) -> str:
    """(Re)writes ``workdir/report.html``, atomically; what it shows of an evaluation is the run's task's and its
    evaluators' to say.

    Args:
      workdir: the run folder.
      pictures: gives what opens the pictures of examples, where a figure has some; None: the page says that they are
        not at hand.

    Returns:
      The page's path.

    Raises:
      UserError: there is no such folder, or it cannot be written.
    """
    folder = pathlib.Path(workdir)
    if not folder.is_dir():
        raise UserError(f"{workdir} is not a run folder; give --workdir the folder of a run.")
    run = Run.look(folder)
    evals = _evals(run)
    known = Metrics(run.metrics)
    kept = [path.stem.removeprefix("predictions-") for path in folder.glob("predictions-*.npz")]
    split = min({*evals, *kept}, key=rank, default=None)
    shown: list[dict[str, Any]] = []
    if split is not None:
        evaluated = run.evaluated(split)._replace(metrics=evals.get(split, {}))
        shown = figures.shaped(figures.made_by(run.task, evaluated), split, pictures)
    for name in evals:
        if (evaluator := run.evaluator(name)) is not None and name != split:
            evaluated = run.evaluated(name)._replace(metrics=evals[name])
            shown += figures.shaped(figures.made_by(evaluator, evaluated), name, pictures)
    main, more = _curves(run, known, evals)
    write_page(
        folder / "report.html",
        "report.html",
        title=f"{run.name} · run report",
        run=run,
        tone="good" if run.state == "finished" else "bad" if run.state.startswith("diverged") else "idle",
        about=run.lineage["data"].get("description") if isinstance(run.lineage.get("data"), dict) else None,
        tiles=_tiles(run, known, evals),
        curves=main,
        more_curves=more,
        evals=evals,
        metrics=[(known.title(name), name) for name in in_order(logged([*evals.values()], _HIDDEN), known)],
        figures=shown,
        proofs=[
            (f"Export to {name}" if name else "Compression", proof_rows(x, known)) for name, x in run.proofs.items()
        ],
        lineage=_lineage(run.lineage),
        settings=[(path, json.dumps(value, ensure_ascii=False)) for path, value in settings(run.config)],
    )
    return str(folder / "report.html")


def _evals(run: Run) -> dict[str, dict[str, Any]]:
    """By split; the last evaluation while training, where there is no final one."""
    while_training = {str(row.get("split")): row for row in run.rows if row.get("kind") == "eval"}
    evals = while_training | run.evals
    return {split: evals[split] for split in sorted(evals, key=rank)}


def _tiles(run: Run, known: Metrics, evals: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(name, value, its unit, note) of what a reader wants first."""
    tiles = []
    split = next(iter(evals), "")
    found = scores.read(run, split) if split in run.evals else ""
    scored = {} if isinstance(found, str) else found.scores
    for name in in_order(logged([evals.get(split, {})], _HIDDEN), known)[:_TILES]:
        note, value = f"on {split}", float(evals[split][name])
        right_N = scored[name].right_N if name in scored else None
        if right_N is not None and len(right_N):
            low, high = statistics.wilson(int(right_N.sum()), len(right_N))
            interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
            note = f"{right_N.sum():,} of {len(right_N):,} on {split}; {interval}"
        unit = known[name].unit
        tiles.append((known.title(name), known.glance(name, value).removesuffix(unit).strip(), unit, note))
    train = [row for row in run.rows if row.get("kind") == "train"]
    if not train:
        return tiles
    epoch = finite(train[-1].get("epoch"))
    passes = "of training" if epoch is None else "1 epoch" if f"{epoch:.3g}" == "1" else f"{epoch:.3g} epochs"
    tiles.append(("Steps", plain(train[-1].get("step")), "", passes))
    speeds, waits = ([y for _, y in run.curve("train", name)] for name in ("examples_per_second", "data_wait"))
    if speeds:
        note = f"median; {100 * float(np.median(waits)):.1f} % waiting for data" if waits else "median"
        tiles.append(("Examples/s", si(float(np.median(speeds))), "", note))
    if (seconds := finite(run.rows[-1].get("seconds"))) is not None:
        devices = run.lineage.get("devices")
        kind = f"on {devices.get('count', 1)} x {devices.get('kind')}" if isinstance(devices, dict) else "of training"
        tiles.append(("Time", duration(seconds), "", kind))
    return tiles


def _curves(run: Run, known: Metrics, evals: Mapping[str, Mapping[str, Any]]) -> tuple[list[Chart], list[Chart]]:
    """The charts that are shown, and those that are shown on demand: first comes what is trained, then what the task
    puts first, then the other two of training that ``LOGGED`` puts first."""
    charts = {}
    for name in in_order(logged([row for row in run.rows if row.get("kind") in ("train", "eval")], _HIDDEN), known):
        series = _series(run, name, evals)
        if any(len(s.x) > 1 or s.marks for s in series):
            charts[name] = metric_chart(known, name, series)
    measured = [name for name in charts if name in run.metrics and name != "loss"][:1]
    main = [name for name in ("loss", *measured, "learning_rate", "examples_per_second") if name in charts]
    return [charts[name] for name in main], [charts[name] for name in charts if name not in main]


def _series(run: Run, name: str, evals: Mapping[str, Mapping[str, Any]]) -> list[Series]:
    found = []
    splits = dict.fromkeys(["train", *(str(row.get("split")) for row in run.rows if row.get("kind") == "eval")])
    for split in splits:
        points = run.curve("train", name) if split == "train" else run.curve("eval", name, split)
        if points:
            x, y = thin(points)
            found.append(Series(split, split if split in SPLITS else "other", x, y, split != "train" and len(x) < 60))
    for split, final in evals.items():
        step, value = finite(final.get("step")), finite(final.get(name))
        if split not in splits and value is not None and step is not None:
            found.append(Series(split, split if split in SPLITS else "other", [step], [value], True))
    return found


def _lineage(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of where a run comes from."""
    parts = {name: value if isinstance(value := lineage.get(name), dict) else {} for name in ("data", "devices")}
    splits = parts["data"].get("splits")
    known = (*_LINEAGE, *_TABLES)
    starts = [start if isinstance(start, dict) else {"started": start} for start in lineage.get("starts") or []]
    return {
        "command": _command(lineage["command"]) if lineage.get("command") else None,
        "commit": lineage.get("git_commit"),
        "dirty": lineage.get("git_dirty"),
        "data": parts["data"],
        "examples": ", ".join(f"{k} {plain(v)}" for k, v in splits.items()) if isinstance(splits, dict) else "",
        "tables": {k: v for k in _TABLES if isinstance(v := {**parts["data"], **lineage}.get(k), dict)},
        "started": lineage.get("started"),
        "starts": [_start(start) for start in starts],
        "finished": lineage.get("finished"),
        "rest": {k: v if isinstance(v, str) else json.dumps(v) for k, v in lineage.items() if k not in known},
    }


def _command(said: Any) -> str:
    """The command of a run, without what earlier versions kept in it."""
    try:
        return shlex.join(redact.command(shlex.split(str(said))))
    except ValueError:  # it is no command
        return redact.hide(str(said))


def _start(start: Mapping[str, Any]) -> str:
    """One of several starts: when, from which step to which, and how it ended."""
    steps = [str(start[key]) for key in ("from_step", "to_step") if key in start]
    parts = [when(start["started"])] if start.get("started") else []
    parts += [f"{'steps' if len(steps) > 1 else 'from step'} {' to '.join(steps)}"] if steps else []
    return ", ".join([*parts, *([str(start["how"])] if start.get("how") else [])])
