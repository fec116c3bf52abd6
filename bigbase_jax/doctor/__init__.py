"""What a bug report needs and what is wrong with this machine: ``python launch.py --mode=doctor [--workdir=DIR]``.

``machine.py`` gathers facts, ``stages.py`` is what it tries in child processes, ``checks.py`` judges. JAX is imported
in a child only, and nothing else of ours is, since a broken JAX is one of the things to report;
``python -m bigbase_jax.doctor`` works where the launcher cannot start.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence

from bigbase_jax.doctor.checks import judge
from bigbase_jax.doctor.machine import look


def main(argv: Sequence[str]) -> int:
    """The command line without absl, which may be what is broken; returns the exit status, 1 if something is wrong.

    Prints what JAX says of its environment, a table of what was found and what mends it, and as the last line all of it
    as JSON, without user names, host names or home folders. ``argv`` is as ``sys.argv``, the program first.
    """
    parser = argparse.ArgumentParser("doctor", description="What is wrong with this machine.", allow_abbrev=False)
    parser.add_argument("--mode", choices=["doctor"], help="what launch.py was asked for")
    parser.add_argument("--workdir", help="the run folder to try writing to; default: runs")
    workdir = parser.parse_args(argv[1:]).workdir
    print("examining this machine; a part that hangs is given up after some minutes", file=sys.stderr, flush=True)
    machine = look(workdir)
    checks = judge(machine)
    wrong, warned = (sum(check.status == status for check in checks) for status in ("problem", "warning"))
    lines = [machine.stages.get("environment", {}).get("text", ""), ""]
    width = max(len(check.name) for check in checks)
    for check in checks:
        lines.append(f"{check.status:<7}  {check.name:<{width}}  {check.text}")
        lines += [f"{'':<7}  {'':<{width}}  -> {check.fix}"] if check.fix else []
    lines.append(f"{wrong} problem{'s' * (wrong != 1)}, {warned} warning{'s' * (warned != 1)}")
    found = [{name: text for name, text in check._asdict().items() if text} for check in checks]
    report = {"problems": wrong, "warnings": warned, "checks": found, "stages": machine.stages}
    hide = hider(os.environ)
    for line in (*lines, json.dumps({**report, "log": machine.log[-4000:]}, ensure_ascii=False)):
        print(hide(line), flush=True)
    return int(wrong > 0)


def hider(env: Mapping[str, str]) -> Callable[[str], str]:
    """What replaces, in text or JSON, all that must not be in a bug report."""
    home = env.get("HOME") or os.path.expanduser("~")
    user = env.get("USER") or env.get("LOGNAME") or pathlib.Path(home).name
    host, end = socket.gethostname(), r"(?=[/\s:;,'\"\\)\]]|$)"
    words = {r"((?:JAX|XLA)_\w*(?:HOST|ADDRESS|TOKEN|KEY|SECRET)\w*)=[^\s\\]*": r"\1=***"}
    words |= {re.escape(folder) + end: "~" for folder in (home, os.path.realpath(home)) if len(folder) > 1}
    words |= {r"(?<=/home/)[^/\s:]+|(?<=/Users/)[^/\s:]+": "USER"}
    words |= {rf"(?<=/){re.escape(name)}{end}": "USER" for name in (user,) if name not in ("", "root")}
    hosts = (name for name in (host, host.partition(".")[0]) if len(name) > 3 and name != "localhost")
    words |= {rf"(?<![\w/.-]){re.escape(name)}(?![\w-])": "HOST" for name in hosts}
    return lambda text: functools.reduce(lambda said, word: re.sub(word, words[word], said), words, text)
