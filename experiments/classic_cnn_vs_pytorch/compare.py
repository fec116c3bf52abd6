"""Runs both sides alternately on one machine and prints medians and ratios as a table and one JSON line.

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
    sides = {"torch": (args.torch_python, "torch_cnn.py"), "ours": (sys.executable, "ours.py")}
    found = {}
    for _ in range(args.rounds):
        for side, command in sides.items():
            for batch in (4, 32):
                got = measure(*command, "--what=step", f"--batch={batch}", "--steps=7")
                found.setdefault(f"step, batch {batch} (s)", {}).setdefault(side, []).append(got["step_seconds"])
            one = ["--workers=1"] if side == "ours" else ["--workers=0", "--threads=1"]
            rates = measure(*command, "--what=pipeline", f"--data={args.data}", *one)["images_per_second"]
            found.setdefault("pipeline, first epoch (images/s, one core)", {}).setdefault(side, []).append(rates[0])
            found.setdefault("pipeline, later epochs (images/s, one core)", {}).setdefault(side, []).append(rates[-1])
    print("| what | PyTorch | bigbase_jax | ratio |\n| --- | --- | --- | --- |")
    for what, both in found.items():
        torch, ours = (statistics.median(both[side]) for side in ("torch", "ours"))
        ratio = torch / ours if "(s)" in what else ours / torch
        print(f"| {what} | {torch:.4g} | {ours:.4g} | {ratio:.2f}x |")
    print(json.dumps(found))
