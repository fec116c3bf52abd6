"""IDX files, the format of MNIST and its family (LeCun, Cortes & Burges), gzipped or not."""

from __future__ import annotations

import gzip
import math
import os
import pathlib
import zlib

import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.data.sources.npz import ArrayPictures

_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """The array of an IDX file: two zero bytes, a type, the number of axes, their sizes (big-endian i32), the data.

    Raises:
      UserError: not an IDX file, or cut short.
    """
    try:
        opener = gzip.open if str(path).endswith(".gz") else open
        with opener(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _DTYPES:
        raise UserError(f"{path} is not an IDX file: it begins with {data[:4].hex()!r}.")
    axes = data[3]
    start = 4 + 4 * axes
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], ">i4")) if len(data) >= start else ()
    dtype = np.dtype(_DTYPES[data[2]])
    want = start + math.prod(shape) * dtype.itemsize
    if len(shape) != axes or len(data) != want:
        raise UserError(f"{path} has {len(data):,} bytes, but its header promises {want:,}; it may be cut short.")
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


class Idx(ArrayPictures):
    """A folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same of ``t10k``, each maybe ``.gz``.

    Attributes:
      root: the folder.
      val_fraction, test_fraction: shares of ``train`` that become ``val``, and ``test`` where ``t10k`` is missing.
      class_names: names of the classes; None: their numbers.
      seed: of the split.

    Raises:
      UserError: a file is missing or broken.
    """

    def __init__(
        self,
        root: str,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        class_names: tuple[str, ...] | None = None,
        seed: int = 0,
    ):
        root = os.path.abspath(os.path.expanduser(root))
        files = {split: (_find(root, name, "images"), _find(root, name, "labels")) for split, name in (("train", "train"), ("test", "t10k"))}
        files = {split: pair for split, pair in files.items() if all(pair)}
        if "train" not in files:
            raise UserError(f"{root} has no train-images-idx3-ubyte and train-labels-idx1-ubyte (.gz).")
        arrays = {split: (read_idx(str(x)), read_idx(str(y))) for split, (x, y) in files.items()}
        super().__init__(arrays, root, val_fraction, test_fraction, class_names, seed)
        self._files = [str(path) for pair in files.values() for path in pair]


def _find(root: str, split: str, what: str) -> str | None:
    kind = "idx3" if what == "images" else "idx1"
    for dash in "-.":
        for suffix in (".gz", ""):
            path = pathlib.Path(root) / f"{split}-{what}{dash}{kind}-ubyte{suffix}"
            if path.is_file():
                return str(path)
    return None
