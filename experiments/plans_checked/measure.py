"""Plans a recipe for this machine's CPU, then runs the planned step here: predicted and measured memory and time.

python measure.py --config=../../configs/catdog.py:model=vit --devices=1 [--set data.batch_size=64 ...]

One JSON line. Memory is the growth of this process's resident set from before the training state exists to its peak
during the steps; the planned program is already compiled then, and steps do not overlap. Linux only.
"""

import argparse
import ctypes
import gc
import json
import os
import pathlib
import runpy
import sys
import time

import jax
import numpy as np

from bigbase_jax import parallel
from bigbase_jax.plan import topology
from bigbase_jax.plan.plan import PREFETCHED, Planner

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Of glibc: freed memory leaves the process at once, so that its size is what is in use."""


def resident(key):
    """Bytes of this process's memory: "VmRSS" now, "VmHWM" at its peak."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def settle():
    """Gives freed memory back (the runtime frees a step's temporaries a moment after it) and starts a new peak."""
    gc.collect()
    time.sleep(0.5)
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def measure(config, devices, steps):
    target = topology.parse(f"cpu:{devices}")
    planner = Planner(config, target, topology.devices(target), topology.chip(target))
    choice = planner.recipe()
    plan = planner.plan(choice)
    program, mesh = planner.program(choice)
    batch_shapes = parallel.placed_batch(planner.spec, mesh)
    step = program.step.lower(program.state, batch_shapes).compile()

    rows = {name: np.zeros(x.shape, x.dtype) for name, x in planner.spec.items()}
    jax.block_until_ready(program.init(parallel.put(rows, mesh)))  # once for nothing: threads and code are there
    settle()
    before = resident("VmRSS")
    batches = [parallel.put(rows, mesh) for _ in range(1 + PREFETCHED)]
    state = program.init(batches[0])
    seconds, peaks = [], []
    for _ in range(steps):
        jax.block_until_ready(state)
        settle()
        began = time.perf_counter()
        state, sums = step(state, batches[0])
        jax.block_until_ready((state, sums))
        seconds.append(time.perf_counter() - began)
        peaks.append(resident("VmHWM"))
    measured = max(peaks) - before
    simulated = devices * (plan.needed - plan.parts["program_bytes"])
    times = plan.times()
    return {
        "memory_predicted_bytes": simulated,
        "memory_measured_bytes": measured,
        "memory_predicted_over_measured": simulated / measured,
        "step_seconds_roofline": times["step_seconds_roofline"],
        "step_seconds_without_overlap": times["step_seconds_without_overlap"],
        "step_seconds_measured": float(np.median(seconds[1:])),
        "flops_per_second_measured_peak": devices * planner.chip.flops_32,
        "bytes_per_second_measured_peak": devices * planner.chip.bandwidth,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="a recipe: FILE[:argument,...]")
    parser.add_argument("--devices", type=int, default=1, help="simulated devices")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe, as JSON")
    args = parser.parse_args()
    if not os.environ.keys() >= MALLOC.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    path, _, argument = args.config.partition(":")
    config = runpy.run_path(path)["get_config"](argument or None)
    for item in args.set:
        key, _, value = item.partition("=")
        config.update_from_flattened_dict({key: json.loads(value)})
    print(json.dumps({"config": pathlib.Path(path).stem, "argument": argument, "set": args.set, "devices": args.devices,
                      **measure(config, args.devices, args.steps)}))  # fmt: skip


if __name__ == "__main__":
    main()
