"""Several members of a small model in one run, which predict together: a task around a task.

Axes: S members, B examples, K classes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigbase_jax.core import Batch, Loss, Sum, UserError, Variables
from bigbase_jax.wrappers.wrapper import Around


@dataclasses.dataclass(frozen=True)
class Ensemble(Around):
    """Trains ``members`` of ``task`` side by side, each from its own seed, on the same batches, and predicts by their
    mean (Lakshminarayanan, Pritzel & Blundell 2017): of probabilities, or of the numbers that they give.

    Every array of the variables has a leading axis S. The loss is the mean of the members', so the gradient of each is
    1 / S of its own: Adam and its kin do not feel that, plain SGD wants S times the rate. A norm that gradients are
    clipped to is that of all members.

    Attributes:
      task: one with ``probabilities`` by a softmax, or with numbers.
      members: S.

    Raises:
      UserError: fewer than 1 member, or a task of another kind.
    """

    members: int = 8

    def __post_init__(self) -> None:
        if self.members < 1:
            raise UserError(f"members is {self.members}; an ensemble has at least 1.")
        if hasattr(self.task, "num_classes") and getattr(self.task, "loss_kind", "softmax") != "softmax":
            raise UserError("an ensemble of classifiers needs loss_kind='softmax'.")
        self._check_inside()

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        variables: Variables = jax.vmap(self.task.init, (0, None))(jax.random.split(key, self.members), batch)
        return variables

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        scale: dict[str, float] = {}

        def of_member(variables: Variables, key: jax.Array) -> tuple[Loss, Variables]:
            loss, state = self.task.loss(variables, batch, key)
            scale.update(loss.scale)  # numbers, not arrays
            return loss._replace(scale={}), state

        loss, state = jax.vmap(of_member)(variables, jax.random.split(key, self.members))
        return loss._replace(scale=scale), state

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """The means over S; ``logits`` become the logarithms of the mean probabilities."""
        each = [self.task.predict(jax.tree.map(lambda x, s=s: x[s], variables), inputs) for s in range(self.members)]
        mean = {name: jnp.mean(jnp.stack([said[name] for said in each]), 0) for name in each[0]}
        return {**mean, "logits": jnp.log(mean["probabilities"])} if "logits" in mean else mean

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        said: Any = copy.copy(self.task)
        object.__setattr__(said, "predict", self.predict)
        arrays, sums = said.evaluate(variables, batch)
        return arrays, sums
