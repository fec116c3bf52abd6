"""Folders of pictures, one folder per class."""

from __future__ import annotations

from bigbase_jax.core import UserError
from bigbase_jax.data.files import LIMITS, Limits
from bigbase_jax.data.sources.folder import ClassFolders, labels
from bigbase_jax.data.sources.image.image import SUFFIXES, Pictures, ReadsPictures
from bigbase_jax.data.sources.splits import Opened


class ImageFolder(ReadsPictures, Opened):
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
        self.ignored, names = listed.ignored, tuple(listed.names)
        splits = {
            split: Pictures(listed.folder, [f.name for f in files], labels(files), draft_size, limits, listed.members)
            for split in ("train", "val", "test")
            if (files := listed.files.get(split)) is not None
        }
        signatures = sorted((split, [tuple(file) for file in files]) for split, files in listed.files.items())
        info = {"num_classes": len(names), "class_names": names}
        super().__init__(splits, info, listed.description, [names, draft_size, *signatures])
