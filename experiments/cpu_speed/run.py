"""Training steps here against PyTorch's, eager and compiled, in float32 on this machine's CPU.

python experiments/cpu_speed/run.py [--models=resnet18,...] [--sides=ours,eager,compile] [--rounds=5] [--isa=avx2]
                                    [--tiny] [--anyway] [--output=results.json]

The sides of a row are processes that start together, compile and warm up; then they are timed in turn, one idle while
another runs. --rounds=0 only fills the compilers' caches. Prints one table and keeps every figure as JSON.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

from worker import ROWS, SIDES

ROOT = pathlib.Path(__file__).resolve().parents[2]
FEATURES = ("fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve")
ISA = {  # what makes a side take instructions of an older processor only
    "avx2": {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa=AVX2".strip(),
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    }
}
QUIET = 0.95  # the share of each core that a process gets on a quiet machine, at least


# ------------------------------------------------------------------------------------------------------- the machine


def cores():
    return len(os.sched_getaffinity(0))


def _spin(seconds):
    began, before = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        pass
    return (time.process_time() - before) / (time.perf_counter() - began)


def cores_got(seconds=0.5):
    """How much of this machine's cores as many spinning processes get."""
    with multiprocessing.Pool(cores()) as pool:
        pool.map(_spin, [0.01] * cores(), chunksize=1)
        return sum(pool.map(_spin, [seconds] * cores(), chunksize=1))


def busy():
    """Core-seconds that were not idle since the machine started, those that other virtual machines took included."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def read(path, otherwise=""):
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return otherwise


def machine():
    info = dict(
        [part.strip() for part in line.split(":", 1)] for line in read("/proc/cpuinfo").splitlines() if ":" in line
    )
    flags = set(info.get("flags", info.get("Features", "")).split())
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "processor": info.get("model name", platform.processor()),
        "flags": [name for name in FEATURES if name in flags],
        "cores": cores(),
        "glibc": " ".join(platform.libc_ver()),
        "huge_pages": read("/sys/kernel/mm/transparent_hugepage/enabled").strip(),
        "load": read("/proc/loadavg").strip(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip(),
    }


# ------------------------------------------------------------------------------------------------------------ one row


def answer(process):
    """The next JSON line of a side, or {} where it ended without one."""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    return {}


def why(log):
    """The line that tells why a side ended."""
    lines = [line for line in pathlib.Path(log).read_text().splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0] or "InvalidCxxCompiler" in line]
    return (errors or lines or ["it ended without a word"])[-1].strip()


def turn(process, seconds):
    """Lets a side take steps for so long; what it measured, and how many cores others took meanwhile."""
    time.sleep(0.2)  # until the threads of the side before no longer spin
    began, before = time.perf_counter(), busy()
    process.stdin.write(f"{seconds}\n")
    process.stdin.flush()
    found = answer(process)
    taken = time.perf_counter() - began
    if found:
        found["others"] = max(0.0, busy() - before - found["own_core_seconds"]) / taken
    return found


def measure(model, args):
    env = {**os.environ, **ISA.get(args.isa, {}), "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no idle pool of compilers
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "configs"), env.get("PYTHONPATH", "")])
    logs = {side: f"{args.output}.{model}.{side}.log" for side in args.sides}
    processes = {}
    for side in args.sides:
        with open(logs[side], "w") as log:
            command = [sys.executable, str(ROOT / "experiments/cpu_speed/worker.py"), side, model]
            processes[side] = subprocess.Popen(
                [*command, *["--tiny"] * args.tiny],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
            )
    try:
        row = {}
        for side, process in processes.items():
            row[side] = answer(process).get("ready") or {"failed": why(logs[side])}
        alive = [side for side in processes if "failed" not in row[side]]
        counts = {row[side]["parameters"] for side in alive}
        if len(counts) > 1:
            raise SystemExit(f"{model}: the sides have {counts} parameters; they are to be the same model")
        turns = {side: [] for side in alive}
        if args.rounds:
            got = cores_got()
            for side in alive:
                turn(processes[side], args.seconds)  # in which it chooses its layout
        for _ in range(args.rounds):
            for side in alive:
                turns[side].append(turn(processes[side], args.seconds))
        for side, found in turns.items():
            if not all(found):
                row[side] = {"failed": why(logs[side])}
            elif found:
                steps = [second for one in found for second in one["seconds"]]
                low, _, high = statistics.quantiles(steps, n=4) if len(steps) > 1 else 3 * steps
                row[side] |= {
                    "step_seconds": statistics.median(steps),
                    "spread": [low, high],
                    "steps": len(steps),
                    "core_seconds": statistics.median(one["core_seconds"] for one in found),
                    "gigabytes": max(one["gigabytes"] for one in found),
                    "idle_core_seconds": max(one["idle_core_seconds"] for one in found),
                    "others": statistics.mean(one["others"] for one in found),
                    "layout": found[-1]["layout"],
                    "loss": found[-1]["loss"],
                    "cores_got": got,
                }
        return row
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


# ---------------------------------------------------------------------------------------------------------- the table


def cells(model, row, sides):
    """One line of the table, for all sides that were asked for."""

    def step(side):
        found = row[side]
        if "step_seconds" not in found:
            return found.get("failed", "compiled")
        low, high = found["spread"]
        around = 50 * (high - low) / found["step_seconds"]
        layout = f", {found['layout']}" if found["layout"] else ""
        return f"{1e3 * found['step_seconds']:.4g} ms ±{around:.0f} %{layout}"

    timed = [side for side in sides if "step_seconds" in row[side]]
    said = [model, *(step(side) for side in sides)]
    for side in sides[1:]:
        both = {sides[0], side} <= set(timed)
        said.append(f"{row[side]['step_seconds'] / row[sides[0]]['step_seconds']:.2f}x" if both else "")
    said.append(" / ".join(f"{row[side]['gigabytes']:.2f}" if side in timed else "-" for side in sides))
    others = max((row[side]["others"] for side in timed), default=0.0)
    got = min((row[side]["cores_got"] for side in timed), default=0.0)
    quiet = got >= QUIET * cores() and others < 0.1 * cores()
    said.append(f"{got:.2f}, others {others:.2f}{'' if quiet or not timed else ': NOT QUIET'}")
    return said


def table(results, sides):
    over = [f"over {side}" for side in sides[1:]]
    lines = [["model", *sides, *over, "memory, GB", "cores"], ["---"] * (2 * len(sides) + 2)]
    lines += [cells(model, row, sides) for model, row in results["rows"].items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join(ROWS), help=", ".join(ROWS))
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--rounds", type=int, default=5, help="of each side; 0: only compile")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn; it is one step at least")
    parser.add_argument("--isa", choices=list(ISA), help="imitate an older processor, on all sides")
    parser.add_argument("--tiny", action="store_true", help="one round of small models; says nothing about speed")
    parser.add_argument("--anyway", action="store_true", help="measure although other jobs run; the table says so")
    parser.add_argument("--output", default="results.json")
    args = parser.parse_args()
    models, args.sides = args.models.split(","), args.sides.split(",")
    if unknown := [*({*models} - {*ROWS}), *({*args.sides} - {*SIDES})]:
        parser.error(f"there is no {', '.join(unknown)}; models: {', '.join(ROWS)}; sides: {', '.join(SIDES)}")
    if args.tiny:
        args.rounds, args.seconds, args.anyway = 1, 0.0, True
    got = cores_got()
    if args.rounds and not args.anyway and got < QUIET * cores():
        raise SystemExit(
            f"the machine is not quiet: {cores()} spinning processes got {got:.2f} of {cores()} cores "
            f"(load {read('/proc/loadavg').strip()}); stop other jobs, or give --anyway and let the table say so."
        )
    results = {"machine": machine(), "isa": args.isa, "rows": {}}
    for model in models:
        results["rows"][model] = measure(model, args)
        pathlib.Path(args.output).write_text(json.dumps(results, indent=1))
        print(f"| {' | '.join(cells(model, results['rows'][model], args.sides))} |", file=sys.stderr, flush=True)
    versions = {found["version"] for row in results["rows"].values() for found in row.values() if "version" in found}
    about = results["machine"]
    imitated = f", as {args.isa}" if args.isa else ""
    print(table(results, args.sides))
    print(f"\n{about['cores']} cores of {about['processor']} ({' '.join(about['flags'])}{imitated}), {about['glibc']}")
    print(f"Python {about['python']}, {', '.join(sorted(versions))}; {about['date']}, commit {about['commit']}")


if __name__ == "__main__":
    main()
