"""Object detection: what all detectors share. A subclass says what it learns, and which boxes its model means.

A batch holds ``image`` uint8[B,H,W,3] (or normalised floats) and, with labels: ``boxes`` f32[B,M,4] xyxy in pixels of
that picture, ``classes`` i32[B,M], ``box_mask`` f32[B,M] (1 real, 0 padding), ``crowd`` f32[B,M] (1: a region that is
neither learnt as an object nor as background, and not measured); and of the letterbox ``scale`` and ``offset`` f32[B,2]
(x, y), by which ``x * scale + offset`` is where x of the original picture is, whose ``size`` is i32[B,2] (h, w).

Axes: B examples of a batch, N of a split, M objects, K detections of a picture, H height, W width, C classes.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from bigbase_jax.core import (
    Batch,
    Card,
    Evaluated,
    Example,
    Figure,
    Gallery,
    Loss,
    Meter,
    Metric,
    Plot,
    Rendered,
    Sum,
    UserError,
    Variables,
)
from bigbase_jax.evaluate import CollectAll
from bigbase_jax.models.boxes import Detections
from bigbase_jax.tasks import figures
from bigbase_jax.tasks.classification import agreed, applied_in_training, normalised
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.tasks.metrics import boxes as measures

Terms = Mapping[str, tuple[jax.Array, jax.Array]]
"""The terms of a loss by name: total and weight of each example, f32[B]; weights are above 0."""


@dataclasses.dataclass(frozen=True)
class Detection:
    """A detector trained, measured by COCO's rules, and shown.

    Attributes:
      model: a Linen module ``(image f32[B,H,W,3], train) -> outputs``.
      num_classes: C; None: the number of class names, or the model's own.
      class_names: C names; None: "0", "1", ...
      mean, std: of the normalisation of uint8, as in ``Classification``.
      keep: K, detections of a picture.
      shown: the score from which a detection is an answer.

    Raises:
      UserError: numbers of classes that disagree, or a value out of its range.
    """

    model: nn.Module
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    keep: int = 100
    shown: float = 0.4

    inputs: ClassVar[tuple[str, ...]] = ("image",)
    batch_coupled: ClassVar[bool] = False
    scale: ClassVar[Mapping[str, float]] = {}
    """Of the terms of the loss, where it is not 1."""

    def __post_init__(self) -> None:
        for name in ("class_names", "mean", "std"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        counts = {
            "num_classes": self.num_classes,
            "class_names": None if self.class_names is None else len(self.class_names),
            "model.num_classes": getattr(self.model, "num_classes", None),
        }
        object.__setattr__(self, "num_classes", agreed(counts))
        if self.keep < 1 or not 0 <= self.shown <= 1:
            raise UserError(f"keep is {self.keep} and shown {self.shown}; they are at least 1, and within [0, 1].")
        if min(self.std, default=0) <= 0 or not self.mean:
            raise UserError(f"mean {self.mean} and std {self.std} hold one value or one per channel, std above zero.")

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """See ``core.Task`` and ``metrics.boxes.scores``."""
        return {
            "map": Metric("max", "%", "mAP at IoU 0.5 to 0.95"),
            "map50": Metric("max", "%", "mAP at IoU 0.5"),
            "map75": Metric("max", "%", "mAP at IoU 0.75"),
            "map_small": Metric("max", "%", "mAP of objects below 32x32"),
            "map_medium": Metric("max", "%", "mAP of objects of 32x32 to 96x96"),
            "map_large": Metric("max", "%", "mAP of objects above 96x96"),
            "recall": Metric("max", "%", "Recall at IoU 0.5 to 0.95"),
            "loss": Metric("min"),
        }

    # -- what subclasses say ---------------------------------------------------------------------------------------

    def terms(self, outputs: Any, batch: Batch) -> Terms:
        """What is learnt of what the model gives. Weights do not depend on the parameters."""
        raise NotImplementedError

    def detections(self, outputs: Any, size: tuple[int, int]) -> Detections:
        """The ``keep`` best boxes of each picture, [B,K], of what the model gives of pictures of this height and
        width."""
        raise NotImplementedError

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the pictures.
        """
        image_1HWC = self.normalise(jnp.zeros((1, *batch["image"].shape[1:]), batch["image"].dtype))
        with model_errors():
            return self.model.init(key, image_1HWC)

    def normalise(self, image_BHWC: jax.Array | np.ndarray) -> jax.Array:
        return normalised(image_BHWC, self.mean, self.std)

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        outputs, state = applied_in_training(self.model, variables, key, self.normalise(batch["image"]))
        mask_B = batch["mask"]
        sums = {
            name: Sum(jnp.sum(mask_B * total_B), jnp.sum(mask_B * weight_B))
            for name, (total_B, weight_B) in self.terms(outputs, batch).items()
        }
        return Loss(sums, scale={name: x for name, x in self.scale.items() if name in sums}), state

    def outputs(self, variables: Variables, inputs: Batch) -> Any:
        """What the model gives, without labels, mask or randomness."""
        with model_errors():
            return self.model.apply(variables, self.normalise(inputs["image"]))

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``boxes`` f32[B,K,4] in pixels of the input, ``scores`` f32[B,K] and ``classes`` i32[B,K], by score."""
        height, width = inputs["image"].shape[1:3]
        return self.detections(self.outputs(variables, inputs), (height, width))._asdict()

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """What ``metrics.boxes`` reads, in pixels of the original pictures, with their ``size``; and ``loss``: the mean
        over pictures of what each would be alone."""
        outputs = self.outputs(variables, batch)
        height, width = batch["image"].shape[1:3]
        found = self.detections(outputs, (height, width))
        real_BM = batch["box_mask"] > 0
        arrays = {
            **found._asdict(),
            "boxes": original(found.boxes, batch),
            "true_boxes": jnp.where(real_BM[..., None], original(batch["boxes"], batch), 0),
            "true_classes": jnp.where(real_BM, batch["classes"], -1),
            "true_crowd": jnp.asarray(batch["crowd"]),
            "size": jnp.asarray(batch["size"]),
        }
        loss_B: Any = 0.0
        for name, (total_B, weight_B) in self.terms(outputs, batch).items():
            loss_B += self.scale.get(name, 1.0) * total_B / weight_B
        return arrays, {"loss": Sum(jnp.sum(batch["mask"] * loss_B), jnp.sum(batch["mask"]))}

    # -- on the host -----------------------------------------------------------------------------------------------

    def meters(self) -> Mapping[str, Meter]:
        """See ``metrics.boxes.scores``."""
        return {"coco": CollectAll(lambda examples: measures.scores(examples, self._names()), measures.NAMES)}

    def _names(self) -> Sequence[str]:
        return self.class_names or [str(c) for c in range(self.num_classes or 0)]

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """``objects``: ``label``, ``score`` and ``box`` (x0, y0, x1, y1 in pixels of the original picture) of each, by
        falling score, of those from ``shown`` on; and the picture's ``width`` and ``height``."""
        height, width = (int(x) for x in example.get("size", example["image"].shape[:2]))
        boxes_K4 = np.asarray(original(np.asarray(output["boxes"], np.float64), _unmoved(example)))
        boxes_K4 = boxes_K4.clip(0, (width, height, width, height))
        names = self._names()
        objects = [
            {"label": names[int(c)], "score": round(float(s), 4), "box": [round(x, 1) for x in box.tolist()]}
            for box, s, c in zip(boxes_K4, output["scores"], output["classes"], strict=True)
            if s > 0 and s >= self.shown
        ]
        return {"objects": objects, "width": width, "height": height}

    def rendered(self, output: Mapping[str, np.ndarray], example: Example) -> Rendered:
        """The picture with its boxes drawn: in its own size where the codec has kept it, else as the model saw it."""
        answer = self.postprocess(output, example)
        if "original" in example:
            picture, scale, offset = example["original"], np.ones(2), np.zeros(2)
        else:
            picture, (scale, offset) = example["image"], (_unmoved(example)[name] for name in ("scale", "offset"))
        image = Image.fromarray(np.asarray(picture)).convert("RGB")
        pen, thick = ImageDraw.Draw(image), max(1, round(min(image.size) / 200))
        for thing in reversed(answer["objects"]):  # the surest are on top
            x0, y0, x1, y1 = (np.asarray(thing["box"]).reshape(2, 2) * scale + offset).ravel().tolist()
            colour = f"hsl({137 * self._names().index(thing['label']) % 360}, 80%, 38%)"  # golden angles are far apart
            pen.rectangle((x0, y0, max(x1, x0), max(y1, y0)), outline=colour, width=thick)
            text, size = f"{thing['label']} {thing['score']:.2f}", max(9, 6 * thick)
            left, top, right, bottom = pen.textbbox((x0, max(y0 - size - 2, 0)), text, font_size=size)
            pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=colour)
            pen.text((x0, max(y0 - size - 2, 0)), text, fill="white", font_size=size)
        file = io.BytesIO()
        image.save(file, "PNG")
        return Rendered(".png", "image/png", file.getvalue())

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """Scores of each class, precision-recall curves, and what is wrong: false positives and misses."""
        yield from figures.per_class(evaluated.metrics)
        examples = evaluated.examples
        if not {*measures.NAMES, "size"} <= examples.keys():
            return
        names = self._names()
        found = measures.errors(examples, len(names))
        curves = {names[c]: (recall.tolist(), precision.tolist()) for c, (recall, precision) in found.curves.items()}
        if curves:
            note = "At an IoU of 0.5, interpolated as COCO does; the area below each is its average precision."
            yield Plot("Precision and recall", curves, "recall", "precision", note)
        index_N = examples.get("index", np.arange(len(examples["boxes"])))

        def card(n: int, caption: str, marked: str, box_4: np.ndarray) -> Card:
            h, w = examples["size"][n]
            x0, y0, x1, y1 = (box_4 / (w, h, w, h)).clip(0, 1).tolist()
            return Card(int(index_N[n]), caption, False, [(x0, y0, x1, y1, marked)])

        if found.false:
            cards = [
                card(n, f"said {label} {100 * examples['scores'][n, k]:.1f} %", label, examples["boxes"][n, k])
                for n, k in found.false[: figures.SHOWN]
                for label in [names[examples["classes"][n, k]]]
            ]
            note = f"{len(found.false):,} detections of any score are no object of their class at an IoU of 0.5."
            yield Gallery("False positives, the surest first", cards, note)
        if found.missed:
            cards = [
                card(n, f"missed {label}; best on it {100 * score:.1f} %", label, examples["true_boxes"][n, m])
                for n, m, score in found.missed[: figures.SHOWN]
                for label in [names[examples["true_classes"][n, m]]]
            ]
            note = f"{len(found.missed):,} objects are found at no score. By the best detection on them, of any class."
            yield Gallery("Missed objects", cards, note)


def original(boxes: Any, batch: Mapping[str, Any]) -> Any:
    """Boxes xyxy [..., K, 4] of letterboxed pictures in pixels of the original ones, by ``scale`` and ``offset``."""
    xp: Any = np if isinstance(boxes, np.ndarray) else jnp
    scale, offset = (xp.concatenate([batch[name]] * 2, -1)[..., None, :] for name in ("scale", "offset"))
    return (boxes - offset) / scale


def _unmoved(example: Example) -> dict[str, np.ndarray]:
    """``scale`` and ``offset`` of an example; of one without letterbox, those of the identity."""
    return {
        "scale": np.asarray(example.get("scale", (1.0, 1.0)), np.float64),
        "offset": np.asarray(example.get("offset", (0.0, 0.0)), np.float64),
    }
