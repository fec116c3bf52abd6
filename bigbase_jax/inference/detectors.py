"""Published detectors as they stand: pictures in the size that their folder asks for, boxes in pixels of the original.

Legend: H height, W width, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from PIL import Image

from bigbase_jax.core import Example, UserError, Variables
from bigbase_jax.data.sources.image.detection import DetectionCodec
from bigbase_jax.inference.predictor import Predictor, Reading
from bigbase_jax.inference.published import preprocessing
from bigbase_jax.models.rt_detr import RTDETR
from bigbase_jax.models.yolos import YOLOS
from bigbase_jax.tasks.set_prediction import SetPrediction

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, where a folder does not say
_ROWS = 4  # pictures at once: they are large


@dataclasses.dataclass(frozen=True)
class PublishedSetPrediction(SetPrediction):
    """Of pictures that fill the upper left part of a canvas; ``valid`` i32[B,2] is its height and width."""

    inputs: ClassVar[tuple[str, ...]] = ("image", "valid")


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A picture as transformers' image processors of detectors resize it, in the corner of a canvas of one size.

    Beside what ``transforms.boxes.Letterbox`` adds: ``valid`` i32[2], height and width on the canvas, and ``rows``, the
    first of them.

    Attributes:
      size: height and width of the canvas.
      short, long: the picture's short side becomes ``short``, or less where its long one would be longer than
        ``long``; None: it is stretched to the canvas.
      multiple: both sides are cut to a multiple of this.
      resample: the number of Pillow's filter.
    """

    size: tuple[int, int]
    short: int | None = None
    long: int | None = None
    multiple: int = 1
    resample: int = 2
    random: ClassVar[bool] = False

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that a picture gets (``get_size_with_aspect_ratio`` of transformers)."""
        if self.short is None or self.long is None:
            return self.size
        least, most = sorted((height, width))
        short = float(self.short)
        if most / least * short > self.long:
            short = self.long * least / most
        few = round(short)
        many = most if few == least else int(short * most / least)
        few, many = (max(n - n % self.multiple, self.multiple) for n in (few, many))
        return (few, many) if height <= width else (many, few)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        x_HWC = example["image"]
        height, width = x_HWC.shape[:2]
        h, w = self.fitted(height, width)
        small = Image.fromarray(x_HWC).resize((w, h), Image.Resampling(self.resample))
        canvas = np.zeros((*self.size, 3), np.uint8)
        canvas[:h, :w] = np.asarray(small)
        return {
            **example,
            "image": canvas,
            "valid": np.array([h, w], np.int32),
            "rows": np.int32(h),
            "size": np.array([height, width], np.int32),
            "scale": np.array([w / width, h / height], np.float32),
            "offset": np.zeros(2, np.float32),
        }


@dataclasses.dataclass(frozen=True)
class CanvasCodec(DetectionCodec):
    """A user's picture for a ``Canvas``, whose lower rows may be cut off where no picture of a batch reaches them.

    Attributes:
      least: rows that stay.
    """

    least: int = 1

    padded: ClassVar[Sequence[str]] = ("image",)
    length: ClassVar[str] = "rows"


def of_detector(path: str, model: Any, variables: Variables, names: tuple[str, ...]) -> Predictor:
    """The predictor of a published detector; ``names``: of the classes.

    Raises:
      UserError: the folder does not say how pictures are prepared, or in a way that is not known.
    """
    stretched = isinstance(model, RTDETR)
    said, mean, std = preprocessing(path, _MEAN, _STD, not stretched)
    canvas = _canvas(path, said, model)
    names = names if len(names) == model.num_classes else ()
    task: Any = PublishedSetPrediction(model, model.num_classes, names or None, mean, std, keep=model.queries)
    spec = {
        "image": jax.ShapeDtypeStruct((*canvas.size, 3), np.uint8),
        "valid": jax.ShapeDtypeStruct((2,), np.int32),
    }
    known: dict[str, Any] = {"num_classes": model.num_classes, **({"class_names": names} if names else {})}
    least = canvas.size[0] if canvas.short is None else canvas.short - canvas.short % -canvas.multiple
    reading = Reading(CanvasCodec(least=least), (canvas,))
    return Predictor(task, variables, known, spec, lambda: reading, rows=_ROWS)


def _canvas(path: str, said: Mapping[str, Any], model: Any) -> Canvas:
    multiple = model.patch if isinstance(model, YOLOS) else 1
    size, resample = said.get("size"), said.get("resample", 2)
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": said.get("max_size", 1333)}
    elif size is None:
        size = (
            {"height": 640, "width": 640} if isinstance(model, RTDETR) else {"shortest_edge": 800, "longest_edge": 1333}
        )
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        height, width = size["height"], size["width"]
        return Canvas((height, width), resample=resample)
    if not isinstance(size, dict) or not {"shortest_edge", "longest_edge"} <= size.keys():
        raise UserError(f"{path}: its preprocessor_config.json has size={size}; known here are sides and edges.")
    if isinstance(model, RTDETR):
        raise UserError(f"{path}: its preprocessor_config.json has size={size}; an RT-DETR reads one height and width.")
    short, long = size["shortest_edge"], size["longest_edge"]
    side = long - long % -multiple
    return Canvas((side, side), min(short, long), long, multiple, resample)
