"""Training steps here against PyTorch's on one GPU: both sides of a model compile together and are timed in turn.

python compare.py [--models=resnet50,vit_b16,...] [--rounds=3] [--tiny] [--output=results.json]
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

from worker import BATCH, LENGTH, LLAMA

parser = argparse.ArgumentParser()
parser.add_argument("--models", default=",".join(BATCH))
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--output", default="results.json")
args = parser.parse_args()

GFLOP = {
    "resnet50": 4.09,
    "vit_b16": 17.6,
}  # multiply-adds of a forward pass of one picture of 224 pixels, as published
ATTENTION = {"bert_base": (12, 768), "gpt2_124m": (12, 768), "llama_350m": (LLAMA["depth"], LLAMA["width"])}


def flops(model, parameters):
    """Of a training step, as papers count: 6 a parameter and token, 12 a layer, width, length and token (PaLM, B)."""
    if model in GFLOP:
        return 6 * GFLOP[model] * 1e9 * BATCH[model]
    layers, width = ATTENTION[model]
    return (6 * parameters + 12 * layers * width * LENGTH[model]) * LENGTH[model] * BATCH[model]


def answer(process):
    """The next JSON line of a side, or None where it ended without one."""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    return None


results = {}
here = str(pathlib.Path(__file__).parent)
for model in args.models.split(","):
    words = [model, *["--tiny"] * args.tiny]
    sides = {
        side: subprocess.Popen(
            [sys.executable, f"{here}/worker.py", side, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(f"{args.output}.{model}.{side}.log", "w"),  # noqa: SIM115
            text=True,
        )
        for side in ("ours", "theirs")
    }
    row = {side: (answer(process) or {}).get("ready") for side, process in sides.items()}
    seconds = {side: [] for side in sides if row[side]}
    for _ in range(args.rounds):
        for side in seconds:
            sides[side].stdin.write("\n")
            sides[side].stdin.flush()
            seconds[side] += (answer(sides[side]) or {"seconds": []})["seconds"]
    for process in sides.values():
        process.communicate()
    for side in seconds:
        row[side]["step_seconds"] = statistics.median(seconds[side])
    results[model] = row
    pathlib.Path(args.output).write_text(json.dumps(results, indent=1))

    said = [f"{model:11}"]
    for side in sides:
        if row[side] is None:
            said.append(f"{side}: failed, see {args.output}.{model}.{side}.log")
            continue
        step = row[side]["step_seconds"]
        rate = BATCH[model] * LENGTH.get(model, 1) / step
        said.append(f"{side} {1e3 * step:.1f} ms, {rate:,.0f}/s, {row[side]['gigabytes'] or 0:.1f} GB")
        if side == "ours" and row[side]["peak_flops"]:
            said.append(f"MFU {100 * flops(model, row[side]['parameters']) / step / row[side]['peak_flops']:.0f} %")
    if all(row.values()):
        said.append(f"{row['theirs']['step_seconds'] / row['ours']['step_seconds']:.2f}x")
    print("  ".join(said), flush=True)
