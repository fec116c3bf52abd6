"""The tables and the figure of the study: python table.py RUNS/lr_wd_photos RUNS/lr_wd_photos-to_the_end \\
    RUNS/lr_wd_photos-again [FIGURE.png]

Needs matplotlib: pip install 'bigbase_jax[plots]'.
"""

import json
import pathlib
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy import stats

NAMES = {"flip": "mirror", "crop": "crop, mirror", "crop_and_colour": "crop, mirror, colour"}


def curve(folder):
    """[(step, validation accuracy in percent)] of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], 100 * row["accuracy"]) for row in rows if row["kind"] == "eval" and row["split"] == "val"]


def test_accuracy(folder):
    return 100 * json.loads((folder / "eval-test.json").read_text())["accuracy"]


def trials(folder):
    """(row of the summary, curve) of what a search has tried."""
    rows = json.loads((pathlib.Path(folder) / "summary.json").read_text())["rows"]
    return [(row, curve(pathlib.Path(folder) / f"trial-{row['trial']:04d}")) for row in rows if row["evaluations"]]


def described(values, transforms):
    return f"{values['optim.learning_rate']:.2g} | {values['optim.weight_decay']:.2g} | {NAMES[transforms]}"


def main(asha, random, again, figure="search.png"):
    plot, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    print(
        "| search | settings | to the end | steps | core-minutes | best in validation | its rate | decay | pictures |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, folder, colour in (("ASHA", asha, "C0"), ("random", random, "C1")):
        found = trials(folder)
        complete = [row for row, _ in found if row["state"] == "complete"]
        best = max(complete, key=lambda row: row["value"])
        steps = sum(points[-1][0] for _, points in found)
        minutes = sum(row["seconds"] for row, _ in found) / 60
        print(
            f"| {name} | {len(found)} | {len(complete)} | {steps:,} | {minutes:.0f} | {100 * best['value']:.1f} % "
            f"| {described(best['settings'], best['settings']['data.train_transforms'])} |"
        )
        for row, points in found:
            strong = row["trial"] == best["trial"]
            left.plot(*zip(*points, strict=True), ".-", color=colour, alpha=1 if strong else 0.3, lw=2 if strong else 1)
        left.plot([], [], color=colour, label=f"{name} (strong: its best)")
    left.set(xlabel="step", ylabel="validation accuracy, %")
    left.legend()
    for row, points in trials(asha):
        marker = dict(zip(NAMES, "ov^", strict=True))[row["settings"]["data.train_transforms"]]
        x = row["settings"]["optim.learning_rate"]
        filled = row["state"] == "complete"
        right.plot(x, points[-1][1], marker, color="C0", fillstyle="full" if filled else "none")
    for key, marker in zip(NAMES, "ov^", strict=True):
        right.plot([], [], marker, color="0.4", label=NAMES[key])
    right.set(xscale="log", xlabel="learning rate", ylabel="last validation accuracy, % (hollow: stopped)")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    plot.tight_layout()
    plot.savefig(figure, dpi=110)

    print("\n| setting | test accuracy of three seeds | mean [95 %] |\n| --- | --- | --- |")
    for row in json.loads((pathlib.Path(again) / "summary.json").read_text())["rows"]:
        seeds = sorted((pathlib.Path(again) / f"trial-{row['trial']:04d}").glob("seed-*"))
        values = [test_accuracy(folder) for folder in seeds]
        mean, half = statistics.fmean(values), float("nan")
        if len(values) > 1:
            half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
        rate, decay = row["overrides"]["optim.learning_rate"], row["overrides"]["optim.weight_decay"]
        transforms = len(row["overrides"]["data.train_transforms"])
        shown = {2: "mirror", 3: "crop, mirror", 4: "crop, mirror, colour"}[transforms]
        each = ", ".join(f"{value:.1f}" for value in values)
        print(f"| {rate:.2g}, {decay:.2g}, {shown} | {each} | {mean:.1f} % [{mean - half:.1f}, {mean + half:.1f}] |")


if __name__ == "__main__":
    main(*sys.argv[1:])
