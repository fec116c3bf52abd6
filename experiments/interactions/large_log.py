"""How fast a log becomes histories, and in how much memory: see README.md beside this file."""

import argparse
import pathlib
import resource
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigbase_jax.data.sources.table.interactions import InteractionFiles

BLOCK = 1 << 20


def write(path: pathlib.Path, rows: int, users: int, items: int) -> None:
    """A log in no order, with ids of 10^12, users alike and items after Zipf."""
    random = np.random.default_rng(0)
    schema = pa.schema([("user", pa.int64()), ("item", pa.int64()), ("timestamp", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, BLOCK):
            n = min(BLOCK, rows - start)
            user = 10**12 + 7 * random.integers(0, users, n)
            item = 10**12 + 11 * np.minimum(random.zipf(1.2, n), items)
            writer.write_table(pa.table([user, item, random.integers(10**9, 2 * 10**9, n)], schema=schema))


def memory() -> dict[str, int]:
    """Bytes of this process: ``RssAnon``, what it holds itself, and ``VmRSS``, with what is mapped from files."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "VmRSS"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--core", type=int, default=5)
    parser.add_argument("--dir", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    path = args.dir / f"log-{args.rows}.parquet"
    if not path.exists():
        write(path, args.rows, args.users, args.items)
    before, most, done = memory(), dict(memory()), threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            for name, size in memory().items():
                most[name] = max(most[name], size)

    threading.Thread(target=watch, daemon=True).start()
    marks: list[tuple[str, float, float]] = []

    def say(line: str) -> None:
        marks.append((line, time.perf_counter(), time.process_time()))

    say("start")
    made = InteractionFiles(root=str(path), core=args.core).prepare(args.dir / "cache", 1e12, say)
    say("end")
    batch = made.splits["train"].batch(np.arange(1000))
    done.set()
    assert batch["history"].shape == (1000, 50)
    wall, core = (marks[-1][i] - marks[0][i] for i in (1, 2))
    print(made.description)
    print(f"{args.rows / core:,.0f} rows per core-second, {args.rows / wall:,.0f} rows per second")
    for name in most:
        print(f"{name}: {before[name] / 1e6:,.0f} MB before, at most {most[name] / 1e6:,.0f} MB")
    print(f"maximal resident set: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:,.0f} MB")


if __name__ == "__main__":
    main()
