"""``report.html`` of a run: one page that needs nothing else, made from the files of the run folder alone.

Every part stands on its own, so a run that has just begun, was stopped or diverged has a page too. Charts are inline
SVG coloured by the style sheet (light and dark), pictures are data URIs, there is no script, and a content policy
forbids the page any network. All text from the run is escaped.

Axes: N = examples of a split, K = classes.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import html
import io
import json
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.log import duration, read_rows

Pictures = Callable[[str, int], tuple[np.ndarray, str]]
"""(split, index) -> the picture, uint8 or float in [0, 1], [H, W], [H, W, 1] or [H, W, 3], and its file's name."""
Passages = Callable[[Mapping[str, np.ndarray]], Sequence[tuple[str, Sequence[tuple[str, float]]]]]
"""An evaluation's examples -> those worth reading: (title, [(piece of text, its loss in nats), ...]) each."""

SHOWN = 24
"""How many mistakes are shown."""
PIECES = 600
"""How many pieces of a passage are shown."""
BINS = 15
"""Of the reliability diagram."""
_SPLITS = ("test", "val", "train")
_SHARES = ("accuracy", "top5_accuracy", "precision", "recall", "f1")
_BROKEN = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile)
_HIDDEN = ("step", "kind", "split", "seconds", "epoch")


def write(workdir: str, pictures: Pictures | None = None, passages: Passages | None = None) -> str:
    """(Re)writes ``workdir/report.html``, atomically.

    What the page shows of single examples depends on what the evaluation kept: mistakes where that is ``probabilities``
    and ``label``, otherwise what ``passages`` makes of it.

    Args:
      workdir: the run folder.
      pictures: gives the pictures of examples; None: the page says that they are not at hand.
      passages: gives texts, where the task has some to show.

    Returns:
      The page's path.

    Raises:
      UserError: there is no such folder, or it cannot be written.
    """
    folder = pathlib.Path(workdir)
    if not folder.is_dir():
        raise UserError(f"{workdir} is not a run folder; give --workdir the folder of a run.")
    page = _page(_Run.load(folder), pictures, passages)
    path, partial = folder / "report.html", folder / f".report.html.{os.getpid()}.tmp"
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from error
    return str(path)


# ----------------------------------------------------------------------------------------------------- the run's files


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the files of a run folder say; parts that are missing or broken are empty."""

    name: str
    config: dict[str, Any]
    lineage: dict[str, Any]
    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    evals: dict[str, dict[str, Any]]
    predictions: dict[str, dict[str, np.ndarray]]
    kept: dict[str, pathlib.Path]

    @classmethod
    def load(cls, folder: pathlib.Path) -> _Run:
        rows = read_rows(folder / "metrics.jsonl")
        evals: dict[str, dict[str, Any]] = {}
        for path in folder.glob("eval-*.json"):
            found = _json(path)
            if found:
                evals[str(found.get("split") or path.stem.removeprefix("eval-"))] = found
        for row in rows:  # the last evaluation while training, where there is no final one
            split = str(row.get("split"))
            if row.get("kind") == "eval" and (split not in evals or evals[split].get("kind") == "eval"):
                evals[split] = row
        kept = {p.stem.removeprefix("predictions-"): p for p in folder.glob("predictions-*.npz")}
        predictions = {split: _classified(path) for split, path in kept.items()}
        return cls(
            name=folder.resolve().name,
            config=_json(folder / "config.json"),
            lineage=_json(folder / "lineage.json"),
            facts=_json(folder / "data.json").get("facts") or {},
            rows=rows,
            evals={split: evals[split] for split in sorted(evals, key=_rank)},
            predictions={split: predictions[split] for split in sorted(predictions, key=_rank) if predictions[split]},
            kept={split: kept[split] for split in sorted(kept, key=_rank)},
        )

    def kind(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row.get("kind") == kind]

    def class_names(self, count: int) -> list[str]:
        """Names of K classes; numbers where the run knows none."""
        per_class = [list(e["per_class"]) for e in self.evals.values() if isinstance(e.get("per_class"), dict)]
        task = self.config.get("task")
        for names in (
            *per_class,
            self.facts.get("class_names"),
            task.get("class_names") if isinstance(task, dict) else None,
        ):
            if isinstance(names, (list, tuple)) and len(names) == count:
                return [str(name) for name in names]
        return [str(k) for k in range(count)]


def _rank(split: str) -> tuple[int, str]:
    return (_SPLITS.index(split) if split in _SPLITS else len(_SPLITS), split)


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _classified(path: pathlib.Path) -> dict[str, np.ndarray]:
    """``probabilities`` f64[N,K], ``label`` i64[N] and ``index`` i64[N], or nothing where they are not there."""
    try:
        with np.load(path) as file:
            p_NK, label_N = np.asarray(file["probabilities"], np.float64), np.asarray(file["label"])
            index_N = np.asarray(file["index"]) if "index" in file else np.arange(len(label_N))
    except _BROKEN:
        return {}
    label_N = label_N.argmax(-1) if label_N.ndim == 2 else label_N
    if p_NK.ndim != 2 or not len(p_NK) or not len(p_NK) == len(label_N) == len(index_N):
        return {}
    if np.min(label_N) < 0 or np.max(label_N) >= p_NK.shape[1]:
        return {}
    return {"probabilities": p_NK, "label": label_N.astype(np.int64), "index": index_N.astype(np.int64)}


# ----------------------------------------------------------------------------------------------------- the page


def _page(run: _Run, pictures: Pictures | None, passages: Passages | None) -> str:
    split = next(iter(run.evals), None)
    final = run.evals[split] if split else {}
    parts = [_header(run), _tiles(run, split, final), _curves(run)]
    parts.append(_row(_metrics(run), _classes(final, split) if split else ""))
    if run.predictions:
        predicted, arrays = next(iter(run.predictions.items()))
        names = run.class_names(arrays["probabilities"].shape[1])
        matrix = run.evals.get(predicted, {}).get("confusion_matrix") or _count(arrays)
        parts.append(_row(_confusion(matrix, names, predicted), _calibration(arrays, predicted)))
        parts.append(_mistakes(arrays, names, predicted, pictures))
    elif split and isinstance(matrix := final.get("confusion_matrix"), list):
        parts.append(_confusion(matrix, run.class_names(len(matrix)), split))
    elif passages is not None:
        parts.append(_passages(run, passages))
    parts += [_lineage(run), _config(run)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{_e(run.name)} · run report</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _header(run: _Run) -> str:
    diverged = run.kind("diverged")
    steps = [row["step"] for row in run.rows if isinstance(row.get("step"), int)]
    if run.lineage.get("finished"):
        state, tone = "finished", "good"
    elif diverged:
        state, tone = f"diverged at step {diverged[-1].get('step')}", "bad"
    elif steps:
        state, tone = f"not finished, at step {max(steps):,}", "idle"
    else:
        state, tone = "no step logged yet", "idle"
    data = run.lineage.get("data")
    about = data.get("description") if isinstance(data, dict) else None
    facts = [f"started {_when(run.lineage['started'])}"] if run.lineage.get("started") else []
    facts += [f"finished {_when(run.lineage['finished'])}"] if run.lineage.get("finished") else []
    return (
        f'<header><p class="over">Run report</p><h1>{_e(run.name)} <span class="state {tone}">{_e(state)}</span></h1>'
        + (f'<p class="lead">{_e(about)}</p>' if about else "")
        + (f'<p class="quiet">{_e(" · ".join(facts))}</p>' if facts else "")
        + "</header>"
    )


def _tiles(run: _Run, split: str | None, final: Mapping[str, Any]) -> str:
    tiles = []
    scalars = {name: value for name, value in final.items() if name not in _HIDDEN and _number(value) is not None}
    first: list[str] = [n for n in ("accuracy", "f1", "auc", "loss") if n in scalars]
    first += [n for n in scalars if n not in first][: max(4 - len(first), 0)]
    for name in first:
        note = f"on {split}"
        arrays = run.predictions.get(split or "")
        if name == "accuracy" and arrays:
            right, total = int(np.sum(arrays["probabilities"].argmax(-1) == arrays["label"])), len(arrays["label"])
            low, high = wilson(right, total)
            note = f"{right:,} of {total:,} on {split}; 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
        tiles.append((_title(name), _value(name, scalars[name]), note))
    train = run.kind("train")
    if train:
        last = train[-1]
        epoch = _number(last.get("epoch"))
        tiles.append(("Steps", f"{last['step']:,}", f"{epoch:.3g} epochs" if epoch is not None else "of training"))
        speeds = [_number(row.get("examples_per_second")) for row in train]
        known = [speed for speed in speeds if speed is not None]
        waits = [wait for row in train if (wait := _number(row.get("data_wait"))) is not None]
        if known:
            note = f"median; {100 * float(np.median(waits)):.1f} % waiting for data" if waits else "median"
            tiles.append(("Examples/s", _si(float(np.median(known))), note))
        seconds = _number(run.rows[-1].get("seconds"))
        if seconds is not None:
            devices = run.lineage.get("devices")
            kind = (
                f"on {devices.get('count', 1)} x {devices.get('kind')}" if isinstance(devices, dict) else "of training"
            )
            tiles.append(("Time", duration(seconds), kind))
    if not tiles:
        return ""
    cells = "".join(
        f'<div class="tile"><p class="name">{_e(name)}</p><p class="number">{_e(value)}</p>'
        f'<p class="quiet">{_e(note)}</p></div>'
        for name, value, note in tiles
    )
    return f'<section class="tiles" aria-label="Key numbers">{cells}</section>'


# ----------------------------------------------------------------------------------------------------- curves


@dataclasses.dataclass(frozen=True)
class _Series:
    name: str
    colour: str
    x: list[float]
    y: list[float]
    marks: bool = False


def _curves(run: _Run) -> str:
    train, evals = run.kind("train"), run.kind("eval")
    names: dict[str, None] = {}
    for row in [*evals, *train]:
        names.update(dict.fromkeys(n for n in row if n not in _HIDDEN and _number(row[n]) is not None))
    charts = {name: _series(run, name, train, evals) for name in names}
    charts = {name: series for name, series in charts.items() if any(len(s.x) > 1 or s.marks for s in series)}
    if not charts:
        return _section("Curves", '<p class="quiet">Nothing has been logged yet.</p>')
    main: list[str] = [n for n in ("loss", "accuracy", "learning_rate", "examples_per_second") if n in charts]
    rest = [n for n in charts if n not in main]
    if "accuracy" not in main and rest:
        main.insert(1, rest.pop(0))
    body = f'<div class="charts">{"".join(_chart(n, charts[n]) for n in main)}</div>'
    if rest:
        more = "".join(_chart(n, charts[n]) for n in rest)
        body += f'<details><summary>{len(rest)} more curves</summary><div class="charts">{more}</div></details>'
    return _section("Curves", body)


def _series(run: _Run, name: str, train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> list[_Series]:
    found = []
    by_split: dict[str, list[dict[str, Any]]] = {"train": train}
    for row in evals:
        by_split.setdefault(f"{row.get('split')}", []).append(row)
    for split, rows in by_split.items():
        points = [(float(r["step"]), v) for r in rows if "step" in r and (v := _number(r.get(name))) is not None]
        if points:
            x, y = _thin(points)
            found.append(_Series(split, split if split in _SPLITS else "other", x, y, split != "train" and len(x) < 60))
    for split, final in run.evals.items():
        value = _number(final.get(name))
        if split not in by_split and value is not None and _number(final.get("step")) is not None:
            found.append(_Series(split, split if split in _SPLITS else "other", [float(final["step"])], [value], True))
    return found


def _thin(points: list[tuple[float, float]], most: int = 500) -> tuple[list[float], list[float]]:
    """At most so many points: means of neighbours."""
    groups = np.array_split(np.asarray(points), most) if len(points) > most else [np.asarray([p]) for p in points]
    means = [group.mean(0) for group in groups]
    return [float(m[0]) for m in means], [float(m[1]) for m in means]


def _chart(name: str, series: Sequence[_Series], width: int = 480, height: int = 250) -> str:
    left, right, top, bottom = 54, 12, 10, 28
    xs, ys = [x for s in series for x in s.x], [y for s in series for y in s.y]
    x0, x1 = min(xs), max(xs)
    if x0 == x1:
        x0, x1 = x0 - 1, x1 + 1
    ticks_y = _ticks(min(ys), max(ys))
    y0, y1 = ticks_y[0], ticks_y[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (width - left - right),
            height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom),
        )

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_e(_title(name))} over steps">']
    for y in ticks_y:
        px, py = at(x0, y)
        out.append(f'<line class="grid" x1="{px:.1f}" x2="{width - right}" y1="{py:.1f}" y2="{py:.1f}"/>')
        out.append(f'<text x="{left - 8}" y="{py + 4:.1f}" text-anchor="end">{_e(_axis(name, y, y1 - y0))}</text>')
    for x in _ticks(x0, x1, 5):
        if x0 <= x <= x1:
            px, _ = at(x, y0)
            anchor = "end" if px > width - 30 else "middle"
            out.append(f'<text x="{px:.1f}" y="{height - 8}" text-anchor="{anchor}">{_e(_si(x))}</text>')
    for s in series:
        points = [at(x, y) for x, y in zip(s.x, s.y, strict=True)]
        if len(points) > 1:
            line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
            out.append(f'<polyline class="line {s.colour}" points="{line}"/>')
        if s.marks or len(points) == 1:
            radius = 5 if len(points) == 1 else 3
            out += [
                f'<circle class="dot {s.colour}" cx="{px:.1f}" cy="{py:.1f}" r="{radius}">'
                f"<title>{_e(s.name)}, step {x:,.0f}: {_e(_value(name, y))}</title></circle>"
                for (px, py), x, y in zip(points, s.x, s.y, strict=True)
            ]
    legend = "".join(
        f'<span class="key {s.colour}">{_e(s.name if len(series) > 1 or s.name != "train" else "last")} '
        f"<b>{_e(_value(name, s.y[-1]))}</b></span>"
        for s in series
    )
    out.append("</svg>")
    return f"<figure><figcaption><b>{_e(_title(name))}</b>{legend}</figcaption>{''.join(out)}</figure>"


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers at even steps that enclose [low, high]."""
    if low == high:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


# ----------------------------------------------------------------------------------------------------- tables


def _metrics(run: _Run) -> str:
    if not run.evals:
        return _section("Metrics", '<p class="quiet">This run has not been evaluated yet.</p>')
    names: dict[str, None] = {}
    for found in run.evals.values():
        names.update(dict.fromkeys(n for n, v in found.items() if n not in _HIDDEN and _number(v) is not None))
    head = "".join(
        f"<th>{_e(split)}<small>step {_e(found.get('step', '?'))}</small></th>" for split, found in run.evals.items()
    )
    rows = "".join(
        f"<tr><th>{_e(_title(name))}</th>"
        + "".join(f"<td>{_e(_plain(found.get(name)))}</td>" for found in run.evals.values())
        + "</tr>"
        for name in names
    )
    table = f'<table class="numbers"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return _section("Metrics", f'<div class="wide">{table}</div>')


def _classes(final: Mapping[str, Any], split: str) -> str:
    classes = final.get("per_class")
    if not isinstance(classes, dict) or not all(isinstance(values, dict) for values in classes.values()):
        return ""
    columns: dict[str, None] = {}
    for values in classes.values():
        columns.update(dict.fromkeys(values))
    head = "".join(f"<th>{_e(_title(column))}</th>" for column in columns)
    rows = []
    for name, values in classes.items():
        cells = []
        for column in columns:
            share = _number(values.get(column))
            bar = f' class="bar" style="--share:{100 * share:.1f}%"' if column in _SHARES and share is not None else ""
            cells.append(f"<td{bar}><span>{_e(_plain(values.get(column)))}</span></td>")
        rows.append(f"<tr><th>{_e(name)}</th>{''.join(cells)}</tr>")
    table = (
        '<div class="wide"><table class="numbers"><thead><tr><th>Class</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    if len(classes) > 30:
        table = f"<details><summary>{len(classes)} classes</summary>{table}</details>"
    return _section(f"Classes <small>{_e(split)}</small>", table)


def _count(arrays: Mapping[str, np.ndarray]) -> list[list[int]]:
    p_NK = arrays["probabilities"]
    matrix_KK = np.zeros((p_NK.shape[1],) * 2, np.int64)
    np.add.at(matrix_KK, (arrays["label"], p_NK.argmax(-1)), 1)
    return matrix_KK.tolist()


def _confusion(matrix: Sequence[Sequence[float]], names: Sequence[str], split: str) -> str:
    try:
        matrix_KK = np.asarray(matrix, np.float64)
    except ValueError:
        return ""
    if matrix_KK.ndim != 2 or matrix_KK.shape != (len(names),) * 2:
        return ""
    size = "large" if len(names) <= 6 else "middle" if len(names) <= 12 else "small" if len(names) <= 30 else "tiny"
    share_KK = matrix_KK / np.maximum(matrix_KK.sum(1, keepdims=True), 1)
    rows = []
    for i, name in enumerate(names):
        cells = []
        for j, guess in enumerate(names):
            count, share = matrix_KK[i, j], share_KK[i, j]
            if not count:
                cells.append('<td class="none">0</td>' if size in ("large", "middle") else "<td></td>")
                continue
            shade = math.sqrt(share)
            colour = "var(--right)" if i == j else "var(--wrong)"
            text = f"{count:,.0f}" + (f"<small>{_share(share)}</small>" if size in ("large", "middle") else "")
            light = ' class="full"' if shade > 0.6 else ""
            title = f"{_e(name)} called {_e(guess)}: {count:,.0f} ({_share(share)})"
            cells.append(
                f'<td{light} style="--c:{colour};--a:{100 * shade:.0f}%" title="{title}">'
                f"{'' if size == 'tiny' else text}</td>"
            )
        rows.append(f"<tr><th>{_e(name)}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th><span>{_e(name)}</span></th>" for name in names) if size != "tiny" else ""
    head = f"<thead><tr><th></th>{head}</tr></thead>" if head else ""
    table = f'<div class="wide"><table class="confusion {size}">{head}<tbody>{"".join(rows)}</tbody></table></div>'
    note = "Rows are the true classes, columns what the model said; shades are shares of the row."
    return _section(
        f"Confusion matrix <small>{_e(split)}</small>",
        f'<p class="quiet{" narrow" if size == "large" else ""}">{note}</p>'
        f'<div class="beside">{table}{_confused(matrix_KK, share_KK, names)}</div>',
    )


def _confused(matrix_KK: np.ndarray, share_KK: np.ndarray, names: Sequence[str]) -> str:
    """The most frequent confusions in words, where there are enough classes to lose sight."""
    wrong_KK = matrix_KK * (1 - np.eye(len(names)))
    if len(names) < 4 or not wrong_KK.any():
        return ""
    order = np.argsort(-wrong_KK, axis=None, kind="stable")[:8]
    items = "".join(
        f"<li><b>{_e(names[i])}</b> called <b>{_e(names[j])}</b>: {wrong_KK[i, j]:,.0f} "
        f"<small>({_share(share_KK[i, j])})</small></li>"
        for i, j in (divmod(int(flat), len(names)) for flat in order)
        if wrong_KK[i, j]
    )
    return f'<div class="aside"><h3>Most confused</h3><ol>{items}</ol></div>'


def _calibration(arrays: Mapping[str, np.ndarray], split: str, width: int = 420, height: int = 300) -> str:
    """The reliability diagram (Guo et al. 2017, figure 1) over a histogram of the confidences."""
    p_NK = arrays["probabilities"]
    confidence_N, right_N = p_NK.max(-1), p_NK.argmax(-1) == arrays["label"]
    if not np.isfinite(confidence_N).all() or confidence_N.max() > 1 + 1e-3:
        return ""
    bin_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    count_B = np.bincount(bin_N, minlength=BINS)
    accuracy_B = np.bincount(bin_N, right_N, minlength=BINS) / np.maximum(count_B, 1)
    mean_B = np.bincount(bin_N, confidence_N, minlength=BINS) / np.maximum(count_B, 1)
    error = float(np.sum(count_B * np.abs(accuracy_B - mean_B)) / len(confidence_N))
    left, top, bottom, right = 56, 12, 42, 12
    span, tall = width - left - right, height - top - bottom
    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Reliability diagram">']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = top + tall * (1 - tick)
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{100 * tick:.0f} %</text>')
        anchor = "end" if tick == 1 else "middle"
        out.append(
            f'<text x="{left + span * tick:.1f}" y="{height - 24}" text-anchor="{anchor}">{100 * tick:.0f} %</text>'
        )
    for b in range(BINS):
        if count_B[b]:
            x, tallness = left + span * b / BINS, tall * accuracy_B[b]
            faint = 0.25 + 0.75 * math.sqrt(count_B[b] / np.max(count_B))
            out.append(
                f'<rect class="column" x="{x + 1:.1f}" y="{top + tall - tallness:.1f}" width="{span / BINS - 2:.1f}" '
                f'height="{tallness:.1f}" opacity="{faint:.2f}"><title>confidence {_share(mean_B[b])}: '
                f"{_share(accuracy_B[b])} right, {count_B[b]:,} examples</title></rect>"
            )
    out.append(f'<line class="ideal" x1="{left}" y1="{top + tall}" x2="{left + span}" y2="{top}"/>')
    out.append(f'<text x="{left + span / 2}" y="{height - 6}" text-anchor="middle">confidence</text></svg>')
    mean, accuracy = float(confidence_N.mean()), float(right_N.mean())
    over = "more" if mean > accuracy else "less"
    text = (
        f"<p>Bars: how often the model was right when it was so sure; on the dashed line, confidence can be read as "
        f"probability. Fainter bars hold fewer examples.</p><p>Its mean confidence is {_share(mean)}, {over} than its "
        f"accuracy of {_share(accuracy)}; the expected calibration error is <b>{error:.4f}</b>.</p>"
    )
    body = f'<div class="beside"><figure class="single">{"".join(out)}</figure><div class="aside">{text}</div></div>'
    return _section(f"Calibration <small>{_e(split)}</small>", body, "grow")


# ----------------------------------------------------------------------------------------------------- passages


def _passages(run: _Run, passages: Passages) -> str:
    """Texts of the first split that has any, each piece shaded by its loss."""
    for split, path in run.kept.items():
        try:
            with np.load(path) as file:
                found = passages({name: file[name] for name in file.files})
        except _BROKEN:
            continue
        cards = []
        for title, pieces in found:
            spans = []
            for text, nats in pieces[:PIECES]:
                shade = 100 * min(max(nats, 0.0) / 8, 1) if math.isfinite(nats) else 100
                spans.append(f'<span style="--a:{shade:.0f}%" title="{nats:.2f} nats">{_e(text)}</span>')
            more = f" … and {len(pieces) - PIECES:,} more" if len(pieces) > PIECES else ""
            cards.append(
                f"<figure><figcaption><b>{_e(title)}</b></figcaption>"
                f'<p class="passage">{"".join(spans)}{more}</p></figure>'
            )
        if cards:
            note = "The darker a piece, the less the model expected it; hold the pointer over it for its loss."
            body = f'<p class="quiet">{note}</p><div class="charts">{"".join(cards)}</div>'
            return _section(f"Hardest passages <small>{_e(split)}</small>", body)
    return ""


# ----------------------------------------------------------------------------------------------------- mistakes


def _mistakes(arrays: Mapping[str, np.ndarray], names: Sequence[str], split: str, pictures: Pictures | None) -> str:
    p_NK, label_N, index_N = arrays["probabilities"], arrays["label"], arrays["index"]
    guess_N, rows_N = p_NK.argmax(-1), np.arange(len(label_N))
    wrong_N = guess_N != label_N
    if wrong_N.any():
        title = "Worst mistakes"
        note = f"{wrong_N.sum():,} of {len(label_N):,} are wrong; these gave the true class the least probability."
        shown = [i for i in np.argsort(p_NK[rows_N, label_N], kind="stable") if wrong_N[i]][:SHOWN]
    else:
        title, note = "Least certain", f"All {len(label_N):,} are right; of these the model was least certain."
        shown = list(np.argsort(p_NK.max(-1), kind="stable")[:SHOWN])
    if pictures is None:
        note += " The pictures are not here, since the data is not at hand: run --mode=report where it is."
    cards = []
    for i in shown:
        picture, name = "", f"example {index_N[i]}"
        if pictures is not None:
            try:
                pixels, name = pictures(split, int(index_N[i]))
                picture = _image(pixels, f"{name}: {names[label_N[i]]}")
            except (UserError, OSError, LookupError, TypeError, ValueError) as error:
                picture = f'<p class="missing">no picture: {_e(error)}</p>'
        verdict = "said" if wrong_N[i] else "rightly said"
        truth = f"<br>is <b>{_e(names[label_N[i]])}</b> {_share(p_NK[i, label_N[i]])}" if wrong_N[i] else ""
        cards.append(
            f'<figure class="card">{picture}<figcaption>{verdict} <b class="{"wrong" if wrong_N[i] else "right"}">'
            f"{_e(names[guess_N[i]])}</b> {_share(p_NK[i, guess_N[i]])}{truth}"
            f'<span class="file" title="{_e(name)}">{_e(name)}</span></figcaption></figure>'
        )
    body = f'<p class="quiet">{_e(note)}</p><div class="cards">{"".join(cards)}</div>'
    return _section(f"{title} <small>{_e(split)}</small>", body)


def _image(pixels: np.ndarray, alt: str, side: int = 224) -> str:
    """An ``<img>`` with the picture inside, shrunk to ``side``; small ones keep their pixels."""
    from PIL import Image

    x_HWC = np.asarray(pixels)
    if x_HWC.ndim == 3 and x_HWC.shape[-1] == 1:
        x_HWC = x_HWC[..., 0]
    if x_HWC.dtype != np.uint8:
        x_HWC = x_HWC.astype(np.float32)
        low, high = float(x_HWC.min()), float(x_HWC.max())
        if low < 0 or high > 1:  # normalised: show its own range
            x_HWC = (x_HWC - low) / max(high - low, 1e-6)
        x_HWC = np.round(255 * x_HWC).astype(np.uint8)
    picture = Image.fromarray(x_HWC)
    small = max(picture.size) <= 64
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    kind, crisp = ("png", ' class="crisp"') if small else ("jpeg", "")
    return f'<img{crisp} alt="{_e(alt)}" src="data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}">'


# ------------------------------------------------------------------------------------------------- where it comes from


def _lineage(run: _Run) -> str:
    lineage = run.lineage
    if not lineage:
        return ""
    rows: list[tuple[str, str]] = []
    if lineage.get("command"):
        rows.append(("Command", f"<code>{_e(lineage['command'])}</code>"))
    if lineage.get("git_commit"):
        dirty = ", with uncommitted changes" if lineage.get("git_dirty") else ""
        rows.append(("Git commit", f"<code>{_e(lineage['git_commit'])}</code>{dirty}"))
    data = lineage.get("data")
    if isinstance(data, dict):
        splits = data.get("splits")
        counts = ", ".join(f"{k} {_plain(v)}" for k, v in splits.items()) if isinstance(splits, dict) else ""
        rows += [("Data", _e(data.get("description", "")))] + ([("Examples", _e(counts))] if counts else [])
        rows.append(("Data fingerprint", f"<code>{_e(data.get('fingerprint', ''))}</code>"))
    for name in ("devices", "host", "versions"):
        if isinstance(lineage.get(name), dict):
            pairs = "".join(
                f'<span class="pair">{_e(k)} <b>{_e("" if v is None else v)}</b></span>'
                for k, v in lineage[name].items()
            )
            rows.append((name.capitalize(), pairs))
    starts = lineage.get("starts") or []
    rows += [("Started", _e(_when(lineage["started"])))] if lineage.get("started") else []
    rows += [("Continued", _e(", ".join(map(_when, starts[1:]))))] if len(starts) > 1 else []
    rows += [("Finished", _e(_when(lineage["finished"])))] if lineage.get("finished") else []
    known = {
        "command",
        "git_commit",
        "git_dirty",
        "data",
        "devices",
        "host",
        "versions",
        "started",
        "starts",
        "finished",
    }
    rows += [(_title(k), _e(v if isinstance(v, str) else json.dumps(v))) for k, v in lineage.items() if k not in known]
    body = "".join(f"<tr><th>{_e(name)}</th><td>{value}</td></tr>" for name, value in rows)
    return _section("Lineage", f'<table class="facts"><tbody>{body}</tbody></table>')


def _config(run: _Run) -> str:
    if not run.config:
        return ""
    rows = "".join(
        f"<tr><th><code>{_e(path)}</code></th><td><code>{_e(json.dumps(value, ensure_ascii=False))}</code></td></tr>"
        for path, value in _flat(run.config)
    )
    table = f'<table class="facts config"><tbody>{rows}</tbody></table>'
    return _section("Config", f"<details><summary>{len(list(_flat(run.config)))} settings</summary>{table}</details>")


def _flat(node: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Settings by dotted path, as the command line names them after ``--config.``"""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        for i, item in enumerate(node):
            yield from _flat(item, f"{path}[{i}]")
    else:
        yield path, node


# ------------------------------------------------------------------------------------------------- words and numbers


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927)."""
    p, spread = right / total, z * z / total
    middle = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / total + spread / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def _e(text: object) -> str:
    return html.escape(str(text), quote=True)


def _section(title: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{title}</h2>{body}</section>'


def _row(*sections: str) -> str:
    """Sections side by side where the window is wide enough."""
    return f'<div class="row">{"".join(sections)}</div>'


def _number(value: Any) -> float | None:
    return (
        float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )


_TITLES = {"f1": "F1", "auc": "AUC", "mfu": "MFU", "memory_gb": "Memory (GB)", "top5_accuracy": "Top-5 accuracy"}


def _title(name: str) -> str:
    words = str(name).replace("_", " ")
    return _TITLES.get(str(name), words[:1].upper() + words[1:])


def _value(name: str, value: float) -> str:
    """As a person reads it at a glance."""
    if name in _SHARES:
        return f"{100 * value:.1f} %"
    return _si(value) if abs(value) >= 1000 else f"{value:.3g}"


def _share(value: float) -> str:
    """A percentage that does not round a little to nothing, or nearly all to all."""
    if 0 < value < 0.001:
        return "under 0.1 %"
    if 0.999 < value < 1:
        return "over 99.9 %"
    return f"{100 * value:.0f} %" if value in (0, 1) else f"{100 * value:.1f} %"


def _plain(value: Any) -> str:
    """As it stands in a table."""
    if value is None:
        return "–"
    number = _number(value)
    if number is None:
        return str(value)
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{number:.4f}"
        if abs(number) >= 1e-3 or not number
        else f"{number:.3g}"
    )


def _si(value: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * scale:
            return f"{value / scale:.4g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _axis(name: str, value: float, span: float) -> str:
    if name in _SHARES:
        return f"{100 * value:.0f} %" if span > 0.045 else f"{100 * value:.1f} %"
    if value and span < 0.005:
        return re.sub(r"\.?0*e([+-])0?", r"e\1", f"{value:.3e}")
    return _si(value) if abs(value) >= 1000 else f"{value:.4g}"


def _when(text: Any) -> str:
    try:
        return datetime.datetime.fromisoformat(str(text)).strftime("%d %B %Y, %H:%M:%S %Z").strip().lstrip("0")
    except ValueError:
        return str(text)


_STYLE = """
:root{color-scheme:light dark;--paper:#fbfbfa;--card:#fff;--ink:#1c1d1f;--quiet:#6a6d73;--rule:#e4e4e1;
--blue:#2f6fdb;--orange:#dd7a1b;--green:#25915a;--violet:#8257c9;--right:#2f6fdb;--wrong:#d8433b;--tint:#f1f1ee}
@media(prefers-color-scheme:dark){:root{--paper:#15171a;--card:#1d2024;--ink:#e8e8e6;--quiet:#9a9da3;--rule:#30343a;
--blue:#6fa3f7;--orange:#f0a04b;--green:#58c08c;--violet:#b193ec;--right:#3f7de0;--wrong:#d6544d;--tint:#25292e}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
"Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:2rem;line-height:1.2;margin:.1em 0 .3em;letter-spacing:-.02em;font-weight:650;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0 0 .7em;letter-spacing:-.01em;font-weight:620}
h3{font-size:.95rem;margin:0 0 .4em}
h2 small,th small{color:var(--quiet);font-weight:400;font-size:.8em;margin-left:.35em}
p{margin:0 0 .6em}section{margin-top:44px}header p{max-width:75ch}
.over{text-transform:uppercase;letter-spacing:.09em;font-size:.74rem;color:var(--quiet);margin:0}
.lead{font-size:1.06rem}.quiet{color:var(--quiet);font-size:.9rem}
.state{font-size:.8rem;font-weight:550;letter-spacing:0;vertical-align:middle;padding:.25em .8em;border-radius:99px;
border:1px solid;white-space:nowrap;color:var(--quiet)}.state.good{color:var(--green)}.state.bad{color:var(--wrong)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(122px,1fr));gap:12px;margin-top:28px}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:13px 14px}
.row{display:flex;flex-wrap:wrap;gap:0 56px;align-items:flex-start}.row>section{min-width:0;max-width:100%}
.row>.grow{flex:1 1 470px}.narrow{max-width:38ch}
.tile:first-child{grid-column:span 2}.tile p{margin:0;line-height:1.35}.tile .quiet{font-size:.8rem}
.name{font-size:.85rem;color:var(--quiet)}
.number{white-space:nowrap;font-size:1.5rem;font-weight:620;
letter-spacing:-.02em;font-variant-numeric:tabular-nums;padding:.08em 0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:16px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px 16px 8px;
min-width:0}
figcaption{display:flex;flex-wrap:wrap;gap:.1em 1.1em;align-items:baseline;margin-bottom:8px;font-size:.9rem}
figcaption>b:first-child{margin-right:auto;font-size:.95rem}
svg{width:100%;height:auto;display:block}svg text{font-size:12px;fill:var(--quiet);font-variant-numeric:tabular-nums}
.grid{stroke:var(--rule);stroke-width:1}.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke:var(--c)}
.dot{fill:var(--c);stroke:var(--card);stroke-width:1.5}.column{fill:var(--blue)}
.ideal{stroke:var(--ink);stroke-dasharray:5 4;opacity:.6}
.train{--c:var(--blue)}.val{--c:var(--orange)}.test{--c:var(--green)}.other{--c:var(--violet)}
.key{color:var(--quiet);white-space:nowrap}.key b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.key:before{content:"";display:inline-block;width:.7em;height:.7em;border-radius:50%;background:var(--c);
margin-right:.4em}
details{margin-top:14px}summary{cursor:pointer;color:var(--quiet);font-size:.92rem;padding:4px 0}
details[open]>summary{margin-bottom:10px}
.wide{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.92rem}
.numbers th,.numbers td{padding:7px 11px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap;
font-variant-numeric:tabular-nums}
.numbers th{font-weight:500}.numbers thead th{color:var(--quiet);font-size:.85rem;vertical-align:bottom}
.numbers th:first-child{text-align:left;padding-left:0;min-width:8.5em;white-space:normal;overflow-wrap:anywhere}
.bar span{display:inline-block;min-width:5.4em;padding:1px 6px;border-radius:4px;background:linear-gradient(to right,
color-mix(in srgb,var(--blue) 26%,transparent) var(--share),var(--tint) var(--share))}
.beside{display:flex;flex-wrap:wrap;gap:18px 40px;align-items:flex-start}.beside .wide{flex:0 1 auto;min-width:0}
.aside{flex:1 1 200px;min-width:0;max-width:46ch;font-size:.92rem}.aside ol{margin:0;padding-left:1.4em}
.aside small{color:var(--quiet)}
.single{flex:0 1 390px;min-width:min(100%,300px)}
.confusion{border-collapse:separate;border-spacing:2px}
.confusion th{font-weight:500;font-size:.86rem;padding:2px 8px;text-align:right;white-space:nowrap;max-width:12em;
overflow:hidden;
text-overflow:ellipsis}
.confusion thead th{text-align:center;vertical-align:bottom;color:var(--quiet)}
.confusion td{text-align:center;border-radius:4px;font-variant-numeric:tabular-nums;line-height:1.2;
background:color-mix(in srgb,var(--c,transparent) var(--a,0%),var(--tint))}
.confusion td small{display:block;font-size:.78em;opacity:.8}.confusion .full{color:#fff}
.confusion .none{color:var(--quiet)}
.large td{width:108px;height:76px;font-size:1.2rem}.middle td{width:54px;height:46px;font-size:.88rem}
.small td{width:30px;height:26px;font-size:.7rem}.tiny td{width:8px;min-width:6px;height:8px;padding:0;
border-radius:1px}
.tiny{border-spacing:1px}.tiny th{font-size:7px;padding:0 4px;line-height:8px}
.middle thead span,.small thead span{writing-mode:vertical-rl;transform:rotate(180deg);max-height:9em;overflow:hidden}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px}
.card{padding:0;overflow:hidden}.card img{display:block;width:100%;aspect-ratio:1;object-fit:contain;
background:var(--tint)}
.crisp{image-rendering:pixelated}.card figcaption{display:block;padding:8px 10px 9px;margin:0;font-size:.84rem;
line-height:1.4}
.card b.wrong{color:var(--wrong)}.card b.right{color:var(--right)}.missing{padding:10px;margin:0;font-size:.8rem;
color:var(--quiet)}
.file{display:block;color:var(--quiet);font-size:.76rem;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.passage{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.88rem;line-height:1.55;max-height:24em;overflow-y:auto}
.passage span{background:color-mix(in srgb,var(--wrong) var(--a,0%),transparent)}
code{font:.86em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.facts{width:100%}.facts th,.facts td{text-align:left;vertical-align:top;padding:6px 16px 6px 0;
border-bottom:1px solid var(--rule)}
.facts th{font-weight:500;color:var(--quiet);width:11em}.config th{width:45%}.config th code{color:var(--ink)}
.pair{display:inline-block;margin-right:1.3em;color:var(--quiet)}.pair b{font-weight:500;color:var(--ink)}
@media(max-width:600px){main{padding:24px 14px 56px}h1{font-size:1.55rem}section{margin-top:34px}
.tiles{grid-template-columns:1fr 1fr;gap:8px}.tile{padding:11px 12px}
.number{font-size:1.4rem}
.cards{grid-template-columns:1fr 1fr;gap:8px}svg text{font-size:15px}.facts th{width:6.5em}.large td{width:88px;
height:64px}
.numbers th,.numbers td{padding:6px 9px}.numbers th:first-child{min-width:6em}.bar span{min-width:4.6em}
.config th{width:52%}}
@media print{.card,figure,.tile{break-inside:avoid}}
"""
