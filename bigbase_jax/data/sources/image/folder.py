"""Folders of pictures, one folder per class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigbase_jax.core import Source, UserError
from bigbase_jax.data.files import LIMITS, Limits
from bigbase_jax.data.sources.folder import ClassFolders, labels
from bigbase_jax.data.sources.image.image import SUFFIXES, Pictures, ReadsPictures
from bigbase_jax.data.sources.splits import digest


class ImageFolder(ReadsPictures):
    """``DIR/{train,val,test}/CLASS/**`` or ``DIR/CLASS/**``, as ``sources.folder`` says, with pictures.

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
          root, val_fraction, test_fraction, seed: see ``ClassFolders``, whose errors these are too.
          draft_size: as in ``image.decode``: JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size while both sides
            stay at least this long. Set it to the size that the transforms cut, to read large photos faster.
          limits: of a picture.
        """
        if draft_size is not None and draft_size < 1:
            raise UserError(f"draft_size is {draft_size}; it must be at least 1, or None for full size.")
        listed = ClassFolders(root, SUFFIXES, "pictures", val_fraction, test_fraction, seed, limits)
        self._files, self._draft_size, self.ignored = listed.files, draft_size, listed.ignored
        self.splits: Mapping[str, Source] = {
            split: Pictures(listed.folder, [f.name for f in files], labels(files), draft_size, limits, listed.members)
            for split in ("train", "val", "test")
            if (files := listed.files.get(split)) is not None
        }
        self.dataset_info: Mapping[str, Any] = {"num_classes": len(listed.names), "class_names": tuple(listed.names)}
        self.description = listed.description

    def fingerprint(self) -> str:
        """A digest of each split's paths, sizes and modification times, and of how they are decoded."""
        files = {split: [tuple(file) for file in listed] for split, listed in self._files.items()}
        return digest([self.dataset_info["class_names"], self._draft_size, *sorted(files.items())])
