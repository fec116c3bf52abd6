"""Folders of pictures, one folder per class."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Source, UserError
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
)
from bigbase_jax.data.sources.image.image import SUFFIXES, Pictures, ReadsPictures
from bigbase_jax.data.sources.splits import digest, split_off

_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}


class _File(NamedTuple):
    name: str  # relative to the root, with "/"
    label: int
    size: int  # bytes; -1: cannot be had (a dangling link)
    mtime_ns: int


class ImageFolder(ReadsPictures):
    """``DIR/{train,val,test}/CLASS/**`` or ``DIR/CLASS/**``, with pictures at any depth below CLASS.

    ``DIR/CLASS`` (or ``DIR/train/CLASS`` alone) is split into train, val and test. Where there is a test or val folder,
    no test split is made up; where there is no val folder, val is split off train. Splits are seeded and stratified: a
    file's place depends on the seed, its path and the other files of its class.

    Split folders may have any of the usual names (``training_set``, ``Valid``, ``dev``; see ``files.named_after``).
    They are splits if one of them is train and holds folders but no pictures, and if so does another, or no folder of
    another name has pictures of its own in it: a class may be called ``train`` beside ``bus``, or ``test``. Folders
    that hold nothing but one folder of folders (``DIR/dataset/train``, ``training_set/training_set``) are looked into.

    Links are followed, also out of DIR, and each folder of a class is read once, however many links lead to it. Hidden
    files and files whose suffix is not one of ``image.SUFFIXES`` (in any case) are ignored; so are folders beside those
    of splits, which the description names.

    Attributes:
      splits: ``image`` uint8 [H, W, 3] and ``label`` i32[] each.
      dataset_info: ``num_classes`` and ``class_names``, the class folders in alphabetical order.
      description: folder, pictures and classes.
      ignored: number of files that were ignored.
    """

    def __init__(
        self,
        root: str,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        draft_size: int | None = None,
        limits: Limits = LIMITS,
    ):
        """Lists the files; opens none.

        Args:
          root: DIR, or an archive (zip, tar) of it.
          val_fraction: share of each class that becomes val (of the training pictures, where there are split folders);
            0: no val.
          test_fraction: share of each class that becomes test where there are no split folders; 0: no test.
          seed: of the split.
          draft_size: as in ``image.decode``: JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size while both sides
            stay at least this long. Set it to the size that the transforms cut, to read large photos faster.
          limits: of a picture.

        Raises:
          UserError: no such folder, no class, one class only, a class without pictures, or one that train lacks; or
            folders with the same folders in each, which may be splits.
        """
        if draft_size is not None and draft_size < 1:
            raise UserError(f"draft_size is {draft_size}; it must be at least 1, or None for full size.")
        self.ignored, self._unused = 0, list[str]()
        self._members: dict[str, File] = {}
        self._tree: dict[str, list[Any]] = {}  # of an archive, what is in each folder
        if is_archive(root):
            found, others = in_archive(root, SUFFIXES, limits)
            self.ignored, self._members = len(others), {file.name: file for file in found}
            self._tree = folders((file.name, file.size, file.mtime_ns) for file in found)
        folder = "" if self._tree else existing(root)
        given = self._split_folders(folder, root)
        files: dict[str, list[_File]] = {}
        names: list[str] = []
        for split, prefix in sorted(given.items(), key=lambda item: item[0] != "train"):
            where = os.path.join(root, prefix)
            classes = self._subfolders(os.path.join(folder, prefix))
            if split == "train":
                _check_classes(where, classes)
                names = classes
            for name in classes:
                if name not in names:
                    raise UserError(
                        f"{where} has a class {name!r} that train does not have.{suggest(name, names, 'class')}"
                    )
            labels = {name: names.index(name) for name in classes}
            files[split] = []
            for name in classes:
                files[split] += self._pictures(folder, prefix, name, labels[name])
        train = files["train"]
        rows = split_off(files, [f.name for f in train], _labels(train), val_fraction, test_fraction, seed)
        files |= {split: [train[i] for i in indices] for split, indices in rows.items()}

        self._files, self._draft_size = files, draft_size
        self.splits: Mapping[str, Source] = {
            split: Pictures(
                folder, [f.name for f in files[split]], _labels(files[split]), draft_size, limits, self._members
            )
            for split in ("train", "val", "test")
            if split in files
        }
        self.dataset_info: Mapping[str, Any] = {"num_classes": len(names), "class_names": tuple(names)}
        count = sum(map(len, files.values()))
        ignored = f" ({self.ignored:,} other files ignored)" if self.ignored else ""
        unused = f"; not used: {', '.join(self._unused)}" if self._unused else ""
        self.description = f"{count:,} pictures of {len(names)} classes in {root}{ignored}{unused}"

    def fingerprint(self) -> str:
        """A digest of each split's paths, sizes and modification times, and of how they are decoded."""
        return digest([self.dataset_info["class_names"], self._draft_size, *sorted(self._files.items())])

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
            holds = {s: not self._has_pictures(p) and bool(self._subfolders(p)) for s, p in folders.items()}
            if not others and self._has_pictures(folders["train"]):
                raise UserError(
                    f"{os.path.join(root, splits['train'])} holds pictures but no class folders; put those of each"
                    " class into a folder of its own."
                )
            alone = not any(self._has_pictures(os.path.join(folder, paths[name])) for name in others)
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
        refuse_alike(
            root, {n: () if self._has_pictures(path) else self._subfolders(path) for n, path in inside.items()}
        )
        return {"train": prefix}

    def _inner(self, folder: str, prefix: str, split: str | None = None) -> str:
        """The place below the folder after single folders of folders, which are called after the split, or none."""
        for _ in range(8):  # links may lead up
            here = os.path.join(folder, prefix)
            found = self._subfolders(here)
            if len(found) != 1 or named_after(found[0], whole=True) != split or self._has_pictures(here):
                break
            below = os.path.join(here, found[0])
            if self._has_pictures(below) or not self._subfolders(below):
                break
            prefix = os.path.join(prefix, found[0])
        return prefix

    def _scan(self, folder: str) -> Any:
        return contextlib.nullcontext(self._tree.get(folder, ())) if self._tree else os.scandir(folder)

    def _subfolders(self, folder: str) -> list[str]:
        with self._scan(folder) as entries:
            return sorted(entry.name for entry in entries if not _is_litter(entry.name) and _is_folder(entry))

    def _has_pictures(self, folder: str) -> bool:
        with self._scan(folder) as entries:
            return any(not _is_litter(e.name) and _is_picture(e.name) and not _is_folder(e) for e in entries)

    def _pictures(self, root: str, prefix: str, name: str, label: int) -> list[_File]:
        """The pictures of one class, in order of their names; counts what else is there."""
        found: list[_File] = []
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
                    elif _is_picture(entry.name):
                        try:
                            stat = entry.stat()
                            found.append(_File(f"{relative}/{entry.name}", label, stat.st_size, stat.st_mtime_ns))
                        except OSError:  # listed all the same, so that it is found to be unreadable
                            found.append(_File(f"{relative}/{entry.name}", label, -1, 0))
                    else:
                        others[os.path.splitext(entry.name)[1] or "without suffix"] += 1
        self.ignored += others.total()
        if not found:
            have = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3))
            raise UserError(
                f"the class folder {first} holds no pictures ({' '.join(sorted(SUFFIXES))})"
                + (f", only {have}; convert them." if have else "; add some or delete it.")
            )
        return sorted(found)


def _check_classes(where: str, classes: Sequence[str]) -> None:
    if not classes:
        raise UserError(f"{where} has no class folders; expected pictures in {os.path.join(where, 'CLASS')}.")
    if len(classes) == 1:
        raise UserError(f"{where} has one class only, {classes[0]!r}; a classifier needs at least two class folders.")


def _labels(files: Sequence[_File]) -> np.ndarray:
    return np.array([file.label for file in files], np.int32)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead to each other
        return False


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _LITTER


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].casefold() in SUFFIXES


__all__ = ["ImageFolder"]
