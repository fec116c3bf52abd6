"""Pictures in NumPy's own files: one .npz archive, or a folder of .npy files."""

from __future__ import annotations

import os
import zipfile
import zlib
from typing import Any

import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.data.files import LIMITS, Limits, existing, refuse_permission, regular
from bigbase_jax.data.sources.image.arrays import ArrayDataset

_LAYOUTS = (("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("{}_x", "{}_y"))
_LISTED = 10
_BROKEN = (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


class Npz(ArrayDataset):
    """An .npz file, or a folder of .npy files of the same names, which are mapped rather than read.

    The arrays are ``x_train, y_train`` and optionally ``x_val, y_val`` and ``x_test, y_test`` (Keras; MedMNIST's
    ``train_images, train_labels`` also), or ``images, labels``, which are split. Pictures are [N, H, W] or
    [N, H, W, 1 or 3], of uint8, or of another number type with values in 0 to 255 or, if floating, in 0 to 1; labels
    are integers [N] or [N, 1]. Attributes: see ``ArrayDataset``.
    """

    def __init__(
        self,
        path: str,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        class_names: tuple[str, ...] | None = None,
        limits: Limits = LIMITS,
    ):
        """Reads or maps the arrays.

        Args:
          path: the .npz file, or the folder.
          val_fraction: share of each class of ``train`` that becomes ``val`` where there is none; 0: no val.
          test_fraction: share of each class of ``train`` that becomes ``test`` where there is nothing else.
          seed: of the split.
          class_names: in the order of the labels; None: "0", "1", ...
          limits: of what an archive unpacks to.

        Raises:
          UserError: nothing there, arrays missing, or of another shape, type or range.
        """
        refuse_permission(limits, path)
        held = _Arrays(path, limits)
        arrays = {}
        if "images" in held and "labels" in held:
            arrays["train"] = held.pair("images", "labels")
        for images, labels in _LAYOUTS if not arrays else ():
            if images.format("train") not in held:
                continue
            for split in ("train", "val", "test"):
                keys = images.format(split), labels.format(split)
                if split == "train" or any(key in held for key in keys):
                    arrays[split] = held.pair(*keys)
            break
        if not arrays:
            have = held.names()
            names = ", ".join(have[:_LISTED]) + (", ..." if len(have) > _LISTED else "") if have else "nothing"
            raise UserError(f"{path} holds {names}; expected x_train and y_train, or images and labels.")
        super().__init__(path, arrays, val_fraction, test_fraction, seed, class_names, [held.file_signature()])


class _Arrays:
    """The arrays of a file or folder by name, read when asked for."""

    def __init__(self, path: str, limits: Limits):
        self._path, self._limits = path, limits
        expanded = os.path.expanduser(path)
        self._folder = expanded if os.path.isdir(expanded) else None
        self._files: dict[str, str] = {}
        self._archive: Any = {}
        if self._folder:
            names = sorted(name for name in os.listdir(self._folder) if name.endswith(".npy"))
            self._files = {name.removesuffix(".npy"): os.path.join(self._folder, name) for name in names}
            return
        self._single = existing(path, "file")
        try:
            archive = np.load(self._single, allow_pickle=False)
        except _BROKEN as error:
            raise UserError(f"{path} is not an .npz file: {error}.") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"{path} holds a single array; expected an .npz archive, or a folder of .npy files.")
        self._archive = archive

    def __contains__(self, name: str) -> bool:
        return name in self._files or name in self._archive

    def names(self) -> list[str]:
        return sorted({*self._files, *self._archive})

    def file_signature(self) -> list[tuple[str, int, int]]:
        """Names, sizes in bytes and modification times in ns of the files."""
        files = self._files or {os.path.basename(self._single): self._single}
        return [(name, os.stat(file).st_size, os.stat(file).st_mtime_ns) for name, file in sorted(files.items())]

    def pair(self, images: str, labels: str) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W, C] or [N, H, W], and i32 [N]."""
        for name in (images, labels):
            if name not in self:
                raise UserError(f"{self._path} has {labels if name == images else images} but no {name}.")
        return self._pictures(images), self._labels(labels)

    def _read(self, name: str) -> np.ndarray:
        try:
            if self._folder:
                regular(self._files[name])
                return np.load(self._files[name], mmap_mode="r", allow_pickle=False)
            entries = self._archive.zip.NameToInfo
            entry = entries.get(f"{name}.npy") or entries[name]
            packed = min(entry.compress_size, os.stat(self._single).st_size)
            self._limits.meter(f"{self._path}: the array {name}", packed)(entry.file_size)
            return np.asarray(self._archive[name])
        except _BROKEN as error:
            raise UserError(f"{self._path}: the array {name} cannot be read: {error}.") from error

    def _pictures(self, name: str) -> np.ndarray:
        x = self._read(name)
        what = f"{self._path}: {name} is {x.dtype}{list(x.shape)}"
        if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
            raise UserError(f"{what}, channels first; transpose it to [N, H, W, C].")
        if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)) or 0 in x.shape[1:]:
            raise UserError(f"{what}; pictures must be [N, H, W], [N, H, W, 1] or [N, H, W, 3].")
        if x.dtype == np.uint8 or not x.size:
            return x.astype(np.uint8, copy=False)
        if x.dtype.kind not in "buif":
            raise UserError(f"{what}; pictures must be numbers, best of uint8.")
        low, high = (x.min(), x.max()) if x.dtype != np.bool_ else (0.0, 1.0)
        if not (low >= 0 and high <= 255):
            raise UserError(f"{what} with values from {low:g} to {high:g}; they must be in 0 to 255, or 0 to 1.")
        if x.dtype.kind in "bf" and high <= 1:
            x = x * np.float32(255)
        return np.rint(x).astype(np.uint8)

    def _labels(self, name: str) -> np.ndarray:
        y = np.asarray(self._read(name))
        what = f"{self._path}: {name} is {y.dtype}{list(y.shape)}"
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.ndim == 2:
            raise UserError(f"{what}; labels must be integers [N]: of one-hot labels store the argmax.")
        if y.ndim != 1 or y.dtype.kind not in "ui":
            raise UserError(f"{what}; labels must be integers [N].")
        return y.astype(np.int32)
