"""The table and the figure of the study, from its run folders: python table.py RUNS/models_on_photos [FIGURE.png]

Needs matplotlib: pip install 'bigbase_jax[plots]'.
"""

import json
import pathlib
import re
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy import stats

NAMES = {"MLP": "perceptron", "ConvNet": "classic CNN", "ResNet": "ResNet-18", "ViT": "ViT"}


def half_width(values):
    """Of the 95 % interval of the mean over seeds (Student's t); nan for a single one."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def read(trial):
    """What the finished runs of a trial have measured; None: there are none."""
    folders = sorted(path.parent for path in trial.glob("seed-*/eval-test.json"))
    if not folders:
        return None
    config = json.loads((folders[0] / "config.json").read_text())
    said = (trial / "output.txt").read_text()
    seconds = [json.loads((f / "metrics.jsonl").read_text().splitlines()[-1])["seconds"] for f in folders]
    return {
        "name": NAMES[config["task"]["model"]["target"].rpartition(":")[2]],
        "accuracy": [100 * json.loads((f / "eval-test.json").read_text())["accuracy"] for f in folders],
        "seconds": min(seconds),
        "parameters": re.search(r"^total +([\d,]+)", said, re.MULTILINE)[1],
        "flops": re.search(r"forward pass: (.+) per example", said)[1],
    }


def main(folder, figure="models.png"):
    rows = [row for trial in sorted(pathlib.Path(folder).glob("trial-*")) if (row := read(trial))]
    print("| model | test accuracy [95 % over seeds] | seeds | training, s | parameters | forward pass |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        mean, half = statistics.fmean(row["accuracy"]), half_width(row["accuracy"])
        print(
            f"| {row['name']} | {mean:.1f} % [{mean - half:.1f}, {mean + half:.1f}] | {len(row['accuracy'])} "
            f"| {row['seconds']:.0f} | {row['parameters']} | {row['flops']} |"
        )
    plot, axis = plt.subplots(figsize=(6, 3.6))
    for x, row in enumerate(rows):
        axis.plot([x] * len(row["accuracy"]), row["accuracy"], "o", color="0.7", markersize=4)
        axis.errorbar(x, statistics.fmean(row["accuracy"]), half_width(row["accuracy"]), fmt="s", color="C0", capsize=5)
    axis.set_xticks(range(len(rows)), [row["name"] for row in rows])
    axis.set_ylabel("test accuracy, % (mean, 95 % over seeds)")
    axis.grid(axis="y", alpha=0.3)
    plot.tight_layout()
    plot.savefig(figure, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
