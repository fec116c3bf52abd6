"""A seeded table, whose truth is known, and a classifier of its rows: for tests of what evaluators make of both."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.data.pipeline import Data
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.classification import Classifier
from bigbase_jax.train import TrainConfig

NOISE, STRONG, PLACE = "noise", "strong", "place"


class Rows:
    """Rows of a strong number, of noise, and of a place that says as much again."""

    in_memory = True

    def __init__(self, n, seed):
        rng = np.random.default_rng(seed)
        self.numbers = rng.normal(size=(n, 2)).astype(np.float32)
        self.categories = rng.integers(1, 4, (n, 1)).astype(np.int32)
        logit = 2 * self.numbers[:, 0] + np.array([0, -1.5, 0, 1.5])[self.categories[:, 0]]
        self.label = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(np.int32)
        self.group = rng.integers(-1, 2, n).astype(np.int32)

    def __len__(self):
        return len(self.label)

    def __getitem__(self, index):
        return {key: getattr(self, key)[index] for key in ("numbers", "categories", "label", "group")}


class Table:
    dataset_info: ClassVar = {
        "class_names": ("no", "yes"),
        "number_names": (STRONG, NOISE),
        "category_names": (PLACE,),
        "cardinalities": (4,),
        "group_names": ("north", "south"),
    }
    description = "made-up rows"

    def __init__(self):
        self.splits = {"train": Rows(512, 0), "val": Rows(300, 1), "test": Rows(300, 2)}

    def fingerprint(self):
        return "rows"

    @staticmethod
    def codec(config, dataset_info):
        return Given()


class Given:
    fields = None

    def decode(self, given):
        return [{"numbers": np.array(given["numbers"], np.float32), "categories": np.array([given[PLACE]], np.int32)}]

    def fit(self, example, shapes):
        return example


class Net(nn.Module):
    width: int = 8
    num_classes: int = 2

    @nn.compact
    def __call__(self, numbers, categories, train=False):
        place = nn.Embed(4, 3)(categories)
        x = jnp.concatenate([numbers, place.reshape(len(numbers), -1)], -1)
        return nn.Dense(self.num_classes)(jnp.tanh(nn.Dense(self.width)(x)))


@dataclasses.dataclass(frozen=True)
class Told(Classifier):
    inputs: ClassVar = ("numbers", "categories")

    def init(self, key, batch):
        return self.model.init(key, batch["numbers"], batch["categories"])

    def train_logits(self, variables, batch, key):
        return self.logits(variables, batch), {}

    def logits(self, variables, inputs):
        return self.model.apply(variables, inputs["numbers"], inputs["categories"])

    def evaluate(self, variables, batch):
        arrays, sums = super().evaluate(variables, batch)
        return {**arrays, "group": jnp.asarray(batch["group"])}, sums


def recipe(steps=60, **evaluators):
    config = ConfigDict({"seed": 0})
    config.data = target(Data, dataset=target(Table), batch_size=64, eval_batch_size=128, cache_limit_gb=0.0)
    config.task = target(Told, model=target(Net))
    config.optim = target(Optimizer, learning_rate=0.05)
    config.train = target(TrainConfig, steps=steps, eval_every=1000, devices=2, writers=())
    config.evaluators = ConfigDict(evaluators)
    return config
