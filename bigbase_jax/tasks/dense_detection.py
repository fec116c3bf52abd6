"""Detection by what a model says at each place of a picture (FCOS).

Axes: B examples, N places, M objects, C classes, K detections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from bigbase_jax.core import Batch, UserError
from bigbase_jax.models import boxes as B
from bigbase_jax.models.fcos import Dense
from bigbase_jax.tasks.detection import Detection, Terms

_ALPHA, _GAMMA = 0.25, 2.0  # of the focal loss (Lin et al. 2017b, section 5.1)


@dataclasses.dataclass(frozen=True)
class DenseDetection(Detection):
    """FCOS, with centre sampling and GIoU as in its authors' later version (Tian et al. 2020).

    A place is learnt as that of an object if it is within ``radius`` strides of the middle of its box, in the box, and
    the farthest side of the box is as far as its map is for: up to 8 strides, but more than 4, save for the finest map,
    which takes all that is smaller, and the coarsest, which takes all that is larger. Of several such objects it is
    the smallest's. The terms of the loss are ``class`` (focal, by the number of such places), ``box`` (GIoU, weighted
    by how near the middle is) and ``centre`` (cross-entropy).

    Attributes:
      radius: in strides.
      candidates: of each picture's pairs of place and class, how many of the best go to the suppression.
      overlap: the IoU with a better box of its class that a detection may have.
      least: the score that a detection has at least.

    Raises:
      UserError: fewer candidates than detections, or a value out of its range.
    """

    radius: float = 1.5
    candidates: int = 400
    overlap: float = 0.6
    least: float = 0.02

    scale: ClassVar[Mapping[str, float]] = {"box": 2.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < self.keep:
            raise UserError(f"candidates is {self.candidates}, fewer than keep={self.keep}; raise it.")
        if not (0 < self.overlap <= 1 and 0 <= self.least < 1 and self.radius > 0):
            raise UserError(
                f"overlap is {self.overlap}, least {self.least} and radius {self.radius}; they lie in (0, 1], in"
                " [0, 1), and above 0."
            )

    def targets(self, outputs: Dense, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """i32[B,N]: which of the M objects each place is of, and -1 for none; f32[B,N]: 0 where it is not to be
        learnt, since it lies in a crowd."""
        boxes_BM4 = jnp.asarray(batch["boxes"])[:, None]  # [B,1,M,4]
        place_N2 = outputs.places[:, None]  # [N,1,2]
        stride_N = outputs.strides
        sides = jnp.concatenate([place_N2 - boxes_BM4[..., :2], boxes_BM4[..., 2:] - place_N2], -1)  # [B,N,M,4]
        inside = jnp.min(sides, -1) > 0
        middle = (boxes_BM4[..., :2] + boxes_BM4[..., 2:]) / 2
        near = jnp.max(jnp.abs(place_N2 - middle), -1) < self.radius * stride_N[:, None]
        low_N = jnp.where(stride_N == stride_N.min(), 0.0, 4 * stride_N)
        high_N = jnp.where(stride_N == stride_N.max(), jnp.inf, 8 * stride_N)
        far = jnp.max(sides, -1)
        fits = (far > low_N[:, None]) & (far <= high_N[:, None])
        real_BM = jnp.asarray(batch["box_mask"]) > 0
        crowd_BM = real_BM & (jnp.asarray(batch["crowd"]) > 0)
        taken = inside & near & fits & (real_BM & ~crowd_BM)[:, None]
        area = jnp.where(taken, B.area(boxes_BM4), jnp.inf)
        object_BN = jnp.where(jnp.any(taken, -1), jnp.argmin(area, -1), -1)
        learnt_BN = (object_BN >= 0) | ~jnp.any(inside & crowd_BM[:, None], -1)
        return object_BN, learnt_BN.astype(jnp.float32)

    def terms(self, outputs: Dense, batch: Batch) -> Terms:
        object_BN, learnt_BN = self.targets(outputs, batch)
        at_BN = jnp.maximum(object_BN, 0)
        is_BN = (object_BN >= 0).astype(jnp.float32)
        count_B = jnp.maximum(jnp.sum(is_BN, -1), 1.0)
        boxes_BN4 = jnp.take_along_axis(jnp.asarray(batch["boxes"]), at_BN[..., None], 1)
        class_BN = jnp.take_along_axis(jnp.asarray(batch["classes"]), at_BN, 1)

        y_BNC = jax.nn.one_hot(class_BN, outputs.logits.shape[-1]) * is_BN[..., None]
        focal_B = jnp.sum(focal(outputs.logits, y_BNC) * learnt_BN[..., None], (1, 2))

        near_BN = is_BN * centreness(outputs.places, boxes_BN4)
        box_B = jnp.sum(near_BN * (1 - B.generalized_iou(outputs.boxes, boxes_BN4)), -1)
        z_BN = outputs.centre
        entropy_BN = jnp.maximum(z_BN, 0) - z_BN * near_BN + jnp.log1p(jnp.exp(-jnp.abs(z_BN)))
        centre_B = jnp.sum(is_BN * entropy_BN, -1)
        near_B = jnp.maximum(jnp.sum(near_BN, -1), 1e-3)
        return {"class": (focal_B, count_B), "box": (box_B, near_B), "centre": (centre_B, count_B)}

    def detections(self, outputs: Dense, size: tuple[int, int]) -> B.Detections:
        """A score is the geometric mean of the probabilities of the class and of the centre."""
        scores_BNC = jnp.sqrt(jax.nn.sigmoid(outputs.logits) * jax.nn.sigmoid(outputs.centre)[..., None])
        boxes_BN4 = B.clip(outputs.boxes, *size)
        best = jax.vmap(lambda boxes, scores: B.top_k(boxes, scores, self.candidates, self.least))
        return B.nms(best(boxes_BN4, scores_BNC), self.keep, self.overlap)


def focal(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The focal loss of each logit against 0 or 1 (Lin et al. 2017b, equation 5)."""
    p = jax.nn.sigmoid(logits)
    entropy = jnp.maximum(logits, 0) - logits * y + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    wrong = p * (1 - y) + (1 - p) * y
    return (_ALPHA * y + (1 - _ALPHA) * (1 - y)) * wrong**_GAMMA * entropy


def centreness(places_N2: jax.Array, boxes_BN4: jax.Array) -> jax.Array:
    """f32[B,N]: 1 in the middle of a place's box, 0 at its border and beyond (Tian et al. 2019, equation 3)."""
    before, after = places_N2 - boxes_BN4[..., :2], boxes_BN4[..., 2:] - places_N2
    less, more = jnp.minimum(before, after), jnp.maximum(before, after)
    ratio = jnp.prod(jnp.maximum(less, 0) / jnp.maximum(more, 1e-6), -1)
    return jnp.sqrt(ratio)
