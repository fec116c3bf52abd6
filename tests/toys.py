"""Tiny stand-ins for a task, for tests of what is around tasks."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigbase_jax.core import Sum


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

    def init(self, key, batch):
        return self.model.init(key, jnp.zeros(batch["x"].shape))

    def loss(self, variables, batch, key):
        params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
        y, new = self.model.apply({"params": params, **state}, batch["x"], train=True, mutable=list(state))
        return Sum(jnp.sum(batch["mask"] * (y - batch["y"]) ** 2), jnp.sum(batch["mask"])), dict(new)

    def predict(self, variables, inputs):
        return {"y_hat": self.model.apply(variables, inputs["x"])}

    def metrics(self, outputs, batch):
        error = jnp.abs(outputs["y_hat"] - batch["y"])
        return {"error": Sum(jnp.sum(error * batch["mask"]), jnp.sum(batch["mask"]))}

    def report(self, examples):
        return {"largest": float(abs(examples["y_hat"] - examples["y"]).max())}

    def present(self, output):
        return {"y": float(output["y_hat"])}


def regression_batch(size, seed=0, masked=0):
    """A batch of ``size`` rows, of which the last ``masked`` are padding."""
    k1, k2 = jax.random.split(jax.random.key(seed))
    mask = jnp.ones(size).at[size - masked :].set(0.0)
    return {"x": jax.random.normal(k1, (size, 3)), "y": jax.random.normal(k2, (size,)), "mask": mask}
