"""Logs of who chose what (``user item [rating] [time]``) as histories, for recommendation.

The interactions of all users lie in one array in columns on disk, user by user, each user's in order of time, with the
places at which users begin (compressed sparse rows). Building it takes memory for ids and for some millions of
interactions, however long the log is. Items are numbered from 1, 0 is padding; users from 0.

Of each user, interactions up to some place are ``train``, those up to a second place ``val``, the rest ``test``:

- ``split="last"``: the last interaction is test, the one before it val (Kang & McAuley 2018); users with fewer than
  three are train alone. Interactions of train may be later than another user's of test, which is said.
- ``split="time"``: whatever is later than a moment that all users share is val, later than another test.

Examples, with L = ``length``:

- train: ``user`` i32[], ``history`` i32[L], 0 behind its items, and ``target`` i32[L], the item after each place;
- train with ``pairs=True``: an example per interaction: ``user``, ``history``, ``item`` i32[] and ``log_q`` f32[], the
  logarithm of the item's share of the interactions of train, and what else is known of the user and of the item;
- val and test: ``user``, ``history``, and ``target`` i32[], the first item after it; with ``pairs=True`` also what an
  example of train has, of that item.

Legend: T interactions, U users, I items, N examples of a split, n some of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

from bigbase_jax.core import Batch, UserError
from bigbase_jax.data.cache import Store, Write, Writer, default_root, kept, source_digest
from bigbase_jax.data.columns import Column, Texts, read_columns, table_files
from bigbase_jax.data.files import LIMITS, TABLES, File, Limits, kind_of, list_files, optional
from bigbase_jax.data.rows import is_number
from bigbase_jax.data.sources.splits import Read, Split, digest
from bigbase_jax.data.sources.table.catalogue import Attributes, Known
from bigbase_jax.data.sources.table.history_codec import HistoryCodec
from bigbase_jax.data.windows import places_of
from bigbase_jax.runtime.log import say

SPLITS = ("train", "val", "test")


class Log(NamedTuple):
    """Interactions in the order in which they were written down.

    Attributes:
      user, item: [T], whole numbers: ids, or places in the names; below 0, or not finite: missing.
      time: numbers or datetime64 [T]; None: they are in order.
      user_names, item_names: of these places; None: the ids are numbers of any size.
      rating: numbers [T], of which those below ``min_rating`` leave an interaction out.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray | None = None
    user_names: Sequence[str] | None = None
    item_names: Sequence[str] | None = None
    rating: np.ndarray | None = None
    min_rating: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interactions(Read):
    """A log, and how histories are made of it; ``prepare`` reads it. Subclasses say where it comes from.

    Attributes:
      length: L; of longer histories the latest, and for training the others too, each L an example.
      pairs: whether an example of train is one interaction instead of a user.
      split: "last" or "time".
      core: users and items with fewer interactions are left out until there is none such; 0: all stay.
      repeats: whether later interactions of a user with the same item count.
      val_fraction, test_fraction: of ``split="time"``, shares of the interactions.

    Raises:
      UserError: a value out of its range.
    """

    length: int = 50
    pairs: bool = False
    split: str = "last"
    core: int = 0
    repeats: bool = True
    val_fraction: float = 0.1
    test_fraction: float = 0.1

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"length is {self.length}; it must be at least 1.")
        if self.split not in ("last", "time"):
            raise UserError(f"split is {self.split!r}; it is 'last' (leave the last one out) or 'time'.")
        if not 0 < self.val_fraction + self.test_fraction < 1 or min(self.val_fraction, self.test_fraction) < 0:
            raise UserError("val_fraction and test_fraction are at least 0, and together above 0 and below 1.")

    def codec(self, config: Any, dataset_info: Mapping[str, Any]) -> HistoryCodec:
        """Reads the log where a row names a user, and else nothing of it."""
        opened = functools.cache(lambda: self.prepare(default_root(None), 4e9, say))
        names, titles = dataset_info["item_names"], dataset_info.get("item_titles", ())

        def about(user: int) -> dict[str, Any]:
            return {name: x[0] for name, x in opened().users(np.array([user])).items()}

        return HistoryCodec(names, titles, dataset_info["length"], lambda user: opened().of_user(user), about)

    # -- what subclasses say ---------------------------------------------------------------------------------------

    def log(self, cache: pathlib.Path | None, limit_bytes: float, say: Callable[[str], None]) -> Log:
        """All interactions; what is read on the way may be kept below ``cache``."""
        raise NotImplementedError

    def known(self, side: str, names: Sequence[str]) -> tuple[Sequence[str], Known] | None:
        """What is known of all items (``side="item"``) or users ("user"), and the names of all that there are, those of
        the log first; None: nothing but the log."""
        return None

    # --------------------------------------------------------------------------------------------------------------

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Histories:
        """Sorts the log, unless that is in the cache; see ``core.RawDataset``.

        Raises:
          UserError: no interaction is left, or none to learn from or to test on.
        """
        how = [self.split, self.core, self.repeats, self.val_fraction, self.test_fraction]
        key = digest([source_digest("data.sources.table.interactions"), self.file_signature(), how])

        def begin() -> Write:
            log = self.log(cache if limit_bytes > 0 else None, limit_bytes, say)
            return lambda writer: _write(log, self, cache if cache.is_dir() else None, writer)

        store = kept(key, begin, cache, limit_bytes, say, f"sorting {self.origin()} once, by user and time")
        return Histories(store, self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InteractionFiles(Interactions):
    """A log in files; see ``data.columns``. Without a header, columns are called "0", "1", ..., and are user, item,
    rating and time in this order, as in the releases of SASRec and MovieLens.

    Attributes:
      root: a file, or a folder: in it, files called after ratings, interactions, reviews, clicks or events, one after
        another; else all.
      user, item, rating, time: columns; None: those that are usually called so, if there are some.
      min_rating: interactions with lower ratings, or none, are left out; None: all count.
      items, users: tables of what is known of them. Items that the log does not have are in the catalogue too, except
        with a ``core``.
      encoding: of all but Parquet and Arrow.
      limits: of reading a file.
    """

    root: str
    user: str | None = None
    item: str | None = None
    rating: str | None = None
    time: str | None = None
    min_rating: float | None = None
    items: Attributes | None = None
    users: Attributes | None = None
    encoding: str = "utf-8"
    limits: Limits = LIMITS

    def origin(self) -> str:
        return self.root

    def file_signature(self) -> list[Any]:
        names = [self.user, self.item, self.rating, self.time, self.min_rating, self.encoding]
        return [[file.file_signature for file in self._files()], names]

    def log(self, cache: pathlib.Path | None, limit_bytes: float, say: Callable[[str], None]) -> Log:
        """
        Raises:
          UserError: there are no columns of users and items, or a file cannot be read.
        """
        files = self._files()
        header, names = self._columns(files[0])
        if self.min_rating is None:
            names.pop("rating", None)
        elif "rating" not in names:
            raise UserError(f"{files[0]} has no column of ratings, which min_rating asks for; name it with rating=...")

        def read(kinds: Mapping[str, str]) -> dict[str, Column]:
            given: dict[str, Any] = {"cache": cache, "limit_bytes": limit_bytes, "say": say, "encoding": self.encoding}
            found = read_columns(files, kinds=kinds, header=header, columns=set(names.values()), **given)
            return {kind: found[name] for kind, name in names.items()}

        columns = read({})
        texts = {names[kind]: "category" for kind in ("user", "item") if columns[kind].kind in ("text", "date")}
        columns = read(texts) if texts else columns
        user, item, time, rating = (columns.get(kind) for kind in ("user", "item", "time", "rating"))
        assert user is not None and item is not None
        if time is not None and time.kind not in ("number", "date"):
            raise UserError(f"{files[0]}: {time.name} holds no times but a {time.kind}; name the column with time=...")
        if rating is not None and rating.kind != "number":
            raise UserError(f"{files[0]}: {rating.name} holds no ratings but a {rating.kind}; name it with rating=...")
        return Log(
            user.values,
            item.values,
            time and time.values,
            user.names if user.kind == "category" else None,
            item.names if item.kind == "category" else None,
            rating and rating.values,
            self.min_rating,
        )

    def known(self, side: str, names: Sequence[str]) -> tuple[Sequence[str], Known] | None:
        table = self.items if side == "item" else self.users
        return None if table is None else table.read(names, grows=side == "item" and not self.core)

    def _files(self) -> list[File]:
        """
        Raises:
          UserError: there are none.
        """
        if not os.path.isdir(os.path.expanduser(self.root)):
            return table_files(self.root, self.encoding, self.limits)
        there = list_files(self.root, self.limits)
        found = [file for file in there if kind_of(file.name) in TABLES] or there
        return [file for file in found if _LOGS.search(file.name.lower())] or found

    def _columns(self, file: File) -> tuple[bool, dict[str, str]]:
        """Whether the files have a header, and which columns are which."""
        from bigbase_jax.data.column_files import first_names

        optional("pyarrow", "pyarrow", str(file))
        cells = first_names(file, self.encoding)
        asked = {kind: name for kind in _USUAL if (name := getattr(self, kind)) is not None}
        names = {kind: cell for kind, usual in _USUAL.items() for cell in cells if _plain_name(cell) in usual} | asked
        header = not set(names.values()).isdisjoint(cells)
        by_place = all(name.isdigit() for name in asked.values())
        if not header and by_place and len(cells) >= 2 and any(map(_is_number, cells)):
            order = ["user", "item", "rating", "time"]
            if len(cells) == 3 and not (_is_number(cells[2]) and float(cells[2]) < _LEAST_TIME):
                order.remove("rating")
            return False, {kind: str(i) for i, kind in enumerate(order[: len(cells)])} | asked
        for kind in ("user", "item"):
            if kind not in names:
                raise UserError(
                    f"{file} has the columns {', '.join(cells)[:200]}; say which holds the {kind}s with {kind}=..."
                )
        return True, names


_USUAL = {
    "user": ("user", "user_id", "userid", "uid", "reviewerid", "visitorid", "session_id"),
    "item": ("item", "item_id", "itemid", "movieid", "movie_id", "asin", "parent_asin", "product_id", "productid"),
    "rating": ("rating", "ratings", "stars", "overall", "score"),
    "time": ("timestamp", "time", "date", "datetime", "unixreviewtime", "ts"),
}
_LOGS = re.compile("rating|interaction|[.]inter$|review|click|event")
_LEAST_TIME = 1e6  # a number from here on is no rating


def _plain_name(cell: str) -> str:
    """A column's name without case, and without the type that RecBole's files add to it (``user_id:token``)."""
    return cell.strip().lower().partition(":")[0]


def _is_number(cell: str) -> bool:
    return is_number(cell) and bool(np.isfinite(float(cell)))


class Histories:
    """A ``Dataset`` of histories.

    Attributes:
      kept: where it is, for people.
      pairs: see ``Interactions``.
      item_names: [I], of the items from 1 on.
      user_names: [U].
      counts: i64[I + 1], how often each item is in train.
      best: where the best possible scores are known: f32[n, I + 1], of histories i32[n, S] as ``Targets.seen`` has.
      dataset_info: ``num_items`` (I; a table of items has I + 1 rows), ``num_users``, ``length``, ``item_names``; and
        where more is known, ``item_titles``, how many words there are (``item_words``, ``user_words``), and how wide
        ``item_features`` are.
    """

    best: Callable[[np.ndarray], np.ndarray] | None = None

    def __init__(self, store: Store, made: Interactions):
        about, self._made, self.kept, self.pairs = store.about, made, store.kept, made.pairs
        self._items, start = store.get("items", 0), store.get("start", 0)
        self._begin, self._train, self.counts = start[:-1], store.get("train_stop", 0), store.get("counts", 0)
        self.item_names: Sequence[str] = _names(store, "item")
        self.user_names: Sequence[str] = _names(store, "user")
        val = store.get("val_stop", 0)
        self._known: dict[str, Known] = {}
        if (items := made.known("item", self.item_names)) is not None:
            self.item_names, self._known["item"] = items
            self.counts = np.pad(self.counts, (0, 1 + len(self.item_names) - len(self.counts)))
        if (users := made.known("user", self.user_names)) is not None:
            self._known["user"] = users[1]
        self.dataset_info: Mapping[str, Any] = {
            "num_items": len(self.item_names),
            "num_users": len(self.user_names),
            "length": made.length,
            "item_names": tuple(self.item_names),
            **{f"{side}_words": known.buckets for side, known in self._known.items()},
            **{
                f"{side}_features": known.features.shape[1]
                for side, known in self._known.items()
                if known.features is not None
            },
            **({"item_titles": self._known["item"].titles} if items and items[1].titles else {}),
        }
        splits: dict[str, Split] = {"train": self._interactions() if made.pairs else self._sequences()}
        for split, end, stop in (("val", self._train, val), ("test", val, start[1:])):
            user = np.flatnonzero((stop > end) & (end > self._begin))
            splits[split] = Targets(self, split, user, self._begin[user], end[user], stop[user])
        self.splits = {name: split for name, split in splits.items() if len(split)}
        self.description = f"{made.origin()}: {about['said']}"

    def _sequences(self) -> Split:
        """Users of train; of a history longer than L as many examples as hold all of it, the latest first."""
        length_U, L = np.maximum(self._train - self._begin - 1, 0), self._made.length
        user, nth = places_of(-(-length_U // L))
        begin, end = self._begin[user], self._train[user] - 1 - nth * L

        def batch(indices: np.ndarray) -> Batch:
            history, target = (self.history(begin[indices], end[indices], ahead) for ahead in (0, 1))
            return {"user": user[indices].astype(np.int32), "history": history, "target": target}

        lengths, names = np.minimum(end - begin, L), self.named(user)
        return Split("train", len(user), None, self.kept, None, lengths, ("history", "target"), batch, names)

    def _interactions(self) -> Split:
        """Those of train, each an example."""
        first_U = np.cumsum(self._train - self._begin) - (self._train - self._begin)

        def users(indices: Any) -> Any:
            return np.searchsorted(first_U, indices, side="right") - 1

        def batch(indices: np.ndarray) -> Batch:
            user = users(indices)
            place = self._begin[user] + indices - first_U[user]
            history = self.history(self._begin[user], place)
            return {**self.users(user), "history": history, **self.items(self.item_at(place))}

        def name(index: int) -> str:
            user = int(users(index))
            return f"user {self.user_names[user]}, interaction {index + 1 - first_U[user]}"

        return Split("train", int((self._train - self._begin).sum()), None, self.kept, batch=batch, name=name)

    def named(self, user_N: np.ndarray) -> Callable[[int], str]:
        """What calls an example after its user."""
        return lambda index: f"user {self.user_names[user_N[index]]}"

    def fingerprint(self) -> str:
        """A digest of the log and of what is made of it."""
        tables = [table.file_signature() for table in vars(self._made).values() if isinstance(table, Attributes)]
        return digest([self._made.file_signature(), dataclasses.astuple(self._made), *tables])

    def items(self, ids: np.ndarray) -> Batch:
        """What is known of items [n]: ``item`` i32[n], ``log_q`` f32[n], the logarithm of its share of train (-inf: it
        has none), and where there is a table of items, what ``Known.batch`` gives."""
        with np.errstate(divide="ignore"):
            log_q = np.log(self.counts[ids] / max(self.counts.sum(), 1)).astype(np.float32)
        more = self._known["item"].batch("item", ids) if "item" in self._known else {}
        return {"item": np.asarray(ids, np.int32), "log_q": log_q, **more}

    def users(self, numbers: np.ndarray) -> Batch:
        """The same of users [n]: ``user`` i32[n] (-1: nobody that is known), and what a table has."""
        more = self._known["user"].batch("user", 1 + numbers) if "user" in self._known else {}
        return {"user": np.asarray(numbers, np.int32), **more}

    def history(self, begin: np.ndarray, end: np.ndarray, ahead: int = 0) -> np.ndarray:
        """i32[n, L]: the latest L items of the places from ``begin`` to before ``end``, or those that come ``ahead``
        places after these; 0 behind them."""
        place = np.maximum(begin, end - self._made.length)[:, None] + np.arange(self._made.length)
        real = place < end[:, None]
        return np.where(real, self._items[np.where(real, place + ahead, 0)], 0)

    def of_user(self, name: str) -> tuple[np.ndarray, int] | None:
        """All items of a user by name, and the user's number; None: there is none of this name."""
        user = self._number.get(name)
        if user is None:
            return None
        end = self._begin[user + 1] if user + 1 < len(self._begin) else len(self._items)
        return np.asarray(self._items[self._begin[user] : end]), user

    @functools.cached_property
    def _number(self) -> Mapping[str, int]:
        return {name: user for user, name in enumerate(self.user_names)}

    def item_at(self, place: np.ndarray) -> np.ndarray:
        """i32[n]: the items at places."""
        return self._items[place]

    def padded(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """i32[n, most]: all items of these places, with 0 behind them."""
        place = begin[:, None] + np.arange((end - begin).max(initial=1))
        real = place < end[:, None]
        return np.where(real, self._items[np.where(real, place, 0)], 0)

    def matrix(self, begin: np.ndarray | None = None, end: np.ndarray | None = None) -> scipy.sparse.csr_matrix:
        """f32[n, I + 1]: how often each item is among these places; None: those of train, of all users."""
        begin, end = self._begin if begin is None else begin, self._train if end is None else end
        stop = np.concatenate([[0], np.cumsum(end - begin)])
        items = self._items[np.arange(stop[-1]) + np.repeat(begin - stop[:-1], end - begin)]
        shape = (len(begin), len(self.item_names) + 1)
        found = scipy.sparse.csr_matrix((np.ones(len(items), np.float32), items, stop), shape)
        found.sum_duplicates()
        return found


class Targets(Split):
    """Users of val or test: example i had chosen what is at places ``begin`` to before ``end`` i64[N], and then what is
    at those to before ``stop``."""

    def __init__(
        self, of: Histories, split: str, user: np.ndarray, begin: np.ndarray, end: np.ndarray, stop: np.ndarray
    ):
        self._of, self._user, self.begin, self.end, self.stop = of, user, begin, end, stop
        lengths = np.minimum(end - begin, of.dataset_info["length"])
        super().__init__(split, len(user), None, of.kept, None, lengths, ("history",), self._batch, of.named(user))

    def _batch(self, indices: np.ndarray) -> Batch:
        end, user = self.end[indices], self._user[indices]
        target = self._of.item_at(end)
        found = {"user": user.astype(np.int32), "history": self._of.history(self.begin[indices], end), "target": target}
        return {**found, **self._of.users(user), **self._of.items(target)} if self._of.pairs else found

    def seen(self, indices: np.ndarray) -> np.ndarray:
        """i32[n, most]: all items that their users had chosen before, with 0 behind them."""
        return self._of.padded(self.begin[indices], self.end[indices])

    def relevant(self, indices: np.ndarray) -> np.ndarray:
        """i32[n, most]: all items that they chose afterwards, up to where the split ends, with 0 behind them."""
        return self._of.padded(self.end[indices], self.stop[indices])


class _Numbers(Sequence[str]):
    """Ids [n] as texts, each made when it is asked for."""

    def __init__(self, ids: np.ndarray):
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: Any) -> Any:
        return list(map(str, self._ids[index])) if isinstance(index, slice) else str(self._ids[index])


# --- from a log to histories ------------------------------------------------------------------------------------------

_ROWS = 1 << 22  # interactions that are sorted at once
_SAMPLED = 1 << 20  # times by which moments are found
_NEVER = np.iinfo(np.int64).min  # a time that is missing
_ROW = np.dtype([("user", np.int32), ("item", np.int32), ("time", np.int64)])


def _write(log: Log, made: Interactions, folder: pathlib.Path | None, writer: Writer) -> Mapping[str, Any]:
    """Adds the one row of the store; ``folder``: where there is room for the log while it is sorted."""
    user_ids, item_ids = _distinct(log.user), _distinct(log.item)
    if not len(user_ids) or not len(item_ids):
        raise UserError(f"{made.origin()} has no interaction.")
    if made.split == "time" and log.time is None:
        raise UserError(f"{made.origin()} says no times, and split='time' needs times; name their column with time=...")
    with contextlib.ExitStack() as files:
        parts, missing, lower = _parted(log, user_ids, item_ids, folder, files)
        timed = log.time is not None
        copied, again = np.sum([_sort(part, timed, made.repeats) for part in parts], 0)
        count_U, count_I = _core(parts, len(user_ids), len(item_ids), made.core)
        kept_U, kept_I = np.flatnonzero(count_U), np.flatnonzero(count_I)
        if not len(kept_U):
            raise UserError(
                f"{made.origin()}: no interaction is left of {len(log.user):,} where users and items have at least "
                f"{made.core} each; use a smaller core."
            )
        start = np.concatenate([[0], np.cumsum(count_U[kept_U])])

        def read() -> Iterator[np.ndarray]:
            return _numbered(parts, count_U, count_I)

        train, val, told = _last(read, start, timed) if made.split == "last" else _by_time(read, start, made)
        last = {
            "start": start,
            "train_stop": train,
            "val_stop": val,
            **_texts("user", user_ids[kept_U], log.user_names),
            **_texts("item", item_ids[kept_I], log.item_names),
        }
        counts, at = np.zeros(len(kept_I) + 1, np.int64), 0
        none = {name: x[:0] for name, x in {**last, "counts": counts}.items()}
        for rows in read():
            writer.extend({"items": rows["item"], **none})
            trained = at + np.arange(len(rows)) < train[rows["user"]]
            counts += np.bincount(rows["item"][trained], minlength=len(counts))
            at += len(rows)
        writer.add({"items": np.zeros(0, np.int32), **last, "counts": counts})
    said = f"{start[-1]:,} interactions of {len(kept_U):,} users with {len(kept_I):,} items"
    if missing:
        said += f"; {missing:,} without a user, an item or a time left out"
    if lower:
        said += f"; {lower:,} with a rating below {log.min_rating:g} left out"
    if copied:
        said += f"; {copied:,} copies of others left out"
    if again:
        said += f"; {again:,} later ones with the same item {'kept' if made.repeats else 'left out'}"
    if len(kept_U) < len(user_ids) or len(kept_I) < len(item_ids):
        users, items = len(user_ids) - len(kept_U), len(item_ids) - len(kept_I)
        where = f"outside the {made.core}-core" if made.core else "without any left"
        said += f"; {users:,} users and {items:,} items {where}"
    return {"said": f"{said}; {told}"}


def _blocks(size: int) -> Iterator[slice]:
    return (slice(at, at + _ROWS) for at in range(0, size, _ROWS))


def _whole(values: np.ndarray, none: int = -1) -> np.ndarray:
    """i64 of numbers or dates, ``none`` where there is none."""
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        return np.where(finite, np.floor(np.where(finite, values, 0)), none).astype(np.int64)
    return values.view(np.int64) if values.dtype.kind == "M" else values.astype(np.int64)


def _distinct(values: np.ndarray) -> np.ndarray:
    """The ids that there are, in ascending order."""
    found = np.zeros(0, np.int64)
    for block in _blocks(len(values)):
        found = np.union1d(found, _whole(values[block]))
    return found[found >= 0]


def _parted(
    log: Log, user_ids: np.ndarray, item_ids: np.ndarray, folder: pathlib.Path | None, files: contextlib.ExitStack
) -> tuple[list[Any], int, int]:
    """Files of interactions, those of a user in one, each of about as many as are sorted at once; how many lack a user,
    an item or a time, and how many have a lower rating."""
    count_U = np.zeros(len(user_ids), np.int64)
    for block in _blocks(len(log.user)):
        user = _whole(log.user[block])
        count_U += np.bincount(np.searchsorted(user_ids, user[user >= 0]), minlength=len(user_ids))
    part_U = (np.cumsum(count_U) - count_U) // _ROWS
    parts = [files.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(part_U[-1] + 1)]  # noqa: SIM115
    missing = lower = 0
    for block in _blocks(len(log.user)):
        user, item = _whole(log.user[block]), _whole(log.item[block])
        time = np.zeros(len(user), np.int64) if log.time is None else _whole(log.time[block], _NEVER)
        whole = (user >= 0) & (item >= 0) & (time != _NEVER)
        missing += len(user) - int(whole.sum())
        if log.rating is not None:
            low = whole & ~(log.rating[block] >= log.min_rating)
            lower, whole = lower + int(low.sum()), whole & ~low
        rows = np.empty(int(whole.sum()), _ROW)
        rows["user"] = np.searchsorted(user_ids, user[whole])
        rows["item"] = np.searchsorted(item_ids, item[whole])
        rows["time"] = time[whole]
        part = part_U[rows["user"]]
        for k in np.unique(part):
            parts[k].write(rows[part == k].tobytes())
    return parts, missing, lower


def _rows(part: Any) -> np.ndarray:
    part.seek(0)
    return np.fromfile(part, _ROW)


def _sort(part: Any, timed: bool, repeats: bool) -> np.ndarray:
    """Sorts a file by user and time, in the log's order where these are the same, without rows that are copies of
    another (of the same time), nor, unless ``repeats``, later ones of the same user and item. Returns how many there
    are of each, i64[2]."""
    rows = _rows(part)
    rows = rows[np.lexsort((rows["time"], rows["user"]))]
    order = np.lexsort((rows["item"], rows["user"]))
    first, then = rows[order[:-1]], rows[order[1:]]
    again = (first["user"] == then["user"]) & (first["item"] == then["item"])
    copied = again & (first["time"] == then["time"]) & timed
    left = np.ones(len(rows), bool)
    left[order[1:][copied if repeats else again]] = False
    part.seek(0)
    part.truncate()
    part.write(rows[left].tobytes())
    return np.array([copied.sum(), again.sum() - copied.sum()])


def _core(parts: Sequence[Any], users: int, items: int, core: int) -> tuple[np.ndarray, np.ndarray]:
    """i64 each, how many interactions each user and each item has in the k-core, 0 outside."""
    keep_U, keep_I = np.ones(users, bool), np.ones(items, bool)
    while True:
        count_U, count_I = np.zeros(users, np.int64), np.zeros(items, np.int64)
        for part in parts:
            rows = _rows(part)
            rows = rows[keep_U[rows["user"]] & keep_I[rows["item"]]]
            count_U += np.bincount(rows["user"], minlength=users)
            count_I += np.bincount(rows["item"], minlength=items)
        before = keep_U.sum() + keep_I.sum()
        keep_U, keep_I = count_U >= max(core, 1), count_I >= max(core, 1)
        if keep_U.sum() + keep_I.sum() == before or not keep_U.any():
            return np.where(keep_U, count_U, 0), np.where(keep_I, count_I, 0)


def _numbered(parts: Sequence[Any], count_U: np.ndarray, count_I: np.ndarray) -> Iterator[np.ndarray]:
    """The interactions of the core, with users numbered from 0 and items from 1."""
    number_U, number_I = np.cumsum(count_U > 0) - 1, np.cumsum(count_I > 0)
    for part in parts:
        rows = _rows(part)
        rows = rows[(count_U[rows["user"]] > 0) & (count_I[rows["item"]] > 0)]
        rows["user"], rows["item"] = number_U[rows["user"]], number_I[rows["item"]]
        yield rows


def _last(read: Callable[[], Iterator[np.ndarray]], start: np.ndarray, timed: bool) -> tuple[Any, Any, str]:
    """Where train and val end, i64[U] each, where the last two of each user are left out; and what is to be said."""
    stop, enough = start[1:], np.diff(start) >= 3
    train, val = stop - 2 * enough, stop - enough
    told = "the last of each user is test, the one before it val"
    if timed:
        every, at, trained, tested = 1 + start[-1] // _SAMPLED, 0, [], []
        for rows in read():
            place = at + np.arange(len(rows))
            trained.append(rows["time"][place < train[rows["user"]]][::every].copy())  # a view would keep all
            tested.append(rows["time"][place >= val[rows["user"]]])
            at += len(rows)
        order = np.sort(np.concatenate(trained))
        later = 1 - np.searchsorted(order, np.concatenate(tested), side="right") / len(order)
        if later.size:
            told += f"; on average {later.mean():.0%} of train is later than an example of test (split=time has none)"
    return train, val, told


def _by_time(read: Callable[[], Iterator[np.ndarray]], start: np.ndarray, made: Interactions) -> tuple[Any, Any, str]:
    """Where train and val end, i64[U] each, at two moments; and what is to be said."""
    every = 1 + start[-1] // _SAMPLED
    times = np.sort(np.concatenate([rows["time"][::every].copy() for rows in read()]))  # a view would keep all
    shares = (1 - made.val_fraction - made.test_fraction, 1 - made.test_fraction)
    moments = [times[min(int(share * len(times)), len(times) - 1)] for share in shares]
    train, val = start[:-1].copy(), start[:-1].copy()
    for rows in read():
        for stop, moment in zip((train, val), moments, strict=True):
            stop += np.bincount(rows["user"][rows["time"] < moment], minlength=len(stop))
    if (train == start[:-1]).all():
        raise UserError(f"{made.origin()}: all times are the same, so that split='time' leaves nothing to train on.")
    new = ((train == start[:-1]) & (start[1:] > val)).sum()
    says = [str(np.datetime64(int(t), "s")) if 10**8 < t < 10**10 else str(t) for t in moments]
    told = f"val is what is from {says[0]} on, test from {says[1]} on"
    return train, val, told + (f"; {new:,} users of test have nothing in train" if new else "")


def _texts(kind: str, ids: np.ndarray, names: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Ids as the store keeps them: numbers, or as ``columns.Texts``."""
    if names is None:
        return {f"{kind}_ids": ids}
    data, bounds = Texts.packed(str(names[i]) for i in ids)
    return {f"{kind}_ids": data, f"{kind}_bounds": bounds}


def _names(store: Store, kind: str) -> Sequence[str]:
    ids, bounds = store.get(f"{kind}_ids", 0), f"{kind}_bounds"
    return Texts(ids, store.get(bounds, 0)) if bounds in store[0] else _Numbers(ids)
