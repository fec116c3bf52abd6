"""From files to a table of documents: each file is a partition of its own, read or set aside as a whole."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from bigbase_jax.clean.engine import arrow_type
from bigbase_jax.core import UserError
from bigbase_jax.data.documents import Format
from bigbase_jax.data.files import (
    PLAIN,
    TABLES,
    File,
    existing,
    file_at,
    kind_of,
    list_files,
    named_after,
    optional,
    walk,
)
from bigbase_jax.data.rows import rows
from bigbase_jax.data.sources.splits import digest

PAGES = frozenset({".html", ".htm"})
KINDS = PLAIN | TABLES | PAGES | {".pdf", ".warc"}
SPLITS = ("test", "val", "train")
"""By rank: of two documents that are alike, the one of the earlier split stays."""
_BATCH = 512  # documents
_MANY = 16 << 20  # characters of a batch


def key_of(name: str, split: str = "train") -> int:
    """u64: the rank of its split in 2 bits, and 62 bits of the hash of its id."""
    found = int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "big")
    return SPLITS.index(split) << 62 | found >> 2


def name_of(file: File, number: int, values: Mapping[str, Any], id: str | None) -> str:
    """What a document is called: the value of its column ``id``, or else its file and its number there.

    Raises:
      UserError: it has no value there.
    """
    if id is None:
        return f"{file.name}:{number}"
    if values.get(id) in (None, ""):
        raise UserError(f"{file}, row {number} has no {id!r}; choose another id column, or leave out id.")
    return str(values[id])


def source_of(file: File) -> str:
    """Where a document is from, if no column says it: the folder below the root, or the file without its suffix."""
    return file.name.split("/")[0].partition(".")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """Documents of files: text, JSON lines, CSV, TSV, Excel, Parquet, Arrow, HTML, WARC and PDF, packed or not.

    A file that cannot be read is set aside, by name. Of an HTML page the main text is taken (trafilatura), of a PDF the
    text of its pages (pypdf, where it is installed).

    Attributes:
      columns: of rows, whose texts are joined by line ends; empty: as ``Format`` finds them.
      id: the column that names a document; None: its file and number do.
      keep: columns that are kept through, where a row has them, as text.
      unit: what a document is in plain text: "file", "line" or "paragraph".
      encodings: the first by which a file can be read is taken.
    """

    columns: tuple[str, ...] = ()
    id: str | None = None
    keep: tuple[str, ...] = ("source", "license", "url")
    unit: str = "file"
    encodings: tuple[str, ...] = ("utf-8", "gb18030")

    kinds = KINDS
    name = "read"

    def __post_init__(self) -> None:
        Format(self.unit, tuple(self.columns), self.encodings[0])

    @property
    def schema(self) -> Mapping[str, Any]:
        """By column, the name of its Arrow type."""
        return {"key": "uint64", **dict.fromkeys(("id", "text", "source", "split", *self.keep), "large_string")}

    def documents(self, file: File, encoding: str, split: str) -> Iterator[dict[str, Any]]:
        """Rows of ``schema`` of one file."""
        kind = kind_of(file.name)
        beside = {"source": source_of(file), "split": split}
        for number, text, values in self._texts(file, kind, encoding):
            name = name_of(file, number, values, self.id)
            kept = {k: None if values.get(k) is None else str(values[k]) for k in self.keep}
            kept["source"] = kept.get("source") or beside["source"]
            yield {**beside, "key": key_of(name, split), "id": name, "text": text, **kept}

    def _texts(self, file: File, kind: str, encoding: str) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
        if kind in PAGES:
            yield 1, _page(pathlib.Path(file.path).read_bytes()), {}
        elif kind == ".pdf":
            reader = optional("pypdf", "pypdf", str(file)).PdfReader(file.path)
            yield 1, "\n\n".join(page.extract_text() for page in reader.pages), {}
        elif kind == ".warc":
            yield from _archived(file)
        elif kind in TABLES:
            chosen: Sequence[str] = ()
            for row in rows(file, encoding):
                # ``Format`` says which columns there have to be, by those of the first row
                chosen = chosen or Format(self.unit, tuple(self.columns))._choose(list(row.values), row.where)
                parts = [row.values.get(name) for name in chosen]
                lines = ["\n".join(map(str, p)) if isinstance(p, list) else str(p) for p in parts if p is not None]
                yield row.number, "\n".join(lines), row.values
        else:
            for number, document in enumerate(Format(self.unit, (), encoding).documents(file), 1):
                yield number, "".join(document.blocks), {}


def _page(data: bytes, url: str | None = None) -> str:
    trafilatura = optional("trafilatura", "trafilatura", "HTML")
    return trafilatura.extract(data, url=url, include_comments=False) or ""


def _archived(file: File) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """The main text of each HTML response of a WARC file."""
    warc = optional("warcio.archiveiterator", "warcio", str(file))
    with open(file.path, "rb") as raw:
        for number, record in enumerate(warc.ArchiveIterator(raw), 1):
            kind = record.http_headers and record.http_headers.get_header("Content-Type", "")
            if record.rec_type == "response" and "html" in (kind or ""):
                url = record.rec_headers.get_header("WARC-Target-URI")
                yield number, _page(record.content_stream().read(), url), {"url": url}


def found(root: str, kinds: frozenset[str] = KINDS) -> tuple[list[tuple[File, str]], list[tuple[str, str]]]:
    """The files of some kinds below a folder with their splits, by name; and what is left out, each with why.

    Links are followed, each folder once. A file or an archive may be the root too.

    Raises:
      UserError: there is nothing to read.
    """
    folder = existing(root, "file or folder")
    left: list[tuple[str, str]] = []
    files: list[File] = []
    if os.path.isfile(folder):
        files = [file_at(os.path.basename(folder), folder)] if kind_of(folder) in kinds else list_files(root)
    else:
        for name, path in walk(folder):
            try:
                if kind_of(name) in kinds:
                    files.append(file_at(name, path))
                else:
                    left.append((name, f"{kind_of(name) or 'no suffix'} is not read"))
            except UserError as error:  # a dangling link, a pipe
                left.append((name, str(error)))
    if not files:
        raise UserError(f"{root} holds nothing to clean ({', '.join(sorted(kinds))}).")
    return [(file, _split(file)) for file in sorted(files)], left


def _split(file: File) -> str:
    names = (named_after(part) for part in file.name.split("/"))
    return next((split for split in names if split), "train")


@dataclasses.dataclass(frozen=True)
class ReadFile:
    """Writes the documents of files, one by one, as Parquet files of a folder. See ``engine.mapped``."""

    reader: Any
    files: tuple[tuple[File, str], ...]
    folder: str
    forgotten: frozenset[int] = frozenset()

    reads = ("file",)

    gives: ClassVar = {
        **dict.fromkeys(("rows", "bytes"), "int64"),
        **dict.fromkeys(("digest", "encoding", "error"), "string"),
    }

    def __call__(self, batch: Any) -> dict[str, list[Any]]:
        told = [self._read(index) for index in batch["file"].to_pylist()]
        return {name: [t.get(name) for t in told] for name in self.gives}

    def _read(self, index: int) -> dict[str, Any]:
        file, split = self.files[index]
        error = ""
        for encoding in self.reader.encodings:
            try:
                count, size = self._write(index, self.reader.documents(file, encoding, split))
                if not count:
                    return {"rows": 0, "bytes": 0, "error": "it holds no text"}
                return {"rows": count, "bytes": size, "digest": _digest(file.path), "encoding": encoding}
            except UserError as problem:
                error = error or str(problem)
            except Exception as problem:  # of a parser of HTML, PDF or WARC, given anything
                if isinstance(problem, OSError) and problem.errno in (28, 27, 122):
                    raise  # the disk
                error = error or f"{file} cannot be read: {type(problem).__name__}: {str(problem)[:200]}"
        return {"rows": 0, "bytes": 0, "error": error}

    def _write(self, index: int, documents: Iterable[dict[str, Any]]) -> tuple[int, int]:
        """Rows, and bytes of their texts."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema({name: arrow_type(kind) for name, kind in self.reader.schema.items()})
        path = pathlib.Path(self.folder, f"part-{index:06}.parquet")
        count = size = weight = 0
        batch: list[dict[str, Any]] = []
        try:
            with pq.ParquetWriter(path, schema, compression="zstd") as writer:
                for row in documents:
                    if row["key"] in self.forgotten:
                        continue
                    batch.append(row)
                    count, weight = count + 1, weight + len(row.get("text") or "")
                    size += len((row.get("text") or "").encode("utf-8", "replace"))
                    if len(batch) >= _BATCH * 16 or weight > _MANY:
                        writer.write_table(pa.Table.from_pylist(batch, schema))
                        batch, weight = [], 0
                writer.write_table(pa.Table.from_pylist(batch, schema))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return count, size


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def signature(files: Iterable[tuple[File, str]], *more: Any) -> str:
    """What changes when the input, or how it is cleaned, does."""
    return digest([[file.file_signature, split] for file, split in files] + [repr(more)])
