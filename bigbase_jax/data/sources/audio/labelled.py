"""Recordings of one class each: words, commands, speakers, kinds of sound.

Legend: T samples, N recordings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from bigbase_jax.audio.files import SUFFIXES, decode
from bigbase_jax.build import suggest
from bigbase_jax.core import Codec, Example, Source, UserError
from bigbase_jax.data.files import LIMITS, TABLES, File, Limits, existing, file_at, kind_of, named_after, open_file
from bigbase_jax.data.rows import Row, rows
from bigbase_jax.data.sources.audio.audio import COLUMNS, AudioCodec, pcm16
from bigbase_jax.data.sources.folder import ClassFolders, Listed, labels
from bigbase_jax.data.sources.splits import digest, split_off

_LABELS = ("label", "class", "category", "command", "word", "target")


class Recordings:
    """A ``Source`` of sound files.

    Attributes:
      labels: i32[N].
    """

    def __init__(
        self, folder: str, files: Sequence[Listed], rate: int, members: Mapping[str, File], inside: str | None = None
    ):
        """Files ``files`` below ``folder``, at ``rate``; ``members`` by name where they are in an archive; ``inside``:
        a folder that links do not leave."""
        self._folder, self._rate, self._members, self._inside = folder, rate, members, inside
        self._names = tuple(file.name for file in files)
        self.labels = labels(files)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        """``audio`` i16[T] and ``label`` i32[]; raises UserError naming a file that does not decode."""
        name = self._names[index]
        if self._members:
            with open_file(self._members[name]) as file:
                x_T = decode(file.read(), self._rate)
        else:
            x_T = decode(os.path.join(self._folder, name), self._rate, folder=self._inside)
        return {"audio": pcm16(x_T), "label": self.labels[index]}

    def name(self, index: int) -> str:
        """The file's path relative to the root."""
        return self._names[index]


class LabelledAudio:
    """Folders of recordings, one for each class (see ``sources.folder``), or a table that names files and classes.

    A table (CSV, TSV, JSON lines, ...) has a row for each recording: its file as seen from the table's folder, which
    it does not leave, its class, and, where there is a column ``split``, which it is in. It is ``root`` itself, or the
    only table in that folder. Splits that lack are dealt as ``sources.splits`` says.

    Attributes:
      splits: ``audio`` i16[T] and ``label`` i32[] each.
      dataset_info: ``num_classes``, ``class_names`` and ``rate``.
      description: folder, recordings and classes.
    """

    def __init__(
        self,
        root: str,
        rate: int = 16_000,
        path: str | None = None,
        label: str | None = None,
        split: str = "split",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        limits: Limits = LIMITS,
    ):
        """Lists the files; opens none but a table.

        Args:
          root: a folder, an archive of one, or a table.
          rate: samples per second, to which all recordings are resampled.
          path, label, split: columns of the table; None: the usual names.
          val_fraction, test_fraction, seed: see ``ClassFolders``, whose errors these are too.
          limits: of archives and tables.

        Raises:
          UserError: no recordings, a column that is not there, a file that is not, or one class only.
        """
        table = _table(root)
        if table is None:
            listed = ClassFolders(root, SUFFIXES, "recordings", val_fraction, test_fraction, seed, limits)
            files, names, folder, members = listed.files, listed.names, listed.folder, listed.members
            self.description = listed.description
        else:
            folder, members = os.path.dirname(os.path.abspath(table)), dict[str, File]()
            files, names = _read(file_at(table, table, limits), folder, (path, label, split))
            train = files["train"]
            dealt = split_off(files, [f.name for f in train], labels(train), val_fraction, test_fraction, seed)
            files |= {name: [train[i] for i in indices] for name, indices in dealt.items()}
            self.description = f"{sum(map(len, files.values())):,} recordings of {len(names)} classes in {table}"
        self._files, self._rate = files, rate
        self.splits: Mapping[str, Source] = {
            name: Recordings(folder, files[name], rate, members, folder if table is not None else None)
            for name in ("train", "val", "test")
            if name in files
        }
        self.dataset_info: Mapping[str, Any] = {
            "num_classes": len(names),
            "class_names": tuple(names),
            "rate": rate,
        }

    def fingerprint(self) -> str:
        """A digest of each split's paths, sizes and modification times, and of how they are decoded."""
        files = {split: [tuple(file) for file in listed] for split, listed in self._files.items()}
        return digest([self.dataset_info["class_names"], self._rate, *sorted(files.items())])

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """Recordings at the rate of the training."""
        return AudioCodec(int(dataset_info["rate"]))


def _table(root: str) -> str | None:
    """The table that ``root`` is or has, as the only one."""
    if kind_of(root) in TABLES:
        return existing(root, "file")
    if not os.path.isdir(os.path.expanduser(root)):
        return None
    folder = existing(root)
    found = [name for name in sorted(os.listdir(folder)) if kind_of(name) in TABLES and not name.startswith(".")]
    if len(found) > 1:
        raise UserError(f"{root} has the tables {' and '.join(found[:4])}; name the one to read as root.")
    return os.path.join(folder, found[0]) if found else None


def _read(table: File, folder: str, columns: Sequence[str | None]) -> tuple[dict[str, list[Listed]], list[str]]:
    """The recordings that a table names by split, and the names of its classes by alphabet."""
    found: list[tuple[Row, str, str, str]] = []
    names: tuple[str, str, str] | None = None
    for row in rows(table):
        if names is None:
            names = _names(table, row.values, columns)
        split = str(row.values.get(names[2]) or "")
        place = named_after(split) if split else "train"
        if place is None:
            raise UserError(f"{row.where} has the split {split!r}; known are train, val and test.")
        found.append((row, str(row.values[names[0]]), str(row.values[names[1]]).strip(), place))
    classes = sorted({label for _, _, label, split in found if split == "train"})
    if len(classes) < 2:
        raise UserError(f"{table} has {len(classes)} classes in its training rows; two are the least.")
    files: dict[str, list[Listed]] = {}
    for row, path, label, split in found:
        if label not in classes:
            raise UserError(f"{row.where} has a class {label!r} that train does not have.")
        whole = os.path.realpath(os.path.join(folder, path))
        if not whole.startswith(os.path.join(os.path.realpath(folder), "")):
            raise UserError(f"{row.where} names {path}, which is outside of the table's folder; move it inside.")
        try:
            status = os.stat(whole)
        except OSError as error:
            raise UserError(f"{row.where} names {path}, which cannot be read: {error.strerror or error}.") from error
        files.setdefault(split, []).append(Listed(path, classes.index(label), status.st_size, status.st_mtime_ns))
    return files, classes


def _names(table: File, values: Mapping[str, Any], columns: Sequence[str | None]) -> tuple[str, str, str]:
    """The columns of the path, the class and the split."""
    chosen = []
    for what, given, usual in zip(("path", "label"), columns, (COLUMNS, _LABELS), strict=False):
        name = given or next((name for name in usual if name in values), None)
        if name is None or name not in values:
            wrong = f"has no column {given!r}.{suggest(given, values, 'column')}" if given else f"has no {what} column"
            raise UserError(f"{table} {wrong}; its columns are {', '.join(map(repr, list(values)[:8]))}.")
        chosen.append(name)
    return chosen[0], chosen[1], columns[2] or "split"
