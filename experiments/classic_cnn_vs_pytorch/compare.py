"""Runs both input pipelines alternately on one machine and prints medians and ratios as a table and one JSON line.

python compare.py --data=DIR --torch_python=PYTHON_WITH_TORCH [--rounds=3]
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def measure(python, script, *args):
    done = subprocess.run([python, str(HERE / script), *args], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--torch_python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    sides = {
        "torch": (args.torch_python, "torch_cnn.py", "--what=pipeline", "--workers=0", "--threads=1"),
        "ours": (sys.executable, "ours.py", "--workers=1"),
    }
    found = {}
    for _ in range(args.rounds):
        for side, command in sides.items():
            rates = measure(*command, f"--data={args.data}")["images_per_second"]
            found.setdefault("pipeline, first epoch (images/s, one core)", {}).setdefault(side, []).append(rates[0])
            found.setdefault("pipeline, later epochs (images/s, one core)", {}).setdefault(side, []).append(rates[-1])
    print("| what | PyTorch | bigbase_jax | ratio |\n| --- | --- | --- | --- |")
    for what, both in found.items():
        torch, ours = (statistics.median(both[side]) for side in ("torch", "ours"))
        print(f"| {what} | {torch:.4g} | {ours:.4g} | {ours / torch:.2f}x |")
    print(json.dumps(found))
