"""The comparison as tables: on the terminal, as CSV, and in short as JSON."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bigbase_jax.compare.comparison import Comparison, Pair, said_once
from bigbase_jax.compare.importance import Importance
from bigbase_jax.compare.numbers import p_text, setting
from bigbase_jax.compare.runs import ABSENT, SEEDS, short_names

_WIDE = 160  # columns where stdout is not a terminal
_METRICS, _ROWS = 6, 40  # how much of a table a terminal shows


def measured_text(found: Comparison, group: str, metric: str) -> str:
    """``"91.20 % ± 0.31"`` over seeds, ``"91.20 % [90.5, 91.9]"`` over examples."""
    m, known = found.measured.get((group, metric)), found.known
    if m is None or m.low is None or m.high is None:
        return known.number(metric, None if m is None else m.mean)
    text = known.number(metric, m.mean)
    if m.over == "seeds":
        return f"{text} ± {known.scaled(metric, m.high - m.mean, '.3g')}"
    return f"{text} [{known.scaled(metric, m.low, '.4g')}, {known.scaled(metric, m.high, '.4g')}]"


def different_data(found: Comparison) -> bool:
    """Whether the evaluations are not all of the same data."""
    return len({run.examples for run in found.runs if found.split in run.evals}) > 1


def best(found: Comparison, metric: str) -> list[str]:
    """The groups with the best mean; none where all are the same, or on different data, or none is better."""
    better = found.known[metric].better
    if better is None or different_data(found):
        return []
    means = {g.name: m.mean for g in found.groups if (m := found.measured.get((g.name, metric))) is not None}
    if len(set(means.values())) < 2:
        return []
    top = (min if better == "min" else max)(means.values())
    return [name for name, mean in means.items() if mean == top]


def shown_metrics(found: Comparison, most: int | None = None) -> list[str]:
    """Without those that are the same in all groups (as the number of tokens), where there are several; but the two
    that matter most are always there."""
    if len(found.groups) < 2:
        return found.metrics[:most]
    shown = []
    for metric in found.metrics:
        means = [m.mean for g in found.groups if (m := found.measured.get((g.name, metric)))]
        if len(set(means)) > 1 or 0 < len(means) < len(found.groups) or metric in found.metrics[:2]:
            shown.append(metric)
    return shown[:most]


# ----------------------------------------------------------------------------------------------------- the terminal


def show(found: Comparison) -> None:
    """Prints the tables on stdout."""
    console = _console()
    if found.differences:
        console.print(_differences(found))
    if found.metrics:
        console.print(_metrics(found))
    if found.pairs:
        console.print(_pairs(found))


def show_table(title: str, first: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table of cells on stdout."""
    table = _table(title, first, columns)
    for cells in rows:
        _row(table, cells)
    _console().print(table)


def _console() -> Console:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDE
    return Console(file=sys.stdout, width=width, highlight=False)


def _table(title: str, first: str, columns: Sequence[str], right: bool = True) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _row(table: Table, cells: Sequence[str], style: str | None = None) -> None:
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells), style=style)


def _differences(found: Comparison) -> Table:
    """Settings by groups; the other way round where there are many groups."""
    rows = [(part, path, values) for part, table in found.differences.items() for path, values in table.items()]
    some = [row for row in rows if ABSENT in row[2]]  # mostly arguments of something that only some have
    rows = [row for row in rows if row not in some]
    if len(found.groups) <= 6:
        table = _table("What differs", "setting", [g.name for g in found.groups], right=False)
        for part, path, values in rows[:_ROWS]:
            _row(table, [path if part != "origin" else f"({path})", *map(setting, values)])
    else:
        rows = [row for row in rows if row[0] != "origin"][:_METRICS]
        short = short_names([path for _, path, _ in rows])
        table = _table("What differs", "run", [short[path] for _, path, _ in rows], right=False)
        for i, g in enumerate(found.groups[:_ROWS]):
            _row(table, [g.name, *(setting(values[i]) for _, _, values in rows)])
    if some:
        table.caption, table.caption_justify = f"on the page: what only some of them have ({len(some)})", "left"
    return table


def _metrics(found: Comparison) -> Table:
    names = shown_metrics(found, _METRICS)
    table = _table(f"Metrics on {found.split}", "run", ["seeds", *map(found.known.title, names)])
    bests = {metric: best(found, metric) for metric in names}
    for g in found.groups[:_ROWS]:
        cells = [g.name, str(len(g.runs))]
        for metric in names:
            mark = " *" if g.name in bests[metric] else ""
            cells.append(measured_text(found, g.name, metric) + mark)
        _row(table, cells)
    seeds = any(m.over == "seeds" for m in found.measured.values())
    examples = any(m.over == "examples" for m in found.measured.values())
    said = ["* best"] + ["± 95 % interval over seeds"] * seeds + ["[95 % interval over examples]"] * examples
    if len(found.groups) > _ROWS:
        said.append(f"{len(found.groups) - _ROWS} more in groups.csv")
    table.caption, table.caption_justify = "; ".join(said), "left"
    return table


def _pairs(found: Comparison) -> Table:
    columns = ["metric", "difference", "95 % interval", "p, bootstrap", "right alone", "p, McNemar", "p, seeds"]
    table = _table(found.against, "run", columns)
    table.add_column("verdict")
    for pair in found.pairs[:_ROWS]:
        style = {"better": "green", "worse": "red"}.get(pair.verdict)
        _row(table, pair_cells(found, pair), style)
    alone = "right alone: examples that only the baseline, and only this run, has right"
    alone = alone if any(pair.mcnemar for pair in found.pairs) else ""
    many = "p-values are corrected for the number of runs (Holm)" if len(found.groups) > 2 else ""
    more = f"{len(found.pairs) - _ROWS} more in pairs.csv" if len(found.pairs) > _ROWS else ""
    table.caption, table.caption_justify = "; ".join(x for x in (alone, many, more) if x) or None, "left"
    return table


def pair_cells(found: Comparison, pair: Pair) -> list[str]:
    """A row of the table of pairs."""
    known, interval = found.known, "–"
    if pair.low is not None and pair.high is not None:
        interval = f"[{', '.join(known.scaled(pair.metric, x, '+.3g') for x in (pair.low, pair.high))}]"
    return [
        pair.other,
        known.title(pair.metric),
        known.number(pair.metric, pair.difference, signed=True).replace("%", "points"),
        interval,
        p_text(pair.p_holm),
        f"{pair.mcnemar.only_a} : {pair.mcnemar.only_b}" if pair.mcnemar else "–",
        p_text(pair.mcnemar_holm),
        p_text(pair.p_seeds_holm),
        pair.verdict,
    ]


# ----------------------------------------------------------------------------------------------------- files


def csv_files(found: Comparison) -> dict[str, str]:
    """``runs.csv``: each run's settings that differ and its metrics; ``groups.csv``: means, deviations and intervals;
    ``pairs.csv``: the tests. Full precision, and the names that the config and the evaluations use."""
    seeds = [name for name in SEEDS if any(name in run.settings for run in found.runs)]
    runs = []
    for g in found.groups:
        for run in g.runs:
            scalars = run.scalars(found.split) if found.split else {}
            row: dict[str, Any] = {"run": run.name, "group": g.name, "path": str(run.path), "state": run.state}
            row |= {name: run.settings.get(name) for name in seeds} | {
                name: run.shown.get(name) for name in found.varied
            }
            row |= {f"val/{found.goal.metric}": found.goal.value(run)} if found.goal else {}
            runs.append(row | {f"{found.split}/{name}": scalars.get(name) for name in found.metrics})
    groups = [
        {
            "group": g.name,
            "runs": len(g.runs),
            "split": found.split,
            "metric": metric,
            "values": len(m.values),
            "mean": m.mean,
            "standard_deviation": m.deviation,
            "low": m.low,
            "high": m.high,
            "interval_over": m.over,
        }
        for g in found.groups
        for metric in found.metrics
        if (m := found.measured.get((g.name, metric))) is not None
    ]
    pairs = [pair_row(pair) for pair in found.pairs]
    columns = list(pair_row(Pair("", "", "", 0.0, 0.0)))
    return {"runs.csv": _csv(runs), "groups.csv": _csv(groups), "pairs.csv": _csv(pairs, columns)}


def pair_row(pair: Pair) -> dict[str, Any]:
    """A pair in plain values."""
    return {
        "baseline": pair.baseline,
        "group": pair.other,
        "metric": pair.metric,
        "baseline_value": pair.a,
        "value": pair.b,
        "difference": pair.difference,
        "low": pair.low,
        "high": pair.high,
        "examples": pair.examples,
        "p_bootstrap": pair.p,
        "p_bootstrap_holm": pair.p_holm,
        "only_baseline_right": pair.mcnemar.only_a if pair.mcnemar else None,
        "only_this_right": pair.mcnemar.only_b if pair.mcnemar else None,
        "p_mcnemar": pair.mcnemar.p if pair.mcnemar else None,
        "p_mcnemar_holm": pair.mcnemar_holm,
        "p_seeds": pair.p_seeds,
        "p_seeds_holm": pair.p_seeds_holm,
        "verdict": pair.verdict,
    }


def _csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else columns)
    writer.writeheader()
    for row in rows:
        cells = {k: json.dumps(v) if isinstance(v, (list, dict, bool)) else v for k, v in row.items()}
        writer.writerow(cells)
    return file.getvalue()


def summary(found: Comparison) -> dict[str, Any]:
    """What the last line on stdout says."""
    first = shown_metrics(found, 1)
    return {
        "runs": len(found.runs),
        "groups": len(found.groups),
        "split": found.split,
        "baseline": found.groups[0].name,
        "best": {metric: best(found, metric) for metric in first},
        "pairs": [
            {k: v for k, v in pair_row(p).items() if v is not None and k not in ("baseline", "baseline_value")}
            for p in found.pairs
        ],
        "importance": found.importance.shares if isinstance(found.importance, Importance) else None,
        "notes": said_once(found.notes),
    }
