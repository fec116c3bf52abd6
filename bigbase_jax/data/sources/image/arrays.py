"""Pictures of one shape in arrays: what the idx and npz formats hold.

Legend: N examples, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.core import Batch, Codec, Source, UserError
from bigbase_jax.data.files import limits_of
from bigbase_jax.data.sources.image.image import PictureCodec
from bigbase_jax.data.sources.splits import Opened, Split, split_off


class Arrays(Split):
    """A ``Source`` over rows of arrays, copied from only when asked for: ``image`` uint8 [H, W, C] and ``label`` i32[];
    called such as ``train[17]`` after the arrays and the row in them."""

    labels: np.ndarray

    def __init__(self, images_NHWC: np.ndarray, labels_N: np.ndarray, stem: str, rows: np.ndarray | None = None):
        """Rows ``rows`` (None: all) of uint8 [N, H, W, C] or [N, H, W] and integer [N]; ``stem`` names the arrays."""
        self._images, self._stem, self._rows = images_NHWC, stem, np.arange(len(labels_N)) if rows is None else rows
        label_n = np.asarray(labels_N if rows is None else labels_N[rows], np.int32)
        super().__init__(stem, len(label_n), None, True, label_n, batch=self._batch, name=self._called)

    def _batch(self, indices: np.ndarray) -> Batch:
        x = np.asarray(self._images[self._rows[indices]])
        return {"image": x[..., None] if x.ndim == 3 else x, "label": self.labels[indices]}

    def _called(self, index: int) -> str:
        return f"{self._stem}[{self._rows[index]}]"


class ArrayDataset(Opened):
    """Splits of arrays; the formats' readers derive from it.

    Attributes:
      splits: ``image`` uint8 [H, W, C] (C is 1 or 3) and ``label`` i32[] each.
      dataset_info: ``num_classes`` and ``class_names`` ("0", "1", ... unless given).
      description: where from, pictures, shape and classes.
    """

    def __init__(
        self,
        root: str,
        arrays: Mapping[str, tuple[np.ndarray, np.ndarray]],
        val_fraction: float,
        test_fraction: float,
        seed: int,
        class_names: Sequence[str] | None,
        identity: Sequence[object],
    ):
        """``arrays``: (images, labels) by split; those that lack are split off ``train`` (``splits.to_split_off``).

        ``identity``: what tells these arrays from others, for the fingerprint."""
        shapes = {split: images.shape[1:] for split, (images, _) in arrays.items()}
        if len(set(shapes.values())) > 1:
            raise UserError(f"{root}: the splits differ in the shape of a picture: {shapes}; they must be the same.")
        for split, (images, labels) in arrays.items():
            if not len(images):
                raise UserError(f"{root}: the {split} arrays are empty.")
            if len(images) != len(labels):
                raise UserError(f"{root}: {split} has {len(images)} pictures but {len(labels)} labels.")
            if labels.min() < 0:
                raise UserError(f"{root}: {split} has the label {labels.min()}; labels count from 0.")
        labels = arrays["train"][1]
        seen = np.unique(labels)
        if len(seen) < 2:
            raise UserError(f"{root}: all labels are {seen[0]}; a classifier needs at least two classes.")
        for split, (_, others) in arrays.items():
            unknown = np.setdiff1d(others, seen)
            if unknown.size:
                raise UserError(f"{root}: {split} has the label {unknown[0]}, which train does not have.")
        highest = int(seen[-1])
        names = tuple(class_names) if class_names else tuple(str(i) for i in range(highest + 1))
        if len(names) <= highest:
            raise UserError(f"{root}: class_names has {len(names)} names but the labels go up to {highest}.")

        sources: dict[str, Source] = {split: Arrays(*arrays[split], split) for split in arrays}
        dealt = split_off(arrays, None, labels, val_fraction, test_fraction, seed)
        for split, rows in dealt.items():
            sources[split] = Arrays(*arrays["train"], "train", rows)
        splits: dict[str, Source] = {s: sources[s] for s in ("train", "val", "test") if s in sources}
        self._shape = shapes["train"]
        size = "x".join(map(str, self._shape[:2]))
        colours = "colour" if self._shape[2:] == (3,) else "grey"
        count = sum(map(len, splits.values()))
        words = f"{count:,} {colours} pictures of {size} pixels and {len(names)} classes in {root}"
        about = [*identity, *(part for item in sorted(dealt.items()) for part in item)]
        super().__init__(splits, {"num_classes": len(names), "class_names": names}, words, about)

    def codec(self, config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """Pictures in the shape of those in the arrays."""
        height, width, *channels = self._shape
        return PictureCodec(limits_of(config), (height, width, 3 if channels == [3] else 1))
