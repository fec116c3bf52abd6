"""Faces drawn by the program itself: people of numbers, for trying out recognition without anybody's photo.

A person is what the bones and the colours are: the shape of the head, skin, hair, eyes, brows, nose, mouth, a mole or
glasses. A photo is all else: where the head is, how it is turned, what it looks like, the light, the scene, the noise.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from bigbase_jax.core import Example, UserError
from bigbase_jax.data.sources.image.image import ReadsPictures
from bigbase_jax.data.sources.splits import Opened, numbered
from bigbase_jax.data.sources.synthetic.pictures import Dice, Pen, photograph, scene

_VERSION = 1  # of the drawings; part of the fingerprint
_SKINS = ((246, 214, 190), (228, 184, 150), (196, 146, 108), (150, 104, 74), (104, 70, 52))
_HAIRS = ((34, 28, 26), (84, 56, 36), (140, 96, 52), (206, 170, 104), (150, 60, 36), (170, 168, 166))
_EYES = ((70, 46, 30), (60, 96, 140), (76, 116, 76), (110, 110, 116))
_PORTRAITS = 1 << 20  # photos of a person, whose random numbers follow those of the person


class DrawnFaces(ReadsPictures, Opened):
    """Seeded photos of people who do not exist; nobody is in two splits.

    Attributes:
      splits: ``image`` uint8 [size, size, 3] and ``label`` i32[] each.
      dataset_info: ``num_classes`` and ``class_names`` of the people of train.
      description: says that these are drawings.
    """

    def __init__(
        self,
        size: int = 48,
        people: int = 120,
        val_people: int = 20,
        test_people: int = 40,
        photos: int = 12,
        seed: int = 0,
    ):
        """Draws nothing yet.

        Args:
          size: height and width in pixels.
          people, val_people, test_people: of each split.
          photos: of each person.
          seed: of all of them.

        Raises:
          UserError: a size below 16, or nobody to tell apart.
        """
        if size < 16 or people < 2 or min(val_people, test_people) < 0 or photos < 1:
            raise UserError(
                f"size={size}, people={people}, photos={photos}: drawn faces have 16 pixels or more, and show two "
                "people or more."
            )
        counts = {"train": people, "val": val_people, "test": test_people}
        self._size, self._photos, self._seed = size, photos, seed
        of_photos = {split: count * photos for split, count in counts.items()}
        super().__init__(
            numbered(of_photos, self._example, lambda number_N: number_N // photos, self._named),
            {"num_classes": people, "class_names": tuple(f"person {i}" for i in range(people))},
            f"{sum(counts.values()) * photos:,} faces of {sum(counts.values()):,} people drawn by the program itself "
            "(not photos)",
            [(_VERSION, size, tuple(counts.items()), photos, seed)],
        )

    def _example(self, number: int) -> Example:
        label, photo = divmod(number, self._photos)
        first = label * _PORTRAITS
        image = portrait(self._size, Dice(self._seed, first), Dice(self._seed, first + 1 + photo))
        return {"image": image, "label": np.int32(label)}

    def _named(self, number: int) -> str:
        return f"person {number // self._photos}, photo {number % self._photos}"


def portrait(size: int, person: Dice, photo: Dice) -> np.ndarray:
    """A photo of somebody, uint8 [size, size, 3]."""
    canvas = Image.new("RGB", (3 * size, 3 * size))
    pen = Pen(ImageDraw.Draw(canvas), 3 * size)
    scene(pen, photo)
    skin, hair, iris = person.pick(_SKINS), person.pick(_HAIRS), person.pick(_EYES)
    wide, high, jaw = person.uniform(0.72, 1.0), person.uniform(0.95, 1.2), person.uniform(0.5, 0.95)
    fringe, length, bald = person.uniform(0.3, 0.75), person.uniform(0.2, 1.5), person.chance(0.12)
    apart, eye, slant = person.uniform(0.28, 0.46), person.uniform(0.09, 0.16), person.uniform(-0.3, 0.3)
    brow, thick = person.uniform(-0.42, -0.28), person.uniform(0.04, 0.14)
    nose, tip = person.uniform(0.15, 0.42), person.uniform(0.08, 0.2)
    mouth, lips = person.uniform(0.22, 0.44), person.uniform(0.05, 0.13)
    glasses, beard, mole = person.chance(0.25), person.chance(0.2), person.chance(0.3)
    mole_at = person.uniform(-0.5, 0.5), person.uniform(0.1, 0.6)

    unit, tilt = photo.uniform(0.33, 0.4), photo.uniform(-0.2, 0.2)
    at = photo.uniform(0.44, 0.56), photo.uniform(0.45, 0.55)
    yaw, open_, smile, look = (photo.uniform(-0.12, 0.12), photo.uniform(0.5, 1.1), photo.uniform(-0.12, 0.16),
                               photo.uniform(-0.05, 0.05))  # fmt: skip
    face = pen.frame(at, unit, tilt)
    dark = int(0.75 * skin[0]), int(0.75 * skin[1]), int(0.75 * skin[2])
    if not bald:
        face.oval(0, -0.1, wide * 1.16, high * 1.08, hair)
        face.polygon([(-wide * 1.12, -0.1), (wide * 1.12, -0.1), (wide * 1.2, length), (-wide * 1.2, length)], hair)
    face.polygon([(-0.4, 0.6), (0.4, 0.6), (0.5, 1.8), (-0.5, 1.8)], dark)
    face.oval(0, -0.15, wide, high * 0.88, skin)
    face.oval(yaw, high * 0.35, jaw * wide, high * 0.66, skin)
    if not bald:
        face.polygon([(-wide, -0.45), (0.2 + yaw, -high * fringe), (wide, -0.45), (0.6, -high), (-0.6, -high)], hair)
    if beard:
        face.oval(yaw, high * 0.62, jaw * wide * 0.9, high * 0.36, hair)
    for side in (-1, 1):
        x = side * apart + yaw
        face.oval(x, -0.12, eye * 1.35, eye * open_, (240, 238, 234), -side * slant)
        face.oval(x + look, -0.12, eye * 0.62, eye * 0.62 * min(open_, 1.0), iris)
        face.oval(x + look, -0.12, eye * 0.28, eye * 0.28, (18, 16, 16))
        face.stroke([(x - 0.18, brow + side * slant * 0.2), (x + 0.18, brow - side * slant * 0.2)], thick, hair)
        if glasses:
            circle = np.linspace(0, 2 * np.pi, 17)
            face.stroke(np.stack([x + 0.26 * np.cos(circle), -0.12 + 0.2 * np.sin(circle)], -1), 0.05, (30, 30, 34))
    face.stroke([(yaw * 1.3, -0.05), (yaw * 1.6, nose)], tip * 0.7, dark)
    face.oval(yaw * 1.7, nose, tip, tip * 0.6, dark)
    curve = np.linspace(-1, 1, 7)
    y = 0.62 + smile * (1 - curve**2)
    face.stroke(np.stack([yaw + mouth * curve, y], -1), lips, (176, 78, 80))
    if mole:
        face.oval(*mole_at, 0.05, 0.05, (60, 36, 30))
    return photograph(np.asarray(canvas.reduce(3)).astype(np.int32), photo)
