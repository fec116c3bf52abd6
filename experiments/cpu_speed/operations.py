"""Where the time of our step goes: the operations of XLA's own trace, longest first.

PYTHONPATH=.:configs python experiments/cpu_speed/operations.py MODEL [--steps=3] [--top=25] [--tiny]

Products and convolutions are started and waited for later: a wait counts as the one's that was started last.
"""

import argparse
import bisect
import collections
import gzip
import json
import pathlib
import re
import tempfile

from worker import ROWS, compiled_of

from bigbase_jax.runtime import memory

memory.start_anew()  # as launch.py does, before JAX is imported
import jax  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("model", choices=ROWS)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--top", type=int, default=25)
parser.add_argument("--tiny", action="store_true")
args = parser.parse_args()

compiled, state, batch = compiled_of(args.model, args.tiny)
for _ in range(3):
    state, _ = jax.block_until_ready(compiled(state, batch))
with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
        for _ in range(args.steps):
            state, _ = jax.block_until_ready(compiled(state, batch))
    trace = next(pathlib.Path(folder).rglob("*.trace.json.gz"))
    events = [event for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"] if "dur" in event]

about = {}  # operation -> its line of the program
for line in compiled.as_text().splitlines():
    if match := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)", line):
        about[match[1]] = match[2]
runs = sorted((e["ts"], e["args"]["hlo_op"], e["dur"]) for e in events if e.get("args", {}).get("hlo_op") in about)
waits = sorted(e["ts"] + e["dur"] for e in events if "wait for completion" in e["name"])  # where programs end
taken, last = collections.Counter(), runs[0][1]
for i, (start, name, duration) in enumerate(runs):
    ends = [*(run[0] for run in runs[i + 1 : i + 2]), *waits[(k := bisect.bisect(waits, start)) : k + 1]]
    until = min(ends, default=start + duration)
    last = name if re.match("dot|conv|custom", name) else last
    own = min(duration, until - start)
    taken[name] += own
    taken[last] += until - start - own


def shape(text):
    return text.partition("{")[0]


kinds = collections.Counter()
for name, micro in taken.items():
    kinds[re.sub(r"[.\d]+$", "", name)] += micro
milli = 1e-3 / args.steps
print(f"{args.model}: {milli * taken.total():.1f} ms a step, while it is traced")
print("; ".join(f"{kind} {milli * micro:.1f}" for kind, micro in kinds.most_common(12)))
for name, micro in taken.most_common(args.top):
    line = about[name]
    inputs = [shape(about[one]) for one in re.findall(r"%([\w.\-]+)", line.partition(")")[0]) if one in about]
    where = re.search(r'op_name="(?:jit\(\w+\)/)?([^"]*)"', line)
    said = f"{shape(line)} of {' '.join(inputs)[:60]}"
    print(f"{milli * micro:9.2f}  {name:32} {said}  {where[1][-80:] if where else ''}")
