"""Rows by name from tables and JSON: CSV and TSV, JSON and JSON lines, Parquet, Arrow; packed or not."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bigbase_jax.core import UserError
from bigbase_jax.data.files import TABLES, File, is_packed, kind_of, one_sentence, open_file, optional


class Row(NamedTuple):
    """A row of a table or an object of JSON.

    Attributes:
      number: of its line, record or row in the file, from 1.
      values: by column.
      file: where it is.
    """

    number: int
    values: Mapping[str, Any]
    file: File

    @property
    def where(self) -> str:
        """For people: ``PATH, line 3``."""
        return f"{self.file}, {_UNIT.get(kind_of(self.file.name), 'record')} {self.number}"


_UNIT = {".csv": "line", ".tsv": "line", ".jsonl": "line", ".ndjson": "line", ".parquet": "row", ".arrow": "row"}


def checked(text: str, where: str) -> str:
    """The text, if UTF-8 can hold it; else raises UserError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half a character (a lone surrogate, {text[error.start]!r}).") from error
    return text


def rows(file: File, encoding: str = "utf-8", header: bool = True) -> Iterator[Row]:
    """The rows of a table, or the objects of JSON, in order.

    Args:
      header: whether the first line of a CSV or TSV has the names of the columns; otherwise they are "0", "1", ...

    Raises:
      UserError: it cannot be read, it is not what its name says, or it is not a table.
    """
    kind = kind_of(file.name)
    if kind not in TABLES:
        raise UserError(f"{file} is no table: .csv, .tsv, .json, .jsonl, .parquet and .arrow are.")
    with one_sentence(file, encoding):
        if kind in (".csv", ".tsv"):
            yield from _headed(file, encoding, header)
        elif kind in (".parquet", ".arrow"):
            for number, row in rows_of_columns(file, lambda names: names):
                yield Row(number, row, file)
        else:
            for number, value in json_values(file, encoding):
                if not isinstance(value, dict):
                    raise UserError(f"{file}, record {number} is {type(value).__name__}, not an object with names.")
                yield Row(number, value, file)


def first_line(file: File, encoding: str = "utf-8") -> list[str] | None:
    """The cells of the first line of a CSV or TSV; None where there is none, or the file is something else."""
    if kind_of(file.name) not in (".csv", ".tsv"):
        return None
    with one_sentence(file, encoding):
        return next((row for _, row in lines_of_table(file, encoding)), None)


def class_names(file: File, column: str) -> list[str] | None:
    """The names of the classes that a column's numbers stand for, where ``datasets`` has written them (ClassLabel)."""
    if kind_of(file.name) not in (".parquet", ".arrow"):
        return None
    with one_sentence(file, "utf-8"):
        _, metadata, _ = _columns(file)
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _headed(file: File, encoding: str, header: bool) -> Iterator[Row]:
    names: list[str] | None = None
    for number, row in lines_of_table(file, encoding):
        if names is None:
            names = row if header else [str(i) for i in range(len(row))]
            if header:
                continue
        if len(row) != len(names):
            raise UserError(f"{file}, line {number} has {len(row)} columns instead of {len(names)}.")
        yield Row(number, dict(zip(names, row, strict=True)), file)


def text_of(file: File, encoding: str, newline: str = "") -> io.TextIOWrapper:
    """The text of a file, line ends as they are; see ``open`` for ``newline``."""
    encoding = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    return io.TextIOWrapper(open_file(file), encoding, newline=newline)


def json_values(file: File, encoding: str) -> Iterator[tuple[int, Any]]:
    """(number, value) of a list in JSON, of JSON lines, or of the one value there is."""
    if kind_of(file.name) == ".json":
        with text_of(file, encoding) as whole:
            try:
                values = json.load(whole)
            except json.JSONDecodeError as error:
                if error.msg != "Extra data":
                    raise UserError(f"{file} is not JSON: {error}.") from error
            else:
                yield from enumerate(values if isinstance(values, list) else [values], 1)
                return
    with text_of(file, encoding) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{file}, line {number} is not JSON: {error}.") from error


def lines_of_table(file: File, encoding: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each line that is not empty."""
    csv.field_size_limit(sys.maxsize)
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind_of(file.name) == ".tsv" else {}
    with text_of(file, encoding) as lines:
        table = csv.reader(lines, strict=True, **options)
        for row in table:
            if row:
                yield table.line_num, row


def rows_of_columns(file: File, choose: Callable[[list[str]], Sequence[str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, values of the columns that ``choose`` takes) of each row of a Parquet or Arrow file."""
    names, _, batches = _columns(file)
    columns = list(choose(names))
    number = 0
    for batch in batches(columns):
        for values in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
            number += 1
            yield number, dict(zip(columns, values, strict=True))


def _columns(file: File) -> tuple[list[str], Mapping[bytes, bytes] | None, Callable[[list[str]], Iterator[Any]]]:
    """Names of the columns, metadata of the schema, and what gives batches of some columns."""
    pyarrow = optional("pyarrow", "pyarrow", str(file))
    if kind_of(file.name) == ".parquet":
        parquet = optional("pyarrow.parquet", "pyarrow", str(file))
        table = parquet.ParquetFile(open_file(file) if file.member else file.path)
        schema = table.schema_arrow
        return list(schema.names), schema.metadata, lambda names: table.iter_batches(batch_size=1024, columns=names)
    source = pyarrow.BufferReader(open_file(file).read()) if is_packed(file) else pyarrow.memory_map(file.path)
    whole = source.read(6) == b"ARROW1"
    source.seek(0)
    reader = (pyarrow.ipc.open_file if whole else pyarrow.ipc.open_stream)(source)

    def batches(names: list[str]) -> Iterator[Any]:
        for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)) if whole else reader:
            for start in range(0, batch.num_rows, 1024):
                yield batch.slice(start, 1024)

    return list(reader.schema.names), reader.schema.metadata, batches
