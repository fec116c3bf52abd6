"""Folders of pictures, one folder per class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Source, UserError
from bigbase_jax.data.files import LIMITS, Limits
from bigbase_jax.data.sources.image import SUFFIXES, Pictures, ReadsPictures, existing
from bigbase_jax.data.sources.splits import digest, stratified, to_split_off

_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
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
    file's place depends on the seed, its path and the other files of its class. ``valid`` and ``validation`` mean val.

    Links are followed. Hidden files and files whose suffix is not one of ``image.SUFFIXES`` (in any case) are ignored.

    Attributes:
      splits: ``image`` uint8 [H, W, 3] and ``label`` i32[] each.
      facts: ``num_classes`` and ``class_names``, the class folders in alphabetical order.
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
          root: DIR.
          val_fraction: share of each class that becomes val (of the training pictures, where there are split folders);
            0: no val.
          test_fraction: share of each class that becomes test where there are no split folders; 0: no test.
          seed: of the split.
          draft_size: as in ``image.decode``: JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size while both sides
            stay at least this long. Set it to the size that the transforms cut, to read large photos faster.
          limits: of a picture.

        Raises:
          UserError: no such folder, no class, one class only, a class without pictures, or one that train lacks.
        """
        if draft_size is not None and draft_size < 1:
            raise UserError(f"draft_size is {draft_size}; it must be at least 1, or None for full size.")
        folder = existing(root)
        self.ignored = 0
        given = self._split_folders(folder, root)
        files: dict[str, list[_File]] = {}
        names: list[str] = []
        for split, prefix in sorted(given.items(), key=lambda item: item[0] != "train"):
            where = os.path.join(root, prefix)
            classes = self._subfolders(os.path.join(folder, prefix))
            if split == "train":
                _check_classes(where, classes, self._subfolders, folder, prefix)
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
        fractions = to_split_off(files, val_fraction, test_fraction)
        if fractions:
            train = files["train"]
            dealt = stratified([f.name for f in train], np.array([f.label for f in train]), fractions, seed)
            files |= {split: [train[i] for i in indices] for split, indices in dealt.items()}

        self._files, self._draft_size = files, draft_size
        self.splits: Mapping[str, Source] = {
            split: Pictures(folder, [f.name for f in files[split]], _labels(files[split]), draft_size, limits)
            for split in ("train", "val", "test")
            if split in files
        }
        self.facts: Mapping[str, Any] = {"num_classes": len(names), "class_names": tuple(names)}
        count = sum(map(len, files.values()))
        ignored = f" ({self.ignored:,} other files ignored)" if self.ignored else ""
        self.description = f"{count:,} pictures of {len(names)} classes in {root}{ignored}"

    def fingerprint(self) -> str:
        """A digest of each split's paths, sizes and modification times, and of how they are decoded."""
        return digest([self.facts["class_names"], self._draft_size, *sorted(self._files.items())])

    def _split_folders(self, folder: str, root: str) -> dict[str, str]:
        """Split -> folder below the root, which is "" where the root itself holds the classes."""
        found = self._subfolders(folder)
        splits: dict[str, str] = {}
        for name in found:
            split = _SPLITS.get(name.casefold())
            if split is None:
                continue
            if split in splits:
                raise UserError(f"{root} has two folders for {split}, {splits[split]} and {name}; leave one.")
            splits[split] = name
        only_splits = len(splits) == len(found) and found
        if "train" in splits:
            below = os.path.join(folder, splits["train"])
            if self._subfolders(below) and not any(True for _ in self._own_pictures(below)):
                return splits
            if only_splits and any(True for _ in self._own_pictures(below)):
                raise UserError(
                    f"{os.path.join(root, splits['train'])} holds pictures but no class folders; put those of each"
                    " class into a folder of its own."
                )
            if only_splits:
                return splits
        elif only_splits and len(found) > 1:
            raise UserError(f"{root} has {' and '.join(found)} but no train folder.")
        return {"train": ""}  # with classes that may be called "train" (beside "bus") or "test"

    @staticmethod
    def _subfolders(folder: str) -> list[str]:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not _is_litter(entry.name) and entry.is_dir())

    @staticmethod
    def _own_pictures(folder: str) -> Iterator[str]:
        with os.scandir(folder) as entries:
            yield from (e.name for e in entries if not _is_litter(e.name) and _is_picture(e.name) and not e.is_dir())

    def _pictures(self, root: str, prefix: str, name: str, label: int) -> list[_File]:
        """The pictures of one class, in order of their names; counts what else is there."""
        found: list[_File] = []
        others: Counter[str] = Counter()
        first = os.path.join(root, prefix, name)
        stack = [(first, "/".join(filter(None, (prefix, name))), {os.path.realpath(first)})]
        while stack:
            folder, relative, above = stack.pop()
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _is_litter(entry.name):
                        self.ignored += 1
                    elif entry.is_dir():
                        real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                        if real not in above:  # a link to a folder above would never end
                            stack.append((entry.path, f"{relative}/{entry.name}", above | {real}))
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


def _check_classes(where: str, classes: Sequence[str], subfolders: Any, folder: str, prefix: str) -> None:
    if not classes:
        raise UserError(f"{where} has no class folders; expected pictures in {os.path.join(where, 'CLASS')}.")
    if len(classes) == 1:
        below = subfolders(os.path.join(folder, prefix, classes[0]))
        hint = f" Did you mean {os.path.join(where, classes[0])}?" if len(below) > 1 else ""
        raise UserError(
            f"{where} has one class only, {classes[0]!r}; a classifier needs at least two class folders.{hint}"
        )


def _labels(files: Sequence[_File]) -> np.ndarray:
    return np.array([file.label for file in files], np.int32)


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _LITTER


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].casefold() in SUFFIXES


__all__ = ["ImageFolder"]
