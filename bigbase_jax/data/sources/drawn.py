"""The embedded data set: cats and dogs drawn by the program itself, so that a first run needs no network.

A picture is a function of (seed, index) alone. Both animals share colours, sizes, poses, backgrounds, lighting, noise and
things in front of them; what differs is anatomy: pointed against hanging ears, a small nose with whiskers against a muzzle
with a big one, slit against round pupils, a thin long tail against a short thick one. No single pixel or mean tells
them apart, though coarse shapes often do.

Coordinates: the animal's frame is centred on its head, x to the right, y down, in head radii.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from bigbase_jax.core import Example, UserError
from bigbase_jax.data.sources.image import Pictures

CLASSES = ("cat", "dog")
_VERSION = 1  # of the drawings; part of the fingerprint
_SUPERSAMPLING = 2
_FURS = np.array([[60, 50, 45], [120, 85, 55], [150, 105, 65], [165, 155, 140], [110, 110, 115], [180, 125, 75], [80, 65, 60]])
_CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 28, endpoint=False)), np.sin(np.linspace(0, 2 * np.pi, 28, endpoint=False))], -1)


class DrawnCatsAndDogs(Pictures):
    """5,000 seeded pictures, half of them cats; not photos.

    Attributes:
      size: height and width in pixels.
      num_train, num_val, num_test: pictures of each split.
      seed: of all pictures.
    """

    def __init__(self, size: int = 64, num_train: int = 3500, num_val: int = 500, num_test: int = 1000, seed: int = 0):
        counts = {"train": num_train, "val": num_val, "test": num_test}
        if size < 16 or num_train < 2 or min(counts.values()) < 0:
            raise UserError(f"drawn pictures need a size of 16 or more and 2 or more to train on, not {size} and {num_train}.")
        self.splits: Mapping[str, Drawings] = {}
        first = 0
        for split, count in counts.items():
            if count:
                self.splits = {**self.splits, split: Drawings(size, first, count, seed, split)}
            first += count
        self.facts: Mapping[str, Any] = {"num_classes": 2, "class_names": CLASSES}
        self.description = f"{first:,} pictures of cats and dogs drawn by the program itself ({size}x{size}, seed {seed}); not photos"
        self._identity = repr((_VERSION, size, counts, seed))

    def fingerprint(self) -> str:
        """Of the drawing program's version, the sizes and the seed."""
        return hashlib.sha256(self._identity.encode()).hexdigest()[:16]


class Drawings:
    """Pictures ``first`` to ``first + count`` of the seed's endless series.

    Attributes:
      labels: i32[N], 0 cat, 1 dog.
    """

    def __init__(self, size: int, first: int, count: int, seed: int, split: str):
        self._size, self._first, self._seed, self._split = size, first, seed, split
        self.labels = ((np.arange(first, first + count) * 0x9E3779B1 >> 7) & 1).astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        rng = np.random.Generator(np.random.Philox(key=[self._seed, self._first + index]))
        return {"image": draw(CLASSES[self.labels[index]], self._size, rng), "label": self.labels[index]}

    def name(self, index: int) -> str:
        """``drawn split[index]``."""
        return f"drawn {self._split}[{index}]"


def draw(animal: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """One picture of a "cat" or a "dog", uint8[size,size,3]."""
    side = size * _SUPERSAMPLING
    canvas = Image.fromarray(_background(side, rng))
    pen = ImageDraw.Draw(canvas)
    _clutter(pen, side, rng, rng.integers(0, 3))
    _Animal(pen, side, rng).draw(animal)
    if rng.random() < 0.3:
        _occlude(pen, side, rng)
    picture = np.asarray(canvas.reduce(_SUPERSAMPLING), np.float32)
    light = rng.uniform(0.65, 1.2) * (1 + rng.uniform(-0.25, 0.25) * np.linspace(-1, 1, size, dtype=np.float32)[:, None, None])
    noise = rng.standard_normal((size, size, 3), dtype=np.float32) * rng.uniform(2, 14)
    return np.clip(picture * light + noise, 0, 255).astype(np.uint8)


class _Animal:
    """A pen in the animal's own frame: scaled, tilted, mirrored and moved."""

    def __init__(self, pen: ImageDraw.ImageDraw, side: int, rng: np.random.Generator):
        self.pen, self.rng = pen, rng
        self.scale = side * rng.uniform(0.17, 0.26)
        angle = rng.uniform(-0.4, 0.4)
        mirror = rng.choice([-1.0, 1.0])
        self.turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag([mirror, 1.0])
        self.centre = side * np.array([rng.uniform(0.38, 0.62), rng.uniform(0.35, 0.49)])
        fur = _FURS[rng.integers(len(_FURS))] + rng.normal(0, 14, 3)
        self.fur = fur
        self.second = fur * rng.uniform(0.55, 0.85) if rng.random() < 0.6 else fur * 0.5 + 90
        self.dark = fur * 0.35

    def points(self, xy: Any) -> list[tuple[float, float]]:
        return [tuple(p) for p in np.asarray(xy, float) @ self.turn.T * self.scale + self.centre]

    def polygon(self, xy: Any, colour: Any) -> None:
        self.pen.polygon(self.points(xy), fill=_colour(colour))

    def oval(self, x: float, y: float, rx: float, ry: float, colour: Any, tilt: float = 0.0) -> None:
        turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
        self.polygon((_CIRCLE * [rx, ry]) @ turn.T + [x, y], colour)

    def line(self, xy: Any, colour: Any, width: float) -> None:
        self.pen.line(self.points(xy), fill=_colour(colour), width=max(1, round(width * self.scale)), joint="curve")

    def draw(self, animal: str) -> None:
        rng, cat = self.rng, animal == "cat"
        sway = rng.uniform(-0.3, 0.3)
        # The body, and the tail behind it.
        t = np.linspace(0, 1, 9)
        if cat:
            tail = np.stack([1.0 + 1.0 * t + 0.25 * np.sin(5 * t + 3 * sway), 2.6 - 2.4 * t * rng.uniform(0.7, 1.1)], -1)
            self.line(tail, self.fur, rng.uniform(0.16, 0.24))
        else:
            tail = np.stack([1.0 + 0.75 * t, 2.2 - 0.6 * t * rng.uniform(0.3, 1.6)], -1)
            self.line(tail, self.fur, rng.uniform(0.3, 0.42))
        self.oval(0.25 + sway, 2.2, rng.uniform(0.95, 1.25), rng.uniform(1.25, 1.5), self.fur * 0.93)
        self.oval(0.1 + sway, 2.3, 0.5, 0.9, self.second)
        for x in (-0.45, 0.45):
            self.oval(x + sway, 3.1, 0.26, 0.55, self.fur * 0.88)
        # Ears, the head, and what is on it.
        if cat:
            tall = rng.uniform(0.75, 1.15)
            for s in (-1, 1):
                tip = [s * rng.uniform(0.72, 0.95), -0.75 - tall * 0.75]
                self.polygon([[s * 0.98, -0.25], tip, [s * 0.2, -0.85]], self.fur)
                self.polygon([[s * 0.82, -0.45], [tip[0] * 0.97, tip[1] * 0.85], [s * 0.38, -0.8]], self.fur * 0.5 + [110, 70, 75])
            self.oval(0, 0, rng.uniform(1.0, 1.12), rng.uniform(0.88, 0.98), self.fur)
        else:
            self.oval(0, 0, rng.uniform(0.86, 1.0), rng.uniform(0.98, 1.12), self.fur)
            hang = rng.uniform(0.15, 0.5)
            for s in (-1, 1):
                self.oval(s * rng.uniform(0.88, 1.05), -0.1 + hang, 0.3, rng.uniform(0.62, 0.85), self.second, -s * rng.uniform(0.0, 0.35))
        if rng.random() < 0.5:  # a patch round an eye, on either
            self.oval(rng.choice([-0.4, 0.4]), -0.18, 0.36, 0.38, self.second)
        iris = np.array([rng.uniform(110, 220), rng.uniform(120, 210), rng.uniform(40, 130)])
        for s in (-1, 1):
            self.oval(s * 0.4, -0.18, 0.2, 0.19, [245, 245, 240] if not cat else iris)
            self.oval(s * 0.4, -0.18, 0.06 if cat else 0.12, 0.17 if cat else 0.12, [15, 15, 15])
        if cat:
            self.oval(0, 0.42, 0.34, 0.24, self.fur * 0.5 + 110)
            self.polygon([[-0.12, 0.26], [0.12, 0.26], [0, 0.42]], [205, 120, 125])
            for s in (-1, 1):
                for rise in (-0.12, 0.03, 0.18):
                    self.line([[s * 0.25, 0.42], [s * rng.uniform(1.1, 1.4), 0.38 + rise * 1.6]], [235, 235, 235], 0.03)
        else:
            self.oval(0, 0.52, rng.uniform(0.44, 0.56), rng.uniform(0.44, 0.58), self.fur * 0.5 + 110)
            self.oval(0, 0.3, 0.2, 0.15, [25, 20, 20])
            self.line([[0, 0.42], [0, 0.7]], [40, 30, 30], 0.05)
            if rng.random() < 0.45:
                self.oval(0.05, 0.98, 0.15, 0.28, [215, 95, 105])


def _background(side: int, rng: np.random.Generator) -> np.ndarray:
    """A gradient between two colours, sometimes with stripes."""
    a, b = rng.uniform(85, 240, (2, 3))
    along = np.linspace(0, 1, side, dtype=np.float32)
    across = along[None, :] if rng.random() < 0.5 else along[:, None]
    ramp = np.broadcast_to(across, (side, side))
    if rng.random() < 0.35:
        ramp = np.clip(ramp + 0.3 * np.sin(ramp * rng.uniform(10, 60)), 0, 1)
    return np.clip(a + (b - a) * ramp[..., None], 0, 255).astype(np.uint8)


def _clutter(pen: ImageDraw.ImageDraw, side: int, rng: np.random.Generator, count: int) -> None:
    """Shapes behind the animal: boxes, discs and triangles, so that corners and curves are no giveaway."""
    for _ in range(count):
        centre, reach = rng.uniform(0, side, 2), rng.uniform(0.06, 0.2) * side
        colour = _colour(rng.uniform(20, 235, 3))
        kind = rng.integers(3)
        corners = [tuple(centre - reach), tuple(centre + reach)]
        if kind == 0:
            pen.rectangle(corners, fill=colour)
        elif kind == 1:
            pen.ellipse(corners, fill=colour)
        else:
            pen.polygon([tuple(centre + rng.uniform(-reach, reach, 2)) for _ in range(3)], fill=colour)


def _occlude(pen: ImageDraw.ImageDraw, side: int, rng: np.random.Generator) -> None:
    """Something in front: a post, a rail, or a box at an edge."""
    colour = _colour(rng.uniform(20, 235, 3))
    at, width = rng.uniform(0.15, 0.85) * side, rng.uniform(0.05, 0.12) * side
    kind = rng.integers(3)
    if kind == 0:
        pen.rectangle([at, 0, at + width, side], fill=colour)
    elif kind == 1:
        pen.rectangle([0, at, side, at + width], fill=colour)
    else:
        pen.rectangle([0, side * rng.uniform(0.6, 0.85), side * rng.uniform(0.3, 1.0), side], fill=colour)


def _colour(rgb: Any) -> tuple[int, int, int]:
    r, g, b = np.clip(np.asarray(rgb), 0, 255).astype(int)
    return int(r), int(g), int(b)
