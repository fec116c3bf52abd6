"""Columns of a table as what models of rows read: numbers f32[N,F] and categories i32[N,C].

Encoders are fitted to training rows alone. Their state is JSON, kept among a run's ``dataset_info`` as ``encoders``, so
that a row in JSON or a line of a table is encoded as training saw it.

Legend: N rows, F numbers, C categories, k numbers that a column gives.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import scipy.special

from bigbase_jax.build import suggest
from bigbase_jax.core import Example, UserError
from bigbase_jax.data.columns import ISO, Column, Columns, column_of

NUMBERS = ("quantile", "standard")
_KNOTS = 1 << 18  # that all columns may have together, so that a run's JSON stays small
_FITTED = 1_000_000  # rows that quantiles, means and deviations are taken from, at most
_DAY = 86400.0
_CYCLES = {"year": 365.2425, "week": 7.0, "day": 1.0}  # in days

Bound = Callable[[np.ndarray], np.ndarray]
"""Encodes rows of a column: i64[n] -> f32[n,k], or i32[n]."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How a column is encoded. ``features`` names its k numbers; ``cardinality``, of a category, counts the integers
    that it may become, of which 0 is what is unknown or missing; None: it is no category."""

    name: str

    kind: ClassVar[str]
    """Of the columns that it reads."""

    @property
    def features(self) -> tuple[str, ...]:
        return ()

    @property
    def cardinality(self) -> int | None:
        return None

    def bind(self, column: Column) -> Bound:
        """What encodes rows of a column."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _Number(Encoder):
    """A number, scaled, and 0 where it is missing; then, if some were missing in training, whether it is: 0 or 1."""

    missing: bool = False

    kind: ClassVar[str] = "number"

    @property
    def features(self) -> tuple[str, ...]:
        return (self.name, f"{self.name} is missing")[: 1 + self.missing]

    def scaled(self, x_n: np.ndarray) -> np.ndarray:
        """f64[n] -> f64[n]; NaN stays NaN."""
        raise NotImplementedError

    def bind(self, column: Column) -> Bound:
        def encode(rows: np.ndarray) -> np.ndarray:
            x_n = np.asarray(column.values[rows], np.float64)
            gone_n = np.isnan(x_n)
            parts = [np.where(gone_n, 0.0, self.scaled(x_n)), gone_n][: 1 + self.missing]
            return np.stack(parts, 1).astype(np.float32)

        return encode


@dataclasses.dataclass(frozen=True)
class Quantile(_Number):
    """A number by its rank in training, as a normal variable, which Gorishniy et al. 2021 (section 4.2) use before
    networks. What many rows share is in the middle of their ranks; infinite numbers are as the greatest and the least.

    Attributes:
      knots: ascending values, between which ranks are interpolated; one: the number tells nothing but whether it is
        missing.
      ranks: of these, between 0 and 1: the share of rows below, and half of those that are equal.
    """

    knots: tuple[float, ...] = (0.0,)
    ranks: tuple[float, ...] = (0.5,)

    def scaled(self, x_n: np.ndarray) -> np.ndarray:
        return scipy.special.ndtri(np.interp(x_n, self.knots, self.ranks))


@dataclasses.dataclass(frozen=True)
class Standard(_Number):
    """A number less its mean in training, over its standard deviation. Infinite numbers are as the greatest and the
    least in training.

    Attributes:
      mean, std, low, high: of the finite ones in training.
    """

    mean: float = 0.0
    std: float = 1.0
    low: float = -np.inf
    high: float = np.inf

    def scaled(self, x_n: np.ndarray) -> np.ndarray:
        x_n = np.where(np.isinf(x_n), np.clip(x_n, self.low, self.high), x_n)
        return (x_n - self.mean) / self.std


@dataclasses.dataclass(frozen=True)
class Names(Encoder):
    """A category by name: 1 is the most frequent in training; 0 is any that was not there.

    Attributes:
      names: those from 1 on.
    """

    names: tuple[str, ...] = ()

    kind: ClassVar[str] = "category"

    @property
    def cardinality(self) -> int:
        return 1 + len(self.names)

    def bind(self, column: Column) -> Bound:
        known = {name: i for i, name in enumerate(self.names, 1)}
        return _by_code(column, [known.get(name, 0) for name in column.names])


@dataclasses.dataclass(frozen=True)
class Hashed(Encoder):
    """A category of many names: each is in one of some buckets, from 1 on, whether it was there in training or not."""

    buckets: int = 1024

    kind: ClassVar[str] = "category"

    @property
    def cardinality(self) -> int:
        return 1 + self.buckets

    def bind(self, column: Column) -> Bound:
        return _by_code(column, [1 + _hash64(name) % self.buckets for name in column.names])


def _by_code(column: Column, codes: Sequence[int]) -> Bound:
    code_K = np.array([*codes, 0], np.int32)  # and of -1, what is missing
    return lambda rows: code_K[column.values[rows]]


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


@dataclasses.dataclass(frozen=True)
class Calendar(Encoder):
    """A date: how long after the training's mean, in standard deviations, and where it is in the year, in the week and,
    if the training's differ in that, in the day, each as sine and cosine; then whether it is missing, as of numbers.

    Attributes:
      form: how dates of the table are written; see ``Column``.
      mean, std: in days since 1970.
      hours: whether there is a time of day.
    """

    form: str = ISO
    mean: float = 0.0
    std: float = 1.0
    hours: bool = False
    missing: bool = False

    kind: ClassVar[str] = "date"

    @property
    def features(self) -> tuple[str, ...]:
        cycles = [f"{self.name}: {f} of the {cycle}" for cycle in self._cycles for f in ("sine", "cosine")]
        return (self.name, *cycles, *([f"{self.name} is missing"] if self.missing else []))

    @property
    def _cycles(self) -> Sequence[str]:
        return tuple(_CYCLES)[: 2 + self.hours]

    def bind(self, column: Column) -> Bound:
        def encode(rows: np.ndarray) -> np.ndarray:
            date_n = np.asarray(column.values[rows], "M8[s]")
            parts_nk = calendar(date_n, self._cycles)
            gone_n1 = np.isnat(date_n)[:, None]
            days_n1 = (days(date_n)[:, None] - self.mean) / self.std
            found_nk = np.where(gone_n1, 0.0, np.concatenate([days_n1, parts_nk], 1))
            return np.concatenate([found_nk, gone_n1], 1)[:, : len(self.features)].astype(np.float32)

        return encode


def days(date_N: np.ndarray) -> np.ndarray:
    """f64[N], days since 1970, of datetime64[s][N]; NaN for NaT."""
    return np.where(np.isnat(date_N), np.nan, date_N.astype(np.int64) / _DAY)


def calendar(date_N: np.ndarray, cycles: Sequence[str] = tuple(_CYCLES)) -> np.ndarray:
    """f64[N, 2 * cycles]: sine and cosine of where dates (datetime64[s][N]) are in their year, week and day."""
    days_N = days(date_N)
    starts = {"year": days(date_N.astype("M8[Y]").astype("M8[s]")), "week": 4.0, "day": 0.0}  # 1970-01-05 is a Monday
    angles = [2 * np.pi * (days_N - starts[cycle]) / _CYCLES[cycle] for cycle in cycles]
    return np.stack([f(angle_N) for angle_N in angles for f in (np.sin, np.cos)], 1)


@dataclasses.dataclass(frozen=True)
class Words(Encoder):
    """A text: its words, hashed with a sign, counted, in a vector of length 1 (scikit-learn's ``HashingVectorizer``).

    Attributes:
      buckets: k.
    """

    buckets: int = 64

    kind: ClassVar[str] = "text"

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(f"{self.name}: words {i}" for i in range(self.buckets))

    def bind(self, column: Column) -> Bound:
        from sklearn.feature_extraction.text import HashingVectorizer  # takes a second

        vectors = HashingVectorizer(n_features=self.buckets, dtype=np.float32)
        return lambda rows: vectors.transform(column.values[i] for i in rows.tolist()).toarray()


_KINDS: Mapping[str, type[Encoder]] = {
    cls.__name__.lower(): cls for cls in (Quantile, Standard, Names, Hashed, Calendar, Words)
}


class Encoders:
    """The encoders of a table, in the order of its columns.

    Attributes:
      columns: one of each column that a model reads.
      left_out: why others are not read, by name.
      features: what each of the F numbers is, and
      number_names: the column that it is from.
      category_names: the C columns of categories, and
      cardinalities: how many integers each may be.
    """

    def __init__(self, columns: Sequence[Encoder], left_out: Mapping[str, str] | None = None):
        self.columns, self.left_out = tuple(columns), dict(left_out or {})
        self.features = tuple(feature for encoder in columns for feature in encoder.features)
        self.number_names = tuple(encoder.name for encoder in columns for _ in encoder.features)
        counts = {encoder.name: encoder.cardinality for encoder in columns}
        self.category_names = tuple(name for name, count in counts.items() if count is not None)
        self.cardinalities = tuple(count for count in counts.values() if count is not None)

    def binds(self, columns: Mapping[str, Column]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        """What encodes rows of a table, i64[n]: ``numbers`` f32[n,F] and ``categories`` i32[n,C].

        Raises:
          UserError: a column is not there, or is of another kind.
        """
        bound = []
        for encoder in self.columns:
            column = columns[encoder.name]
            if column.kind != encoder.kind:
                raise UserError(f"{encoder.name} holds a {column.kind}, where training had a {encoder.kind}.")
            bound.append((encoder.bind(column), encoder.cardinality is None))

        def encode(rows: np.ndarray) -> dict[str, np.ndarray]:
            numbers = np.empty((len(rows), len(self.features)), np.float32)
            categories = np.empty((len(rows), len(self.category_names)), np.int32)
            at = {True: 0, False: 0}
            for of, is_numbers in bound:
                found = of(rows)
                into, width = (numbers, found.shape[1]) if is_numbers else (categories, 1)
                into[:, at[is_numbers] : at[is_numbers] + width] = found.reshape(len(rows), width)
                at[is_numbers] += width
            return {"numbers": numbers, "categories": categories}

        return encode

    def encode(self, columns: Columns, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """As ``binds`` says; ``rows`` None: all."""
        return self.binds(columns)(np.arange(columns.rows) if rows is None else rows)

    def encode_row(self, row: Mapping[str, Any]) -> Example:
        """``numbers`` f32[F] and ``categories`` i32[C] of a row of JSON, or of texts as a table of cells has them. None
        and what ``columns.MISSING`` lists are missing; names that training has not seen are unknown.

        Raises:
          UserError: it lacks a column, or has something else than a number, or a date, in it.
        """
        columns = {}
        for encoder in self.columns:
            name = encoder.name
            if name not in row:
                raise UserError(f"the row has no {name!r} (null where it is missing).{suggest(name, row, 'column')}")
            columns[name] = column_of(name, [row[name]], encoder.kind, getattr(encoder, "form", ISO))
        return {entry: array[0] for entry, array in self.binds(columns)(np.zeros(1, np.int64)).items()}

    def state(self) -> str:
        """All of it, as JSON."""
        known = {cls: name for name, cls in _KINDS.items()}
        columns = [{"encoder": known[type(e)], **dataclasses.asdict(e)} for e in self.columns]
        return json.dumps({"columns": columns, "left_out": self.left_out}, ensure_ascii=False)

    @staticmethod
    def from_state(state: str) -> Encoders:
        """
        Raises:
          UserError: that is no state of encoders.
        """
        try:
            found = json.loads(state)
            return Encoders([_restored(**entry) for entry in found["columns"]], found["left_out"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"what the run has kept of its table's encoders cannot be read: {error!r}.") from error


def _restored(encoder: str, **fields: Any) -> Encoder:
    kind: Callable[..., Encoder] = _KINDS[encoder]
    made = kind(**{name: tuple(x) if isinstance(x, list | tuple) else x for name, x in fields.items()})
    names = getattr(made, "names", ())
    if not all(isinstance(x, str) for x in (made.name, *names)):
        raise ValueError(made.name)
    if isinstance(made, Quantile):
        knots_Q, rank_Q = np.array(made.knots, float), np.array(made.ranks, float)
        if not (np.diff(knots_Q) > 0).all() or knots_Q.shape != rank_Q.shape or not ((rank_Q > 0) & (rank_Q < 1)).all():
            raise ValueError(made.name)
    if not 0 < getattr(made, "buckets", 1) <= 1 << 28 or not getattr(made, "std", 1.0) > 0:
        raise ValueError(made.name)
    return made


# --- fitting ----------------------------------------------------------------------------------------------------------


def fit_encoders(
    columns: Columns,
    rows: np.ndarray | None = None,
    *,
    numbers: str = "quantile",
    quantiles: int = 256,
    max_categories: int = 1000,
    min_count: int = 1,
    buckets: int = 1024,
    words: int = 64,
) -> Encoders:
    """Encoders of all columns, fitted to some rows. What is the same in all of them is left out, and why is kept.

    Args:
      columns: those that a model is to read: neither the target, nor what splits the rows.
      rows: i64, those of training; None: all.
      numbers: "quantile" or "standard".
      quantiles: values that ranks are kept of, about as many at most; fewer where there are more than 1,000 columns.
      max_categories: a column of more names is hashed.
      min_count: a name that is rarer is unknown.
      buckets: of the hashed columns of categories, each.
      words: numbers that a column of texts gives.

    Raises:
      UserError: nothing differs between the rows, or a value is out of its range.
    """
    if numbers not in NUMBERS:
        raise UserError(f"there is no numbers={numbers!r}.{suggest(numbers, NUMBERS, 'encoder')}")
    for name, value in {"quantiles": quantiles - 1, "buckets": buckets, "words": words, "min_count": min_count}.items():
        if value < 1:
            raise UserError(f"{name} is {value + (name == 'quantiles')}, which is too small.")
    rows = np.arange(columns.rows) if rows is None else rows
    quantiles = min(quantiles, max(16, _KNOTS // max(len(columns), 1)))
    fits: dict[str, Callable[[Column], Encoder | str]] = {
        "number": functools.partial(_fit_number, rows=rows, how=numbers, quantiles=quantiles),
        "category": functools.partial(_fit_category, rows=rows, most=max_categories, least=min_count, buckets=buckets),
        "date": functools.partial(_fit_date, rows=rows),
        "text": functools.partial(_fit_text, rows=rows, words=words),
    }
    found, left_out = [], {}
    for name, column in columns.items():
        encoder = fits[column.kind](column)
        column.release()
        if isinstance(encoder, str):
            left_out[name] = encoder
        else:
            found.append(encoder)
    if not found:
        raise UserError("no column tells the training rows apart: all are missing, or the same in all of them.")
    return Encoders(found, left_out)


def _some(rows: np.ndarray) -> np.ndarray:
    return rows[:: -(-len(rows) // _FITTED) or 1]


def _fit_number(column: Column, rows: np.ndarray, how: str, quantiles: int) -> Encoder | str:
    x_n = np.asarray(column.values[_some(rows)], np.float64)
    gone_n = np.isnan(x_n)
    x_n = x_n[np.isfinite(x_n)]
    missing = bool(gone_n.any())
    if not len(x_n):
        return "all missing"
    low, high = float(x_n.min()), float(x_n.max())
    if low == high:
        return Quantile(column.name, True) if missing else "the same in all rows"
    if how == "standard":
        return Standard(column.name, missing, float(x_n.mean()), float(x_n.std()), low, high)
    knots_Q, count_Q = np.unique(x_n, return_counts=True)
    rank_Q = (np.cumsum(count_Q) - count_Q / 2) / len(x_n)
    if len(knots_Q) > quantiles:  # half of them at equal steps of rank, half of value, where most have the same one
        by_rank = np.searchsorted(rank_Q[:-1], np.linspace(0, 1, quantiles // 2 + 1))
        chosen = np.union1d(by_rank, np.linspace(0, len(knots_Q) - 1, quantiles - quantiles // 2).astype(int))
        knots_Q, rank_Q = knots_Q[chosen], rank_Q[chosen]
    return Quantile(column.name, missing, tuple(knots_Q.tolist()), tuple(rank_Q.tolist()))


def _fit_category(column: Column, rows: np.ndarray, most: int, least: int, buckets: int) -> Encoder | str:
    counts_K = np.zeros(1 + len(column.names), np.int64)
    for block in _blocks(rows):
        counts_K += np.bincount(column.values[block] + 1, minlength=len(counts_K))
    known = np.flatnonzero(counts_K[1:] >= least)
    if not counts_K[1:].any():
        return "all missing"
    if len(known) < 2 and counts_K[known + 1].sum() == len(rows):
        return "the same in all rows"
    if len(known) > most:
        return Hashed(column.name, buckets)
    ordered = sorted((-counts_K[k + 1], column.names[int(k)]) for k in known)
    return Names(column.name, tuple(name for _, name in ordered))


def _fit_date(column: Column, rows: np.ndarray) -> Encoder | str:
    date_n = np.asarray(column.values[_some(rows)], "M8[s]")
    days_n = days(date_n)
    missing, days_n = bool(np.isnan(days_n).any()), days_n[~np.isnan(days_n)]
    if not len(days_n):
        return "all missing"
    if days_n.min() == days_n.max() and not missing:
        return "the same in all rows"
    hours = len(np.unique(days_n % 1)) > 1
    return Calendar(column.name, column.form or ISO, float(days_n.mean()), float(days_n.std()) or 1.0, hours, missing)


def _fit_text(column: Column, rows: np.ndarray, words: int) -> Encoder | str:
    first = next((column.values[i] for i in rows.tolist() if column.values[i]), "")
    return Words(column.name, words) if first else "all missing"


def _blocks(rows: np.ndarray, size: int = 1 << 18) -> Iterator[np.ndarray]:
    yield from (rows[start : start + size] for start in range(0, len(rows), size))
