"""What cleaning asks of Daft: steps over Arrow batches, connected components, and what it all costs."""

from __future__ import annotations

import contextlib
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bigbase_jax.core import UserError

ENGINES = ("native", "ray")
IN_PROCESS_BYTES = 64 << 20
"""Of input, below which worker processes cost more than they save."""


def start(engine: str, address: str | None = None) -> Any:
    """Daft, with its runner chosen.

    Args:
      engine: "native", in this process and its workers, or "ray".
      address: of a Ray cluster; None: one on this machine.

    Raises:
      UserError: a package is missing, there is no such engine, or no cluster at the address.
    """
    if engine not in ENGINES:
        raise UserError(f"--mode=clean has the engines {' and '.join(ENGINES)}, not {engine!r}.")
    os.environ.update(DO_NOT_TRACK="1", DAFT_PROGRESS_BAR="0")
    try:
        import daft
    except ImportError as error:
        raise UserError("--mode=clean needs Daft: pip install 'bigbase_jax[clean]'.") from error
    if engine == "native":
        if address is not None:
            raise UserError("--address is of a Ray cluster; add --engine=ray.")
        _choose(engine, daft.set_runner_native)
        return daft
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine=ray needs Ray: pip install ray.") from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError) as error:
            raise UserError(f"there is no Ray cluster at {address} ({error}).") from error
    _choose(engine, daft.set_runner_ray)
    return daft


_chosen: list[str] = []


def _choose(engine: str, choose: Callable[[], Any]) -> None:
    """Daft takes one runner in the life of a process."""
    if not _chosen:
        choose()
        _chosen.append(engine)
    if _chosen != [engine]:
        raise UserError(f"this process has begun with --engine={_chosen[0]}; start another one for {engine}.")


def col(name: str) -> Any:
    """A column, as Daft's expressions have it."""
    import daft

    return daft.col(name)


class Step(NamedTuple):
    """A step of one function; see ``mapped``."""

    reads: tuple[str, ...]
    gives: Mapping[str, Any]
    work: Callable[[Any], Mapping[str, Any]]

    def __call__(self, rows: Any) -> Mapping[str, Any]:
        return self.work(rows)


def arrow_type(kind: Any) -> Any:
    """The Arrow type that a word names, such as "float32" or "list<uint64>"; a type is itself."""
    import pyarrow as pa

    if not isinstance(kind, str):
        return kind
    inner = kind.removeprefix("list<").removesuffix(">")
    return pa.type_for_alias(kind) if inner == kind else pa.list_(pa.type_for_alias(inner))


def mapped(df: Any, step: Any, workers: int | None, batch: int = 256) -> Any:
    """``df`` with what ``step`` gives of its columns ``step.reads``, in batches: ``step.gives`` by name and Arrow type.

    A step is called with an Arrow table of ``reads`` and returns a list, or an Arrow array, for each of ``gives``.

    Args:
      workers: processes that compute it; None: threads of this one, or Ray's workers.
    """
    import daft
    import pyarrow as pa

    fields = [pa.field(name, arrow_type(kind)) for name, kind in step.gives.items()]
    reads: tuple[str, ...] = step.reads

    class Apply:  # a class, as a function would be pickled anew with each batch
        def __init__(self) -> None:
            pass

        def __call__(self, *columns: Any) -> Any:
            given = {name: column.to_arrow() for name, column in zip(reads, columns, strict=True)}
            found = step(pa.table(given))
            arrays = [
                pa.array(found[f.name], f.type)
                if isinstance(found[f.name], list)
                else found[f.name].combine_chunks()
                if isinstance(found[f.name], pa.ChunkedArray)
                else found[f.name]
                for f in fields
            ]
            return pa.StructArray.from_arrays(
                [a.cast(f.type) for a, f in zip(arrays, fields, strict=True)], fields=fields
            )

    options: dict[str, Any] = {} if workers is None else {"use_process": True, "concurrency": workers}
    kind = daft.DataType.from_arrow_type(pa.struct(fields))
    apply = daft.udf(return_dtype=kind, batch_size=batch, **options)(Apply)
    df = df.with_column("_found", apply(*(daft.col(name) for name in reads)))
    return df.with_columns({f.name: daft.col("_found")[f.name] for f in fields}).exclude("_found")


def components(edges: Any, say: Callable[[str], None] = lambda text: None) -> Any:
    """The connected components of a graph, by joins and groups alone.

    Alternating large-star and small-star rounds (Kiveris et al. 2014, "Connected Components in MapReduce and Beyond"):
    after O(log^2 n) of them, each node hangs on the smallest of its component.

    Args:
      edges: columns ``a`` and ``b``, u64.

    Returns:
      ``a`` u64, a node that is not the smallest of its component, and ``b`` u64, which is.
    """
    import daft

    def star(df: Any, small: bool) -> Any:
        """Small: each node links its smaller neighbours, and itself, to the least; large: its larger ones."""
        both = df if small else df.union_all(df.select(col("b").alias("a"), col("a").alias("b")))
        least = both.groupby("a").agg(col("b").min().alias("m"))
        least = least.select("a", (col("a") <= col("m")).if_else(col("a"), col("m")).alias("m"))
        linked = both.join(least, on="a")
        found = linked.where(col("b") > col("a")) if not small else linked
        found = found.select(col("b").alias("a"), col("m").alias("b"))
        if small:
            found = found.union_all(least.select(col("a"), col("m").alias("b")))
        return found.where(col("a") != col("b")).distinct()

    def pointed(df: Any) -> Any:  # from the larger to the smaller
        low, high = (
            (col("a") <= col("b")).if_else(col("a"), col("b")),
            (col("a") <= col("b")).if_else(col("b"), col("a")),
        )
        return df.select(high.alias("a"), low.alias("b")).where(col("a") != col("b")).distinct()

    def print_of(df: Any) -> tuple[int, int]:
        mixed = col("a").hash() ^ col("b").hash().hash()
        found = df.select((mixed % daft.lit(1 << 31).cast(daft.DataType.uint64())).alias("h"))
        found = found.agg(col("h").count().alias("n"), col("h").sum().alias("s")).to_pydict()
        return int(found["n"][0]), int(found["s"][0] or 0)

    df = pointed(edges).collect()
    before = print_of(df)
    for round_ in range(64):
        df = star(star(df, small=False), small=True).collect()
        after = print_of(df)
        if after == before:
            return df
        say(f"connected components, round {round_ + 1}: {after[0]:,} links")
        before = after
    raise RuntimeError("connected components did not settle in 64 rounds")


def one_sentence(error: BaseException, where: pathlib.Path, step: str) -> UserError | None:
    """What a failure of Daft's means for a user; None: it is a bug, which keeps its traceback."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 8:
        chain.append(cause)
    text = "; ".join(map(str, chain))
    again = "the same command then goes on from there."
    if any(reason in text for reason in ("os error 28", "os error 27", "No space left", "File too large")):
        return UserError(f"the disk of {where} is full in step {step}; make room, and {again}")
    if any(
        reason in text for reason in ("closed the connection unexpectedly", "WorkerCrashedError", "OutOfMemoryError")
    ):
        return UserError(
            f"a worker process was killed in step {step}, twice (out of memory?); lower workers=, and {again}"
        )
    refused = next((e for e in chain if isinstance(e, OSError)), None)
    if refused is not None:
        return UserError(f"step {step} failed: {refused.strerror or refused}; nothing is lost, {again}")
    return None


def retried(run: Callable[[], Any]) -> Any:
    """What ``run`` gives, tried once more where a worker process was killed."""
    try:
        return run()
    except RuntimeError as error:
        if "closed the connection unexpectedly" not in str(error):
            raise
        return run()


class Cost:
    """What a block costs: wall seconds, CPU seconds and peak resident memory of this process and its children."""

    seconds = cpu = 0.0
    peak = 0


@contextlib.contextmanager
def measured() -> Iterator[Cost]:
    cost, done = Cost(), threading.Event()
    seen: dict[int, float] = {}
    start, first = time.perf_counter(), _family()
    base = {pid: cpu for pid, (cpu, _) in first.items()}

    def watch() -> None:
        while True:
            now = _family()
            seen.update({pid: cpu for pid, (cpu, _) in now.items()})
            cost.peak = max(cost.peak, sum(memory for _, memory in now.values()))
            if done.wait(0.2):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield cost
    finally:
        done.set()
        watcher.join()
        cost.seconds = time.perf_counter() - start
        cost.cpu = sum(cpu - base.get(pid, 0.0) for pid, cpu in seen.items())


def _family() -> dict[int, tuple[float, int]]:
    """(CPU seconds, resident bytes) of this process and all below it; nothing where there is no /proc."""
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    table: dict[int, tuple[int, float, int]] = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = pathlib.Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                table[int(entry)] = int(fields[1]), (int(fields[11]) + int(fields[12])) / tick, int(fields[21]) * page
    ours = {os.getpid()}
    while more := {pid for pid, (parent, *_) in table.items() if parent in ours} - ours:
        ours |= more
    return {pid: table[pid][1:] for pid in ours if pid in table}


def numbers(name: str, count: int) -> Any:
    """A table of 0, 1, ..., in a column of this name, that Ray spreads over its workers."""
    import daft

    df = daft.from_pydict({name: list(range(count))})
    return df.into_partitions(min(count, 64)) if daft.get_or_infer_runner_type() == "ray" else df


def paths(folder: pathlib.Path) -> Sequence[str]:
    return sorted(str(path) for path in folder.rglob("*.parquet"))
