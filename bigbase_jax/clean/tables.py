"""Rows of tables: what is empty, infinite or without an answer goes, and what is there twice, in any split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any, ClassVar

from bigbase_jax.build import suggest
from bigbase_jax.clean.read import key_of, name_of, source_of
from bigbase_jax.core import UserError
from bigbase_jax.data.columns import MISSING
from bigbase_jax.data.files import TABLES, File
from bigbase_jax.data.rows import rows

_OWN = ("key", "id", "split", "digest", "dropped", "of")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """A row for each one of the tables, each cell as text. It takes the place of ``read.Read``.

    Attributes:
      columns: those that are kept; each table has to have them.
      id: the column that names a row; None: its file and number do.
      encodings: the first by which a file can be read is taken.

    Raises:
      UserError: there is no column, or one whose name the steps use themselves.
    """

    columns: tuple[str, ...]
    id: str | None = None
    encodings: tuple[str, ...] = ("utf-8", "gb18030")

    name = "rows"
    kinds = TABLES

    def __post_init__(self) -> None:
        if not self.columns:
            raise UserError("the rows of tables need their columns; give rows=COLUMN+COLUMN.")
        if own := sorted(set(self.columns) & set(_OWN)):
            raise UserError(f"the column {own[0]!r} has a name that cleaning uses itself; rename it, or leave it out.")

    @property
    def schema(self) -> dict[str, str]:
        """By column, the name of its Arrow type."""
        return {"key": "uint64", **dict.fromkeys(("id", "source", "split", *self.columns), "large_string")}

    def documents(self, file: File, encoding: str, split: str) -> Iterator[dict[str, Any]]:
        """Rows of ``schema`` of one file."""
        for row in rows(file, encoding):
            if row.error:
                raise UserError(row.error)
            if lost := [name for name in self.columns if name not in row.values]:
                raise UserError(f"{row.where} has no column {lost[0]!r}.{suggest(lost[0], row.values, 'column')}")
            name = name_of(file, row.number, row.values, self.id)
            cells = {c: None if row.values[c] is None else str(row.values[c]) for c in self.columns}
            yield {"key": key_of(name, split), "id": name, "source": source_of(file), "split": split, **cells}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowChecks:
    """Drops rows without a value, without an answer, or with an infinite number; what of them is equal has one
    ``digest``, for ``ExactDuplicates``.

    Attributes:
      columns: those that are looked at.
      answer: the one that has to be there, if any.
    """

    columns: tuple[str, ...]
    answer: str | None = None

    name = "row_checks"

    gives: ClassVar = {"digest": "string", "dropped": "string"}

    def __post_init__(self) -> None:
        if self.answer is not None and self.answer not in self.columns:
            raise UserError(f"no column is the answer {self.answer!r}.{suggest(self.answer, self.columns, 'column')}")

    @property
    def reads(self) -> tuple[str, ...]:
        return self.columns

    def __call__(self, table: Any) -> dict[str, list[Any]]:
        cells = [[_cell(value) for value in table[name].to_pylist()] for name in self.columns]
        found = [dict(zip(self.columns, row, strict=True)) for row in zip(*cells, strict=True)]
        return {"digest": [_digest(row) for row in found], "dropped": [self._why(row) for row in found]}

    def _why(self, row: dict[str, str | None]) -> str | None:
        if all(value is None for name, value in row.items() if name != self.answer):
            return "empty"
        if self.answer is not None and row[self.answer] is None:
            return "no answer"
        return "infinite" if any(value and _infinite(value) for value in row.values()) else None


def _cell(value: str | None) -> str | None:
    value = (value or "").strip()
    return None if value in MISSING else value


def _infinite(value: str) -> bool:
    return value.lower().lstrip("+-") in ("inf", "infinity")


def _digest(row: dict[str, str | None]) -> str:
    return hashlib.blake2b(json.dumps([*row.values()]).encode(), digest_size=16).hexdigest()
