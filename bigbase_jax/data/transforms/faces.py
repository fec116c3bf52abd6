"""Alignment of faces by five points: the eyes, the tip of the nose and the corners of the mouth.

Legend: M points, (x, y) in pixels as ``transforms.image`` says: the centre of the first pixel is at (0.5, 0.5).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from bigbase_jax.core import Example, UserError
from bigbase_jax.data.transforms.image import ImageTransform, Motion

ARCFACE = (
    (38.7946, 52.1963),
    (74.0318, 52.0014),
    (56.5252, 72.2366),
    (42.0493, 92.8655),
    (71.2299, 92.7041),
)
"""Where ArcFace's networks expect them in 112x112: left eye, right eye, nose, left and right corner of the mouth, as
seen in the picture (InsightFace's template, whose first pixel has its centre at (0, 0))."""


def similarity(source_M2: np.ndarray, target_M2: np.ndarray) -> np.ndarray:
    """f64[2,3]: rotation, scale and translation that bring points nearest to others, in least squares (Umeyama 1991).

    Raises:
      UserError: fewer than two points, points in one place, or some that are no numbers.
    """
    source_M2, target_M2 = np.asarray(source_M2, np.float64), np.asarray(target_M2, np.float64)
    if source_M2.shape != target_M2.shape or source_M2.ndim != 2 or source_M2.shape[1] != 2 or len(source_M2) < 2:
        raise UserError(f"a similarity takes two points or more, and as many of both: not {source_M2.shape}.")
    from_2, to_2 = source_M2.mean(0), target_M2.mean(0)
    x_M2, y_M2 = source_M2 - from_2, target_M2 - to_2
    variance = (x_M2**2).sum()
    if not np.isfinite(source_M2).all() or variance < 1e-9:
        raise UserError("the points of a face are in one place, or are no numbers: it cannot be aligned.")
    u, stretch_2, vt = np.linalg.svd(y_M2.T @ x_M2)
    sign_2 = np.array([1.0, np.sign(np.linalg.det(u @ vt)) or 1.0])  # no mirror image (equation 43)
    rotation = (u * sign_2) @ vt * ((stretch_2 * sign_2).sum() / variance)
    return np.concatenate([rotation, (to_2 - rotation @ from_2)[:, None]], 1)


@dataclasses.dataclass(frozen=True)
class AlignFace(ImageTransform):
    """Cuts a face out so that its first five ``points`` lie where ``ARCFACE`` has them; what is beyond the picture is
    black. Boxes and points move along.

    Attributes:
      size: height and width of the result.
    """

    size: int = 112

    def __post_init__(self) -> None:
        if self.size < 8:
            raise UserError(f"AlignFace's size is {self.size}; a face has 8 pixels or more.")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises UserError where a picture has no five points."""
        points = np.asarray(example.get("points", ()), np.float64)
        if points.ndim != 2 or len(points) < 5 or not np.all(example.get("point_valid", True)):
            raise UserError("AlignFace needs five points on the picture: eyes, nose and corners of the mouth.")
        motion = aligning(points[:5], self.size)
        return {**example, "image": warped(example["image"], motion), **motion.on(example)}


def aligning(points_52: np.ndarray, size: int = 112) -> Motion:
    """How the picture moves; see ``AlignFace``."""
    forward = similarity(points_52, np.array(ARCFACE) * (size / 112))
    back = np.linalg.inv(np.concatenate([forward, [[0.0, 0.0, 1.0]]]))
    (a, b, c), (d, e, f), _ = back.tolist()
    return Motion(((a, b, c), (d, e, f)), (size, size))


def warped(x_HWC: np.ndarray, motion: Motion) -> np.ndarray:
    """The pixels, between four of the picture each (bilinear)."""
    image = Image.fromarray(x_HWC[..., 0] if x_HWC.shape[-1] == 1 else x_HWC)
    matrix = (*motion.matrix[0], *motion.matrix[1])
    out = image.transform(motion.size[::-1], Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(out).reshape(*motion.size, x_HWC.shape[-1])
