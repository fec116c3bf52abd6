"""Rows of a table, of which one column is to be predicted from the others; see ``data.columns`` and ``data.encoders``.

Columns -> splits -> encoders, fitted to the rows of train -> encoded rows, which are kept in the cache. An example is:

- ``numbers`` f32[F] and ``categories`` i32[C]: the other columns, encoded;
- ``label`` i32, the class; or, in regression, ``target`` f32, the number.

- ``group`` i32, where an ``audit`` is asked for: the place of that column's value in ``group_names``, -1 where missing.

Facts: ``encoders`` (their state), ``number_names`` and ``category_names`` (the columns that the F and the C are from),
``cardinalities`` (of the C), ``target_name``, ``train_rows``; ``num_classes`` and ``class_names``, and
``class_weights`` where they are asked for; or ``target_mean`` and ``target_std`` of the training rows; ``group_names``.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Batch, Codec, Example, Fields, UserError
from bigbase_jax.data.cache import Store, Writer, kept, source_digest
from bigbase_jax.data.columns import KINDS, Column, Columns, columns_of, read_columns, table_files
from bigbase_jax.data.encoders import Encoders, Names, fit_encoders
from bigbase_jax.data.files import LIMITS, File, Limits, by_split, unused
from bigbase_jax.data.sources.splits import Opened, Read, Split, by_time, digest, stratified, to_split_off
from bigbase_jax.data.sources.text.base import SPLITS

_CODE = ("data.columns", "data.column_files", "data.encoders", "data.sources.splits", "data.sources.table.table")
_BLOCK = 1 << 16  # rows that are encoded at once
_CLASSES = 1000  # that a target may have
_CHOICES = 100  # of a category that a form offers
_SHOWN = 8  # columns that are named in one line
_NUMBERS = 20  # a number that takes more values than this is no class, unless it is asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableRows(Read):
    """How examples are made of the rows of a table. Subclasses say where these come from.

    Rows without target are left out, and so are those of a class that train has not; both are said, and so is how many
    rows of another split are in train too, cell by cell.

    Attributes:
      target_name: the column that is predicted.
      regression: whether it is a number; else it is a class, whatever its kind.
      positive: the class that comes last, as number 1 of two; None: the last of the sorted names.
      drop: columns that are not read.
      kinds: of columns where they are others than inferred, such as "zip:category".
      by_time: the column by which rows are split: the earliest are train, the latest test.
      by_group: rows that have the same in this column are in one split. None, both: rows are dealt at random, by class.
      audit: a column of categories between which a model's decisions are compared (``evaluators.risk``); it is read as
        any other, unless it is among ``drop``.
      balanced: whether ``class_weights`` are given, by which each class counts the same.
      numbers, quantiles, max_categories, min_count, buckets, words: see ``fit_encoders``.
      val_fraction, test_fraction: shares of the rows that are taken from train where the data has no such split.
      seed: of the dealing.

    Raises:
      UserError: a value out of its range.
    """

    target_name: str = "target"
    regression: bool = False
    positive: str | None = None
    drop: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    by_time: str | None = None
    by_group: str | None = None
    audit: str | None = None
    balanced: bool = False
    numbers: str = "quantile"
    quantiles: int = 256
    max_categories: int = 1000
    min_count: int = 1
    buckets: int = 1024
    words: int = 64
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by_time is not None and self.by_group is not None:
            raise UserError(f"rows are split by_time={self.by_time} or by_group={self.by_group}, not by both.")
        if self.regression and (self.positive is not None or self.balanced):
            raise UserError("positive and balanced are for classes; leave them out of a regression.")
        for item in self.kinds:
            if item.rpartition(":")[2] not in KINDS or ":" not in item:
                raise UserError(f"kinds has {item!r}; it reads NAME:KIND, the kind being one of {', '.join(KINDS)}.")

    # -- what subclasses say ---------------------------------------------------------------------------------------

    def read(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> tuple[Columns, list[str]]:
        """The columns, and the split of each of ``Columns.files``: "" where rows are to be dealt."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------------------

    @property
    def kind_of(self) -> dict[str, str]:
        """``kinds``, by column."""
        found = {name: kind for name, _, kind in (item.rpartition(":") for item in self.kinds)}
        return found | ({self.target_name: "number"} if self.regression else {})

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> TableData:
        """Reads and encodes the rows, unless that is in the cache; see ``core.RawDataset``.

        Raises:
          UserError: a file or a column that is not there or cannot be read, nothing to train on, or a target that is
            the same in all rows, or is no class, or no number.
        """
        key = digest([self.file_signature(), repr(self), *map(source_digest, _CODE)])

        def read() -> tuple[Columns, list[str]]:
            return self.read(cache, limit_bytes, say)

        def begin() -> Callable[[Writer], Mapping[str, Any]]:
            return _begin(self, *read())

        store = kept(key, begin, cache, limit_bytes, say, f"encoding the rows of {self.origin()} once")
        return TableData(self, store, read)

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """Of rows by column, whatever columns the table had that the model does not read."""
        return RowCodec(Encoders.from_state(dataset_info["encoders"]), config.get("encoding", "utf-8"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(TableRows):
    """Rows in files: those named after splits (``train.csv``, ``dev.parquet``, ``test/...``) keep them.

    Attributes:
      root: a file, an archive or a folder.
      train, val, test: what the files of the split are called, where not after it.
      header: whether the first line of a table of cells has the names of the columns; else they are "0", "1", ..., or
      names: those.
      encoding: of tables of cells.
      limits: of reading a file.
    """

    root: str
    train: str | None = None
    val: str | None = None
    test: str | None = None
    header: bool = True
    names: tuple[str, ...] = ()
    encoding: str = "utf-8"
    limits: Limits = LIMITS

    def origin(self) -> str:
        return self.root

    def files(self) -> dict[str, list[File]]:
        """By split; all under "" where there are no splits."""
        found = table_files(self.root, self.encoding, self.limits)
        return by_split(found, self.root, {"train": self.train, "val": self.val, "test": self.test})

    def file_signature(self) -> list[Any]:
        return [[split, *file.file_signature] for split, files in self.files().items() for file in files]

    def read(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> tuple[Columns, list[str]]:
        files = self.files()
        ordered = [(split, file) for split in ("", *SPLITS) for file in files.get(split, ())]
        if left := unused([file for _, file in ordered], files):
            say(f"data: not used: {', '.join(left)}")
        columns = read_columns(
            [file for _, file in ordered],
            kinds=self.kind_of,
            header=self.header,
            names=self.names,
            encoding=self.encoding,
            cache=cache,
            limit_bytes=limit_bytes,
            say=say,
        )
        return columns, [split for split, _ in ordered]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BreastCancer(TableRows):
    """Scikit-learn's own set: 569 tumours, malignant or benign, by 30 measures of their cells (Wolberg et al. 1995)."""

    target_name: str = "diagnosis"
    positive: str | None = "malignant"

    def origin(self) -> str:
        return "breast cancer (scikit-learn's own: 569 tumours, Wolberg et al. 1995)"

    def file_signature(self) -> list[Any]:
        return ["breast cancer"]

    def read(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> tuple[Columns, list[str]]:
        from sklearn.datasets import load_breast_cancer  # takes a second

        found = load_breast_cancer()
        values = {str(name): found.data[:, i] for i, name in enumerate(found.feature_names)}
        return columns_of({**values, self.target_name: found.target_names[found.target]}, self.kind_of), [""]


# --- splits, target, encoders -----------------------------------------------------------------------------------------


def _begin(data: TableRows, columns: Columns, split_of_file: Sequence[str]) -> Callable[[Writer], Mapping[str, Any]]:
    """Deals the rows and fits the encoders; gives what writes the encoded rows."""
    target = columns[data.target_name]
    audit = None if data.audit is None else columns[data.audit]
    if audit is not None and audit.kind != "category":
        raise UserError(f"audit={audit.name} holds a {audit.kind}, and no categories; say kinds={audit.name}:category.")
    for name in (data.by_time, data.by_group, *data.drop):
        if name is not None:
            columns[name]  # which says what is not there
    told: list[str] = []
    y_N, classes = _numbers(target) if data.regression else _classes(target, data.positive)
    parts = _split(data, columns, split_of_file, y_N, told)
    train = parts.get("train", np.zeros(0, np.int64))
    if not len(train):
        raise UserError(f"{data.origin()} has no row to train on: none has a {data.target_name}.")
    about: dict[str, Any] = {"rows": columns.rows, "classes": classes}
    if data.regression:
        mean, std = float(np.mean(y_N[train])), float(np.std(y_N[train]))
        if not std > 0:
            raise UserError(f"{data.target_name} is {mean:g} in all rows of train; there is nothing to predict.")
        about |= {"target_mean": mean, "target_std": std}
    else:
        parts, about["classes"], y_N = _known_classes(data, parts, y_N, classes, told)
        about["counts"] = np.bincount(y_N[parts["train"]], minlength=len(about["classes"])).tolist()
    features = {n: c for n, c in columns.items() if n not in {data.target_name, data.by_group, *data.drop}}
    names = ("numbers", "quantiles", "max_categories", "min_count", "buckets", "words")
    how = {name: getattr(data, name) for name in names}
    encoders = fit_encoders(Columns(list(features.values()), columns.rows), parts["train"], **how)
    told += [f"{n:,} rows of {split} are in train too" for split, n in _shared(features, y_N, parts).items()]
    infinite = [name for name, column in features.items() if column.kind == "number" and not _bounded(column)]
    told += [f"infinite numbers in {_listed(infinite)} count as the greatest there are"] if infinite else []
    about |= {"told": told, "encoders": encoders.state(), "files": [list(file) for file in columns.files]}
    about["missing"] = {n: c.missing for n, c in features.items() if c.missing}
    about["groups"] = None if audit is None else list(audit.names)

    def write(writer: Writer) -> Mapping[str, Any]:
        rows = np.concatenate(list(parts.values()))
        encode = encoders.binds(columns)
        widths = {"numbers": len(encoders.features), "categories": len(encoders.category_names)}
        fill = {
            name: writer.reserve(name, np.float32 if name == "numbers" else np.int32, (len(rows), width))
            for name, width in widths.items()
        }
        first = {column.kind: column for column in features.values()}  # which are mapped together
        block = max(1, min(_BLOCK, (1 << 24) // max(widths["numbers"], 1)))
        for start in range(0, len(rows), block):
            for name, array in encode(rows[start : start + block]).items():
                fill[name](start * widths[name], array)
            for column in first.values():
                column.release()
        writer.reserve("target", np.float32 if data.regression else np.int32, rows.shape)(0, y_N[rows])
        writer.reserve("row", np.int64, rows.shape)(0, rows)
        if audit is not None:
            writer.reserve("group", np.int32, rows.shape)(0, audit.values[rows])
        return {**about, "widths": widths, "splits": {split: len(part) for split, part in parts.items()}}

    return write


def _numbers(target: Column) -> tuple[np.ndarray, list[str]]:
    """f64[N], NaN where there is no finite number; and no classes."""
    if target.kind != "number":
        raise UserError(f"{target.name} holds a {target.kind}, and no numbers; say task=classification.")
    y_N = np.array(target.values, np.float64)
    y_N[~np.isfinite(y_N)] = np.nan
    return y_N, []


def _classes(target: Column, positive: str | None) -> tuple[np.ndarray, list[str]]:
    """f64[N], places in the names of the classes, NaN where there is none; and these."""
    if target.kind == "category":
        codes_N, names = np.asarray(target.values), list(target.names)
    elif target.kind == "number":
        values, codes_N = np.unique(np.asarray(target.values, np.float64), return_inverse=True)
        whole = np.isfinite(values)
        names = [f"{value:.17g}" for value in values[whole]]
        codes_N = np.where(codes_N < len(names), codes_N, -1)
        if len(names) > _NUMBERS and len(names) > 0.05 * (codes_N >= 0).sum():
            raise UserError(
                f"{target.name} is {len(names):,} different numbers; to predict a number, say task=regression."
            )
    else:
        raise UserError(f"{target.name} holds a {target.kind}, and no classes; say kinds={target.name}:category.")
    if len(names) > _CLASSES:
        raise UserError(f"{target.name} has {len(names):,} classes; at most {_CLASSES:,} are told apart.")
    ordered = sorted(range(len(names)), key=lambda i: (names[i] == positive, _sort_key(names[i])))
    if positive is not None and positive not in names:
        raise UserError(f"{target.name} has no class {positive!r}.{suggest(positive, names, 'class')}")
    place_K = np.full(len(names) + 1, np.nan)
    place_K[ordered] = np.arange(len(names))
    return place_K[codes_N], [names[i] for i in ordered]


def _sort_key(name: str) -> tuple[float, str]:
    try:
        return (float(name), name)
    except ValueError:
        return (np.inf, name)


def _split(
    data: TableRows, columns: Columns, split_of_file: Sequence[str], y_N: np.ndarray, told: list[str]
) -> dict[str, np.ndarray]:
    """Rows by split, of those that have a target."""
    counts = [count for _, count in columns.files] or [columns.rows]
    split_N = np.repeat(np.array([("", *SPLITS).index(split) for split in split_of_file], np.uint8), counts)
    known_N = ~np.isnan(y_N)
    if not known_N.all():
        told.append(f"{int((~known_N).sum()):,} rows without {data.target_name} left out")
    parts = {s: np.flatnonzero((split_N == i) & known_N) for i, s in enumerate(("", *SPLITS))}
    for split in SPLITS:
        if split in split_of_file and not len(parts[split]) and split != "train":
            told.append(f"the {split} split has no {data.target_name} and is left out")
    parts = {split: part for split, part in parts.items() if len(part)}
    rows = parts.pop("", parts.get("train", np.zeros(0, np.int64)))
    fractions = to_split_off(set(split_of_file) - {""}, data.val_fraction, data.test_fraction)
    if not fractions or not len(rows):
        return parts
    if data.by_time is not None:
        date = columns[data.by_time]
        if date.kind not in ("date", "number"):
            raise UserError(f"{data.by_time} holds a {date.kind}; rows are split by a date or a number.")
        times = np.asarray(date.values[rows])
        gone = np.isnat(times) if date.kind == "date" else np.isnan(times)
        if gone.any():
            told.append(f"{int(gone.sum()):,} rows without {data.by_time} left out")
            rows, times = rows[~gone], times[~gone]
        dealt = by_time(times, dict(reversed(fractions.items())))
    elif data.by_group is not None:
        value_n = np.asarray(columns[data.by_group].values)[rows]
        groups, group_n = np.unique(value_n, return_inverse=True)
        of = stratified([str(group) for group in groups], np.zeros(len(groups)), fractions, data.seed)
        dealt = {split: np.flatnonzero(np.isin(group_n, chosen)) for split, chosen in of.items()}
    else:
        classes = np.zeros(len(rows)) if data.regression else y_N[rows]
        dealt = stratified(range(len(rows)), classes, fractions, data.seed)
    found = {**parts, **{split: rows[part] for split, part in dealt.items()}}
    return {split: found[split] for split in SPLITS if split in found}


def _known_classes(
    data: TableRows, parts: dict[str, np.ndarray], y_N: np.ndarray, classes: list[str], told: list[str]
) -> tuple[dict[str, np.ndarray], list[str], np.ndarray]:
    """The splits without rows of classes that train has not, the classes of train, and the rows' places in these."""
    there = np.unique(y_N[parts["train"]]).astype(int)
    if len(there) < 2:
        raise UserError(
            f"{data.target_name} is {classes[there[0]]!r} in all rows of train; there is nothing to predict."
        )
    place_K = np.full(len(classes) + 1, -1)
    place_K[there] = np.arange(len(there))
    label_N = place_K[np.where(np.isnan(y_N), len(classes), y_N).astype(int)]
    for split, part in list(parts.items()):
        known = part[label_N[part] >= 0]
        if len(known) < len(part):
            new = sorted({classes[int(i)] for i in y_N[part[label_N[part] < 0]]})
            told.append(
                f"{len(part) - len(known):,} rows of {split} of classes that train has not ({_listed(new)}) left out"
            )
        parts[split] = known
    return {split: part for split, part in parts.items() if len(part)}, [classes[i] for i in there], label_N


def _shared(features: Mapping[str, Column], y_N: np.ndarray, parts: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many rows of each other split are in train too, with all their cells."""
    hash_N = np.asarray(y_N, np.float64).view(np.uint64).copy()
    for column in features.values():
        if column.kind == "text":
            texts = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in column.values)
            value_N = np.frombuffer(b"".join(texts), np.uint64)
        elif column.kind == "number":
            value_N = np.asarray(column.values, np.float64).view(np.uint64)
        else:
            value_N = np.asarray(column.values).astype(np.int64).view(np.uint64)
        column.release()
        hash_N = (hash_N ^ (hash_N >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15) + value_N  # as in splitmix64
    hash_N ^= hash_N >> np.uint64(32)
    shared = {s: int(np.isin(hash_N[part], hash_N[parts["train"]]).sum()) for s, part in parts.items() if s != "train"}
    return {split: count for split, count in shared.items() if count}


def _bounded(column: Column) -> bool:
    found = column.values.dtype.kind == "i" or not np.isinf(column.values).any()
    column.release()
    return bool(found)


# --- what was read ----------------------------------------------------------------------------------------------------


class TableData(Opened):
    """A ``Dataset`` of a table that was read.

    Attributes:
      rows: i64 by split: the number in the table, from 0, of each example.
      encoders: what encoded them.
      columns: gives the table's own ``Columns``, from the cache where they are there.
    """

    def __init__(self, data: TableRows, store: Store, read: Callable[[], tuple[Columns, list[str]]]):
        about = store.about
        self.encoders = Encoders.from_state(about["encoders"])
        self.columns: Callable[[], Columns] = lambda: read()[0]
        target_N, row_N = store.values("target"), store.values("row")
        arrays = {name: store.values(name).reshape(len(row_N), width) for name, width in about["widths"].items()}
        arrays["target" if data.regression else "label"] = target_N
        if about["groups"] is not None:
            arrays["group"] = store.values("group")
        splits, self.rows, start = {}, {}, 0
        for split, count in about["splits"].items():
            part = {name: array[start : start + count] for name, array in arrays.items()}
            self.rows[split] = row_N[start : start + count]
            splits[split] = _source(split, part, self.rows[split], store.kept)
            start += count
        info = {
            "encoders": about["encoders"],
            "number_names": self.encoders.number_names,
            "category_names": self.encoders.category_names,
            "cardinalities": self.encoders.cardinalities,
            "target_name": data.target_name,
            "train_rows": about["splits"]["train"],
        }
        if about["groups"] is not None:
            info["group_names"] = tuple(about["groups"])
        if data.regression:
            info |= {name: about[name] for name in ("target_mean", "target_std")}
        else:
            info |= {"num_classes": len(about["classes"]), "class_names": tuple(about["classes"])}
        if data.balanced:
            counts = np.array(about["counts"])
            info["class_weights"] = tuple((counts.sum() / (len(counts) * counts)).tolist())
        super().__init__(splits, info, self._describe(data, about), [data.file_signature(), repr(data)])

    def _describe(self, data: TableRows, about: Mapping[str, Any]) -> str:
        kinds: dict[str, list[str]] = {}
        for encoder in self.encoders.columns:
            count = f" {len(encoder.names)}" if isinstance(encoder, Names) else ""
            kind = (
                "hashed categories"
                if encoder.cardinality and not count
                else {"category": "categories"}.get(encoder.kind, f"{encoder.kind}s")
            )
            kinds.setdefault(kind, []).append(encoder.name + count)
        read = ", ".join(f"{len(names):,} {kind} ({_listed(names)})" for kind, names in kinds.items())
        parts = [f"{data.origin()}: {about['rows']:,} rows; {data.target_name} from {read}"]
        gone = [f"{name} {count / about['rows']:.1%}" for name, count in about["missing"].items()]
        parts += [f"missing: {_listed(gone)}"] if gone else []
        why: dict[str, list[str]] = {}
        for name, reason in self.encoders.left_out.items():
            why.setdefault(reason, []).append(name)
        parts += [f"left out: {_listed(names)} ({reason})" for reason, names in why.items()]
        return "; ".join([*parts, *about["told"]])


def _source(split: str, arrays: Mapping[str, np.ndarray], row_n: np.ndarray, kept: str) -> Split:
    """Of the rows with these numbers in the table, which have these values."""

    def batch(indices: np.ndarray) -> Batch:
        return {name: array[indices] for name, array in arrays.items()}

    labels = arrays.get("label")
    return Split(split, len(row_n), None, kept, labels, batch=batch, name=lambda index: f"row {row_n[index] + 1:,}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(name if len(name) < 40 else f"{name[:37]}..." for name in names[:_SHOWN]) + more


# --- what a user gives ------------------------------------------------------------------------------------------------


class RowCodec(Codec):
    """Rows as they stand in the table: by column, or the text of a table whose first line has the names."""

    def __init__(self, encoders: Encoders, encoding: str = "utf-8"):
        self._encoders, self._encoding = encoders, encoding
        short = {e.name: getattr(e, "names", ())[:_CHOICES] for e in encoders.columns if e.kind != "text"}
        self.fields = Fields({e.name: ((e.name,),) for e in encoders.columns}, encoding=encoding, short=short)

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """
        Raises:
          UserError: it is no row, lacks a column, or has something else than a number, or a date, in it.
        """
        if isinstance(given, Mapping):
            return [self._encoders.encode_row(given)]
        if isinstance(given, str):
            raise UserError(f"{given} is no table; give rows in .csv, .parquet, .jsonl, ...")
        try:
            text = given.decode("utf-8-sig" if self._encoding == "utf-8" else self._encoding)
        except UnicodeDecodeError as error:
            raise UserError(f"the table is not valid {self._encoding} ({error.reason}).") from error
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in text[:4096] else ",")
        return [self._encoders.encode_row(row) for row in table]
