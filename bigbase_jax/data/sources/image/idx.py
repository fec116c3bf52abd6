"""The idx format of MNIST and its family (http://yann.lecun.com/exdb/mnist, "File formats")."""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib

import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.data.files import LIMITS, Limits, existing, refuse_permission, regular
from bigbase_jax.data.sources.image.arrays import ArrayDataset

_UBYTE = 0x08
_NAME = re.compile(
    r"(?P<set>.*?)(?P<split>train|t10k|test)[-.](?P<what>images|labels)[-.]idx(?P<ndim>\d)[-.]ubyte(\.gz)?"
)


class Idx(ArrayDataset):
    """``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same of ``t10k`` (or ``test``), gzipped or not.

    A dot in place of a hyphen is understood, and one prefix before all four names (``emnist-digits-train-...``). The
    arrays are mapped, those of gzipped files are kept in memory. Attributes: see ``ArrayDataset``.
    """

    def __init__(
        self,
        root: str,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        class_names: tuple[str, ...] | None = None,
        limits: Limits = LIMITS,
    ):
        """Reads the files.

        Args:
          root: the folder they are in.
          val_fraction: share of each class of ``train`` that becomes ``val``; 0: no val.
          test_fraction: share of each class of ``train`` that becomes ``test`` where there is none; 0: no test.
          seed: of these splits.
          class_names: in the order of the labels; None: "0", "1", ...
          limits: of reading a file.

        Raises:
          UserError: a file is missing, has another magic number, is truncated, or does not fit the others.
        """
        refuse_permission(limits, root)
        folder = existing(root)
        found: dict[tuple[str, str], str] = {}
        prefixes = set()
        for entry in sorted(os.listdir(folder)):
            match = _NAME.fullmatch(entry)
            if match is not None:
                split = "train" if match["split"] == "train" else "test"
                found.setdefault((split, match["what"]), os.path.join(folder, entry))
                prefixes.add(match["set"])
        if len(prefixes) > 1:
            raise UserError(
                f"{root} holds several data sets ({', '.join(sorted(prefixes))}); give each its own folder."
            )
        arrays = {}
        for split in ("train", "test"):
            present = {what for s, what in found if s == split}
            missing = {"images", "labels"} - present
            if missing and (present or split == "train"):
                what, ndim = ("images", 3) if "images" in missing else ("labels", 1)
                stem = "train" if split == "train" else "t10k"
                raise UserError(
                    f"{root} has no file {stem}-{what}-idx{ndim}-ubyte or {stem}-{what}-idx{ndim}-ubyte.gz."
                )
            if not missing:
                arrays[split] = (read_idx(found[split, "images"], limits), read_idx(found[split, "labels"], limits))
                for what, array in zip(("images", "labels"), arrays[split], strict=True):
                    if array.ndim != (3 if what == "images" else 1):
                        raise UserError(f"{found[split, what]} has {array.ndim} dimensions, which {what} do not have.")
        contents = [part for split, pair in sorted(arrays.items()) for part in (split, *pair)]
        super().__init__(root, arrays, val_fraction, test_fraction, seed, class_names, contents)


def read_idx(path: str, limits: Limits = LIMITS) -> np.ndarray:
    """The uint8 array in an idx file, gunzipped if it begins like gzip.

    Raises:
      UserError: another magic number, another number of bytes than the header says, a damaged gzip file, or one that
        unpacks out of proportion.
    """
    size = regular(path).st_size
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if packed else file
            head = stream.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or not head[3]:
                begins = head.hex() or "nothing"
                raise UserError(f"{path} is not an idx file: it begins with {begins}, not with 0000TTDD.")
            if head[2] != _UBYTE:
                raise UserError(f"{path} holds values of type {head[2]:#04x}; only unsigned bytes (0x08) are read.")
            start = 4 + 4 * head[3]
            shape = np.frombuffer(stream.read(start - 4).ljust(start - 4, b"\0"), ">u4").tolist()
            expected = math.prod(shape)
            if packed:
                limits.meter(path, size)(expected)
                data = stream.read(expected + 1)
                size = start + len(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if size != start + expected:
        more = "more than " * (size > start + expected and packed)
        raise UserError(
            f"{path} is truncated or damaged: its header wants {start + expected:,} bytes and it has {more}{size:,}."
        )
    if not packed and expected:
        return np.memmap(path, np.uint8, "r", start, tuple(shape))
    return np.frombuffer(data if packed else b"", np.uint8).reshape(shape)
