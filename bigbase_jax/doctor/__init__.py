"""What a bug report needs and what is wrong with this machine: ``python launch.py --mode=doctor [--workdir=DIR]``.

``machine.py`` gathers facts, ``stages.py`` is what it tries in child processes, ``checks.py`` and ``accelerators.py``
judge: pure functions from the facts to findings. JAX is imported in a child only, and nothing else of ours is, since a
broken JAX is one of the things to report; ``python -m bigbase_jax.doctor`` works where the launcher cannot start.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bigbase_jax.doctor.checks import judge
from bigbase_jax.doctor.machine import PROBLEM, WARNING, Check, Machine, Stage, look, plural, settings


def run(workdir: str | None) -> tuple[dict[str, Any], int]:
    """Examines this machine and prints a table of lines.

    Args:
      workdir: the run folder to try writing to; None: ``runs``.

    Returns:
      Everything, ready for JSON, without user names, host names or home folders; and the exit status, 1 if something
      is wrong.
    """
    print("examining this machine; a part that hangs is given up after some minutes", file=sys.stderr, flush=True)
    machine = look(workdir)
    report = redacted(summary(machine, judge(machine)), private_words(os.environ))
    for line in table(report["checks"]):
        print(line, flush=True)
    return report, int(report["problems"] > 0)


def summary(machine: Machine, checks: Sequence[Check]) -> dict[str, Any]:
    """The JSON of the report."""
    told = re.compile(
        r"^(bigbase-jax|jax|jaxlib|jax-.*|libtpu.*|nvidia-.*|flax|optax|orbax.*|grain|numpy|tensorflow|torch)$"
    )
    return {
        "problems": sum(check.status == PROBLEM for check in checks),
        "warnings": sum(check.status == WARNING for check in checks),
        "checks": [{k: v for k, v in dataclasses.asdict(check).items() if v} for check in checks],
        "python": machine.python,
        "system": machine.system,
        "packages": {name: p.version for name, p in sorted(machine.packages.items()) if told.match(name)},
        "gpus": [dataclasses.asdict(gpu) for gpu in machine.smi.gpus],
        "driver": machine.driver,
        "devices": machine.devices,
        "jax": {name: _told(stage) for name, stage in machine.jax.items()},
        "disk": {name: _told(stage) for name, stage in machine.disk.items()},
        "settings": settings(machine.env),
    }


def _told(stage: Stage) -> dict[str, Any]:
    wrong = {} if stage.state == "done" else {"error": stage.error[-2000:], "log": stage.log[-2000:]}
    return {"state": stage.state, **stage.facts, **wrong}


def table(checks: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines to read and to paste: status, name, sentence; the command that mends it below."""
    width = max(len(check["name"]) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check['status']:<7}  {check['name']:<{width}}  {check['text']}")
        if "fix" in check:
            lines.append(f"{'':<7}  {'':<{width}}  -> {check['fix']}")
    wrong = sum(check["status"] == PROBLEM for check in checks)
    warned = sum(check["status"] == WARNING for check in checks)
    lines.append(f"{plural(wrong, 'problem')}, {plural(warned, 'warning')}")
    return lines


def private_words(env: Mapping[str, str]) -> dict[str, str]:
    """Patterns of what must not be in a bug report -> what stands there instead."""
    home = env.get("HOME") or os.path.expanduser("~")
    user = env.get("USER") or env.get("LOGNAME") or pathlib.Path(home).name
    words = {}
    for folder in dict.fromkeys((home, os.path.realpath(home))):
        if len(folder) > 1:
            words[rf"{re.escape(folder)}(?=[/\s:;,'\")\]]|$)"] = "~"
    words[r"(?<=/home/)[^/\s:]+|(?<=/Users/)[^/\s:]+"] = "USER"
    if user and user != "root":
        words[rf"(?<=/){re.escape(user)}(?=[/\s:;,'\")\]]|$)"] = "USER"
    host = socket.gethostname()
    for name in dict.fromkeys((host, host.partition(".")[0])):
        if len(name) > 3 and name != "localhost":
            words[rf"(?<![\w/.-]){re.escape(name)}(?![\w-])"] = "HOST"
    return words


def redacted(value: Any, words: Mapping[str, str]) -> Any:
    """``value`` with every private word replaced, at any depth."""
    if isinstance(value, str):
        for pattern, instead in words.items():
            value = re.sub(pattern, instead, value)
        return value
    if isinstance(value, Mapping):
        return {key: redacted(item, words) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item, words) for item in value]
    return value


def main(argv: Sequence[str]) -> int:
    """The command line without absl, which may be what is broken; returns the exit status.

    Args:
      argv: as ``sys.argv``, the program first.
    """
    parser = argparse.ArgumentParser("doctor", description="What is wrong with this machine.", allow_abbrev=False)
    parser.add_argument("--mode", choices=["doctor"], help="what launch.py was asked for")
    parser.add_argument("--workdir", help="the run folder to try writing to; default: runs")
    report, status = run(parser.parse_args(argv[1:]).workdir)
    print(json.dumps(report, ensure_ascii=False), flush=True)
    return status
