"""Detection as the prediction of a set: each object is matched to one query, and each query is learnt as its object or
as none (DETR, RT-DETR, YOLOS).

Axes: N layers that predict, B examples, Q queries, M objects, K logits, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigbase_jax.core import Batch, UserError, Variables
from bigbase_jax.models import boxes as B
from bigbase_jax.models.detr import Predictions
from bigbase_jax.tasks.detection import Detection, Terms
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.tasks.matching import MATCHERS

_IN_CROWD = 0.5  # the share of a box from which it is of a crowd


@dataclasses.dataclass(frozen=True)
class SetPrediction(Detection):
    """The set prediction loss (Carion et al. 2020, section 3.1), at each layer that predicts.

    The terms are ``class``, ``l1`` and ``giou``; the last two are sums over objects, divided by the objects of the
    whole batch, with the centres and sizes of boxes in 0..1. Where the logits have "no object" (``SOFTMAX`` of the
    model), ``class`` is their cross-entropy, in which queries without an object count ``no_object``, and an object's
    query costs less the likelier its class is; else it is the varifocal loss, whose target is the IoU (Zhang et al.
    2021; RT-DETR), and the cost is a focal one. A query without an object that lies in a crowd learns nothing.

    Attributes:
      no_object: see above.
      l1, giou: weights of these terms, and of the costs.
      class_cost: weight of the class's cost; None: 1 of a softmax, and 2.
      matcher: "device" or "host"; see ``tasks.matching``.

    Raises:
      UserError: a model of another kind, a weight below 0, or no such matcher.
    """

    no_object: float = 0.1
    l1: float = 5.0
    giou: float = 2.0
    class_cost: float | None = None
    matcher: str = "device"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not hasattr(self.model, "SOFTMAX"):
            raise UserError(f"a {type(self.model).__name__} predicts no set; take a DETR, RTDETR or YOLOS.")
        if min(self.no_object, self.l1, self.giou, self.class_cost or 0) < 0:
            raise UserError("no_object, l1, giou and class_cost are weights, and none is below 0.")
        if self.matcher not in MATCHERS:
            raise UserError(f"matcher is {self.matcher!r}; it is one of {', '.join(map(repr, MATCHERS))}.")

    @property
    def scale(self) -> Mapping[str, float]:  # type: ignore[override]
        """Of the terms of the loss."""
        return {"l1": self.l1, "giou": self.giou}

    def outputs(self, variables: Variables, inputs: Batch) -> Predictions:
        """See ``Detection``. Of pictures with ``valid`` i32[B,2], the rest is padding, and boxes are of what it is not:
        zeros after the normalisation, as published models were trained."""
        x_BHWC = self.normalise(inputs["image"])
        if "valid" not in self.inputs:
            return super().outputs(variables, inputs)
        valid_B2 = jnp.asarray(inputs["valid"])
        _, H, W, _ = x_BHWC.shape
        real = (jnp.arange(H)[:, None] < valid_B2[:, None, :1]) & (jnp.arange(W) < valid_B2[:, 1:, None])
        with model_errors():
            found: Any = self.model.apply(variables, jnp.where(real[..., None], x_BHWC, 0), valid_B2)
        share_B2 = valid_B2[:, ::-1] / jnp.array([W, H])
        return Predictions(found.logits, found.boxes * jnp.concatenate([share_B2, share_B2], -1)[:, None])

    # -- learning --------------------------------------------------------------------------------------------------

    def terms(self, outputs: Predictions, batch: Batch) -> Terms:
        """See above.

        Raises:
          UserError: a picture may hold more objects than there are queries.
        """
        with jax.named_scope("matching"):
            query_NBM = self.matched(outputs, batch)
        logits, boxes = outputs.logits.astype(jnp.float32), outputs.boxes.astype(jnp.float32)
        Q, K = logits.shape[2:]
        learnt_BM, crowd_BM, true_BM4, class_BM = self._objects(batch, boxes)
        count_B = jnp.sum(learnt_BM, -1)
        objects_B = jnp.maximum(count_B, 1e-3)
        found_NBM4 = jnp.take_along_axis(boxes, query_NBM[..., None], 2)
        l1_B = jnp.sum(jnp.sum(jnp.abs(found_NBM4 - true_BM4), -1) * learnt_BM, (0, 2))
        overlap = B.generalized_iou(*(B.convert(x, "cxcywh") for x in (found_NBM4, true_BM4)))
        giou_B = jnp.sum((1 - overlap) * learnt_BM, (0, 2))

        hit_NBMQ = jax.nn.one_hot(query_NBM, Q) * learnt_BM[..., None]
        object_NBQ = jnp.sum(hit_NBMQ, 2)
        class_NBQC = jnp.einsum("nbmq,bmc->nbqc", hit_NBMQ, jax.nn.one_hot(class_BM, self._classes(K)))
        free_NBQ = object_NBQ + (1 - object_NBQ) * ~self._in_crowd(boxes, batch, crowd_BM)
        if self._softmax:
            y_NBQK = jnp.concatenate([class_NBQC, 1 - object_NBQ[..., None]], -1)
            weight_NBQ = object_NBQ + self.no_object * (1 - object_NBQ)
            entropy_NBQ = -jnp.sum(y_NBQK * jax.nn.log_softmax(logits), -1)
            class_B = jnp.sum(entropy_NBQ * weight_NBQ * free_NBQ, (0, 2))
            weight_B = count_B + self.no_object * (Q - count_B)
        else:
            iou_NBM = B.iou(*(B.convert(x, "cxcywh") for x in (jax.lax.stop_gradient(found_NBM4), true_BM4)))
            iou_NBQ = jnp.einsum("nbmq,nbm->nbq", hit_NBMQ, iou_NBM)
            losses = varifocal(logits, class_NBQC, iou_NBQ[..., None] * class_NBQC)
            class_B = jnp.sum(jnp.sum(losses, -1) * free_NBQ, (0, 2))
            weight_B = jnp.maximum(count_B, 1.0)
        return {"class": (class_B, weight_B), "l1": (l1_B, objects_B), "giou": (giou_B, objects_B)}

    def matched(self, outputs: Predictions, batch: Batch) -> jax.Array:
        """i32[N,B,M]: the query of each object, by each layer; nothing is learnt by what it depends on.

        Raises:
          UserError: a picture may hold more objects than there are queries.
        """
        logits, boxes = jax.lax.stop_gradient((outputs.logits.astype(jnp.float32), outputs.boxes.astype(jnp.float32)))
        N, B_, Q, K = logits.shape
        learnt_BM, _, true_BM4, class_BM = self._objects(batch, boxes)
        M = learnt_BM.shape[1]
        if M > Q:
            raise UserError(f"a picture may hold {M} objects, and the model has {Q} queries; take a model with more.")
        if self._softmax:
            cost_NBQK = -jax.nn.softmax(logits)
        else:
            p = jax.nn.sigmoid(logits)
            cost_NBQK = 0.25 * (1 - p) ** 2 * -jnp.log(p + 1e-8) - 0.75 * p**2 * -jnp.log(1 - p + 1e-8)
        of_class = jnp.einsum("nbqk,bmk->nbmq", cost_NBQK, jax.nn.one_hot(class_BM, K))
        share = (1.0 if self._softmax else 2.0) if self.class_cost is None else self.class_cost
        cost_NBMQ = share * of_class
        a, b = boxes[:, :, None], true_BM4[:, :, None]
        cost_NBMQ += self.l1 * jnp.sum(jnp.abs(a - b), -1)
        cost_NBMQ -= self.giou * B.generalized_iou(B.convert(a, "cxcywh"), B.convert(b, "cxcywh"))
        mask_NBM = jnp.broadcast_to(learnt_BM, (N, B_, M))
        found = MATCHERS[self.matcher](cost_NBMQ.reshape(-1, M, Q), mask_NBM.reshape(-1, M))
        return found.reshape(N, B_, M)

    @property
    def _softmax(self) -> bool:
        return bool(self.model.SOFTMAX)

    def _classes(self, K: int) -> int:
        return K - 1 if self._softmax else K

    def _objects(self, batch: Batch, boxes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """f32[B,M] and bool[B,M]: which objects are learnt, and which are crowds; f32[B,M,4] centre and size in 0..1;
        i32[B,M] classes."""
        real_BM, crowd_BM = jnp.asarray(batch["box_mask"]) > 0, jnp.asarray(batch["crowd"]) > 0
        height, width = batch["image"].shape[1:3]
        size_4 = jnp.array([width, height, width, height], jnp.float32)
        true_BM4 = B.convert(jnp.asarray(batch["boxes"]) / size_4, "xyxy", "cxcywh")
        learnt_BM = (real_BM & ~crowd_BM).astype(jnp.float32)
        if "mask" in batch:
            learnt_BM = learnt_BM * jnp.asarray(batch["mask"])[:, None]
        return learnt_BM, real_BM & crowd_BM, true_BM4, jnp.asarray(batch["classes"])

    def _in_crowd(self, boxes: jax.Array, batch: Batch, crowd_BM: jax.Array) -> jax.Array:
        """bool[N,B,Q]: whether most of a box lies in a crowd."""
        height, width = batch["image"].shape[1:3]
        found = B.convert(jax.lax.stop_gradient(boxes), "cxcywh")[:, :, :, None]
        region = (jnp.asarray(batch["boxes"]) / jnp.array([width, height, width, height], jnp.float32))[:, None]
        low, high = jnp.maximum(found[..., :2], region[..., :2]), jnp.minimum(found[..., 2:], region[..., 2:])
        share = B.area(jnp.concatenate([low, high], -1)) / jnp.maximum(B.area(found), 1e-9)
        return jnp.any((share > _IN_CROWD) & crowd_BM[:, None], -1)

    # -- answering -------------------------------------------------------------------------------------------------

    def detections(self, outputs: Predictions, size: tuple[int, int]) -> B.Detections:
        """Each query's likeliest class of a softmax; of sigmoids the best pairs of query and class."""
        logits_BQK = outputs.logits[-1].astype(jnp.float32)
        height, width = size
        boxes_BQ4 = B.convert(outputs.boxes[-1].astype(jnp.float32), "cxcywh")
        boxes_BQ4 = B.clip(boxes_BQ4 * jnp.array([width, height, width, height], jnp.float32), height, width)
        if self._softmax:
            p_BQC = jax.nn.softmax(logits_BQK)[..., :-1]
            best = jnp.argmax(p_BQC, -1)[..., None] == jnp.arange(p_BQC.shape[-1])
            scores_BQC = jnp.where(best, p_BQC, 0)
        else:
            scores_BQC = jax.nn.sigmoid(logits_BQK)
        return jax.vmap(lambda boxes, scores: B.top_k(boxes, scores, self.keep))(boxes_BQ4, scores_BQC)


def varifocal(logits: jax.Array, is_class: jax.Array, target: jax.Array) -> jax.Array:
    """The loss of each logit against its target in 0..1, which an object's class has (Zhang et al. 2021, equation 2,
    with alpha = 0.75 and gamma = 2)."""
    p = jax.lax.stop_gradient(jax.nn.sigmoid(logits))
    weight = 0.75 * p**2 * (1 - is_class) + target
    return weight * (jnp.maximum(logits, 0) - logits * target + jnp.log1p(jnp.exp(-jnp.abs(logits))))
