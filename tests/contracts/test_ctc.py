"""Connectionist temporal classification over sequences of three buckets, as a user would add it.

Legend: B sequences of a batch, T frames, F features of one, V symbols (0: blank), U labels of a sequence.
"""

import dataclasses
import json
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from bigbase_jax import verbs
from bigbase_jax.build import target
from bigbase_jax.core import Loss, Metric, Sum
from bigbase_jax.data.pipeline import Data
from bigbase_jax.evaluate import Totals
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.optim import Optimizer
from bigbase_jax.train import TrainConfig

F, V, T, U = 5, 4, 24, 5
SOUNDS = np.random.default_rng(0).normal(size=(V, F)).astype(np.float32)


class Sequences:
    """Symbols, each held for one to three frames, a silence after each."""

    in_memory = True
    sequences = ("frames",)

    def __init__(self, count, seed):
        self._rows = []
        for n in range(count):
            rng = np.random.default_rng((seed, n))
            labels = rng.integers(1, V, rng.integers(1, U + 1))
            held = [part for label in labels for part in ([label] * rng.integers(1, 4), [0])]
            self._rows.append((labels, np.concatenate(held)[:T].astype(int), rng.normal(size=(T, F))))
        self.lengths = np.array([len(symbols) for _, symbols, _ in self._rows])

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        labels, symbols, noise = self._rows[index]
        frames = np.zeros((T, F), np.float32)
        frames[: len(symbols)] = SOUNDS[symbols] + 0.05 * noise[: len(symbols)]
        return {
            "frames": frames,
            "length": np.int32(len(symbols)),
            "labels": np.pad(labels, (0, U - len(labels)), constant_values=-1).astype(np.int32),
        }


class Speech:
    """Symbols that sound."""

    dataset_info: ClassVar = {"num_symbols": V}
    description = "made-up sounds"

    def __init__(self):
        self.splits = {"train": Sequences(256, 0), "val": Sequences(37, 1)}

    def fingerprint(self):
        return "sounds"

    @staticmethod
    def codec(config, dataset_info):
        return Frames()


class Frames:
    fields = None

    def decode(self, given):
        frames = np.asarray(json.loads(given["frames"]), np.float32)
        return [{"frames": frames, "length": np.int32(len(frames)), "name": given["name"]}]

    def fit(self, example, shapes):
        missing = shapes["frames"][0] - len(example["frames"])
        return {**example, "frames": np.pad(example["frames"], ((0, missing), (0, 0)))}


@dataclasses.dataclass(frozen=True)
class CTC:
    """Frames to symbols (Graves et al. 2006), read greedily and measured by edits per symbol."""

    model: nn.Module
    num_symbols: int | None = None
    inputs: ClassVar = ("frames", "length")
    batch_coupled: ClassVar = False
    metrics: ClassVar = {"loss": Metric("min", "nats"), "error_rate": Metric("min", "%", "Symbol error rate")}

    def init(self, key, batch):
        return self.model.init(key, jnp.zeros((1, *batch["frames"].shape[1:])))

    def loss(self, variables, batch, key):
        return Loss({"loss": self._sum(self.model.apply(variables, batch["frames"]), batch)}), {}

    def predict(self, variables, inputs):
        return {"symbols": self._read(self.model.apply(variables, inputs["frames"]), inputs)}

    def evaluate(self, variables, batch):
        logits_BTV = self.model.apply(variables, batch["frames"])
        arrays = {"symbols": self._read(logits_BTV, batch), "labels": batch["labels"]}
        return arrays, {"loss": self._sum(logits_BTV, batch)}

    def meters(self):
        def count(examples):
            rows = list(zip(examples["symbols"], examples["labels"], strict=True))
            edits = sum(distance(said[said > 0].tolist(), true[true > 0].tolist()) for said, true in rows)
            return {"edits": edits, "symbols": (examples["labels"] > 0).sum()}

        return {"errors": Totals(count, lambda sums: {"error_rate": float(sums["edits"] / sums["symbols"])})}

    def postprocess(self, output, example):
        symbols = output["symbols"][output["symbols"] > 0].tolist()
        return {"name": example["name"], "frames": int(example["length"]), "symbols": symbols}

    def _sum(self, logits_BTV, batch):
        nothing_BT = jnp.arange(logits_BTV.shape[1]) >= batch["length"][:, None]
        none_BU = batch["labels"] < 0
        nats_B = optax.ctc_loss(logits_BTV, nothing_BT * 1.0, jnp.maximum(batch["labels"], 0), none_BU * 1.0)
        return Sum(jnp.sum(batch["mask"] * nats_B), jnp.sum(batch["mask"] * jnp.sum(~none_BU, 1)))

    def _read(self, logits_BTV, inputs):
        """i32[B,T]: where a symbol begins, that symbol; 0 elsewhere, -1 behind the end."""
        best_BT = jnp.argmax(logits_BTV, -1)
        begins_BT = best_BT != jnp.pad(best_BT, ((0, 0), (1, 0)))[:, :-1]
        real_BT = jnp.arange(best_BT.shape[1]) < inputs["length"][:, None]
        return jnp.where(real_BT, best_BT * begins_BT, -1)


def distance(a, b):
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def recipe(**data):
    config = ConfigDict({"seed": 0})
    config.data = target(Data, dataset=target(Speech), batch_size=16, cache_limit_gb=0.0, **data)
    config.task = target(CTC, model=target(nn.Dense, features=V))
    config.optim = target(Optimizer, learning_rate=0.1)
    config.train = target(TrainConfig, steps=40, eval_every=40, devices=2, microbatches=2, writers=())
    return config


def test_sequences_of_three_lengths_are_trained_evaluated_and_predicted(tmp_path):
    workdir = str(tmp_path / "run")
    config = recipe(buckets=(8, 14))
    data = Data(Speech(), 16, buckets=(8, 14), cache_limit_gb=0).prepare(lambda line: None)
    assert [batch["frames"].shape[1] for batch in data.train_shapes()] == [8, 14, T]
    result = verbs.train(config, workdir)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert result["error_rate"] < 0.1 and result["loss"] < first["loss"] / 4
    assert verbs.evaluate(workdir) == result
    kept = np.load(tmp_path / "run" / "predictions-val.npz")
    source = Speech().splits["val"]
    assert kept["symbols"].shape == (37, T) and ((kept["symbols"] >= 0).sum(1) == source.lengths).all()
    np.testing.assert_array_equal(kept["labels"], [source[i]["labels"] for i in range(37)])

    rows = [source[i] for i in (3, 5)]
    given = [
        {"frames": json.dumps(row["frames"][: row["length"]].tolist()), "name": f"clip {i}"}
        for i, row in enumerate(rows)
    ]
    predictor = Predictor.open(workdir)
    answers = [answer for row in given for answer in predictor.answer(row)]
    for i, (answer, row) in enumerate(zip(answers, rows, strict=True)):
        assert (answer["name"], answer["frames"]) == (f"clip {i}", row["length"])
        symbols = kept["symbols"][(3, 5)[i]]
        assert answer["symbols"] == symbols[symbols > 0].tolist() != []


def test_buckets_change_what_is_padded_and_nothing_else(tmp_path):
    """The same parameters are measured alike, by batches of one length and of three."""
    found = []
    for name, buckets in (("one", ()), ("three", (8, 14))):
        config = recipe(buckets=buckets)
        config.optim.learning_rate = 0.0
        config.train.steps = 1
        found.append(verbs.train(config, str(tmp_path / name)))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5) and found[0]["loss"] > 0.5
    assert found[0]["error_rate"] == found[1]["error_rate"]
