"""Recordings of one class each: words, commands, speakers, kinds of sound.

Legend: T samples, N recordings.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bigbase_jax.audio.files import SUFFIXES, pcm16
from bigbase_jax.build import suggest
from bigbase_jax.core import Codec, Example, Source, UserError
from bigbase_jax.data.files import (
    LIMITS,
    TABLES,
    File,
    Limits,
    existing,
    file_at,
    kind_of,
    named_after,
    refuse_permission,
)
from bigbase_jax.data.rows import rows
from bigbase_jax.data.sources.audio.audio import COLUMNS, AudioCodec, column, read, recordings
from bigbase_jax.data.sources.folder import ClassFolders, Listed, labels
from bigbase_jax.data.sources.splits import deal, digest, split_off, to_split_off

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
        file = self._members[name] if self._members else File(name, os.path.join(self._folder, name), 0, 0)
        return {"audio": pcm16(read(file, self._rate, folder=self._inside)), "label": self.labels[index]}

    def name(self, index: int) -> str:
        """The file's path relative to the root."""
        return self._names[index]


class LabelledAudio:
    """Folders of recordings, one for each class (see ``sources.folder``), or rows that name files and classes.

    Rows are those of a table (CSV, TSV, JSON lines, ...): a file as seen from the table's folder, which it does not
    leave, its class, and, where there is a column ``split``, which it is in. The table is ``root`` itself, or the only
    one in that folder. Or they are the names of the files themselves, with ``names``. Splits that lack are dealt as
    ``sources.splits`` says.

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
        names: str | None = None,
        held_out: str | None = None,
        group: str | None = None,
        open_set: bool = False,
        window: float | None = None,
        hop: float | None = None,
    ):
        """Lists the files; opens none but a table.

        Args:
          root: a folder, an archive of one, or a table.
          rate: samples per second, to which all recordings are resampled.
          path, label, split: columns of the rows; None: the usual names.
          val_fraction, test_fraction, seed: see ``ClassFolders``, whose errors these are too.
          limits: of archives and tables.
          names: what the parts of a file's name are, as columns: with ``"label_speaker_take"``, ``7_jackson_32.wav`` is
            take 32 of the class 7 by jackson. All files below ``root`` are named so.
          held_out: ``"speaker:jackson"``, or ``"take:0/1/2"``: the column, and its values, of rows that are test; the
            others are train, whatever else is said of these.
          group: a column of whose values none is in two splits, where splits are dealt (speakers).
          open_set: whether val and test may have classes that train lacks, as in verification: they are numbered behind
            those of train, and are in no count and no name.
          window, hop: of what a user gives; see ``AudioCodec``.

        Raises:
          UserError: no recordings, a column that is not there, a file that is not, or one class only.
        """
        table = None if names else _table(root)
        if table is None and not names:
            if held_out or group or open_set:
                raise UserError("held_out, group and open_set read columns; give a table as root, or names.")
            listed = ClassFolders(root, SUFFIXES, "recordings", val_fraction, test_fraction, seed, limits)
            files, classes, folder, members = listed.files, listed.names, listed.folder, listed.members
            self.description = listed.description
        else:
            members = dict[str, File]()
            given: Iterable[tuple[str, Mapping[str, Any]]]
            if table:
                folder = os.path.dirname(os.path.abspath(table))
                given = ((row.where, row.values) for row in rows(file_at(table, table, limits)))
            else:
                refuse_permission(limits, root)
                folder, path = existing(root), path or "path"
                given = _of_names(folder, names or "")
            found = _read(given, table or folder, (path, label, split), held_out, group)
            if group:
                fractions = to_split_off({r.split for r in found}, val_fraction, test_fraction)
                dealt = deal([r.split for r in found], [r.group for r in found], fractions, seed)
                found = [r._replace(split=s) for r, s in zip(found, dealt, strict=True)]
            files, classes = _by_split(found, table or folder, open_set)
            if not group:
                train = files["train"]
                rest = split_off(files, [f.name for f in train], labels(train), val_fraction, test_fraction, seed)
                files |= {name: [train[i] for i in indices] for name, indices in rest.items()}
            count = sum(map(len, files.values()))
            self.description = f"{count:,} recordings of {len(classes)} classes in {table or folder}"
        self._open(folder, files, rate, members, None if members or not (table or names) else folder)
        self.dataset_info: Mapping[str, Any] = {
            "num_classes": len(classes),
            "class_names": tuple(classes),
            "rate": rate,
        }

    def _open(self, folder: str, files: Mapping[str, list[Listed]], rate: int, *where: Any) -> None:
        self._files, self._rate = files, rate
        self.splits: Mapping[str, Source] = {
            name: Recordings(folder, files[name], rate, *where) for name in ("train", "val", "test") if name in files
        }

    def fingerprint(self) -> str:
        """A digest of each split's paths, sizes and modification times, and of how they are decoded."""
        files = {split: [tuple(file) for file in listed] for split, listed in self._files.items()}
        return digest([self.dataset_info.get("class_names"), self._rate, *sorted(files.items())])

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """Recordings at the rate of the training."""
        return AudioCodec(int(dataset_info["rate"]), config.get("window"), config.get("hop"))


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


class _Recording(NamedTuple):
    """A row: where it stands, for people, its file, and the names of its class, split and group."""

    where: str
    path: str
    label: str
    split: str
    group: str


def _of_names(folder: str, names: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each file stands, and the values that its name says, in order of their paths."""
    columns = names.split("_")
    for name, path in recordings(folder):
        parts = os.path.splitext(os.path.basename(name))[0].split("_")
        if len(parts) != len(columns):
            raise UserError(f"{path} has {len(parts)} parts between '_', and names={names} has {len(columns)}.")
        yield path, {"path": name, **dict(zip(columns, parts, strict=True))}


def _read(
    found: Iterable[tuple[str, Mapping[str, Any]]],
    what: str,
    columns: Sequence[str | None],
    held_out: str | None,
    group: str | None,
) -> list[_Recording]:
    """The recordings that rows name; see ``LabelledAudio``."""
    key, _, values = (held_out or "").partition(":")
    names: list[str] = []
    listed, seen = [], set()
    for where, row in found:
        if not names:
            kinds = zip(columns, (COLUMNS, _LABELS), ("of recordings", "of classes"), strict=False)
            names = [*(column(what, row, *kind) for kind in kinds), columns[2] or "split"]
            for given in filter(None, (key, group)):
                column(what, row, given, (), "")
        split = str(row.get(names[2]) or "")
        place = named_after(split) if split else "train"
        if place is None:
            raise UserError(f"{where} has the split {split!r}; known are train, val and test.")
        if held_out:
            seen.add(str(row[key]))
            place = "test" if str(row[key]) in values.split("/") else "train"
        kept = str(row[group]) if group else ""
        listed.append(_Recording(where, str(row[names[0]]), str(row[names[1]]).strip(), place, kept))
    if held_out and (unknown := [value for value in values.split("/") if value not in seen]):
        said = suggest(unknown[0], sorted(seen), "value") or f" It has {', '.join(sorted(seen)[:8])}."
        raise UserError(f"held_out={held_out}: no {key} is {unknown[0]!r}.{said}")
    if not listed:
        raise UserError(f"{what} names no recordings ({' '.join(sorted(SUFFIXES))}).")
    return listed


def _by_split(found: Sequence[_Recording], what: str, open_set: bool) -> tuple[dict[str, list[Listed]], list[str]]:
    """The files of each split, and the names of the classes by alphabet."""
    classes = sorted({r.label for r in found if r.split == "train"})
    if len(classes) < 2:
        raise UserError(f"{what} has {len(classes)} classes in its training rows; two are the least.")
    numbers = classes + sorted({r.label for r in found} - set(classes)) if open_set else classes
    folder = os.path.dirname(what) if os.path.isfile(what) else what
    files: dict[str, list[Listed]] = {}
    for r in found:
        if r.label not in numbers:
            raise UserError(f"{r.where} has a class {r.label!r} that train does not have.")
        whole = os.path.realpath(os.path.join(folder, r.path))
        if not whole.startswith(os.path.join(os.path.realpath(folder), "")):
            raise UserError(f"{r.where} names {r.path}, which is outside of the table's folder; move it inside.")
        try:
            status = os.stat(whole)
        except OSError as error:
            raise UserError(f"{r.where} names {r.path}, which cannot be read: {error.strerror or error}.") from error
        files.setdefault(r.split, []).append(Listed(r.path, numbers.index(r.label), status.st_size, status.st_mtime_ns))
    return files, classes
