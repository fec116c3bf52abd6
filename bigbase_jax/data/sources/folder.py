"""Pictures in folders: DIR/{train,val,test}/CLASS/* or DIR/CLASS/*."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Example, UserError
from bigbase_jax.data.sources.image import SUFFIXES, Pictures, decode
from bigbase_jax.data.sources.splits import stratified

_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Files:
    """The pictures of one split.

    Attributes:
      labels: i32[N].
    """

    def __init__(self, root: str, paths: list[str], labels: np.ndarray):
        self.root, self.paths = root, paths
        self.labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        return {"image": decode(os.path.join(self.root, self.paths[index])), "label": self.labels[index]}

    def name(self, index: int) -> str:
        """The file's path below the root."""
        return self.paths[index]


class ImageFolder(Pictures):
    """A folder of pictures, one folder per class, at any depth below it.

    ``root/train``, ``root/val`` (or valid, validation) and ``root/test`` hold the classes; or ``root`` does, and is split.
    Where there is a train but no val folder, ``val`` is taken from ``train``.

    Attributes:
      root: the folder.
      val_fraction: share of the pictures (of ``train``, if that is a folder) that becomes ``val``; 0: no ``val``.
      test_fraction: share of the pictures that becomes ``test`` where there are no split folders.
      seed: of the split.

    Raises:
      UserError: no such folder, fewer than two classes, an empty class, or classes that differ between splits.
    """

    def __init__(self, root: str, val_fraction: float = 0.1, test_fraction: float = 0.2, seed: int = 0):
        self.root = os.path.abspath(os.path.expanduser(root))
        self.ignored = 0
        folders = _folders(self.root)
        named = {_SPLITS[name.lower()]: name for name in folders if name.lower() in _SPLITS}
        if "train" in named:
            listed = {split: self._list(name) for split, name in named.items()}
            classes = sorted({c for c, _ in listed["train"]} | set(_folders(os.path.join(self.root, named["train"]))))
            self._check(classes, listed["train"], named["train"])
            for split, items in listed.items():
                strange = sorted({c for c, _ in items} - set(classes))
                if strange:
                    raise UserError(
                        f"{os.path.join(self.root, named[split])} has the class {strange[0]!r}, which {named['train']} "
                        f"lacks.{suggest(strange[0], classes, 'class')}"
                    )
            parts = {split: self._files(items, classes) for split, items in listed.items()}
            if "val" not in parts and val_fraction:
                rest, val = stratified(parts["train"].labels, (val_fraction,), seed)
                parts["val"] = self._subset(parts["train"], val)
                parts["train"] = self._subset(parts["train"], rest)
        else:
            if named:
                there = ", ".join(sorted(named.values()))
                raise UserError(f"{self.root} holds {there} but no train folder; add one, or put the classes into {self.root}.")
            items = self._list("")
            self._check(folders, items, "")
            everything = self._files(items, folders)
            classes = folders
            rest, val, test = stratified(everything.labels, (val_fraction, test_fraction), seed)
            chosen = {"train": rest, "val": val, "test": test}
            parts = {split: self._subset(everything, rows) for split, rows in chosen.items() if len(rows)}
        order = ("train", "val", "test")
        self.splits: Mapping[str, Files] = {split: parts[split] for split in order if split in parts and len(parts[split])}
        self.facts: Mapping[str, Any] = {"num_classes": len(classes), "class_names": tuple(classes)}
        total = sum(map(len, self.splits.values()))
        left = f"; {self.ignored:,} other files ignored" if self.ignored else ""
        self.description = f"{total:,} pictures of {len(classes)} classes below {self.root}{left}"

    def fingerprint(self) -> str:
        """Of names, splits, sizes and modification times."""
        digest = hashlib.sha256()
        for split, files in self.splits.items():
            for path, label in zip(files.paths, files.labels, strict=True):
                stat = os.stat(os.path.join(self.root, path))
                digest.update(f"{split}\0{path}\0{label}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def _list(self, folder: str) -> list[tuple[str, str]]:
        """(class, path below the root) of all pictures in the class folders of ``folder``, sorted."""
        found = []
        for name in _folders(os.path.join(self.root, folder)):
            for path in _walk(os.path.join(self.root, folder, name)):
                if os.path.splitext(path)[1].lower() in SUFFIXES:
                    found.append((name, os.path.relpath(path, self.root)))
                else:
                    self.ignored += 1
        return sorted(found)

    def _check(self, classes: list[str], items: list[tuple[str, str]], folder: str) -> None:
        where = os.path.join(self.root, folder) if folder else self.root
        if not classes:
            raise UserError(f"{where} holds no class folders; put the pictures of each class into a folder of its own.")
        if len(classes) == 1:
            raise UserError(f"{where} holds one class only, {classes[0]!r}; a classifier needs two or more folders.")
        for name in classes:
            if not any(c == name for c, _ in items):
                raise UserError(
                    f"the class folder {os.path.join(where, name)} holds no pictures ({', '.join(sorted(SUFFIXES))}); "
                    "fill it or delete it."
                )

    def _files(self, items: list[tuple[str, str]], classes: list[str]) -> Files:
        number = {name: i for i, name in enumerate(classes)}
        return Files(self.root, [path for _, path in items], np.array([number[c] for c, _ in items], np.int32))

    def _subset(self, files: Files, rows: np.ndarray) -> Files:
        return Files(self.root, [files.paths[i] for i in rows], files.labels[rows])


def _folders(folder: str) -> list[str]:
    """Names of the visible folders in ``folder``, sorted."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except FileNotFoundError as error:
        parent = pathlib.Path(folder).parent
        near = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        hint = suggest(os.path.basename(folder), near, "folder") if len(near) < 20 else ""
        raise UserError(f"there is no folder {folder}.{hint}") from error
    except NotADirectoryError as error:
        raise UserError(f"{folder} is a file; data=folder needs a folder of class folders.") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}.") from error


def _walk(folder: str) -> list[str]:
    found = []
    for path, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(path, name) for name in names if not name.startswith(".")]
    return found
