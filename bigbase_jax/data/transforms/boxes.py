"""Transforms of pictures with boxes: to one static size, keeping proportions, and to one static number of boxes.

Those of ``transforms.image`` move boxes too; these are what a detector needs beside them. Entries beside ``image`` and
``boxes`` f32 [N, 4] (xyxy in pixels): ``classes`` i32 [N] and ``crowd`` f32 [N] (1: to be ignored).

Legend: H height, W width, C channels, N boxes, M boxes that a batch has place for.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from bigbase_jax.core import Example, UserError
from bigbase_jax.data.transforms.image import Motion


@dataclasses.dataclass(frozen=True)
class Letterbox:
    """The whole picture in the middle of a canvas of one size, its proportions kept.

    Adds ``scale`` and ``offset``, f32 [2] (x, y): where x of the picture is, ``x * scale + offset`` of the canvas is;
    and ``size`` i32 [2], the picture's height and width.

    Attributes:
      size: (height, width) of the canvas.
      fill: its grey, where there is no picture.
      enlarge: whether smaller pictures are enlarged.
    """

    size: tuple[int, int]
    fill: int = 114
    enlarge: bool = True
    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self, self.size, self.fill)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """
        Raises:
          UserError: no picture, or one that is not uint8 [H, W, C].
        """
        x_HWC = _picture(self, example)
        height, width = x_HWC.shape[:2]
        share = min(self.size[0] / height, self.size[1] / width)
        share = share if self.enlarge else min(share, 1.0)
        h, w = max(1, round(height * share)), max(1, round(width * share))
        top, left = (self.size[0] - h) // 2, (self.size[1] - w) // 2
        image = Image.fromarray(x_HWC[..., 0] if x_HWC.shape[-1] == 1 else x_HWC)
        small = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR, reducing_gap=3.0)).reshape(h, w, -1)
        canvas = np.full((*self.size, x_HWC.shape[-1]), self.fill, np.uint8)
        canvas[top : top + h, left : left + w] = small
        scale, offset = (w / width, h / height), (left, top)
        return {**example, "image": canvas, **_moved(example, scale, offset, self.size), **_told(x_HWC, scale, offset)}


@dataclasses.dataclass(frozen=True)
class RandomView:
    """A random letterbox: larger or smaller, elsewhere, stretched and mirrored, in one resampling.

    Of boxes that reach beyond the canvas what is left stays, where that is ``visibility`` of their area; what shows
    less of an object is neither learnt as one nor as background (``crowd``).

    Attributes:
      size, fill: as in ``Letterbox``.
      scale: bounds of the size, beside that of the letterbox, drawn evenly on the logarithm.
      ratio: bounds of the stretching, width against height, likewise.
      flip: probability of exchanging left and right.
      vertical: of exchanging top and bottom.
      visibility: share of a box's area.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.7, 1.5)
    ratio: tuple[float, float] = (0.9, 1.1)
    flip: float = 0.5
    vertical: float = 0.0
    visibility: float = 0.3
    fill: int = 114
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self, self.size, self.fill)
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise UserError(f"RandomView's {name} is {(low, high)}; it must be (low, high) with 0 < low <= high.")
        for name in ("flip", "vertical", "visibility"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"RandomView's {name} is {getattr(self, name)}; it must be within [0, 1].")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """
        Raises:
          UserError: no picture, or one that is not uint8 [H, W, C].
        """
        x_HWC = _picture(self, example)
        (height, width), (H, W) = x_HWC.shape[:2], self.size
        share = min(H / height, W / width) * _drawn(self.scale, rng)
        stretch = math.sqrt(_drawn(self.ratio, rng))
        scale = [share * stretch, share / stretch]
        room = (W - width * scale[0], H - height * scale[1])  # below 0: what is cut off
        offset = [rng.uniform(min(r, 0.0), max(r, 0.0)) for r in room]
        for axis, (prob, side) in enumerate(((self.flip, W), (self.vertical, H))):
            if rng.random() < prob:
                scale[axis], offset[axis] = -scale[axis], side - offset[axis]
        image = Image.fromarray(x_HWC[..., 0] if x_HWC.shape[-1] == 1 else x_HWC)
        factor = max(int(1 / max(map(abs, scale))), 1)
        image = image.reduce(factor)  # bilinear reads four pixels, and of a much larger picture would leave some out
        a, e = 1 / scale[0], 1 / scale[1]
        matrix = (a / factor, 0.0, -offset[0] * a / factor, 0.0, e / factor, -offset[1] * e / factor)
        fill: Any = self.fill if x_HWC.shape[-1] == 1 else (self.fill,) * x_HWC.shape[-1]
        canvas = image.transform((W, H), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)
        picture = np.asarray(canvas).reshape(H, W, -1)
        moved = _moved(example, scale, offset, self.size, self.visibility)
        return {**example, "image": picture, **moved, **_told(x_HWC, scale, offset)}


@dataclasses.dataclass(frozen=True)
class PadBoxes:
    """Static numbers of boxes: ``boxes`` f32 [M, 4], ``classes`` i32 [M], ``crowd`` f32 [M] and ``box_mask`` f32 [M].

    Boxes that are not valid (``transforms.image``) are left out. An example without boxes, as of a user's picture,
    stays as it is.

    Attributes:
      most: M.
    """

    most: int
    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.most < 1:
            raise UserError(f"PadBoxes' most is {self.most}; it must be at least 1.")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """
        Raises:
          UserError: there are more boxes.
        """
        if "boxes" not in example:
            return example
        example = dict(example)
        valid_N = example.pop("box_valid", np.ones(len(example["boxes"]), bool))
        count = int(valid_N.sum())
        if count > self.most:
            raise UserError(f"an example has {count} boxes, and PadBoxes has most={self.most}; set it as most_boxes.")
        for name in ("boxes", "classes", "crowd"):
            kept = np.asarray(example[name])[valid_N]
            example[name] = np.concatenate([kept, np.zeros((self.most - count, *kept.shape[1:]), kept.dtype)])
        return {**example, "box_mask": (np.arange(self.most) < count).astype(np.float32)}


def _drawn(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    """A factor, drawn evenly on the logarithm."""
    return math.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1])))


def _picture(transform: Any, example: Example) -> np.ndarray:
    x_HWC = example.get("image")
    if not isinstance(x_HWC, np.ndarray) or x_HWC.dtype != np.uint8 or x_HWC.ndim != 3 or not x_HWC.size:
        raise UserError(f"{type(transform).__name__} takes uint8 pictures [H, W, 1 or 3] as 'image'.")
    return x_HWC


def _moved(example: Example, scale: Any, offset: Any, size: tuple[int, int], visibility: float = 0.0) -> Example:
    """What lies on the picture, on a canvas where x of it is ``x * scale + offset``."""
    (a, e), (c, f) = scale, offset
    moved = Motion(((1 / a, 0.0, -c / a), (0.0, 1 / e, -f / e)), size).on(example)
    if "boxes" in moved and visibility:
        side_N2 = np.abs((example["boxes"][:, 2:] - example["boxes"][:, :2]) * (a, e))
        left_N = (moved["boxes"][:, 2:] - moved["boxes"][:, :2]).prod(1) / np.maximum(side_N2.prod(1), 1e-9)
        moved["crowd"] = np.maximum(example["crowd"], left_N < visibility).astype(np.float32)
    return moved


def _told(x_HWC: np.ndarray, scale: Any, offset: Any) -> Example:
    height, width = x_HWC.shape[:2]
    return {
        "scale": np.asarray(scale, np.float32),
        "offset": np.asarray(offset, np.float32),
        "size": np.array([height, width], np.int32),
    }


def _check(transform: Any, size: Any, fill: int) -> None:
    if len(size) != 2 or min(size) < 1 or not 0 <= fill <= 255:
        raise UserError(
            f"{type(transform).__name__} has size={size} and fill={fill}; a size is (height, width), a fill 0 to 255."
        )
