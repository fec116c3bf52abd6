"""Files of text and tables: which there are, which split each belongs to, and their bytes.

As they are, in gzip, Zstandard or zip. Folders of Hugging Face's ``datasets`` are known: what ``save_to_disk`` wrote,
and downloads from the hub.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib
import io
import os
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError

PLAIN = frozenset({".txt", ".text", ".md", ".rst"})
"""Suffixes of plain text."""
TABLES = frozenset({".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".xlsx", ".parquet", ".arrow"})
"""Suffixes of what has rows."""
_PACKED = (".gz", ".zst")
_CURES = {
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".html"), "export it as .txt"),
    **dict.fromkeys((".xls", ".xlsm", ".ods", ".numbers"), "save it as .xlsx or .csv"),
    **dict.fromkeys((".rar", ".7z", ".bz2", ".xz"), "unpack it"),
    **dict.fromkeys(
        (".pkl", ".pickle", ".joblib", ".pt"),
        "a pickle can run code and is never read; save what it holds as .csv, .jsonl or .parquet",
    ),
    **dict.fromkeys((".db", ".sqlite", ".mdb"), "export its table as .csv"),
}
_NOT_DATA = re.compile(r"(readme|licen[cs]e|copying|notice)\b|(dataset_infos?|dataset_dict)\.json$", re.IGNORECASE)
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


class File(NamedTuple):
    """A file of documents or rows.

    Attributes:
      name: relative to the root, with "/".
      path: where it is.
      size: in bytes.
      mtime_ns: when it was changed.
      member: where ``path`` is a zip, the file in it.
    """

    name: str
    path: str
    size: int
    mtime_ns: int
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else self.path


def list_files(root: str) -> list[File]:
    """The files below a folder that hold documents, by name; or the file itself, of whatever kind.

    Links are followed; hidden files, READMEs and licences are left out, and what ``datasets`` notes beside its files. A
    zip is opened where it is named, or where a folder holds nothing else.

    Raises:
      UserError: there is nothing there, or nothing that holds documents.
    """
    folder = os.path.expanduser(root)
    if os.path.isfile(folder):
        if kind_of(folder) in _CURES:
            raise UserError(f"{root} is not read. {read_endings([kind_of(folder)])}")
        return _members(folder, "") if kind_of(folder) == ".zip" else [one_file(folder)]
    if not os.path.isdir(folder):
        raise _nothing(root)
    found: list[File] = []
    zips: list[tuple[str, str]] = []
    others: Counter[str] = Counter()
    for name, path in walk(folder):
        if kind_of(name) in PLAIN | TABLES:
            if not (os.path.basename(name) == "state.json" and os.path.exists(path[: -len("state.json")] + _INFO)):
                found.append(file_at(name, path))
        else:
            others[kind_of(name) or "without suffix"] += 1
            if kind_of(name) == ".zip":
                zips.append((path, name + "/"))
    if not found:
        found = [file for path, prefix in zips for file in _members(path, prefix)]
    if not found:
        have = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3)) or "nothing"
        raise UserError(f"{root} holds no text or table; it has {have}. {read_endings(others.elements())}")
    return sorted(found)


def read_endings(kinds: Iterable[str] = ()) -> str:
    """Sentences on which endings are read, and on what to do about some that are not."""
    cures = [f" {kind}: {_CURES[kind]}." for kind, _ in Counter(kinds).most_common() if kind in _CURES]
    return (
        "Read are texts (.txt, .md, .rst) and tables (.csv, .tsv, .xlsx, .json, .jsonl, .parquet, .arrow), also in .gz,"
        f" .zst, .zip and .tar.{''.join(cures[:2])}"
    )


_INFO = "dataset_info.json"  # beside state.json, in what ``save_to_disk`` wrote


def one_file(path: str) -> File:
    """The file at a path; raises UserError if there is none."""
    if not os.path.isfile(os.path.expanduser(path)):
        raise _nothing(path)
    return file_at(os.path.basename(path), os.path.expanduser(path))


def _nothing(root: str) -> UserError:
    folder = os.path.expanduser(root)
    parent = os.path.dirname(os.path.abspath(folder))
    beside = sorted(os.listdir(parent))[:200] if os.path.isdir(parent) else []
    hint = suggest(os.path.basename(folder), beside, "name")
    return UserError(f"there is no file or folder {root}.{hint if 'Did you mean' in hint else ''}")


def walk(folder: str) -> Iterator[tuple[str, str]]:
    """(name relative to the folder, path) of every file that may be data."""
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link to a folder above would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and not _NOT_DATA.match(name):
                path = os.path.join(where, name)
                yield os.path.relpath(path, folder).replace(os.sep, "/"), path


def _members(path: str, prefix: str) -> list[File]:
    """The files in a zip that hold documents."""
    whole = file_at(os.path.basename(path), path)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    found = []
    for info in infos:
        parts = info.filename.split("/")
        litter = any(part.startswith((".", "__MACOSX")) for part in parts) or _NOT_DATA.match(parts[-1])
        if kind_of(info.filename) in PLAIN | TABLES and not litter:
            if info.flag_bits & 1:
                raise UserError(f"{path} is locked with a password; unpack it.")
            found.append(File(prefix + info.filename, path, info.file_size, whole.mtime_ns, info.filename))
    if not found and not prefix:
        raise UserError(f"{path} holds no text or table. {read_endings(kind_of(info.filename) for info in infos)}")
    return sorted(found)


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


_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(?![A-Za-z])", re.IGNORECASE)


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


def named_after(stem: str) -> str | None:
    """The split that a file of this name belongs to: ``val`` for ``dev_2``."""
    match = _SPLIT.match(stem)
    return _SPLITS[match.group(1).lower()] if match else None


def unused(files: Sequence[File], used: Mapping[str, Sequence[File]]) -> list[str]:
    """What the files are called that are in no split."""
    names = {file.name for given in used.values() for file in given}
    return sorted({stem for name, stem in stems_of(files).items() if name not in names})


def _stem(name: str) -> str:
    """``train`` of ``train-00000-of-00002.parquet`` and of ``train.jsonl.gz``."""
    while kind_of(name) in PLAIN | TABLES or name.endswith(_PACKED):
        name = os.path.splitext(name)[0]
    return re.sub(r"-\d+-of-\d+$", "", name)


def file_at(name: str, path: str) -> File:
    """The file at a path, under a name; raises UserError if it cannot be read."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    return File(name, path, stat.st_size, stat.st_mtime_ns)


def kind_of(name: str) -> str:
    """The suffix that tells the format, compression aside."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in _PACKED else suffix


def is_packed(file: File) -> bool:
    return bool(file.member) or file.name.lower().endswith(_PACKED)


def open_file(file: File) -> Any:
    """The bytes of a file, unpacked."""
    raw: Any = zipfile.ZipFile(file.path).open(file.member) if file.member else open(file.path, "rb")  # noqa: SIM115
    if file.name.lower().endswith(".gz"):
        return gzip.open(raw, "rb")
    if file.name.lower().endswith(".zst"):
        reader = optional("zstandard", "zstandard", str(file)).ZstdDecompressor()
        return io.BufferedReader(reader.stream_reader(raw, read_across_frames=True, closefd=True), 1 << 20)
    return raw


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
            f"{file} is not {encoding} (byte 0x{error.object[error.start]:02x}); convert it, or set encoding, for"
            " example to gb18030."
        ) from error
    except _errors() as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__
        raise UserError(f"{file} cannot be read: {reason}.") from error


def _errors() -> tuple[type[BaseException], ...]:
    """What a reader raises for a file that is not what its name says."""
    found: list[type[BaseException]] = [OSError, EOFError, zlib.error, csv.Error, RecursionError, zipfile.BadZipFile]
    for module, name in (("zstandard", "ZstdError"), ("pyarrow", "ArrowException")):
        if sys.modules.get(module) is not None:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)
