"""Training steps here against PyTorch's on one GPU: both sides of a model compile together and are timed in turn.

python compare.py [--models=resnet50,vit_b16,...] [--rounds=3] [--limit=260] [--tiny] [--output=results.json]
"""

import argparse
import json
import pathlib
import queue
import statistics
import subprocess
import sys
import threading
import time

from worker import BATCH, LENGTH, LLAMA

SIDES = ("ours", "theirs")
MULTIPLY_ADDS = {"resnet50": 4.09e9, "vit_b16": 17.6e9}  # of one picture of 224 pixels, forward, as published
ATTENTION = {"bert_base": (12, 768), "gpt2_124m": (12, 768), "llama_350m": (LLAMA["depth"], LLAMA["width"])}


def flops(model, multiplied, batch, length, depth=None):
    """Of a training step, as papers count: 6 a token and parameter that it is multiplied with, tables that are looked
    up left out; and 12 a layer, width, length and token, also where a causal half is not computed (PaLM, B)."""
    if model in MULTIPLY_ADDS:
        return 6 * MULTIPLY_ADDS[model] * batch
    layers, width = ATTENTION[model]
    return (6 * multiplied + 12 * (depth or layers) * width * length) * length * batch


class Side:
    """A worker, and what it has answered."""

    def __init__(self, side, words, log):
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, str(pathlib.Path(__file__).parent / "worker.py"), side, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(log, "w"),  # noqa: SIM115
            text=True,
        )
        self._answers = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in self._process.stdout:
            if line.startswith("{"):
                self._answers.put(json.loads(line))
        self._answers.put({"missing": f"it ended; see {self.log}"})

    def answer(self, deadline):
        try:
            return self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return {"missing": f"it took too long; see {self.log}"}

    def measure(self, deadline):
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended, which its last answer says
        return self.answer(deadline)

    def stop(self):
        self._process.kill()
        self._process.wait()


def measured(model, args, deadline):
    """{side: what it is and how long its steps take, or why there is nothing}."""
    words = [model, *["--tiny"] * args.tiny]
    workers = {side: Side(side, words, f"{args.output}.{model}.{side}.log") for side in SIDES}
    try:
        row = {}
        for side, worker in workers.items():
            said = worker.answer(deadline)
            row[side] = said.get("ready", said) | {"step_seconds": []}
        for _ in range(args.rounds):
            for side, worker in workers.items():
                if "missing" not in row[side]:
                    said = worker.measure(deadline)
                    row[side]["step_seconds"] += said.pop("seconds", [])
                    row[side] |= said
    finally:
        for worker in workers.values():
            worker.stop()
    for side in SIDES:
        steps = row[side]["step_seconds"]
        row[side]["step_seconds"] = statistics.median(steps) if steps else None
    return row


def cells(model, row):
    """What the table says of each side, and of both."""
    step = {side: row[side]["step_seconds"] for side in SIDES}
    said = []
    for side in SIDES:
        if step[side] is None:
            said.append(f"{side}: {row[side]['missing']}")
            continue
        batch, length = (x.get(model, 1) for x in (BATCH, LENGTH))
        words = [f"{1e3 * step[side]:.1f} ms", f"{batch * length / step[side]:,.0f}/s"]
        if "shape" in row["ours"]:
            row["flops"] = flops(model, row["ours"]["multiplied"], **row["ours"]["shape"])
        if row["ours"].get("peak_flops"):
            row[side]["mfu"] = row["flops"] / step[side] / row["ours"]["peak_flops"]
            words.append(f"MFU {100 * row[side]['mfu']:.0f} %")
        if row[side].get("peak_gigabytes"):
            words.append(f"{row[side]['peak_gigabytes']:.1f} GB")
        said.append(f"{side} {', '.join(words)} ({row[side]['with']})")
    if all(step.values()):
        row["ratio"] = step["theirs"] / step["ours"]
        said.append(f"{row['ratio']:.2f}x")
    return said


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join(BATCH))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=260.0, help="seconds for all models")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", default="results.json")
    args = parser.parse_args()
    results, models, end = {}, args.models.split(","), time.monotonic() + args.limit
    for n, model in enumerate(models):
        now = time.monotonic()  # what a model does not need is for those after it
        row = measured(model, args, now + (end - now) / (len(models) - n) * (1.5 if n + 1 < len(models) else 1))
        print("  ".join([f"{model:11}", *cells(model, row)]), flush=True)
        results[model] = row
        pathlib.Path(args.output).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
