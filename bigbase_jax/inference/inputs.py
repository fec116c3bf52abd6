"""What a user gives to be answered: files, each as a whole, or the rows of tables and the lines of texts."""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bigbase_jax.core import Fields, UserError
from bigbase_jax.data.documents import Format
from bigbase_jax.data.files import LIMITS, TABLES, File, Limits, is_packed, kind_of, one_file, open_file
from bigbase_jax.data.rows import Row, delimiter, first_line, is_number, rows
from bigbase_jax.data.sources.text.base import plain_file
from bigbase_jax.runtime.log import say


class Input(NamedTuple):
    """A file, or a row of one.

    Attributes:
      given: what ``Codec.decode`` takes: the path, the bytes, or the row by entry.
      file: the path, as the user wrote it.
      row: of a table the number of the row, of a text that of the line, from 1; None: all of the file.
      values: the row as it stands, by column.
      error: why it cannot be read; "" where it can.
    """

    given: bytes | str | Mapping[str, Any]
    file: str
    row: int | None = None
    values: Mapping[str, Any] = {}
    error: str = ""

    @property
    def place(self) -> dict[str, Any]:
        """Where it is, as answers say it."""
        return {"input": self.file} if self.row is None else {"input": self.file, "row": self.row}


def to_answer(pattern: str, output: str | None) -> list[str]:
    """``find``, where the answers go to ``output``.

    Raises:
      UserError: there are none, or ``output`` is one of them.
    """
    files = find(pattern)
    if output is not None and any(os.path.realpath(output) == os.path.realpath(file) for file in files):
        raise UserError(f"--output={output} is one of the files to answer; give it another name.")
    return files


def find(pattern: str) -> list[str]:
    """The files that a path, a folder (with all below it) or a pattern names, sorted.

    Raises:
      UserError: there are none.
    """
    path = pathlib.Path(pattern)
    if path.is_file():
        return [pattern]
    if path.is_dir():
        found = [str(p) for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")]
    else:
        found = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    if not found:
        raise UserError(f"--input={pattern} names no file.")
    return sorted(found)


def estimate(files: Sequence[str], fields: Fields | None) -> float | None:
    """About how many inputs there are, from the first line ends of each file; None: it takes reading them all."""
    total = 0.0
    for path in files:
        if not _has_rows(path, fields):
            total += 1
        elif kind_of(path) in (".json", ".xlsx", ".parquet", ".arrow") or is_packed(one_file(path)):
            return None
        else:
            with contextlib.suppress(OSError), open(path, "rb") as file:  # the error is told where it is read
                head = file.read(1 << 20)
                total += head.count(b"\n") * os.path.getsize(path) / max(len(head), 1)
    return total


def read(files: Sequence[str], fields: Fields | None, limits: Limits = LIMITS) -> Iterator[Input]:
    """The inputs in files, in order and one at a time; what cannot be read of several is among them, with its error.

    Args:
      fields: what the model reads of a row; None: it reads whole files alone.

    Raises:
      UserError: the only file is a table that cannot be read from its first row on, or has no column for the model.
    """
    for path in files:
        if fields is None or not _has_rows(path, fields):
            yield Input(path, path)
            continue
        begun = False
        try:
            for item in _rows(path, fields, limits):
                yield item
                begun = True
        except UserError as error:
            if len(files) == 1 and not begun:
                raise
            yield Input(path, path, error=str(error))


def _has_rows(path: str, fields: Fields | None) -> bool:
    return fields is not None and not fields.whole and (kind_of(path) in TABLES or fields.lines)


def _is_table(file: File, fields: Fields) -> bool:
    """Whether it has cells; a ``.txt`` does where its first line has the columns that the model was trained with."""
    if kind_of(file.name) != ".txt" or not delimiter(file, fields.encoding):
        return kind_of(file.name) in TABLES
    line = first_line(file, fields.encoding) or []
    there = set(line) if fields.header else {str(i) for i in range(len(line))}
    return all(any(set(names) <= there for names in options) for options in fields.columns.values())


def _rows(path: str, fields: Fields, limits: Limits) -> Iterator[Input]:
    file = one_file(path, limits)
    if not _is_table(file, fields):
        ((entry, (names, *_)),) = fields.columns.items()
        for document in Format(unit="line", encoding=fields.encoding).documents(plain_file(path, limits)):
            text, number = "".join(document.blocks), int(document.name.rpartition(":")[2])
            yield Input({entry: text}, path, number, {names[0]: text})
        return
    chosen: dict[str, Sequence[str]] | None = None
    for number, row in enumerate(rows(file, fields.encoding, fields.header, lenient=True), 1):
        if chosen is None and not row.error:
            chosen = _choose(row, fields, file)
        yield _input(path, number, row, chosen or {}, fields)


def _input(path: str, number: int, row: Row, chosen: Mapping[str, Sequence[str]], fields: Fields) -> Input:
    values, given = row.values, dict(row.values) if not fields.columns else {}
    missing = [name for names in chosen.values() for name in names if name not in values]
    error = row.error or (f"the row has no {missing[0]!r}." if missing else "")
    if not error:
        for entry, names in chosen.items():
            given[entry] = values[names[0]]
            if len(names) > 1:
                given[entry] = "\n".join(str(values[name]) for name in names if values[name] is not None)
        given |= {name: values[name] for name in fields.options if values.get(name) not in (None, "")}
        if fields.files:
            name = given[next(iter(chosen))]
            if not isinstance(name, str) or not name.strip():
                error = f"the row names no file in {next(iter(chosen.values()))[0]!r}."
            else:
                place = os.path.join(os.path.dirname(path), os.path.expanduser(name.strip()))
                options = {name: given[name] for name in fields.options if name in given}
                if not options:
                    return Input(place, path, number, values)
                try:
                    with open_file(one_file(place)) as opened:
                        return Input({next(iter(chosen)): opened.read(), **options}, path, number, values)
                except (OSError, UserError) as failed:
                    error = str(failed)
    return Input(given, path, number, values, error)


def _choose(row: Row, fields: Fields, file: File) -> dict[str, Sequence[str]]:
    """The columns that each entry is read from, as far as the first row can tell."""
    values = row.values
    chosen: dict[str, Sequence[str]] = {}
    for entry, options in fields.columns.items():
        names = next((names for names in options if set(names) <= set(values)), None)
        if names is None and len(fields.columns) == 1:
            texts = [name for name, value in values.items() if isinstance(value, str) and not is_number(value)]
            if len(texts) == 1:
                names = (texts[0],)
                say(f"{file} has no column {options[0][0]!r}; its only column of text, {names[0]!r}, is read instead")
        if names is None:
            shown = ", ".join(repr(name if len(name) < 30 else name[:27] + "...") for name in list(values)[:12])
            wanted = " and ".join(repr(name) for name in options[0])
            raise UserError(
                f"{file} has the columns {shown}; this model reads {wanted}: rename the column of the {entry}."
            )
        chosen[entry] = names
    return chosen


def entries_of(row: Any, fields: Fields | None) -> Mapping[str, Any]:
    """What ``Codec.decode`` takes of a row that came by itself, by entries or by columns; a text alone is its only
    entry.

    Raises:
      UserError: it lacks an entry, or the model reads no rows.
    """
    if fields is None:
        raise UserError("this model reads whole files, and no rows.")
    if isinstance(row, str) and len(fields.columns) == 1:
        row = dict.fromkeys(fields.columns, row)
    if not isinstance(row, Mapping):
        raise UserError(f"an input is {type(row).__name__}, not an object by entry ({', '.join(fields.columns)}).")
    given = dict(row) if not fields.columns else {name: row[name] for name in fields.options if name in row}
    for entry, options in fields.columns.items():
        names = (entry,) if entry in row else next((names for names in options if set(names) <= set(row)), None)
        if names is None:
            raise UserError(f"a row has no {entry!r}, which this model reads.")
        found = [row[name] for name in names]
        given[entry] = found[0] if len(found) == 1 else "\n".join(str(value) for value in found if value is not None)
    return given
