"""Numbers, names and times as a person reads them; what a metric means is said by who measures it (``core.Metric``)."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from bigbase_jax.core import Metric

LOGGED = {
    "loss": Metric("min"),
    "learning_rate": Metric(),
    "examples_per_second": Metric("max"),
    "data_wait": Metric("min", "%"),
    "mfu": Metric("max", "%", "MFU"),
    "memory_gb": Metric("min", title="Memory (GB)"),
}
"""What every run logs, whatever its task."""


class Metrics(dict[str, Metric]):
    """What metrics mean, by name, in the order that their tasks give them: where several say it, the first; then
    ``LOGGED``. ``EVALUATOR/METRIC`` is that metric; of any other, only its name is known."""

    def __init__(self, *given: Mapping[str, Metric]):
        super().__init__()
        for metrics in (*given, LOGGED):
            for name, metric in metrics.items():
                self.setdefault(name, metric)

    def __missing__(self, name: str) -> Metric:
        _, evaluator, metric = str(name).rpartition("/")
        return self[metric] if evaluator else Metric()

    def title(self, name: str) -> str:
        """What it is called."""
        words = str(name).replace("_", " ")
        return self[name].title or words[:1].upper() + words[1:]

    def glance(self, name: str, value: float) -> str:
        """As a person reads it at a glance, with its unit."""
        unit = self[name].unit
        if unit == "%":
            return f"{100 * value:.1f} %"
        return f"{si(value) if abs(value) >= 1000 else f'{value:.3g}'} {unit}".rstrip()

    def number(self, name: str, value: float | None, signed: bool = False) -> str:
        """In a table: shares as percentages, others with 4 digits that count."""
        if value is None:
            return "–"
        sign = "+" if signed else ""
        if self[name].unit == "%":
            return f"{100 * value:{sign}.2f} %"
        return f"{value:{sign}.4g}" if abs(value) < 1e4 else f"{value:{sign},.0f}"

    def scaled(self, name: str, value: float, form: str) -> str:
        """By a format, in percent of a share; without the sign."""
        return format(100 * value if self[name].unit == "%" else value, form)


def proof_rows(proof: Mapping[str, Any], known: Metrics) -> list[tuple[str, str, str, str]]:
    """(what, before, after, note) of a ``proof.json``; what is missing or no number of it is left out."""

    def of(*path: str) -> Any:
        found: Any = proof
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return found

    rows = []
    for name in of("metrics") if isinstance(of("metrics"), dict) else ():
        before, after = (finite(of("metrics", name, side)) for side in ("before", "after"))
        if before is not None and after is not None:
            note = str(of("metrics", name, "verdict") or "")
            rows.append((known.title(name), known.number(name, before), known.number(name, after), note))
    sides = {"Size": (("bytes",), "B"), "Memory, batch 1": (("memory_bytes", "1"), "B")}
    sides |= {f"Latency, batch {n}": (("latency_ms", n), "ms") for n in ("1", "32")}
    for title, (path, unit) in sides.items():
        before, after = (finite(of(*path, side)) for side in ("before", "after"))
        if before and after:
            note = f"{after / before:.2f} of it"
            rows.append((title, f"{si(before)} {unit}", f"{si(after)} {unit}", note))
    if (same := finite(of("same_answers"))) is not None:
        rows.append(("Same answers", "", percent(same), f"of {plain(of('examples'))} examples of {of('split')}"))
    if (same := finite(of("written", "same_tokens"))) is not None:
        note = f"of {plain(of('written', 'tokens'))} that follow {plain(of('written', 'prompts'))} beginnings"
        rows.append(("Same tokens", "", percent(same), note))
    if (largest := finite(of("largest_difference"))) is not None:
        rows.append(("Largest difference of an output", "", f"{largest:.3g}", ""))
    return rows


def finite(value: Any) -> float | None:
    """The value if it is a finite number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


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
    if isinstance(value, int):
        return f"{value:,}"
    return f"{number:.4f}" if abs(number) >= 1e-3 or not number else f"{number:.3g}"


def si(value: float) -> str:
    """A number of about three digits, thousands as k, M and G."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * scale:
            return f"{value / scale:.4g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def p_text(p: float | None) -> str:
    """A p-value as it is reported."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def plural(count: int, what: str) -> str:
    """``"1 run"``, ``"2 runs"``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def setting(value: Any) -> str:
    """A setting as a table shows it: numbers with 5 digits that count, classes without their modules."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.5g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    module, colon, name = text.partition(":")
    return name if colon and re.fullmatch(r"\w+(\.\w+)*", module) and name.isidentifier() else text


def when(text: Any) -> str:
    """An ISO date and time in words; anything else as it is."""
    try:
        return datetime.datetime.fromisoformat(str(text)).strftime("%d %B %Y, %H:%M:%S %Z").strip().lstrip("0")
    except ValueError:
        return str(text)
