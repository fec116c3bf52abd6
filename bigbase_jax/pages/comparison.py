"""``comparison.html``: the comparison as one page that needs nothing else.

As ``report.py``'s page: inline SVG, no network, all text escaped. The one script lets a reader pick ranges on the axes
of a sweep; without it the page is complete.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bigbase_jax.compare import tables
from bigbase_jax.compare.comparison import Comparison, Pair
from bigbase_jax.compare.importance import Importance
from bigbase_jax.compare.runs import ABSENT, Group, Run, is_count, lower_is_better, short_names
from bigbase_jax.pages.page import Series, chart, document, e, finite, glance, heading, plain, section, si, thin, ticks

COLOURS = 8
"""Groups that have a colour of their own; the others are grey."""
FIGURES = 6
"""Metrics that are drawn with their intervals."""
SAID = 5
"""Notes that are shown without asking."""
ROWS = 30
"""Groups that such a figure shows."""
AXES = 9
"""Settings in the parallel coordinates, those that matter most."""
TABLE = 300
"""Rows of a table."""
_CROWD = 4
"""Groups above which a curve that runs away is cut, for the others to be seen."""


def render(found: Comparison) -> str:
    """The page."""
    results = [_pairs(found), _metrics(found), _dots(found)]
    search = [_parallel(found), _importance(found.importance, found), _differences(found)]
    many = len(found.groups) > COLOURS  # then the search as a whole comes first, else what came of each
    parts = [_header(found), _notes(found.notes), *(search if many else results), *(results if many else [])]
    parts += [_curves(found), *([] if many else search), _runs(found)]
    return document(f"{_title(found)} · comparison", "\n".join(part for part in parts if part), _STYLE, _SCRIPT)


def _title(found: Comparison) -> str:
    names = [group.name for group in found.groups]
    if len(names) <= 3:
        return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    return f"{len(names)} experiments" if len(found.runs) > len(names) else f"{len(names)} runs"


def _colour(found: Comparison, group: Group) -> str:
    place = found.groups.index(group)
    return f"c{place}" if place < COLOURS else "rest"


def _header(found: Comparison) -> str:
    models = list(dict.fromkeys(found.models.values()))  # what is set in models of different kinds goes without saying
    paths = [path for path in found.varied if not (models and re.match(r"task\.(task\.)*model\.", path))]
    short = short_names(paths)
    names = [short[path] for path in sorted(short, key=lambda path: ABSENT in found.varied[path])]
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    lead = f"They {'also ' * bool(models)}differ in {listed}." if names else ""
    if models:
        lead = f"{(' against ' if len(models) == 2 else ', ').join(models)}. {lead}".strip()
    elif len(found.groups) > 1 and not names:
        lead = "Their settings are the same; they differ in where they come from." if found.differences else ""
    facts = []
    if found.split:
        facts.append(f"metrics on {found.split}")
    if len(found.runs) > len(found.groups):
        facts.append(f"{len(found.runs)} runs; those that differ only by the seed count together")
    if len(found.groups) > 1:
        how = f", the best by {heading(found.goal.metric).lower()} on val" if found.by_rank and found.goal else ""
        facts.append(f"baseline: {found.groups[0].name}{how}")
    return (
        f'<header><p class="over">Comparison</p><h1>{e(_title(found))}</h1>'
        + (f'<p class="lead">{e(lead)}</p>' if lead else "")
        + (f'<p class="quiet">{e(" · ".join(facts))}</p>' if facts else "")
        + "</header>"
    )


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = [f"<li>{e(note)}</li>" for note in notes]
    body = f"<ul>{''.join(items[:SAID])}</ul>"
    if len(items) > SAID:
        more = f"<ul>{''.join(items[SAID:])}</ul>"
        body += f"<details><summary>{len(items) - SAID} more</summary>{more}</details>"
    return f'<section class="notes"><h3>What could not be used, or only in part</h3>{body}</section>'


def plural(count: int, what: str) -> str:
    """``"1 run"``, ``"2 runs"``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _key(found: Comparison, group: Group) -> str:
    model = f" <small>{e(found.models[group.name])}</small>" if found.models else ""
    return f'<span class="key {_colour(found, group)}">{e(group.name)}{model}</span>'


# ----------------------------------------------------------------------------------------------------- tables


def _pairs(found: Comparison) -> str:
    if not found.pairs:
        return ""
    groups = {group.name: group for group in found.groups}
    mcnemar, seeds = any(p.mcnemar for p in found.pairs), any(p.p_seeds is not None for p in found.pairs)
    head = ["", "Metric", "Difference", "", "95 % interval", "p, bootstrap"]
    head += ["Right alone", "p, McNemar"] * mcnemar + ["p, seeds"] * seeds + ["Verdict"]
    widest: dict[str, float] = {}
    for pair in found.pairs:
        ends = [abs(x) for x in (pair.low, pair.high, pair.difference) if x is not None]
        widest[pair.metric] = max(widest.get(pair.metric, 0.0), *ends)
    rows, before = [], ""
    for pair in found.pairs[:TABLE]:
        _, metric, difference, interval, p, split, p_mcnemar, p_seeds, verdict = tables.pair_cells(pair)
        tone = {"better": "good", "worse": "bad"}.get(pair.verdict, "idle")
        cells = [metric, difference, _whisker(pair, widest[pair.metric]), interval, p]
        cells += [split, p_mcnemar] * mcnemar + [p_seeds] * seeds
        html = "".join(f"<td>{cell if cell.startswith('<svg') else e(cell)}</td>" for cell in cells)
        rows.append(
            f"<tr><th>{'' if pair.other == before else _key(found, groups[pair.other])}</th>{html}"
            f'<td class="verdict {tone}">{e(verdict)}</td></tr>'
        )
        before = pair.other
    said = [
        f"Each run against {found.groups[0].name}, on the same {max(p.examples for p in found.pairs):,} examples of "
        f"{found.split}. The interval is the paired bootstrap's over examples; to the right of the line is better."
    ]
    if mcnemar:
        said.append(
            "“Right alone” counts the examples that only the baseline, and only this run, has right; McNemar's exact "
            "test asks whether they fall evenly."
        )
    if seeds:
        said.append("“p, seeds” is Welch's t-test of the means over seeds: would it hold if both were trained again?")
    if len(found.groups) > 2:
        said.append("P-values are corrected for the number of runs (Holm).")
    table = _grid(head, rows, "numbers tight") + _more(len(found.pairs), "pairs.csv")
    body = f'<p class="quiet measure">{e(" ".join(said))}</p>{table}'
    return section(f"{e(found.against)} <small>{e(found.split)}</small>", body)


def _whisker(pair: Pair, widest: float, width: int = 130, height: int = 18) -> str:
    """The difference and its interval; better is to the right."""
    if not widest:
        return ""
    sign = -1 if lower_is_better(pair.metric) else 1
    at: Callable[[float], float] = lambda x: width / 2 + sign * x / widest * (width / 2 - 6)  # noqa: E731
    out = f'<svg class="whisker" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true">'
    out += f'<line class="zero" x1="{width / 2}" x2="{width / 2}" y1="0" y2="{height}"/>'
    tone = {"better": "good", "worse": "bad"}.get(pair.verdict, "idle")
    if pair.low is not None and pair.high is not None:
        x0, x1 = sorted((at(pair.low), at(pair.high)))
        out += f'<line class="span {tone}" x1="{x0:.1f}" x2="{x1:.1f}" y1="{height / 2}" y2="{height / 2}"/>'
    return out + f'<circle class="point {tone}" cx="{at(pair.difference):.1f}" cy="{height / 2}" r="4"/></svg>'


def _metrics(found: Comparison) -> str:
    names = tables.shown_metrics(found)
    if not names:
        return section("Metrics", '<p class="quiet">No run has been evaluated yet.</p>')
    several = any(len(group.runs) > 1 for group in found.groups)
    bests = {metric: tables.best(found, metric) for metric in names}
    rows = []
    for group in found.groups[:TABLE]:
        cells = [f"<td>{len(group.runs)}</td>"] if several else []
        for metric in names:
            m = found.measured.get((group.name, metric))
            text = tables.number(m.mean, metric) if m else "–"
            small = ""
            if m and m.deviation is not None:
                small = f"<small>± {e(tables.rough(m.deviation, metric))}</small>"
            bold = ' class="best"' if group.name in bests[metric] else ""
            cells.append(f"<td{bold}>{e(text)}{small}</td>")
        rows.append(f"<tr><th>{_key(found, group)}</th>{''.join(cells)}</tr>")
    said = "The best of each is bold." if any(bests.values()) else ""
    if tables.different_data(found):
        said = "They were measured on different data, so none is called the best."
    said += " ± is the standard deviation over seeds." if several else ""
    same = [name for name in found.metrics if name not in names]
    if same:
        said += f" The same everywhere: {', '.join(heading(name).lower() for name in same)}."
    head = ["", *(["Seeds"] if several else []), *map(heading, names)]
    body = f'<p class="quiet measure">{e(said.strip())}</p>{_grid(head, rows)}{_more(len(found.groups), "groups.csv")}'
    return section(f"Metrics <small>{e(found.split)}</small>", body)


def _grid(head: Sequence[str], rows: Sequence[str], kind: str = "numbers") -> str:
    cells = "".join(f"<th>{e(cell)}</th>" for cell in head)
    tall = " tall" if len(rows) > 14 else ""
    return (
        f'<div class="wide{tall}"><table class="{kind}"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _more(count: int, file: str) -> str:
    return f'<p class="quiet">{count - TABLE:,} more are in {file}.</p>' if count > TABLE else ""


def _differences(found: Comparison) -> str:
    if not found.differences:
        return ""
    groups = found.groups
    if len(groups) > 6:
        return _trials(found)
    common: list[str] = []
    partial: list[str] = []
    for part, table in found.differences.items():
        title = {"origin": "Where they come from", "other": "Other settings"}.get(part, f"config.{part}")
        title_row = f'<tr class="part"><th colspan="{len(groups) + 1}">{e(title)}</th></tr>'
        for rows, missing in ((common, False), (partial, True)):
            shown = {path: values for path, values in table.items() if (ABSENT in values) == missing}
            rows += [title_row] if shown else []
            for path, values in shown.items():
                cells = "".join(f"<td><code>{e(tables.setting(value))}</code></td>" for value in values)
                name = e(path) if part == "origin" else f"<code>{e(path)}</code>"
                rows.append(f"<tr><th>{name}</th>{cells}</tr>")
    head = f"<thead><tr><th></th>{''.join(f'<th>{_key(found, group)}</th>' for group in groups)}</tr></thead>"
    both = []
    for rows in (common, partial):
        body = f"{head}<tbody>{''.join(rows)}</tbody>"
        both.append(f'<div class="wide"><table class="facts config">{body}</table></div>' if rows else "")
    count = sum(ABSENT in values for table in found.differences.values() for values in table.values())
    summary = f"{plural(count, 'setting')} that only some of them have"
    more = f"<details{'' if common else ' open'}><summary>{summary}</summary>{both[1]}</details>" if partial else ""
    return section("What differs", both[0] + more)


def _trials(found: Comparison) -> str:
    """A row for each group: settings that differ, the goal, the metric."""
    short = short_names(list(found.varied))
    rows = []
    for i, group in enumerate(found.groups[:TABLE]):
        cells = "".join(f"<td>{e(tables.setting(values[i]))}</td>" for values in found.varied.values())
        if found.goal:
            goals = [value for run in group.runs if (value := found.goal.value(run)) is not None]
            cells += f"<td><b>{e(tables.number(float(np.mean(goals)), found.goal.metric) if goals else '–')}</b></td>"
        rows.append(f'<tr data-trial="{i}"><th>{_key(found, group)}</th>{cells}</tr>')
    head = ["", *short.values()]
    head += [f"{heading(found.goal.metric)} on val"] if found.goal else []
    origin = found.differences.get("origin", {})
    also = f'<p class="quiet">They also differ in {e(", ".join(origin))}.</p>' if origin else ""
    return section("What differs", also + _grid(head, rows) + _more(len(found.groups), "runs.csv"))


def _runs(found: Comparison) -> str:
    rows = []
    for group in found.groups:
        for run in group.runs:
            step = run.evals.get(found.split or "", {}).get("step")
            together = group.name if len(group.runs) > 1 else ""
            cells = (together, run.state, json.dumps(run.settings.get("seed")), plain(step))
            html = "".join(f"<td>{e(cell)}</td>" for cell in cells)
            rows.append(f"<tr><th>{e(run.name)}</th>{html}<td><code>{e(run.path)}</code></td></tr>")
    grid = _grid(["Run", "Together as", "State", "Seed", "Evaluated at step", "Folder"], rows[:TABLE], "numbers left")
    return section(
        "Runs", f"<details><summary>{plural(len(rows), 'run')} and where to find them</summary>{grid}</details>"
    )


# ----------------------------------------------------------------------------------------------------- dots


def _dots(found: Comparison) -> str:
    if len(found.groups) < 2:
        return ""
    names = [metric for metric in tables.shown_metrics(found) if not is_count(metric)][:FIGURES]
    figures = [figure for metric in names if (figure := _dot_figure(found, metric))]
    if not figures:
        return ""
    over = {m.over for (_, metric), m in found.measured.items() if metric in names}
    said = [
        text
        for kind, text in (
            (
                "seeds",
                "Of several seeds, small dots are the runs and the line is the 95 % interval of their mean.",
            ),
            ("examples", "Of a single run, the line is the 95 % interval over examples, where their scores were kept."),
        )
        if kind in over
    ]
    said.append("Intervals that overlap may still differ: the paired tests above are sharper." if found.pairs else "")
    body = f'<p class="quiet measure">{e(" ".join(said).strip())}</p><div class="charts">{"".join(figures)}</div>'
    return section(f"Metrics with their intervals <small>{e(found.split)}</small>", body)


def _dot_figure(found: Comparison, metric: str, width: int = 480) -> str:
    rows = [(g, m) for g in found.groups if (m := found.measured.get((g.name, metric))) is not None][:ROWS]
    if len(rows) < 2:
        return ""
    values = [x for _, m in rows for x in (*m.values, m.low, m.high) if x is not None and math.isfinite(x)]
    if not values:
        return ""
    left, right, top, tall = 150, 26, 6, 24 if len(rows) <= 12 else 18
    height = top + tall * len(rows) + 26
    marks = ticks(min(values), max(values), 4)
    x0, x1 = marks[0], marks[-1]
    at: Callable[[float], float] = lambda x: left + (x - x0) / (x1 - x0) * (width - left - right)  # noqa: E731
    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{e(heading(metric))} with intervals">']
    for x in marks:
        out.append(f'<line class="grid" x1="{at(x):.1f}" x2="{at(x):.1f}" y1="{top}" y2="{height - 22}"/>')
        out.append(f'<text x="{at(x):.1f}" y="{height - 6}" text-anchor="middle">{e(_tick(metric, x, x1 - x0))}</text>')
    base = at(rows[0][1].mean) if rows[0][0] is found.groups[0] else None
    if base is not None:
        out.append(f'<line class="ideal" x1="{base:.1f}" x2="{base:.1f}" y1="{top}" y2="{height - 22}"/>')
    for i, (g, m) in enumerate(rows):
        y, colour = top + tall * (i + 0.5), _colour(found, g)
        name = g.name if len(g.name) <= 22 else f"{g.name[:10]}…{g.name[-11:]}"
        tip = f"{g.name}: {tables.measured_text(m, metric)}"
        out.append(f'<g class="{colour}"><title>{e(tip)}</title>')
        out.append(f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{e(name)}</text>')
        if m.low is not None and m.high is not None:
            ends = max(at(m.low), left - 4), min(at(m.high), width - 4)
            out.append(f'<line class="span" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if len(m.values) > 1:
            out += [f'<circle class="small" cx="{at(x):.1f}" cy="{y:.1f}" r="2.5"/>' for x in m.values]
        out.append(f'<circle class="dot" cx="{at(m.mean):.1f}" cy="{y:.1f}" r="5"/></g>')
    more = len([1 for g in found.groups if (g.name, metric) in found.measured]) - len(rows)
    note = f'<span class="key plain">the first {len(rows)} of {len(rows) + more}</span>' if more > 0 else ""
    arrow = "less is better" if lower_is_better(metric) else "more is better"
    caption = f'<figcaption><b>{e(heading(metric))}</b>{note}<span class="key plain">{arrow}</span></figcaption>'
    return f"<figure>{caption}{''.join(out)}</svg></figure>"


def _tick(metric: str, value: float, span: float) -> str:
    if metric in tables.SHARES:
        return f"{100 * value:.0f} %" if span > 0.045 else f"{100 * value:.1f} %"
    return si(value) if abs(value) >= 1000 else f"{value:.4g}"


# ----------------------------------------------------------------------------------------------------- curves

_NOT_CURVES = ("step", "kind", "split", "seconds", "epoch", "memory_gb", "data_wait", "step_seconds", "compile_seconds")


def _curves(found: Comparison) -> str:
    train, val = _logged(found.runs, "train", None), _logged(found.runs, "eval", "val")
    goal = [found.goal.metric] if found.goal else []
    first: list[tuple[str, str | None, str]] = [("train", None, name) for name in ("loss",) if name in train]
    first += [("eval", "val", name) for name in dict.fromkeys([*goal, "loss", "accuracy"]) if name in val]
    rest: list[tuple[str, str | None, str]] = [
        ("eval", "val", name) for name in val if ("eval", "val", name) not in first
    ]
    rest += [("train", None, name) for name in train if ("train", None, name) not in first]
    drawn = {key: _curve(found, *key) for key in (*first, *rest)}
    main, more = ([drawn[key] for key in keys if drawn[key]] for keys in (first, rest))
    if not main and not more:
        return ""
    keys = "".join(_key(found, group) for group in found.groups[:COLOURS])
    if len(found.groups) > COLOURS:
        keys += f'<span class="key rest">{len(found.groups) - COLOURS} others</span>'
    body = f'<p class="legend">{keys}</p><div class="charts">{"".join(main)}</div>'
    if more:
        charts = f'<div class="charts">{"".join(more)}</div>'
        body += f"<details><summary>{plural(len(more), 'more curve')}</summary>{charts}</details>"
    return section("Curves", body)


def _logged(runs: Sequence[Run], kind: str, split: str | None) -> list[str]:
    names: dict[str, None] = {}
    for run in runs:
        for row in run.rows:
            if row.get("kind") == kind and (split is None or row.get("split") == split):
                names.update(dict.fromkeys(k for k, v in row.items() if k not in _NOT_CURVES and finite(v) is not None))
    return list(names)


def _curve(found: Comparison, kind: str, split: str | None, metric: str) -> str:
    series: list[Series] = []
    for group in reversed(found.groups):  # the first on top
        for run in group.runs:
            points = run.curve(kind, metric, split)
            if points:
                several = " several" if len(group.runs) > 1 else ""
                marks = kind == "eval" and len(points) < 40 and len(found.runs) <= COLOURS
                series.append(Series(run.name, _colour(found, group) + several, *thin(points, 300), marks))
    if not series or not any(len(s.x) > 1 for s in series):
        return ""
    title = f"{heading(metric)}, {split or 'train'}"
    most = [max(s.y) for s in series]
    cap = 2 * float(np.median(most))
    if len(found.groups) > _CROWD and cap > 0 and max(most) > 2 * cap:
        title += " (runaways cut)"
        series = [dataclasses.replace(s, y=[min(y, cap) for y in s.y]) for s in series]
    return chart(metric, series, title=title, legend="")


# ----------------------------------------------------------------------------------------------------- sweeps


@dataclasses.dataclass(frozen=True)
class _Axis:
    """An axis of the parallel coordinates: values -> [0, 1] from the bottom, and the labels along it."""

    title: str
    place: Callable[[Any], float | None]
    labels: list[tuple[float, str]]
    result: bool = False


def _number_axis(title: str, values: Sequence[float], metric: str = "", flip: bool = False) -> _Axis:
    """Logarithmic where the values span much; ``metric`` makes it the axis of a result."""
    low, high = min(values), max(values)
    wide = low > 0 and high / low >= 20
    scale: Callable[[float], float] = math.log if wide else float
    span = scale(high) - scale(low)

    def place(value: Any) -> float | None:
        x = finite(value)
        if x is None or (wide and x <= 0):
            return None
        share = (scale(x) - scale(low)) / span if span else 0.5
        return 1 - share if flip else share

    distinct = sorted(set(values))
    if len(distinct) <= 5:
        marks = distinct
    elif wide:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        marks = [low, *(10.0**k for k in powers), high]
    else:
        marks = [low, *(x for x in ticks(low, high, 4) if low < x < high), high]
    labels: list[tuple[float, str]] = []
    for mark in (low, high, *marks):
        at = place(mark)
        if at is not None and all(abs(at - other) > 0.06 for other, _ in labels):
            labels.append((at, tables.number(mark, metric) if metric else f"{mark:.3g}"))
    return _Axis(title, place, labels, bool(metric))


def _word_axis(title: str, values: Sequence[Any]) -> _Axis:
    words = {tables.setting(value): finite(value) for value in values}
    order = sorted(words, key=lambda word: (words[word] is None, words[word] or 0.0, word))
    places = {word: i / (len(order) - 1) if len(order) > 1 else 0.5 for i, word in enumerate(order)}
    labelled = order[:: max(1, len(order) // 12)]
    labels = [(places[word], word if len(word) <= 14 else word[:13] + "…") for word in labelled]
    return _Axis(title, lambda value: places.get(tables.setting(value)), labels)


def _parallel(found: Comparison) -> str:
    """Each run a line through its settings to what came of it."""
    goal = found.goal
    if goal is None or len(found.groups) < 4:
        return ""
    runs = [(i, run, goal.value(run)) for i, group in enumerate(found.groups) for run in group.runs]
    trials = [(i, run, value) for i, run, value in runs if value is not None]
    if len(trials) < 4 or not found.varied:
        return ""
    shares = found.importance.shares if isinstance(found.importance, Importance) else {}
    weight = {path: shares.get(path, shares.get(f"config.{path}", 0.0)) for path in found.varied}
    paths = sorted(found.varied, key=lambda path: -weight[path])[:AXES][
        ::-1
    ]  # what matters most stands next to the goal
    short = short_names(paths)
    axes = []
    for path in paths:
        values = [run.shown.get(path, ABSENT) for _, run, _ in trials]
        numbers = [x for value in values if (x := finite(value)) is not None]
        all_numbers = len(numbers) == len(values)
        axes.append(_number_axis(short[path], numbers) if all_numbers else _word_axis(short[path], values))
    axes.append(_number_axis(f"{heading(goal.metric)}, val", [v for _, _, v in trials], goal.metric, goal.lower))
    split = "" if found.split in (None, "val") else str(found.split)
    known = [x for _, run, _ in trials if (x := run.scalars(split).get(goal.metric)) is not None]
    if known:
        axes.append(_number_axis(f"{heading(goal.metric)}, {split}", known, goal.metric, goal.lower))

    width, height, left, right, top, bottom = 1080, 360, 60, 60, 42, 16
    xs = [left + k * (width - left - right) / (len(axes) - 1) for k in range(len(axes))]
    low_y, tall = height - bottom, height - top - bottom
    room = max(10, int((width - left - right) / (len(axes) - 1) / 7))
    out = [f'<svg class="parallel" viewBox="0 0 {width} {height}" role="img" aria-label="Parallel coordinates">']
    ranked = sorted(trials, key=lambda trial: trial[2], reverse=not goal.lower)
    for place, (i, run, value) in reversed(list(enumerate(ranked))):  # the best on top
        row = [run.shown.get(path, ABSENT) for path in paths] + [value]
        row += [run.scalars(split).get(goal.metric)] * (len(axes) - len(row))
        ys = [None if (at := axis.place(x)) is None else low_y - at * tall for axis, x in zip(axes, row, strict=True)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True) if y is not None)
        data = " ".join("-1" if y is None else f"{y:.1f}" for y in ys)
        tip = f"{run.name}: {glance(goal.metric, value)}; " + ", ".join(
            f"{short[path]} {tables.setting(x)}" for path, x in zip(paths, row, strict=False)
        )
        share = 100 * (1 - place / max(len(ranked) - 1, 1))
        dashed = "" if run.finished else " unfinished"
        out.append(
            f'<g class="trial{dashed}" data-trial="{i}" data-y="{data}" style="--share:{share:.0f}%">'
            f"<title>{e(tip)}</title>"
            f'<polyline class="catch" points="{points}"/><polyline class="stroke" points="{points}"/></g>'
        )
    for x, axis in zip(xs, axes, strict=True):
        title = axis.title if len(axis.title) <= room else axis.title[: room - 1] + "…"
        kind = "axis result" if axis.result else "axis"
        out.append(f'<g class="{kind}"><line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{low_y}"/>')
        named = f"{e(title)}<title>{e(axis.title)}</title>"
        out.append(f'<text class="head" x="{x:.1f}" y="18" text-anchor="middle">{named}</text>')
        for at, label in axis.labels:
            out.append(f'<text x="{x + 6:.1f}" y="{low_y - at * tall + 4:.1f}">{e(label)}</text>')
        out.append(f'<rect class="brush" x="{x - 8:.1f}" width="16" y="0" height="0"/>')
        out.append(f'<rect class="hit" x="{x - 14:.1f}" width="28" y="{top}" height="{tall}"/></g>')
    note = (
        "Each line is a run, the better the bluer; on the axes to the right, better is up. Drag along an axis to see "
        "only runs in that range, click it to see all again; hold the pointer over a line for its settings."
    )
    if any(not run.finished for _, run, _ in trials):
        note += " Dashed runs did not finish."
    hidden = len(found.varied) - len(paths)
    note += f" {hidden} more settings differ." if hidden > 0 else ""
    body = f'<p class="quiet measure">{e(note)}</p><figure class="wide">{"".join(out)}</svg></figure>'
    return section("Parallel coordinates", body)


def _importance(found: Importance | str | None, whole: Comparison) -> str:
    if found is None or (isinstance(found, str) and len(whole.groups) < 4):
        return ""
    if isinstance(found, str):
        return section("Importance of settings", f'<p class="quiet">{e(found)}</p>')
    shown = list(found.shares.items())[:15]
    width, left, tall = 720, 220, 26
    most = max([share for _, share in shown] + [1e-9])
    out = [f'<svg viewBox="0 0 {width} {tall * len(shown) + 4}" role="img" aria-label="Importance of settings">']
    short = short_names(list(found.shares))
    for i, (name, share) in enumerate(shown):
        y, long = tall * i + 4, (width - left - 70) * share / most
        text = short[name] if len(short[name]) <= 30 else "…" + short[name][-29:]
        out.append(
            f'<g><title>{e(name)}</title><text x="{left - 10}" y="{y + 15}" text-anchor="end">{e(text)}</text>'
            f'<rect class="column" x="{left}" y="{y + 2}" width="{max(long, 1):.1f}" height="{tall - 8}" rx="2"/>'
            f'<text x="{left + long + 8:.1f}" y="{y + 15}">{100 * share:.0f} %</text></g>'
        )
    goal = f" for {heading(whole.goal.metric).lower()} on val" if whole.goal else ""
    note = f"Share of each setting{goal}: {found.method}."
    figure = f'<figure class="half">{"".join(out)}</svg></figure>'
    return section("Importance of settings", f'<p class="quiet measure">{e(note)}</p>{figure}')


_STYLE = """
:root{--c0:#2f6fdb;--c1:#dd7a1b;--c2:#25915a;--c3:#8257c9;--c4:#cf3f5f;--c5:#1593a5;--c6:#a2751a;--c7:#c653a8;
--rest:#a9adb3}
@media(prefers-color-scheme:dark){:root{--c0:#6fa3f7;--c1:#f0a04b;--c2:#58c08c;--c3:#b193ec;--c4:#f07a92;--c5:#4cc3d4;
--c6:#d3ac55;--c7:#ea8fd2;--rest:#5f646b}}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.c6{--c:var(--c6)}.c7{--c:var(--c7)}.rest{--c:var(--rest)}
.measure{max-width:88ch}.notes{background:var(--tint);border-radius:10px;padding:14px 18px;margin-top:28px}
.notes ul{margin:0;padding-left:1.2em;font-size:.9rem}.notes li{margin:.2em 0}
.key.plain:before{display:none}.legend{display:flex;flex-wrap:wrap;gap:.2em 1.2em;font-size:.9rem}
.line.rest{stroke-width:1;opacity:.55}.line.several{stroke-width:1.4;opacity:.8}
td.best{font-weight:650}td small{color:var(--quiet);font-weight:400;margin-left:.5em}
tbody .key{color:var(--ink)}.numbers th:first-child{min-width:7em}
.numbers.left td,.numbers.left th{text-align:left}
.span{stroke:var(--c);stroke-width:2.5;stroke-linecap:round;opacity:.55}.small{fill:var(--c);opacity:.6}
.whisker{width:130px;height:18px;display:inline-block;vertical-align:middle}.zero{stroke:var(--quiet);stroke-width:1}
.whisker .good{--c:var(--c2)}.whisker .bad{--c:var(--wrong)}.whisker .idle{--c:var(--quiet)}.point{fill:var(--c)}
.facts thead th{width:auto;color:var(--ink)}.facts .part th{color:var(--quiet);font-size:.82rem;padding-top:16px}
.facts.config td{min-width:9em}
.parallel{min-width:760px}.parallel text{paint-order:stroke;stroke:var(--card);stroke-width:4px;pointer-events:none}
.parallel .head{fill:var(--ink);font-weight:600}
.axis line{stroke:var(--quiet);stroke-width:1.2}.result line{stroke:var(--ink);stroke-width:2}
.hit{fill:transparent;cursor:ns-resize;touch-action:none}.brush{fill:var(--ink);opacity:.18;pointer-events:none}
.trial polyline{fill:none;stroke-linejoin:round}.catch{stroke:transparent;stroke-width:9;pointer-events:stroke}
.stroke{stroke:color-mix(in srgb,var(--blue) var(--share),var(--orange));stroke-width:1.6;opacity:.75;
pointer-events:none}
.unfinished .stroke{stroke-dasharray:5 4;opacity:.5}.trial:hover .stroke{stroke:var(--ink);stroke-width:3.5;opacity:1}
.trial.out{pointer-events:none}.trial.out .stroke{stroke:var(--rest);opacity:.12}tr.out{opacity:.3}
figure.half{max-width:760px}
.tall{max-height:480px;overflow:auto;border-bottom:1px solid var(--rule)}
.tall thead th{position:sticky;top:0;background:var(--paper)}
.numbers.tight th,.numbers.tight td{padding:6px 8px}.numbers.tight th:first-child{padding-left:0}
.verdict{color:var(--quiet)}
.verdict.good{color:var(--c2);font-weight:600}.verdict.bad{color:var(--wrong);font-weight:600}
@media(max-width:600px){.whisker{width:90px}}
"""

_SCRIPT = """
(function () {
  var svg = document.querySelector("svg.parallel"), ranges = {};
  if (!svg) return;
  function y(event) {
    return new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).y;
  }
  function show() {
    var kept = {};
    svg.querySelectorAll(".trial").forEach(function (trial) {
      var ys = trial.dataset.y.split(" ").map(Number);
      var out = Object.keys(ranges).some(function (i) { return ys[i] < ranges[i][0] || ys[i] > ranges[i][1]; });
      trial.classList.toggle("out", out);
      if (!out) kept[trial.dataset.trial] = true;
    });
    document.querySelectorAll("tr[data-trial]").forEach(function (row) {
      row.classList.toggle("out", Object.keys(ranges).length > 0 && !kept[row.dataset.trial]);
    });
  }
  svg.querySelectorAll(".axis").forEach(function (axis, i) {
    var hit = axis.querySelector(".hit"), brush = axis.querySelector(".brush"), start = null;
    function draw(height, top) { brush.setAttribute("height", height); brush.setAttribute("y", top); }
    hit.addEventListener("pointerdown", function (event) {
      start = y(event); delete ranges[i]; draw(0, 0); show(); hit.setPointerCapture(event.pointerId);
    });
    hit.addEventListener("pointermove", function (event) {
      if (start === null) return;
      var low = Math.min(start, y(event)), high = Math.max(start, y(event));
      if (high - low < 4) return;
      ranges[i] = [low, high]; draw(high - low, low); show();
    });
    hit.addEventListener("pointerup", function () { start = null; });
  });
})();
"""
