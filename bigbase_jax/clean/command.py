"""``--mode=clean``: goes through the steps of a recipe, each of which is kept until all of them are done."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ml_collections import ConfigDict

from bigbase_jax.build import build
from bigbase_jax.clean import card, engine
from bigbase_jax.clean import forget as forgetting
from bigbase_jax.clean.engine import col
from bigbase_jax.clean.pii import PII
from bigbase_jax.clean.read import ReadFile, found, signature
from bigbase_jax.core import UserError
from bigbase_jax.data.sources.splits import digest
from bigbase_jax.runtime import whole
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.untrusted import read_object

HOME = ".clean"
"""The folder, in the output, of what is not data: steps that are done, ``manifest.json``, keys of what is forgotten."""
_OWN = ("key", "digest", "dropped", "mended", "words", "language_score", "split")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clean:
    """What is cleaned, how, and to where.

    Attributes:
      root: a file or folder; see ``read.Read``.
      out: the folder of the output: ``SPLIT-00000-of-00001.parquet``, ``card.md``, ``clean.html``.
      read: what makes a table of the files.
      steps: in order; see ``text`` for those on single documents, ``duplicates`` for those on all together.
      megabytes: of text in a file of the output, about.
      workers: processes for steps on single documents; None: as many as there are cores, or none for little data.
      keep_steps: keep what each step has written, with what it has dropped.
    """

    root: str
    out: str
    read: Any
    steps: Sequence[Any]
    megabytes: float = 256.0
    workers: int | None = None
    keep_steps: bool = False

    def __post_init__(self) -> None:
        if not self.megabytes > 0 or (self.workers is not None and self.workers < 0):
            raise UserError("megabytes has to be positive, and workers at least 0.")


def clean(
    config: ConfigDict,
    engine_name: str = "native",
    address: str | None = None,
    forget: Sequence[str] = (),
    runs: str = "runs",
) -> dict[str, Any]:
    """Cleans, or goes on with what was begun; or forgets documents of what was cleaned.

    Args:
      engine_name: "native" or "ray"; "jax", the flag's default, is the former.
      address: of a Ray cluster.
      forget: ids of documents, or files of one id a line.
      runs: the folder of runs, among which those are looked for that have trained on what is forgotten.

    Returns:
      documents, bytes and files; what each step dropped, by reason; and what was set aside.

    Raises:
      UserError: a mistake in the recipe, nothing to read, an id that is there twice, a disk that is full, or a worker
        that was killed twice.
    """
    if "clean" not in config:
        raise UserError("--mode=clean needs a recipe of a cleaning; try --config=configs/clean.py.")
    plan: Clean = build(config.clean, _path="config.clean")
    out = pathlib.Path(plan.out).expanduser()
    if forget:
        return forgetting.forget(out, forget, pathlib.Path(runs))
    _check(plan, out)
    files, left = found(plan.root, plan.read.kinds)
    forgotten = forgetting.keys(out)
    told = signature(files, plan.read, sorted(forgotten))
    identity = [digest([told, repr(step)]) for step in _through(plan.steps)] or [told]
    manifest = _manifest(out)
    if manifest.get("identity") == identity[-1] and _intact(out, manifest):
        say(f"{out} is clean already; nothing has changed since")
        return card.summary(manifest)
    daft = engine.start("native" if engine_name == "jax" else engine_name, address)
    small = sum(file.size for file, _ in files) < engine.IN_PROCESS_BYTES
    workers = plan.workers if plan.workers is not None else 0 if small else os.cpu_count()
    run = _Run(daft, plan, out, (workers or None) if engine_name != "ray" else None)
    manifest = run.all(files, left, told, identity, forgotten)
    return card.summary(manifest)


def _through(steps: Sequence[Any]) -> list[list[Any]]:
    return [list(steps[: i + 1]) for i in range(len(steps))]


def _check(plan: Clean, out: pathlib.Path) -> None:
    root, here = os.path.realpath(os.path.expanduser(plan.root)), os.path.realpath(out)
    if root == here or here.startswith(os.path.join(root, "")) or root.startswith(os.path.join(here, "")):
        raise UserError(f"out={plan.out} and root={plan.root} are in one another; choose an output elsewhere.")
    if out.is_dir() and any(out.iterdir()) and not (out / HOME).is_dir():
        raise UserError(f"{out} has files that no cleaning has written; choose an empty folder.")
    for step in plan.steps:
        if hasattr(step, "check"):
            step.check()


def _manifest(out: pathlib.Path) -> dict[str, Any]:
    try:
        return read_object(out / HOME / "manifest.json")
    except FileNotFoundError:
        return {}


def _intact(out: pathlib.Path, manifest: Mapping[str, Any]) -> bool:
    return all((out / file["name"]).is_file() for file in manifest["files"])


class _Run:
    def __init__(self, daft: Any, plan: Clean, out: pathlib.Path, workers: int | None):
        self.daft, self.plan, self.out, self.workers = daft, plan, out, workers
        self.home = out / HOME

    def all(
        self, files: list[Any], left: list[Any], told: str, identity: list[str], forgotten: frozenset[int]
    ) -> dict[str, Any]:
        """Each step, the files of the output, and then what says that they are whole."""
        self.home.mkdir(parents=True, exist_ok=True)
        names = [f"00-{self.plan.read.name}-{told}"]
        names += [f"{i:02}-{s.name}-{d}" for i, (s, d) in enumerate(zip(self.plan.steps, identity, strict=False), 1)]
        for old in self.home.glob("[0-9][0-9]-*"):
            if old.name not in (*names, f"99-{identity[-1]}"):
                shutil.rmtree(old)
        told_steps = [self._step(names[0], "read", lambda to: self._read(files, left, to, forgotten))]
        for step, before, name in zip(self.plan.steps, names, names[1:], strict=False):
            told_steps.append(self._step(name, step.name, lambda to, s=step, b=before: self._cleaned(s, b, to)))
        last = self.home / names[-1]
        sharded = self._step(f"99-{identity[-1]}", "write", lambda to: self._sharded(last, to))
        pieces = self.home / f"99-{identity[-1]}"
        manifest = self._published(pieces, told_steps, sharded, identity[-1])
        if not self.plan.keep_steps:
            for name in (*names, pieces.name):
                shutil.rmtree(self.home / name, ignore_errors=True)
        return manifest

    def _step(self, name: str, step: str, work: Any) -> dict[str, Any]:
        """What a step says of itself, done now or before."""
        done = self.home / name / "step.json"
        if done.is_file():
            say(f"{step}: done before")
            return read_object(done)

        with whole.folder(self.home / name) as to, engine.measured() as cost:

            def attempt() -> dict[str, Any]:
                for path in to.iterdir():  # of an attempt before
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                found: dict[str, Any] = work(to)
                return found

            try:
                said = {"step": step, **engine.retried(attempt)}
            except Exception as error:
                sentence = None if isinstance(error, UserError) else engine.one_sentence(error, self.out, step)
                if sentence is None:
                    raise
                raise sentence from error
        said |= {"seconds": cost.seconds, "cpu_seconds": cost.cpu, "peak_bytes": cost.peak}
        with whole.written(done) as file:
            file.write(json.dumps(said, ensure_ascii=False).encode())
        gone = sum(said.get("dropped", {}).values())
        say(f"{step}: {said['rows']:,} documents, {gone:,} dropped, {said['seconds']:.1f} s")
        return said

    def _frame(self, folder: pathlib.Path) -> Any:
        return self.daft.read_parquet(engine.paths(folder / "rows"))

    # -- reading -----------------------------------------------------------------------------------------------------

    def _read(self, files: list[Any], left: list[Any], to: pathlib.Path, forgotten: frozenset[int]) -> dict[str, Any]:
        (to / "rows").mkdir()
        step = ReadFile(self.plan.read, tuple(files), str(to / "rows"), forgotten)
        told = engine.mapped(engine.numbers("file", len(files)), step, self.workers, 1).sort("file").to_pylist()
        aside = [*left, *((files[t["file"]][0].name, t["error"]) for t in told if t["error"])]
        for name, why in aside:
            say(f"set aside: {name}: {why}")
        inputs = [
            {"name": files[t["file"]][0].name, "rows": t["rows"], "blake2b": t["digest"], "encoding": t["encoding"]}
            for t in told
            if not t["error"]
        ]
        if not inputs:
            raise UserError(f"nothing of {self.plan.root} can be read: {aside[0][1] if aside else 'it is empty'}.")
        df = self.daft.read_parquet(engine.paths(to / "rows"))
        twice = df.groupby("id", "split").agg(col("key").count().alias("n")).where(col("n") > 1).limit(1).to_pylist()
        if twice:
            name = self.plan.read.id
            raise UserError(
                f"the id {str(twice[0]['id'])[:80]!r} is there {twice[0]['n']} times in {self.plan.root}; {name!r} is"
                " no column of ids: choose another, or leave out id."
            )
        rows, size = sum(t["rows"] for t in told), sum(t["bytes"] for t in told)
        return {"rows": rows, "bytes": size, "inputs": inputs, "aside": aside}

    # -- cleaning ----------------------------------------------------------------------------------------------------

    def _cleaned(self, step: Any, before: str, to: pathlib.Path) -> dict[str, Any]:
        df = self._frame(self.home / before)
        if "dropped" in df.column_names:
            df = df.where(df["dropped"].is_null())
            df = df.exclude(*(name for name in ("dropped", "of") if name in df.column_names))
        for name in getattr(step, "reads", ()):
            if name not in df.column_names:
                raise UserError(f"the step {step.name} needs the column {name!r}, which a step before it has to give.")
        if isinstance(step, PII) and step.action == "replace" and step.salt is None:
            step = dataclasses.replace(step, salt=self._secret())
        if hasattr(step, "drop"):
            df = step.drop(df, to, self.workers, say)
        else:
            df = engine.mapped(df, step, self.workers)
        df.write_parquet(str(to / "rows"))
        for path in to.iterdir():  # what a step needed on its way
            if path.name != "rows":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        said = card.told(self.daft.read_parquet(engine.paths(to / "rows")))
        if said["rows"] == sum(said["dropped"].values()):
            raise UserError(f"step {step.name} leaves no document ({', '.join(said['dropped'])}); loosen it.")
        return said

    def _secret(self) -> str:
        path = self.home / "salt"
        if not path.is_file():
            with whole.written(path) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(secrets.token_hex(16).encode())
        return path.read_text()

    # -- writing -----------------------------------------------------------------------------------------------------

    def _sharded(self, last: pathlib.Path, to: pathlib.Path) -> dict[str, Any]:
        """The files of the output, in ``to``: documents of a split by key, ordered by key, so that they are the same
        whatever ran the steps."""
        lit = self.daft.lit
        df = self._frame(last)
        if "dropped" in df.column_names:
            df = df.where(df["dropped"].is_null())
        size = {"text": col("text").length_bytes().sum()} if "text" in df.column_names else {}
        found = (
            df.groupby("split").agg(col("key").count().alias("n"), *(x.alias("b") for x in size.values())).to_pydict()
        )
        most = self.plan.megabytes * 1e6
        parts = {s: int(-(-b // most)) or 1 for s, b in zip(found["split"], found.get("b", found["n"]), strict=True)}
        u64 = self.daft.DataType.uint64()
        count = lit(1).cast(u64)
        for split, n in parts.items():
            count = (col("split") == split).if_else(lit(n).cast(u64), count)
        df = df.with_column("_part", (col("key") % count).cast(self.daft.DataType.int64()))
        df.write_parquet(str(to / "parts"), partition_cols=["split", "_part"])
        names = [(s, part, n) for s, n in parts.items() for part in range(n)]
        step = _WriteShard(tuple(names), str(to))
        rows = engine.mapped(engine.numbers("shard", len(names)), step, self.workers, 1).sort("shard").to_pylist()
        shutil.rmtree(to / "parts")
        found_files = [{k: row[k] for k in ("name", "rows", "bytes", "sha256")} for row in rows if row["rows"]]
        return {"rows": sum(f["rows"] for f in found_files), "parts": parts, "files": found_files}

    def _published(
        self, pieces: pathlib.Path, steps: list[dict[str, Any]], sharded: dict[str, Any], identity: str
    ) -> dict[str, Any]:
        """Puts the files in their place; the manifest, which says that they are whole, goes first and comes last."""
        (self.home / "manifest.json").unlink(missing_ok=True)
        for path in self.out.glob("*.parquet"):
            path.unlink()
        for file in sharded["files"]:
            shutil.copyfile(pieces / file["name"], self.out / file["name"])
        manifest = {
            "identity": identity,
            "root": self.plan.root,
            "recipe": [repr(self.plan.read), *map(repr, self.plan.steps)],
            "salted": (self.home / "salt").is_file(),
            "steps": steps,
            "written": {k: sharded[k] for k in ("rows", "parts", "seconds", "cpu_seconds", "peak_bytes")},
            "files": sharded["files"],
            "kept": card.kept(self.daft.read_parquet([str(self.out / file["name"]) for file in sharded["files"]])),
            "forgotten": len(forgetting.keys(self.out)),
        }
        self._keep_duplicates()
        card.write(self.out, manifest)
        return manifest

    def _keep_duplicates(self) -> None:
        """Keys of what was dropped as a duplicate, and of what stays in its place: ``--forget`` asks for these."""
        steps = [self._frame(p) for p in sorted(self.home.glob("[0-9][0-9]-*")) if (p / "rows").is_dir()]
        steps = [df for df in steps if "of" in df.column_names]
        found = [df.where(col("of").not_null()).select("key", "of").to_arrow() for df in steps]
        if found:
            import pyarrow as pa
            import pyarrow.parquet as pq

            with whole.written(self.home / "duplicates.parquet") as file:
                pq.write_table(pa.concat_tables(found), file)


@dataclasses.dataclass(frozen=True)
class _WriteShard:
    """Sorts the documents of a shard and writes its file. See ``engine.mapped``."""

    names: tuple[tuple[str, int, int], ...]
    folder: str

    reads = ("shard",)

    gives: ClassVar = {"name": "string", "rows": "int64", "bytes": "int64", "sha256": "string"}

    def __call__(self, batch: Any) -> dict[str, list[Any]]:
        told = [self._write(*self.names[shard]) for shard in batch["shard"].to_pylist()]
        return {name: [t[name] for t in told] for name in self.gives}

    def _write(self, split: str, part: int, count: int) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = f"{split}-{part:05}-of-{count:05}.parquet"
        parts = [
            pq.ParquetFile(p).read()
            for p in engine.paths(pathlib.Path(self.folder, "parts", f"split={split}", f"_part={part}"))
        ]
        if not parts:
            return {"name": name, "rows": 0, "bytes": 0, "sha256": ""}
        table = pa.concat_tables(parts).sort_by("key")
        table = table.select([c for c in table.column_names if c not in _OWN and c not in ("_part", "of")])
        path = pathlib.Path(self.folder, name)
        pq.write_table(table, path, compression="zstd", row_group_size=4096)
        return {"name": name, "rows": table.num_rows, "bytes": path.stat().st_size, "sha256": card.sha256(path)}
