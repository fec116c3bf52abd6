"""Files of a table, read block by block with pyarrow: what its columns are, and their values; see ``data.columns``."""

from __future__ import annotations

import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError
from bigbase_jax.data.cache import Writer
from bigbase_jax.data.columns import EXACT, ISO, KINDS, MISSING, Texts, cell_of
from bigbase_jax.data.consent import Permission
from bigbase_jax.data.files import TABLES, File, is_packed, kind_of, one_sentence, open_file, too_long
from bigbase_jax.data.rows import arrow_batches, delimiter, first_line, rows, text_of

_DAYS = ("%d-%m-%Y", "%m-%d-%Y", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%Y/%m/%d", "%Y.%m.%d")
_FORMS = (ISO, *(day + time for day in _DAYS for time in ("", " %H:%M", " %H:%M:%S")), "%Y%m%d")  # day before month
_BLOCK = 8 << 20  # bytes of a table that are parsed at once
_ROWS = 1 << 16  # rows of the same, at most
_WORDS = 3.0  # texts have more words than this, on average,
_DISTINCT = 0.5  # and this share of the first of them differs
_SEEN = 1000
_NAT = np.iinfo(np.int64).min
_BY_ROWS = TABLES - {".csv", ".tsv", ".parquet", ".arrow"}


class Table:
    """The files as one table: ``begin`` finds out what its columns are, and gives what writes them."""

    def __init__(
        self,
        files: Sequence[File],
        kinds: dict[str, str],
        header: bool,
        names: tuple[str, ...],
        columns: Collection[str] | None,
        encoding: str,
        say: Callable[[str], None],
    ):
        for name, kind in kinds.items():
            if kind not in KINDS:
                raise UserError(f"the kind of {name} is {kind!r}.{suggest(kind, KINDS, 'kind')}")
        self.files, self.kinds, self.header, self.names = files, kinds, header, names
        self.wanted, self.encoding, self.say = columns, encoding, say

    def begin(self) -> Callable[[Writer], Mapping[str, Any]]:
        columns: dict[str, _Survey] = {}
        counts: list[tuple[str, int]] = []
        for file in self.files:
            with one_sentence(file, self.encoding):
                blocks = _File(file, self.header, self.names, self.encoding)
                if not columns:
                    columns = {name: _Survey(name, self.kinds.get(name)) for name in self._chosen(file, blocks.names)}
                self._compare(file, blocks.names, columns)
                count = 0
                for size, block in blocks.read([name for name in columns if name in blocks.names]):
                    for name, survey in columns.items():
                        survey.see(block.get(name), size, str(file))
                    count += size
                counts.append((file.name, count))
        plans = [column.plan() for column in columns.values() if self._readable(column)]
        return lambda writer: self._write(writer, plans, counts)

    def _chosen(self, file: File, there: Sequence[str]) -> Sequence[str]:
        for name in (*(self.wanted or ()), *self.kinds):
            if name not in there:
                raise UserError(f"{file} has no column {name!r}.{suggest(name, there, 'column')}")
        return [name for name in there if self.wanted is None or name in self.wanted]

    def _compare(self, file: File, there: Sequence[str], columns: Mapping[str, Any]) -> None:
        if lacking := [name for name in columns if name not in there]:
            self.say(f"data: {file} has no {_listed(lacking)}; missing in its rows")
        if self.wanted is None and (more := [name for name in there if name not in columns]):
            self.say(f"data: {file} has {_listed(more)}, which {self.files[0].name} has not; left out")

    def _readable(self, column: _Survey) -> bool:
        if column.nested:
            self.say(f"data: {column.name} holds {column.nested}, and no single values; left out")
        return not column.nested

    def _write(self, writer: Writer, plans: Sequence[_Plan], counts: Sequence[tuple[str, int]]) -> dict[str, Any]:
        total = sum(count for _, count in counts)
        shapes: dict[str, tuple[int, ...]] = {}
        places: dict[str, list[_Plan]] = {}
        for plan in plans:
            places.setdefault(plan.where, []).append(plan)
        fill: dict[str, Callable[[int, np.ndarray], None]] = {}
        for where, members in places.items():
            shapes[where] = (len(members), total + (where == "bounds"))
            fill[where] = writer.reserve(where, _DTYPES[where], shapes[where])
        ends = np.cumsum([0, *(plan.nbytes for plan in places.get("bounds", ()))])
        if "bounds" in places:
            shapes["texts"] = (int(ends[-1]),)
            fill["texts"] = writer.reserve("texts", np.uint8, shapes["texts"])
        at = {plan.name: (where, i) for where, members in places.items() for i, plan in enumerate(members)}
        codes: dict[str, dict[str, int]] = {plan.name: {} for plan in places.get("codes", ())}
        used = {plan.name: 0 for plan in places.get("bounds", ())}
        start = 0
        for file in self.files:
            with one_sentence(file, self.encoding):
                blocks = _File(file, self.header, self.names, self.encoding)
                for size, block in blocks.read([plan.name for plan in plans if plan.name in blocks.names]):
                    for plan in plans:
                        where, i = at[plan.name]
                        width = shapes[where][1]
                        if where == "bounds":
                            data, bounds = plan.texts(block.get(plan.name), size)
                            done = used[plan.name]
                            fill["texts"](int(ends[i]) + done, data)
                            fill[where](i * width + start + 1, bounds[1:] + done)
                            used[plan.name] = done + len(data)
                        else:
                            values = plan.values(block.get(plan.name), size, codes.get(plan.name))
                            fill[where](i * width + start, values)
                    start += size
        names = [name for place in codes.values() for name in place]
        for part, array in zip(("names", "name_bounds"), Texts.packed(names), strict=True):
            shapes[part] = array.shape
            writer.reserve(part, array.dtype, array.shape)(0, array)
        ranges = itertools.accumulate(map(len, codes.values()), initial=0)
        named = dict(zip(codes, itertools.pairwise(ranges), strict=False))
        columns = []
        for plan in plans:
            where, i = at[plan.name]
            entry = {"name": plan.name, "kind": plan.kind, "dtype": where, "at": i, "form": plan.form}
            entry |= {"missing": plan.missing, "names": named.get(plan.name)}
            columns.append({**entry, "bytes": [int(ends[i]), int(ends[i + 1])] if where == "bounds" else None})
        return {"rows": total, "files": list(counts), "columns": columns, "shapes": shapes}


_DTYPES = {"ints": np.int64, "floats": np.float64, "codes": np.int32, "dates": np.int64, "bounds": np.int64}


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most:,} more" if len(names) > most else "")


# --- what a column is -------------------------------------------------------------------------------------------------


class _Survey:
    """What the cells of a column can be read as, from block to block."""

    def __init__(self, name: str, asked: str | None):
        self.name, self.asked = name, asked
        self.nested = ""  # what it holds in place of single values
        self.integers = self.numbers = self.dates = True  # as far as seen
        self.forms = list(_FORMS)
        self.seen = self.missing = self.nbytes = self.words = self.greatest = 0
        self.first: set[str] = set()

    def see(self, x: Any, size: int, where: str) -> None:
        """Takes a block: an Arrow array, or None where the file has no such column.

        Raises:
          UserError: a cell is not of the kind that was asked for.
        """
        x = None if x is None else _plain(x, self.asked == "text")
        if isinstance(x, str):
            self.nested = x
            return
        some: Any = [] if x is None else pc.drop_null(x)
        self.missing += size - len(some)
        if not len(some):
            return
        if pa.types.is_string(some.type):
            self.nbytes += pc.sum(pc.binary_length(some)).as_py()
            self._see_texts(some)
        else:
            self.integers &= pa.types.is_integer(some.type)
            self.numbers &= not pa.types.is_timestamp(some.type)
            self.dates &= pa.types.is_timestamp(some.type)
            if self.integers:
                self._see_integers(some)
        if not {"number": self.numbers, "date": self.dates}.get(self.asked or "", True):
            raise UserError(f"{where} has {self._other(some)[:40]!r} in {self.name}, which is no {self.asked}.")
        self.seen += len(some)

    def _see_texts(self, some: Any) -> None:
        if self.integers:
            whole = _cast(some, pa.int64())
            self.integers = whole is not None
            if whole is not None:
                padded = pc.and_(pc.starts_with(some, "0"), pc.greater(pc.binary_length(some), 1))
                self.numbers = self.integers = self.asked == "number" or not pc.any(padded).as_py()
                self._see_integers(whole)
            elif self.asked != "number" and pc.all(pc.match_substring_regex(some, "^[-+]?[0-9]+$")).as_py():
                self.numbers = False  # of more digits than fit
        if self.numbers and not self.integers:
            self.numbers = _cast(some, pa.float64()) is not None
        if self.asked == "date" or (self.dates and not self.numbers):
            self.forms = [form for form in self.forms if _dates(some, form) is not None]
            self.dates = bool(self.forms)
        elif self.numbers:
            self.dates = False
        if not self.numbers and not self.dates:
            self.words += pc.sum(pc.add(pc.count_substring(some, " "), 1)).as_py()
            if len(self.first) < _SEEN:
                self.first |= set(some.slice(0, _SEEN).to_pylist())

    def _see_integers(self, whole: Any) -> None:
        bounds = pc.min_max(whole).as_py()
        self.greatest = max(self.greatest, abs(bounds["min"]), abs(bounds["max"]))

    def _other(self, some: Any) -> str:
        """The first cell that is not of the kind that was asked for."""
        for cell in some:
            one = pa.array([cell.as_py()])
            if self.asked == "number" and _cast(one, pa.float64()) is None:
                break
            if self.asked == "date" and not (pa.types.is_string(one.type) and any(_dates(one, f) for f in _FORMS)):
                break
        return str(cell)

    def plan(self) -> _Plan:
        """How the column is kept."""
        exact = self.integers and not (self.missing and self.greatest > EXACT)
        texts = self.words > _WORDS * self.seen and len(self.first) > _DISTINCT * min(self.seen, _SEEN)
        inferred = "number" if self.numbers and (exact or not self.integers) else "date" if self.dates else "category"
        kind = self.asked or ("text" if inferred == "category" and texts else inferred)
        numbers = "ints" if self.integers and not self.missing else "floats"
        where = {"category": "codes", "date": "dates", "text": "bounds"}.get(kind, numbers)
        return _Plan(self.name, kind, where, self.forms[0] if kind == "date" else "", self.missing, self.nbytes)


class _Plan(NamedTuple):
    """How a column is kept.

    Attributes:
      where: the entry of the store.
      nbytes: of all its texts.
    """

    name: str
    kind: str
    where: str
    form: str
    missing: int
    nbytes: int

    def values(self, x: Any, size: int, codes: dict[str, int] | None) -> np.ndarray:
        """[size] of the entry's dtype; ``codes`` is extended by names that are new."""
        none = {"floats": np.nan, "dates": _NAT, "codes": -1}.get(self.where, 0)
        if x is None:
            return np.full(size, none, _DTYPES[self.where])
        x = _plain(x)
        if self.where == "codes":
            assert codes is not None
            found = pc.dictionary_encode(x if pa.types.is_string(x.type) else pc.cast(x, pa.string()))
            place = [codes.setdefault(name, len(codes)) for name in found.dictionary.to_pylist()]
            index = pc.fill_null(found.indices, len(place)).to_numpy(zero_copy_only=False)
            return np.array([*place, -1], np.int32)[index]
        if self.where == "dates":
            x = x if pa.types.is_timestamp(x.type) else _dates(x, self.form)
            x = pc.cast(pc.floor_temporal(x, unit="second"), pa.timestamp("s"))
            x = pc.cast(x, pa.int64())
        else:
            x = pc.cast(x, pa.int64() if self.where == "ints" else pa.float64(), safe=False)
        return np.asarray(pc.fill_null(x, none).to_numpy(zero_copy_only=False), _DTYPES[self.where])

    def texts(self, x: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(bytes, bounds i64[size + 1]) of the texts of a block."""
        if x is None:
            return np.zeros(0, np.uint8), np.zeros(size + 1, np.int64)
        x = _plain(x, True)
        x = pc.fill_null(x if pa.types.is_string(x.type) else pc.cast(x, pa.string()), "")
        _, bounds, data = x.buffers()
        bounds = np.frombuffer(bounds, np.int32)[x.offset : x.offset + size + 1].astype(np.int64)
        data = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
        return data[bounds[0] : bounds[-1]], bounds - bounds[0]


def _plain(x: Any, text: bool = False) -> Any:
    """Cells as texts without spaces around them, null where missing; or integers, f64 or timestamps, as the file has
    them; or what it has in place of single values, in words."""
    kinds = pa.types
    if kinds.is_dictionary(x.type):
        x = x.dictionary_decode()
    if kinds.is_boolean(x.type) or kinds.is_large_string(x.type) or kinds.is_string_view(x.type):
        x = pc.cast(x, pa.string())
    if kinds.is_string(x.type):
        x = pc.ascii_trim_whitespace(x)
        missing = pc.equal(x, "") if text else pc.is_in(x, value_set=pa.array(MISSING))
        return pc.if_else(missing, None, x) if pc.any(missing).as_py() else x
    if kinds.is_null(x.type):
        return pc.cast(x, pa.string())
    if kinds.is_date(x.type) or kinds.is_timestamp(x.type):
        return pc.cast(x, pa.timestamp("us"), safe=False)  # which drops the zone, and not what it says: UTC
    if kinds.is_integer(x.type):
        whole = _cast(x, pa.int64())
        return pc.cast(x, pa.string()) if whole is None else whole
    if kinds.is_floating(x.type) or kinds.is_decimal(x.type):
        x = pc.cast(x, pa.float64())
        return pc.if_else(pc.is_nan(x), None, x)
    return f"values of the type {x.type}"


def _cast(x: Any, to: Any) -> Any:
    """The array as another type; None where that cannot be."""
    try:
        return pc.cast(x, to)
    except pa.ArrowInvalid:
        return None


def _dates(x: Any, form: str) -> Any:
    """Timestamps in UTC of texts, some of which may say their zone; None where one is in another form."""
    if form != ISO:
        found = pc.strptime(x, format=form, unit="s", error_is_null=True)
        return None if found.null_count > x.null_count else found
    zoned = pc.match_substring_regex(x, r":\d\d(\.\d+)?\s*(Z|[-+]\d\d:?(\d\d)?)$")
    if not pc.any(zoned).as_py():
        return _cast(x, pa.timestamp("us"))
    with_zone = _cast(pc.if_else(zoned, x, None), pa.timestamp("us", "UTC"))
    without = _cast(pc.if_else(zoned, None, x), pa.timestamp("us"))
    if with_zone is None or without is None:
        return None
    return pc.coalesce(pc.cast(with_zone, pa.timestamp("us"), safe=False), without)


# --- blocks -----------------------------------------------------------------------------------------------------------


class _File:
    """The blocks of one file.

    Attributes:
      names: of its columns.
    """

    def __init__(self, file: File, header: bool, names: tuple[str, ...], encoding: str):
        self._file, self._encoding, self._header = file, encoding, header
        self._rows: Callable[[list[str]], Iterator[Any]] | None = None
        if kind_of(file.name) in (".parquet", ".arrow"):
            there, _, self._rows = arrow_batches(file)
        elif kind_of(file.name) in _BY_ROWS:
            there = list(next(iter(rows(file, encoding, header))).values)
        else:
            self._mark, there = _first(file, encoding)
            if not header:
                there = [str(i) for i in range(len(there))]
                if names and len(names) != len(there):
                    raise UserError(f"{file} has {len(there)} columns, and there are {len(names)} names.")
                there = list(names) or there
        twice = [name for name, count in Counter(there).items() if count > 1]
        if twice:
            hint = "" if not header else "; if its first line is a row, say header=false"
            raise UserError(f"{file} has several columns {twice[0]!r}{hint}.")
        self.names = there

    def read(self, columns: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """(rows, Arrow arrays by column) of each block, of rows that may be read."""
        permission = Permission(self._file)
        if not permission.columns or kind_of(self._file.name) in _BY_ROWS:  # there, ``data.rows`` has seen to it
            yield from self._blocks(columns)
            return
        permission.check(self.names)
        for _, block in self._blocks(list(dict.fromkeys((*columns, *permission.columns)))):
            may = pa.array(permission.places([block[name].to_pylist() for name in permission.columns]), pa.bool_())
            yield pc.sum(may).as_py() or 0, {name: block[name].filter(may) for name in columns}
        permission.tell()

    def _blocks(self, columns: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        if self._rows is not None:
            batches: list[Any] = []
            for batch in itertools.chain(self._rows(columns), [None]):
                if batches and (batch is None or sum(map(len, batches)) >= _ROWS):
                    yield from _of_batch(pa.Table.from_batches(batches).combine_chunks())
                    batches = []
                batches += [] if batch is None else [batch]
        elif kind_of(self._file.name) in _BY_ROWS:
            given = rows(self._file, self._encoding, self._header)
            while some := list(itertools.islice(given, _ROWS)):
                block = {}
                for name in columns:
                    block[name] = pa.array([cell_of(row.values.get(name)) for row in some], pa.string())
                yield len(some), block
        else:
            for batch in self._cells(columns):
                yield from _of_batch(batch)

    def _cells(self, columns: list[str]) -> Iterator[Any]:
        file, mark = self._file, self._mark
        if len(mark) > 1 or mark == " ":
            raw: Any = pa.PythonFile(io.BufferedReader(_Tabs(file, mark), _BLOCK))
        else:
            raw = pa.PythonFile(open_file(file)) if is_packed(file) else file.path
        plain = mark == "\t" and kind_of(file.name) != ".csv"  # as data.rows has it
        read = csv.ReadOptions(
            column_names=self.names, skip_rows=int(self._header), block_size=_BLOCK, encoding=self._encoding
        )
        parse = csv.ParseOptions(
            delimiter=mark if len(mark) == 1 and mark != " " else "\t",
            quote_char=False if plain or len(mark) > 1 or mark == " " else '"',
            newlines_in_values=not plain,
        )
        convert = csv.ConvertOptions(
            column_types={name: pa.string() for name in self.names},
            include_columns=columns,
            strings_can_be_null=False,
        )
        with csv.open_csv(raw, read_options=read, parse_options=parse, convert_options=convert) as reader:
            yield from reader


def _of_batch(batch: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Parts of a batch that are not too large."""
    for start in range(0, batch.num_rows, _ROWS):
        part = batch.slice(start, _ROWS)
        arrays = (part.column(name) for name in part.schema.names)
        whole = [x.combine_chunks() if hasattr(x, "combine_chunks") else x for x in arrays]
        yield part.num_rows, dict(zip(part.schema.names, whole, strict=True))


def first_names(file: File, encoding: str) -> list[str]:
    """The names of a table's columns; of one without a header, the cells of its first line."""
    if kind_of(file.name) in (".parquet", ".arrow"):
        return arrow_batches(file)[0]
    if kind_of(file.name) in _BY_ROWS:
        return list(next(iter(rows(file, encoding))).values)
    return _first(file, encoding)[1]


def _first(file: File, encoding: str) -> tuple[str, list[str]]:
    """What divides the cells of a table, and those of its first line."""
    packed = next((suffix for suffix in (".gz", ".zst") if file.name.lower().endswith(suffix)), "")
    as_csv = file if kind_of(file.name) in (".csv", ".tsv") else file._replace(name=f"table.csv{packed}")
    mark = delimiter(as_csv, encoding)
    if mark is None and as_csv is not file:
        with text_of(file, encoding) as text:
            line = text.readline(file.limits.most_text).strip()
        mark = "::" if "::" in line else " " if " " in line else ","
        return mark, line.split(mark if mark != " " else None)
    cells = first_line(as_csv, encoding)
    if cells is None:
        raise UserError(f"{file} is empty.")
    return mark or ",", [cell.strip() for cell in cells]


class _Tabs(io.RawIOBase):
    """The bytes of a table in which tabs take the place of what divides its cells: ``::``, or one space or more."""

    def __init__(self, file: File, mark: str):
        self._raw, self._file, self._mark = open_file(file), file, mark
        self._ready, self._held, self._over = b"", b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._over:
            data = self._raw.read(1 << 20)
            lines = self._held + data
            stop = lines.rfind(b"\n") + 1 if data else len(lines)
            lines, self._held, self._over = lines[:stop], lines[stop:], not data
            if len(self._held) > self._file.limits.most_text:
                raise too_long(f"a line of {self._file}", self._file.limits)
            if self._mark == " ":
                lines = re.sub(rb"(?m)^[ ]+|[ ]+(?=\r?$)", b"", lines)
            self._ready = re.sub(rb"[ ]+" if self._mark == " " else re.escape(self._mark.encode()), b"\t", lines)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()
