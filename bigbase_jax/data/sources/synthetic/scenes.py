"""Scenes of shapes made by the program: a detection data set that needs no network and no disk.

Circles, squares, triangles and crosses of any colour lie on a plain ground among specks of noise, in front of each
other and over the border; each has a box around what is in the picture of it, as if nothing lay in front.

Legend: H = W picture size, N shapes of a scene.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from bigbase_jax.core import Example, UserError
from bigbase_jax.data.sources.image.detection import ReadsDetections
from bigbase_jax.data.sources.splits import Opened, numbered

_VERSION = 1  # of the scenes; part of the fingerprint
NAMES = ("circle", "square", "triangle", "cross")
_CORNERS: Mapping[str, tuple[tuple[float, float], ...]] = {  # around (0, 0), within 1
    "circle": tuple((math.cos(i * math.pi / 16), math.sin(i * math.pi / 16)) for i in range(32)),
    "square": ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "triangle": ((0.0, -1.0), (0.87, 0.5), (-0.87, 0.5)),
    "cross": tuple(
        (x * math.cos(t) - y * math.sin(t), x * math.sin(t) + y * math.cos(t))
        for t in (0.0, math.pi / 2, math.pi, -math.pi / 2)
        for x, y in ((0.3, -0.3), (1.0, -0.3), (1.0, 0.3))
    ),
}


class SyntheticScenes(ReadsDetections, Opened):
    """Seeded scenes of up to ``most`` shapes; some have none.

    Attributes:
      splits: ``image`` uint8 [size, size, 3], ``boxes`` f32 [N, 4] xyxy in pixels, ``classes`` i32 [N], ``crowd`` f32
        [N] (0).
      dataset_info: ``num_classes`` and ``class_names``.
      description: says that these are synthetic.
    """

    def __init__(
        self,
        size: int = 128,
        most: int = 6,
        num_train: int = 1000,
        num_val: int = 100,
        num_test: int = 200,
        seed: int = 0,
    ):
        """Draws nothing yet.

        Args:
          size: height and width in pixels.
          most: shapes of a scene.
          num_train, num_val, num_test: scenes of each split; 0: no such split.
          seed: of all that is drawn.

        Raises:
          UserError: a size below 32, no shapes, or nothing to train on.
        """
        if size < 32 or most < 1 or num_train < 1 or min(num_val, num_test) < 0:
            raise UserError(f"scenes need size at least 32 (not {size}), most and num_train at least 1.")
        self._size, self._most, self._seed = size, most, seed
        super().__init__(
            numbered({"train": num_train, "val": num_val, "test": num_test}, self._scene),
            {"num_classes": len(NAMES), "class_names": NAMES},
            f"{num_train + num_val + num_test:,} synthetic scenes of {', '.join(NAMES)} ({size}x{size} pixels), made "
            "by the program",
            [_VERSION, size, most, num_train, num_val, num_test, seed],
        )

    def _scene(self, number: int) -> Example:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed % 2**64, number])))
        size, fine = self._size, 2
        image = Image.new("RGB", (size * fine, size * fine), _colour(rng))
        pen = ImageDraw.Draw(image)
        boxes, classes = [], []
        for _ in range(int(rng.integers(self._most + 1))):
            kind = int(rng.integers(len(NAMES)))
            radius = size * math.exp(rng.uniform(math.log(0.05), math.log(0.25)))
            middle = rng.uniform(0, size, 2)
            turn = rng.uniform(-0.5, 0.5)
            cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
            corners = np.array(_CORNERS[NAMES[kind]]) @ np.array([[cos, sin], [-sin, cos]]) + middle
            pen.polygon((corners * fine).ravel().tolist(), fill=_colour(rng))
            box = np.concatenate([corners.min(0), corners.max(0)]).clip(0, size)
            if min(box[2:] - box[:2]) >= 0.02 * size:
                boxes.append(box)
                classes.append(kind)
        noise = rng.normal(0, rng.uniform(2, 12), (size, size, 3))
        picture = (np.asarray(image.reduce(fine)) + noise).clip(0, 255).astype(np.uint8)
        return {
            "image": picture,
            "boxes": np.asarray(boxes, np.float32).reshape(-1, 4),
            "classes": np.asarray(classes, np.int32),
            "crowd": np.zeros(len(boxes), np.float32),
        }


def _colour(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(30, 226, 3).tolist())
