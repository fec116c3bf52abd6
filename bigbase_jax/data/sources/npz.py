"""Arrays: an .npz file, or a folder of .npy files, with the names Keras uses or ``images`` and ``labels``."""

from __future__ import annotations

import hashlib
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from bigbase_jax.core import Example, UserError
from bigbase_jax.data.sources.image import Pictures
from bigbase_jax.data.sources.splits import stratified


class Arrays:
    """One split held in memory (or mapped): ``images`` uint8[N,H,W,C], ``labels`` i32[N]."""

    in_memory = True

    def __init__(self, images: np.ndarray, labels: np.ndarray, split: str, rows: np.ndarray | None = None):
        self._images, self._split, self._rows = images, split, rows
        self.labels = np.asarray(labels if rows is None else labels[rows], np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        row = index if self._rows is None else self._rows[index]
        return {"image": np.asarray(self._images[row]), "label": self.labels[index]}

    def name(self, index: int) -> str:
        """``split[index]``."""
        return f"{self._split}[{index}]"


class ArrayPictures(Pictures):
    """Splits made of arrays; what ``Npz`` and ``Idx`` share.

    Raises:
      UserError: shapes, types or labels that are not those of pictures and their classes.
    """

    def __init__(
        self,
        arrays: Mapping[str, tuple[np.ndarray, np.ndarray]],
        source: str,
        val_fraction: float,
        test_fraction: float,
        class_names: tuple[str, ...] | None,
        seed: int,
    ):
        checked = {split: _check(images, labels, f"{source} ({split})") for split, (images, labels) in arrays.items()}
        count = 1 + max(int(labels.max()) for _, labels in checked.values())
        if class_names is not None and len(class_names) < count:
            raise UserError(f"{source} has labels up to {count - 1}, but there are only {len(class_names)} class_names.")
        names = tuple(class_names) if class_names is not None else tuple(str(i) for i in range(count))
        if len(np.unique(checked["train"][1])) < 2:
            raise UserError(f"{source} has one class only; a classifier needs two or more.")
        parts = {split: Arrays(images, labels, split) for split, (images, labels) in checked.items()}
        images, labels = checked["train"]
        fractions = (0.0 if "val" in checked else val_fraction, 0.0 if "test" in checked else test_fraction)
        rest, val, test = stratified(labels, fractions, seed)
        if len(val) or len(test):
            parts["train"] = Arrays(images, labels, "train", rest)
            parts.update({n: Arrays(images, labels, n, rows) for n, rows in (("val", val), ("test", test)) if len(rows)})
        self.splits: Mapping[str, Arrays] = {name: parts[name] for name in ("train", "val", "test") if name in parts}
        self.facts: Mapping[str, Any] = {"num_classes": len(names), "class_names": names}
        shape = "x".join(map(str, images.shape[1:]))
        self.description = f"{sum(map(len, parts.values())):,} pictures ({shape}) of {len(names)} classes from {source}"
        self._shapes = [(s, x.shape, hashlib.sha256(np.ascontiguousarray(y)).hexdigest()) for s, (x, y) in checked.items()]
        self._files: list[str] = []
        self._split_by = (fractions, seed)

    def fingerprint(self) -> str:
        """Of shapes, labels, and the files' names, sizes and times."""
        stats = [(os.path.basename(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in sorted(self._files)]
        return hashlib.sha256(repr((self._shapes, stats, self._split_by)).encode()).hexdigest()[:16]


class Npz(ArrayPictures):
    """``x_train, y_train, x_test, y_test`` (and ``x_val, y_val``), or ``images, labels`` to be split with a seed.

    Attributes:
      path: an .npz file, or a folder of .npy files of those names (which are memory-mapped).
      val_fraction, test_fraction: shares of the training arrays that become ``val`` and ``test`` where they are missing.
      class_names: names of the classes; None: their numbers.
      seed: of the split.

    Raises:
      UserError: the file is missing, broken, or holds something else.
    """

    def __init__(
        self,
        path: str,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        class_names: tuple[str, ...] | None = None,
        seed: int = 0,
    ):
        path = os.path.abspath(os.path.expanduser(path))
        loaded, files = _load(path)
        names = {"train": ("x_train", "y_train"), "val": ("x_val", "y_val"), "test": ("x_test", "y_test")}
        if "images" in loaded and "labels" in loaded:
            arrays = {"train": (loaded["images"], loaded["labels"])}
        else:
            arrays = {s: (loaded[x], loaded[y]) for s, (x, y) in names.items() if x in loaded and y in loaded}
        if "train" not in arrays:
            raise UserError(
                f"{path} holds {', '.join(sorted(loaded)) or 'nothing'}; expected x_train and y_train, or images and labels."
            )
        super().__init__(arrays, path, val_fraction, test_fraction, class_names, seed)
        self._files = files


def _load(path: str) -> tuple[dict[str, np.ndarray], list[str]]:
    try:
        if os.path.isdir(path):
            found = sorted(pathlib.Path(path).glob("*.npy"))
            return {f.stem: np.load(f, mmap_mode="r", allow_pickle=False) for f in found}, [str(f) for f in found]
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}, [path]
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(f"{path} is not an .npz file of plain arrays ({error}).") from error


def _check(images: np.ndarray, labels: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8[N,H,W,C], i32[N]; grey pictures get their channel, labels lose an axis of size 1."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8:
        raise UserError(f"{where}: pictures are uint8[N,H,W] or uint8[N,H,W,1 or 3], not {images.dtype}{list(images.shape)}.")
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{where}: labels are integers of shape [N], not {labels.dtype}{list(labels.shape)}.")
    if len(images) != len(labels) or not len(labels):
        raise UserError(f"{where}: {len(images)} pictures but {len(labels)} labels.")
    if labels.min() < 0:
        raise UserError(f"{where}: labels start at 0, but there is {labels.min()}.")
    return images, labels.astype(np.int32)
