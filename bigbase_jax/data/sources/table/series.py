"""Time series in tables: regular grids of what may be irregular, windows of history and future, splits by time.

An example is a window, with L = ``history``, H = ``horizon``, C channels and K covariates, all standardised by the
training split:

- ``history`` f32[L,C]: missing values are the last before them;
- ``covariates`` f32[L+H,K]: what is known of the future too, where there is any;
- ``future`` f32[H,C] and ``observed`` bool[H,C]: the labels, and which of them are known.

Legend: N rows of a table, T steps of the grid.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Batch, Codec, Dataset, Example, Fields, UserError
from bigbase_jax.data.columns import ISO, Column, Columns, column_of, read_columns, table_files
from bigbase_jax.data.encoders import Encoders, calendar, fit_encoders
from bigbase_jax.data.files import LIMITS, Limits, limits_of, one_file
from bigbase_jax.data.rows import rows
from bigbase_jax.data.sources.splits import Opened, Read, Split, by_time

_DAY = 86400
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": _DAY, "w": 7 * _DAY}
_WAVES = {"year": 3, "week": 3, "day": 4}  # sines and cosines of each cycle
_NAMES = 64  # of a category that is known of the future, at most
_ABOUT = {"time", "series", "form", "calendar", "holidays", "days"}  # what a codec needs, beside what it checks
_MOST = 1_000_000  # steps or channels
WHOLE = Fields(whole=True)
_LISTS = ("rows", "data", "history")  # what JSON calls a list of rows


class Grid(NamedTuple):
    """Steps of one length.

    Attributes:
      start: time of row 0, ISO 8601, in UTC.
      step, unit: so many seconds, "s", or calendar months, "M", from a row to the next.
    """

    start: str
    step: int
    unit: Any

    def rows(self, time_N: np.ndarray) -> np.ndarray:
        """i64[N]: the row nearest to each time; of months, the one that it is in."""
        since = (time_N.astype(f"M8[{self.unit}]") - np.datetime64(self.start, self.unit)).astype(np.int64)
        return (since + (self.step // 2 if self.unit == "s" else 0)) // self.step

    def times(self, row_N: Any) -> np.ndarray:
        """datetime64 of rows."""
        return np.datetime64(self.start, self.unit) + np.asarray(row_N) * np.timedelta64(self.step, self.unit)

    def __str__(self) -> str:
        if self.unit == "M":
            return f"{self.step} month{'s' * (self.step > 1)}"
        name, size = max((x for x in _UNITS.items() if self.step % x[1] == 0), key=lambda x: x[1])
        return f"{self.step // size} {name}"

    @property
    def season(self) -> int:
        """Steps of the season that such series have: of a day, a week or a year."""
        if self.unit == "M":
            return max(12 // self.step, 1)
        return max(next((size // self.step for size in (_DAY, 7 * _DAY) if self.step < size), 52), 1)


def grid_of(time_N: np.ndarray, step: str | None = None) -> Grid:
    """The grid of sorted times, by the most frequent distance between them; or of ``step``, such as "15min".

    Raises:
      UserError: fewer than two times, a step that cannot be read, or times that fit no step.
    """
    distance_N = np.diff(np.unique(time_N)).astype(np.int64)
    if not len(distance_N):
        raise UserError("a series has two times at least.")
    if step is not None:
        match = re.fullmatch(r"(\d*) *(s|min|h|d|w|M)", step)
        if not match or match[1].strip("0") == "" != match[1]:
            raise UserError(f"step is {step!r}; it reads such as 15min, 1h, 1d, 1w or 1M (a month).")
        unit, count = ("M" if match[2] == "M" else "s"), int(match[1] or 1) * _UNITS.get(match[2], 1)
    elif distance_N.min() >= 28 * _DAY:
        unit, count = "M", max(round(float(np.median(distance_N)) / (30.44 * _DAY)), 1)
    else:
        values_D, count_D = np.unique(distance_N, return_counts=True)
        unit, count = "s", int(values_D[count_D.argmax()])
    if unit == "M":
        return Grid(str(time_N[0].astype("M8[M]")), count, unit)
    phases, often = np.unique(time_N.astype(np.int64) % count, return_counts=True)
    before = (int(time_N[0].astype(np.int64)) - int(phases[often.argmax()]) + count // 2) % count - count // 2
    found = Grid(str(time_N[0] - np.timedelta64(before, "s")), count, unit)
    steps = int(found.rows(time_N[-1:])[0]) + 1
    if steps > 20 * (len(distance_N) + 1):
        raise UserError(
            f"{len(distance_N) + 1:,} times would be {steps:,} steps of {found}, nearly all of them missing; give "
            "step=1h, or what they are."
        )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series(Read):
    """Series on one grid, and how windows are cut from them; subclasses say where they come from.

    Rows of one time are averaged, and what is between the steps of the grid goes to the nearest. All of it is told, as
    are gaps. Splits are by time: a window's steps ahead are all within its split, and its history may reach into the
    one before.

    Attributes:
      time: the column of times, in UTC where they do not say their zone; None: the only column of dates.
      series: the column that says which series a row is of; None: there is one row for each time.
      columns: those that are forecast; None: all of numbers that are nothing else.
      known: columns that are known of the future too (prices, weather forecasts): numbers, or categories, of which the
        most frequent 16 names count.
      holidays: a column that is not empty somewhere on each holiday; or a file with a date in each line.
      use_calendar: take hour, weekday and season of the year for covariates.
      history, horizon: L and H.
      step: of the grid, such as "15min", "1h", "1d" or "1M" (a month); None: the most frequent one.
      season: steps of a season; None: a day, week or year, by the step.
      val_fraction, test_fraction: of the steps, at the end.
      val_from, test_from, until: times in ISO 8601 in their place; what is from ``until`` on is left out.

    Raises:
      UserError: a length below 1.
    """

    time: str | None = None
    series: str | None = None
    columns: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    holidays: str | None = None
    use_calendar: bool = False
    history: int = 336
    horizon: int = 96
    step: str | None = None
    season: int | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    val_from: str | None = None
    test_from: str | None = None
    until: str | None = None

    def __post_init__(self) -> None:
        for name in ("history", "horizon", "season"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")

    def read(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Columns:
        """The table."""
        raise NotImplementedError

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Dataset:
        """
        Raises:
          UserError: no times, no numbers, a column that is not there, or splits too short for a window.
        """
        table = self.read(cache, limit_bytes, say)
        time = self.time or next((name for name, column in table.items() if column.kind == "date"), "")
        if not time or table[time].kind != "date":
            raise UserError(f"{self.origin()} has no column of dates and times; name it with time=COLUMN.")
        time_N, told = table[time].values, []
        if self.until:
            time_N = np.where(time_N < moment(self.until, "until"), time_N, np.datetime64("NaT"))
        real_N = ~np.isnat(time_N)
        told += [f"{np.count_nonzero(~real_N):,} rows without a time left out"] * (not self.until and not real_N.all())
        sorted_N = np.sort(time_N[real_N])
        grid = grid_of(sorted_N, self.step)
        row_N = np.where(real_N, grid.rows(np.where(real_N, time_N, grid.times(0))), -1)
        T = int(row_N.max()) + 1
        irregular = np.count_nonzero(grid.times(row_N[real_N]).astype("M8[s]") != time_N[real_N]) * (grid.unit == "s")
        told += [f"{irregular:,} times between the steps, taken to the nearest"] * bool(irregular)
        told += ["times out of order, sorted"] * bool((np.diff(time_N[real_N]) < np.timedelta64(0)).any())

        about: dict[str, Any] = {"time": time, "series": self.series, "grid": list(grid), "history": self.history}
        about |= {"horizon": self.horizon, "calendar": self.use_calendar, "form": table[time].form or ISO}
        about["channels"] = self._channels(table, time, say)
        about |= self._holidays(table)
        of_N = {channel.get("of"): _rows_of(table, about, channel, row_N) for channel in about["channels"]}
        if repeated := sum(int(np.maximum(np.bincount(x[x >= 0]) - 1, 0).sum()) for x in of_N.values()):
            told.append(f"{repeated:,} repeated times, whose values are averaged")
        value_TC = values(table, about, row_N, T)

        at = {"val": self.val_from, "test": self.test_from}
        moments = {split: moment(text, f"{split}_from") for split, text in at.items() if text}
        fractions = {"val": self.val_fraction, "test": self.test_fraction}
        parts = by_time(grid.times(np.arange(T)).astype("M8[s]"), fractions, moments)
        value_TC = self._useful(value_TC, parts["train"], about, say)
        names = [channel["name"] for channel in about["channels"]]
        trained_TC = value_TC[parts["train"]]
        mean_C, std_C = np.nanmean(trained_TC, 0), np.nanstd(trained_TC, 0)
        if constant := [name for name, std in zip(names, std_C, strict=True) if not std > 0]:
            say(f"data: {', '.join(constant)} is constant in training")
        std_C = np.where(std_C > 0, std_C, 1.0)
        about |= {"mean": mean_C.tolist(), "std": std_C.tolist()}
        if self.known:
            chosen, trained = Columns([table[name] for name in self.known], table.rows), len(parts["train"])
            rows_n = np.flatnonzero((row_N >= 0) & (row_N < trained))
            encoders = fit_encoders(chosen, rows_n, numbers="standard", max_categories=_NAMES)
            if many := [name for name in encoders.category_names if not hasattr(_of(encoders, name), "names")]:
                raise UserError(f"{many[0]} has more than {_NAMES} names; a known column has numbers, or few names.")
            about["encoders"] = encoders.state()
        observed_TC = np.isfinite(value_TC)
        missing_T = ~observed_TC.any(1)
        if missing_T.any():
            edge_T = np.flatnonzero(np.diff(np.concatenate([[0], missing_T, [0]])))
            gaps = np.diff(edge_T)[::2]
            told.append(f"{missing_T.sum():,} steps in {len(gaps):,} gaps missing, the longest of {gaps.max():,}")
        future_TC = np.nan_to_num((value_TC - mean_C) / std_C).astype(np.float32)
        arrays = {"history": last_known(np.where(observed_TC, future_TC, np.nan)), "future": future_TC}
        arrays["observed"] = observed_TC
        covariates = covariates_of(table, about, row_N, np.arange(T))
        if covariates:
            arrays["covariates"] = np.stack([*covariates.values()], 1)

        season = self.season or grid.season
        error_TC = np.abs(future_TC[season:] - future_TC[:-season])
        both_TC = (observed_TC[season:] & observed_TC[:-season])[: max(len(parts["train"]) - season, 0)]
        naive_C = np.sum(error_TC[: len(both_TC)] * both_TC, 0) / np.maximum(both_TC.sum(0), 1)
        info = {
            "series": json.dumps(about),
            "channels": names,
            "covariate_names": list(covariates),
            "mean": about["mean"],
            "std": about["std"],
            "naive_error": np.where(naive_C > 0, naive_C, 1.0).tolist(),
            "season": season,
            "horizon": self.horizon,
        }
        splits = {name: self._windows(name, rows_S, grid, arrays) for name, rows_S in parts.items()}
        first, last = grid.times([0, T - 1]).astype(str)
        words = f"{self.origin()}: {T:,} steps of {grid} from {first} to {last} UTC, {len(names)} series"
        words += f", {len(covariates)} covariates" * bool(covariates) + "".join(f"; {what}" for what in told)
        cuts = [(name, len(rows_S), self.history, self.horizon) for name, rows_S in parts.items()]
        return Opened(splits, info, words, [*arrays.values(), str(grid), cuts, names])

    def _channels(self, table: Columns, time: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
        """What is forecast: name, column and, where rows are of several series, the name of its own."""
        other = {time, self.series, self.holidays, *self.known}
        numbers = [name for name, column in table.items() if column.kind == "number" and name not in other]
        for name in self.columns:
            if table[name].kind != "number":
                raise UserError(f"{name} is a column of {table[name].kind} values, and numbers are forecast.")
        if left := [name for name in table if name not in {*numbers, *other}]:
            say(f"data: {', '.join(left[:8])}{'...' * (len(left) > 8)} are no numbers; left out")
        chosen = self.columns or tuple(numbers)
        if not chosen:
            raise UserError(f"{self.origin()} has no column of numbers to forecast.")
        if self.series is None:
            return [{"name": name, "column": name} for name in chosen]
        ids = [str(name) for name in table[self.series].names]
        if not ids:
            raise UserError(f"{self.series} is a column of {table[self.series].kind} values, and names no series.")
        both = [(name, i) for i in ids for name in chosen]
        return [{"name": i if len(chosen) == 1 else f"{i}/{name}", "column": name, "of": i} for name, i in both]

    def _holidays(self, table: Columns) -> dict[str, Any]:
        if self.holidays is None or self.holidays in table:
            return {"holidays": self.holidays, "days": []}
        if not os.path.isfile(os.path.expanduser(self.holidays)):
            hint = suggest(self.holidays, table, "column")
            raise UserError(f"holidays={self.holidays} is no column and no file.{hint}")
        lines = pathlib.Path(self.holidays).expanduser().read_text(encoding="utf-8", errors="replace").split()
        return {"holidays": "", "days": [str(moment(line, "a holiday").astype("M8[D]")) for line in lines[:100_000]]}

    def _useful(self, value_TC: np.ndarray, train: np.ndarray, about: dict[str, Any], say: Any) -> np.ndarray:
        """The values without channels that have none in training."""
        kept_C = np.isfinite(value_TC[train]).any(0)
        if not kept_C.any():
            raise UserError(f"{self.origin()} has no number in its training split.")
        if not kept_C.all():
            left = [about["channels"][c]["name"] for c in np.flatnonzero(~kept_C)]
            say(f"data: {', '.join(left[:8])} has no number in training; left out")
            about["channels"] = [channel for channel, kept in zip(about["channels"], kept_C, strict=True) if kept]
        return value_TC[:, kept_C]

    def _windows(self, split: str, rows_S: np.ndarray, grid: Grid, arrays: Mapping[str, np.ndarray]) -> Split:
        """The windows of a split; ``arrays``: [T, ...] each, by entry."""
        L, H = self.history, self.horizon
        first_N = np.arange(max(int(rows_S[0]), L), int(rows_S[-1]) - H + 2)
        seen_T = np.concatenate([[0], np.cumsum(arrays["observed"].any(1))])
        if len(first_N):
            known = (seen_T[first_N + H] > seen_T[first_N]) & (seen_T[first_N] > seen_T[first_N - L])
            first_N = first_N[known]
        if not len(first_N):
            needed = f"{L} steps of history and {H} ahead" if rows_S[0] < L else f"{H} steps ahead"
            raise UserError(
                f"the {split} split has {len(rows_S):,} steps, in which {needed} do not fit, or are all missing; "
                "shorten history or horizon, or move the splits."
            )
        spans = {name: {"history": (-L, 0), "covariates": (-L, H)}.get(name, (0, H)) for name in arrays}

        def batch(indices: np.ndarray) -> Batch:
            first_n1 = first_N[indices][:, None]
            return {name: x_T[first_n1 + np.arange(*spans[name])] for name, x_T in arrays.items()}

        return Split(split, len(first_N), None, True, batch=batch, name=lambda i: str(grid.times(first_N[i])))

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """Of a table that ends with the history, or in JSON a list of rows or columns.

        Raises:
          UserError: what the run has kept of its series cannot be read.
        """
        try:
            about = json.loads(dataset_info["series"])
            lengths = about["history"], about["horizon"], len(about["mean"]), len(about["std"]), len(about["channels"])
            fine = all(isinstance(n, int) and 0 < n <= _MOST for n in lengths) and set(about) >= _ABOUT
            fine &= Grid(*about["grid"]).step > 0 and lengths[2] == lengths[3] == lengths[4]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"what the run has kept of its series cannot be read: {error!r}.") from error
        if not fine:
            raise UserError("what the run has kept of its series is not what training writes; train again.")
        return SeriesCodec(about, limits_of(config))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeriesFiles(Series):
    """Series in CSV, Parquet and what else ``data.columns`` reads.

    Attributes:
      root: a file, or a folder of files whose rows are all of one table.
      encoding: of tables of cells.
      limits: of reading a file.
    """

    root: str
    encoding: str = "utf-8"
    limits: Limits = LIMITS

    def read(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Columns:
        kinds = {**({self.time: "date"} if self.time else {}), **({self.series: "category"} if self.series else {})}
        files = table_files(self.root, self.encoding, self.limits)
        words: dict[str, Any] = {"encoding": self.encoding, "cache": cache, "limit_bytes": limit_bytes, "say": say}
        return read_columns(files, kinds={**kinds, **dict.fromkeys(self.columns, "number")}, **words)

    def origin(self) -> str:
        return self.root


def moment(text: str, what: str) -> np.datetime64:
    """A time in ISO 8601.

    Raises:
      UserError: it is none.
    """
    column = column_of(what, [text], "date")
    if np.isnat(column.values[0]):
        raise UserError(f"{what} is {text!r}, and no date such as 2017-06-26.")
    return np.datetime64(column.values[0])


# --- from rows to the grid --------------------------------------------------------------------------------------------


def _rows_of(table: Columns, about: Mapping[str, Any], channel: Mapping[str, Any], row_N: np.ndarray) -> np.ndarray:
    """i64[N]: the step that each row gives a channel a value for; -1: it gives none."""
    given_N = np.isfinite(table[channel["column"]].values)
    if "of" in channel:
        ids = table[about["series"]]
        names = list(map(str, ids.names))
        given_N &= np.asarray(ids.values) == (names.index(channel["of"]) if channel["of"] in names else -2)
    return np.where(given_N, row_N, -1)


def values(table: Columns, about: Mapping[str, Any], row_N: np.ndarray, T: int) -> np.ndarray:
    """f64[T,C], NaN where missing or infinite; ``row_N``: the step of each row, -1 for none."""
    found = np.full((T, len(about["channels"])), np.nan)
    for c, channel in enumerate(about["channels"]):
        found[:, c] = _mean(table[channel["column"]].values, _rows_of(table, about, channel, row_N), T)
    return found


def _mean(x_N: np.ndarray, row_N: np.ndarray, T: int) -> np.ndarray:
    """f64[T]: the mean of the values of each step."""
    given_N = row_N >= 0
    row, x = row_N[given_N], np.asarray(x_N, np.float64)[given_N]
    with np.errstate(invalid="ignore"):
        return np.bincount(row, x, T) / np.bincount(row, minlength=T)


def last_known(x_TC: np.ndarray) -> np.ndarray:
    """f32[T,C] without NaN: the last value before; 0, the mean, where there is none."""
    row_TC = np.where(np.isfinite(x_TC), np.arange(len(x_TC))[:, None], 0)
    return np.nan_to_num(np.take_along_axis(x_TC, np.maximum.accumulate(row_TC, 0), 0)).astype(np.float32)


def covariates_of(
    table: Columns, about: Mapping[str, Any], row_N: np.ndarray, step_T: np.ndarray
) -> dict[str, np.ndarray]:
    """f32[T] by name, at some steps that follow each other: waves of the calendar, whether it is a holiday, and the
    known columns of the last row until then."""
    grid = Grid(*about["grid"])
    time_T = grid.times(step_T).astype("M8[s]")
    found: dict[str, np.ndarray] = {}
    if about["calendar"]:
        cycles = ["year", *["week"] * (grid.unit == "s" and grid.step <= _DAY)]
        cycles += ["day"] * (grid.unit == "s" and grid.step < _DAY)
        waves = calendar(time_T, cycles)
        for i, cycle in enumerate(cycles):
            for k in range(1, _WAVES[cycle] + 1):
                wave_T = (waves[:, 2 * i + 1] + 1j * waves[:, 2 * i]) ** k
                found |= {f"{cycle}_sine{k}": wave_T.imag, f"{cycle}_cosine{k}": wave_T.real}
    if about["holidays"] is not None:
        days = [np.array(about["days"], "M8[D]")]
        if about["holidays"] in table:
            column = table[about["holidays"]]
            given_N = np.asarray(column.values) >= 0 if column.kind == "category" else np.isfinite(column.values)
            days.append(table[about["time"]].values[given_N].astype("M8[D]"))
        found["holiday"] = np.isin(time_T.astype("M8[D]"), np.concatenate(days))
    if "encoders" in about:
        encoders = Encoders.from_state(about["encoders"])
        last_T: np.ndarray = np.full(len(step_T), -1)
        there_N = np.flatnonzero((row_N >= step_T[0]) & (row_N <= step_T[-1]))
        np.maximum.at(last_T, row_N[there_N] - step_T[0], there_N)
        last_T = np.maximum.accumulate(last_T)
        encoded = encoders.binds(table)(np.where(last_T < 0, there_N[0] if len(there_N) else 0, last_T))
        found |= dict(zip(encoders.features, encoded["numbers"].T, strict=True))
        for name, code_T in zip(encoders.category_names, encoded["categories"].T, strict=True):
            found |= {f"{name}={x}": code_T == i + 1 for i, x in enumerate(_of(encoders, name).names)}
    return {name: np.asarray(x_T, np.float32) for name, x_T in found.items()}


def _of(encoders: Encoders, name: str) -> Any:
    return next(encoder for encoder in encoders.columns if encoder.name == name)


# --- what a user gives ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SeriesCodec(Codec):
    """A history, and where columns are known of the future, rows of these behind it.

    Attributes:
      about: what training noted of its table (``dataset_info["series"]``).
      limits: of reading a file.
    """

    about: Mapping[str, Any]
    limits: Limits = LIMITS

    fields: Fields | None = WHOLE

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """
        Raises:
          UserError: unreadable, a column that is missing, a history that is too short, or a future that is not known.
        """
        about = self.about
        table = self._table(self._cells(given))
        time_N, grid, L, H = table[about["time"]].values, Grid(*about["grid"]), about["history"], about["horizon"]
        real_N = ~np.isnat(time_N)
        row_N = grid.rows(np.where(real_N, time_N, grid.times(0)))
        given_N = np.zeros(len(row_N), bool)
        for channel in about["channels"]:
            given_N |= _rows_of(table, about, channel, np.zeros_like(row_N)) == 0
        if not (given_N & real_N).any():
            raise UserError("the history has no row with a time and a value.")
        first = int(row_N[given_N & real_N].max()) + 1  # step ahead
        there = first - int(row_N[given_N & real_N].min())
        if there < L:
            raise UserError(f"the history has {there:,} steps of {grid}; this model reads {L:,}.")
        inside_N = real_N & (row_N >= first - L) & (row_N < first + H)
        row_N = np.where(inside_N, row_N - (first - L), -1)
        value_LC = values(table, about, row_N, L + H)[:L]
        if not (some_C := np.isfinite(value_LC).any(0)).all():
            name = about["channels"][int(np.argmin(some_C))]["name"]
            raise UserError(f"{name!r} has no value in the last {L:,} steps of the history.")
        z_LC = (value_LC - np.array(about["mean"])) / np.array(about["std"])
        start_C = np.take_along_axis(z_LC, np.isfinite(z_LC).argmax(0)[None], 0)[0]
        z_LC[0] = np.where(np.isfinite(z_LC[0]), z_LC[0], start_C)
        if "encoders" in about and (lacking := H - len(np.unique(row_N[row_N >= L]))):
            names = ", ".join(encoder.name for encoder in Encoders.from_state(about["encoders"]).columns)
            raise UserError(
                f"{names} must be known of the {H} steps after the last value, and {lacking} of these have no row: add "
                "rows without a value of what is forecast."
            )
        step_S = np.arange(first - L, first + H)
        example: Example = {"history": last_known(z_LC), "times": grid.times(step_S[L:]).astype(str)}
        covariates = covariates_of(table, about, np.where(inside_N, row_N + first - L, first - L - 1), step_S)
        if covariates:
            example["covariates"] = np.stack([*covariates.values()], 1)
        return [example]

    def _cells(self, given: bytes | str | Mapping[str, Any]) -> dict[str, list[Any]]:
        """The values of each column."""
        if isinstance(given, bytes):
            kind = ".json" if given.lstrip()[:1] in (b"{", b"[") else ".parquet" if given[:4] == b"PAR1" else ".csv"
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / f"history{kind}"
                path.write_bytes(given)
                return self._cells(str(path))
        if isinstance(given, str):
            found = [row.values for row in rows(one_file(given, self.limits))]
            if len(found) == 1 and any(isinstance(x, list) for x in found[0].values()):
                return self._cells(found[0])
        else:
            listed = next((given[name] for name in _LISTS if isinstance(given.get(name), list)), None)
            if listed is None or not all(isinstance(row, Mapping) for row in listed):
                columns = {name: list(x) for name, x in given.items() if isinstance(x, (list, tuple))}
                if not columns or len({len(x) for x in columns.values()}) > 1:
                    raise UserError('a history is {"rows": [{COLUMN: value, ...}, ...]}, or columns of one length.')
                return columns
            found = list(listed)
        return {name: [row.get(name) for row in found] for name in dict.fromkeys(name for row in found for name in row)}

    def _table(self, cells: Mapping[str, Sequence[Any]]) -> Columns:
        about = self.about
        kinds = {channel["column"]: "number" for channel in about["channels"]}
        encoders = Encoders.from_state(about["encoders"]).columns if "encoders" in about else ()
        kinds |= {encoder.name: encoder.kind for encoder in encoders}
        kinds |= {about["time"]: "date"} | ({about["series"]: "category"} if about["series"] else {})
        for name in kinds:
            if name not in cells:
                raise UserError(f"the history has no column {name!r}.{suggest(name, cells, 'column')}")
        if about["holidays"] in cells:
            kinds[about["holidays"]] = "category"
        found: list[Column] = [column_of(name, cells[name], kind, about["form"]) for name, kind in kinds.items()]
        return Columns(found, len(cells[about["time"]]))
