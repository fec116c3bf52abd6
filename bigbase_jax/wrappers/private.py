"""Training with differential privacy: DP-SGD (Abadi et al. 2016) as a task around a task.

The one loop trains it. ``loss`` clips the gradient of each example (inside the scan over microbatches, on the device
that has the example); ``finish`` adds the noise, once, to the sum over all slices and devices; and the sum is divided
by the public mean size of a batch. Batches are Poisson samples (``data.poisson``), of which those larger than
``data.batch_size`` are truncated, which is accounted for (Chua et al. 2025). Epsilon is that of ``dp_accounting``'s
privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022), for neighbours that differ by one example
(or, with ``data.unit``, by all examples of one unit) added or removed.

What the guarantee is for are the parameters, and what is computed of them: the log of the training loss, ``val`` and
``test`` are not. It holds against those who know neither the run's seed nor that of its data, of which the noise
and the samples are functions; and as far as floating-point numbers are real ones (Mironov 2012).

Axes: B rows of a slice of a batch, K places of the curve of epsilon.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Batch, Loss, Metric, PyTree, Sum, Task, UserError, Variables
from bigbase_jax.parallel import FROZEN, GIVEN, LOSS, Gradient
from bigbase_jax.runtime.log import say
from bigbase_jax.wrappers.wrapper import Around

PRIVACY = "privacy"
"""The collection of the model state: ``steps`` i32[], noisy updates so far; ``at`` i32[K] and ``epsilon`` f32[K], what
so many of them cost at ``delta`` f32[]."""
_CURVE = 17  # K
_INTERVAL = 1e-3  # of the losses; epsilon is an upper bound at any, here within 0.1 % of a finer one
_NOISE_KEY = 2**31 - 1  # the keys of slices and examples are folds of small numbers
_LEAST = 0.05  # noise multiplier: with less, epsilon is in the hundreds, and its accounting takes too much memory
_FINEST = 1e-3  # of the noise multiplier that is looked for


class Mechanism(NamedTuple):
    """What one step does to the data, in public numbers.

    Attributes:
      units: how many examples, or units, there are.
      expected: the mean size of a Poisson sample of them.
      most: what larger ones are truncated to.
      noise: the noise's standard deviation over the clip norm ("noise multiplier").
    """

    units: int
    expected: float
    most: int
    noise: float

    def epsilon(self, steps: int, delta: float) -> float:
        """What so many steps cost; infinity with next to no noise."""
        accounting = _accounting()
        if not steps or self.noise < _LEAST:
            return math.inf if steps else 0.0
        accountant = accounting.pld.PLDAccountant(value_discretization_interval=_INTERVAL)
        accountant.compose(self._event(), steps)
        return float(accountant.get_epsilon(delta))

    def _event(self) -> Any:
        accounting = _accounting()
        rate = self.expected / self.units
        if self.most >= self.units:
            return accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(self.noise))
        return accounting.TruncatedSubsampledGaussianDpEvent(self.units, rate, self.most, self.noise)

    def calibrated(self, epsilon: float, delta: float, steps: int) -> Mechanism:
        """The same with as little noise as lets so many steps cost no more than ``epsilon``."""
        low, high = 0.0, 1.0
        while self._replace(noise=high).epsilon(steps, delta) > epsilon:
            low, high = high, 2 * high
            if high > 1e6:
                raise UserError(f"no noise lets {steps} steps cost epsilon {epsilon:g} or less at delta {delta:g}.")
        while high - low > _FINEST * high:
            middle = (low + high) / 2
            if self._replace(noise=middle).epsilon(steps, delta) > epsilon:
                low = middle
            else:
                high = middle
        return self._replace(noise=high)

    def affordable(self, epsilon: float, delta: float, steps: int) -> int:
        """How many of so many steps cost no more than ``epsilon``."""
        if self.epsilon(steps, delta) <= epsilon:
            return steps
        low, high = 0, steps
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.epsilon(middle, delta) <= epsilon else (low, middle)
        return low


class Curve(NamedTuple):
    """What up to ``at`` steps cost, i32[K] and f32[K]; the last are all steps of a run."""

    at: np.ndarray
    epsilon: np.ndarray


@dataclasses.dataclass(frozen=True)
class Private(Around):
    """Trains ``task`` by DP-SGD; everything else is the task's own. Other wrappers go inside: ``Private(LoRA(task))``.

    An example's loss is what the task makes of it alone: the sum over terms of ``scale * total / weight``, so of texts
    the mean over its own tokens, and class weights do not count. Its gradient over all trained parameters is scaled to
    a norm of at most ``clip``; one that is not finite counts as 0. The loss that is logged is the sum over examples
    over the mean size of a batch; ``clipped`` is the share of examples that were, ``epsilon`` what was spent.

    Attributes:
      task: the task.
      clip: the largest norm of an example's gradient.
      epsilon: the budget, which training uses up in as many steps as ``config.train`` says. With ``noise``, training
        ends before a step that would exceed it. None: only accounted.
      delta: at most one over the number of examples.
      noise: the noise multiplier; None: the smallest that the budget allows.

    Raises:
      UserError: a number out of range, or a task that compares the examples of a batch; (from ``init``) one that keeps
        a state in training, as BatchNorm does; or (from ``planned``) whatever else would void the guarantee.
    """

    clip: float = 1.0
    epsilon: float | None = None
    delta: float = 1e-5
    noise: float | None = None
    mechanism: Mechanism | None = dataclasses.field(default=None, init=False)  # these three are the plan's
    curve: Curve | None = dataclasses.field(default=None, init=False, compare=False)
    unit: str = dataclasses.field(default="example", init=False)

    def __post_init__(self) -> None:
        for name in ("clip", "epsilon", "noise"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                more = "; to train without privacy, leave the wrapper out" if name != "clip" else ""
                raise UserError(f"{name} is {value}; it is a number above 0{more}.")
        if self.noise is not None and self.noise < _LEAST:
            raise UserError(f"noise is {self.noise}; with less than {_LEAST} nothing is private.")
        if not 0 < self.delta < 1:
            raise UserError(f"delta is {self.delta}; it is above 0 and at most one over the number of examples.")
        if self.epsilon is None and self.noise is None:
            raise UserError("Private needs epsilon=, the budget, such as 3, or noise=, the noise multiplier.")
        if self.task.batch_coupled:
            raise UserError(
                "this task's loss compares the examples of a batch, so none has a gradient of its own that could be "
                "clipped; Private is for losses that are sums over examples."
            )
        if any(type(inner).__name__ == "Mix" for inner in _chain(self.task)):
            raise UserError("Mix makes one example of two, and none has a gradient of its own; use it without Private.")
        self._check_inside()

    # -- before training -------------------------------------------------------------------------------------------

    def planned(self, data: Any, loop: Any, steps: int) -> tuple[Private, int]:
        """See ``core.Task``. Says what the budget is.

        Raises:
          UserError: what training would do voids the guarantee, or delta is too large.
        """
        if data.data.poisson is None:
            raise UserError(
                "Private accounts for Poisson samples; set config.data.poisson to the mean size of a batch, and "
                "config.data.batch_size above it, to its largest size."
            )
        if loop.best_metric is not None:
            raise UserError(
                "config.train.best_metric and patience choose a model by private examples, which no budget counts; set "
                "both to None: the last checkpoint is the result."
            )
        if loop.lazy_tables:
            raise UserError("config.train.lazy_tables tells which rows a batch reads; Private needs it to be False.")
        if data.source("train").packed and data.data.unit is None:
            raise UserError(
                "these examples are windows into which several documents are packed, so one document is in several of "
                "them, and what is protected has no meaning; name whose each is by config.data.unit, or use examples "
                "that are one document each."
            )
        units = data.num_units
        if self.delta > 1 / units:
            raise UserError(
                f"delta is {self.delta:g}, above 1/{units}: publishing a few of the {units} examples as they are would "
                f"do as well; give at most {1 / units:.1g}."
            )
        mechanism = Mechanism(units, float(data.data.poisson), data.batch_size, self.noise or 0.0)
        allowed = steps
        if self.noise is None:
            assert self.epsilon is not None
            mechanism = mechanism.calibrated(self.epsilon, self.delta, steps)
        elif self.epsilon is not None:
            allowed = mechanism.affordable(self.epsilon, self.delta, steps)
            if not allowed:
                raise UserError(f"epsilon {self.epsilon:g} is less than one step at noise={self.noise:g} costs.")
            if allowed < steps:
                say(f"privacy: the budget allows {allowed:,} of the {steps:,} steps; training ends there")
        made, curve, unit = copy.copy(self), self._curve_of(mechanism, allowed), data.data.unit or "example"
        for name, value in (("mechanism", mechanism), ("curve", curve), ("unit", unit)):
            object.__setattr__(made, name, value)
        say(
            f"privacy: epsilon {curve.epsilon[-1]:.4g} at delta {self.delta:g} after {allowed:,} steps; "
            f"{mechanism.expected:g} of {units:,} {unit}s a step on average, {mechanism.most:,} at most; gradients "
            f"clipped to {self.clip:g}, noise multiplier {mechanism.noise:.4g}"
        )
        return made, allowed

    @property
    def guarantee(self) -> dict[str, Any]:
        """What the lineage keeps of the budget."""
        if self.mechanism is None or self.curve is None:
            return {}
        return {
            PRIVACY: {
                "epsilon": float(self.curve.epsilon[-1]),
                "delta": self.delta,
                "steps": int(self.curve.at[-1]),
                "unit": self.unit,
                "neighbours": "one added or removed",
                "clip": self.clip,
                **self.mechanism._asdict(),
            }
        }

    def _curve_of(self, mechanism: Mechanism, steps: int) -> Curve:
        at_K = np.ceil(np.linspace(0, 1, _CURVE) ** 2 * steps).astype(np.int32)
        cost = {n: mechanism.epsilon(int(n), self.delta) for n in np.unique(at_K)}
        return Curve(at_K, np.nextafter(np.array([cost[n] for n in at_K], np.float32), np.float32(np.inf)))

    # -- inside the compiled step ----------------------------------------------------------------------------------

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The task's own, ``epsilon`` and ``clipped``."""
        return {
            **self.task.metrics,
            "epsilon": Metric("min", "", f"Epsilon at delta {self.delta:g}"),
            "clipped": Metric(None, "%", "Examples whose gradient was clipped"),
        }

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model keeps a state in training.
        """
        variables = self.task.init(key, batch)
        moving = variables.keys() - {"params", FROZEN}
        if moving:
            raise UserError(
                f"the model gathers {', '.join(sorted(moving))} over the examples of a batch as it trains, which no "
                "noise hides; use one without BatchNorm (norms of an example's own features, such as GroupNorm, do)."
            )
        curve = self.curve or Curve(np.zeros(_CURVE, np.int32), np.zeros(_CURVE, np.float32))
        spent = {"steps": jnp.int32(0), **{name: jnp.asarray(x) for name, x in curve._asdict().items()}}
        return {**variables, PRIVACY: {**spent, "delta": jnp.float32(self.delta)}}

    def unwrap(self, variables: Variables) -> Variables:
        return {name: x for name, x in variables.items() if name != PRIVACY}

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """A loss whose gradient is the sum of the clipped gradients of the examples, and whose weight is public."""
        if self.mechanism is None:
            raise UserError("Private is trained by the ordinary loop, which knows the budget, and by nothing else.")
        inner = self.unwrap(variables)
        rest = {name: x for name, x in inner.items() if name != "params"}

        def of_one(params: PyTree, example: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, Sum]]:
            found, _ = self.task.loss({**rest, "params": params}, {n: x[None] for n, x in example.items()}, key)
            sums = {n: Sum(jnp.sum(x.total), jnp.sum(x.weight)) for n, x in {**found.terms, **found.aux}.items()}
            parts = [found.scale.get(name, 1.0) * sums[name].mean() for name in found.terms]
            return jnp.asarray(sum(parts[1:], parts[0])), sums

        params = jax.lax.stop_gradient(inner["params"])
        mask_B = jnp.asarray(batch["mask"]) > 0
        rows = jax.random.split(key, len(mask_B))
        gradient = jax.value_and_grad(of_one, has_aux=True)
        (loss_B, sums_B), grads_B = jax.vmap(gradient, (None, 0, 0))(params, dict(batch), rows)
        clipped, norm_B = clip_and_sum(grads_B, self.clip, mask_B)
        # Linear in the parameters, 0 at their value: its gradient is that sum, whatever computes it.
        dot = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, clipped, inner["params"])))
        total = jnp.sum(jnp.where(mask_B, loss_B, 0)) + (dot - jax.lax.stop_gradient(dot))
        share = self.mechanism.expected / self.mechanism.most  # of the rows, on average
        real_B = mask_B.astype(jnp.float32)
        aux = {
            name: Sum(jnp.sum(jnp.where(mask_B, x.total, 0)), jnp.sum(jnp.where(mask_B, x.weight, 0)))
            for name, x in sums_B.items()
            if name != LOSS
        }
        aux["clipped"] = Sum(jnp.sum(real_B * (norm_B > self.clip)), jnp.sum(real_B))
        state = {name: x for name, x in variables.items() if name not in ("params", GIVEN)}
        return Loss({LOSS: Sum(total, jnp.float32(len(mask_B) * share))}, aux), state

    def finish(self, gradient: Gradient, key: jax.Array) -> Gradient:
        """Adds the noise to the sum of clipped gradients, and counts the step."""
        assert self.mechanism is not None
        leaves, structure = jax.tree.flatten(gradient.grads)
        keys = jax.random.split(jax.random.fold_in(key, _NOISE_KEY), len(leaves))
        scale = self.clip * self.mechanism.noise
        noisy = [g + scale * jax.random.normal(k, g.shape, g.dtype) for g, k in zip(leaves, keys, strict=True)]
        spent = {**gradient.model_state[PRIVACY]}
        spent["steps"] = spent["steps"] + 1
        return gradient._replace(
            grads=jax.tree.unflatten(structure, noisy),
            sums={**gradient.sums, "epsilon": Sum(_spent(spent), jnp.float32(1))},
            model_state={**gradient.model_state, PRIVACY: spent},
        )

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """The task's own, and as ``epsilon`` what the parameters have cost."""
        examples, sums = self.task.evaluate(self.unwrap(variables), batch)
        count = jnp.sum(batch["mask"])
        return examples, {**sums, "epsilon": Sum(count * _spent(variables[PRIVACY]), count)}


def clip_and_sum(grads_B: PyTree, clip: float, mask_B: jax.Array) -> tuple[PyTree, jax.Array]:
    """The sum over examples of gradients [B, ...], each scaled to a norm of at most ``clip``; and the norms, f32[B].

    Those that are masked or not finite count as 0.
    """
    leaves = jax.tree.leaves(grads_B)
    norm_B = jnp.sqrt(sum(jnp.sum(jnp.square(g.reshape(len(g), -1).astype(jnp.float32)), 1) for g in leaves))
    counts_B = mask_B & jnp.isfinite(norm_B)
    factor_B = jnp.where(counts_B, jnp.minimum(1.0, clip / jnp.where(norm_B > 0, norm_B, 1.0)), 0.0)

    def summed(g: jax.Array) -> jax.Array:
        finite = jnp.where(counts_B.reshape(-1, *[1] * (g.ndim - 1)), g, 0)
        return jnp.tensordot(factor_B.astype(g.dtype), finite, 1)

    return jax.tree.map(summed, grads_B), norm_B


def _spent(state: Mapping[str, jax.Array]) -> jax.Array:
    """f32[]: no less than the steps so far cost: of the counts in the curve, the next one's."""
    return state["epsilon"][jnp.minimum(jnp.searchsorted(state["at"], state["steps"]), _CURVE - 1)]


def _chain(task: Any) -> list[Task]:
    """The task and those inside it."""
    found = [task]
    while (task := vars(task).get("task")) is not None:
        found.append(task)
    return found


def _accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise UserError("Private needs dp-accounting; pip install 'bigbase_jax[private]'.") from error
    return dp_accounting
