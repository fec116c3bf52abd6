"""Faces in photos by MTCNN's cascade, and photos of one person made upright, as recognisers want them.

The numbers are facenet-pytorch's: its boxes, its rounding, and its scaling by averages of areas.

Legend: H height, W width, M faces; boxes are x0, y0, x1, y1 in pixels, points x, y (eyes, nose, corners of the mouth).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from bigbase_jax.core import Codec, Example, UserError, Variables
from bigbase_jax.data.transforms.faces import aligning, warped
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.models.mtcnn import MTCNN, SIDES
from bigbase_jax.pretrained import load

_FACTOR = 0.709  # between the scales of the pyramid: half the area
_AT_ONCE = 512  # cut-outs that a network looks at together


class Found(NamedTuple):
    """Faces, the largest first: boxes f32[M,4], scores f32[M] and points f32[M,5,2]."""

    boxes: np.ndarray
    scores: np.ndarray
    points: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class FaceDetector:
    """Where faces are.

    Attributes:
      model, variables: of a published folder.
      least: pixels of the smallest face's side.
      thresholds: of the three networks' scores.
    """

    model: MTCNN
    variables: Variables
    least: int = 20
    thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7)

    @classmethod
    def open(cls, folder: str | os.PathLike, **words: Any) -> FaceDetector:
        """Of a folder of published weights.

        Raises:
          UserError: there are none, or they are no MTCNN's.
        """
        model, variables = load(folder)
        if not isinstance(model, MTCNN):
            raise UserError(f"{os.fspath(folder)} holds a {type(model).__name__}; faces are found by an MTCNN.")
        return cls(model, variables, **words)

    def __call__(self, x_HWC: np.ndarray) -> Found:
        """The faces of a picture, uint8 [H, W, 3]. Each size of a picture is compiled once."""
        picture = x_HWC.astype(np.float32)
        box_M4 = _square(self._proposed(picture))
        if len(box_M4):
            score_M, off_M4 = self._looked(picture, box_M4, "rnet")
            keep = score_M > self.thresholds[1]
            box_M4, score_M, off_M4 = box_M4[keep], score_M[keep], off_M4[keep]
            keep = suppressed(box_M4, score_M, 0.7)
            box_M4 = _square(_moved(box_M4[keep], off_M4[keep]))
        if not len(box_M4):
            return Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros((0, 5, 2), np.float32))
        score_M, off_M4, point_M10 = self._looked(picture, box_M4, "onet")
        keep = score_M > self.thresholds[2]
        box_M4, score_M, off_M4, point_M10 = box_M4[keep], score_M[keep], off_M4[keep], point_M10[keep]
        side_M2 = box_M4[:, 2:] - box_M4[:, :2] + 1
        point_M52 = side_M2[:, None] * point_M10.reshape(-1, 2, 5).swapaxes(1, 2) + box_M4[:, None, :2] - 1
        box_M4 = _moved(box_M4, off_M4)
        keep = suppressed(box_M4, score_M, 0.7, of_least=True)
        area_M = (box_M4[keep, 2] - box_M4[keep, 0]) * (box_M4[keep, 3] - box_M4[keep, 1])
        order = keep[np.argsort(-area_M, kind="stable")]
        return Found(box_M4[order], score_M[order], point_M52[order])

    def aligned(self, x_HWC: np.ndarray, size: int = 112, alone: bool = True) -> np.ndarray:
        """The face of a photo, upright, uint8 [size, size, 3]; of several, the largest.

        Args:
          alone: whether a photo of several people is refused, as where one of them is enrolled.

        Raises:
          UserError: there is no face, or more than one.
        """
        found = self(x_HWC)
        if not len(found.boxes):
            raise UserError("no face is found in it; take a photo with one that looks at the camera.")
        if alone and len(found.boxes) > 1:
            raise UserError(f"it shows {len(found.boxes)} faces; cut it to that of one person.")
        return warped(x_HWC, aligning(found.points[0] + 0.5, size))

    @functools.cached_property
    def _run(self) -> Callable[..., Any]:
        def run(variables: Variables, x_BHWC: jax.Array, kind: str) -> Any:
            return self.model.apply(variables, (x_BHWC - 127.5) * 0.0078125, method=kind)

        return jax.jit(run, static_argnames="kind")

    def _proposed(self, picture: np.ndarray) -> np.ndarray:
        """f32[M,4]: what the first network proposes over all scales."""
        height, width = picture.shape[:2]
        scale, boxes, scores = 12.0 / self.least, [], []
        while min(height, width) * scale >= 12:
            small = areas(picture, (int(height * scale + 1), int(width * scale + 1)))
            probability, off = (np.asarray(x)[0] for x in self._run(self.variables, small[None], kind="pnet"))
            at = np.argwhere(probability[..., 0] >= self.thresholds[0])
            score_M, off_M4 = probability[at[:, 0], at[:, 1], 0], off[at[:, 0], at[:, 1]]
            corner_M2 = 2 * at[:, ::-1].astype(np.float32)
            box_M4 = np.floor(np.concatenate([corner_M2 + 1, corner_M2 + 12], 1) / np.float32(scale))
            keep = suppressed(box_M4, score_M, 0.5)
            boxes.append(np.concatenate([box_M4, off_M4], 1)[keep])
            scores.append(score_M[keep])
            scale *= _FACTOR
        if not boxes:
            return np.zeros((0, 4), np.float32)
        box_M8 = np.concatenate(boxes)
        box_M8 = box_M8[suppressed(box_M8[:, :4], np.concatenate(scores), 0.7)]
        side_M2 = box_M8[:, 2:4] - box_M8[:, :2]
        return box_M8[:, :4] + box_M8[:, 4:] * np.concatenate([side_M2, side_M2], 1)

    def _looked(self, picture: np.ndarray, box_M4: np.ndarray, kind: str) -> list[np.ndarray]:
        """What a network says of the parts of a picture in boxes, [M,..] each; the first are scores."""
        height, width = picture.shape[:2]
        x0, y0, x1, y1 = np.trunc(box_M4).astype(int).T
        x0, y0, x1, y1 = np.maximum(x0, 1), np.maximum(y0, 1), np.minimum(x1, width), np.minimum(y1, height)
        side, parts = SIDES[kind], []
        for a, b, c, d in zip(x0, y0, x1, y1, strict=True):
            inside = d > b - 1 and c > a - 1
            part = picture[b - 1 : d, a - 1 : c]
            parts.append(areas(part, (side, side)) if inside else np.zeros((side, side, 3), np.float32))
        found: list[list[np.ndarray]] = []
        for start in range(0, len(parts), _AT_ONCE):
            some = np.stack(parts[start : start + _AT_ONCE])
            rows = 1 << (len(some) - 1).bit_length()  # few sizes are compiled
            padded = np.concatenate([some, np.zeros((rows - len(some), *some.shape[1:]), np.float32)])
            found.append([np.asarray(x)[: len(some)] for x in self._run(self.variables, padded, kind=kind)])
        score_M1, *others = (np.concatenate(x) for x in zip(*found, strict=True))
        inside_M = (x1 > x0 - 1) & (y1 > y0 - 1)
        return [np.where(inside_M, score_M1[:, 0], 0), *others]


@dataclasses.dataclass(frozen=True)
class _Aligned(Codec):
    """A codec of pictures, which are cut to the face of the one person on them."""

    codec: Any
    detector: FaceDetector
    fields: Any

    def decode(self, given: Any) -> list[Example]:
        return [{**x, "image": self.detector.aligned(x["image"])} for x in self.codec.decode(given)]

    def fit(self, example: Example, shapes: Any) -> Example:
        found: Example = self.codec.fit(example, shapes)
        return found


def aligned(predictor: Predictor, folder: str) -> Predictor:
    """A predictor of pictures, of which it sees the face that the MTCNN of a folder finds (``FaceDetector.aligned``).

    Raises:
      UserError: there is none.
    """
    reading = predictor.reading
    reading = dataclasses.replace(
        reading, codec=_Aligned(reading.codec, FaceDetector.open(folder), reading.codec.fields)
    )
    return dataclasses.replace(predictor, read=lambda: reading)


def areas(x_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture of another size whose pixels are averages of areas (torch's "area": whole pixels on both sides)."""
    rows, columns = (_averages(n, m) for n, m in zip(x_HWC.shape[:2], size, strict=True))
    return np.einsum("hH,HWC,wW->hwC", rows, x_HWC, columns, optimize=True).astype(np.float32)


@functools.lru_cache(256)
def _averages(n: int, m: int) -> np.ndarray:
    """f32[m,n]: which of n pixels each of m is the mean of."""
    at, of = np.arange(n), np.arange(m)[:, None]
    share = (at >= of * n // m) & (at < -(-(of + 1) * n // m))
    return (share / share.sum(1, keepdims=True)).astype(np.float32)


def suppressed(box_M4: np.ndarray, score_M: np.ndarray, most: float, of_least: bool = False) -> np.ndarray:
    """Which boxes stay of those that overlap, the best first: by IoU; or with ``of_least`` by the share of the smaller
    of both, their last pixels counted."""
    one = float(of_least)
    side_M2 = box_M4[:, 2:] - box_M4[:, :2] + one
    area_M, left = side_M2[:, 0] * side_M2[:, 1], np.argsort(-score_M, kind="stable")
    keep: list[int] = []
    while len(left):
        i, left = left[0], left[1:]
        keep.append(int(i))
        low, high = np.maximum(box_M4[i, :2], box_M4[left, :2]), np.minimum(box_M4[i, 2:], box_M4[left, 2:])
        inter = np.maximum(high - low + one, 0).prod(1)
        whole = np.minimum(area_M[i], area_M[left]) if of_least else area_M[i] + area_M[left] - inter
        left = left[inter <= most * whole]
    return np.array(keep, int)


def _moved(box_M4: np.ndarray, off_M4: np.ndarray) -> np.ndarray:
    side_M2 = box_M4[:, 2:] - box_M4[:, :2] + 1
    return box_M4 + off_M4 * np.concatenate([side_M2, side_M2], 1)


def _square(box_M4: np.ndarray) -> np.ndarray:
    """Boxes as wide as high, around the same middle."""
    side_M2 = box_M4[:, 2:] - box_M4[:, :2]
    most_M1 = side_M2.max(1, keepdims=True) if len(box_M4) else np.zeros((0, 1), np.float32)
    low_M2 = box_M4[:, :2] + side_M2 * 0.5 - most_M1 * 0.5
    return np.concatenate([low_M2, low_M2 + most_M1], 1).astype(np.float32)
