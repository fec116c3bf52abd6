"""Transforms of pictures on the host: ``example["image"]``, uint8 [H, W, C] with C = 1 (grey) or 3 (RGB).

They return a new example and leave the given one alone. Pixel work is Pillow's C code, which lets other threads run.
Pictures stay uint8 on their way to the device, a quarter of the bytes of f32; the task normalises them inside the
compiled step. ``ToFloat`` and ``Normalise`` are there for those who want floats on the host, and come last.

Legend: H height, W width, C channels. Sizes are an int or (height, width); ``rng`` is the example's own generator.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
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


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Applies ``picture`` to ``example["image"]``. A subclass that uses ``rng`` sets ``random = True``."""

    random: ClassVar[bool] = False

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """The example with its picture transformed; raises UserError if there is no picture or not a fitting one."""
        if "image" not in example:
            raise UserError(f"{type(self).__name__} needs an entry 'image'; the example has: {', '.join(example)}.")
        return {**example, "image": self.picture(example["image"], rng)}

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The transformed picture; never writes into ``x_HWC``."""
        raise NotImplementedError


# --- geometry ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Resize(ImageTransform):
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

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return _resize(x_HWC, _resized(x_HWC, self.size), self.method)


@dataclasses.dataclass(frozen=True)
class CenterCrop(ImageTransform):
    """Cuts out the middle; a picture that is too small is first padded with zeros on both sides."""

    size: Size

    def __post_init__(self) -> None:
        _check_size(self, self.size)

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        h, w = _pair(self.size)
        missing_h, missing_w = max(h - x_HWC.shape[0], 0), max(w - x_HWC.shape[1], 0)
        if missing_h or missing_w:
            sides = [(n // 2, n - n // 2) for n in (missing_h, missing_w)]
            x_HWC = np.pad(x_HWC, [*sides, (0, 0)])
        top, left = _middle(x_HWC.shape[0], h), _middle(x_HWC.shape[1], w)
        return x_HWC[top : top + h, left : left + w]


@dataclasses.dataclass(frozen=True)
class ResizeCenterCrop(ImageTransform):
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

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        full_h, full_w = _resized(x_HWC, self.resize)
        h, w = _pair(self.size)
        per_row, per_column = x_HWC.shape[0] / full_h, x_HWC.shape[1] / full_w
        top, left = _middle(full_h, h) * per_row, _middle(full_w, w) * per_column
        bottom, right = min(top + h * per_row, x_HWC.shape[0]), min(left + w * per_column, x_HWC.shape[1])
        return _resize(x_HWC, (h, w), self.method, (left, top, right, bottom))


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(ImageTransform):
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

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        top, left, h, w = self.box(x_HWC.shape[0], x_HWC.shape[1], rng)
        return _resize(x_HWC[top : top + h, left : left + w], _pair(self.size), self.method)

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of a box; the largest one of an allowed ratio in the middle if none fits."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_TRIES):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, max(round(height * ratio), 1)), min(height, max(round(width / ratio), 1))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclasses.dataclass(frozen=True)
class RandomCrop(ImageTransform):
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

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        picked, inside = [], []
        for n, length in zip(_pair(self.size), x_HWC.shape[:2], strict=True):
            room = length + 2 * self.padding - n
            if room < 0:
                raise UserError(
                    f"RandomCrop cannot cut size={self.size} out of a picture of {x_HWC.shape[0]}x{x_HWC.shape[1]} with"
                    f" padding={self.padding}; resize first, or pad more."
                )
            at = np.arange(n) + rng.integers(room + 1) - self.padding
            picked.append(at)
            inside.append(_reflected(at, length) if self.mode == "reflect" else at.clip(0, length - 1))
        out = x_HWC.take(inside[0], axis=0).take(inside[1], axis=1)
        if self.mode == "constant":
            out[picked[0] != inside[0]] = 0
            out[:, picked[1] != inside[1]] = 0
        return out


@dataclasses.dataclass(frozen=True)
class RandomFlip(ImageTransform):
    """Mirrors left and right with probability ``prob``."""

    prob: float = 0.5
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_prob(self, self.prob)

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return x_HWC[:, ::-1] if rng.random() < self.prob else x_HWC


# --- colour -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ColorJitter(ImageTransform):
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
                image = _ENHANCERS[i](image).enhance(factors[i])
            elif i == 3 and self.hue and image.mode == "RGB":
                image = _shift_hue(image, shift)
        return _to_array(image)


@dataclasses.dataclass(frozen=True)
class Grey(ImageTransform):
    """One channel of luma, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)."""

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return x_HWC if x_HWC.shape[-1] == 1 else _to_array(_to_pil(x_HWC, self).convert("L"))


@dataclasses.dataclass(frozen=True)
class ToFloat(ImageTransform):
    """f32 values in [0, 1]; a floating picture is taken to have them already."""

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return _to_float(x_HWC)


@dataclasses.dataclass(frozen=True)
class Normalise(ImageTransform):
    """(x - mean) / std per channel, f32, of values in [0, 1] (a uint8 picture is divided by 255 first).

    Attributes:
      mean, std: one number for all channels or one for each.
    """

    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    def __post_init__(self) -> None:
        if not np.all(np.asarray(self.std) > 0):
            raise UserError(f"Normalise's std is {self.std}; it must be above 0.")

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        for values in (mean, std):
            if values.ndim and values.size not in (1, x_HWC.shape[-1]):
                raise UserError(f"Normalise has {values.size} values for pictures of {x_HWC.shape[-1]} channels.")
        return (_to_float(x_HWC) - mean) / std


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

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        op = _OPS[rng.integers(len(_OPS))]
        level = rng.integers(self.num_magnitude_bins) / (self.num_magnitude_bins - 1)
        sign = -1.0 if rng.random() < 0.5 else 1.0
        if op == "identity":
            return x_HWC
        strength = {"shear": 0.99, "translate": 32.0, "rotate": 135.0, "enhance": 0.99, "bits": 6.0}
        return _to_array(_operate(_to_pil(x_HWC, self), op, level, sign, strength, strength["translate"]))


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

    def picture(self, x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        strength = {"shear": 0.3, "rotate": 30.0, "enhance": 0.9, "bits": 4.0}
        level = self.magnitude / (self.num_magnitude_bins - 1)
        image: Image.Image | None = None
        for _ in range(self.num_ops):
            op = _OPS[rng.integers(len(_OPS))]
            sign = -1.0 if rng.random() < 0.5 else 1.0
            if op != "identity":
                image = _to_pil(x_HWC, self) if image is None else image
                side = image.height if op == "translate_y" else image.width
                image = _operate(image, op, level, sign, strength, 150 / 331 * side)
        return x_HWC if image is None else _to_array(image)


@dataclasses.dataclass(frozen=True)
class RandomErasing(ImageTransform):
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
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_TRIES):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(low, high))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
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


_OPS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
_ENHANCERS: tuple[Callable[[Image.Image], Any], ...] = (
    ImageEnhance.Brightness,
    ImageEnhance.Contrast,
    ImageEnhance.Color,
    ImageEnhance.Sharpness,
)


def _operate(
    image: Image.Image, op: str, level: float, sign: float, strength: dict[str, float], translate: float
) -> Image.Image:
    """One operation of the AutoAugment family; ``level`` in [0, 1] is a share of the greatest ``strength``."""
    if op in ("shear_x", "shear_y"):
        shear = sign * level * strength["shear"]
        return _affine(image, (1, shear, 0, 0, 1, 0) if op == "shear_x" else (1, 0, 0, shear, 1, 0))
    if op in ("translate_x", "translate_y"):
        pixels = int(sign * level * translate)
        return _affine(image, (1, 0, -pixels, 0, 1, 0) if op == "translate_x" else (1, 0, 0, 0, 1, -pixels))
    if op == "rotate":
        return image.rotate(sign * level * strength["rotate"])
    if op in ("brightness", "contrast", "color", "sharpness"):
        enhancer = _ENHANCERS[("brightness", "contrast", "color", "sharpness").index(op)]
        return enhancer(image).enhance(1 + sign * level * strength["enhance"])
    if op == "posterize":
        return ImageOps.posterize(image, 8 - round(level * strength["bits"]))
    if op == "solarize":
        return ImageOps.solarize(image, round(255 * (1 - level), 6))  # type: ignore[arg-type]
    return ImageOps.autocontrast(image) if op == "autocontrast" else ImageOps.equalize(image)


def _affine(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients)


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
            " ToFloat and Normalise come last."
        )
    return Image.fromarray(x_HWC[..., 0] if x_HWC.shape[-1] == 1 else x_HWC)


def _to_array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def _to_float(x_HWC: np.ndarray) -> np.ndarray:
    if x_HWC.dtype == np.uint8:
        return np.divide(x_HWC, np.float32(255), dtype=np.float32)
    return x_HWC.astype(np.float32, copy=False)


def _resize(x_HWC: np.ndarray, size: tuple[int, int], method: str, box: Box | None = None) -> np.ndarray:
    height, width = x_HWC.shape[:2]
    if size == (height, width) and box in (None, (0, 0, width, height)):
        return x_HWC
    gap = None if method == "nearest" else _REDUCING_GAP
    image = _to_pil(x_HWC, "Resize").resize((size[1], size[0]), _METHODS[method], box, gap)
    return _to_array(image)


def _resized(x_HWC: np.ndarray, size: Size) -> tuple[int, int]:
    """Height and width after ``Resize(size)``."""
    if not isinstance(size, int):
        return size[0], size[1]
    height, width = x_HWC.shape[:2]
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
