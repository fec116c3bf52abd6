"""Training with zeros among the weights that stay zeros, and become more by a schedule."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bigbase_jax.core import Batch, Loss, UserError, Variables
from bigbase_jax.wrappers.layers import layers_of
from bigbase_jax.wrappers.wrapper import Around, Path, check_regex, some_paths

MASKS = "masks"
"""The collection of the model state: ``kept``, bool arrays by the path of their parameters, and ``step``."""


@dataclasses.dataclass(frozen=True)
class Sparse(Around):
    """Trains ``task`` with masks on some of its parameters; what is zero as training begins stays zero.

    So a run that begins from pruned weights (``init_from``) keeps their zeros. With ``sparsity``, the smallest numbers
    of each parameter, of each layer of a stack, become zeros as well: at step t a share of ``sparsity * (1 - (1 - (t -
    begin) / (end - begin)) ** 3)`` (Zhu & Gupta 2017, equation 1). With "N:M", of every M inputs in a row of each
    output ``M - N`` become zeros, by the same schedule, rounded. Zeros get no gradient and never return.

    The masks move with the model state, through checkpoints too; a moving average has the newest.

    Attributes:
      task: the task.
      targets: a regex over paths of parameters, searched for.
      sparsity: the share of zeros in the end, or "N:M", of kernels whose inputs M divides; None: those that are there.
      begin, end, every: the steps of the schedule. A step is a call of the loss: with ``train.microbatches``, a slice.

    Raises:
      UserError: a value out of range, or (from ``init``) targets that match no parameter, or none with N:M.
    """

    targets: str = "kernel$"
    sparsity: float | str | None = None
    begin: int = 0
    end: int = 1000
    every: int = 100

    def __post_init__(self) -> None:
        check_regex("targets", self.targets)
        if self.sparsity is not None:
            amount(self.sparsity, "sparsity")
        if not (0 <= self.begin < self.end and self.every >= 1):
            raise UserError(
                f"Sparse's schedule has begin={self.begin}, end={self.end} and every={self.every}; begin is at least 0"
                " and below end, and every at least 1."
            )

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the task has a teacher, or ``targets`` matches no parameter, or with N:M no kernel whose inputs M
            divides.
        """
        self._check_inside()
        variables = self.task.init(key, batch)
        params = flatten_dict(variables["params"])
        kept = {path: jnp.ones(x.shape, bool) for path, x in params.items() if re.search(self.targets, ".".join(path))}
        if not kept:
            raise UserError(f"Sparse's targets={self.targets!r} match no parameter; there are {some_paths(params)}.")
        if self._pattern is not None:
            inputs = layers_of(self.task.init, key, batch)
            chosen = {p: x for p, x in kept.items() if p in inputs and not row(x.shape, inputs[p]) % self._pattern[1]}
            if not chosen:
                raise UserError(
                    f"sparsity={self.sparsity} is for kernels whose inputs {self._pattern[1]} divides, outside of"
                    f" stacks (scan=False), and there is none among {some_paths(kept)}."
                )
            kept = chosen
        return {**variables, MASKS: {"kept": unflatten_dict(kept), "step": jnp.int32(0)}}

    def unwrap(self, variables: Variables) -> Variables:
        """The variables of the task inside, with zeros where the masks say so."""
        return self._masked(variables, flatten_dict(variables[MASKS]["kept"]))

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        step = variables[MASKS]["step"]
        kept = flatten_dict(variables[MASKS]["kept"])
        params = {path: jax.lax.stop_gradient(flatten_dict(variables["params"])[path]) for path in kept}
        kept = jax.lax.cond(step == 0, lambda: {path: x != 0 for path, x in params.items()}, lambda: kept)
        if self.sparsity is not None:
            due = (step >= self.begin) & (step <= self.end) & ((step - self.begin) % self.every == 0)
            inputs = layers_of(self.task.init, key, batch) if self._pattern else {}
            more = functools.partial(self._pruned, params, kept, step, inputs)
            kept = jax.lax.cond(due | (step == self.end), more, lambda: kept)
        loss, state = self.task.loss(self._masked(variables, kept), batch, key)
        return loss, {**state, MASKS: {"kept": unflatten_dict(kept), "step": step + 1}}

    @property
    def _pattern(self) -> tuple[int, int] | None:
        return None if self.sparsity is None else amount(self.sparsity, "sparsity")[1]

    def _pruned(
        self, params: Mapping[Path, Any], kept: Mapping[Path, Any], step: jax.Array, inputs: Mapping[Path, int]
    ) -> dict[Path, jax.Array]:
        assert self.sparsity is not None
        wanted, pattern = amount(self.sparsity, "sparsity")
        done = jnp.clip((step - self.begin) / (self.end - self.begin), 0, 1)
        share = wanted * (1 - (1 - done) ** 3)

        def largest(x: jax.Array, kept: jax.Array) -> jax.Array:
            score = jnp.where(kept, jnp.abs(x), 0)
            less = jnp.round(share * score.size).astype(jnp.int32)
            limit = jnp.sort(score.reshape(-1))[jnp.maximum(less - 1, 0)]
            return kept & ((score > limit) | (less == 0))

        if pattern is None:
            each = {path: jax.vmap(largest) if "blocks" in path else largest for path in params}
            return {path: each[path](x, kept[path]) for path, x in params.items()}

        def of_groups(x: jax.Array, kept: jax.Array, inputs: int) -> jax.Array:
            score = jnp.where(kept, jnp.abs(x), -1).reshape(-1, pattern[1], math.prod(x.shape[inputs:]))
            less = jnp.round(share * pattern[1])
            return kept & (jnp.argsort(jnp.argsort(score, 1), 1) >= less).reshape(x.shape)

        return {path: of_groups(x, kept[path], inputs[path]) for path, x in params.items()}

    def _masked(self, variables: Variables, kept: Mapping[Path, Any]) -> Variables:
        params = dict(flatten_dict(variables["params"]))
        params.update({path: jnp.where(mask, params[path], 0) for path, mask in kept.items()})
        rest = {name: x for name, x in variables.items() if name != MASKS}
        return {**rest, "params": unflatten_dict(params)}


def amount(given: float | str, what: str, known: str = "SHARE and N:M") -> tuple[float, tuple[int, int] | None]:
    """The share of zeros that ``0.8`` or ``"N:M"`` says, and (N, M).

    Raises:
      UserError: it is none of these, or out of range.
    """
    if fits := re.fullmatch(r"(\d{1,4}):(\d{1,4})", str(given)):
        n, m = int(fits[1]), int(fits[2])
        if not 0 < n < m:
            raise UserError(f"{what}={given} keeps {n} of every {m} inputs; N is at least 1 and below M, as in 2:4.")
        return (m - n) / m, (n, m)
    try:
        share = float(given)
    except ValueError as error:
        raise UserError(f"{what}={given} is none of {known}.") from error
    if not 0 < share < 1:
        raise UserError(f"{what}={given} is a share of zeros, above 0 and below 1, such as 0.8.")
    return share, None


def row(shape: tuple[int, ...], inputs: int) -> int:
    """How many inputs of a kernel lie in a row: the channels of a convolution, all inputs of another layer."""
    return shape[inputs - 1] if inputs > 2 else math.prod(shape[:inputs])
