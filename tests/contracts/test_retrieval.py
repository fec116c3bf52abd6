"""Retrieval, as a user would add it: an encoder of both sides, and an evaluator of two splits.

Legend: B pairs of a batch, D width, Q queries, N items of the catalogue.
"""

import dataclasses
import json
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from bigbase_jax import parallel, verbs
from bigbase_jax.build import target
from bigbase_jax.core import Evaluated, Loss, Metric, Sum, UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.evaluate import collect
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.optim import Optimizer
from bigbase_jax.runtime import restored
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.train import TrainConfig

WIDTH, ITEMS = 6, 32
VALUES = np.random.default_rng(0).normal(size=(ITEMS, WIDTH)).astype(np.float32)
TURN = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)


class Rows:
    """A query and its item, or an item alone, in whose place there is no query."""

    in_memory = True

    def __init__(self, items, queries):
        self.items, self.queries = items, queries

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        noise = np.random.default_rng(index).normal(size=WIDTH).astype(np.float32)
        query = VALUES[item] @ TURN + 0.05 * noise if self.queries else np.zeros(WIDTH, np.float32)
        return {"query": query, "item": VALUES[item], "id": np.int32(item)}


class Shop:
    """Things that people look for, in words of their own."""

    dataset_info: ClassVar = {}
    description = "made-up queries"

    def __init__(self):
        catalogue, queries = np.random.default_rng(2).permutation(ITEMS), np.arange(20) * 7 % ITEMS
        pairs = np.arange(256) % ITEMS
        self.splits = {"train": Rows(pairs, True), "queries": Rows(queries, True), "catalogue": Rows(catalogue, False)}

    def fingerprint(self):
        return "shop"

    @staticmethod
    def codec(config, dataset_info):
        return Given()


class Given:
    fields = None

    def decode(self, given):
        queries = np.asarray(json.loads(given["query"]), np.float32)
        return [{"query": query, "asked": i} for i, query in enumerate(queries)]

    def fit(self, example, shapes):
        return example


@dataclasses.dataclass(frozen=True)
class TwoTowers:
    """A query is nearest to its own item among those of the batch (van den Oord et al. 2018)."""

    model: nn.Module
    inputs: ClassVar = ("query",)
    batch_coupled: ClassVar = True
    metrics: ClassVar = {"loss": Metric("min", "nats")}

    def init(self, key, batch):
        return self.model.init(key, jnp.zeros((1, WIDTH)))

    def loss(self, variables, batch, key):
        scores_BB = 5 * self.predict(variables, batch)["vector"] @ self.items(variables, batch)["vector"].T
        other_BB = (batch["id"][:, None] == batch["id"]) & ~jnp.eye(len(scores_BB), dtype=bool)  # the same item again
        loss_B = jax.nn.logsumexp(jnp.where(other_BB, -jnp.inf, scores_BB), -1) - jnp.diagonal(scores_BB)
        return Loss({"loss": Sum(jnp.sum(batch["mask"] * loss_B), jnp.sum(batch["mask"]))}), {}

    def predict(self, variables, inputs):
        vector_BD = self.model.apply(variables, inputs["query"])
        return {"vector": vector_BD / jnp.linalg.norm(vector_BD, axis=-1, keepdims=True)}

    def items(self, variables, batch):
        item_BD = batch["item"]
        return {"vector": item_BD / jnp.linalg.norm(item_BD, axis=-1, keepdims=True), "id": batch["id"]}

    def evaluate(self, variables, batch):
        return {}, {"loss": self.loss(variables, batch, None)[0].terms["loss"]}

    def meters(self):
        return {}

    def postprocess(self, output, example):
        return {"vector": output["vector"].tolist(), "asked": example["asked"]}


@dataclasses.dataclass
class Recall:
    """The share of queries whose item is among the first ``k`` of the whole catalogue."""

    k: int = 3
    final: bool = False

    @property
    def metrics(self):
        return {f"recall@{self.k}": Metric("max", "%")}

    def run(self, task, variables, data, mesh):
        def batches(split):
            return data.eval_batches(split, parallel.host(mesh))

        def of_queries(variables, batch):
            return {**task.predict(variables, batch), "id": batch["id"]}

        queries = collect(of_queries, variables, batches("queries"), mesh)
        catalogue = collect(task.items, variables, batches("catalogue"), mesh)
        nearest_QN = np.argsort(-queries["vector"] @ catalogue["vector"].T, -1)
        ranked_QK = catalogue["id"][nearest_QN[:, : self.k]]
        right_Q = (ranked_QK == queries["id"][:, None]).any(-1)
        return Evaluated("retrieval", {f"recall@{self.k}": float(right_Q.mean())}, {"ranked": ranked_QK, **queries})


def recipe(**train):
    config = ConfigDict({"seed": 0})
    config.data = target(Data, dataset=target(Shop), batch_size=16, eval_batch_size=8, cache_limit_gb=0.0)
    config.task = target(TwoTowers, model=target(nn.Dense, features=WIDTH))
    config.optim = target(Optimizer, learning_rate=0.05)
    config.evaluators = ConfigDict({"retrieval": target(Recall), "first": target(Recall, k=1, final=True)})
    config.train = target(TrainConfig, steps=30, eval_every=10, devices=2, writers=(), **train)
    return config


def test_an_evaluator_ranks_a_whole_catalogue(tmp_path):
    workdir, seen = str(tmp_path / "run"), []
    config = recipe(best_metric="retrieval/recall@3")
    result = verbs.train(config, workdir, observe=lambda step, metrics: seen.append(metrics))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [(row["step"], row["split"], row["recall@3"]) for row in rows if row["kind"] == "eval"]
    assert [row[:2] for row in evaluated] == [(step, "retrieval") for step in (10, 20, 30)]
    assert [metrics["retrieval/recall@3"] for metrics in seen] == [row[2] for row in evaluated]
    best = max(row[2] for row in evaluated)
    assert result["split"] == "train" and result["retrieval"]["recall@3"] == best > 0.9
    assert 0 < result["first"]["recall@1"] <= best
    assert verbs.evaluate(workdir) == result
    assert verbs.evaluate(workdir, split="retrieval") == result["retrieval"]
    with pytest.raises(UserError, match="Did you mean 'retrieval'"):
        verbs.evaluate(workdir, split="retrival")
    kept = np.load(tmp_path / "run" / "predictions-retrieval.npz")
    assert kept["ranked"].shape == (20, 3) and kept["index"].tolist() == list(range(20))
    assert restored.metrics(RunDir(workdir))["recall@1"] == Metric("max", "%")

    predictor = Predictor.open(workdir)
    two, one = (predictor.answer({"query": json.dumps((VALUES[:n] @ TURN).tolist())}) for n in (2, 1))
    assert [(answer["part"], answer["asked"]) for answer in two] == [(0, 0), (1, 1)]  # nothing is merged
    assert len(one) == 1 and "part" not in one[0]
    np.testing.assert_allclose(one[0]["vector"], two[0]["vector"], rtol=1e-5)
    assert np.linalg.norm(two[1]["vector"]) == pytest.approx(1, rel=1e-5)
