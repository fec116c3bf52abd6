"""Cats and dogs drawn by the program itself: a picture data set that needs no network and no disk.

Both animals have the same poses, furs, patterns, scenes, lights, noise and things in front of them. They differ in
anatomy, as in nature: a cat has pointed ears (a few have folded ones), upright pupils in coloured eyes, a small pink
nose, whiskers and a thin long tail; a dog has hanging ears (a few have pricked ones), round dark eyes, a broad muzzle
with a big dark nose, often a tongue, and a short thick tail.

Drawing is done with polygons whose corners are rounded to whole pixels, and random numbers come straight from a bit
generator whose stream NumPy guarantees, so that pictures do not depend on the machine.

Legend: H = W picture size, P canvas size (supersampled), K corners of a polygon.
Coordinates are in head radii, x to the right, y down, in the frame of a body part (``Pen``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from bigbase_jax.core import Example, UserError
from bigbase_jax.data.sources.image.image import ReadsPictures
from bigbase_jax.data.sources.splits import Opened, numbered

_VERSION = 1  # of the drawings; part of the fingerprint
CAT, DOG = 0, 1
_ANGLES = np.arange(20) * (2 * math.pi / 20)
_CIRCLE_K2 = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], -1)
_FURS = (
    (45, 42, 42),
    (92, 68, 50),
    (150, 105, 62),
    (196, 128, 62),
    (112, 112, 118),
    (160, 148, 136),
    (188, 164, 132),
)
Colour = tuple[int, int, int]


class DrawnCatsAndDogs(ReadsPictures, Opened):
    """Seeded pictures of cats and dogs drawn by the program, as many of the one as of the other.

    Attributes:
      splits: ``image`` uint8 [size, size, 3] and ``label`` i32[] (0 cat, 1 dog) each; pictures of all splits are alike.
      dataset_info: ``num_classes`` and ``class_names``.
      description: says that these are not photos.
    """

    def __init__(self, size: int = 64, num_train: int = 3500, num_val: int = 500, num_test: int = 1000, seed: int = 0):
        """Draws nothing yet.

        Args:
          size: height and width in pixels.
          num_train: pictures to train on.
          num_val: pictures to validate on; 0: no such split.
          num_test: pictures to test on; 0: no such split.
          seed: of all pictures.

        Raises:
          UserError: a size below 16, fewer than two training pictures, or a negative number.
        """
        if size < 16:
            raise UserError(f"drawn pictures of size {size} show nothing; use 16 or more.")
        for name, count, least in (("num_train", num_train, 2), ("num_val", num_val, 0), ("num_test", num_test, 0)):
            if count < least:
                raise UserError(f"{name} is {count}; it must be at least {least}.")
        counts = {"train": num_train, "val": num_val, "test": num_test}
        super().__init__(
            numbered(counts, functools.partial(_example, size, seed), lambda number_N: number_N % 2),
            {"num_classes": 2, "class_names": ("cat", "dog")},
            f"{sum(counts.values()):,} pictures of cats and dogs drawn by the program itself (not photos)",
            [(_VERSION, size, tuple(counts.items()), seed)],
        )


def _example(size: int, seed: int, number: int) -> Example:
    """``image`` uint8 [H, W, 3] and ``label`` i32[], 0 cat and 1 dog in turn."""
    return {"image": draw(number % 2, size, Dice(seed, number)), "label": np.int32(number % 2)}


class Dice:
    """Random numbers from the raw words of a PCG64, whose stream is the same in every version of NumPy (NEP 19)."""

    def __init__(self, seed: int, index: int):
        self._bits = np.random.PCG64(np.random.SeedSequence([seed % 2**64, index]))
        self._words = iter(self._bits.random_raw(256).tolist())

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        word = next(self._words, None)
        if word is None:
            self._words = iter(self._bits.random_raw(256).tolist())
            word = next(self._words)
        return low + (high - low) * (word >> 11) * 2.0**-53

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.uniform() * len(options))]

    def sign(self) -> int:
        return 1 if self.chance(0.5) else -1

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """i32 of this shape, roughly normal with deviation 128: the sum of three bytes less its mean."""
        count = math.prod(shape)
        raw = self._bits.random_raw(-(-3 * count // 8)).astype("<u8").view(np.uint8)[: 3 * count]
        return raw.reshape(3, *shape).sum(0, dtype=np.int32) - 382


def draw(kind: int, size: int, dice: Dice) -> np.ndarray:
    """One picture of a cat (0) or a dog (1), uint8 [size, size, 3]."""
    factor = 3 if size <= 96 else 2
    side = size * factor
    canvas = Image.new("RGB", (side, side))
    pen = Pen(ImageDraw.Draw(canvas), side)
    scene(pen, dice)
    fur = _Fur(dice)
    facing = dice.sign()
    if dice.chance(0.75):
        _portrait(kind, pen, fur, dice, facing)
    else:
        _whole(kind, pen, fur, dice, facing)
    if dice.chance(0.35):
        _in_front(pen, dice)
    return photograph(np.asarray(canvas.reduce(factor)).astype(np.int32), dice)


class Pen:
    """Draws in a frame that is scaled, turned and moved on the canvas.

    ``at`` is the frame's origin and ``unit`` its length of 1, both in shares of the canvas.
    """

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        side: int,
        at: tuple[float, float] = (0.0, 0.0),
        unit: float = 1.0,
        angle: float = 0.0,
        facing: int = 1,
    ):
        self._draw, self._side, self._at, self._unit = draw, side, at, unit
        cos, sin = math.cos(angle) * unit * side, math.sin(angle) * unit * side
        self._turn = np.array([[cos * facing, sin * facing], [-sin, cos]])
        self._origin = np.array(at) * side

    def frame(self, at: tuple[float, float], unit: float, angle: float = 0.0, facing: int = 1) -> Pen:
        """A frame on the whole canvas."""
        return Pen(self._draw, self._side, at, unit, angle, facing)

    def polygon(self, xy_K2: Any, colour: Colour) -> None:
        points_K2 = np.rint(np.asarray(xy_K2, np.float64) @ self._turn + self._origin).astype(np.int64)
        self._draw.polygon(points_K2.ravel().tolist(), fill=colour)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: Colour, angle: float = 0.0) -> None:
        cos, sin = math.cos(angle), math.sin(angle)
        self.polygon((_CIRCLE_K2 * (rx, ry)) @ np.array([[cos, sin], [-sin, cos]]) + (x, y), colour)

    def stroke(self, xy_K2: Any, width: float, colour: Colour, taper: float = 1.0) -> None:
        """A line through points, ``width`` wide at the first and ``taper`` times that at the last."""
        xy_K2 = np.asarray(xy_K2, np.float64)
        along_K2 = np.gradient(xy_K2, axis=0)
        across_K2 = np.stack([-along_K2[:, 1], along_K2[:, 0]], -1) / np.linalg.norm(along_K2, axis=1, keepdims=True)
        half_K2 = across_K2 * np.linspace(width / 2, width * taper / 2, len(xy_K2))[:, None]
        self.polygon(np.concatenate([xy_K2 + half_K2, (xy_K2 - half_K2)[::-1]]), colour)


class _Fur:
    """The colours and markings of one animal."""

    def __init__(self, dice: Dice):
        base = dice.pick(_FURS)
        self.main = _jitter(base, 18, dice)
        self.second = (
            _jitter(dice.pick(_FURS), 18, dice) if dice.chance(0.5) else _shade(self.main, dice.uniform(0.6, 0.85))
        )
        self.dark = _shade(self.main, 0.72)
        self.ear = self.second if dice.chance(0.4) else self.main
        self.muzzle = _mix(self.main, (240, 232, 220), dice.uniform(0.15, 0.7))
        self.mask = dice.chance(0.35)
        self.stripes = dice.chance(0.3)
        self.spots = dice.chance(0.3)


def _portrait(kind: int, pen: Pen, fur: _Fur, dice: Dice, facing: int) -> None:
    """Head and shoulders, from the front."""
    unit = dice.uniform(0.22, 0.28)
    at = (dice.uniform(0.42, 0.58), dice.uniform(0.41, 0.51))
    lean = dice.uniform(-0.5, 0.5)
    body = pen.frame(at, unit, 0.0, facing)
    if dice.chance(0.6):
        _tail(kind, body, fur, dice, (1.2 + lean, 3.2))
    body.oval(lean, 2.6, dice.uniform(1.2, 1.6), dice.uniform(1.7, 2.1), fur.dark)
    body.oval(lean * 0.8, 2.5, dice.uniform(0.5, 0.8), 1.2, fur.muzzle if dice.chance(0.6) else fur.main)
    _head(kind, pen.frame(at, unit, dice.uniform(-0.4, 0.4), facing), fur, dice)


def _whole(kind: int, pen: Pen, fur: _Fur, dice: Dice, facing: int) -> None:
    """The whole animal from the side, standing or sitting, with its head turned to us."""
    unit = dice.uniform(0.135, 0.18)
    sits = dice.chance(0.4)
    x, y = dice.uniform(0.42, 0.58), dice.uniform(0.5, 0.64)
    body = pen.frame((x, y), unit, dice.uniform(-0.1, 0.1), facing)
    if sits:
        neck = (0.35, -1.5)
        _tail(kind, body, fur, dice, (-1.2, 1.7))
        body.oval(-0.35, 1.0, 1.2, 1.15, fur.main, 0.2)
        body.oval(0.1, 0.2, 0.95, 1.6, fur.main, 0.15)
        for leg in (0.15, 0.7):
            body.stroke([(leg, 0.4), (leg + 0.05, 2.05)], 0.45, fur.dark if leg < 0.5 else fur.main)
        body.oval(-0.5, 1.95, 0.75, 0.22, fur.dark)
    else:
        neck = (1.7, -1.1)
        long = dice.uniform(1.6, 2.0)
        _tail(kind, body, fur, dice, (-long + 0.1, -0.3))
        swing = dice.uniform(-0.35, 0.35)
        for foot, colour in ((-long + 0.45, fur.dark), (long - 0.75, fur.dark)):
            body.stroke([(foot, 0.3), (foot - swing, 2.0)], 0.48, colour, 0.8)
        body.oval(0.0, 0.0, long, dice.uniform(0.75, 0.95), fur.main)
        for foot in (-long + 0.7, long - 0.45):
            body.stroke([(foot, 0.2), (foot + swing, 2.0)], 0.48, fur.main, 0.8)
        body.stroke([(1.2, -0.2), neck], 0.95, fur.main)
        if fur.spots:
            for _ in range(3):
                body.oval(dice.uniform(-1.3, 1.0), dice.uniform(-0.4, 0.3), dice.uniform(0.2, 0.5), 0.3, fur.second)
        if fur.stripes:
            for stripe in (-1.0, -0.5, 0.0, 0.5):
                body.stroke([(stripe, -0.7), (stripe + 0.1, 0.1)], 0.16, fur.second, 0.4)
    side = unit * facing
    at = (x + neck[0] * side, y + neck[1] * unit)
    _head(kind, pen.frame(at, unit * dice.uniform(1.0, 1.2), dice.uniform(-0.35, 0.35), facing), fur, dice)


def _tail(kind: int, pen: Pen, fur: _Fur, dice: Dice, root: tuple[float, float]) -> None:
    away = -1.0 if root[0] < 0 else 1.0
    t = np.linspace(0.0, 1.0, 7)
    if kind == CAT:
        bend, rise = dice.uniform(0.2, 0.7), dice.uniform(1.6, 2.4)
        x, y = away * (0.9 * t + bend * np.sin(4.2 * t)), -rise * t**1.3
        pen.stroke(np.stack([root[0] + x, root[1] + y], -1), dice.uniform(0.24, 0.34), fur.second, 0.8)
    else:
        rise = dice.uniform(-0.2, 1.0)
        x, y = away * dice.uniform(0.8, 1.2) * t, -rise * t - 0.35 * t * t
        pen.stroke(np.stack([root[0] + x, root[1] + y], -1), dice.uniform(0.4, 0.55), fur.main, 0.45)


def _head(kind: int, pen: Pen, fur: _Fur, dice: Dice) -> None:
    pointed = dice.chance(0.92 if kind == CAT else 0.1)
    if pointed:
        _pointed_ears(pen, fur, dice)
    if kind == CAT:
        pen.oval(0.0, 0.0, dice.uniform(1.0, 1.12), dice.uniform(0.86, 0.96), fur.main)
    else:
        pen.oval(0.0, 0.0, dice.uniform(0.86, 1.0), dice.uniform(0.96, 1.1), fur.main)
    if fur.mask:
        pen.oval(dice.sign() * 0.42, -0.2, 0.4, 0.46, fur.second)
    if fur.stripes:
        for stripe in (-0.25, 0.0, 0.25):
            pen.stroke([(stripe, -0.85), (stripe * 0.8, -0.45)], 0.1, fur.second)
    if not pointed:
        _hanging_ears(kind, pen, fur, dice)
    (_cat_face if kind == CAT else _dog_face)(pen, fur, dice)


def _pointed_ears(pen: Pen, fur: _Fur, dice: Dice) -> None:
    tall, wide = dice.uniform(1.35, 1.7), dice.uniform(0.72, 0.95)
    inner = _mix(fur.ear, (205, 130, 125), 0.6)
    for side in (-1, 1):
        tip = (side * wide, -tall * dice.uniform(0.95, 1.05))
        pen.polygon([(side * 1.0, -0.15), tip, (side * 0.18, -0.75)], fur.ear)
        pen.polygon([(side * 0.88, -0.42), (tip[0] * 0.97, tip[1] * 0.86), (side * 0.38, -0.76)], inner)


def _hanging_ears(kind: int, pen: Pen, fur: _Fur, dice: Dice) -> None:
    if kind == CAT:  # folded, as a Scottish Fold's: small, on top
        for side in (-1, 1):
            pen.polygon(
                [(side * 1.0, -0.3), (side * 0.85, -0.95), (side * 0.3, -0.85), (side * 0.6, -0.45)],
                _shade(fur.ear, 0.85),
            )
        return
    colour = _shade(fur.ear, dice.uniform(0.65, 0.9))
    long, out = dice.uniform(0.6, 0.85), dice.uniform(0.1, 0.55)
    for side in (-1, 1):
        x = side * dice.uniform(0.9, 1.05)
        pen.oval(x, -0.3 + long * 0.55, 0.3, long, colour, -side * out)


def _cat_face(pen: Pen, fur: _Fur, dice: Dice) -> None:
    iris = dice.pick(((178, 196, 70), (120, 180, 100), (222, 180, 60), (120, 178, 205)))
    sleepy = dice.uniform(0.75, 1.1)
    for side in (-1, 1):
        pen.oval(side * 0.42, -0.12, 0.25, 0.22 * sleepy, iris, side * 0.25)
        pen.oval(side * 0.42, -0.12, dice.uniform(0.05, 0.1), 0.2 * sleepy, (14, 14, 16))
    for side in (-1, 1):
        pen.oval(side * 0.17, 0.46, 0.24, 0.19, fur.muzzle)
    pen.polygon([(-0.13, 0.24), (0.13, 0.24), (0.0, 0.4)], _jitter((196, 112, 116), 15, dice))
    whisker = (238, 236, 230) if sum(fur.main) < 480 else (60, 52, 48)
    droop = dice.uniform(-0.15, 0.2)
    for side in (-1, 1):
        for slope in (-0.16, 0.0, 0.16):
            pen.stroke([(side * 0.3, 0.44 + slope * 0.4), (side * 1.3, 0.42 + slope + droop)], 0.05, whisker)


def _dog_face(pen: Pen, fur: _Fur, dice: Dice) -> None:
    for side in (-1, 1):
        pen.oval(side * 0.36, -0.2, 0.16, 0.16, (235, 230, 222))
        pen.oval(side * 0.35, -0.19, 0.13, 0.14, _jitter((44, 28, 18), 12, dice))
        pen.oval(side * 0.35 + 0.05, -0.24, 0.04, 0.04, (245, 245, 245))
    wide = dice.uniform(0.46, 0.58)
    if dice.chance(0.5):
        pen.oval(0.04, 0.95, 0.17, 0.32, _jitter((214, 96, 108), 12, dice))
    pen.oval(0.0, 0.5, wide, dice.uniform(0.4, 0.5), fur.muzzle)
    pen.oval(0.0, 0.28, 0.23, 0.17, (26, 22, 22))
    pen.stroke([(0.0, 0.4), (0.0, 0.72)], 0.06, (50, 38, 36))


def scene(pen: Pen, dice: Dice) -> None:
    """Wall and floor, or sky and ground, with things of all shapes, so that corners and curves give nothing away."""
    back, floor = _any_colour(dice), _any_colour(dice)
    horizon, slope = dice.uniform(0.45, 0.85), dice.uniform(-0.08, 0.08)
    pen.polygon([(0, 0), (1, 0), (1, 1), (0, 1)], back)
    steps = 6
    end = _shade(back, dice.uniform(0.7, 1.25))
    for step in range(steps):
        top = horizon * step / steps
        pen.polygon([(0, top), (1, top), (1, 1), (0, 1)], _mix(back, end, step / steps))
    pen.polygon([(0, horizon - slope), (1, horizon + slope), (1, 1), (0, 1)], floor)
    for _ in range(int(dice.uniform(2, 7))):
        _thing(pen.frame((dice.uniform(), dice.uniform()), dice.uniform(0.04, 0.17), dice.uniform(0, 6.3)), dice)


def _thing(pen: Pen, dice: Dice) -> None:
    colour, shape = _any_colour(dice), dice.uniform()
    if shape < 0.3:
        pen.polygon([(-1, 0.6), (0, -1), (1, 0.6)], colour)
    elif shape < 0.6:
        pen.oval(0, 0, 1, dice.uniform(0.4, 1), colour)
    elif shape < 0.8:
        pen.polygon([(-1, -0.5), (1, -0.5), (1, 0.5), (-1, 0.5)], colour)
    else:
        pen.stroke([(-2, 0), (0, dice.uniform(-0.5, 0.5)), (2, 0)], 0.25, colour)


def _in_front(pen: Pen, dice: Dice) -> None:
    """Something that hides a part of the animal: a post, a rail, a corner, or leaves."""
    colour, shape = _any_colour(dice), dice.uniform()
    if shape < 0.25:
        x, width = dice.uniform(0.05, 0.95), dice.uniform(0.04, 0.09)
        pen.polygon([(x, 0), (x + width, 0), (x + width, 1), (x, 1)], colour)
    elif shape < 0.5:
        y, width = dice.uniform(0.6, 0.95), dice.uniform(0.04, 0.1)
        pen.polygon([(0, y), (1, y), (1, y + width), (0, y + width)], colour)
    elif shape < 0.7:
        x, y = dice.pick((0.0, 1.0)), dice.pick((0.0, 1.0))
        pen.oval(x, y, dice.uniform(0.2, 0.4), dice.uniform(0.2, 0.35), colour)
    else:
        for _ in range(4):
            leaf = pen.frame((dice.uniform(), dice.uniform()), dice.uniform(0.04, 0.09), dice.uniform(0, 6.3))
            leaf.oval(0, 0, 1, 0.4, colour)


def photograph(x_HWC: np.ndarray, dice: Dice) -> np.ndarray:
    """Light from a side, contrast, a colour cast and the camera's noise, in integers."""
    size = x_HWC.shape[0]
    gain = dice.uniform(0.7, 1.2)
    ramp_W = np.rint(np.linspace(-1, 1, size) * dice.uniform(-0.25, 0.25) * 1024).astype(np.int32)
    ramp_H = np.rint(np.linspace(-1, 1, size) * dice.uniform(-0.25, 0.25) * 1024).astype(np.int32)
    light_HW = np.int32(round(gain * 1024)) + ramp_H[:, None] + ramp_W[None, :]
    cast_C = np.array([round(dice.uniform(0.92, 1.08) * 64) for _ in range(3)], np.int32)
    contrast = round(dice.uniform(0.7, 1.1) * 64)
    x_HWC = ((x_HWC - 128) * contrast >> 6) + 128
    x_HWC = x_HWC * light_HW[..., None] * cast_C >> 16
    strength = round(dice.uniform(3, 14) * 2)
    x_HWC = x_HWC + (dice.noise(x_HWC.shape) * strength >> 8)
    return x_HWC.clip(0, 255).astype(np.uint8)


# --- colours ----------------------------------------------------------------------------------------------------------


def _any_colour(dice: Dice) -> Colour:
    return int(dice.uniform(110, 245)), int(dice.uniform(110, 245)), int(dice.uniform(110, 245))


def _jitter(colour: Colour, amount: float, dice: Dice) -> Colour:
    r, g, b = (min(max(round(c + dice.uniform(-amount, amount)), 0), 255) for c in colour)
    return r, g, b


def _shade(colour: Colour, factor: float) -> Colour:
    r, g, b = (min(round(c * factor), 255) for c in colour)
    return r, g, b


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue
