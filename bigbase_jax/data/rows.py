"""Rows by name from tables and JSON: CSV, TSV, Excel, JSON and JSON lines, Parquet, Arrow; packed or not."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import json
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bigbase_jax.core import UserError
from bigbase_jax.data.consent import Permission
from bigbase_jax.data.files import (
    KEY,
    LIMITS,
    TABLES,
    File,
    Limits,
    is_packed,
    kind_of,
    list_files,
    named_after,
    one_sentence,
    open_file,
    optional,
    read_endings,
    refuse_permission,
    too_long,
)


class Row(NamedTuple):
    """A row of a table or an object of JSON.

    Attributes:
      number: of its line, record or row in the file, from 1.
      values: by column.
      file: where it is.
      error: why it cannot be read; "" where it can.
    """

    number: int
    values: Mapping[str, Any]
    file: File
    error: str = ""

    @property
    def where(self) -> str:
        """For people: ``PATH, line 3``."""
        return f"{self.file}, {_UNIT.get(kind_of(self.file.name), 'record')} {self.number}"


_UNIT = {
    **dict.fromkeys((".csv", ".tsv", ".txt", ".jsonl", ".ndjson"), "line"),
    **dict.fromkeys((".xlsx", ".parquet", ".arrow"), "row"),
}
CELLS = (".csv", ".tsv", ".txt", ".xlsx")
"""Suffixes of tables whose cells are texts, and which may lack a header; a ``.txt`` is one where it is read as rows."""
_WRAPPERS = ("data", "rows", "records", "examples", "items")  # what JSON objects around a list of rows call it
_DELIMITERS = ("\t", ";", "|", ",")  # a comma last: it is also in texts, and in numbers such as 3,5
_SAMPLE = 1 << 16  # characters, and
_SAMPLE_ROWS = 100  # which tell the delimiter
_EXCEL_ROWS = 1 << 20  # of any sheet
_BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def checked(text: str, where: str) -> str:
    """The text, if UTF-8 can hold it; else raises UserError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half a character (a lone surrogate, {text[error.start]!r}).") from error
    return text


def rows(file: File, encoding: str = "utf-8", header: bool = True, lenient: bool = False) -> Iterator[Row]:
    """The rows of a table, or the objects of JSON, in order.

    Args:
      header: whether the first line of a table of cells has the names of the columns; otherwise they are "0", "1", ...
      lenient: give a row that cannot be read with its error, and go on.

    Raises:
      UserError: it cannot be read, it is not what its name says, or it is not a table.
    """
    permission = Permission(file)
    found = _rows(file, encoding, header, lenient)
    if permission.columns and kind_of(file.name) not in (".json", ".jsonl", ".ndjson"):
        first = next(found, None)
        if first is not None and not first.error:
            permission.check(first.values)
        found = itertools.chain(() if first is None else (first,), found)
    yield from permission.of(found, lambda row: row.values)


def _rows(file: File, encoding: str, header: bool, lenient: bool) -> Iterator[Row]:
    kind = kind_of(file.name)
    if kind not in TABLES and kind not in CELLS:
        raise UserError(f"{file} is no table. {read_endings([kind])}")
    with one_sentence(file, encoding):
        if kind in CELLS:
            yield from _headed(file, encoding, header, lenient)
        elif kind in (".parquet", ".arrow"):
            for number, row in rows_of_columns(file, lambda names: names):
                yield Row(number, row, file)
        else:
            for number, value in json_values(file, encoding, lenient):
                if isinstance(value, dict):
                    yield Row(number, value, file)
                    continue
                said = f"{file}, record {number} is {type(value).__name__}, not an object with names."
                yield _bad(Row(number, {}, file, str(value) if isinstance(value, UserError) else said), lenient)


def first_line(file: File, encoding: str = "utf-8") -> list[str] | None:
    """The cells of the first line of a table of cells; None where there is none, or the file is something else."""
    if kind_of(file.name) not in CELLS:
        return None
    with one_sentence(file, encoding):
        return next((row for _, row in lines_of_table(file, encoding)), None)


def class_names(file: File, column: str) -> list[str] | None:
    """The names of the classes that a column's numbers stand for, where ``datasets`` has written them (ClassLabel)."""
    if kind_of(file.name) not in (".parquet", ".arrow"):
        return None
    with one_sentence(file, "utf-8"):
        _, metadata, _ = arrow_batches(file)
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _bad(row: Row, lenient: bool) -> Row:
    if not lenient:
        raise UserError(row.error)
    return row


def _headed(file: File, encoding: str, header: bool, lenient: bool) -> Iterator[Row]:
    names: list[str] | None = None
    for number, row in lines_of_table(file, encoding):
        if names is None:
            names = row if header else [str(i) for i in range(len(row))]
            if header:
                continue
        found = Row(number, dict(zip(names, row, strict=False)), file)
        if len(row) != len(names):
            said = f"{found.where} has {len(row)} columns instead of {len(names)}."
            found = _bad(found._replace(error=said), lenient)
        yield found


def text_of(file: File, encoding: str, newline: str = "") -> io.TextIOWrapper:
    """The text of a file, line ends as they are; see ``open`` for ``newline``. A byte-order mark tells its encoding."""
    raw = io.BufferedReader(open_file(file))
    start = raw.peek(3)[:3]
    return io.TextIOWrapper(
        raw, next((e for bom, e in _BOMS.items() if start.startswith(bom)), encoding), newline=newline
    )


def is_number(text: str) -> bool:
    """Whether Python's ``float`` takes it."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def lines_of(file: File, encoding: str, newline: str = "") -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of each line of a text that is no table.

    Raises:
      UserError: a line is too long, or lines are to be read by their consent, of which they say nothing.
    """
    refuse_permission(file.limits, str(file))
    yield from _lines(file, encoding, newline)


def _lines(file: File, encoding: str, newline: str = "") -> Iterator[tuple[int, str]]:
    most = file.limits.most_text
    with text_of(file, encoding, newline) as text:
        for number, line in enumerate(iter(functools.partial(text.readline, most + 1), ""), 1):
            if len(line) > most:
                raise too_long(f"{file}, line {number}", file.limits)
            yield number, line


def json_values(file: File, encoding: str, lenient: bool = False) -> Iterator[tuple[int, Any]]:
    """(number, value) of a list in JSON, also as ``{"data": [...]}``, of JSON lines, or of the one value there is.
    Where ``lenient`` (see ``rows``), a line that is not JSON has its UserError as value."""
    if kind_of(file.name) == ".json" and not _in_lines(file, encoding):
        with text_of(file, encoding) as text:
            head = text.read(_BLOCK)
            if head.lstrip()[:1] == "[":
                yield from _elements(file, head, text)
            else:
                most = 16 * file.limits.most_text
                head += text.read(most + 1 - len(head))
                if len(head) > most:
                    raise UserError(
                        f"{file} is one value of more than {most:,} characters; make it a list of records, or JSON"
                        f" lines, or raise {KEY}.text."
                    )
                yield from enumerate(_unwrapped(file, _json(head, f"{file}")), 1)
        return
    for number, line in _lines(file, encoding):
        if line.strip():
            try:
                value = _json(line, f"{file}, line {number}")
            except UserError as error:
                if not lenient:
                    raise
                value = error
            yield number, value


_BLOCK = 1 << 20  # characters that are read at once
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def _in_lines(file: File, encoding: str) -> bool:
    """Whether the first line that is not empty is JSON, and something follows it."""
    with text_of(file, encoding) as text:
        lines = iter(functools.partial(text.readline, file.limits.most_text), "")
        first = next(filter(str.strip, lines), "")
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            return False
        return any(map(str.strip, lines))


def _json(text: str, where: str, at: int | None = None) -> Any:
    """The value of a text; or, with ``at``, the one that begins there, and its end."""
    try:
        return json.loads(text) if at is None else _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error if at is None else error.msg}.") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply.") from error
    except ValueError as error:
        raise UserError(f"{where} has a number of more than {sys.get_int_max_str_digits():,} digits.") from error


def _elements(file: File, text: str, rest: io.TextIOBase) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of each element of a list of any length: ``text`` and what ``rest`` still has."""
    most = file.limits.most_text
    number, at = 0, text.index("[") + 1

    def after(place: int) -> int:  # the next character that is no space
        return _SPACE.match(text, place).end()  # type: ignore[union-attr]

    while True:
        at = end = after(at)
        if not number and text.startswith("]", at):
            break
        where = f"{file}, record {number + 1}"
        try:
            value, end = _json(text, where, at)
            end = after(end)
            if text[end : end + 1] not in (",", "]"):
                raise UserError(f"{where} is not JSON: no comma or ] after it.")
        except UserError as error:
            why = error.__cause__
            cut = end == len(text)
            if isinstance(why, json.JSONDecodeError):
                cut = why.msg.startswith("Unterminated") or why.pos > len(text) - 16
            if cut and len(text) - at > most:
                raise too_long(where, file.limits) from error
            more = rest.read(max(_BLOCK, len(text) - at)) if cut else ""
            if not more:
                raise
            text, at = text[at:] + more, 0
            continue
        if end - at > most:
            raise too_long(where, file.limits)
        number += 1
        yield number, value
        if text[end] == "]":
            break
        at = end + 1
    if (text[end + 1 :] + rest.read(_BLOCK)).strip():
        raise UserError(f"{file} is not JSON: something follows its list.")


def _unwrapped(file: File, values: Any) -> list[Any]:
    if isinstance(values, dict):
        lists = [name for name, value in values.items() if isinstance(value, list)]
        if len(lists) > 1 and all(named_after(name, whole=True) for name in lists):
            shown = " and ".join(f"{name}.json" for name in lists)
            raise UserError(
                f"{file} holds several lists, named after splits; put each into a file of its own ({shown})."
            )
        inside = [value for name, value in values.items() if name in _WRAPPERS and isinstance(value, list)]
        values = inside[0] if len(inside) == 1 else [values]
    return values if isinstance(values, list) else [values]


def lines_of_table(file: File, encoding: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each line of a table of cells that is not blank.

    Raises:
      UserError: a quote that is not closed, or with text after it, by the line where its row begins.
    """
    if kind_of(file.name) == ".xlsx":
        yield from _sheet(file)
        return
    csv.field_size_limit(sys.maxsize)
    mark = delimiter(file, encoding)
    if mark is None:
        if kind_of(file.name) == ".txt":
            raise UserError(f"{file} is no table: neither tabs nor semicolons divide its lines into cells.")
        mark = ","
    with text_of(file, encoding) as text:
        # between tabs, quotation marks are part of the text, but not where Excel has written it
        plain = mark == "\t" and kind_of(file.name) != ".csv" and text.encoding != "utf-16"
    options: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if plain else {}
    start, size = 1, 0  # of a row: its line, and characters so far

    def lines() -> Iterator[str]:
        nonlocal size
        for _, line in _lines(file, encoding):
            size += len(line)
            if size > file.limits.most_text:
                raise too_long(f"{file}: the row from line {start} on (is a quote not closed?)", file.limits)
            yield line

    table = csv.reader(lines(), delimiter=mark, strict=True, **options)
    try:
        for row in table:
            start, size = table.line_num + 1, 0
            if len(row) > 1 or any(map(str.strip, row)):
                yield table.line_num, row
    except csv.Error as error:
        raise UserError(
            f"{file}, line {start} cannot be read ({error}): a cell that begins with a quotation mark ends with"
            ' one, and those in between stand twice ("").'
        ) from error


def delimiter(file: File, encoding: str) -> str | None:
    """What divides the cells of a table in text: the mark by which the first lines, or more than half of them, have as
    many cells as the very first one, which is at least two; None where there is none. A comma divides no ``.txt``."""
    if kind_of(file.name) == ".tsv":
        return "\t"
    with one_sentence(file, encoding), text_of(file, encoding) as whole:
        sample = whole.read(_SAMPLE)
    lines = list(io.StringIO(sample, newline=""))
    if len(sample) == _SAMPLE and len(lines) > 1:
        del lines[-1]
    best, found = 0, None
    for mark in _DELIMITERS if kind_of(file.name) == ".csv" else _DELIMITERS[:-1]:
        plain: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if mark == "\t" and kind_of(file.name) != ".csv" else {}
        with contextlib.suppress(csv.Error):
            table = filter(None, csv.reader(lines, delimiter=mark, **plain))
            counts = [len(row) for row in itertools.islice(table, _SAMPLE_ROWS)]
            score = counts.count(counts[0]) if counts and counts[0] > 1 else 0
            if score > max(best, len(counts) / 2):
                best, found = score, mark
    return found


def tables(root: str, encoding: str = "utf-8", limits: Limits = LIMITS) -> list[File]:
    """The files of a folder, or the file, that have rows; ``.txt`` are among them where there is nothing else and each
    line has several cells.

    Raises:
      UserError: there are none.
    """
    listed = list_files(root, limits)
    found = [file for file in listed if kind_of(file.name) in TABLES]
    found = found or [file for file in listed if kind_of(file.name) == ".txt" and delimiter(file, encoding)]
    if not found:
        raise UserError(f"{root} holds no table. {read_endings(kind_of(file.name) for file in listed)}")
    return found


def _sheet(file: File) -> Iterator[tuple[int, list[str]]]:
    """(row number, cells as texts) of the first sheet of an Excel file that are not blank, as wide as the first."""
    openpyxl = optional("openpyxl", "openpyxl", str(file))
    try:
        with open_file(file) as raw, zipfile.ZipFile(raw) as parts, warnings.catch_warnings(action="ignore"):
            file.limits.meter(file, file.size)(sum(part.file_size for part in parts.infolist()))
            book = openpyxl.load_workbook(raw, read_only=True, data_only=True)
            width = 0
            for number, cells in enumerate(book.worksheets[0].iter_rows(values_only=True), 1):
                texts = ["" if cell is None else str(cell) for cell in cells]
                while texts and not texts[-1].strip():
                    texts.pop()
                width = width or len(texts)
                if sum(map(len, texts)) > file.limits.most_text:
                    raise too_long(f"{file}, row {number}", file.limits)
                if texts:
                    yield number, texts + [""] * (width - len(texts))
                elif number > _EXCEL_ROWS:
                    raise UserError(f"{file} cannot be read: no sheet has more than {_EXCEL_ROWS:,} rows.")
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:  # openpyxl raises almost anything on files that are not what they should be
        raise UserError(f"{file} cannot be read: it is no Excel workbook, or a broken one.") from error


def rows_of_columns(file: File, choose: Callable[[list[str]], Sequence[str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, values of the columns that ``choose`` takes) of each row of a Parquet or Arrow file."""
    names, _, batches = arrow_batches(file)
    columns = list(choose(names))
    number, count = 0, file.limits.meter(file, file.size)
    for batch in batches(columns):
        for scalars in zip(*(batch.column(name) for name in columns), strict=True):
            number += 1
            values = dict(zip(columns, (scalar.as_py() for scalar in scalars), strict=True))
            size = _size(values)
            if size > file.limits.most_text:
                raise too_long(f"{file}, row {number}", file.limits)
            count(size)
            yield number, values


def _size(value: Any) -> int:
    """About how many bytes a value has."""
    if isinstance(value, (str, bytes)):
        return 8 + len(value)
    if isinstance(value, Mapping):
        return 8 + sum(map(_size, value.values()))
    return 8 + sum(map(_size, value)) if isinstance(value, list) else 8


def arrow_batches(file: File) -> tuple[list[str], Mapping[bytes, bytes] | None, Callable[[list[str]], Iterator[Any]]]:
    """Names of the columns, metadata of the schema, and what gives batches of some columns."""
    pyarrow = optional("pyarrow", "pyarrow", str(file))
    if kind_of(file.name) == ".parquet":
        parquet = optional("pyarrow.parquet", "pyarrow", str(file))
        table = parquet.ParquetFile(open_file(file) if file.member else file.path, buffer_size=_BLOCK)
        schema = table.schema_arrow
        return list(schema.names), schema.metadata, functools.partial(_parquet_batches, file, table)
    source = pyarrow.BufferReader(open_file(file).read()) if is_packed(file) else pyarrow.memory_map(file.path)
    whole = source.read(6) == b"ARROW1"
    source.seek(8 if whole else 0)
    count = file.limits.meter(file, file.size)
    with contextlib.suppress(EOFError, StopIteration):
        for message in pyarrow.ipc.MessageReader.open_stream(source):
            count(_unpacked_size(message))
    source.seek(0)
    reader = (pyarrow.ipc.open_file if whole else pyarrow.ipc.open_stream)(source)

    def batches(names: list[str]) -> Iterator[Any]:
        for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)) if whole else reader:
            chosen = batch.select(names)
            chosen.validate(full=True)  # reading what lies about its lengths ends the process
            yield chosen

    return list(reader.schema.names), reader.schema.metadata, batches


_FIXED = ("BOOLEAN", "INT32", "INT64", "FLOAT", "DOUBLE")  # physical types of Parquet of at most 8 bytes
_EXPANDED = 1 << 29  # bytes of a batch, if every row repeated all that a group of rows holds


def _parquet_batches(file: File, table: Any, names: list[str]) -> Iterator[Any]:
    """Batches of some columns; nothing is read if it would be out of proportion to the file, by what this says."""
    count, most = file.limits.meter(file, file.size), 1
    nested = [name for name in names if table.schema_arrow.field(name).type.num_fields]
    for i in range(table.num_row_groups):
        group = table.metadata.row_group(i)
        most = max(most, group.total_byte_size)
        values = group.num_rows * len(names)
        if nested:
            # Where the metadata of a column is damaged, opening its reader raises, but asking for it ends the process.
            next(table.reader.iter_batches(0, row_groups=[i], column_indices=list(range(group.num_columns))), None)
            chunks = map(group.column, range(group.num_columns))
            values += sum(chunk.num_values for chunk in chunks if chunk.path_in_schema.split(".")[0] in nested)
        count(max(group.total_byte_size, 8 * values))
    flat = {column.path: column.physical_type for column in map(table.schema.column, range(len(table.schema)))}
    if all(flat.get(name, "").startswith(_FIXED) for name in names):
        size = min(1 << 16, _EXPANDED // (8 * max(len(names), 1)))  # whatever is repeated, a value takes 8 bytes
    else:
        size = min(512, _EXPANDED // most)
    yield from table.iter_batches(batch_size=max(8, size), columns=names)


def _unpacked_size(message: Any) -> int:
    """Bytes that the compressed buffers of an Arrow message say they unpack to; 0 where they are not compressed.

    A message is a table of flatbuffers whose third field is a RecordBatch (in a dictionary's message, the second field
    of that is); of this the third field has places and lengths of buffers, and the fourth says that they are
    compressed.
    """
    data = message.metadata.to_pybytes()

    def number(kind: str, at: int) -> int:
        return int(struct.unpack_from(kind, data, at)[0])

    def field(at: int, index: int) -> int:
        table = at + number("<I", at)
        entries = table - number("<i", table)
        inside = 4 + 2 * index < number("<H", entries)
        offset = number("<H", entries + 4 + 2 * index) if inside else 0
        return table + offset if offset else 0

    if message.type not in ("record batch", "dictionary"):
        return 0
    batch = field(0, 2)
    batch = field(batch, 1) if message.type == "dictionary" else batch
    buffers = field(batch, 2)
    if not field(batch, 3) or not buffers:
        return 0
    first = buffers + number("<I", buffers)
    sizes = []
    for i in range(number("<I", first)):
        at, length = struct.unpack_from("<qq", data, first + 4 + 16 * i)
        if length >= 8:
            sizes.append(struct.unpack("<q", message.body.slice(at, 8).to_pybytes())[0])
    return sum(size for size in sizes if size > 0)
