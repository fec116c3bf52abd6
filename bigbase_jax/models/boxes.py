"""Boxes on the device: conventions, overlaps, and the choice of the best ones, all of static sizes.

Inside the package a box is ``xyxy``: f32 (x0, y0, x1, y1) in pixels from the upper left corner of the picture, whose
first pixel has its centre at (0.5, 0.5); the others are converted where they come in (``convert``). All functions take
any leading axes, and broadcast: ``iou(a_N4[:, None], b_M4)`` is pairwise, f32[N,M].

Axes: N, M boxes; C classes; K detections of a picture.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
CONVENTIONS = ("xyxy", "xywh", "cxcywh")


def convert(boxes: Any, source: str, target: str = "xyxy") -> Any:
    """Boxes [..., 4] of one convention in another: corners, corner and size, or centre and size.

    NumPy arrays stay such, in their dtype.

    Raises:
      ValueError: there is no such convention.
    """
    for name in (source, target):
        if name not in CONVENTIONS:
            raise ValueError(f"there is no convention {name!r} of boxes; there are {', '.join(CONVENTIONS)}")
    xp: Any = np if isinstance(boxes, np.ndarray) else jnp
    a, b = boxes[..., :2], boxes[..., 2:]
    if source == "xywh":
        a, b = a, a + b
    elif source == "cxcywh":
        a, b = a - b / 2, a + b / 2
    if target == "xywh":
        a, b = a, b - a
    elif target == "cxcywh":
        a, b = (a + b) / 2, b - a
    return xp.concatenate([a, b], -1)


def area(boxes: Array) -> jax.Array:
    """f32[...] of xyxy [..., 4]: 0 where a box is empty or reversed."""
    side = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)
    return side[..., 0] * side[..., 1]


def clip(boxes: Array, height: Any, width: Any) -> jax.Array:
    """Boxes xyxy [..., 4] cut off at the border of a picture."""
    return jnp.clip(boxes, 0.0, jnp.stack([jnp.asarray(x, boxes.dtype) for x in (width, height, width, height)], -1))


def _overlap(a: Array, b: Array) -> tuple[jax.Array, jax.Array]:
    """The areas that two boxes share, and that they cover together."""
    low, high = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    shared = area(jnp.concatenate([low, high], -1))
    return shared, area(a) + area(b) - shared


def iou(a: Array, b: Array) -> jax.Array:
    """Intersection over union of xyxy [..., 4], f32[...] in 0..1; 0 where both are empty."""
    shared, union = _overlap(a, b)
    return shared / jnp.where(union > 0, union, 1.0)


def generalized_iou(a: Array, b: Array) -> jax.Array:
    """IoU less the share of the smallest box around both that neither covers, in -1..1 (Rezatofighi et al. 2019)."""
    shared, union = _overlap(a, b)
    low, high = jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])
    around = area(jnp.concatenate([low, high], -1))
    found = shared / jnp.where(union > 0, union, 1.0)
    return found - (around - union) / jnp.where(around > 0, around, 1.0)


class Detections(NamedTuple):
    """The best boxes of a picture, by falling score; what is not there has score 0, class 0 and a box of zeros.

    Attributes:
      boxes: f32[..., K, 4], xyxy in pixels of the model's input.
      scores: f32[..., K] in 0..1.
      classes: i32[..., K].
    """

    boxes: Array
    scores: Array
    classes: Array


def top_k(boxes_N4: Array, scores_NC: Array, k: int, least: float = 0.0) -> Detections:
    """The k best pairs of box and class, of those with a score above ``least``: a box may be there as several classes.

    Where there are fewer than k pairs, the rest is padding.
    """
    flat = scores_NC.reshape(-1)
    scores_K, at_K = jax.lax.top_k(flat, min(k, len(flat)))
    classes = jnp.full_like(at_K, scores_NC.shape[-1])
    row_K = jax.lax.div(at_K, classes)  # not ``//``: jax2onnx converts no remainder at a free batch
    class_K = at_K - row_K * classes
    found = _kept(Detections(jnp.asarray(boxes_N4)[row_K], scores_K, class_K.astype(jnp.int32)), scores_K > least)
    missing = max(k - len(flat), 0)
    return jax.tree.map(lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), found)


def nms(found: Detections, k: int, most: float) -> Detections:
    """Greedy non-maximum suppression within each class: the k best, none of which overlaps a better one too much.

    Args:
      found: by falling score (``top_k``), with any leading axes.
      k: how many stay.
      most: the IoU with a better box that is still let through.
    """
    found = Detections(*map(jnp.asarray, found))
    scores, order = jax.lax.top_k(unsuppressed(found, most), k)  # stable
    kept = scores > 0
    boxes = jnp.where(kept[..., None], jnp.take_along_axis(found.boxes, order[..., None], -2), 0)
    return Detections(boxes, scores, jnp.where(kept, jnp.take_along_axis(found.classes, order, -1), 0))


def unsuppressed(found: Detections, most: float) -> jax.Array:
    """f32[..., K]: the scores of what ``nms`` lets through, and 0 for the others."""
    rank = jnp.arange(found.scores.shape[-1])
    overlap = iou(found.boxes[..., :, None, :], found.boxes[..., None, :, :]) > most
    hides = overlap & (rank[:, None] > rank) & (found.classes[..., :, None] == found.classes[..., None, :])

    # Who is hidden depends on who of the better ones is kept: the rule is applied until nothing changes. After n
    # rounds the n best are as the greedy loop leaves them, so it ends with the same, after as many rounds as the
    # longest chain of boxes that hide each other.
    def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kept, _ = state
        now = ~jnp.any(hides & kept[..., None, :], -1)
        return now, jnp.any(now != kept)

    start = jnp.ones(found.scores.shape, bool), jnp.array(True)
    kept, _ = jax.lax.while_loop(lambda state: state[1], again, start)
    return jnp.where(kept, found.scores, 0)


def _kept(found: Detections, kept_K: jax.Array) -> Detections:
    """What is not kept becomes padding, where it is."""
    return Detections(*(jnp.where(kept_K.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for x in found))
