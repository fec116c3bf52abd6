"""What pages are made of (``report.py``, ``compare``): the document, its style, charts over steps, numbers as text.

A page is one file that needs nothing else: charts are inline SVG coloured by the style sheet (light and dark), and a
content policy forbids it any network. Text from outside goes through ``e``.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import html
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigbase_jax.runtime.whole import written

SPLITS = ("test", "val", "train")
"""Splits in the order in which a reader wants them."""
_OF_CLASSES = ("precision", "recall", "f1")
SHARES = (
    "accuracy",
    "top5_accuracy",
    *_OF_CLASSES,
    *(f"{name}_positive" for name in _OF_CLASSES),
    *(f"overall_{name}" for name in _OF_CLASSES),
)
"""Metrics that are read as percentages."""


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """The whole page; of scripts only this very one may run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"; script-src 'sha256-{digest}'" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'{allowed}\">"
        f"<title>{e(title)}</title><style>{STYLE}{style}</style></head>\n<body><main>\n{body}\n</main>"
        + (f"<script>{script}</script>" if script else "")
        + "</body></html>\n"
    )


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file atomically.

    Raises:
      UserError: the disk refuses.
    """
    with written(path) as file:
        file.write(text.encode())


# ----------------------------------------------------------------------------------------------------- charts


@dataclasses.dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
      name: for the legend and the tooltips.
      colour: classes of the style sheet, one of which sets ``--c``.
      x: steps.
      y: values at them.
      marks: draw the points too.
    """

    name: str
    colour: str
    x: list[float]
    y: list[float]
    marks: bool = False


def thin(points: list[tuple[float, float]], most: int = 500) -> tuple[list[float], list[float]]:
    """At most so many points: means of neighbours."""
    groups = np.array_split(np.asarray(points), most) if len(points) > most else [np.asarray([p]) for p in points]
    means = [group.mean(0) for group in groups]
    return [float(m[0]) for m in means], [float(m[1]) for m in means]


def chart(
    name: str, series: Sequence[Series], width: int = 480, height: int = 250, title: str = "", legend: str | None = None
) -> str:
    """A figure of a metric over steps, as wide as its column.

    Args:
      name: of the metric, which says how its values are written.
      series: at least one point.
      title: empty: the metric's name.
      legend: HTML; None: each series with its last value.
    """
    title = title or heading(name)
    left, right, top, bottom = 54, 12, 10, 28
    xs, ys = [x for s in series for x in s.x], [y for s in series for y in s.y]
    x0, x1 = min(xs), max(xs)
    if x0 == x1:
        x0, x1 = x0 - 1, x1 + 1
    ticks_y = ticks(*_apart(name, min(ys), max(ys)))
    y0, y1 = ticks_y[0], ticks_y[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (width - left - right),
            height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom),
        )

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{e(title)} over steps">']
    for y in ticks_y:
        px, py = at(x0, y)
        out.append(f'<line class="grid" x1="{px:.1f}" x2="{width - right}" y1="{py:.1f}" y2="{py:.1f}"/>')
        out.append(f'<text x="{left - 8}" y="{py + 4:.1f}" text-anchor="end">{e(_axis(name, y, y1 - y0))}</text>')
    for x in ticks(x0, x1, 5, whole=True):
        if x0 <= x <= x1:
            px, _ = at(x, y0)
            anchor = "end" if px > width - 30 else "middle"
            out.append(f'<text x="{px:.1f}" y="{height - 8}" text-anchor="{anchor}">{e(si(x))}</text>')
    for s in series:
        points = [at(x, y) for x, y in zip(s.x, s.y, strict=True)]
        if len(points) > 1:
            line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
            out.append(f'<polyline class="line {s.colour}" points="{line}"/>')
        if s.marks or len(points) == 1:
            radius = 5 if len(points) == 1 else 3
            out += [
                f'<circle class="dot {s.colour}" cx="{px:.1f}" cy="{py:.1f}" r="{radius}">'
                f"<title>{e(s.name)}, step {x:,.0f}: {e(glance(name, y))}</title></circle>"
                for (px, py), x, y in zip(points, s.x, s.y, strict=True)
            ]
    if legend is None:
        legend = "".join(
            f'<span class="key {s.colour}">{e(s.name if len(series) > 1 or s.name != "train" else "last")} '
            f"<b>{e(glance(name, s.y[-1]))}</b></span>"
            for s in series
        )
    out.append("</svg>")
    return f"<figure><figcaption><b>{e(title)}</b>{legend}</figcaption>{''.join(out)}</figure>"


def _apart(name: str, low: float, high: float) -> tuple[float, float]:
    """Ends of an axis that are so far apart that noise looks like noise: a twentieth of the values, or of 100 %."""
    missing = (0.05 if name in SHARES else max(abs(low), abs(high)) / 20) - (high - low)
    if missing <= 0:
        return low, high
    low, high = low - missing / 2, high + missing / 2
    if name in SHARES:
        low, high = (1 - (high - low), 1.0) if high > 1 else (max(0.0, low), high)
    return low, high


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Round numbers at even steps that enclose [low, high]; with ``whole``, numbers of things."""
    if low == high:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    raw = max((high - low) / count, 1.0 if whole else 0.0)
    scale = 10.0 ** math.floor(math.log10(raw))
    steps = (m * scale for m in (1, 2, 2.5, 5, 10) if not (whole and m * scale % 1))
    step = next(step for step in steps if step >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


# --------------------------------------------------------------------------------------------------- words and numbers


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927)."""
    p, spread = right / total, z * z / total
    middle = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / total + spread / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def e(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text), quote=True)


def section(title: str, body: str, kind: str = "") -> str:
    """A titled part of the page; both are HTML."""
    return f'<section class="{kind}"><h2>{title}</h2>{body}</section>'


def side_by_side(*sections: str) -> str:
    """Sections side by side where the window is wide enough."""
    return f'<div class="row">{"".join(sections)}</div>'


def finite(value: Any) -> float | None:
    """The value if it is a finite number."""
    return (
        float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )


_HEADINGS = {
    **{name: f"{name.capitalize()} (macro)" for name in _OF_CLASSES},
    **{f"{name}_positive": f"{name.capitalize()} (positive class)" for name in _OF_CLASSES},
    **{f"overall_{name}": f"Overall {name.replace('f1', 'F1')}" for name in _OF_CLASSES},
}
_HEADINGS |= {"auc": "AUC", "mfu": "MFU", "memory_gb": "Memory (GB)", "top5_accuracy": "Top-5 accuracy"}


def heading(name: str) -> str:
    """A metric's name as a title."""
    words = str(name).replace("_", " ")
    return _HEADINGS.get(str(name), words[:1].upper() + words[1:])


def glance(name: str, value: float) -> str:
    """As a person reads it at a glance."""
    if name in SHARES:
        return f"{100 * value:.1f} %"
    return si(value) if abs(value) >= 1000 else f"{value:.3g}"


def percent(value: float) -> str:
    """A percentage that does not round a little to nothing, or nearly all to all."""
    if 0 < value < 0.001:
        return "under 0.1 %"
    if 0.999 < value < 1:
        return "over 99.9 %"
    return f"{100 * value:.0f} %" if value in (0, 1) else f"{100 * value:.1f} %"


def plain(value: Any) -> str:
    """As it stands in a table."""
    if value is None:
        return "–"
    number = finite(value)
    if number is None:
        return str(value)
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{number:.4f}"
        if abs(number) >= 1e-3 or not number
        else f"{number:.3g}"
    )


def si(value: float) -> str:
    """A number of about three digits, thousands as k, M and G."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * scale:
            return f"{value / scale:.4g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _axis(name: str, value: float, span: float) -> str:
    if name in SHARES:
        return f"{100 * value:.0f} %" if span > 0.045 else f"{100 * value:.1f} %"
    if value and span < 0.005:
        return re.sub(r"\.?0*e([+-])0?", r"e\1", f"{value:.3e}")
    return si(value) if abs(value) >= 1000 else f"{value:.4g}"


def when(text: Any) -> str:
    """An ISO date and time in words; anything else as it is."""
    try:
        return datetime.datetime.fromisoformat(str(text)).strftime("%d %B %Y, %H:%M:%S %Z").strip().lstrip("0")
    except ValueError:
        return str(text)


STYLE = """
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
