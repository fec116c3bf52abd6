"""Folders of files, one folder per class.

``DIR/{train,val,test}/CLASS/**`` or ``DIR/CLASS/**``, with files at any depth below CLASS.

``DIR/CLASS`` (or ``DIR/train/CLASS`` alone) is split into train, val and test. Where there is a test or val folder, no
test split is made up; where there is no val folder, val is split off train. Splits are seeded and stratified: a file's
place depends on the seed, its path and the other files of its class.

Split folders may have any of the usual names (``training_set``, ``Valid``, ``dev``; see ``files.named_after``). They
are splits if one of them is train and holds folders but none of the files, and if so does another, or no folder of
another name has such files of its own in it: a class may be called ``train`` beside ``bus``, or ``test``. Folders that
hold nothing but one folder of folders (``DIR/dataset/train``, ``training_set/training_set``) are looked into.

Links are followed, also out of DIR, and each folder of a class is read once, however many links lead to it. Hidden
files and files of other suffixes (in any case) are ignored; so are folders beside those of splits, which the
description names.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError
from bigbase_jax.data.archives import folders
from bigbase_jax.data.files import (
    LIMITS,
    File,
    Limits,
    above,
    existing,
    in_archive,
    is_archive,
    named_after,
    refuse_alike,
    refuse_permission,
)
from bigbase_jax.data.sources.splits import split_off

_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}


class Listed(NamedTuple):
    """A file of a class.

    Attributes:
      name: relative to the root, with "/".
      label: of its class.
      size: bytes; -1: cannot be had (a dangling link).
      mtime_ns: when it was written.
    """

    name: str
    label: int
    size: int
    mtime_ns: int


class ClassFolders:
    """The files of each class and split.

    Attributes:
      files: by split.
      names: of the classes, in alphabetical order.
      folder: what the files' names are relative to; "" in an archive.
      members: of an archive, by name.
      ignored: number of files that were ignored.
      description: files and classes.
    """

    def __init__(
        self,
        root: str,
        suffixes: Collection[str],
        things: str,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        limits: Limits = LIMITS,
    ):
        """Lists the files; opens none.

        Args:
          root: DIR, or an archive (zip, tar) of it.
          suffixes: of the files, in small letters.
          things: what they are called, "pictures".
          val_fraction: share of each class that becomes val (of the training files, where there are split folders);
            0: no val.
          test_fraction: share of each class that becomes test where there are no split folders; 0: no test.
          seed: of the split.
          limits: of an archive.

        Raises:
          UserError: no such folder, no class, one class only, a class without files, or one that train lacks; or
            folders with the same folders in each, which may be splits.
        """
        refuse_permission(limits, root)
        self._suffixes, self._things = suffixes, things
        self.ignored, self._unused = 0, list[str]()
        self.members: dict[str, File] = {}
        self._tree: dict[str, list[Any]] = {}  # of an archive, what is in each folder
        if is_archive(root):
            found, others = in_archive(root, suffixes, limits)
            self.ignored, self.members = len(others), {file.name: file for file in found}
            self._tree = folders((file.name, file.size, file.mtime_ns) for file in found)
        self.folder = "" if self._tree else existing(root)
        given = self._split_folders(self.folder, root)
        self.files: dict[str, list[Listed]] = {}
        self.names: list[str] = []
        for split, prefix in sorted(given.items(), key=lambda item: item[0] != "train"):
            where = os.path.join(root, prefix)
            classes = self._subfolders(os.path.join(self.folder, prefix))
            if split == "train":
                self._check_classes(where, classes)
                self.names = classes
            for name in classes:
                if name not in self.names:
                    raise UserError(
                        f"{where} has a class {name!r} that train does not have.{suggest(name, self.names, 'class')}"
                    )
            self.files[split] = []
            for name in classes:
                self.files[split] += self._listed(self.folder, prefix, name, self.names.index(name))
        train = self.files["train"]
        rows = split_off(self.files, [f.name for f in train], labels(train), val_fraction, test_fraction, seed)
        self.files |= {split: [train[i] for i in indices] for split, indices in rows.items()}
        count = sum(map(len, self.files.values()))
        ignored = f" ({self.ignored:,} other files ignored)" if self.ignored else ""
        unused = f"; not used: {', '.join(self._unused)}" if self._unused else ""
        self.description = f"{count:,} {things} of {len(self.names)} classes in {root}{ignored}{unused}"

    def _split_folders(self, folder: str, root: str) -> dict[str, str]:
        """Split -> folder below the root; train alone where there are no splits: where the classes are."""
        prefix = self._inner(folder, "")
        found = self._subfolders(os.path.join(folder, prefix))
        paths = {name: os.path.join(prefix, name) for name in found}
        named = {name: split for name in found if (split := named_after(name, whole=True))}
        splits = {split: self._inner(folder, paths[name], split) for name, split in named.items()}
        others = [name for name in found if name not in named]
        if "train" in splits:
            folders = {split: os.path.join(folder, path) for split, path in splits.items()}
            holds = {s: not self._has_files(p) and bool(self._subfolders(p)) for s, p in folders.items()}
            if not others and self._has_files(folders["train"]):
                raise UserError(
                    f"{os.path.join(root, splits['train'])} holds {self._things} but no class folders; put those"
                    " of each class into a folder of its own."
                )
            alone = not any(self._has_files(os.path.join(folder, paths[name])) for name in others)
            if not others or (holds["train"] and (sum(holds.values()) > 1 or alone)):
                for split in splits:
                    same = [name for name, s in named.items() if s == split]
                    if len(same) > 1:
                        raise UserError(f"{root} has two folders for {split}, {' and '.join(same[:2])}; leave one.")
                self._unused = others
                return splits
        elif named and not others and len(found) > 1:
            raise UserError(f"{root} has {' and '.join(found)} but no train folder.")
        inside = {name: os.path.join(folder, self._inner(folder, path)) for name, path in paths.items()}
        refuse_alike(root, {n: () if self._has_files(path) else self._subfolders(path) for n, path in inside.items()})
        return {"train": prefix}

    def _inner(self, folder: str, prefix: str, split: str | None = None) -> str:
        """The place below the folder after single folders of folders, which are called after the split, or none."""
        for _ in range(8):  # links may lead up
            here = os.path.join(folder, prefix)
            found = self._subfolders(here)
            if len(found) != 1 or named_after(found[0], whole=True) != split or self._has_files(here):
                break
            below = os.path.join(here, found[0])
            if self._has_files(below) or not self._subfolders(below):
                break
            prefix = os.path.join(prefix, found[0])
        return prefix

    def _scan(self, folder: str) -> Any:
        return contextlib.nullcontext(self._tree.get(folder, ())) if self._tree else os.scandir(folder)

    def _subfolders(self, folder: str) -> list[str]:
        with self._scan(folder) as entries:
            return sorted(entry.name for entry in entries if not _is_litter(entry.name) and _is_folder(entry))

    def _has_files(self, folder: str) -> bool:
        with self._scan(folder) as entries:
            return any(not _is_litter(e.name) and self._fits(e.name) and not _is_folder(e) for e in entries)

    def _listed(self, root: str, prefix: str, name: str, label: int) -> list[Listed]:
        """The files of one class, in order of their names; counts what else is there."""
        found: list[Listed] = []
        others: Counter[str] = Counter()
        first = os.path.join(root, prefix, name)
        stack, seen = [(first, "/".join(filter(None, (prefix, name))))], above(first)
        while stack:
            folder, relative = stack.pop()
            real = folder if self._tree else os.path.realpath(folder)
            if real in seen:  # links may lead up, or in many ways to the same folder
                continue
            seen.add(real)
            with self._scan(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                    if _is_litter(entry.name):
                        self.ignored += 1
                    elif _is_folder(entry):
                        stack.append((entry.path, f"{relative}/{entry.name}"))
                    elif self._fits(entry.name):
                        try:
                            stat = entry.stat()
                            found.append(Listed(f"{relative}/{entry.name}", label, stat.st_size, stat.st_mtime_ns))
                        except OSError:  # listed all the same, so that it is found to be unreadable
                            found.append(Listed(f"{relative}/{entry.name}", label, -1, 0))
                    else:
                        others[os.path.splitext(entry.name)[1] or "without suffix"] += 1
        self.ignored += others.total()
        if not found:
            have = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3))
            raise UserError(
                f"the class folder {first} holds no {self._things} ({' '.join(sorted(self._suffixes))})"
                + (f", only {have}; convert them." if have else "; add some or delete it.")
            )
        return sorted(found)

    def _fits(self, name: str) -> bool:
        return os.path.splitext(name)[1].casefold() in self._suffixes

    def _check_classes(self, where: str, classes: Sequence[str]) -> None:
        if not classes:
            inside = os.path.join(where, "CLASS")
            raise UserError(f"{where} has no class folders; expected {self._things} in {inside}.")
        if len(classes) == 1:
            raise UserError(
                f"{where} has one class only, {classes[0]!r}; a classifier needs at least two class folders."
            )


def labels(files: Sequence[Listed]) -> np.ndarray:
    """i32[N]: their classes."""
    return np.array([file.label for file in files], np.int32)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead to each other
        return False


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _LITTER
