"""Embedding tables: lookups on a mesh, and steps that touch only the rows that a batch reads."""

import dataclasses
import functools
import re
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbase_jax import parallel
from bigbase_jax.core import Loss, Sum, UserError, flatten
from bigbase_jax.models.clicks import DLRM
from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.tables import Table

CARDINALITIES = (3000, 500)
ROWS = 3584  # 3500, rounded up


@dataclasses.dataclass(frozen=True)
class Clicks:
    """A click model with nothing around it."""

    model: Any = dataclasses.field(default_factory=lambda: DLRM(2, CARDINALITIES, width=8, bottom=(8,), top=(16,)))

    batch_coupled: ClassVar[bool] = False
    inputs: ClassVar = ("numbers", "categories")
    metrics: ClassVar = {}

    def init(self, key, batch):
        return self.model.init(key, batch["numbers"], batch["categories"])

    def loss(self, variables, batch, key):
        z_BK = self.model.apply(variables, batch["numbers"], batch["categories"])
        loss_B = optax.softmax_cross_entropy_with_integer_labels(z_BK, batch["label"])
        return Loss({"loss": Sum(jnp.sum(batch["mask"] * loss_B), jnp.sum(batch["mask"]))}), {}


class Pairs(nn.Module):
    """Two lookups in one table, and every row, if ``whole``."""

    whole: bool = False

    @nn.compact
    def __call__(self, numbers, categories):
        table = Table(CARDINALITIES[0], 8, name="items")
        left, right = table(categories[:, 0]), table(categories[:, 1])
        if self.whole:
            left = left + table.attend(left).mean(-1, keepdims=True)
        z = jnp.sum(left * right, -1) + nn.Dense(1)(numbers)[:, 0]
        return jnp.stack([jnp.zeros_like(z), z], -1)


def batch_of(seed, size=64):
    random = np.random.default_rng(seed)
    categories = np.stack([(random.random(size) ** 4 * n).astype(np.int32) for n in CARDINALITIES], 1)
    return {
        "numbers": random.normal(size=(size, 3)).astype(np.float32),
        "categories": categories,
        "label": (categories.sum(1) % 2).astype(np.int32),
        "mask": np.ones(size, np.float32),
    }


def steps(task, devices=1, tx=None, count=3, **how):
    mesh = parallel.make_mesh(devices, parallel.MeshShape(**how.pop("shape", {})))
    first = batch_of(0)
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in first.items()}
    program = parallel.program(task, tx or optax.adam(0.05), spec, mesh, seed=1, **how)
    state = program.init(parallel.put(first, mesh))
    start, losses = jax.device_get(state.params), []
    for seed in range(count):
        state, sums = program.step(state, parallel.put(batch_of(seed), mesh))
        losses.append([float(sums["loss"].mean()), float(sums["grad_norm"].mean())])
    return start, state, losses, (program, mesh, spec)


def assert_same(a, b, tolerance=1e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), a, b)


SPREAD = {"devices": 8, "shape": {"data": 2, "fsdp": 2, "tensor": 2}}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    "form, pieces",
    [({"devices": 4, "shape": {"data": 1, "fsdp": 4}}, 4), (SPREAD, 4)],
)
def test_a_table_lies_on_the_mesh_by_rows_and_is_never_whole(form, pieces, lazy):
    tx = optax.sgd(0.5)  # of which lazy steps are those of the whole table
    _, one, losses, _ = steps(Clicks(), tx=tx)
    start, state, spread_losses, (program, mesh, spec) = steps(Clicks(), tx=tx, **form, lazy_tables=lazy)
    table = state.params["embedding"]["table"]
    assert {shard.data.shape for shard in table.addressable_shards} == {(ROWS // pieces, 8)}
    assert np.abs(start["embedding"]["table"] - table).max() > 1e-3
    assert_same(losses, spread_losses)
    assert_same(jax.device_get(one.params), jax.device_get(state.params))
    text = program.step.lower(program.state, parallel.placed_batch(spec, mesh)).compile().as_text()
    assert f"[{ROWS // pieces},8]" in text
    assert f"[{ROWS},8]" not in text
    assert f"[{ROWS // 2},8]" not in text  # not whole over one of the axes either
    collectives = re.findall(r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)", text)
    assert collectives
    assert not any(re.search(rf"\[{ROWS}\b", shape) for shape in collectives)


def test_lazy_steps_are_those_of_the_rows_that_a_batch_reads():
    """As torch's SparseAdam: a row that no batch reads does not move, one that is read moves as Adam's."""
    _, dense, dense_losses, _ = steps(Clicks(), count=1, ema_decay=0.9)
    start, lazy, losses, _ = steps(Clicks(), count=1, ema_decay=0.9, lazy_tables=True)
    assert_same(dense_losses, losses)
    assert_same(jax.device_get(dense.params), jax.device_get(lazy.params))
    assert_same(jax.device_get(dense.opt_state), jax.device_get(lazy.opt_state))
    assert_same(jax.device_get(dense.ema), jax.device_get(lazy.ema))
    assert np.abs(start["embedding"]["table"] - lazy.params["embedding"]["table"]).max() > 1e-2
    # A second batch moves its own rows alone; Adam's momentum moves those of the first too.
    start, after, _, _ = steps(Clicks(), count=2, lazy_tables=True)
    _, dense, _, _ = steps(Clicks(), count=2)
    read = [np.unique(batch_of(seed)["categories"] + np.array([0, CARDINALITIES[0]])) for seed in (0, 1)]
    only_first = np.setdiff1d(read[0], read[1])
    never = np.setdiff1d(np.arange(ROWS), np.concatenate(read))
    before, table = (np.asarray(s.params["embedding"]["table"]) for s in (lazy, after))
    assert len(only_first) and len(never)
    np.testing.assert_array_equal(before[only_first], table[only_first])
    assert np.abs(table - dense.params["embedding"]["table"])[only_first].max() > 1e-3
    np.testing.assert_array_equal(start["embedding"]["table"][never], table[never])


def test_lazy_adam_is_that_of_torch():
    import torch

    _, state, losses, _ = steps(Clicks(Pairs()), lazy_tables=True, tx=optax.adam(0.05, eps=1e-20))
    start = steps(Clicks(Pairs()), count=0)[0]
    table = torch.nn.Embedding.from_pretrained(torch.tensor(start["items"]["table"]), freeze=False, sparse=True)
    dense = [torch.tensor(start["Dense_0"][k], requires_grad=True) for k in ("kernel", "bias")]
    optimizers = [
        how(params, 0.05, eps=1e-20)  # torch scales the other with the bias correction
        for how, params in ((torch.optim.SparseAdam, table.parameters()), (torch.optim.Adam, dense))
    ]
    for seed in range(3):
        batch = {name: torch.tensor(x) for name, x in batch_of(seed).items()}
        left, right = table(batch["categories"]).unbind(1)
        z = (left * right).sum(1) + (batch["numbers"] @ dense[0] + dense[1])[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, batch["label"].float())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        np.testing.assert_allclose(losses[seed][0], loss.item(), rtol=1e-5)
    np.testing.assert_allclose(state.params["items"]["table"], table.weight.detach(), rtol=1e-4, atol=1e-5)


def test_a_lazy_step_needs_no_memory_for_a_gradient_of_the_table():
    def temporary(lazy):
        task = Clicks(DLRM(2, (200_000, CARDINALITIES[1]), width=8, bottom=(8,), top=(8,)))
        program, mesh, spec = steps(task, count=0, lazy_tables=lazy)[-1]
        return program.step.lower(program.state, parallel.placed_batch(spec, mesh)).compile().memory_analysis()

    table = 200_500 * 8 * 4
    assert temporary(False).temp_size_in_bytes > table
    assert temporary(True).temp_size_in_bytes < table / 4  # an i32 for each row is an eighth


@pytest.mark.parametrize(
    "how, said",
    [
        ({"microbatches": 2}, "takes a batch as a whole"),
        ({"mode": "shard_map"}, "takes a batch as a whole"),
        ({"task": Clicks(Pairs(whole=True))}, "'items', so none can be left out"),
        ({"task": Clicks(DLRM(2, (), width=8))}, "looks into no table"),
    ],
)
def test_where_lazy_steps_cannot_be_is_said(how, said):
    with pytest.raises((UserError, ModelError), match=said):
        steps(how.pop("task", Clicks()), lazy_tables=True, **how)


def test_a_table_is_no_smaller_than_a_row():
    with pytest.raises(ModelError, match="0 rows"):
        Table(0, 4).init(jax.random.key(0), jnp.zeros((2,), jnp.int32))


def test_ids_beyond_the_table_and_products_with_it():
    table = Table(5, 4)
    x, variables = table.init_with_output(jax.random.key(0), jnp.arange(5))
    assert flatten(variables)["params.table"].shape == (128, 4)
    scores = table.apply(variables, x, method="attend")
    assert_same(scores, x @ x.T)
