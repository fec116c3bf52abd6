"""What COCO measures of boxes, by pycocotools: average precision over IoU thresholds, by class and by size.

Arrays, as ``Detection.evaluate`` keeps them, all boxes xyxy in pixels of the original picture:

- found: ``boxes`` f32[N,K,4], ``scores`` f32[N,K] (0: padding), ``classes`` i32[N,K];
- true: ``true_boxes`` f32[N,M,4], ``true_classes`` i32[N,M] (-1: padding), ``true_crowd`` f32[N,M]: ignored, whether
  they are found or not, as crowds and difficult objects are.

Legend: N pictures, K detections and M objects of a picture, T thresholds, R recalls, C classes, A ranges of area.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbase_jax.core import UserError

NAMES = ("boxes", "scores", "classes", "true_boxes", "true_classes", "true_crowd")
_SIZES = ("small", "medium", "large")  # areas below 32^2, below 96^2, and the rest: of boxes, since there are no masks
_AT_50 = 0  # of the thresholds 0.5, 0.55, ..., 0.95
_AT_75 = 5


def evaluation(examples: Mapping[str, np.ndarray], num_classes: int) -> Any:
    """A ``pycocotools.cocoeval.COCOeval`` that has evaluated and accumulated.

    Its detection ``i + 1`` and its object ``i + 1`` are the i-th of those of ``where``.

    Raises:
      UserError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UserError("measuring boxes needs the package pycocotools: pip install 'bigbase_jax[vision]'.") from error
    number = len(examples["boxes"])
    real, found = where(examples)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": n} for n in range(number)],
        "categories": [{"id": c} for c in range(num_classes)],
        "annotations": [
            {
                "id": i + 1,  # 0 is taken for "no match"
                "image_id": int(n),
                "category_id": int(examples["true_classes"][n, m]),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": int(examples["true_crowd"][n, m] > 0),
            }
            for i, (n, m) in enumerate(real)
            for x0, y0, x1, y1 in [examples["true_boxes"][n, m].astype(float).tolist()]
        ],
    }
    n, k = found.T
    box = examples["boxes"][n, k].astype(np.float64)
    rows = np.concatenate([n[:, None], box[:, :2], box[:, 2:] - box[:, :2]], 1)
    rows = np.concatenate([rows, examples["scores"][n, k, None], examples["classes"][n, k, None]], 1)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        # without any detection, pycocotools needs one that counts for nothing
        result = COCOeval(truth, truth.loadRes(rows if len(rows) else np.zeros((1, 7))), "bbox")
        result.params.maxDets = [1, 10, max(100, examples["scores"].shape[1])]
        result.evaluate()
        result.accumulate()
    return result


def where(examples: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(picture, place) of all objects, and of all detections: i64[n, 2] each."""
    return np.argwhere(examples["true_classes"] >= 0), np.argwhere(examples["scores"] > 0)


def scores(examples: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, Any]:
    """``map`` (over IoU 0.5 to 0.95), ``map50``, ``map75``, by size (``map_small``, ...), ``recall`` (of at most 100
    detections, over the same thresholds), and ``per_class``: ``ap``, ``ap50``, ``recall`` and the number of ``objects``
    of each. What there are no objects of is left out."""
    result = evaluation(examples, len(names))
    precision_TRCA, recall_TCA = result.eval["precision"][..., -1], result.eval["recall"][..., -1]
    found = {
        "map": _mean(precision_TRCA[..., 0]),
        "map50": _mean(precision_TRCA[_AT_50, ..., 0]),
        "map75": _mean(precision_TRCA[_AT_75, ..., 0]),
        **{f"map_{size}": _mean(precision_TRCA[..., a + 1]) for a, size in enumerate(_SIZES)},
        "recall": _mean(recall_TCA[..., 0]),
    }
    real = (examples["true_classes"] >= 0) & (examples["true_crowd"] <= 0)
    count_C = np.bincount(examples["true_classes"][real], minlength=len(names))
    per_class = {
        name: {
            "ap": _mean(precision_TRCA[:, :, c, 0]),
            "ap50": _mean(precision_TRCA[_AT_50, :, c, 0]),
            "recall": _mean(recall_TCA[:, c, 0]),
            "objects": int(count_C[c]),
        }
        for c, name in enumerate(names)
        if count_C[c]
    }
    return {**{name: x for name, x in found.items() if x is not None}, "per_class": per_class}


def _mean(x: np.ndarray) -> float | None:
    """Over what there is; -1 stands for what there is not."""
    return float(x[x > -1].mean()) if (x > -1).any() else None


class Errors(NamedTuple):
    """What is wrong at an IoU of 0.5, by falling confidence.

    Attributes:
      false: (picture, detection) of those that are no object.
      missed: (picture, object, score): the score of the best detection of any class on an object that none of its class
        has found; 0 where there is none.
      curves: (recall, precision) of each class of which there are objects.
    """

    false: list[tuple[int, int]]
    missed: list[tuple[int, int, float]]
    curves: dict[int, tuple[np.ndarray, np.ndarray]]


def errors(examples: Mapping[str, np.ndarray], num_classes: int) -> Errors:
    """See ``Errors``; raises UserError as ``evaluation`` does."""
    result = evaluation(examples, num_classes)
    real, found = where(examples)
    right, hit = set[int](), set[int]()
    for part in result.evalImgs:
        if part is not None and part["aRng"] == result.params.areaRng[0]:
            fine = (part["dtMatches"][_AT_50] > 0) | part["dtIgnore"][_AT_50].astype(bool)
            right.update(np.asarray(part["dtIds"], int)[fine].tolist())
            fine = (part["gtMatches"][_AT_50] > 0) | np.asarray(part["gtIgnore"], bool)
            hit.update(np.asarray(part["gtIds"], int)[fine].tolist())
    false = [(int(n), int(k)) for i, (n, k) in enumerate(found) if i + 1 not in right]
    false.sort(key=lambda at: -examples["scores"][at])
    missed = [(int(n), int(m), _best(examples, n, m)) for i, (n, m) in enumerate(real) if i + 1 not in hit]
    missed.sort(key=lambda at: -at[2])
    curves = {}
    for c in range(num_classes):
        precision_R = result.eval["precision"][_AT_50, :, c, 0, -1]
        if (precision_R > -1).all():
            curves[c] = (np.asarray(result.params.recThrs), precision_R)
    return Errors(false, missed, curves)


def _best(examples: Mapping[str, np.ndarray], n: int, m: int) -> float:
    """The score of the best detection that overlaps an object by half."""
    a_4, b_K4 = examples["true_boxes"][n, m], examples["boxes"][n]
    side_K2 = np.clip(np.minimum(a_4[2:], b_K4[:, 2:]) - np.maximum(a_4[:2], b_K4[:, :2]), 0, None)
    shared_K = side_K2.prod(-1)
    union_K = (a_4[2:] - a_4[:2]).prod() + (b_K4[:, 2:] - b_K4[:, :2]).prod(-1) - shared_K
    return float(np.where(shared_K >= 0.5 * union_K, examples["scores"][n], 0).max(initial=0))
