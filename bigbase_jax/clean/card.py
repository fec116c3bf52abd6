"""What came of a cleaning, in words and on a page: ``card.md``, ``clean.html`` and ``.clean/manifest.json``."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from bigbase_jax.clean.engine import col
from bigbase_jax.clean.pii import masked
from bigbase_jax.pages.page import Chart, Series, write_page
from bigbase_jax.runtime.whole import written

_EXAMPLES = 3  # of each reason
_SHOWN = 300  # characters of one
_COLUMNS = ("source", "license", "language")


def sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def told(df: Any) -> dict[str, Any]:
    """What there is to say of a step's output: how many came, what was dropped, examples, clusters, personal data.

    Examples are cut, and personal data in them is masked whatever the recipe says.
    """
    names = df.column_names
    text = "text" if "text" in names else "id"
    size = col(text).length_bytes()
    found = df.groupby("dropped").agg(col("key").count().alias("n"), size.sum().alias("b")).to_pydict()
    rows = dict(zip(found["dropped"], zip(found["n"], found["b"], strict=True), strict=True))
    said: dict[str, Any] = {
        "rows": sum(n for n, _ in rows.values()),
        "bytes": sum(b or 0 for _, b in rows.values()),
        "dropped": {why: n for why, (n, _) in sorted(rows.items(), key=lambda item: -item[1][0]) if why},
        "dropped_bytes": sum(b or 0 for why, (_, b) in rows.items() if why),
        "examples": {},
    }
    for why in list(said["dropped"])[:12]:
        some = df.where(col("dropped") == why).select("key", "id", col(text).left(_SHOWN).alias("text"))
        for row in some.sort("key").limit(_EXAMPLES).to_pylist():
            shown = masked(row["text"] or "").replace("\n", " ")
            said["examples"].setdefault(why, []).append([row["key"], masked(row["id"]), shown])
    if "of" in names:
        sizes = df.where(col("of").not_null()).groupby("of").agg(col("key").count().alias("n"))
        shares = sizes.groupby("n").agg(col("of").count().alias("clusters")).to_pydict()
        said["clusters"] = {int(n) + 1: c for n, c in sorted(zip(shares["n"], shares["clusters"], strict=True))}
    if "pii" in names:
        counts: Counter[str] = Counter()
        kinds = df.where(col("pii").not_null()).groupby("pii").agg(col("key").count().alias("n")).to_pydict()
        for kind, n in zip(kinds["pii"], kinds["n"], strict=True):
            for part in kind.split():
                counts[part.partition(":")[0]] += n * int(part.partition(":")[2])
        said["pii"] = dict(counts.most_common())
    if "mended" in names:
        said["mended"] = df.where(col("mended")).count_rows()
    return said


def kept(df: Any) -> dict[str, Any]:
    """Of what is left: counts by source, licence and language, and lengths."""
    said: dict[str, Any] = {}
    for name in _COLUMNS:
        if name in df.column_names:
            found = df.groupby(name).agg(col("id").count().alias("n")).to_pydict()
            said[name] = dict(
                sorted(zip(map(str, found[name]), found["n"], strict=True), key=lambda item: -item[1])[:40]
            )
    if "text" in df.column_names:
        power = (col("text").length() + 1).log2().floor().alias("power")
        found = df.select(power).groupby("power").agg(col("power").count().alias("n")).to_pydict()
        said["lengths"] = {int(p): n for p, n in sorted(zip(found["power"], found["n"], strict=True))}
        said["characters"] = int(df.agg(col("text").length().sum().alias("n")).to_pydict()["n"][0] or 0)
    return said


def summary(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The last line of the command."""
    first = manifest["steps"][0]
    return {
        "documents": sum(f["rows"] for f in manifest["files"]),
        "of": first["rows"],
        "characters": manifest["kept"].get("characters"),
        "dropped": {s["step"]: s["dropped"] for s in manifest["steps"][1:] if s["dropped"]},
        "set_aside": len(first["aside"]),
        "files": [f["name"] for f in manifest["files"]],
    }


def write(out: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """The card, the page, and last the manifest."""
    with written(out / "card.md") as file:
        file.write(_card(manifest).encode())
    rows = [step for step in manifest["steps"] if step["step"] != "read"]
    lengths = {int(power): n for power, n in manifest["kept"].get("lengths", {}).items()}
    charts = []
    if lengths:
        series = [Series("documents", "train", [float(p) for p in lengths], [float(n) for n in lengths.values()])]
        charts.append(
            Chart("Lengths", series, "{:,.0f}".format, legend=False, x_title="log2 characters", steps=False, bars=True)
        )
    documents = sum(f["rows"] for f in manifest["files"])
    write_page(
        out / "clean.html",
        "clean.html",
        title=f"{out.resolve().name} · cleaned",
        name=out.resolve().name,
        root=manifest["root"],
        documents=documents,
        first=manifest["steps"][0],
        steps=rows,
        kept={k: v for k, v in manifest["kept"].items() if k in _COLUMNS},
        characters=manifest["kept"].get("characters"),
        files=manifest["files"],
        recipe=manifest["recipe"],
        forgotten=manifest["forgotten"],
        charts=charts,
    )
    with written(out / ".clean" / "manifest.json") as file:
        file.write(json.dumps(manifest, ensure_ascii=False, indent=1).encode())


def _card(manifest: Mapping[str, Any]) -> str:
    first, files = manifest["steps"][0], manifest["files"]
    lines = [
        "# Cleaned data",
        "",
        f"{sum(f['rows'] for f in files):,} of {first['rows']:,} documents from `{manifest['root']}`, in {len(files)} "
        "files. "
        f"{manifest['forgotten']:,} were forgotten on request.",
        "",
        "| step | documents | dropped | why | MB | seconds | CPU seconds | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s in manifest["steps"]:
        why = ", ".join(f"{name} {n:,}" for name, n in s.get("dropped", {}).items())
        cost = f"{s['seconds']:.1f} | {s['cpu_seconds']:.1f} | {s['peak_bytes'] / 1e6:.0f}"
        gone = sum(s.get("dropped", {}).values())
        lines.append(f"| {s['step']} | {s['rows']:,} | {gone:,} | {why} | {s['bytes'] / 1e6:.1f} | {cost} |")
    for s in manifest["steps"]:
        if s.get("clusters"):
            shown = ", ".join(f"{c:,} of {n}" for n, c in list(s["clusters"].items())[:12])
            lines += ["", f"Clusters of {s['step'].replace('_', ' ')} (how many of which size): {shown}."]
        if s.get("pii"):
            lines += ["", "Personal data found: " + ", ".join(f"{k} {n:,}" for k, n in s["pii"].items()) + "."]
    for name in _COLUMNS:
        if values := manifest["kept"].get(name):
            lines += ["", f"By {name}: " + ", ".join(f"{k} {n:,}" for k, n in values.items()) + "."]
    if first["aside"]:
        lines += ["", "Set aside:", "", *(f"- `{name}`: {why}" for name, why in first["aside"])]
    lines += ["", "Inputs (BLAKE2b) and files (SHA-256):", ""]
    lines += [f"- in `{i['name']}` {i['rows']:,} documents `{i['blake2b']}`" for i in first["inputs"]]
    lines += [f"- out `{f['name']}` {f['rows']:,} documents `{f['sha256']}`" for f in files]
    lines += ["", "Steps:", "", *(f"- `{step}`" for step in manifest["recipe"]), ""]
    return "\n".join(lines)
