"""Whom to recommend something to: rows with a user, a history or an item, as a model of histories reads them."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from bigbase_jax.core import Codec, Example, Fields, UserError

_ENTRIES = {
    "history": ("history", "items", "item_history"),
    "item": ("item", "item_id", "itemid", "movieid", "asin", "product"),
    "user": ("user", "user_id", "userid", "reviewerid", "customer"),
}
_MOST = 100_000  # characters of a history


@dataclasses.dataclass(frozen=True)
class HistoryCodec(Codec):
    """Reads rows with one of: ``history``, names or titles of items, the latest last, as a list, as JSON, or separated
    by ``;``, ``|``, commas or else spaces; ``item``, a history of one; ``user``, of the log, where the history is read.

    Attributes:
      item_names, item_titles: of items 1, 2, ...; titles may be none.
      length: of the history that the model reads; of longer ones, the latest.
      history_of: of a user by name, items and the user's number, or None where there is no such user.
      about: what else is known of a user by number.
    """

    item_names: Sequence[str]
    item_titles: Sequence[str]
    length: int
    history_of: Callable[[str], tuple[np.ndarray, int] | None]
    about: Callable[[int], Mapping[str, Any]] = lambda user: {}
    fields: ClassVar[Fields | None] = Fields()  # type: ignore[misc]

    @functools.cached_property
    def _numbers(self) -> Mapping[str, int]:
        titles = {title: i for i, title in enumerate(self.item_titles, 1)}
        return {**titles, **{name: i for i, name in enumerate(self.item_names, 1)}}

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """``history`` i32[L] with 0 behind the items, ``user`` i32 (-1: not known) and ``unknown``, names of no item;
        where they are given, ``item`` i32 and ``top``, how many items are wanted.

        Raises:
          UserError: there is no such user or none of the items is known, or it is no row.
        """
        if not isinstance(given, Mapping):
            raise UserError("this model reads rows with a user, a history or an item: a table, or JSON.")
        found = {name.lower(): value for name, value in given.items() if value is not None and value != ""}
        entry, value = next(
            ((entry, found[name]) for entry, names in _ENTRIES.items() for name in names if name in found), ("", None)
        )
        if not entry:
            raise UserError(f"the row has no 'user', 'history' or 'item'; it has {', '.join(map(repr, given))}.")
        user, unknown = -1, []
        if entry == "user":
            known = self.history_of(str(value))
            if known is None:
                raise UserError(f"there is no user {str(value)!r} in the log; give a history instead.")
            items, user = known
        else:
            names = self._names(value) if entry == "history" else [str(value)]
            unknown = [name for name in names if name not in self._numbers]
            items = np.array([self._numbers[name] for name in names if name in self._numbers], np.int32)
            if not len(items):
                raise UserError(
                    f"the model knows none of these items: {', '.join(map(repr, unknown[:5]))}; it knows "
                    f"{len(self.item_names):,}, such as {self.item_names[0]!r}."
                )
        latest = items[-self.length :]
        history = np.pad(latest, (0, self.length - len(latest))).astype(np.int32)
        more = self.about(user) if user >= 0 else {}
        example = {**more, "history": history, "user": np.int32(user), "unknown": unknown}
        if entry == "item":
            example["item"] = history[0]
        if "top" in found:
            if not str(found["top"]).isdecimal() or int(found["top"]) < 1:
                raise UserError(f"top is {found['top']!r}; it says how many items are wanted, such as 10.")
            example["top"] = int(found["top"])
        return [example]

    def fit(self, example: Example, shapes: Mapping[str, tuple[int, ...]]) -> Example:
        """Nothing is known of what the example does not have."""
        return {**{name: np.zeros(shape, np.int32) for name, shape in shapes.items()}, **example}

    def _names(self, value: Any) -> list[str]:
        if isinstance(value, str):
            if len(value) > _MOST:
                raise UserError(f"the history has {len(value):,} characters; at most {_MOST:,} are read.")
            if value in self._numbers:
                return [value]
            try:
                value = json.loads(value)
            except ValueError:
                mark = next((mark for mark in ";|," if mark in value), r"\s")
                value = [name.strip() for name in re.split(f"[{mark}]", value) if name.strip()]
        return [str(name) for name in (value if isinstance(value, list) else [value])]
