"""What a compression begins with and what it gives: a model without the wrappers that trained it, and its config."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from bigbase_jax.core import Task, UserError, Variables
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.models.transformer import stack_blocks, unstack_blocks
from bigbase_jax.pretrained.start import chain, masked, merged, model_of, stored
from bigbase_jax.wrappers.sparse import Sparse

Batches = Callable[[], Sequence[Mapping[str, np.ndarray]]]
"""Gives the calibration batches, which are read when they are first asked for."""


class Compressed(NamedTuple):
    """A smaller model.

    Attributes:
      config: of the new run, as a whole.
      task: what its ``config.task`` builds.
      variables: of that task.
      about: what was done, for ``compression.json``.
    """

    config: ConfigDict
    task: Task
    variables: Variables
    about: Mapping[str, Any] = {}


def plain(predictor: Predictor) -> Compressed:
    """The model of a run by itself: what wraps its task for training (adapters, masks, mixtures) is merged into it.

    Raises:
      UserError: it is not of a run, is quantised already, or its task has no model of its own.
    """
    if predictor.config is None or predictor.run is None:
        raise UserError("--mode=compress takes the folder of a run; train one from published weights with init_from.")
    if stored(predictor.task) is not None:
        raise UserError(f"{predictor.run.path} is quantised already; compress the run that it was made of.")
    config = copy.deepcopy(predictor.config)
    config.unlock()
    while isinstance(config.task.get("task"), ConfigDict):
        config.task = config.task.task
    if "adapter" in config:
        del config.adapter
    zeros = masked(config) or any(isinstance(task, Sparse) for task in chain(predictor.task))
    config.compression = {"masked": zeros}
    *_, task = chain(predictor.task)
    model_of(task)
    return Compressed(config, task, merged(predictor.task, predictor.variables))


@dataclasses.dataclass(frozen=True)
class Unrolled:
    """A model whose blocks are told apart, and which computes the same each time: what is measured and cut.

    Attributes:
      task: without random masks, recomputation or a loop over blocks.
      variables: of that task.
      spec: shapes of a batch.
      scanned: whether the model that it is of loops over its blocks.
    """

    task: Any
    variables: Variables
    spec: Mapping[str, jax.ShapeDtypeStruct]
    scanned: bool

    @property
    def model(self) -> Any:
        """The model."""
        return self.task.model

    @classmethod
    def of(cls, found: Compressed, spec: Mapping[str, jax.ShapeDtypeStruct]) -> Unrolled:
        """That of a plain model, and of batches of these shapes."""
        task, model = model_of(found.task)
        words = {"scan": False, "remat": False, "dropout": 0.0, "drop_path": 0.0}
        bare = model.clone(**{name: word for name, word in words.items() if hasattr(model, name)})
        scanned = getattr(model, "scan", False)
        variables = unstack_blocks(found.variables) if scanned else found.variables
        return cls(dataclasses.replace(task, model=bare), variables, spec, scanned)

    def rolled(self, variables: Variables) -> Variables:
        """Variables as the model has them that this is of."""
        return stack_blocks(variables) if self.scanned else variables
