"""What pages are made of: Jinja templates (``templates/``), and charts as plain numbers that these draw as SVG.

A page is one file that needs nothing else: charts are inline SVG coloured by the style sheet (light and dark), pictures
and sounds are data URIs, and a content policy forbids it any network. Jinja escapes all text.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.resources
import itertools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from bigbase_jax.compare.numbers import Metrics, finite, percent, plain, plural, setting, si, when
from bigbase_jax.runtime.whole import written

_TEMPLATES = importlib.resources.files("bigbase_jax.pages") / "templates"
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("bigbase_jax.pages"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_ENVIRONMENT.filters.update(percent=percent, plain=plain, setting=setting, when=when)
_ENVIRONMENT.globals.update(plural=plural, finite=finite)


def write_page(path: pathlib.Path, template: str, script: str | None = None, **words: Any) -> None:
    """Writes a page, atomically; of scripts only the one of the file ``script`` may run.

    Raises:
      UserError: the disk refuses.
    """
    code = (_TEMPLATES / script).read_text() if script else ""
    words |= {"script": Markup(code), "digest": base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}
    words["style"] = Markup((_TEMPLATES / "style.css").read_text())
    text = _ENVIRONMENT.get_template(template).render(words)
    with written(path) as file:
        file.write(text.encode())


# ----------------------------------------------------------------------------------------------------- charts


@dataclasses.dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
      name: for the legend and the tooltips.
      colour: classes of the style sheet, one of which sets ``--c``.
      x, y: its points.
      marks: draw the points too.
      counts: of bars: how much stands behind each; the fewer, the fainter.
    """

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False
    counts: Sequence[float] = ()

    @property
    def points(self) -> list[tuple[float, float, float | None]]:
        """(x, y, count) of each."""
        return list(zip(self.x, self.y, self.counts or itertools.repeat(None, len(self.x)), strict=True))


def thin(points: Sequence[tuple[float, float]], most: int = 500) -> tuple[list[float], list[float]]:
    """At most so many points: means of neighbours."""
    groups = np.array_split(np.asarray(points), most) if len(points) > most else [np.asarray([p]) for p in points]
    means = [group.mean(0) for group in groups]
    return [float(m[0]) for m in means], [float(m[1]) for m in means]


def scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """From values in [low, high] to pixels from ``first`` to ``last``, to a tenth."""
    return lambda x: round(first + (x - low) / ((high - low) or 1) * (last - first), 1)


class Chart:
    """A chart as the macro ``svg`` draws it, as wide as its column: where its axes are, and what is written there.

    Args:
      series: at least one point.
      text: a value as it is read at a glance.
      share: values are shares, read in percent.
      legend: say each series and its last value.
      x_title, y_title: along the axes.
      steps: x counts steps of training.
      bars: columns, from 0, instead of lines.
      diagonal: a line where x = y, on axes of the same ends.
    """

    width, left, right, top, bottom = 480, 54, 468, 10, 222

    def __init__(
        self,
        title: str,
        series: Sequence[Series],
        text: Callable[[float], str] = si,
        share: bool = False,
        legend: bool = True,
        x_title: str = "",
        y_title: str = "",
        steps: bool = True,
        bars: bool = False,
        diagonal: bool = False,
    ):
        self.title, self.series, self.text, self.legend, self.steps, self.bars = (
            title,
            series,
            text,
            legend,
            steps,
            bars,
        )
        self.x_title, self.y_title, self.height = x_title, y_title, 250 + 18 * bool(x_title)
        xs, ys = [float(x) for s in series for x in s.x], [float(y) for s in series for y in s.y]
        self.gap = min(np.diff(np.unique(xs)), default=1.0) if bars else 0.0
        x0, x1 = min(xs) - self.gap / 2, max(xs) + self.gap / 2
        low, high = (min(0.0, *ys), max(ys)) if bars else _apart(min(ys), max(ys), share)
        if diagonal:
            x0, x1 = low, high = min(low, x0), max(high, x1)
        if x0 == x1:
            x0, x1 = x0 - 1, x1 + 1
        ticks_y = ticks(low, high)
        self.x = scale(x0, x1, self.left, self.right)
        self.y = scale(ticks_y[0], ticks_y[-1], self.bottom, self.top)
        self.grid = [(self.y(y), axis_text(y, ticks_y[-1] - ticks_y[0], share)) for y in ticks_y]
        marks = [x for x in ticks(x0, x1, 5, whole=steps) if x0 <= x <= x1]
        self.ticks = [(self.x(x), si(x) if steps else axis_text(x, x1 - x0)) for x in marks]
        self.diagonal = (x0, x1) if diagonal else None

    def tip(self, series: Series, x: float, y: float, count: float | None) -> str:
        """What is said of a point."""
        where = f"step {x:,.0f}" if self.steps else f"{self.x_title} {x:.4g}".lstrip()
        return f"{series.name}, {where}: {self.text(y)}" + ("" if count is None else f" ({count:,.0f})")


def metric_chart(known: Metrics, name: str, series: Sequence[Series], title: str = "", legend: bool = True) -> Chart:
    """The chart of a metric over steps."""
    return Chart(title or known.title(name), series, lambda y: known.glance(name, y), known[name].unit == "%", legend)


def _apart(low: float, high: float, share: bool) -> tuple[float, float]:
    """Ends of an axis that are so far apart that noise looks like noise: a twentieth of the values, or of 100 %."""
    missing = (0.05 if share else max(abs(low), abs(high)) / 20) - (high - low)
    if missing <= 0:
        return low, high
    low, high = low - missing / 2, high + missing / 2
    if share:
        low, high = (1 - (high - low), 1.0) if high > 1 else (max(0.0, low), high)
    return low, high


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Round numbers at even steps that enclose [low, high]; with ``whole``, numbers of things."""
    if low == high:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    raw = max((high - low) / count, 1.0 if whole else 0.0)
    power = 10.0 ** np.floor(np.log10(raw))
    steps = (m * power for m in (1, 2, 2.5, 5, 10) if not (whole and m * power % 1))
    step = float(next(step for step in steps if step >= raw * 0.999))
    first, last = int(np.floor(low / step + 1e-9)), int(np.ceil(high / step - 1e-9))
    return [i * step for i in range(first, last + 1)]


def axis_text(value: float, span: float, share: bool = False) -> str:
    """Along an axis that spans so much."""
    if share:
        return f"{100 * value:.0f} %" if span > 0.045 else f"{100 * value:.1f} %"
    if value and span < 0.005:
        return re.sub(r"\.?0*e([+-])0?", r"e\1", f"{value:.3e}")
    return si(value) if abs(value) >= 1000 else f"{value:.4g}"


def logged(rows: Sequence[Mapping[str, Any]], hidden: Sequence[str]) -> list[str]:
    """The names in rows of a log that are numbers somewhere, but for those that are not to be shown."""
    return list(dict.fromkeys(k for row in rows for k, v in row.items() if k not in hidden and finite(v) is not None))


def in_order(names: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """Names in the order of what is known; the others after them, as they come."""
    order = {name: i for i, name in enumerate(known)}
    return sorted(names, key=lambda name: order.get(name, len(order)))
