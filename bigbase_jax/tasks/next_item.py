"""The next item of a history: sequential recommendation.

Axes: B examples of a batch, N examples of a split, L length, D model width, V items, which count from 1 (0 is padding),
K negatives, T items of a ranked list.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Batch, Example, Loss, Meter, Metric, Sum, UserError, Variables
from bigbase_jax.tasks import chunked_loss, lists
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.tasks.textual import state_of

LOSSES = ("softmax", "sampled_softmax", "bce")
_MEASURED = 10  # places of a ranking that are measured


@dataclasses.dataclass(frozen=True)
class NextItem:
    """A model that reads a history and scores the items that may come next.

    A batch holds ``history`` i32[B,L], with 0 for padding, and ``target``: for training i32[B,L], the item after each
    of the history (0: none), for evaluation i32[B], the one after all.

    Attributes:
      model: a Linen module with the methods ``hidden`` and ``items`` (see ``models.sasrec``).
      num_items: V.
      item_names: of item 1, 2, ...; None: their numbers.
      item_titles: what people call them, where that is something else.
      loss_kind: of the training: "softmax" over all items; "sampled_softmax", over the target and K others, with the
        correction of Bengio & Senécal 2008 for how probable it was to draw them; or "bce", whether an item is the
        target or drawn (Kang & McAuley 2018).
      negatives: K, drawn uniformly and left out where they are among the user's own; by "sampled_softmax" for a batch,
        by "bce" for each history or, a single one, for each place of it. Unread by "softmax".
      calibration: t in [0, 1] of gBCE (Petrov & Macdonald 2023): how much of the overconfidence is taken back that BCE
        has because few negatives are drawn. 0: plain BCE, 1: scores tend to those of the full softmax.
      top: T, the items of an answer.

    Raises:
      UserError: a value out of its range.
    """

    model: nn.Module
    num_items: int | None = None
    item_names: Sequence[str] | None = None
    item_titles: Sequence[str] | None = None
    loss_kind: str = "softmax"
    negatives: int = 1
    calibration: float = 0.0
    top: int = 10

    inputs: ClassVar[tuple[str, ...]] = ("history",)
    batch_coupled: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "ndcg@10": Metric("max", "", "NDCG@10"),
        "hr@10": Metric("max", "%", "HR@10"),
        "mrr@10": Metric("max", "", "MRR@10"),
        "loss": Metric("min", "nats"),
    }

    def __post_init__(self) -> None:
        if self.loss_kind not in LOSSES:
            raise UserError(f"there is no loss_kind {self.loss_kind!r}.{suggest(self.loss_kind, LOSSES, 'loss')}")
        if self.negatives < 1 or self.top < 1:
            raise UserError(f"negatives is {self.negatives} and top {self.top}; both must be at least 1.")
        if not 0 <= self.calibration <= 1:
            raise UserError(f"calibration is {self.calibration}; it lies in [0, 1].")
        for name in ("item_names", "item_titles"):
            object.__setattr__(self, name, None if getattr(self, name) is None else tuple(getattr(self, name)))
        object.__setattr__(self, "num_items", self.num_items or getattr(self.model, "num_items", None))

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the histories, or the number of items is not known.
        """
        with model_errors():
            return self.model.init(key, jnp.ones((1, batch["history"].shape[1]), jnp.int32))

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """In nats; its weight is the number of targets."""
        dropout_key, key = jax.random.split(key)
        y_BLD = self._hidden(variables, batch, train=True, rngs={"dropout": dropout_key})
        target_BL = jnp.where(batch["mask"][:, None] > 0, batch["target"], 0)
        if self.loss_kind == "softmax":
            y_ND, target_N = y_BLD.reshape(-1, y_BLD.shape[-1]), target_BL.reshape(-1)
            n = max(1, min(len(y_ND), chunked_loss.CHUNK_LOGITS // ((self.num_items or 0) + 1)))
            total = chunked_loss.over_targets(self._cross_entropy, variables["params"], y_ND, target_N, n)
        else:
            total = self._sampled(variables, y_BLD, batch["history"], target_BL, key)
        return Loss({"loss": Sum(total, jnp.sum(target_BL > 0).astype(jnp.float32))}), state_of(variables)

    def _cross_entropy(self, params: Any, y_ND: jax.Array, target_N: jax.Array) -> jax.Array:
        """f32[], summed over those that have a target."""
        variables = {"params": params}
        logits_NV, score_N = self._scores(variables, y_ND), self._own(variables, y_ND, target_N)
        real_NV = jnp.where(jnp.arange(logits_NV.shape[-1]) > 0, logits_NV, -jnp.inf)
        return jnp.sum(jnp.where(target_N > 0, jax.nn.logsumexp(real_NV, -1) - score_N, 0))

    def _sampled(
        self, variables: Variables, y_BLD: jax.Array, history_BL: Any, target_BL: jax.Array, key: jax.Array
    ) -> jax.Array:
        """The loss of targets against items that are drawn, f32[], summed."""
        V, K = self.num_items or 0, self.negatives
        own_BM = jnp.concatenate([history_BL, target_BL], 1)
        positive_BL = self._own(variables, y_BLD, target_BL)
        if self.loss_kind == "sampled_softmax":
            drawn_K = jax.random.randint(key, (K,), 1, V + 1)
            negative_BLK = self._scores(variables, y_BLD, drawn_K)
            own_BLK = jnp.any(drawn_K == own_BM[..., None], 1)[:, None]
            others_BLK = jnp.where(own_BLK, -jnp.inf, negative_BLK - math.log(K / V))
            loss_BL = jax.nn.logsumexp(jnp.concatenate([positive_BL[..., None], others_BLK], -1), -1) - positive_BL
        else:
            B, L = target_BL.shape
            drawn_BXK = jax.random.randint(key, (B, L if K == 1 else 1, K), 1, V + 1)
            drawn_BXKD: Any = self.model.apply(variables, drawn_BXK, method="items")
            if K == 1:
                negative_BLK = jnp.sum(y_BLD[:, :, None] * drawn_BXKD, -1)
            else:
                negative_BLK = y_BLD @ jnp.swapaxes(drawn_BXKD[:, 0], 1, 2)
            own_BXK = jnp.any(drawn_BXK[..., None] == own_BM[:, None, None], -1)
            beta = 1 - self.calibration * (1 - K / max(V - 1, 1))
            against_BL = jnp.sum(jnp.where(own_BXK, 0, jax.nn.softplus(negative_BLK)), -1)
            loss_BL = beta * jax.nn.softplus(-positive_BL) + against_BL
        return jnp.sum(jnp.where(target_BL > 0, loss_BL, 0))

    def scores(self, variables: Variables, batch: Batch) -> jax.Array:
        """f32[B,V+1]: of each item to come after the history; of item 0, which is none, -inf."""
        score_BV = self._scores(variables, self.users(variables, batch))
        return jnp.where(jnp.arange(score_BV.shape[-1]) > 0, score_BV, -jnp.inf)

    def users(self, variables: Variables, batch: Batch) -> jax.Array:
        """f32[B,D]: what the model makes of all of a history."""
        y_BLD = self._hidden(variables, batch)
        last_B = jnp.max(jnp.where(batch["history"] > 0, jnp.arange(y_BLD.shape[1]), 0), 1)
        return jnp.take_along_axis(y_BLD, last_B[:, None, None], 1)[:, 0]

    def items(self, variables: Variables, items: Batch) -> jax.Array:
        """f32[n,D], of the items ``item`` i32[n]: their products with ``users`` are scores."""
        y_nD: Any = self.model.apply(variables, items["item"], method="items")
        return y_nD

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """The best items that the history does not have: ``items`` i32[B,T], best first, and their ``scores``
        f32[B,T]; where there are too few, item 0 with -inf. T is 10 where less is asked for."""
        history_BL = inputs["history"]
        score_BV = self.scores(variables, inputs)
        V, T = score_BV.shape[-1], max(self.top, _MEASURED)
        most: int = getattr(self.model, "length", None) or history_BL.shape[1]  # of them that are seen
        score_BK, item_BK = jax.lax.top_k(score_BV, min(T + most, V))
        seen_BK = jnp.any(item_BK[..., None] == history_BL[:, None], -1)
        best_BT, place_BT = jax.lax.top_k(jnp.where(seen_BK, -jnp.inf, score_BK), min(T, V))
        items_BT = jnp.take_along_axis(item_BK, place_BT, 1)
        return {"items": jnp.where(best_BT > -jnp.inf, items_BT, 0), "scores": best_BT}

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """What ``predict`` gives, and ``target``; where the target stands in the ranking (``hr@10``,
        ``ndcg@10``, ``mrr@10``, 0 where it is not among the best ten); and ``loss``, of the full softmax."""
        outputs, target_B, mask_B = self.predict(variables, batch), batch["target"], batch["mask"]
        right_BT = (outputs["items"] == target_B[:, None])[:, :_MEASURED]
        place_T = jnp.arange(right_BT.shape[1])
        measured = {
            "hr@10": jnp.sum(right_BT, -1),
            "ndcg@10": jnp.sum(right_BT / jnp.log2(place_T + 2), -1),
            "mrr@10": jnp.sum(right_BT / (place_T + 1), -1),
        }
        if jax.tree.leaves(variables):  # another engine's answers are measured without
            score_BV = self.scores(variables, batch)
            chosen_B = jnp.take_along_axis(score_BV, target_B[:, None], 1)[:, 0]
            measured["loss"] = jax.nn.logsumexp(score_BV, -1) - chosen_B
        sums = {name: Sum(jnp.sum(mask_B * x_B), jnp.sum(mask_B)) for name, x_B in measured.items()}
        return {**outputs, "target": jnp.asarray(target_B)}, sums

    def _scores(self, variables: Variables, y: jax.Array, items_K: jax.Array | None = None) -> jax.Array:
        """f32[..., V+1] of f32[..., D], or those of some items, summed in float32."""
        table_VD: Any = self.model.apply(variables, items_K, method="items")
        return jnp.einsum("...d,vd->...v", y, table_VD.astype(y.dtype), preferred_element_type=jnp.float32)

    def _own(self, variables: Variables, y: jax.Array, items: jax.Array) -> jax.Array:
        """f32[...] of f32[..., D]: the score of an item for each."""
        own: Any = self.model.apply(variables, items, method="items")
        return jnp.sum(y.astype(jnp.float32) * own, -1)

    def _hidden(self, variables: Variables, batch: Batch, **how: Any) -> jax.Array:
        with model_errors():
            y_BLD: Any = self.model.apply(variables, batch["history"], **how, method="hidden")
            return y_BLD

    # -- on the host -----------------------------------------------------------------------------------------------

    def meters(self) -> Mapping[str, Meter]:
        """None: all that is measured adds up."""
        return {}

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """See ``lists.answer``."""
        return lists.answer(output, example, self.top, self.item_names, self.item_titles)
