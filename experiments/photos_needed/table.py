"""The table and the figure of the study, from its run folders: python table.py RUNS/photos_needed [FIGURE.png]

Needs matplotlib: pip install 'bigbase_jax[plots]'.
"""

import json
import pathlib
import statistics
import sys
from collections import defaultdict

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy import stats

STARTS = ("from scratch", "from CIFAR-10")


def half_width(values):
    """Of the 95 % interval of the mean over draws (Student's t); nan for a single one."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def read(folder):
    """(start, photos) -> test accuracies in percent, of the finished runs."""
    found = defaultdict(list)
    for path in sorted(pathlib.Path(folder).glob("trial-*/eval-test.json")):
        config = json.loads((path.parent / "config.json").read_text())
        count = int(config["data"]["dataset"]["root"].rpartition("-")[2])
        found[STARTS[config["init_from"] is not None], count].append(100 * json.loads(path.read_text())["accuracy"])
    return found


def main(folder, figure="photos.png"):
    found = read(folder)
    counts = sorted({count for _, count in found})
    print("| training photos | " + " | ".join(f"{start} [95 % over draws]" for start in STARTS) + " |")
    print("| --- | --- | --- |")
    for count in counts:
        cells = []
        for start in STARTS:
            values = found.get((start, count), [])
            half = half_width(values)
            mean = statistics.fmean(values) if values else float("nan")
            cells.append(f"{mean:.1f} % [{mean - half:.1f}, {mean + half:.1f}] ({len(values)})" if values else "")
        print(f"| {count:,} | " + " | ".join(cells) + " |")
    plot, axis = plt.subplots(figsize=(6, 3.6))
    for start in STARTS:
        mine = [(count, found[start, count]) for count in counts if found.get((start, count))]
        means = [statistics.fmean(values) for _, values in mine]
        axis.errorbar([c for c, _ in mine], means, [half_width(v) for _, v in mine], fmt="o-", capsize=4, label=start)
    axis.set_xscale("log")
    axis.set_xticks(counts, [f"{count:,}" for count in counts], minor=False)
    axis.minorticks_off()
    axis.set(xlabel="training photos", ylabel="test accuracy, % (mean, 95 % over draws)")
    axis.legend()
    axis.grid(alpha=0.3)
    plot.tight_layout()
    plot.savefig(figure, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
