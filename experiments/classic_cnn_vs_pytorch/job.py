"""The whole ten-epoch job of both sides on the same cores, taking turns; prints a table and one JSON line.

Each side is a process group that runs while the other is stopped (SIGSTOP), in turns of some seconds, so that whatever
else the machine does meanwhile falls on both alike. A side's time is the sum of its turns: imports, decoding,
compilation, training, evaluation, and for ours the checkpoint and the report. Caches start empty. With --seconds both
are stopped when each has had so many, and what they got done is compared: core-seconds, of the loading processes too,
until the first and the last step that the log tells of.

python job.py --data=DIR --torch_python=PYTHON_WITH_TORCH [--turn=20] [--epochs=10] [--seconds=1800]
"""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


class Side:
    """One job: a stopped process group with a clock of its own turns."""

    def __init__(self, command, out, env):
        self.out = out
        with open(out, "w") as stdout, open(f"{out}.err", "w") as stderr:
            self.process = subprocess.Popen(
                command, stdout=stdout, stderr=stderr, env=env, cwd=ROOT, start_new_session=True
            )
        os.killpg(self.process.pid, signal.SIGSTOP)
        self.seconds, self.cpu_seconds, self.done = 0.0, None, False
        self.told: list[tuple[int, float]] = []  # step, core-seconds until the log told of it

    def turn(self, seconds):
        began = time.perf_counter()
        os.killpg(self.process.pid, signal.SIGCONT)
        while time.perf_counter() - began < seconds:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.done, self.cpu_seconds = True, usage.ru_utime + usage.ru_stime
                if os.waitstatus_to_exitcode(status):
                    sys.exit(pathlib.Path(f"{self.out}.err").read_text()[-2000:])
                break
            if (step := self.steps()) > (self.told[-1][0] if self.told else 0):
                self.told.append((step, self.core_seconds()))
            time.sleep(0.05)
        else:
            os.killpg(self.process.pid, signal.SIGSTOP)
        self.seconds += time.perf_counter() - began

    def steps(self):
        """Steps that the log tells of."""
        text = pathlib.Path(self.out).read_text() + pathlib.Path(f"{self.out}.err").read_text()
        epochs = [500 * (int(epoch) - 1) + int(batch) for epoch, batch in re.findall(r"epoch (\d+) batch (\d+)", text)]
        return max([0, *epochs, *map(int, re.findall(r"^step (\d+)/", text, re.MULTILINE))])

    def core_seconds(self):
        """Of the processes of the group, and of those of them that have ended."""
        ticks = 0
        for file in pathlib.Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = file.read_text().rpartition(")")[2].split()  # from the third on
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == self.process.pid:
                ticks += sum(map(int, fields[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        os.wait4(self.process.pid, 0)

    def result(self):
        last = json.loads(pathlib.Path(self.out).read_text().splitlines()[-1])
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "accuracy": last["accuracy"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--torch_python", default=sys.executable)
    parser.add_argument("--turn", type=float, default=20.0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=None, help="of each side, then stop")
    parser.add_argument("--workdir", default=None, help="keep the run folder here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        env = {**os.environ, "XDG_CACHE_HOME": f"{work}/cache"}
        torch = [args.torch_python, str(HERE / "torch_cnn.py"), "--what=job", f"--data={args.data}", "--workers=2"]
        ours = [sys.executable, "launch.py", f"--config=configs/catdog_cnn.py:data=folder,root={args.data}"]
        ours += [
            f"--workdir={args.workdir or work + '/run'}",
            f"--config.train.epochs={float(args.epochs)}",
            "--config.train.log_every=25",
        ]
        sides = {
            "torch": Side([*torch, f"--epochs={args.epochs}"], f"{work}/torch", env),
            "ours": Side(ours, f"{work}/ours", env),
        }
        while not all(side.done for side in sides.values()):
            for side in sides.values():
                if not side.done:
                    side.turn(args.turn)
            told = {name: (round(side.seconds), side.steps()) for name, side in sides.items()}
            print("seconds and steps:", told, file=sys.stderr, flush=True)
            if args.seconds is not None and min(side.seconds for side in sides.values()) >= args.seconds:
                for side in sides.values():
                    side.stop()
                print(json.dumps({name: {"steps": told[name][1], "core_seconds": s.told} for name, s in sides.items()}))
                sys.exit()
        found = {name: side.result() for name, side in sides.items()}
    print("| whole job | PyTorch | bigbase_jax | ratio |\n| --- | --- | --- | --- |")
    for what in ("seconds", "cpu_seconds", "accuracy"):
        a, b = found["torch"][what], found["ours"][what]
        print(f"| {what} | {a:.4g} | {b:.4g} | {a / b:.2f}x |" if what != "accuracy" else f"| {what} | {a} | {b} | |")
    print(json.dumps(found))
