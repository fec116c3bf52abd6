"""Documents from files: plain text, JSON and JSON lines, CSV, TSV, Excel, Parquet, Arrow; also packed (see ``files``).

A document comes in blocks of about a million characters, so that one file may be larger than memory. Text is taken
exactly as it stands, line ends included; only a byte-order mark goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError
from bigbase_jax.data.consent import Permission
from bigbase_jax.data.files import TABLES, File, kind_of, one_sentence, refuse_permission, too_long
from bigbase_jax.data.rows import CELLS, checked, json_values, lines_of, lines_of_table, rows_of_columns, text_of

BLOCK = 1 << 20
"""Characters of a block of plain text, which ends at the next end of a line."""
UNITS = ("file", "line", "paragraph")
COLUMNS = (("text",), ("content",), ("title", "paragraphs"), ("rhythmic", "paragraphs"), ("paragraphs",))


class Document(NamedTuple):
    """A text and what a person calls it; ``blocks`` can be read once."""

    name: str
    blocks: Iterable[str]


@dataclasses.dataclass(frozen=True)
class Format:
    """How documents lie in files.

    Attributes:
      unit: what a document is in a file of plain text: the "file", each "line" that is not empty, or each "paragraph"
        (between empty lines).
      columns: of a table or of JSON objects, joined by line ends (a list of texts also); a number is the place of a
        column in a table without a header. Empty: "text" or "content", or title and paragraphs, or the only one.
      encoding: of all but Parquet.

    Raises:
      UserError: an unknown unit or encoding.
    """

    unit: str = "file"
    columns: tuple[str, ...] = ()
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        if self.unit not in UNITS:
            raise UserError(f"there is no unit {self.unit!r}.{suggest(str(self.unit), UNITS, 'unit')}")
        try:
            "".encode(self.encoding)
        except LookupError as error:
            raise UserError(f"there is no encoding {self.encoding!r}; use utf-8, gb18030, big5, ...") from error

    def documents(self, file: File) -> Iterator[Document]:
        """The documents of a file that are not empty.

        Raises:
          UserError: it cannot be read, it is not what its name says, or it has no such column.
        """
        with one_sentence(file, self.encoding):
            kind = kind_of(file.name)
            if kind in TABLES and kind in CELLS:
                yield from self._table(file)
            elif kind in (".parquet", ".arrow"):
                yield from self._columnar(file)
            elif kind in TABLES:
                yield from self._records(file, json_values(file, self.encoding))
            else:
                yield from self._plain(file)

    # -- the formats -----------------------------------------------------------------------------------------------

    def _plain(self, file: File) -> Iterator[Document]:
        refuse_permission(file.limits, str(file))
        if self.unit == "file":
            with text_of(file, self.encoding) as whole:
                if whole.read(1):
                    yield Document(file.name, self._blocks(file))
            return
        paragraph: list[str] = []
        start = size = 0
        for number, line in lines_of(file, self.encoding):
            text = line.rstrip("\r\n")
            if self.unit == "line":
                if text.strip():
                    yield Document(f"{file.name}:{number}", (text,))
            elif text.strip():
                start, size = (start, size + len(line)) if paragraph else (number, len(line))
                if size > file.limits.most_text:
                    raise too_long(f"{file}: the paragraph from line {start} on", file.limits)
                paragraph.append(line)
            elif paragraph:
                yield Document(f"{file.name}:{start}", ("".join(paragraph).rstrip("\r\n"),))
                paragraph = []
        if paragraph:
            yield Document(f"{file.name}:{start}", ("".join(paragraph).rstrip("\r\n"),))

    def _blocks(self, file: File) -> Iterator[str]:
        with one_sentence(file, self.encoding), text_of(file, self.encoding) as lines:
            while block := lines.read(BLOCK):
                yield block + lines.readline(BLOCK)

    def _records(self, file: File, records: Iterable[tuple[int, Any]]) -> Iterator[Document]:
        columns: Sequence[str] | None = None
        may = Permission(file).of(records, lambda item: item[1] if isinstance(item[1], dict) else {})
        for number, record in may:
            where = f"{file}, record {number}"
            if isinstance(record, dict):
                columns = columns or self._choose(list(record), where)
                missing = [name for name in columns if name not in record]
                if missing:
                    raise UserError(f"{where} has no {missing[0]!r}.{suggest(missing[0], record, 'entry')}")
                text = "\n".join(as_text(record[name], f"{where}: {name!r}") for name in columns)
            else:
                text = as_text(record, where)
            yield from _document(file, number, text)

    def _table(self, file: File) -> Iterator[Document]:
        places: list[int] | None = None
        if self.columns and all(name.isdigit() for name in self.columns):
            places = [int(name) for name in self.columns]
        permission = Permission(file)
        names: list[str] = []
        for number, row in lines_of_table(file, self.encoding):
            if permission.columns and not names:
                names = row if places is None else [str(i) for i in range(len(row))]
                permission.check(names)
            if places is None:
                columns = self._choose(row, f"the first line of {file}")
                places = [row.index(name) for name in columns]
                continue
            if permission.columns and not permission.allows(dict(zip(names, row, strict=False))):
                continue
            if max(places) >= len(row):
                where = f"{file}, line {number}"
                raise UserError(f"{where} has {len(row)} columns; column {max(places)} (from 0) is not there.")
            yield from _document(file, number, "\n".join(row[place] for place in places))
        permission.tell()

    def _columnar(self, file: File) -> Iterator[Document]:
        permission = Permission(file)
        chosen: list[str] = []

        def choose(names: list[str]) -> list[str]:
            permission.check(names)
            chosen[:] = self._choose(names, str(file))
            return list(dict.fromkeys((*chosen, *permission.columns)))

        for number, row in permission.of(rows_of_columns(file, choose), lambda item: item[1]):
            where = f"{file}, row {number}"
            yield from _document(file, number, "\n".join(as_text(row[name], where) for name in chosen))

    def _choose(self, names: Sequence[str], where: str) -> Sequence[str]:
        """The columns to read, of those there are."""
        for name in self.columns:
            if name not in names:
                raise UserError(f"{where} has no column {name!r}.{suggest(name, names, 'column')}")
        for known in (self.columns, *COLUMNS):
            if known and set(known) <= set(names):
                return known
        if len(names) == 1:
            return names
        shown = ", ".join(repr(name if len(name) < 30 else name[:27] + "...") for name in names[:6])
        raise UserError(
            f"{where} has the columns {shown}; name those to read with columns=('...',), by number from 0 where a table"
            " has no header."
        )


def whole_text(file: File, encoding: str = "utf-8") -> str:
    """The text of a file that is read at once; raises UserError if it cannot be, or is too long for that."""
    refuse_permission(file.limits, str(file))
    with one_sentence(file, encoding), text_of(file, encoding) as lines:
        text = lines.read(file.limits.most_text + 1)
    if len(text) > file.limits.most_text:
        raise too_long(str(file), file.limits)
    return text


def _document(file: File, number: int, text: str) -> Iterator[Document]:
    if text.strip():
        yield Document(f"{file.name}:{number}", (checked(text, f"{file}, record {number}"),))


def as_text(value: Any, where: str) -> str:
    """A text, or a list of texts joined by line ends; raises UserError if it is neither."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if value is None:
        return ""
    raise UserError(f"{where} is {type(value).__name__}, not text or a list of texts.")
