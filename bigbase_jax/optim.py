"""Optimizers from a config: optax's own algorithms and schedules, named by import path.

The chain is: clip by global norm -> (weight decay, for algorithms without their own) -> the algorithm at the schedule's
rate -> one rate per parameter group. Frozen parameters keep no optimizer state.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from bigbase_jax.core import PyTree, UserError, flatten

_RATE = ("peak_value", "init_value", "value")
_LENGTH = ("decay_steps", "transition_steps")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What the config says about the optimizer; ``transform`` makes an optax transformation of it.

    Attributes:
      learning_rate: the peak rate, which the schedule's ``peak_value``, ``init_value`` or ``value`` takes.
      algorithm: a partial of an optax algorithm (``deferred(optax.adamw, b1=0.9)``); takes ``learning_rate``.
      schedule: a partial of an optax schedule (``deferred(optax.cosine_decay_schedule)``) over the steps after the
        warm-up, which its ``decay_steps`` or ``transition_steps`` takes; None: constant.
      warmup: linear warm-up from 0: a number of steps, or a fraction of all steps if below 1.
      weight_decay: decoupled where the algorithm has its own (AdamW, Lion), else added to the gradient (L2, as in
        PyTorch's SGD).
      decay_mask: a regex over parameter paths (``"conv1.kernel"``) searched for; those without a match do not decay.
      clip_norm: clip the gradient's global norm (Pascanu et al. 2013); None: do not.
      groups: pairs (path regex, factor of the rate), first match wins; 0 freezes. Empty: all parameters alike;
        otherwise a parameter that no regex matches is an error.
    """

    learning_rate: float
    algorithm: Callable[..., optax.GradientTransformation] = optax.adamw
    schedule: Callable[..., optax.Schedule] | None = None
    warmup: float = 0.0
    weight_decay: float = 0.0
    decay_mask: str = "kernel$"
    clip_norm: float | None = None
    groups: tuple[tuple[str, float], ...] = ()

    def rate(self, total_steps: int) -> optax.Schedule:
        """step (i32[], 0-based) -> learning rate (f32[])."""
        warmup = round(self.warmup * total_steps) if 0 < self.warmup < 1 else int(self.warmup)
        if not 0 <= warmup <= total_steps:
            raise UserError(f"config.optim.warmup is {warmup} steps, but the run has only {total_steps}.")
        if self.schedule is None:
            after: optax.Schedule = optax.constant_schedule(self.learning_rate)
        else:
            fill = {_RATE: self.learning_rate, _LENGTH: max(total_steps - warmup, 1)}
            after = self.schedule(**_fill(self.schedule, fill))
        if not warmup:
            return after
        return optax.join_schedules([optax.linear_schedule(0.0, self.learning_rate, warmup), after], [warmup])

    def transform(self, params: PyTree, total_steps: int) -> optax.GradientTransformation:
        """The optax transformation for these parameters (arrays or shapes).

        Raises:
          UserError: a regex is invalid or matches nothing, a parameter is in no group, or an argument does not fit.
        """
        chain = []
        if self.clip_norm is not None:
            chain.append(optax.clip_by_global_norm(self.clip_norm))
        if not self.groups:
            return optax.chain(*chain, self._algorithm(total_steps, 1.0))
        labels = self._labels(params)
        transforms: dict[str, optax.GradientTransformation] = {
            pattern: self._algorithm(total_steps, factor) if factor else optax.set_to_zero()
            for pattern, factor in self.groups
        }
        return optax.chain(*chain, optax.partition(transforms, labels))

    def _algorithm(self, total_steps: int, factor: float) -> optax.GradientTransformation:
        schedule = self.rate(total_steps)
        rate = schedule if factor == 1.0 else lambda step: factor * schedule(step)
        takes = inspect.signature(self.algorithm).parameters
        mask = functools.partial(_matches, pattern=self.decay_mask)
        kwargs: dict[str, Any] = {"learning_rate": rate}
        decay = []
        own = next((n for n in ("weight_decay", "weight_decay_rate") if n in takes), None)
        if own is not None:
            kwargs[own] = self.weight_decay
            kwargs.update({n: mask for n in ("mask", "weight_decay_mask") if n in takes})
        elif not isinstance(self.weight_decay, (int, float)) or self.weight_decay:  # a population's is traced
            decay = [optax.add_decayed_weights(self.weight_decay, mask)]
        return optax.chain(*decay, self.algorithm(**kwargs))

    def _labels(self, params: PyTree) -> PyTree:
        names = list(flatten(params))
        first = {name: next((p for p, _ in self.groups if _search(p, name)), None) for name in names}
        uncovered = [name for name, pattern in first.items() if pattern is None]
        if uncovered:
            raise UserError(
                f"config.optim.groups covers no rate for {', '.join(uncovered[:5])}"
                f"{f' and {len(uncovered) - 5} more' if len(uncovered) > 5 else ''}; add ('.*', 1.0) as the last group."
            )
        unused = [p for p, _ in self.groups if not any(_search(p, name) for name in names)]
        if unused:
            raise UserError(f"config.optim.groups: {unused[0]!r} matches no parameter; names look like {names[0]!r}.")
        return jax.tree.unflatten(jax.tree.structure(params), [first[name] for name in names])


def _fill(fn: Callable[..., Any], values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """For each alternative of names, the first that the partial ``fn`` takes and that its config left open."""
    takes = inspect.signature(fn).parameters
    given = getattr(fn, "keywords", {})
    kwargs = {}
    for names, value in values.items():
        if any(name in given for name in names if not (name == "init_value" and "peak_value" in takes)):
            continue
        name = next((name for name in names if name in takes), None)
        if name is not None:
            kwargs[name] = value
    if "peak_value" in takes and "init_value" in takes and "init_value" not in given:
        kwargs["init_value"] = 0.0
    return kwargs


def _matches(params: PyTree, pattern: str) -> PyTree:
    names = flatten(params)
    return jax.tree.unflatten(jax.tree.structure(params), [bool(_search(pattern, name)) for name in names])


def _search(pattern: str, name: str) -> re.Match[str] | None:
    try:
        return re.search(pattern, name)
    except re.error as error:
        raise UserError(f"config.optim: {pattern!r} is not a regular expression ({error}).") from error
