"""``comparison.html``: the comparison as one page that needs nothing else.

The one script lets a reader pick ranges on the axes of a sweep; without it the page is complete.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bigbase_jax.compare import tables
from bigbase_jax.compare.comparison import Comparison, Pair
from bigbase_jax.compare.importance import Importance
from bigbase_jax.compare.numbers import finite, proof_rows, setting
from bigbase_jax.compare.runs import ABSENT, Group, short_names
from bigbase_jax.core import Differences, Figure, Gallery, Table, some
from bigbase_jax.pages import figures
from bigbase_jax.pages.page import (
    Chart,
    Series,
    axis_text,
    in_order,
    logged,
    metric_chart,
    scale,
    thin,
    ticks,
    write_page,
)

COLOURS = 8
"""Groups that have a colour of their own; the others are grey."""
DOTS = 6
"""Metrics that are drawn with their intervals."""
SAID = 5
"""Notes that are shown without asking."""
ROWS = 30
"""Groups that such a figure shows."""
AXES = 9
"""Settings in the parallel coordinates, those that matter most."""
TABLE = 300
"""Rows of a table."""
SIDE = 4
"""Groups whose tasks' figures are shown side by side."""
_CROWD = 4
"""Groups above which a curve that runs away is cut, for the others to be seen."""
_NOT_CURVES = ("step", "kind", "split", "seconds", "epoch", "memory_gb", "data_wait", "step_seconds", "compile_seconds")


def write(folder: pathlib.Path, found: Comparison) -> str:
    """(Re)writes ``comparison.html`` in a folder, atomically; returns its path.

    Raises:
      UserError: it cannot be written.
    """
    curves, more_curves = _curves(found)
    shown = tables.shown_metrics(found)
    write_page(
        folder / "comparison.html",
        "comparison.html",
        "comparison.js",
        title=f"{_name(found)} · comparison",
        name=_name(found),
        found=found,
        first=found.groups[0],
        lead=_lead(found),
        facts=_facts(found),
        shown_notes=SAID,
        colours=COLOURS,
        most=TABLE,
        many=len(found.groups) > COLOURS,
        colour=lambda group: _colour(found, group),
        **_pairs(found),
        shown=shown,
        titles=[found.known.title(metric) for metric in shown],
        bests={metric: tables.best(found, metric) for metric in shown},
        other_data=tables.different_data(found),
        dots=_dots(found),
        over={m.over for m in found.measured.values()},
        figures=_figures(found),
        texts=_texts(found),
        curves=curves,
        more_curves=more_curves,
        parallel=_parallel(found),
        importance=_importance(found),
        proofs=[
            (f"{run.name}: {f'export to {name}' if name else 'compression'}", proof_rows(proof, found.known))
            for run in found.runs[:SIDE]
            for name, proof in run.proofs.items()
        ],
        short=short_names(list(found.varied)),
        absent=ABSENT,
        runs=[
            (run, group.name if len(group.runs) > 1 else "", json.dumps(run.settings.get("seed")))
            for group in found.groups
            for run in group.runs
        ],
    )
    return str(folder / "comparison.html")


def _name(found: Comparison) -> str:
    names = [group.name for group in found.groups]
    if len(names) <= 3:
        return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    return f"{len(names)} experiments" if len(found.runs) > len(names) else f"{len(names)} runs"


def _colour(found: Comparison, group: Group) -> str:
    place = found.groups.index(group)
    return f"c{place}" if place < COLOURS else "rest"


def _lead(found: Comparison) -> str:
    models = list(dict.fromkeys(found.models.values()))  # what is set in models of different kinds goes without saying
    paths = [path for path in found.varied if not (models and re.match(r"task\.(task\.)*model\.", path))]
    short = short_names(paths)
    names = [short[path] for path in sorted(short, key=lambda path: ABSENT in found.varied[path])]
    lead = f"They {'also ' * bool(models)}differ in {some(names, 6)}." if names else ""
    if models:
        return f"{(' against ' if len(models) == 2 else ', ').join(models)}. {lead}".strip()
    if len(found.groups) > 1 and not names and found.differences:
        return "Their settings are the same; they differ in where they come from."
    return lead


def _facts(found: Comparison) -> list[str]:
    facts = [f"metrics on {found.split}"] if found.split else []
    if len(found.runs) > len(found.groups):
        facts.append(f"{len(found.runs)} runs; those that differ only by the seed count together")
    if len(found.groups) > 1:
        how = f", the best by {_goal(found)}" if found.by_rank and found.goal else ""
        facts.append(f"baseline: {found.groups[0].name}{how}")
    return facts


def _goal(found: Comparison) -> str:
    return f"{found.known.title(found.goal.metric).lower()} on val" if found.goal else ""


# ----------------------------------------------------------------------------------------------------- tables


def _pairs(found: Comparison) -> dict[str, Any]:
    """Rows of the paired tests, and which of their columns there are."""
    widest: dict[str, float] = {}
    for pair in found.pairs:
        ends = [abs(x) for x in (pair.low, pair.high, pair.difference) if x is not None]
        widest[pair.metric] = max(widest.get(pair.metric, 0.0), *ends)
    groups = {group.name: group for group in found.groups}
    return {
        "pairs": [
            {
                "group": groups[pair.other],
                "cells": tables.pair_cells(found, pair)[1:],
                "pair": pair,
                "at": _better_right(pair, widest[pair.metric]) if widest[pair.metric] else None,
                "tone": {"better": "good", "worse": "bad"}.get(pair.verdict, "idle"),
            }
            for pair in found.pairs[:TABLE]
        ],
        "mcnemar": any(pair.mcnemar for pair in found.pairs),
        "seeds": any(pair.p_seeds is not None for pair in found.pairs),
        "examples": max((pair.examples for pair in found.pairs), default=0),
    }


def _better_right(pair: Pair, widest: float) -> Callable[[float], float]:
    """From differences to pixels, better to the right."""
    low, high = (widest, -widest) if pair.best == "min" else (-widest, widest)
    return scale(low, high, 6, 124)


# ----------------------------------------------------------------------------------------------------- what tasks show


def _figures(found: Comparison) -> list[tuple[str, list[tuple[Group, dict[str, Any]]]]]:
    """Each figure that the tasks of the first groups show, by its title, side by side; pictures need the data, and are
    in the reports."""
    split, shown = found.split, found.groups[:SIDE]
    if split is None or len(shown) < 2:
        return []
    columns: dict[str, list[tuple[Group, dict[str, Any]]]] = {}
    for group in shown:
        run = next((run for run in group.runs if split in run.evals), None)
        made: list[Figure] = figures.made_by(run.task, run.evaluated(split)) if run else []
        for drawn in figures.shaped([x for x in made if not isinstance(x, (Gallery, Differences))], split):
            columns.setdefault(drawn["title"], []).append((group, drawn))
    return [(title, drawn) for title, drawn in columns.items() if len(drawn) > 1]


def _texts(found: Comparison) -> list[tuple[str, str, list[tuple[int, str, list[tuple[Group, Any]]]]]]:
    """(title, what stands between words, rows) of texts that the first groups say otherwise: (index, what is right, the
    differences of each group)."""
    split, made = found.split, dict[str, list[tuple[Group, Differences]]]()
    for group in found.groups[:SIDE] if split else []:
        if (run := next((run for run in group.runs if split in run.evals), None)) is not None:
            for figure in figures.made_by(run.task, run.evaluated(split or "")):
                if isinstance(figure, Differences):
                    made.setdefault(figure.title, []).append((group, figure))
    drawn = []
    for title, pairs in made.items():
        if len(pairs) > 1 and (rows := figures.disagreements([figure for _, figure in pairs])):
            groups = [group for group, _ in pairs]
            several = [(index, right, list(zip(groups, parts, strict=True))) for index, right, parts in rows]
            drawn.append((title, pairs[0][1].between, several))
    return drawn


# ----------------------------------------------------------------------------------------------------- dots


def _dots(found: Comparison) -> list[dict[str, Any]]:
    """Metrics with their intervals."""
    names = [metric for metric in tables.shown_metrics(found) if found.known[metric].better][:DOTS]
    return [figure for metric in names if (figure := _dot_figure(found, metric))] if len(found.groups) > 1 else []


def _dot_figure(found: Comparison, metric: str) -> dict[str, Any] | None:
    measured = [(g, m) for g in found.groups if (m := found.measured.get((g.name, metric))) is not None]
    rows, known = measured[:ROWS], found.known
    values = [x for _, m in rows for x in (*m.values, m.low, m.high) if x is not None and math.isfinite(x)]
    if len(rows) < 2 or not values:
        return None
    marks, tall = ticks(min(values), max(values), 4), 24 if len(rows) <= 12 else 18
    at, span = scale(marks[0], marks[-1], 150, 454), marks[-1] - marks[0]
    names = [g.name if len(g.name) <= 22 else f"{g.name[:10]}…{g.name[-11:]}" for g, _ in rows]
    tips = [f"{g.name}: {tables.measured_text(found, g.name, metric)}" for g, _ in rows]
    return {
        "title": known.title(metric),
        "how": "less is better" if known[metric].better == "min" else "more is better",
        "cut": f"the first {len(rows)} of {len(measured)}" if len(measured) > len(rows) else "",
        "at": at,
        "tall": tall,
        "bottom": 10 + tall * len(rows),
        "ticks": [(at(x), axis_text(x, span, known[metric].unit == "%")) for x in marks],
        "rows": [(g, m, name, tip) for (g, m), name, tip in zip(rows, names, tips, strict=True)],
    }


# ----------------------------------------------------------------------------------------------------- curves


def _curves(found: Comparison) -> tuple[list[Chart], list[Chart]]:
    """The charts that are shown, and those that are shown on demand: first comes what is trained, then the goal and
    what the tasks put first."""
    names = {
        kind: in_order(logged([row for run in found.runs for row in run.rows if _is(row, kind)], _NOT_CURVES), known)
        for kind in ("train", "val")
        for known in [found.known]
    }
    goal = [found.goal.metric] if found.goal else []
    first = [("train", "loss"), *(("val", name) for name in dict.fromkeys([*goal, *names["val"][:2], "loss"]))]
    rest = [(kind, name) for kind in ("val", "train") for name in names[kind] if (kind, name) not in first]
    main, more = ([c for kind, name in keys if (c := _curve(found, kind, name))] for keys in (first, rest))
    return main, more


def _is(row: dict[str, Any], kind: str) -> bool:
    return row.get("kind") == "train" if kind == "train" else row.get("kind") == "eval" and row.get("split") == kind


def _curve(found: Comparison, kind: str, metric: str) -> Chart | None:
    series: list[Series] = []
    for group in reversed(found.groups):  # the first on top
        for run in group.runs:
            points = run.curve("train", metric) if kind == "train" else run.curve("eval", metric, kind)
            if points:
                several = " several" if len(group.runs) > 1 else ""
                marks = kind != "train" and len(points) < 40 and len(found.runs) <= COLOURS
                series.append(Series(run.name, _colour(found, group) + several, *thin(points, 300), marks))
    if not any(len(s.x) > 1 for s in series):
        return None
    title = f"{found.known.title(metric)}, {kind}"
    most = [max(s.y) for s in series]
    cap = 2 * float(np.median(most))
    if len(found.groups) > _CROWD and cap > 0 and max(most) > 2 * cap:
        title += " (runaways cut)"
        series = [dataclasses.replace(s, y=[min(y, cap) for y in s.y]) for s in series]
    return metric_chart(found.known, metric, series, title, legend=False)


# ----------------------------------------------------------------------------------------------------- sweeps


@dataclasses.dataclass(frozen=True)
class _Axis:
    """An axis of the parallel coordinates: values -> [0, 1] from the bottom, and the labels along it."""

    title: str
    place: Callable[[Any], float | None]
    labels: list[tuple[float, str]]
    result: bool = False


def _number_axis(title: str, values: Sequence[float], text: Callable[[float], str], lower: bool | None = None) -> _Axis:
    """Logarithmic where the values span much; ``lower`` (less is better: upside down) makes it the axis of a result."""
    low, high = min(values), max(values)
    wide = low > 0 and high / low >= 20
    measure: Callable[[float], float] = math.log if wide else float
    span = measure(high) - measure(low)

    def place(value: Any) -> float | None:
        x = finite(value)
        if x is None or (wide and x <= 0):
            return None
        share = (measure(x) - measure(low)) / span if span else 0.5
        return 1 - share if lower else share

    marks = sorted(set(values))
    if len(marks) > 5 and wide:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        marks = [low, *(10.0**k for k in powers), high]
    elif len(marks) > 5:
        marks = [low, *(x for x in ticks(low, high, 4) if low < x < high), high]
    labels: list[tuple[float, str]] = []
    for mark in (low, high, *marks):
        at = place(mark)
        if at is not None and all(abs(at - other) > 0.06 for other, _ in labels):
            labels.append((at, text(mark)))
    return _Axis(title, place, labels, lower is not None)


def _word_axis(title: str, values: Sequence[Any]) -> _Axis:
    words = {setting(value): finite(value) for value in values}
    order = sorted(words, key=lambda word: (words[word] is None, words[word] or 0.0, word))
    places = {word: i / (len(order) - 1) if len(order) > 1 else 0.5 for i, word in enumerate(order)}
    labelled = order[:: max(1, len(order) // 12)]
    labels = [(places[word], word if len(word) <= 14 else word[:13] + "…") for word in labelled]
    return _Axis(title, lambda value: places.get(setting(value)), labels)


def _parallel(found: Comparison) -> dict[str, Any] | None:
    """Each run a line through its settings to what came of it."""
    goal, known = found.goal, found.known
    runs = [(i, run, goal.value(run)) for i, group in enumerate(found.groups) for run in group.runs] if goal else []
    trials = [(i, run, value) for i, run, value in runs if value is not None]
    if goal is None or len(found.groups) < 4 or len(trials) < 4 or not found.varied:
        return None
    shares = found.importance.shares if isinstance(found.importance, Importance) else {}
    weight = {path: shares.get(path, shares.get(f"config.{path}", 0.0)) for path in found.varied}
    paths = sorted(found.varied, key=lambda path: -weight[path])[:AXES][::-1]  # what matters most is next to the goal
    short = short_names(paths)
    axes = []
    for path in paths:
        values = [run.shown.get(path, ABSENT) for _, run, _ in trials]
        numbers = [x for value in values if (x := finite(value)) is not None]
        text: Callable[[float], str] = lambda x: f"{x:.3g}"  # noqa: E731
        all_numbers = len(numbers) == len(values)
        axes.append(_number_axis(short[path], numbers, text) if all_numbers else _word_axis(short[path], values))
    split = "" if found.split in (None, "val") else str(found.split)
    said: Callable[[float], str] = lambda x: known.number(goal.metric, x)  # noqa: E731
    known_x = [x for run in found.runs if (x := run.scalars(split).get(goal.metric)) is not None]
    for where, of_split in (("val", [v for _, _, v in trials]), (split, known_x)):
        if of_split:
            axes.append(_number_axis(f"{known.title(goal.metric)}, {where}", of_split, said, goal.lower))

    width, height, side, top, bottom = 1080, 360, 60, 42, 16
    xs = [round(side + k * (width - 2 * side) / (len(axes) - 1), 1) for k in range(len(axes))]
    at_y = scale(0, 1, height - bottom, top)
    room = max(10, int((width - 2 * side) / (len(axes) - 1) / 7))
    ranked = sorted(trials, key=lambda trial: trial[2], reverse=not goal.lower)
    lines = []
    for place, (i, run, value) in reversed(list(enumerate(ranked))):  # the best on top
        row = [*(run.shown.get(path, ABSENT) for path in paths), value, run.scalars(split).get(goal.metric)]
        places = [axis.place(x) for axis, x in zip(axes, row, strict=False)]
        ys = [None if at is None else at_y(at) for at in places]
        listed = ", ".join(f"{short[path]} {setting(x)}" for path, x in zip(paths, row, strict=False))
        lines.append(
            {
                "group": i,
                "ys": " ".join("-1" if y is None else f"{y:.1f}" for y in ys),
                "points": [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None],
                "tip": f"{run.name}: {known.glance(goal.metric, value)}; {listed}",
                "share": round(100 * (1 - place / max(len(ranked) - 1, 1))),
                "finished": run.finished,
            }
        )
    titles = [axis.title if len(axis.title) <= room else axis.title[: room - 1] + "…" for axis in axes]
    hidden = len(found.varied) - len(paths)
    return {
        "width": width,
        "height": height,
        "top": top,
        "bottom": height - bottom,
        "lines": lines,
        "axes": [
            {
                "x": x,
                "text": text,
                "title": axis.title,
                "result": axis.result,
                "labels": [(at_y(at), label) for at, label in axis.labels],
            }
            for x, text, axis in zip(xs, titles, axes, strict=True)
        ],
        "unfinished": any(not run.finished for _, run, _ in trials),
        "hidden": f" {hidden} more settings differ." if hidden > 0 else "",
    }


def _importance(found: Comparison) -> dict[str, Any] | None:
    """What is shown of the importance of settings: a table, or the sentence why there is none."""
    if isinstance(found.importance, str):
        return {"note": found.importance, "table": None} if len(found.groups) >= 4 else None
    if found.importance is None:
        return None
    shares = found.importance.shares
    short = short_names(list(shares))
    rows = [(short[name], share) for name, share in list(shares.items())[:15]]
    goal = f" for {_goal(found)}" if found.goal else ""
    (table,) = figures.shaped([Table("", ("Setting", "Share"), rows, shares=("Share",))], "")
    return {"note": f"Share of each setting{goal}: {found.importance.method}.", "table": table}
