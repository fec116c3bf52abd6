"""Two shapes and where they are, in pictures and in words: captions that are made up here, without any file.

Examples and facts are those of ``sources.image.captions``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from bigbase_jax.core import UserError
from bigbase_jax.data.sources.image.captions import Captioned, Captions
from bigbase_jax.text.tokenizer import Subwords

WORDS = Subwords("words", 256)
_COLOURS = {
    "red": (206, 48, 44),
    "green": (44, 150, 62),
    "blue": (46, 84, 196),
    "yellow": (232, 198, 44),
    "purple": (132, 58, 156),
    "white": (244, 244, 240),
}
_SHAPES = ("circle", "square", "triangle")
_SIDES = {"left of": "right of", "above": "below"}
_KINDS = list(itertools.product(itertools.product(_COLOURS, _SHAPES), repeat=2))
_FORMS = (
    "a {a} {side} a {b}",
    "there is a {a} {side} a {b}",
    "the {b} is {other} the {a}",
    "a {a} and a {b}",
    "a picture of a {b} and a {a}",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionedShapes(Captions):
    """Pictures of two coloured shapes, drawn by the program, each with five captions; ``prepare`` makes them.

    Attributes:
      count: of pictures, over all splits.
      size: H = W.

    Raises:
      UserError: a value out of its range.
    """

    tokenizer: Any = WORDS
    length: int = 16
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    count: int = 3000
    size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("count", 20), ("size", 16)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}.")

    def file_signature(self) -> list[Any]:
        return ["shapes", 1, self.count, self.size, self.seed]

    def origin(self) -> str:
        return f"two shapes each, drawn and described by the program itself (seed {self.seed})"

    def pictures(self) -> Iterator[Captioned]:
        for i in range(self.count):
            a, b, side, _ = self._scene(i)
            words = {"a": " ".join(a), "b": " ".join(b), "side": side, "other": _SIDES[side]}
            yield Captioned(f"picture {i}", [form.format(**words) for form in _FORMS])

    def image(self, name: str, data: bytes) -> np.ndarray:
        a, b, side, random = self._scene(int(name.split()[1]))
        scale = 3
        full = self.size * scale
        canvas = Image.new("RGB", (full, full), tuple(random.integers(70, 130, 3).tolist()))
        pen = ImageDraw.Draw(canvas)
        for (colour, shape), along in ((a, 0.27), (b, 0.73)):
            across, radius = random.uniform(0.3, 0.7), random.uniform(0.14, 0.21)
            x, y = (along, across) if side == "left of" else (across, along)
            x0, y0, x1, y1 = (round(v * full) for v in (x - radius, y - radius, x + radius, y + radius))
            if shape == "circle":
                pen.ellipse((x0, y0, x1, y1), fill=_COLOURS[colour])
            elif shape == "square":
                pen.rectangle((x0, y0, x1, y1), fill=_COLOURS[colour])
            else:
                pen.polygon((x0, y1, x1, y1, (x0 + x1) // 2, y0), fill=_COLOURS[colour])
        return np.asarray(canvas.reduce(scale))

    def _scene(self, i: int) -> tuple[tuple[str, str], tuple[str, str], str, np.random.Generator]:
        """What is where; and what draws the rest."""
        random = np.random.default_rng([self.seed, i])
        a, b = _KINDS[int(random.integers(len(_KINDS)))]
        return a, b, ("left of", "above")[int(random.integers(2))], random
