"""Curves of the study: python plot.py results.jsonl (needs matplotlib: pip install 'bigbase_jax[plots]')."""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CURVES = {  # title -> ((label, model, scaling, layout), ...)
    "weak scaling: step of so many examples per chip": (
        ("ViT-B/16, 128 per chip, data", "B", "weak", "data"),
        ("ViT-g/14, 64 per chip, data", "g", "weak", "data"),
        ("ViT-g/14, 64 per chip, fsdp", "g", "weak", "fsdp"),
    ),
    "strong scaling: step of 4,096 examples": (
        ("ViT-B/16, data", "B", "strong", "data"),
        ("ViT-g/14, fsdp", "g", "strong", "fsdp"),
    ),
}


def main(path):
    rows = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True)
    for column, (title, curves) in enumerate(CURVES.items()):
        for label, *key in curves:
            mine = sorted(
                (row for row in rows if [row["model"], row["scaling"], row["layout"]] == key and row["fits"]),
                key=lambda row: row["chips"],
            )
            chips = [row["chips"] for row in mine]
            seconds = [row["step_seconds"] for row in mine]
            least = [row["step_seconds_roofline"] for row in mine]
            (line,) = axes[0, column].plot(chips, seconds, "o-", label=label)
            axes[0, column].plot(chips, least, ":", color=line.get_color())
            per_chip = [row["batch_size"] / row["step_seconds"] / row["chips"] for row in mine]
            axes[1, column].plot(chips, [x / per_chip[0] for x in per_chip], "o-", label=label)
        axes[0, column].set(title=title, xscale="log", yscale="log", ylabel="seconds (dotted: roofline)")
        axes[1, column].set(xscale="log", ylabel="examples/s per chip, against the first", xlabel="TPU v5p chips")
        axes[1, column].set_ylim(0, 1.3)
        axes[0, column].legend(fontsize=8)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(pathlib.Path(path).with_name("scaling.png"), dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
