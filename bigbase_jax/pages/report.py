"""``report.html`` of a run: one page that needs nothing else, made from the files of the run folder alone.

Every part stands on its own, so a run that has just begun, was stopped or diverged has a page too. Charts are inline
SVG coloured by the style sheet (light and dark), pictures are data URIs, there is no script, and a content policy
forbids the page any network. All text from the run is escaped.

Axes: N = examples of a split, K = classes.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import pathlib
import shlex
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.pages.page import (
    SHARES,
    SPLITS,
    Series,
    chart,
    document,
    e,
    finite,
    glance,
    heading,
    percent,
    plain,
    section,
    si,
    side_by_side,
    thin,
    when,
    wilson,
)
from bigbase_jax.pages.page import write as write_page
from bigbase_jax.runtime import redact
from bigbase_jax.runtime.log import duration, read_rows
from bigbase_jax.runtime.untrusted import read_object

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
_BROKEN = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile)
_HIDDEN = ("step", "kind", "split", "seconds", "epoch")


def write(workdir: str, pictures: Pictures | None = None, passages: Passages | None = None) -> str:
    """(Re)writes ``workdir/report.html``, atomically.

    What the page shows of single examples depends on what the evaluation kept: mistakes where that is ``probabilities``
    and ``label`` of pictures, otherwise what ``passages`` makes of it.

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
    write_page(folder / "report.html", page)
    return str(folder / "report.html")


# ----------------------------------------------------------------------------------------------------- the run's files


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the files of a run folder say; parts that are missing or broken are empty."""

    name: str
    config: dict[str, Any]
    lineage: dict[str, Any]
    dataset_info: dict[str, Any]
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
            dataset_info=_json(folder / "data.json").get("dataset_info")
            or _json(folder / "data.json").get("facts")
            or {},
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
            self.dataset_info.get("class_names"),
            task.get("class_names") if isinstance(task, dict) else None,
        ):
            if isinstance(names, (list, tuple)) and len(names) == count:
                return [str(name) for name in names]
        return [str(k) for k in range(count)]


def _rank(split: str) -> tuple[int, str]:
    return (SPLITS.index(split) if split in SPLITS else len(SPLITS), split)


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (FileNotFoundError, UserError):
        return {}


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
    parts.append(side_by_side(_metrics(run), _classes(final, split) if split else ""))
    if run.predictions:
        predicted, arrays = next(iter(run.predictions.items()))
        names = run.class_names(arrays["probabilities"].shape[1])
        matrix = run.evals.get(predicted, {}).get("confusion_matrix") or _count(arrays)
        parts.append(side_by_side(_confusion(matrix, names, predicted), _calibration(arrays, predicted)))
        texts = _passages(run, passages) if passages is not None and pictures is None else ""
        parts.append(texts or _mistakes(arrays, names, predicted, pictures))
    elif split and isinstance(matrix := final.get("confusion_matrix"), list):
        parts.append(_confusion(matrix, run.class_names(len(matrix)), split))
    elif passages is not None:
        parts.append(_passages(run, passages))
    parts += [_lineage(run), _config(run)]
    return document(f"{run.name} · run report", "\n".join(part for part in parts if part))


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
    facts = [f"started {when(run.lineage['started'])}"] if run.lineage.get("started") else []
    facts += [f"finished {when(run.lineage['finished'])}"] if run.lineage.get("finished") else []
    return (
        f'<header><p class="over">Run report</p><h1>{e(run.name)} <span class="state {tone}">{e(state)}</span></h1>'
        + (f'<p class="lead">{e(about)}</p>' if about else "")
        + (f'<p class="quiet">{e(" · ".join(facts))}</p>' if facts else "")
        + "</header>"
    )


def _tiles(run: _Run, split: str | None, final: Mapping[str, Any]) -> str:
    tiles = []
    scalars = {name: value for name, value in final.items() if name not in _HIDDEN and finite(value) is not None}
    first: list[str] = [n for n in ("accuracy", "f1", "auc", "loss") if n in scalars]
    first += [n for n in scalars if n not in first][: max(4 - len(first), 0)]
    for name in first:
        note = f"on {split}"
        arrays = run.predictions.get(split or "")
        if name == "accuracy" and arrays:
            right, total = int(np.sum(arrays["probabilities"].argmax(-1) == arrays["label"])), len(arrays["label"])
            low, high = wilson(right, total)
            note = f"{right:,} of {total:,} on {split}; 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
        tiles.append((heading(name), glance(name, scalars[name]), note))
    train = run.kind("train")
    if train:
        last = train[-1]
        epoch = finite(last.get("epoch"))
        passes = "of training" if epoch is None else "1 epoch" if f"{epoch:.3g}" == "1" else f"{epoch:.3g} epochs"
        tiles.append(("Steps", f"{last['step']:,}", passes))
        speeds = [finite(row.get("examples_per_second")) for row in train]
        known = [speed for speed in speeds if speed is not None]
        waits = [wait for row in train if (wait := finite(row.get("data_wait"))) is not None]
        if known:
            note = f"median; {100 * float(np.median(waits)):.1f} % waiting for data" if waits else "median"
            tiles.append(("Examples/s", si(float(np.median(known))), note))
        seconds = finite(run.rows[-1].get("seconds"))
        if seconds is not None:
            devices = run.lineage.get("devices")
            kind = (
                f"on {devices.get('count', 1)} x {devices.get('kind')}" if isinstance(devices, dict) else "of training"
            )
            tiles.append(("Time", duration(seconds), kind))
    if not tiles:
        return ""
    cells = "".join(
        f'<div class="tile"><p class="name">{e(name)}</p><p class="number">{e(value)}</p>'
        f'<p class="quiet">{e(note)}</p></div>'
        for name, value, note in tiles
    )
    return f'<section class="tiles" aria-label="Key numbers">{cells}</section>'


# ----------------------------------------------------------------------------------------------------- curves


def _curves(run: _Run) -> str:
    train, evals = run.kind("train"), run.kind("eval")
    names: dict[str, None] = {}
    for row in [*evals, *train]:
        names.update(dict.fromkeys(n for n in row if n not in _HIDDEN and finite(row[n]) is not None))
    charts = {name: _series(run, name, train, evals) for name in names}
    charts = {name: series for name, series in charts.items() if any(len(s.x) > 1 or s.marks for s in series)}
    if not charts:
        return section("Curves", '<p class="quiet">Nothing has been logged yet.</p>')
    main: list[str] = [n for n in ("loss", "accuracy", "learning_rate", "examples_per_second") if n in charts]
    rest = [n for n in charts if n not in main]
    if "accuracy" not in main and rest:
        main.insert(1, rest.pop(0))
    body = f'<div class="charts">{"".join(chart(n, charts[n]) for n in main)}</div>'
    if rest:
        more = "".join(chart(n, charts[n]) for n in rest)
        body += f'<details><summary>{len(rest)} more curves</summary><div class="charts">{more}</div></details>'
    return section("Curves", body)


def _series(run: _Run, name: str, train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> list[Series]:
    found = []
    by_split: dict[str, list[dict[str, Any]]] = {"train": train}
    for row in evals:
        by_split.setdefault(f"{row.get('split')}", []).append(row)
    for split, rows in by_split.items():
        points = [(float(r["step"]), v) for r in rows if "step" in r and (v := finite(r.get(name))) is not None]
        if points:
            x, y = thin(points)
            found.append(Series(split, split if split in SPLITS else "other", x, y, split != "train" and len(x) < 60))
    for split, final in run.evals.items():
        value = finite(final.get(name))
        if split not in by_split and value is not None and finite(final.get("step")) is not None:
            found.append(Series(split, split if split in SPLITS else "other", [float(final["step"])], [value], True))
    return found


# ----------------------------------------------------------------------------------------------------- tables


def _metrics(run: _Run) -> str:
    if not run.evals:
        return section("Metrics", '<p class="quiet">This run has not been evaluated yet.</p>')
    names: dict[str, None] = {}
    for found in run.evals.values():
        names.update(dict.fromkeys(n for n, v in found.items() if n not in _HIDDEN and finite(v) is not None))
    head = "".join(
        f"<th>{e(split)}<small>step {e(found.get('step', '?'))}</small></th>" for split, found in run.evals.items()
    )
    positive = next((found["positive_class"] for found in run.evals.values() if "positive_class" in found), None)
    rows = "".join(
        f"<tr><th>{e(heading(name).replace('positive class', f'class {positive}'))}</th>"
        + "".join(f"<td>{e(plain(found.get(name)))}</td>" for found in run.evals.values())
        + "</tr>"
        for name in names
    )
    table = f'<table class="numbers"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return section("Metrics", f'<div class="wide">{table}</div>')


def _classes(final: Mapping[str, Any], split: str) -> str:
    classes = final.get("per_class")
    if not isinstance(classes, dict) or not all(isinstance(values, dict) for values in classes.values()):
        return ""
    columns: dict[str, None] = {}
    for values in classes.values():
        columns.update(dict.fromkeys(values))
    head = "".join(f"<th>{e(heading(column).partition(' (')[0])}</th>" for column in columns)  # of a class, not macro
    rows = []
    for name, values in classes.items():
        cells = []
        for column in columns:
            share = finite(values.get(column))
            bar = f' class="bar" style="--share:{100 * share:.1f}%"' if column in SHARES and share is not None else ""
            cells.append(f"<td{bar}><span>{e(plain(values.get(column)))}</span></td>")
        rows.append(f"<tr><th>{e(name)}</th>{''.join(cells)}</tr>")
    table = (
        '<div class="wide"><table class="numbers"><thead><tr><th>Class</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    if len(classes) > 30:
        table = f"<details><summary>{len(classes)} classes</summary>{table}</details>"
    return section(f"Classes <small>{e(split)}</small>", table)


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
            text = f"{count:,.0f}" + (f"<small>{percent(share)}</small>" if size in ("large", "middle") else "")
            light = ' class="full"' if shade > 0.6 else ""
            title = f"{e(name)} called {e(guess)}: {count:,.0f} ({percent(share)})"
            cells.append(
                f'<td{light} style="--c:{colour};--a:{100 * shade:.0f}%" title="{title}">'
                f"{'' if size == 'tiny' else text}</td>"
            )
        rows.append(f"<tr><th>{e(name)}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th><span>{e(name)}</span></th>" for name in names) if size != "tiny" else ""
    head = f"<thead><tr><th></th>{head}</tr></thead>" if head else ""
    table = f'<div class="wide"><table class="confusion {size}">{head}<tbody>{"".join(rows)}</tbody></table></div>'
    note = "Rows are the true classes, columns what the model said; shades are shares of the row."
    return section(
        f"Confusion matrix <small>{e(split)}</small>",
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
        f"<li><b>{e(names[i])}</b> called <b>{e(names[j])}</b>: {wrong_KK[i, j]:,.0f} "
        f"<small>({percent(share_KK[i, j])})</small></li>"
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
                f'height="{tallness:.1f}" opacity="{faint:.2f}"><title>confidence {percent(mean_B[b])}: '
                f"{percent(accuracy_B[b])} right, {count_B[b]:,} examples</title></rect>"
            )
    out.append(f'<line class="ideal" x1="{left}" y1="{top + tall}" x2="{left + span}" y2="{top}"/>')
    out.append(f'<text x="{left + span / 2}" y="{height - 6}" text-anchor="middle">confidence</text></svg>')
    mean, accuracy = float(confidence_N.mean()), float(right_N.mean())
    over = "more" if mean > accuracy else "less"
    text = (
        f"<p>Bars: how often the model was right when it was so sure; on the dashed line, confidence can be read as "
        f"probability. Fainter bars hold fewer examples.</p><p>Its mean confidence is {percent(mean)}, {over} than its "
        f"accuracy of {percent(accuracy)}; the expected calibration error is <b>{error:.4f}</b>.</p>"
    )
    body = f'<div class="beside"><figure class="single">{"".join(out)}</figure><div class="aside">{text}</div></div>'
    return section(f"Calibration <small>{e(split)}</small>", body, "grow")


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
                loss = f' title="{nats:.2f} nats"' if nats else ""
                spans.append(f'<span style="--a:{shade:.0f}%"{loss}>{e(text)}</span>')
            more = f" … and {len(pieces) - PIECES:,} more" if len(pieces) > PIECES else ""
            cards.append(
                f"<figure><figcaption><b>{e(title)}</b></figcaption>"
                f'<p class="passage">{"".join(spans)}{more}</p></figure>'
            )
        if cards:
            note = "The darker a piece, the less the model expected it; hold the pointer over it for its loss."
            shaded = any(nats for _, pieces in found for _, nats in pieces)
            body = f'<p class="quiet">{note}</p>' * shaded + f'<div class="charts">{"".join(cards)}</div>'
            return section(f"Hardest {'passages' if shaded else 'texts'} <small>{e(split)}</small>", body)
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
                picture = f'<p class="missing">no picture: {e(error)}</p>'
        verdict = "said" if wrong_N[i] else "rightly said"
        truth = f"<br>is <b>{e(names[label_N[i]])}</b> {percent(p_NK[i, label_N[i]])}" if wrong_N[i] else ""
        cards.append(
            f'<figure class="card">{picture}<figcaption>{verdict} <b class="{"wrong" if wrong_N[i] else "right"}">'
            f"{e(names[guess_N[i]])}</b> {percent(p_NK[i, guess_N[i]])}{truth}"
            f'<span class="file" title="{e(name)}">{e(name)}</span></figcaption></figure>'
        )
    body = f'<p class="quiet">{e(note)}</p><div class="cards">{"".join(cards)}</div>'
    return section(f"{title} <small>{e(split)}</small>", body)


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
    return f'<img{crisp} alt="{e(alt)}" src="data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}">'


# ------------------------------------------------------------------------------------------------- where it comes from


def _lineage(run: _Run) -> str:
    lineage = run.lineage
    if not lineage:
        return ""
    rows: list[tuple[str, str]] = []
    if lineage.get("command"):
        rows.append(("Command", f"<code>{e(_command(lineage['command']))}</code>"))
    if lineage.get("git_commit"):
        dirty = ", with uncommitted changes" if lineage.get("git_dirty") else ""
        rows.append(("Git commit", f"<code>{e(lineage['git_commit'])}</code>{dirty}"))
    data = lineage.get("data")
    if isinstance(data, dict):
        splits = data.get("splits")
        counts = ", ".join(f"{k} {plain(v)}" for k, v in splits.items()) if isinstance(splits, dict) else ""
        rows += [("Data", e(data.get("description", "")))] + ([("Examples", e(counts))] if counts else [])
        rows.append(("Data fingerprint", f"<code>{e(data.get('fingerprint', ''))}</code>"))
    for name in ("devices", "host", "versions"):
        if isinstance(lineage.get(name), dict):
            pairs = "".join(
                f'<span class="pair">{e(k)} <b>{e("" if v is None else v)}</b></span>' for k, v in lineage[name].items()
            )
            rows.append((name.capitalize(), pairs))
    starts = [start if isinstance(start, dict) else {"started": start} for start in lineage.get("starts") or []]
    rows += [("Started", e(when(lineage["started"])))] if lineage.get("started") else []
    rows += [("Starts", "<br>".join(e(_start(start)) for start in starts))] if len(starts) > 1 else []
    rows += [("Finished", e(when(lineage["finished"])))] if lineage.get("finished") else []
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
    rows += [(heading(k), e(v if isinstance(v, str) else json.dumps(v))) for k, v in lineage.items() if k not in known]
    body = "".join(f"<tr><th>{e(name)}</th><td>{value}</td></tr>" for name, value in rows)
    return section("Lineage", f'<table class="facts"><tbody>{body}</tbody></table>')


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


def _config(run: _Run) -> str:
    if not run.config:
        return ""
    rows = "".join(
        f"<tr><th><code>{e(path)}</code></th><td><code>{e(json.dumps(value, ensure_ascii=False))}</code></td></tr>"
        for path, value in settings(run.config)
    )
    table = f'<table class="facts config"><tbody>{rows}</tbody></table>'
    return section("Config", f"<details><summary>{len(list(settings(run.config)))} settings</summary>{table}</details>")


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
