"""A table of numbers in a .csv file, one column of which is to be predicted from the others.

Axes: N rows, F features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.core import Codec, Example, Fields, UserError
from bigbase_jax.data.sources.splits import digest


class Rows:
    """A ``Source``: rows of arrays by name."""

    in_memory = True

    def __init__(self, arrays: Mapping[str, np.ndarray], rows: np.ndarray):
        self._arrays, self._rows = arrays, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return {name: x[self._rows[index]] for name, x in self._arrays.items()}

    def name(self, index: int) -> str:
        return f"row {self._rows[index] + 1}"


class RowCodec(Codec):
    """The features of a row of a user's table, as training saw them."""

    def __init__(self, columns: Sequence[str]):
        self.columns = columns
        self.fields = Fields(columns={name: ((name,),) for name in columns})

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """``features`` f32[F]; raises UserError where one is no number."""
        try:
            return [{"features": np.array([float(given[name]) for name in self.columns], np.float32)}]  # type: ignore
        except (TypeError, ValueError) as error:
            raise UserError(f"a row needs numbers in {', '.join(self.columns)}.") from error


class NumberTable:
    """A seeded split of the rows into train, val and test.

    Attributes:
      splits: ``features`` f32[F] and ``target`` f32[] each, as they stand in the table.
      dataset_info: ``columns``, and what a task needs to scale: ``feature_mean`` and ``feature_std`` (F numbers each),
        ``target_mean`` and ``target_std``, of the training rows.
      description: the file, its rows and columns.
    """

    def __init__(self, path: str, column: str, val_fraction: float = 0.15, test_fraction: float = 0.15, seed: int = 0):
        """Reads the table.

        Args:
          path: the file; its first line names the columns.
          column: the one to predict.
          val_fraction, test_fraction: shares of the rows.
          seed: of the split.

        Raises:
          UserError: no such file or column, or a cell that is no number.
        """
        try:
            table = np.genfromtxt(path, delimiter=",", names=True, dtype=np.float32)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a table of numbers: {error}.") from error
        names = table.dtype.names or ()
        if column not in names:
            raise UserError(f"{path} has no column {column!r}; it has {', '.join(names)}.")
        columns = tuple(name for name in names if name != column)
        arrays = {"features": np.stack([table[name] for name in columns], -1), "target": table[column]}
        if not all(np.isfinite(x).all() for x in arrays.values()):
            raise UserError(f"{path} has a cell that is no number; fill it or remove its row.")

        order = np.random.default_rng(seed).permutation(len(table))
        val, test = (round(len(table) * share) for share in (val_fraction, test_fraction))
        parts = {"train": order[val + test :], "val": order[:val], "test": order[val : val + test]}
        self.splits = {name: Rows(arrays, np.sort(rows)) for name, rows in parts.items() if len(rows)}
        train = {name: x[parts["train"]] for name, x in arrays.items()}
        self.dataset_info: Mapping[str, Any] = {
            "columns": columns,
            "feature_mean": tuple(map(float, train["features"].mean(0))),
            "feature_std": tuple(map(float, train["features"].std(0) + 1e-6)),
            "target_mean": float(train["target"].mean()),
            "target_std": float(train["target"].std() + 1e-6),
        }
        self.description = f"{len(table):,} rows of {path}: {column} from {', '.join(columns)}"
        self._digest = digest([arrays["features"].tobytes(), arrays["target"].tobytes(), seed, val, test])

    def fingerprint(self) -> str:
        """A digest of the numbers and of the split."""
        return self._digest

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """What ``--mode=predict`` reads of each row."""
        return RowCodec(dataset_info["columns"])
