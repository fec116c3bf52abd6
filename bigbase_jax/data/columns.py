"""Tables as columns, whose kinds are inferred from what they hold: numbers, categories, dates, texts.

CSV, TSV, texts of cells between tabs, commas, ``::`` or spaces, Parquet and Arrow are read block by block with pyarrow,
twice: to find out what the columns are, and to write them where they are then memory-mapped. So memory does not grow
with the rows. Excel and JSON are read too, row by row.

Legend: N rows.
"""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError
from bigbase_jax.data.cache import Store, kept, release, source_digest
from bigbase_jax.data.files import LIMITS, File, Limits, kind_of, one_file, optional
from bigbase_jax.data.rows import tables
from bigbase_jax.data.sources.splits import digest

KINDS = ("number", "category", "date", "text")
MISSING = ("", "?", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "Null", "null", "None", "none", "<NA>", "#N/A")
"""Cells that say that there is no value, but where a column is read as text."""
ISO = "iso"
EXACT = 2**53  # integers up to this are exact in f64


class Texts(Sequence[str]):
    """Texts whose bytes lie one after another, in memory or mapped."""

    def __init__(self, data: np.ndarray, bounds: np.ndarray):
        """``data`` is uint8, UTF-8; text i is from ``bounds[i]`` to ``bounds[i + 1]``."""
        self._data, self._bounds = data, bounds

    @staticmethod
    def packed(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """The data and the bounds of texts."""
        encoded = [text.encode("utf-8", "replace") for text in texts]
        return np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> list[str]: ...
    def __getitem__(self, index: int | slice | np.ndarray) -> str | list[str]:
        if isinstance(index, slice | np.ndarray):
            return [self[i] for i in np.arange(len(self))[index].tolist()]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        i = int(index) % len(self)
        return self._data[self._bounds[i] : self._bounds[i + 1]].tobytes().decode("utf-8", "replace")


class Column(NamedTuple):
    """One column of a table.

    Attributes:
      name: as the table has it.
      kind: one of ``KINDS``.
      values: number: f64[N], NaN where missing, or i64[N], exact and none missing; category: i32[N], places in
        ``names``, -1 where missing; date: datetime64[s][N] in UTC, NaT where missing; text: ``Texts`` or a list of N,
        "" where missing.
      names: of a category, in the order in which they first appear.
      form: of a date, how it was written: "iso", or as ``strptime`` has it.
      missing: how many values are.
    """

    name: str
    kind: str
    values: Any
    names: Sequence[str] = ()
    form: str = ""
    missing: int = 0

    def release(self) -> None:
        """Gives back the memory of a column that is mapped: a table may be larger than that."""
        if isinstance(self.values, np.ndarray):
            release(self.values)


class Columns(Mapping[str, Column]):
    """The columns of a table by name.

    Attributes:
      rows: N.
      files: (name, rows) of each file that the rows come from, in order.
      kept: where they are, for people.
    """

    def __init__(self, columns: Sequence[Column], rows: int, files: Sequence[tuple[str, int]] = (), kept: str = ""):
        self._columns = {column.name: column for column in columns}
        self.rows, self.files, self.kept = rows, tuple(files), kept or "none needed, the columns are in memory"

    def __getitem__(self, name: str) -> Column:
        """
        Raises:
          UserError: there is no such column (with the nearest name).
        """
        if name not in self._columns:
            raise UserError(f"the table has no column {name!r}.{suggest(name, self._columns, 'column')}")
        return self._columns[name]

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def columns_of(values: Mapping[str, Sequence[Any]], kinds: Mapping[str, str] | None = None) -> Columns:
    """Columns in memory, of arrays or of Python values: numbers where the array's dtype says so, else categories.

    Args:
      kinds: of columns where that is otherwise.

    Raises:
      UserError: as ``column_of``.
    """
    found = []
    for name, given in values.items():
        array = np.asarray(given)
        kind = {"M": "date", "O": "category", "U": "category", "b": "category"}.get(array.dtype.kind, "number")
        found.append(column_of(name, array.tolist(), (kinds or {}).get(name, kind)))
    return Columns(found, len(next(iter(values.values()), ())))


def column_of(
    name: str, values: Sequence[Any], kind: str, form: str = ISO, names: Sequence[str] | None = None
) -> Column:
    """A column in memory, of Python values: those of JSON, or texts as a table of cells has them.

    Args:
      form: of dates; see ``Column``.
      names: of categories, where they are known: others are -1; None: those that there are.

    Raises:
      UserError: one is neither missing nor of this kind.
    """
    if kind == "text":
        texts = ["" if value is None else str(value) for value in values]
        return Column(name, kind, texts, missing=texts.count(""))
    cells = [cell_of(value) for value in values]
    missing = sum(cell is None for cell in cells)
    if kind == "category":
        known = list(dict.fromkeys(c for c in cells if c is not None)) if names is None else names
        place: dict[str | None, int] = {None: -1, **{known_name: i for i, known_name in enumerate(known)}}
        return Column(name, kind, np.array([place.get(c, -1) for c in cells], np.int32), tuple(known), missing=missing)
    read: Callable[[str], Any] = float if kind == "number" else lambda cell: _moment(cell, form)
    none = np.nan if kind == "number" else np.datetime64("NaT")
    found = []
    for cell in cells:
        try:
            found.append(none if cell is None else read(cell))
        except ValueError as error:
            raise UserError(f"{name} is {str(cell)[:40]!r}, which is no {kind}.") from error
    return Column(name, kind, np.array(found, np.float64 if kind == "number" else "M8[s]"), form=form, missing=missing)


def cell_of(value: Any) -> str | None:
    """A value as a table has it in a cell; None where it says that there is none."""
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        value = int(value)
    text = "" if value is None else str(value).strip()
    return None if text in MISSING else text


def _moment(cell: str, form: str) -> np.datetime64:
    """A date in UTC; one that says no zone is in UTC. Those of JSON may be in ISO 8601, whatever the table's form."""
    try:
        found = datetime.datetime.fromisoformat(cell)
    except ValueError:
        if form == ISO:
            raise
        found = datetime.datetime.strptime(cell, form)
    if found.tzinfo is not None:
        found = found.astimezone(datetime.UTC).replace(tzinfo=None)
    return np.datetime64(found, "s")


# --- files ------------------------------------------------------------------------------------------------------------


def table_files(root: str, encoding: str = "utf-8", limits: Limits = LIMITS) -> list[File]:
    """The tables of a folder or an archive; or the file itself, which is one of cells whatever it is called.

    Raises:
      UserError: there are none.
    """
    path = pathlib.Path(root).expanduser()
    if path.is_file() and kind_of(path.name) in (".txt", ".data", ".dat", ".inter", ".tab", ""):
        return [one_file(root, limits)]
    return tables(root, encoding, limits)


def read_columns(
    files: Sequence[File],
    *,
    kinds: Mapping[str, str] | None = None,
    header: bool = True,
    names: Sequence[str] | None = None,
    columns: Collection[str] | None = None,
    encoding: str = "utf-8",
    cache: pathlib.Path | None = None,
    limit_bytes: float = float("inf"),
    say: Callable[[str], None] = print,
) -> Columns:
    """The rows of files, one after another, as columns. Those of a file that others lack, and the first has, are
    missing there; those that only others have are left out; both are said.

    A column is numbers where all its cells are, or are missing (``MISSING``), but categories where whole numbers begin
    with 0 or have more digits than can be kept exactly; dates where all are, in one of the usual forms, day before
    month where both are possible; texts where there are several words in most, which differ; else categories.

    Args:
      files: as ``table_files`` gives them.
      kinds: of columns where that is otherwise; see ``KINDS``.
      header: whether the first line of a table of cells has the names of the columns; else they are "0", "1", ...
      names: of the columns of a table without header.
      columns: which are read; None: all.
      encoding: of tables of cells.
      cache: the folder of all stores; None: they are in memory.
      limit_bytes: what stores may take on disk.
      say: takes lines about progress, and about columns that are not as they seem.

    Raises:
      UserError: a file that cannot be read, a column that is not there, or a cell that is not of the kind that was
        asked for.
    """
    optional("pyarrow", "pyarrow", str(files[0]))
    from bigbase_jax.data.column_files import Table  # which imports it

    table = Table(files, dict(kinds or {}), header, tuple(names or ()), columns, encoding, say)
    whole = [[list(map(str, file.file_signature)) for file in files], sorted(table.kinds.items()), header, table.names]
    whole += [None if columns is None else sorted(columns), encoding]
    whole += [source_digest(module) for module in ("data.columns", "data.column_files")]
    key = digest(whole)
    where = files[0].path + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    root = cache if cache is not None else pathlib.Path()
    store = kept(key, table.begin, root, limit_bytes if cache else 0, say, f"reading the columns of {where} once")
    return _opened(store)


def _opened(store: Store) -> Columns:
    about, found = store.about, []
    values = {name: store.values(name).reshape(shape) for name, shape in about["shapes"].items()}
    for entry in about["columns"]:
        name, kind, at = entry["name"], entry["kind"], entry["at"]
        names: Sequence[str] = ()
        if kind == "text":
            start, stop = entry["bytes"]
            array: Any = Texts(values["texts"][start:stop], values["bounds"][at])
        else:
            array = values[{"category": "codes", "date": "dates"}.get(kind, entry["dtype"])][at]
            array = array.view("M8[s]") if kind == "date" else array
        if kind == "category":
            first, last = entry["names"]
            names = Texts(values["names"], values["name_bounds"][first : last + 1])
        found.append(Column(name, kind, array, names, entry["form"], entry["missing"]))
    return Columns(found, about["rows"], [tuple(file) for file in about["files"]], store.kept)
