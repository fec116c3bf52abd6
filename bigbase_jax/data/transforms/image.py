"""Transforms of pictures on the host: ``example["image"]``, uint8 [H, W, C] with C = 1 (grey) or 3 (RGB).

What lies on the picture moves with it, by the same ``Motion`` as its pixels. These entries are known; positions are in
pixels from the upper left corner, and the centre of the first pixel is at (0.5, 0.5):

- ``boxes`` f32 [M, 4]: x0, y0, x1, y1. They are cut off at the picture's border; ``box_valid`` bool [M], which is added
  where it is missing, is False for those of which nothing is left (and for padding), whose numbers become 0.
- ``points`` f32 [M, 2]: x, y; likewise ``point_valid`` bool [M].
- ``segmentation`` integer [H, W]: by the nearest pixel, and 255 where there is no picture.

A transform that does not say how it moves pixels refuses examples with such entries.

They return a new example and leave the given one alone. Pixel work is Pillow's C code, which lets other threads run.
Pictures stay uint8 on their way to the device, a quarter of the bytes of f32; the task normalises them inside the
compiled step.

Legend: H height, W width, C channels, M boxes or points. Sizes are an int or (height, width); ``rng`` is the example's
own generator.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from bigbase_jax.build import suggest
from bigbase_jax.core import Example, UserError

Size = int | tuple[int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

_METHODS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_REDUCING_GAP = 3.0  # from 6-fold downscaling on Pillow first averages whole blocks; no visible difference, much faster
_TRIES = 10  # random crops and erased boxes that do not fit are drawn anew, as often as in torchvision


_IGNORED = 255  # in a segmentation, what is no pixel of the picture
_VALID = {"boxes": "box_valid", "points": "point_valid"}


@dataclasses.dataclass(frozen=True)
class Motion:
    """Where each place of a transformed picture comes from, for its pixels and for what lies on it.

    Attributes:
      matrix: the place (x, y) of the result shows ``matrix @ (x, y, 1)`` of the picture.
      size: height and width of the result.
      outside: what is shown beyond the picture: "constant" (a value), "edge" or "reflect" (without repeating the edge).
    """

    matrix: tuple[tuple[float, float, float], tuple[float, float, float]]
    size: tuple[int, int]
    outside: str = "constant"

    def nearest(self, x_HW: np.ndarray, fill: int = 0) -> np.ndarray:
        """[H, W, ...] -> [*size, ...] by the nearest pixel; ``fill`` is the constant outside."""
        (a, b, c), (d, e, f) = self.matrix
        column_w, row_h = np.arange(self.size[1]) + 0.5, np.arange(self.size[0]) + 0.5
        if b or d:
            x = np.floor(a * column_w + b * row_h[:, None] + c)
            y = np.floor(d * column_w + e * row_h[:, None] + f)
            inside = (x >= 0) & (x < x_HW.shape[1]) & (y >= 0) & (y < x_HW.shape[0])
            out = x_HW[y.clip(0, x_HW.shape[0] - 1).astype(int), x.clip(0, x_HW.shape[1] - 1).astype(int)]
            out[~inside] = fill
            return out
        rows, columns = np.floor(e * row_h + f).astype(int), np.floor(a * column_w + c).astype(int)
        out = x_HW.take(self._folded(rows, x_HW.shape[0]), 0).take(self._folded(columns, x_HW.shape[1]), 1)
        if self.outside == "constant":
            out[(rows < 0) | (rows >= x_HW.shape[0])] = fill
            out[:, (columns < 0) | (columns >= x_HW.shape[1])] = fill
        return out

    def points(self, xy_M2: np.ndarray) -> np.ndarray:
        """Where points of the picture are in the result, f64 [..., 2], perhaps outside of it."""
        matrix = np.asarray(self.matrix)
        return np.linalg.solve(matrix[:, :2], (xy_M2 - matrix[:, 2])[..., None])[..., 0]

    def on(self, example: Example) -> Example:
        """What lies on the picture of an example, moved; raises UserError if it is not of the shape that it must be."""
        h, w = self.size
        moved: Example = {}
        if "segmentation" in example:
            moved["segmentation"] = self.nearest(example["segmentation"], _IGNORED)
        for name, validity in _VALID.items():
            if name not in example:
                continue
            given, width = np.asarray(example[name]), {"boxes": 4, "points": 2}[name]
            if given.ndim != 2 or given.shape[1] != width or given.dtype.kind != "f":
                raise UserError(f"{name} must be f32[M, {width}] in pixels, not {given.dtype}{list(given.shape)}.")
            if name == "points":
                out = self.points(given)
                valid = ((out >= 0) & (out < (w, h))).all(1)
            else:
                corners_M42 = self.points(given[:, [[0, 1], [2, 1], [0, 3], [2, 3]]])
                out = np.concatenate([corners_M42.min(1), corners_M42.max(1)], 1).clip(0, (w, h, w, h))
                valid = (out[:, 2:] > out[:, :2]).all(1) & (given[:, 2:] > given[:, :2]).all(1)
            valid &= np.asarray(example.get(validity, True), bool)
            moved |= {name: np.where(valid[:, None], out, 0).astype(given.dtype), validity: valid}
        return moved

    def _folded(self, at: np.ndarray, n: int) -> np.ndarray:
        return _reflected(at, n) if self.outside == "reflect" else at.clip(0, n - 1)


@dataclasses.dataclass(frozen=True)
class Window(Motion):
    """A part of the picture, brought to a size.

    Attributes:
      box: the part, which may reach beyond the picture where it is not resized.
      flip: whether left and right are exchanged.
      cut: whether the part is cut out before it is resized; else what is around it counts at its border.
    """

    matrix: Any = dataclasses.field(init=False)
    box: Box = (0, 0, 0, 0)
    flip: bool = False
    cut: bool = True

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        across, down = (right - left) / self.size[1], (bottom - top) / self.size[0]
        first, step = (right, -across) if self.flip else (left, across)
        object.__setattr__(self, "matrix", ((step, 0.0, first), (0.0, down, top)))

    def pixels(self, x_HWC: np.ndarray, method: str) -> np.ndarray:
        """The picture's part, resized where it has another size."""
        height, width = x_HWC.shape[:2]
        if not self.cut:
            x_HWC = _resize(x_HWC, self.size, method, self.box)
        else:
            left, top, right, bottom = map(int, self.box)
            if min(left, top) < 0 or right > width or bottom > height:
                return self.nearest(x_HWC)
            x_HWC = _resize(x_HWC[top:bottom, left:right], self.size, method)
        return x_HWC[:, ::-1] if self.flip else x_HWC


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Applies ``apply`` to ``example["image"]``. A subclass that uses ``rng`` sets ``random = True``.

    Attributes:
      moves: whether ``picture`` moves pixels, in a way that boxes, points and segmentations could not follow.
    """

    random: ClassVar[bool] = False
    moves: ClassVar[bool] = True

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """The example with its picture transformed; raises UserError if there is no picture or not a fitting one."""
        if "image" not in example:
            raise UserError(f"{type(self).__name__} needs an entry 'image'; the example has: {', '.join(example)}.")
        picture, motion = self.apply(example["image"], rng)
        return {**example, "image": picture, **(motion.on(example) if motion else self._unmoved(example))}

    def apply(self, x_HWC: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Motion | None]:
        """The transformed picture, and how its pixels moved; None: not at all, or it cannot be said (``moves``)."""
        return self.picture(x_HWC, rng), None

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The transformed picture; never writes into ``x_HWC``."""
        raise NotImplementedError

    def _unmoved(self, example: Example) -> Example:
        lying = [name for name in (*_VALID, "segmentation") if name in example]
        if self.moves and lying:
            raise UserError(
                f"{type(self).__name__} does not say how it moves {' and '.join(lying)}: set its moves = False if"
                " pixels stay where they are, or let apply() give a Motion."
            )
        return {}


class _Still(ImageTransform):
    """What leaves pixels where they are."""

    moves: ClassVar[bool] = False


# --- geometry ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Geometric(ImageTransform):
    """Shows a window of the picture, which a subclass chooses; ``method`` is how it is resized."""

    def window(self, height: int, width: int, rng: np.random.Generator) -> Window:
        """Of a picture of this size."""
        raise NotImplementedError

    def apply(self, x_HWC: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Motion | None]:
        window = self.window(x_HWC.shape[0], x_HWC.shape[1], rng)
        return window.pixels(x_HWC, getattr(self, "method", "bilinear")), window


@dataclasses.dataclass(frozen=True)
class Resize(Geometric):
    """Resizes with antialiasing.

    Attributes:
      size: an int: the shorter side gets this length and the other one keeps the proportions (rounded down, as in
        torchvision); (height, width): exactly this size.
      method: "nearest", "box", "bilinear", "bicubic" or "lanczos".
    """

    size: Size
    method: str = "bilinear"

    def __post_init__(self) -> None:
        _check_size(self, self.size)
        _check_method(self, self.method)

    def window(self, height: int, width: int, rng: np.random.Generator) -> Window:
        return Window(_resized(height, width, self.size), box=(0, 0, width, height))


@dataclasses.dataclass(frozen=True)
class CenterCrop(Geometric):
    """Cuts out the middle; a picture that is too small is first padded with zeros on both sides."""

    size: Size

    def __post_init__(self) -> None:
        _check_size(self, self.size)

    def window(self, height: int, width: int, rng: np.random.Generator) -> Window:
        h, w = _pair(self.size)
        top = -((h - height) // 2) if h > height else _middle(height, h)
        left = -((w - width) // 2) if w > width else _middle(width, w)
        return Window((h, w), box=(left, top, left + w, top + h))


@dataclasses.dataclass(frozen=True)
class ResizeCenterCrop(Geometric):
    """``Resize(resize)`` and ``CenterCrop(size)`` in one pass that computes no pixel it throws away.

    Attributes:
      resize: length of the shorter side before the crop, or (height, width).
      size: what is cut out of the middle; not larger than ``resize``.
      method: as for ``Resize``.
    """

    resize: Size
    size: Size
    method: str = "bilinear"

    def __post_init__(self) -> None:
        _check_size(self, self.resize, "resize")
        _check_size(self, self.size)
        _check_method(self, self.method)
        if any(inner > outer for inner, outer in zip(_pair(self.size), _pair(self.resize), strict=True)):
            raise UserError(
                f"ResizeCenterCrop cannot cut size={self.size} out of resize={self.resize}; enlarge resize."
            )

    def window(self, height: int, width: int, rng: np.random.Generator) -> Window:
        full_h, full_w = _resized(height, width, self.resize)
        h, w = _pair(self.size)
        per_row, per_column = height / full_h, width / full_w
        top, left = _middle(full_h, h) * per_row, _middle(full_w, w) * per_column
        bottom, right = min(top + h * per_row, height), min(left + w * per_column, width)
        return Window((h, w), box=(left, top, right, bottom), cut=False)


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(Geometric):
    """Cuts out a random box and resizes it (Szegedy et al. 2015, "Going Deeper with Convolutions", section 6).

    Attributes:
      size: of the result.
      scale: bounds of the box's share of the picture's area, drawn evenly.
      ratio: bounds of the box's width / height, drawn evenly on the logarithm.
      method: as for ``Resize``.
    """

    size: Size
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    method: str = "bilinear"
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_size(self, self.size)
        _check_method(self, self.method)
        _check_range(self, "scale", self.scale, 0.0, 1.0)
        _check_range(self, "ratio", self.ratio, 0.0, math.inf)

    def window(self, height: int, width: int, rng: np.random.Generator) -> Window:
        top, left, h, w = self.box(height, width, rng)
        return Window(_pair(self.size), box=(left, top, left + w, top + h))

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of a box; the largest one of an allowed ratio in the middle if none fits."""
        for w, h in _sides(height * width, self.scale, self.ratio, rng):
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, max(round(height * ratio), 1)), min(height, max(round(width / ratio), 1))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclasses.dataclass(frozen=True)
class RandomCrop(Geometric):
    """Pads and cuts out a random window, as usual for CIFAR and MNIST.

    Attributes:
      size: of the window.
      padding: pixels added on every side.
      mode: what is added: "reflect" (without repeating the border), "edge" or "constant" (zeros).
    """

    size: Size
    padding: int = 0
    mode: str = "reflect"
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_size(self, self.size)
        modes = ("constant", "edge", "reflect")
        if self.mode not in modes:
            raise UserError(f"RandomCrop has no mode {self.mode!r}.{suggest(self.mode, modes, 'mode')}")
        if self.padding < 0:
            raise UserError(f"RandomCrop's padding is {self.padding}; it must be 0 or more.")

    def window(self, height: int, width: int, rng: np.random.Generator) -> Window:
        starts = []
        for n, length in zip(_pair(self.size), (height, width), strict=True):
            room = length + 2 * self.padding - n
            if room < 0:
                raise UserError(
                    f"RandomCrop cannot cut size={self.size} out of a picture of {height}x{width} with"
                    f" padding={self.padding}; resize first, or pad more."
                )
            starts.append(int(rng.integers(room + 1)) - self.padding)
        (top, left), (h, w) = starts, _pair(self.size)
        return Window((h, w), self.mode, (left, top, left + w, top + h))


@dataclasses.dataclass(frozen=True)
class RandomFlip(Geometric):
    """Mirrors left and right with probability ``prob``."""

    prob: float = 0.5
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_prob(self, self.prob)

    def window(self, height: int, width: int, rng: np.random.Generator) -> Window:
        return Window((height, width), box=(0, 0, width, height), flip=rng.random() < self.prob)


# --- colour -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ColorJitter(_Still):
    """Changes brightness, contrast, saturation and hue in random order, as torchvision's ``ColorJitter``.

    Attributes:
      brightness, contrast, saturation: the factor is drawn evenly from [max(0, 1 - v), 1 + v]; 0 leaves it alone.
      hue: the shift is drawn evenly from [-hue, hue], as a share of the colour circle; at most 0.5.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, most in (("brightness", math.inf), ("contrast", math.inf), ("saturation", math.inf), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"ColorJitter's {name} is {getattr(self, name)}; it must be within [0, {most}].")

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        ranges = (self.brightness, self.contrast, self.saturation)
        factors = [rng.uniform(max(0.0, 1 - v), 1 + v) for v in ranges]
        shift, order = rng.uniform(-self.hue, self.hue), rng.permutation(4)
        if not any((*ranges, self.hue)):
            return x_HWC
        image = _to_pil(x_HWC, self)
        for i in order:
            if i < 3 and ranges[i]:
                image = [*_ENHANCERS.values()][i](image).enhance(factors[i])
            elif i == 3 and self.hue and image.mode == "RGB":
                image = _shift_hue(image, shift)
        return _to_array(image)


@dataclasses.dataclass(frozen=True)
class Grey(_Still):
    """One channel of luma, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)."""

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return x_HWC if x_HWC.shape[-1] == 1 else _to_array(_to_pil(x_HWC, self).convert("L"))


# --- augmentation policies --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrivialAugment(ImageTransform):
    """One random operation at a random strength (Müller & Hutter 2021, "TrivialAugment", the wide space of table 1).

    Attributes:
      num_magnitude_bins: levels of strength.
    """

    num_magnitude_bins: int = 31
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_magnitude_bins < 2:
            raise UserError(f"TrivialAugment's num_magnitude_bins is {self.num_magnitude_bins}; it must be at least 2.")

    def apply(self, x_HWC: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Motion | None]:
        op = _OPS[rng.integers(len(_OPS))]
        level = rng.integers(self.num_magnitude_bins) / (self.num_magnitude_bins - 1)
        sign = -1.0 if rng.random() < 0.5 else 1.0
        strength = {"shear": 0.99, "translate": 32.0, "rotate": 135.0, "enhance": 0.99, "bits": 6.0}
        return _operated(x_HWC, [(op, level, sign)], strength, self)


@dataclasses.dataclass(frozen=True)
class RandAugment(ImageTransform):
    """``num_ops`` random operations at one strength (Cubuk et al. 2019, "RandAugment"; torchvision's ranges).

    Attributes:
      num_ops: operations in a row.
      magnitude: strength, 0 to ``num_magnitude_bins`` - 1.
      num_magnitude_bins: levels of strength.
    """

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_ops < 0:
            raise UserError(f"RandAugment's num_ops is {self.num_ops}; it must be 0 or more.")
        if not 0 <= self.magnitude < self.num_magnitude_bins or self.num_magnitude_bins < 2:
            raise UserError(
                f"RandAugment's magnitude is {self.magnitude}; it must be within [0, {self.num_magnitude_bins - 1}],"
                " below num_magnitude_bins."
            )

    def apply(self, x_HWC: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Motion | None]:
        strength = {"shear": 0.3, "rotate": 30.0, "enhance": 0.9, "bits": 4.0}
        level, ops = self.magnitude / (self.num_magnitude_bins - 1), []
        for _ in range(self.num_ops):
            op = _OPS[rng.integers(len(_OPS))]
            ops.append((op, level, -1.0 if rng.random() < 0.5 else 1.0))
        return _operated(x_HWC, ops, strength, self)


@dataclasses.dataclass(frozen=True)
class RandomErasing(_Still):
    """Overwrites a random box (Zhong et al. 2017, "Random Erasing Data Augmentation").

    Attributes:
      prob: of doing it at all.
      scale: bounds of the box's share of the area.
      ratio: bounds of its height / width, drawn evenly on the logarithm.
      value: "random" (every value of the box anew, over the picture's whole range) or a number, in the picture's units
        (0 to 255 for uint8).
    """

    prob: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    value: str | float = "random"
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_prob(self, self.prob)
        _check_range(self, "scale", self.scale, 0.0, 1.0)
        _check_range(self, "ratio", self.ratio, 0.0, math.inf)
        if isinstance(self.value, str) and self.value != "random":
            raise UserError(f"RandomErasing's value is {self.value!r}; it must be 'random' or a number.")

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if rng.random() >= self.prob:
            return x_HWC
        height, width, channels = x_HWC.shape
        for h, w in _sides(height * width, self.scale, self.ratio, rng):
            if 0 < h < height and 0 < w < width:
                break
        else:
            return x_HWC
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        out = x_HWC.copy()
        patch: Any = self.value
        if patch == "random":
            shape = (h, w, channels)
            whole = x_HWC.dtype == np.uint8
            patch = rng.integers(0, 256, shape, np.uint8) if whole else rng.random(shape, np.float32)
        out[top : top + h, left : left + w] = patch
        return out


_ENHANCERS: dict[str, Callable[[Image.Image], Any]] = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "color": ImageEnhance.Color,
    "sharpness": ImageEnhance.Sharpness,
}
_MOVES = ("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_COLOURS = ("brightness", "color", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize")
_OPS = (*_MOVES, *_COLOURS)


def _operated(
    x_HWC: np.ndarray,
    ops: Sequence[tuple[str, float, float]],
    strength: dict[str, float],
    transform: ImageTransform,
) -> tuple[np.ndarray, Motion]:
    """Operations of the AutoAugment family in a row, and how all of them move pixels.

    Args:
      ops: (name, share in [0, 1] of the greatest strength, sign).
      strength: the greatest of each kind; of a translation without one, a share of the side as in torchvision.
    """
    matrix = np.eye(3)
    image: Image.Image | None = None
    for op, level, sign in ops:
        if op == "identity":
            continue
        image = _to_pil(x_HWC, transform) if image is None else image
        side = image.height if op == "translate_y" else image.width
        amount = sign * level * strength.get(op.partition("_")[0], 150 / 331 * side)
        moved = _matrix(op, amount, image.size)
        if moved is not None:
            matrix = matrix @ np.array([*moved, (0, 0, 1)])
        if op == "rotate":
            image = image.rotate(amount)
        elif moved is not None:
            image = image.transform(image.size, Image.Transform.AFFINE, (*moved[0], *moved[1]))
        else:
            image = _recoloured(image, op, level, sign, strength)
    (a, b, c), (d, e, f), _ = matrix.tolist()
    motion = Motion(((a, b, c), (d, e, f)), (x_HWC.shape[0], x_HWC.shape[1]))
    return x_HWC if image is None else _to_array(image), motion


def _matrix(op: str, amount: float, size: tuple[int, int]) -> Any:
    """``Motion.matrix`` of an operation; None if it moves nothing. ``size``: width and height."""
    if op == "rotate":  # degrees, anticlockwise, around the middle
        cos, sin = math.cos(math.radians(amount)), math.sin(math.radians(amount))
        x, y = size[0] / 2, size[1] / 2
        return (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y)
    return {
        "shear_x": ((1, amount, 0), (0, 1, 0)),
        "shear_y": ((1, 0, 0), (amount, 1, 0)),
        "translate_x": ((1, 0, -int(amount)), (0, 1, 0)),
        "translate_y": ((1, 0, 0), (0, 1, -int(amount))),
    }.get(op)


def _recoloured(image: Image.Image, op: str, level: float, sign: float, strength: dict[str, float]) -> Image.Image:
    if op in _ENHANCERS:
        return _ENHANCERS[op](image).enhance(1 + sign * level * strength["enhance"])
    if op == "posterize":
        return ImageOps.posterize(image, 8 - round(level * strength["bits"]))
    if op == "solarize":
        return ImageOps.solarize(image, round(255 * (1 - level), 6))  # type: ignore[arg-type]
    return ImageOps.autocontrast(image) if op == "autocontrast" else ImageOps.equalize(image)


def _shift_hue(image: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(i + round(shift * 255)) % 256 for i in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


# --- numpy and Pillow -------------------------------------------------------------------------------------------------


def _to_pil(x_HWC: np.ndarray, transform: ImageTransform | str) -> Image.Image:
    if x_HWC.dtype != np.uint8 or x_HWC.ndim != 3 or x_HWC.shape[-1] not in (1, 3) or not x_HWC.size:
        name = transform if isinstance(transform, str) else type(transform).__name__
        raise UserError(
            f"{name} takes uint8 pictures [H, W, 1 or 3], not {x_HWC.dtype}{list(x_HWC.shape)};"
            " what makes floats of them comes last."
        )
    return Image.fromarray(x_HWC[..., 0] if x_HWC.shape[-1] == 1 else x_HWC)


def _to_array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def _resize(x_HWC: np.ndarray, size: tuple[int, int], method: str, box: Box | None = None) -> np.ndarray:
    height, width = x_HWC.shape[:2]
    if size == (height, width) and box in (None, (0, 0, width, height)):
        return x_HWC
    gap = None if method == "nearest" else _REDUCING_GAP
    image = _to_pil(x_HWC, "Resize").resize((size[1], size[0]), _METHODS[method], box, gap)
    return _to_array(image)


def _resized(height: int, width: int, size: Size) -> tuple[int, int]:
    """Height and width after ``Resize(size)``."""
    if not isinstance(size, int):
        return size[0], size[1]
    if height <= width:
        return size, max(size * width // height, 1)
    return max(size * height // width, 1), size


def _middle(outer: int, inner: int) -> int:
    return round((outer - inner) / 2)


def _reflected(at: np.ndarray, n: int) -> np.ndarray:
    """Positions folded into [0, n) by reflection at the first and the last one."""
    period = max(2 * (n - 1), 1)
    at = at % period
    return np.minimum(at, period - at) if n > 1 else np.zeros_like(at)


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _sides(
    area: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Some sides of boxes with a share of an area within ``scale``, whose ratio is within ``ratio``."""
    for _ in range(_TRIES):
        part = area * rng.uniform(*scale)
        by = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        yield round(math.sqrt(part * by)), round(math.sqrt(part / by))


# --- checks of arguments ----------------------------------------------------------------------------------------------


def _check_size(transform: ImageTransform, size: Any, name: str = "size") -> None:
    whole = isinstance(size, int) or (
        isinstance(size, tuple) and len(size) == 2 and all(isinstance(n, int) for n in size)
    )
    if not whole or min(_pair(size)) < 1:
        raise UserError(
            f"{type(transform).__name__}'s {name} is {size!r}; it must be an int or (height, width) above 0."
        )


def _check_method(transform: ImageTransform, method: str) -> None:
    if method not in _METHODS:
        raise UserError(f"{type(transform).__name__} has no method {method!r}.{suggest(method, _METHODS, 'method')}")


def _check_range(transform: ImageTransform, name: str, bounds: Any, least: float, most: float) -> None:
    if len(bounds) != 2 or not least < bounds[0] <= bounds[1] <= most:
        raise UserError(
            f"{type(transform).__name__}'s {name} is {bounds}; it must be (low, high) with {least:g} < low <= high"
            + (f" <= {most:g}." if math.isfinite(most) else ".")
        )


def _check_prob(transform: ImageTransform, prob: float) -> None:
    if not 0 <= prob <= 1:
        raise UserError(f"{type(transform).__name__}'s prob is {prob}; it must be within [0, 1].")
