"""Rows that may not be read: those without consent, and those that were to be deleted before today."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError
from bigbase_jax.data.files import File
from bigbase_jax.runtime.log import say

T = TypeVar("T")
_YES = frozenset(("true", "yes", "y", "1", "1.0", "t"))


@dataclasses.dataclass
class Permission:
    """What ``consent`` and ``retention`` of a file's ``limits`` let be read of it; counts what they do not.

    A row has consent where its column says true, yes or 1, and nothing else is consent. It is kept until the end of the
    day (UTC) that its other column says, in ISO 8601; where that is empty, for good.
    """

    file: File
    refused: int = 0
    expired: int = 0

    @property
    def columns(self) -> list[str]:
        """The columns that it reads; without any, everything may be read."""
        limits = self.file.limits
        return [name for name in (limits.consent, limits.retention) if name is not None]

    def check(self, names: Iterable[str]) -> None:
        """
        Raises:
          UserError: a table has no such column.
        """
        there = list(names)
        for name in self.columns:
            if name not in there:
                raise UserError(f"{self.file} has no column {name!r} to be read by.{suggest(name, there, 'column')}")

    def allows(self, row: Mapping[str, Any], where: object = "") -> bool:
        """Whether a row may be read.

        Raises:
          UserError: the day until when it may is none.
        """
        limits = self.file.limits
        if limits.consent is not None and str(row.get(limits.consent)).strip().lower() not in _YES:
            self.refused += 1
            return False
        if limits.retention is not None and (until := _day(row.get(limits.retention), where or self.file)) is not None:
            over = until < datetime.datetime.now(datetime.UTC).date()
            self.expired += over
            return not over
        return True

    def of(self, rows: Iterable[T], values: Callable[[T], Mapping[str, Any]]) -> Iterator[T]:
        """Those rows that may be read; says how many may not."""
        for number, row in enumerate(rows, 1):
            if not self.columns or self.allows(values(row), f"{self.file}, row {number}"):
                yield row
        self.tell()

    def places(self, columns: Sequence[Sequence[Any]]) -> list[bool]:
        """Which rows may be read, of the values of ``columns``."""
        return [self.allows(dict(zip(self.columns, cells, strict=True))) for cells in zip(*columns, strict=True)]

    def tell(self) -> None:
        """Says how many rows were not read."""
        if self.refused or self.expired:
            parts = [f"{self.refused:,} without consent"] * bool(self.refused)
            parts += [f"{self.expired:,} past their day"] * bool(self.expired)
            _say(f"data: not read of {self.file}: {' and '.join(parts)}")


@functools.lru_cache(maxsize=1024)
def _say(line: str) -> None:
    """Says it once, however often a file is read."""
    say(line)


def _day(value: Any, where: object) -> datetime.date | None:
    if isinstance(value, datetime.datetime):
        return value.date()
    if isinstance(value, datetime.date):
        return value
    text = "" if value is None else str(value).strip()
    if text.lower() in ("", "nan", "nat", "none", "null"):
        return None
    try:
        return datetime.datetime.fromisoformat(text).date()
    except ValueError as error:
        raise UserError(f"{where}: until {text[:30]!r} is no day such as 2027-05-31, so nobody knows.") from error
