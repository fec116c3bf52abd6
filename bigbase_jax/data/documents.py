"""Documents from files: plain text, JSON and JSON lines, CSV and TSV, Parquet; as they are or in gzip or Zstandard.

A document comes in blocks of about a million characters, so that one file may be larger than memory. Text is taken
exactly as it stands, line ends included; only a byte-order mark goes.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import importlib
import io
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError

BLOCK = 1 << 20
"""Characters of a block of plain text, which ends at the next end of a line."""
UNITS = ("file", "line", "paragraph")
_PLAIN = frozenset({".txt", ".text", ".md", ".rst"})
_PACKED = (".gz", ".zst")
_NOT_DATA = re.compile(r"(readme|licen[cs]e|copying|notice)\b", re.IGNORECASE)
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_COLUMNS = (("text",), ("content",), ("title", "paragraphs"), ("rhythmic", "paragraphs"), ("paragraphs",))


class Document(NamedTuple):
    """A text and what a person calls it; ``blocks`` can be read once."""

    name: str
    blocks: Iterable[str]


class File(NamedTuple):
    """A file of documents.

    Attributes:
      name: relative to the root, with "/".
      path: where it is.
      size: in bytes.
      mtime_ns: when it was changed.
    """

    name: str
    path: str
    size: int
    mtime_ns: int


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
        kind = _kind(file.name)
        read = {
            ".json": self._json,
            ".jsonl": self._json_lines,
            ".ndjson": self._json_lines,
            ".csv": self._table,
            ".tsv": self._table,
            ".parquet": self._parquet,
        }.get(kind, self._plain)
        with _one_sentence(file.path, self.encoding):
            yield from read(file)

    # -- the formats -----------------------------------------------------------------------------------------------

    def _text(self, file: File) -> io.TextIOWrapper:
        encoding = "utf-8-sig" if self.encoding.lower().replace("_", "-") in ("utf-8", "utf8") else self.encoding
        return io.TextIOWrapper(_open(file.path), encoding, newline="")

    def _plain(self, file: File) -> Iterator[Document]:
        with self._text(file) as lines:
            if self.unit == "file":
                if lines.read(1):
                    yield Document(file.name, self._blocks(file))
                return
            paragraph: list[str] = []
            start = 1
            for number, line in enumerate(lines, 1):
                text = line.rstrip("\r\n")
                if self.unit == "line":
                    if text.strip():
                        yield Document(f"{file.name}:{number}", (text,))
                elif text.strip():
                    start = start if paragraph else number
                    paragraph.append(line)
                elif paragraph:
                    yield Document(f"{file.name}:{start}", ("".join(paragraph).rstrip("\r\n"),))
                    paragraph = []
            if paragraph:
                yield Document(f"{file.name}:{start}", ("".join(paragraph).rstrip("\r\n"),))

    def _blocks(self, file: File) -> Iterator[str]:
        with _one_sentence(file.path, self.encoding), self._text(file) as lines:
            while block := lines.read(BLOCK):
                yield block + lines.readline(BLOCK)

    def _json(self, file: File) -> Iterator[Document]:
        with self._text(file) as whole:
            try:
                records = json.load(whole)
            except json.JSONDecodeError as error:
                raise UserError(f"{file.path} is not JSON: {error}.") from error
        yield from self._records(file, enumerate(records if isinstance(records, list) else [records], 1))

    def _json_lines(self, file: File) -> Iterator[Document]:
        def records() -> Iterator[tuple[int, Any]]:
            with self._text(file) as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        try:
                            yield number, json.loads(line)
                        except json.JSONDecodeError as error:
                            raise UserError(f"{file.path}, line {number} is not JSON: {error}.") from error

        yield from self._records(file, records())

    def _records(self, file: File, records: Iterable[tuple[int, Any]]) -> Iterator[Document]:
        columns: Sequence[str] | None = None
        for number, record in records:
            where = f"{file.path}, record {number}"
            if isinstance(record, dict):
                columns = columns or self._choose(list(record), where)
                missing = [name for name in columns if name not in record]
                if missing:
                    raise UserError(f"{where} has no {missing[0]!r}.{suggest(missing[0], record, 'entry')}")
                text = "\n".join(_as_text(record[name], f"{where}: {name!r}") for name in columns)
            else:
                text = _as_text(record, where)
            yield from _document(file, number, text)

    def _table(self, file: File) -> Iterator[Document]:
        csv.field_size_limit(sys.maxsize)
        tabs = _kind(file.name) == ".tsv"
        options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
        with self._text(file) as lines:
            rows = csv.reader(lines, strict=True, **options)
            places: list[int] | None = None
            if self.columns and all(name.isdigit() for name in self.columns):
                places = [int(name) for name in self.columns]
            for row in rows:
                if not row:
                    continue
                where = f"{file.path}, line {rows.line_num}"
                if places is None:
                    columns = self._choose(row, f"the first line of {file.path}")
                    places = [row.index(name) for name in columns]
                    continue
                if max(places) >= len(row):
                    raise UserError(f"{where} has {len(row)} columns; column {max(places)} (from 0) is not there.")
                yield from _document(file, rows.line_num, "\n".join(row[place] for place in places))

    def _parquet(self, file: File) -> Iterator[Document]:
        parquet = _optional("pyarrow.parquet", "pyarrow", file.path)
        table = parquet.ParquetFile(file.path)
        columns = self._choose(table.schema_arrow.names, file.path)
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=list(columns)):
            for row in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                number += 1
                where = f"{file.path}, row {number}"
                yield from _document(file, number, "\n".join(_as_text(value, where) for value in row))

    def _choose(self, names: Sequence[str], where: str) -> Sequence[str]:
        """The columns to read, of those there are."""
        for name in self.columns:
            if name not in names:
                raise UserError(f"{where} has no column {name!r}.{suggest(name, names, 'column')}")
        for known in (self.columns, *_COLUMNS):
            if known and set(known) <= set(names):
                return known
        if len(names) == 1:
            return names
        shown = ", ".join(repr(name if len(name) < 30 else name[:27] + "...") for name in names[:6])
        raise UserError(
            f"{where} has the columns {shown}; name those to read with columns=('...',), by number from 0 where a table"
            " has no header."
        )


def _document(file: File, number: int, text: str) -> Iterator[Document]:
    if text.strip():
        yield Document(f"{file.name}:{number}", (_checked(text, f"{file.path}, record {number}"),))


def _checked(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half a character (a lone surrogate, {text[error.start]!r}).") from error
    return text


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if value is None:
        return ""
    raise UserError(f"{where} is {type(value).__name__}, not text or a list of texts.")


# ------------------------------------------------------------------------------------------------------------- files


def list_files(root: str) -> list[File]:
    """The files below a folder that hold documents, by name; or the file itself, of whatever kind.

    Links are followed; hidden files, READMEs and licences are left out.

    Raises:
      UserError: there is nothing there, or nothing that holds documents.
    """
    folder = os.path.expanduser(root)
    if os.path.isfile(folder):
        return [_file(os.path.basename(folder), folder)]
    if not os.path.isdir(folder):
        parent = os.path.dirname(os.path.abspath(folder))
        beside = sorted(os.listdir(parent))[:200] if os.path.isdir(parent) else []
        hint = suggest(os.path.basename(folder), beside, "name")
        raise UserError(f"there is no file or folder {root}.{hint if 'Did you mean' in hint else ''}")
    found, seen = [], set()
    others: Counter[str] = Counter()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link to a folder above would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.startswith(".") or _NOT_DATA.match(name):
                continue
            if _kind(name) in _PLAIN | {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"}:
                path = os.path.join(where, name)
                found.append(_file(os.path.relpath(path, folder).replace(os.sep, "/"), path))
            else:
                others[_kind(name) or "without suffix"] += 1
    if not found:
        have = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3)) or "nothing"
        raise UserError(f"{root} holds no .txt, .md, .json, .jsonl, .csv, .tsv or .parquet files; it has {have}.")
    return sorted(found)


def split_of(files: Sequence[File], root: str) -> dict[str, str]:
    """The split of each file by its name, where all of them are named after splits; else nothing.

    ``train.tsv``, ``valid.txt``, ``test-00000-of-00002.parquet``, or folders ``train/``, ``dev/``.

    Raises:
      UserError: all files are named after splits, but none after train.
    """
    splits = {}
    for file in files:
        first = file.name.partition("/")[0]
        match = re.match(r"(train|validation|valid|val|dev|test)(?![A-Za-z])", first, re.IGNORECASE)
        if match is None:
            return {}
        splits[file.name] = _SPLITS[match.group(1).lower()]
    if len(files) == 1:
        return {}
    if "train" not in splits.values():
        names = ", ".join(file.name for file in files[:4])
        raise UserError(f"{root} has {names} but nothing named train; name one file as root to split that one.")
    return splits


def _file(name: str, path: str) -> File:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    return File(name, path, stat.st_size, stat.st_mtime_ns)


def _kind(name: str) -> str:
    """The suffix that tells the format, compression aside."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in _PACKED else suffix


def _open(path: str) -> Any:
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.lower().endswith(".zst"):
        reader = _optional("zstandard", "zstandard", path).ZstdDecompressor()
        stream = reader.stream_reader(open(path, "rb"), read_across_frames=True, closefd=True)  # noqa: SIM115
        return io.BufferedReader(stream, 1 << 20)
    return open(path, "rb")


def _optional(module: str, package: str, path: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"reading {path} needs the package {package}: pip install 'bigbase_jax[text]'.") from error


@contextlib.contextmanager
def _one_sentence(path: str, encoding: str) -> Iterator[None]:
    """What is wrong with a file, as the user's to mend."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not {encoding} (byte 0x{error.object[error.start]:02x}); convert it, or set encoding, for"
            " example to gb18030."
        ) from error
    except _errors() as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}.") from error


def _errors() -> tuple[type[BaseException], ...]:
    """What a reader raises for a file that is not what its name says."""
    found: list[type[BaseException]] = [OSError, EOFError, zlib.error, csv.Error, RecursionError]
    for module, name in (("zstandard", "ZstdError"), ("pyarrow", "ArrowException")):
        if sys.modules.get(module) is not None:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)
