"""Training some of a model's parameters: see ``wrapper``."""

from __future__ import annotations

import dataclasses
import re

import jax
from flax.traverse_util import unflatten_dict

from bigbase_jax.core import Batch, UserError, Variables
from bigbase_jax.parallel import FROZEN
from bigbase_jax.wrappers.wrapper import Wrapper, check_regex, some_paths


@dataclasses.dataclass(frozen=True)
class Frozen(Wrapper):
    """Trains the parameters of ``task`` that a regex names, and none of the others: the last layers, a linear probe.

    Statistics that a model gathers in training (BatchNorm's) continue to move.

    Attributes:
      task: the task.
      trainable: a regex over parameter paths (``"encoder.norm.scale"``), searched for. A scanned stack is one layer.

    Raises:
      UserError: it is not a regular expression, or (from ``init``) matches no parameter.
    """

    trainable: str

    def __post_init__(self) -> None:
        check_regex("trainable", self.trainable)

    def trains(self, path: str) -> bool:
        return bool(re.search(self.trainable, path))

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: ``trainable`` matches no parameter.
        """
        trained, frozen, rest = self._init(key, batch)
        if not trained:
            raise UserError(f"trainable={self.trainable!r} matches no parameter; there are {some_paths(frozen)}.")
        return {"params": unflatten_dict(trained), FROZEN: unflatten_dict(frozen), **rest}
