"""Optimizers from a config: optax's own algorithms and schedules, named by import path.

Muon (``optax.contrib.muon``) orthogonalises kernels as the matrices that they are, and leaves all else to Adam (see
``matrices``). Its updates are as large as AdamW's, whose learning rates it takes (``consistent_rms=0.2``, Liu et al.
2025), where nothing else is said.

The chain is: clip by global norm -> (weight decay, for algorithms without their own) -> the algorithm at the schedule's
rate -> one rate per parameter group. Frozen parameters keep no optimizer state.

Learning rate, weight decay and clip norm are no part of the compiled program: they live in the optimizer's state
(``optax.inject_hyperparams``), so that runs which differ in nothing else share one program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers
from optax.schedules import StatefulSchedule

from bigbase_jax.core import PyTree, UserError, flatten, some

Number = float | jax.Array
_DECAY = ("weight_decay", "weight_decay_rate")
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

    def rate(self, total_steps: int, peak: Number | None = None) -> optax.Schedule:
        """step (i32[], 0-based) -> learning rate (f32[]); ``peak`` in place of ``learning_rate``, also traced."""
        peak = self.learning_rate if peak is None else peak
        warmup = round(self.warmup * total_steps) if 0 < self.warmup < 1 else int(self.warmup)
        if not 0 <= warmup <= total_steps:
            raise UserError(f"config.optim.warmup is {warmup} steps, but the run has only {total_steps}.")
        if self.schedule is None:
            after: optax.Schedule = optax.constant_schedule(peak)
        else:
            fill = {_RATE: peak, _LENGTH: max(total_steps - warmup, 1)}
            after = self.schedule(**_fill(self.schedule, fill))
        if not warmup:
            return after
        return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])

    def numbers(self, total_steps: int) -> dict[str, float]:
        """Which of ``learning_rate``, ``weight_decay`` and ``clip_norm`` runs of one compiled program may differ in.

        What changes the program is left out: a weight decay of 0 where the algorithm has none of its own, so that 0 and
        more than 0 are two programs; a clip norm of None; and a rate that its schedule compares or converts in Python,
        as ``optax.warmup_cosine_decay_schedule`` does (``optax.cosine_decay_schedule`` after ``warmup`` does not).
        """
        found: dict[str, float | None] = {"clip_norm": self.clip_norm}
        if self.weight_decay or self._own_decay() is not None:
            found["weight_decay"] = self.weight_decay
        with contextlib.suppress(jax.errors.JAXTypeError):
            jax.eval_shape(lambda peak: self.rate(total_steps, peak)(jnp.int32(0)), jnp.float32(self.learning_rate))
            found["learning_rate"] = self.learning_rate
        return {name: float(value) for name, value in found.items() if value is not None}

    def transform(self, params: PyTree, total_steps: int) -> optax.GradientTransformationExtraArgs:
        """The optax transformation for these parameters (arrays or shapes).

        Its ``init`` takes other values of ``numbers`` as keywords, also traced ones; its ``update`` goes by those that
        the state holds. ``state.hyperparams["learning_rate"]`` is the rate of the last update.

        Raises:
          UserError: a regex is invalid or matches nothing, a parameter is in no group, or an argument does not fit.
        """
        labels = self._labels(params) if self.groups else None

        def chain(
            learning_rate: Number, weight_decay: Number | None = None, clip_norm: Number | None = None
        ) -> optax.GradientTransformation:
            clip = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
            if labels is None:
                return optax.chain(*clip, self._algorithm(learning_rate, weight_decay))
            transforms: dict[str, optax.GradientTransformation] = {
                pattern: self._algorithm(factor * learning_rate, weight_decay) if factor else optax.set_to_zero()
                for pattern, factor in self.groups
            }
            return optax.chain(*clip, optax.partition(transforms, labels))

        def made(**others: Number) -> optax.GradientTransformationExtraArgs:
            numbers: dict[str, Any] = {**self.numbers(total_steps), **others}
            rate: Any = self.rate(total_steps)
            if "learning_rate" in numbers:
                rate = _Scheduled(functools.partial(self.rate, total_steps), numbers.pop("learning_rate"))
            return optax.inject_hyperparams(chain, hyperparam_dtype=jnp.float32)(rate, **numbers)

        return optax.GradientTransformationExtraArgs(
            lambda params, **others: made(**others).init(params), made().update
        )

    def _own_decay(self) -> str | None:
        """The algorithm's argument for weight decay."""
        takes = inspect.signature(self.algorithm).parameters
        return next((name for name in _DECAY if name in takes), None)

    def _algorithm(self, rate: Number, weight_decay: Number | None) -> optax.GradientTransformation:
        takes = inspect.signature(self.algorithm).parameters
        mask = functools.partial(_matches, pattern=self.decay_mask)
        kwargs: dict[str, Any] = {"learning_rate": rate}
        decay = []
        own = self._own_decay()
        if "muon_weight_dimension_numbers" in takes and weight_decay is not None:
            defaults: dict[str, Any] = {"muon_weight_dimension_numbers": matrices, "consistent_rms": 0.2}
            kwargs = {**defaults, **getattr(self.algorithm, "keywords", {}), **kwargs}
            decay = [optax.add_decayed_weights(-rate * weight_decay, mask)]  # Muon's own leaves out what is Adam's
            return optax.chain(self.algorithm(**kwargs), *decay)
        if own is not None:
            kwargs[own] = weight_decay
            kwargs.update({n: mask for n in ("mask", "weight_decay_mask") if n in takes})
        elif weight_decay is not None:
            decay = [optax.add_decayed_weights(weight_decay, mask)]
        return optax.chain(*decay, self.algorithm(**kwargs))

    def _labels(self, params: PyTree) -> PyTree:
        names = list(flatten(params))
        first = {name: next((p for p, _ in self.groups if _search(p, name)), None) for name in names}
        uncovered = [name for name, pattern in first.items() if pattern is None]
        if uncovered:
            raise UserError(
                f"config.optim.groups covers no rate for {some(uncovered, 5)}; add ('.*', 1.0) as the last group."
            )
        unused = [p for p, _ in self.groups if not any(_search(p, name) for name in names)]
        if unused:
            raise UserError(f"config.optim.groups: {unused[0]!r} matches no parameter; names look like {names[0]!r}.")
        return jax.tree.unflatten(jax.tree.structure(params), [first[name] for name in names])


@dataclasses.dataclass(frozen=True)
class _Scheduled(StatefulSchedule):
    """A schedule whose peak lives in the optimizer's state."""

    rate: Callable[[Number], optax.Schedule]
    peak: Number

    def init(self) -> dict[str, jax.Array]:
        return {"peak": jnp.asarray(self.peak, jnp.float32), "count": jnp.int32(0)}

    def update(self, state: dict[str, jax.Array], **_: Any) -> dict[str, jax.Array]:
        return {**state, "count": optax.safe_increment(state["count"])}

    def __call__(self, state: dict[str, jax.Array], **_: Any) -> jax.Array:
        return jnp.asarray(self.rate(state["peak"])(state["count"]), jnp.float32)


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


def matrices(params: PyTree) -> PyTree:
    """For each parameter, which of its axes Muon takes for the rows and the columns of a matrix; None: it is Adam's.

    Kernels have all but their last axis for rows: convolutions [h, w, I, O] are [hwI, O]. Queries, keys and values
    [D, H, K] are [D, HK], all heads in one, as in Jordan et al. 2024; outputs [H, K, D] are [HK, D]. The layers of a
    stack are matrices of their own. Embeddings, heads, kernels of one channel in (depthwise ones), biases and scales
    are Adam's.
    """
    names = flatten(params)
    return jax.tree.unflatten(jax.tree.structure(params), [_matrix(*item) for item in names.items()])


def _matrix(name: str, x: Any) -> MuonDimensionNumbers | None:
    axes = range(bool(re.search(r"(^|\.)blocks\.", name)), x.ndim)
    if not name.endswith("kernel") or len(axes) < 2 or re.search(r"(^|\.)(embedding|head|fc|next)\.", name):
        return None
    if len(axes) == 4 and x.shape[-2] == 1:
        return None
    split = 1 if re.search(r"attention\.(query|key|value)\.", name) else -1
    return MuonDimensionNumbers(tuple(axes[:split]), tuple(axes[split:]))


def _search(pattern: str, name: str) -> re.Match[str] | None:
    try:
        return re.search(pattern, name)
    except re.error as error:
        raise UserError(f"config.optim: {pattern!r} is not a regular expression ({error}).") from error
