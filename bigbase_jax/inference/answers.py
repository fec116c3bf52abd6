"""Answers as they are given back: JSON lines, or a table that keeps the columns of what was answered."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import pathlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, TextIO, TypeVar

from bigbase_jax.core import Rendered, UserError
from bigbase_jax.data.files import optional
from bigbase_jax.inference.inputs import Input
from bigbase_jax.runtime import whole
from bigbase_jax.runtime.checkpoint import disk_error
from bigbase_jax.runtime.log import say

T = TypeVar("T")
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
_EVERY = 10.0  # seconds between two lines about progress
_BATCH = 1024  # rows of Parquet that are written at once


class Answers:
    """A file of answers, which appears when it is whole: ``with Answers(path) as write: write({column: value})``.

    Rows are kept beside it as JSON lines, so that memory does not grow with them and their columns need not be the
    same. In tables, objects become columns ``a.b``, and lists JSON; what JSON does not have (dates, bytes) is text.

    Args:
      path: ends in one of ``FORMATS``.

    Raises:
      UserError: another ending, or the disk refuses.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(os.path.abspath(os.path.expanduser(path)))
        self._kind = self.path.suffix.lower()
        if self._kind not in FORMATS:
            raise UserError(f"--output={os.fspath(path)} ends in none of {', '.join(FORMATS)}; choose one of them.")
        if self.path.is_dir():
            raise UserError(f"--output={os.fspath(path)} is a folder; name a file in it.")
        if self._kind == ".parquet":
            optional("pyarrow", "pyarrow", os.fspath(path))
        self._columns: dict[str, type | None] = {}  # of their values; None: nothing yet

    def __enter__(self) -> Answers:
        with self._disk():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._partial = whole.partial(self.path.with_name(f"{self.path.name}.rows"))
            self._rows: TextIO = open(self._partial, "w", encoding="utf-8")
        return self

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Adds a row.

        Raises:
          UserError: the disk refuses.
        """
        if self._kind != ".jsonl":
            row = dict(_flat(row))
            for name, value in row.items():
                self._columns[name] = _wider(self._columns.get(name), value)
        with self._disk():
            self._rows.write(as_json(row) + "\n")

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            with self._disk():
                self._rows.close()
                if error is None and self._kind == ".jsonl":
                    os.replace(self._partial, self.path)
            if error is None and self._kind != ".jsonl":
                with whole.written(self.path) as file:
                    self._parquet(file) if self._kind == ".parquet" else self._cells(file)
        finally:
            with contextlib.suppress(OSError):
                self._partial.unlink()

    def _table(self) -> Iterator[list[Any]]:
        with open(self._partial, encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                yield [row.get(name) for name in self._columns]

    def _cells(self, file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
        table = csv.writer(text, lineterminator="\n")
        for row in itertools.chain([list(self._columns)], self._table()):
            if self._kind == ".csv":
                table.writerow(row)
            else:  # no quotes, so no tabs and line ends in a cell
                cells = ("" if cell is None else re.sub(r"[\t\r\n]+", " ", str(cell)) for cell in row)
                text.write("\t".join(cells) + "\n")
        text.detach()

    def _parquet(self, file: BinaryIO) -> None:
        import pyarrow
        from pyarrow import parquet

        kinds: dict[Any, Any] = {int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
        schema = pyarrow.schema([(name, kinds.get(kind, pyarrow.string())) for name, kind in self._columns.items()])
        casts = [kind or str for kind in self._columns.values()]
        table = self._table()
        with parquet.ParquetWriter(file, schema) as writer:
            while some := list(itertools.islice(table, _BATCH)):
                columns = [
                    [None if x is None else cast(x) for x in column]
                    for cast, column in zip(casts, zip(*some, strict=True), strict=True)
                ]
                writer.write_batch(pyarrow.record_batch(columns, schema=schema))

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {disk_error(error) or error}.") from error


def folder_of(output: str | None) -> pathlib.Path | None:
    """The folder that ``--output`` names: one that is there, or a name without an ending; None: it is no folder."""
    if output is None:
        return None
    path = pathlib.Path(os.path.abspath(os.path.expanduser(output)))
    known = path.suffix.lower() in FORMATS
    return path if not known and (path.is_dir() or not path.suffix or output.endswith("/")) else None


def filed(
    folder: pathlib.Path, found: Iterable[tuple[Input, dict[str, Any], Rendered | None]]
) -> Iterator[tuple[Input, dict[str, Any]]]:
    """Writes the file of each answer as ``INPUT-ROW.SUFFIX`` below ``folder``; the answers, with its name as ``file``.

    Raises:
      UserError: the disk refuses.
    """
    names: set[str] = set()
    for item, answer, made in found:
        if made is not None:
            places = (item.row, answer.get("part"))
            stem = "-".join([pathlib.Path(item.file).stem, *(f"{place:04d}" for place in places if place is not None)])
            name = next(
                n for n in itertools.chain([stem], map(f"{stem}-{{}}".format, itertools.count(2))) if n not in names
            )
            names.add(name)
            with whole.written(folder / (name + made.suffix)) as file:
                file.write(made.data)
            answer = {"file": name + made.suffix, **answer}
        yield item, answer


def as_json(row: Any) -> str:
    """One line; what JSON does not have is text, bytes their number."""
    return json.dumps(
        row, ensure_ascii=False, default=lambda x: f"({len(x)} bytes)" if isinstance(x, bytes) else str(x)
    )


def _flat(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, as_json(value) if isinstance(value, (list, tuple)) else value


def _wider(kind: type | None, value: Any) -> type | None:
    """The type that holds the values of a column so far and one more."""
    if value is None:
        return kind
    new = type(value) if isinstance(value, (bool, int, float)) else str
    if new is int and not -(2**63) <= value < 2**63:
        return str
    if kind in (None, new):
        return new
    return float if {kind, new} == {int, float} else str


def counted(answers: Iterable[T], about: float | None, verb: str = "predict") -> Iterator[T]:
    """``answers``, with lines for people about how many there were, how fast, and how long the rest takes.

    Args:
      about: how many there will be, roughly; None: nobody knows.
    """
    begin = last = time.monotonic()
    number = 0
    for number, answer in enumerate(answers, 1):
        yield answer
        now = time.monotonic()
        if now - last > _EVERY:
            last, rate = now, number / (now - begin)
            left = f", about {max(about - number, 0) / rate / 60:.1f} min left" if about else ""
            say(f"{verb}: {number:,} answers, {rate:,.0f} a second{left}")
    seconds = time.monotonic() - begin
    say(f"{verb}: {number:,} answers in {seconds:.1f} s, {number / max(seconds, 1e-9):,.0f} a second")
