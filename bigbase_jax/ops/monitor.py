"""``--mode=monitor``: whether what a model sees and says in service is still what it was trained for."""

from __future__ import annotations

import csv
import datetime
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.compare.numbers import p_text
from bigbase_jax.compare.statistics import wilson
from bigbase_jax.core import UserError
from bigbase_jax.ops import samples
from bigbase_jax.ops.drift import FALSE_ALARMS, LEAST, Test, drift
from bigbase_jax.ops.features import CLASS, CONFIDENCE, reference
from bigbase_jax.ops.registry import Registry
from bigbase_jax.pages.page import Chart, Series, write_page
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.runtime.untrusted import read_regular

LATEST = 5000
"""Predictions that are looked at."""
PAGE = "monitor.html"
_CHARTS = 8


def monitor(
    workdirs: Sequence[str],
    pattern: str | None,
    registry: str | None = None,
    storage: str | None = None,
    specs: Sequence[str] | None = None,
    labels: str | None = None,
    output: str | None = None,
    false_alarms: float = FALSE_ALARMS,
) -> dict[str, Any]:
    """Compares sampled predictions with the run's own examples, and writes a page.

    Args:
      workdirs: the run that made the predictions, where no registry says it.
      pattern: the folder of the samples.
      registry, storage: see ``Registry.open``.
      specs: the model that made them, see ``Registry.find``; without a registry, its name.
      labels: a CSV file with the columns ``request`` and ``label``: what was right, of some requests.
      output: the page; None: ``monitor.html`` in the folder of the samples.
      false_alarms: see ``drift``.

    Returns:
      ``alarm``, and why; the page; and the live accuracy, where there are labels.

    Raises:
      UserError: no samples, no reference, or the disk refuses.
    """
    if pattern is None:
        raise UserError("--mode=monitor needs --input: the folder of the samples.")
    if not 0 < false_alarms < 1:
        raise UserError(f"--false_alarms={false_alarms:g} is no probability.")
    spec = specs[0] if specs else None
    version = Registry.open(registry, storage).resolve(spec) if registry and spec else None
    if len(specs or ()) > 1 or len(workdirs) != (version is None):
        raise UserError("--mode=monitor takes the run by --workdir, or else by --registry and --model=NAME@ALIAS.")
    run = RunDir(workdirs[0] if version is None else version.folder)
    run.config_json()
    wanted = (spec, None) if version is None else (version.model, str(version.version))
    seen = samples.read(pattern, LATEST, *wanted)
    known = reference(run)
    tests = drift(known, seen.features, false_alarms)
    alarms = [name for name, test in tests.items() if test.alarm]
    live = _live(seen, labels) if labels is not None else {}
    name = run.path.resolve().name if version is None else str(version)
    path = pathlib.Path(output).expanduser() if output else pathlib.Path(pattern).expanduser() / PAGE
    ends = [
        datetime.datetime.fromtimestamp(seen.rows[i]["at"], datetime.UTC).isoformat("T", "seconds") for i in (0, -1)
    ]
    classes = run.data_json().get("dataset_info", {}).get("class_names") or []
    order = sorted(tests, key=lambda name: (not tests[name].alarm, tests[name].p_holm))
    write_page(
        path,
        "monitor.html",
        title=f"{name} · monitor",
        name=name,
        alarms=alarms,
        enough=len(seen.rows) >= LEAST,
        least=LEAST,
        false_alarms=false_alarms,
        ends=ends,
        model="{model} {version}".format(**seen.rows[-1]),
        tiles=_tiles(seen, tests, live),
        tests=[(name, tests[name], p_text(tests[name].p), p_text(tests[name].p_holm)) for name in order],
        charts=[_chart(name, known[name], seen.features[name], classes) for name in order if name in known][:_CHARTS],
    )
    for name in alarms:
        test = tests[name]
        say(f"alarm: {name} has changed ({test.method} {test.value:.3g}, p {p_text(test.p_holm)} after Holm)")
    say(f"monitor: {path}")
    return {"alarm": bool(alarms), "changed": alarms, "predictions": len(seen.rows), "page": str(path), **live}


def _live(seen: samples.Samples, labels: str) -> dict[str, Any]:
    """The accuracy on requests of which somebody said what was right, with its interval."""
    try:
        lines = csv.DictReader(read_regular(labels).decode("utf-8-sig").splitlines())
        right = {row["request"]: row["label"] for row in lines}
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels={labels} is no CSV file with the columns request and label ({error}).") from error
    answers = {row["request"]: row["label"] for row in seen.rows if row["label"] is not None}
    joined = [answers[request] == label for request, label in right.items() if request in answers]
    if not joined:
        raise UserError(f"--labels={labels} has no request that is among the {len(answers):,} answers with a label.")
    low, high = wilson(sum(joined), len(joined))
    return {"live_accuracy": sum(joined) / len(joined), "interval": [low, high], "labelled": len(joined)}


def _tiles(
    seen: samples.Samples, tests: Mapping[str, Test], live: Mapping[str, Any]
) -> list[tuple[str, str, str, str]]:
    tiles = [("Predictions", f"{len(seen.rows):,}", "", "sampled")]
    tiles.append(("Changed", f"{sum(test.alarm for test in tests.values())}", "", f"of {len(tests)} tests"))
    if CONFIDENCE in seen.features:
        mean = float(np.nanmean(seen.features[CONFIDENCE]))
        tiles.append(("Confidence", f"{100 * mean:.1f}", "%", "mean of the likeliest class"))
    if live:
        low, high = live["interval"]
        note = f"{live['labelled']:,} labelled; 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
        tiles.append(("Live accuracy", f"{100 * live['live_accuracy']:.1f}", "%", note))
    return tiles


def _chart(name: str, reference_N: np.ndarray, live_M: np.ndarray, classes: list[str]) -> Chart:
    """Shares of both, by class or between even edges."""
    a, b = (x[np.isfinite(x)] for x in (reference_N, live_M))
    if name == CLASS:
        edges = np.arange(-0.5, max(a.max(), b.max(), len(classes) - 1) + 1)
        title = f"{name} ({', '.join(f'{i} {text}' for i, text in enumerate(classes[:6]))})" if classes else name
    else:
        low, high = (float(v) for v in np.quantile(np.concatenate([a, b]), (0.005, 0.995)))
        edges, title = np.linspace(low, high if low < high else low + 1, 13), name
    middle = (edges[:-1] + edges[1:]) / 2
    series = []
    for label, colour, x in (("reference", "train", a), ("live", "test", b)):
        shares = np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0] / max(len(x), 1)
        series.append(Series(label, colour, [float(v) for v in middle], [float(v) for v in shares], True))
    words: dict[str, Any] = {"share": True, "legend": False, "steps": False, "x_title": name.rpartition(".")[2]}
    return Chart(title, series, lambda y: f"{100 * y:.1f} %", **words)
