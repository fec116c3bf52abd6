"""Tiny stand-ins for a task, for tests of what is around tasks."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigbase_jax.core import Loss, Metric, Sum
from bigbase_jax.evaluate import CollectAll
from bigbase_jax.models.transformer import Style


def styled(model, **words):
    """A model of this class, or like this one, whose style's words stand beside its own."""
    names = {field.name for field in dataclasses.fields(Style)} & words.keys()
    style = dataclasses.replace(model.style, **{name: words.pop(name) for name in names})
    return (model if isinstance(model, type) else model.clone)(**words, style=style)


class Net(nn.Module):
    """A dense layer, optionally with BatchNorm."""

    norm: bool = False
    width: int = 5

    @nn.compact
    def __call__(self, x, train=False):
        use_bias = not self.norm  # before a norm, a bias has no gradient but noise
        x = nn.Dense(self.width, use_bias=use_bias, name="hidden")(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.Dense(1, name="out")(jnp.tanh(x))[:, 0]


@dataclasses.dataclass(frozen=True)
class Regression:
    """Squared error of ``Net`` with per-example weights ``mask``."""

    model: nn.Module = dataclasses.field(default_factory=Net)
    batch_coupled: bool = False
    inputs: tuple = ("x",)
    metrics: ClassVar = {"error": Metric("min"), "largest": Metric("min")}

    def init(self, key, batch):
        return self.model.init(key, jnp.zeros(batch["x"].shape))

    def loss(self, variables, batch, key):
        params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
        y, new = self.model.apply({"params": params, **state}, batch["x"], train=True, mutable=list(state))
        total = Sum(jnp.sum(batch["mask"] * (y - batch["y"]) ** 2), jnp.sum(batch["mask"]))
        return Loss({"loss": total}), dict(new)

    def predict(self, variables, inputs):
        return {"y_hat": self.model.apply(variables, inputs["x"])}

    def evaluate(self, variables, batch):
        y_hat = self.predict(variables, batch)["y_hat"]
        error = jnp.abs(y_hat - batch["y"])
        sums = {"error": Sum(jnp.sum(error * batch["mask"]), jnp.sum(batch["mask"]))}
        return {"y_hat": y_hat, "y": batch["y"]}, sums

    def meters(self):
        return {"largest": CollectAll(lambda kept: {"largest": float(abs(kept["y_hat"] - kept["y"]).max())})}

    def postprocess(self, output, example):
        return {"y": float(output["y_hat"])}


@dataclasses.dataclass(frozen=True)
class Detection(Regression):
    """A loss of two terms, one of which counts few rows only, as boxes of pictures are few (Carion et al. 2020)."""

    scale: float = 0.5

    def loss(self, variables, batch, key):
        y = self.model.apply(variables, batch["x"])
        few = batch["mask"] * (batch["x"][:, 0] > 0.3)
        boxes = Sum(jnp.sum(few[:, None] * jnp.abs(y[:, None] - batch["x"])), jnp.sum(few))
        terms = {"classes": Sum(jnp.sum(batch["mask"] * (y - batch["y"]) ** 2), jnp.sum(batch["mask"])), "boxes": boxes}
        return Loss(terms, {"size": Sum(jnp.sum(batch["mask"] * y), jnp.sum(batch["mask"]))}, {"boxes": self.scale}), {}


def regression_batch(size, seed=0, masked=0):
    """A batch of ``size`` rows, of which the last ``masked`` are padding."""
    k1, k2 = jax.random.split(jax.random.key(seed))
    mask = jnp.ones(size).at[size - masked :].set(0.0)
    return {"x": jax.random.normal(k1, (size, 3)), "y": jax.random.normal(k2, (size,)), "mask": mask}


def loss_of(task, variables, batch, key=None):
    """The only term of a task's loss, and the model state after it."""
    loss, state = task.loss(variables, batch, key)
    assert loss.terms.keys() == {"loss"}
    return loss.terms["loss"], state


def sums_of(task, variables, batch):
    """What adds up of a batch, all of which is in ``task.metrics``."""
    sums = task.evaluate(variables, batch)[1]
    assert sums.keys() <= task.metrics.keys()
    return sums


def measured(task, *parts):
    """What a task's meters find in examples, all of which are in ``task.metrics`` or no numbers."""
    found = {}
    for meter in task.meters().values():
        for examples in parts:
            meter.update(examples)
        found |= meter.result()
    assert {name for name, x in found.items() if isinstance(x, (int, float))} <= task.metrics.keys()
    return found
