"""Files of text and tables: which there are, which split each belongs to, and their bytes.

As they are, in gzip or Zstandard, or in a zip or tar. Folders of Hugging Face's ``datasets`` are known: what
``save_to_disk`` wrote, and downloads from the hub.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import dataclasses
import datetime
import functools
import gzip
import importlib
import io
import os
import pathlib
import re
import shutil
import stat
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bigbase_jax.build import build, suggest
from bigbase_jax.core import UserError
from bigbase_jax.data.archives import Member, members
from bigbase_jax.runtime.limits import FREE, PIXELS, RATIO, TEXT, limit, too_much
from bigbase_jax.runtime.untrusted import not_regular

PLAIN = frozenset({".txt", ".text", ".md", ".rst", ".conll", ".bio"})
"""Suffixes of plain text."""
TABLES = frozenset({".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".xlsx", ".parquet", ".arrow"})
"""Suffixes of what has rows."""
_PACKED = (".gz", ".zst")
_ARCHIVES = (".zip", ".tar", ".tgz")
_CURES = {
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".html"), "export it as .txt"),
    **dict.fromkeys((".xls", ".xlsm", ".ods", ".numbers"), "save it as .xlsx or .csv"),
    **dict.fromkeys((".rar", ".7z", ".bz2", ".xz"), "unpack it"),
    **dict.fromkeys(
        (".pkl", ".pickle", ".joblib", ".pt"),
        "a pickle can run code and is never read; save what it holds as .csv, .jsonl or .parquet",
    ),
    **dict.fromkeys((".db", ".sqlite", ".mdb"), "export its table as .csv"),
    "without suffix": "call it .txt, .csv, ...",
}
_NOT_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice)\b|(card\.md|(dataset_infos?|dataset_dict)\.json)$", re.IGNORECASE
)
_SPLITS = {
    "train": ("training", "train"),
    "val": ("validation", "valid", "val", "development", "dev", "evaluation", "eval"),
    "test": ("testing", "test", "holdout", "hold-out", "hold_out", "heldout", "held-out", "held_out"),
}
"""What splits are called, in any case, also with "set" or "data" after it (``training_set``, ``TestData``)."""


@dataclasses.dataclass(frozen=True, order=True)
class Limits:
    """What a file may make of this process's memory, whatever it says of itself: a few KB can ask for all of it.

    Files that are read piece by piece may have any size. What exceeds a limit is refused, by name; raise the limit
    for data that is honest (``--config.data.dataset.limits.pixels=200_000_000``). ``BIGBASE_LIMITS=2`` in the
    environment doubles all of them, and those of everything else that comes from elsewhere (``runtime.limits``).

    Attributes:
      pixels: of a picture, by its header. Its file may have four bytes for each.
      text: characters of a line, a row, a record or a file that is read as one text; subwords take 200 to 500 bytes of
        memory for each. A JSON file that is neither a list nor lines may have 16 times as many.
      ratio: bytes, or characters, that come out of a packed file (gzip, Zstandard, zip, Parquet, Arrow, npz) for each
        byte of it, beyond the first 64 MiB. Text packs 3 to 20 times, a bomb a thousand times and more.
      consent: the column of a table, or the entry of JSON, that says whether a row may be used; None: all may.
      retention: the one that says until which day it may be kept; None: for good. See ``data.consent``.

    Raises:
      UserError: a limit that is not positive.
    """

    pixels: int = PIXELS
    text: int = TEXT
    ratio: float = RATIO
    consent: str | None = None
    retention: str | None = None

    def __post_init__(self) -> None:
        for name in ("pixels", "text", "ratio"):
            value = getattr(self, name)
            if not value > 0:
                raise UserError(f"limits.{name} is {value}; it must be positive.")

    @property
    def most_pixels(self) -> int:
        """``pixels`` times what the environment says."""
        return limit(self.pixels)

    @property
    def most_text(self) -> int:
        """``text`` times what the environment says."""
        return limit(self.text)

    @property
    def unasked(self) -> Limits:
        """The same for what needs nobody's consent."""
        return dataclasses.replace(self, consent=None, retention=None)

    def meter(self, name: object, packed: int) -> Callable[[int], None]:
        """What counts the bytes that come out of a file of ``packed`` bytes; raises UserError beyond the limit."""
        ratio = limit(self.ratio)
        left = max(limit(FREE), ratio * packed)

        def count(size: int) -> None:
            nonlocal left
            left -= size
            if left < 0:
                what = f"{name} unpacks to more than {ratio:,} times its {packed:,} bytes, as bombs do"
                raise too_much(what, f"raise {KEY}.ratio")

        return count


LIMITS = Limits()
KEY = "data.dataset.limits"
"""What a user sets to raise one of ``Limits``."""


def limits_of(config: Mapping[str, Any]) -> Limits:
    """``limits`` among a data set's arguments, as a config has them, for what a user gives to be answered; the default
    ones where they are not there."""
    found: Limits = build(config.get("limits"), _path=f"config.{KEY}") or LIMITS
    return found.unasked


def refuse_permission(limits: Limits, what: str) -> None:
    """
    Raises:
      UserError: rows are to be read by their consent or retention, and these examples are no rows.
    """
    if limits.consent is not None or limits.retention is not None:
        raise UserError(
            f"{what} has no columns that could say who consents; leave {KEY}.consent and retention out, and keep files "
            "that may not be used elsewhere."
        )


def too_long(where: str, limits: Limits) -> UserError:
    """Says that a text is longer than ``limits.text``."""
    return too_much(f"{where} has more than {limits.most_text:,} characters", f"raise {KEY}.text")


class File(NamedTuple):
    """A file of documents or rows.

    Attributes:
      name: relative to the root, with "/".
      path: where it is.
      size: in bytes.
      mtime_ns: when it was changed.
      member: where ``path`` is an archive, the file in it.
      limits: of reading it.
    """

    name: str
    path: str
    size: int
    mtime_ns: int
    member: str = ""
    limits: Limits = LIMITS

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else self.path

    @property
    def file_signature(self) -> list[str | int]:
        """What changes when the file does."""
        return [self.name, self.path, self.size, self.mtime_ns, self.member, *self.permission]

    @property
    def permission(self) -> list[str]:
        """What changes when other rows of the file may be read: by which columns, and today's date."""
        by = [self.limits.consent or "", self.limits.retention or ""]
        return [*by, str(datetime.datetime.now(datetime.UTC).date()) if by[1] else ""] if any(by) else []


def list_files(root: str, limits: Limits = LIMITS) -> list[File]:
    """The files below a folder that hold documents, by name; or the file itself, of whatever kind.

    Links are followed, also out of the folder (data is often on another disk), each folder once; hidden files, READMEs
    and licences are left out, and what ``datasets`` notes beside its files. An archive (zip, tar) is opened where it is
    named, or where a folder holds nothing else.

    Raises:
      UserError: there is nothing there, nothing that holds documents, or a pipe, socket or device among them.
    """
    folder = os.path.expanduser(root)
    if os.path.isfile(folder):
        if kind_of(folder) in _ARCHIVES:
            return _members(folder, "", limits)
        return [readable(one_file(folder, limits))]
    existing(root, "file or folder")
    found: list[File] = []
    archives: list[tuple[str, str]] = []
    others: Counter[str] = Counter()
    for name, path in walk(folder):
        if kind_of(name) in PLAIN | TABLES:
            if not (os.path.basename(name) == "state.json" and os.path.exists(path[: -len("state.json")] + _INFO)):
                found.append(file_at(name, path, limits))
        else:
            others[kind_of(name) or "without suffix"] += 1
            if kind_of(name) in _ARCHIVES:
                archives.append((path, name + "/"))
    if not found:
        found = [file for path, prefix in archives for file in _members(path, prefix, limits)]
    if not found:
        have = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3)) or "nothing"
        raise UserError(f"{root} holds no text or table; it has {have}. {read_endings(others.elements())}")
    return sorted(found)


def read_endings(kinds: Iterable[str] = ()) -> str:
    """Sentences on which endings are read, and on what to do about some that are not."""
    known = Counter(kind or "without suffix" for kind in kinds).most_common()
    cures = [f" {kind}: {_CURES[kind]}." for kind, _ in known if kind in _CURES]
    return (
        "Read are texts (.txt, .md, .rst) and tables (.csv, .tsv, .xlsx, .json, .jsonl, .parquet, .arrow), also in .gz,"
        f" .zst, .zip and .tar.{''.join(cures[:2])}"
    )


def readable(file: File) -> File:
    """The file; raises UserError if its ending says that it is something else than text or rows."""
    kind = kind_of(file.name)
    if kind in _CURES or kind in _ARCHIVES:
        raise UserError(f"{file} is not read{' as one file' * (kind in _ARCHIVES)}. {read_endings([kind])}")
    return file


_INFO = "dataset_info.json"  # beside state.json, in what ``save_to_disk`` wrote


def one_file(path: str, limits: Limits = LIMITS) -> File:
    """The file at a path; raises UserError if there is none."""
    return file_at(os.path.basename(path), existing(path, "file"), limits)


def existing(path: str, kind: str = "folder") -> str:
    """``path`` with ``~`` expanded, if it is there and is a "folder", a "file" or either ("file or folder").

    Raises:
      UserError: it is not (with the nearest name beside it), or it is of the other kind.
    """
    expanded = os.path.expanduser(path)
    if (os.path.isdir(expanded) and "folder" in kind) or (os.path.isfile(expanded) and "file" in kind):
        return expanded
    if os.path.exists(expanded):
        other = "file" if kind == "folder" else "folder"
        raise UserError(f"{path} is a {other}, not a {kind}.")
    parent, name = os.path.split(os.path.abspath(expanded))
    while not os.path.isdir(parent):  # name the first missing part of the path
        parent, name = os.path.split(parent)
    try:
        beside = [entry.name for entry in os.scandir(parent) if not entry.name.startswith(".")]
    except OSError:
        beside = []
    hint = suggest(name, beside, f"name in {parent}")
    if len(beside) > 20 and "Did you mean" not in hint:
        hint = ""
    raise UserError(f"there is no {kind} {path}.{hint}")


def above(folder: str) -> set[str]:
    """The folders that a folder is in, all links followed."""
    return set(map(str, pathlib.Path(os.path.realpath(folder)).parents))


def walk(folder: str) -> Iterator[tuple[str, str]]:
    """(name relative to the folder, path) of every file that may be data."""
    seen = above(folder)
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # links may lead up, or in many ways to the same folder
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and not _NOT_DATA.match(name):
                path = os.path.join(where, name)
                yield os.path.relpath(path, folder).replace(os.sep, "/"), path


def _members(path: str, prefix: str, limits: Limits) -> list[File]:
    """The files in an archive that hold documents."""
    found, others = in_archive(path, PLAIN | TABLES, limits)
    if not found and not prefix:
        raise UserError(f"{path} holds no text or table. {read_endings(others)}")
    return [file._replace(name=prefix + file.name) for file in found]


def is_archive(path: str) -> bool:
    return kind_of(path) in _ARCHIVES and os.path.isfile(os.path.expanduser(path))


def files_of(root: str, kinds: Collection[str], limits: Limits) -> list[File]:
    """The files of some kinds below a folder, or in an archive; raises UserError as ``walk`` and ``in_archive`` do."""
    if is_archive(root):
        return in_archive(root, kinds, limits)[0]
    return [file_at(name, path, limits) for name, path in walk(root) if kind_of(name) in kinds]


def in_archive(path: str, kinds: Collection[str], limits: Limits) -> tuple[list[File], list[str]]:
    """The files of some kinds in an archive, and the kinds of others; nothing is unpacked to where their names say.

    Raises:
      UserError: it cannot be read, or one of these files cannot.
    """
    whole = one_file(path, limits)
    found, others, count = [], [], limits.meter(path, whole.size)
    for name, member in _archive(whole).items():
        parts = name.split("/")
        litter = any(part.startswith((".", "__MACOSX")) for part in parts) or _NOT_DATA.match(parts[-1])
        if kind_of(name) not in kinds or litter:
            others.append(kind_of(name))
            continue
        if member.hindrance:
            raise UserError(f"{path}/{name} {member.hindrance}; unpack {path}, or make it without.")
        count(member.size)
        found.append(File(name.lstrip("/"), whole.path, member.size, whole.mtime_ns, name, limits))
    return sorted(found), others


@functools.lru_cache(maxsize=8)
def _archive(whole: File) -> dict[str, Member]:
    """The files in an archive, which is kept open; a packed tar is unpacked before, into a file without a name."""
    with one_sentence(whole, "utf-8"):
        if kind_of(whole.name) == ".tgz":
            whole = whole._replace(name="x.tar.gz")
        raw: Any = tempfile.TemporaryFile() if is_packed(whole) else open(whole.path, "rb")  # noqa: SIM115
        if is_packed(whole):
            with open_file(whole) as packed:
                shutil.copyfileobj(packed, raw, 1 << 20)
            raw.flush()
        return members(raw, kind_of(whole.name) == ".zip")


def split_of(files: Sequence[File], root: str) -> dict[str, str]:
    """The split of each file by its name, where all of them are named after splits; else nothing.

    ``train.tsv``, ``valid.txt``, ``test-00000-of-00002.parquet``, or folders ``train/``, ``dev/``; all of that also
    below one folder (``data/train.csv``). Of what ``datasets`` has saved, other splits are left out.

    Raises:
      UserError: all files are named after splits, but none after train.
    """
    splits = {}
    saved = os.path.isfile(os.path.join(os.path.expanduser(root), "dataset_dict.json"))
    depth = common_folders(files)
    for file in files:
        split = named_after(file.name.split("/")[depth])
        if split is None and not saved:
            return {}
        splits[file.name] = split or ""
    if len(files) == 1 and not saved:
        return {}
    if "train" not in splits.values():
        names = ", ".join(file.name for file in files[:4])
        raise UserError(f"{root} has {names} but nothing named train; name one file as root to split that one.")
    return splits


_SPLIT = re.compile(
    "(?:" + "|".join(f"(?P<{split}>{'|'.join(words)})" for split, words in _SPLITS.items()) + ")"
    r"(?:[-_ ]?(?:data|set|dataset|split|images|imgs|pictures|photos|texts))?(?![a-z])(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)


def common_folders(files: Sequence[File]) -> int:
    """How many folders, below the root, all files have in common, up to one named after a split."""
    parts = [file.name.split("/") for file in files]
    depth = 0
    while all(len(p) > depth + 1 and p[depth] == parts[0][depth] for p in parts) and not _SPLIT.match(parts[0][depth]):
        depth += 1
    return depth


def by_split(files: Sequence[File], root: str, chosen: Mapping[str, str | None]) -> dict[str, list[File]]:
    """Files by split: those ``chosen`` by name, the others as ``split_of`` has them; all "" where there are no splits.

    Args:
      chosen: for ``train``, ``val`` or ``test``: what its file or folder is called (``{"val": "validation_matched"}``),
        without suffix and without "-00000-of-00002"; None: after the split.

    Raises:
      UserError: no file of that name, or nothing to train on.
    """
    given = {split: stem for split, stem in chosen.items() if stem is not None}
    stems = stems_of(files)
    for split, stem in given.items():
        if stem not in stems.values():
            raise UserError(f"{root} has no {stem!r} for {split}.{suggest(stem, set(stems.values()), 'name')}")
    taken = {stem: split for split, stem in given.items()}
    found: dict[str, list[File]] = {}
    if not given:
        splits = split_of(files, root)
        for file in files:
            if not splits or splits[file.name]:
                found.setdefault(splits.get(file.name, ""), []).append(file)
        return found
    for file in files:
        stem = stems[file.name]
        where = taken.get(stem) or named_after(stem)
        if where and (stem in taken or where not in given):
            found.setdefault(where, []).append(file)
    if "train" not in found:
        raise UserError(f"{root} has nothing named train; choose its file with train='...'.")
    return found


def stems_of(files: Sequence[File]) -> dict[str, str]:
    """What each file, or the folder it is in, is called: ``train`` for ``train-00000-of-00002.csv.gz``."""
    depth = common_folders(files)
    return {file.name: _stem(file.name.split("/")[depth]) for file in files}


def named_after(stem: str, whole: bool = False) -> str | None:
    """The split that a file of this name belongs to: ``val`` for ``dev_2``.

    Args:
      whole: numbers alone may follow the word, since classes may be called ``train_station`` or ``test tube``.
    """
    match = _SPLIT.match(stem)
    if match is None or (whole and match["rest"].strip("-_. 0123456789")):
        return None
    return next(split for split in _SPLITS if match[split])


def refuse_alike(root: str, inside: Mapping[str, Collection[str]]) -> None:
    """Refuses folders that would be classes where most of them have the same folders in them, two or more.

    Args:
      inside: what the folders in each are called.

    Raises:
      UserError: they look like splits of names that nobody knows.
    """
    alike: dict[frozenset[str], list[str]] = {}
    for name, folders in sorted(inside.items()):
        alike.setdefault(frozenset(folder.casefold() for folder in folders), []).append(name)
    for folders, names in alike.items():
        if len(folders) > 1 and 1 < len(names) > len(inside) / 2:
            latter = ", ".join(sorted(folders)[:6]) + ", ..." * (len(folders) > 6)
            raise UserError(
                f"{root} has {' and '.join(names[:6])}, each with the folders {latter}; if the former are splits, call"
                " them train, val and test, or name one of them as root; if they are the classes, move what is in the"
                " latter up into them."
            )


def unused(files: Sequence[File], used: Mapping[str, Sequence[File]]) -> list[str]:
    """What the files are called that are in no split."""
    names = {file.name for given in used.values() for file in given}
    return sorted({stem for name, stem in stems_of(files).items() if name not in names})


def _stem(name: str) -> str:
    """``train`` of ``train-00000-of-00002.parquet`` and of ``train.jsonl.gz``."""
    while kind_of(name) in PLAIN | TABLES or name.endswith(_PACKED):
        name = os.path.splitext(name)[0]
    return re.sub(r"-\d+-of-\d+$", "", name)


def file_at(name: str, path: str, limits: Limits = LIMITS) -> File:
    """The file at a path, under a name; raises UserError if it is not there or is no regular file."""
    status = regular(path)
    return File(name, path, status.st_size, status.st_mtime_ns, limits=limits)


def regular(path: str | os.PathLike[str]) -> os.stat_result:
    """What a path, its links followed, is: a regular file. Opening a pipe waits for ever, and a device may never end.

    Raises:
      UserError: it is not, or it cannot be read.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{os.fspath(path)} cannot be read: {error.strerror or error}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise not_regular(path, status.st_mode)
    return status


def kind_of(name: str) -> str:
    """The suffix that tells the format, compression aside."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in _PACKED else suffix


def is_packed(file: File) -> bool:
    return bool(file.member) or file.name.lower().endswith(_PACKED)


def open_file(file: File) -> Any:
    """The bytes of a file, unpacked; reading them raises UserError where they are out of proportion."""
    raw: Any
    packed = file.size
    if file.member:
        whole = file_at(os.path.basename(file.path), file.path, file.limits)
        member = _archive(whole)[file.member]
        packed, raw = min(member.packed, whole.size), member.open()
    else:  # files of the kernel's say that they are empty, and may have no end
        raw = open(file.path, "rb") if file.size else io.BytesIO()  # noqa: SIM115
    if file.name.lower().endswith(".gz"):
        raw = gzip.GzipFile(fileobj=raw)
    elif file.name.lower().endswith(".zst"):
        reader = optional("zstandard", "zstandard", str(file)).ZstdDecompressor()
        raw = reader.stream_reader(raw, read_across_frames=True, closefd=True)
    elif not file.member:
        return raw
    return io.BufferedReader(_Unpacked(raw, file.limits.meter(file, packed)), 1 << 18)


class _Unpacked(io.RawIOBase):
    """What a packed file gives, counted."""

    def __init__(self, raw: Any, count: Callable[[int], None]):
        self._raw, self._count = raw, count

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._raw.seekable())

    def readinto(self, buffer: Any) -> int:
        size = self._raw.readinto(buffer)
        self._count(size)
        return int(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._raw.seek(offset, whence))

    def tell(self) -> int:
        return int(self._raw.tell())

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def from_base64(row: Mapping[str, Any], name: str, what: str) -> bytes:
    """The file that an entry of a row is, as bytes or in base64, also as a data URL; ``what`` it should be, in errors.

    Raises:
      UserError: it is something else.
    """
    value: Any = row.get(name)
    try:
        return value if isinstance(value, bytes) else base64.b64decode(re.sub("^data:[^,]*,", "", value), validate=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name!r} is {str(value)[:40]!r}, which is no {what} file in base64.") from error


def given_file(given: bytes | str | Mapping[str, Any], name: str, what: str) -> bytes | str:
    """What a user gives as a file: its bytes, its path, or a row that has it in base64 (see ``from_base64``).

    Raises:
      UserError: there is no such file, or the row has none.
    """
    if isinstance(given, Mapping):
        return from_base64(given, name, what)
    return existing(given, "file") if isinstance(given, str) else given


def optional(module: str, package: str, path: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"reading {path} needs the package {package}: pip install 'bigbase_jax[text]'.") from error


@contextlib.contextmanager
def one_sentence(file: File, encoding: str) -> Iterator[None]:
    """What is wrong with a file, as the user's to mend."""
    try:
        yield
    except UnicodeDecodeError as error:
        if b"\0" in error.object and kind_of(file.name) not in PLAIN | TABLES:
            raise UserError(f"{file} is no text. {read_endings([kind_of(file.name)])}") from error
        raise UserError(
            f"{file} is not {encoding} (byte 0x{error.object[error.start]:02x}); convert it, or say its encoding after"
            " the recipe, as in :root=...,encoding=gb18030."
        ) from error
    except _errors() as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__
        raise UserError(f"{file} cannot be read: {reason}.") from error


def _errors() -> tuple[type[BaseException], ...]:
    """What a reader raises for a file that is not what its name says."""
    found: list[type[BaseException]] = [OSError, EOFError, zlib.error, csv.Error, zipfile.BadZipFile, tarfile.TarError]
    found += [RuntimeError, MemoryError, UnicodeError, IndexError, struct.error]  # of zipfile, codecs and pyarrow
    for module, name in (("zstandard", "ZstdError"), ("pyarrow", "ArrowException"), ("lzma", "LZMAError")):
        if sys.modules.get(module) is not None:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)
