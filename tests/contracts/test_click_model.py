"""A click model over a CSV of a million rows, read in columns: what a recommender needs beyond pictures and texts."""

import dataclasses
import time
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow
import pyarrow.csv
import pytest
from ml_collections import ConfigDict

from bigbase_jax.build import deferred, target
from bigbase_jax.core import Loss, Metric, Sum
from bigbase_jax.data.pipeline import Data
from bigbase_jax.evaluate import CollectAll
from bigbase_jax.optim import Optimizer
from bigbase_jax.train import TrainConfig, train

ROWS, BATCH = 1_000_000, 16384
FEATURES = {"user": 50_000, "item": 1000, "hour": 24, "weekday": 7, "site": 8, "device": 5}  # and how many values


class Columns:
    """A ``Source`` over the columns of a table, each of the smallest type: the features, and ``label`` i32[]."""

    in_memory = True

    def __init__(self, columns):
        self.columns, self.labels = columns, columns["label"]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}

    def batch(self, indices):
        return {name: column[indices] for name, column in self.columns.items()}


class RowByRow(Columns):
    batch = None


class Clicks:
    dataset_info: ClassVar = {"num_classes": 2, "class_names": ("passed", "clicked")}
    description = "a million impressions for a test"

    def __init__(self, path: str, by_column: bool = True):
        table, kind = pyarrow.csv.read_csv(path), Columns if by_column else RowByRow
        columns = {name: table[name].to_numpy().astype(np.min_scalar_type(n)) for name, n in FEATURES.items()}
        columns["label"] = table["click"].to_numpy().astype(np.int32)
        cuts = {"train": slice(0, -40_000), "val": slice(-40_000, -20_000), "test": slice(-20_000, None)}
        self.splits = {split: kind({k: c[rows] for k, c in columns.items()}) for split, rows in cuts.items()}

    def fingerprint(self):
        return "clicks"


class Hashed(nn.Module):
    """Logistic regression: the sum of a weight for each feature's value, in hashed buckets."""

    buckets: int = 1 << 14

    @nn.compact
    def __call__(self, features):
        salt = [np.uint32(i * 0x9E3779B9 % 2**32) for i in range(len(features))]
        ids_BF = jnp.stack([x.astype(jnp.uint32) + s for x, s in zip(features, salt, strict=True)], 1)
        embed = nn.Embed(self.buckets, 1, embedding_init=nn.initializers.zeros)
        hashed_BF = (ids_BF * np.uint32(0x85EBCA6B) >> 16) % self.buckets
        return embed(hashed_BF).sum((1, 2)) + self.param("bias", nn.initializers.zeros, ())


@dataclasses.dataclass(frozen=True)
class Click:
    model: nn.Module
    inputs: ClassVar = tuple(FEATURES)
    batch_coupled: ClassVar = False
    metrics: ClassVar = {"loss": Metric("min"), "auc": Metric("max", "%", "area under the ROC curve")}

    def init(self, key, batch):
        return self.model.init(key, [jnp.zeros(batch[name].shape) for name in FEATURES])

    def predict(self, variables, inputs):
        return {"logit": self.model.apply(variables, [inputs[name] for name in FEATURES])}

    def evaluate(self, variables, batch):
        logit_B = self.predict(variables, batch)["logit"]
        loss_B = optax.sigmoid_binary_cross_entropy(logit_B, batch["label"].astype(jnp.float32))
        return {"logit": logit_B, "label": batch["label"]}, {
            "loss": Sum((loss_B * batch["mask"]).sum(), batch["mask"].sum())
        }

    def loss(self, variables, batch, key):
        return Loss(self.evaluate(variables, batch)[1]), {}

    def meters(self):
        return {"auc": CollectAll(lambda seen: {"auc": auc(seen["logit"], seen["label"])})}

    def postprocess(self, output, example):
        return {"click": float(1 / (1 + np.exp(-output["logit"])))}


def auc(scores, labels):
    ranks = np.argsort(np.argsort(scores)) + 1
    clicked = labels == 1
    return float((ranks[clicked].mean() - (clicked.sum() + 1) / 2) / (~clicked).sum())


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {name: rng.integers(0, n, ROWS) for name, n in FEATURES.items()}
    logit = rng.normal(size=1000)[columns["item"]] + rng.normal(size=24)[columns["hour"]] - 1
    columns["click"] = (rng.random(ROWS) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    path = tmp_path_factory.mktemp("clicks") / "clicks.csv"
    pyarrow.csv.write_csv(pyarrow.table(columns), path)
    return str(path)


def test_a_click_model_learns_from_a_table_read_in_columns(csv, tmp_path, monkeypatch):
    monkeypatch.delattr(Columns, "__getitem__")  # nothing reads a row
    config = ConfigDict({"seed": 0})
    config.data = target(Data, dataset=target(Clicks, path=csv), batch_size=BATCH)
    config.task = target(Click, model=target(Hashed))
    config.optim = target(Optimizer, learning_rate=0.03, algorithm=deferred(optax.adam))
    config.train = target(TrainConfig, steps=60, writers=(), devices=1, best_metric="auc")
    result = train(config, str(tmp_path))
    assert result["split"] == "test" and result["auc"] > 0.7 and result["loss"] < 0.6


def test_reading_by_columns_gives_50_times_the_rows_per_second(csv, tmp_path):
    """Through the same pipeline, to the same batches, in processor time: what else the machine does costs none."""
    prepared = {}
    for by_column in (True, False):
        data = Data(Clicks(csv, by_column), BATCH, workers=1, prefetch=1, cache_dir=str(tmp_path))
        prepared[by_column] = data.prepare(lambda line: None)

    def rate(by_column, count):
        with prepared[by_column].train_batches() as batches:
            first = next(batches)
            began = time.process_time()
            for _ in range(count):
                next(batches)
            return first, count * BATCH / (time.process_time() - began)

    (expected, slow), (found, fast) = rate(False, 3), max((rate(True, 60) for _ in range(3)), key=lambda x: x[1])
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], strict=True)
    print(f"{fast:,.0f} rows per second by columns, {slow:,.0f} row by row: {fast / slow:.0f} times")
    assert fast > 50 * slow
