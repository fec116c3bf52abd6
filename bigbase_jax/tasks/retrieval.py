"""Retrieval: of a catalogue that is too large to be scored item by item, those that a user is likeliest to choose.

Axes: B examples of a batch, L length of a history, D width of the vectors, T words, F features, K items of a list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Array, Batch, Example, Loss, Meter, Metric, Sum, UserError, Variables
from bigbase_jax.tasks import in_batch, lists
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.tasks.textual import state_of


@dataclasses.dataclass(frozen=True, eq=False)
class Retrieval:
    """Two towers, trained by the softmax over the items of the batch.

    A batch holds users: ``user`` i32[B] (from 0; -1: unknown) and ``history`` i32[B,L] (items from 1, 0 for padding);
    and in training items, those that they chose: ``item`` i32[B] and ``log_q`` f32[B], the logarithm of the item's
    share of the training examples. Where the model reads them, ``user_words`` and ``item_words`` i32[B,T] and
    ``item_features`` f32[B,F] too.

    The softmax over the whole catalogue is estimated by the other items of the batch, which are drawn as often as they
    are chosen: each has its logarithm of that taken from its score (the logQ correction: Bengio & Senécal 2008; Yi et
    al. 2019). As what the user chose is always there, and not drawn, its own score is not corrected, and the same item
    elsewhere in the batch is no negative. So the partition function is estimated without bias.

    Attributes:
      model: a Linen module with the methods ``users`` and ``items`` (see ``models.two_tower``).
      num_items: of the catalogue.
      item_names, item_titles: of item 1, 2, ...; None: their numbers, and no titles.
      correct: whether scores are corrected; else what is often chosen is recommended too seldom.
      id_dropout: share of the users and of the items whose id is hidden in training, so that what has none that
        training has seen is known by its history, its words and its features (Volkovs et al. 2017).
      top: K, the items of an answer.

    Raises:
      UserError: a value out of its range.
    """

    model: nn.Module
    num_items: int | None = None
    item_names: Sequence[str] | None = None
    item_titles: Sequence[str] | None = None
    correct: bool = True
    id_dropout: float = 0.1
    top: int = 10

    batch_coupled: ClassVar[bool] = True
    indexed: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, Metric]] = {"loss": Metric("min", "nats")}

    def __post_init__(self) -> None:
        if not 0 <= self.id_dropout < 1:
            raise UserError(f"id_dropout is {self.id_dropout}; it lies in [0, 1), for example 0.1.")
        if self.top < 1:
            raise UserError(f"top is {self.top}; an answer has at least 1 item.")
        for name in ("item_names", "item_titles"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))

    @property
    def inputs(self) -> tuple[str, ...]:
        """See ``core.Task``: what is known of a user."""
        return ("user", "history", *(("user_words",) if getattr(self.model, "user_words", None) else ()))

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the batch, or a size is not known.
        """
        one = {name: jnp.zeros((1, *batch[name].shape[1:]), jnp.int32) for name in self.inputs}
        features = jnp.zeros((1, getattr(self.model, "item_features", None) or 1))
        item = {"item": jnp.zeros(1, jnp.int32), "log_q": jnp.zeros(1), "item_words": jnp.zeros((1, 1), jnp.int32)}
        with model_errors():
            return self.model.init(key, _of_user(one), _of_item({**item, "item_features": features}))

    def users(self, variables: Variables, batch: Batch) -> jax.Array:
        """f32[B,D]: vectors, whose inner product with those of items is the score."""
        with model_errors():
            found: Any = self.model.apply(variables, *_of_user(batch), method="users")
            return found

    def items(self, variables: Variables, items: Batch) -> jax.Array:
        """f32[B,D]: vectors of items, of which a batch holds ``item``, ``log_q`` (-inf: training has not seen it) and
        what else the model reads."""
        with model_errors():
            found: Any = self.model.apply(variables, *_of_item(items), method="items")
            return found

    def loss(self, variables: Variables, batch: Batch, key: jax.Array | None) -> tuple[Loss, Variables]:
        """In nats; without a key, no id is hidden."""
        real_B = jnp.asarray(batch["mask"]) > 0
        if key is not None and self.id_dropout:
            hidden_2B = jax.random.bernoulli(key, self.id_dropout, (2, len(real_B)))
            hidden = {"user": jnp.where(hidden_2B[0], -1, batch["user"]), "cold": hidden_2B[1]}
            chosen_B, partition_B = self.log_partition(variables, {**batch, **hidden})
        else:
            chosen_B, partition_B = self.log_partition(variables, batch)
        total = jnp.sum(jnp.where(real_B, partition_B - chosen_B, 0.0))
        return Loss({"loss": Sum(total, jnp.sum(batch["mask"]))}), state_of(variables)

    def log_partition(self, variables: Variables, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """f32[B] each: the scores of the chosen items, and the logarithms of what the batch estimates of the sum of the
        catalogue's exponential scores."""
        real_B, item_B, log_q_B = jnp.asarray(batch["mask"]) > 0, batch["item"], batch["log_q"]
        score_BB = self.users(variables, batch) @ self.items(variables, batch).T
        other_BB = (item_B[:, None] != item_B) & real_B
        drawn_B: Any = None
        if self.correct:
            drawn_B = jnp.where(jnp.isfinite(log_q_B), log_q_B, 0.0) + jnp.log(jnp.maximum(jnp.sum(real_B) - 1, 1))
        return in_batch.softmax(score_BB, other_BB, drawn_B)

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``vector`` f32[B,D] of each user; the items are those that ``inference.index`` finds for it."""
        return {"vector": self.users(variables, inputs)}

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, Array], Mapping[str, Sum]]:
        """``loss`` where the batch has items, as in training but with all ids; nothing where another engine computes
        the vectors of users, and those of items are in its index."""
        if "item" not in batch or not variables.get("params"):
            return {}, {}
        return {}, dict(self.loss(variables, batch, None)[0].terms)

    # -- on the host -----------------------------------------------------------------------------------------------

    def meters(self) -> Mapping[str, Meter]:
        """None: what is measured of a ranking is an evaluator's."""
        return {}

    def query_of(self, item: np.ndarray) -> np.ndarray:
        """f32[D]: what finds the items that are alike to one of this vector: its direction, without its bias."""
        return np.append(item[:-1], np.float32(0))

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """See ``lists.answer``; where nothing has been looked up, the ``vector`` to do so by."""
        if "items" not in output:
            return {"vector": output["vector"].tolist()}
        return lists.answer(output, example, self.top, self.item_names, self.item_titles)


def _of_user(batch: Batch) -> tuple[Any, ...]:
    return _arrays(batch["user"] + 1, batch["history"], batch.get("user_words"))


def _of_item(batch: Batch) -> tuple[Any, ...]:
    """Id 0 stands for that of an item which training never sees, or which is to be taken for one."""
    known_B = jnp.isfinite(batch["log_q"]) & ~jnp.asarray(batch.get("cold", False))
    return _arrays(jnp.where(known_B, batch["item"], 0), batch.get("item_words"), batch.get("item_features"))


def _arrays(*found: Array | None) -> tuple[jax.Array | None, ...]:
    return tuple(None if x is None else jnp.asarray(x) for x in found)
