"""Mixing is linear in pictures and labels, local to pairs, and touches nothing but the loss."""

import copy
import dataclasses
import functools
import pickle

import jax
import numpy as np
import pytest
from toys import loss_of, measured

from bigbase_jax.core import UserError, add, flatten
from bigbase_jax.models.mlp import MLP
from bigbase_jax.parallel import FROZEN
from bigbase_jax.pretrained.start import chain
from bigbase_jax.pretrained.start import merged as merged_by_all
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.wrappers.adapter import load_adapter, save_adapter
from bigbase_jax.wrappers.lora import LoRA
from bigbase_jax.wrappers.mix import Mix

TASK = Classification(MLP(3, hidden=()), mean=(0.5,), std=(0.25,))
KEY = jax.random.key(0)


def batch_of(size=8, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, 6, 5, 1), dtype=np.uint8)
    return {"image": image, "label": rng.integers(0, 3, size), "mask": np.ones(size, np.float32)}


VARIABLES = TASK.init(KEY, batch_of())


def swapped(x):
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def keeps(mix, count=200, H=16, W=12):
    return np.asarray(jax.jit(jax.vmap(lambda k: mix.keep(k, H, W)))(jax.random.split(KEY, count)))


@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)])
def test_loss_is_that_of_mixed_pictures_and_labels(alphas):
    mix, batch = Mix(TASK, *alphas), batch_of()
    key = jax.random.key(3)
    loss, _ = jax.jit(functools.partial(loss_of, mix))(VARIABLES, batch, key)
    keep = np.asarray(mix.keep(jax.random.split(key)[0], 6, 5))[None, ..., None]
    assert 0.05 < keep.mean() < 0.95
    pixels = (batch["image"] / 255 - 0.5) / 0.25
    mixed = {**batch, "image": (keep * pixels + (1 - keep) * swapped(pixels)).astype(np.float32)}
    own, other = (
        loss_of(TASK, VARIABLES, {**mixed, "label": y}, KEY)[0] for y in (batch["label"], swapped(batch["label"]))
    )
    np.testing.assert_allclose(loss.total, keep.mean() * own.total + (1 - keep.mean()) * other.total, rtol=1e-5)
    assert loss.weight == 8
    assert abs(loss.total - loss_of(TASK, VARIABLES, batch, KEY)[0].total) > 1e-3


def test_mixup_is_even_and_beta_distributed():
    keep = keeps(Mix(TASK, mixup_alpha=0.4), 2000)
    np.testing.assert_array_equal(keep, np.broadcast_to(keep[:, :1, :1], keep.shape))
    share = keep[:, 0, 0]
    assert abs(share.mean() - 0.5) < 0.03
    assert abs(share.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.01  # of Beta(a, a)


def test_cutmix_cuts_one_box_inside_the_picture():
    keep = keeps(Mix(TASK, cutmix_alpha=1.0))
    assert set(np.unique(keep)) == {0.0, 1.0}
    for cut in keep == 0:
        rows, columns = cut.any(1), cut.any(0)
        np.testing.assert_array_equal(cut, rows[:, None] & columns)
        assert all(np.abs(np.diff(axis.astype(int), prepend=0, append=0)).sum() in (0, 2) for axis in (rows, columns))
    cut_share = 1 - keep.mean((1, 2))
    assert cut_share.min() < 0.05 and cut_share.max() > 0.6


def test_both_and_prob():
    kinds = np.array([set(np.unique(k)) <= {0.0, 1.0} for k in keeps(Mix(TASK, 1.0, 1.0))])
    assert 0.35 < kinds.mean() < 0.65
    untouched = np.all(keeps(Mix(TASK, 1.0, prob=0.3)) == 1, (1, 2))
    assert 0.55 < untouched.mean() < 0.85


def test_pairs_are_local_so_even_slices_add_up():
    mix, batch = Mix(TASK, 1.0), batch_of()
    loss = jax.jit(functools.partial(loss_of, mix))
    whole = loss(VARIABLES, batch, KEY)[0]
    slices = [{name: x[rows] for name, x in batch.items()} for rows in (slice(0, 2), slice(2, 8))]
    np.testing.assert_allclose(add(*(loss(VARIABLES, s, KEY)[0] for s in slices)), whole, rtol=1e-5)


def test_padding_is_never_mixed_in():
    mix, batch = Mix(TASK, 1.0), batch_of()
    batch["mask"][-1:] = 0
    other = {**batch, "image": batch["image"].copy(), "label": batch["label"].copy()}
    other["image"][-1], other["label"][-1] = 255, (other["label"][-1] + 1) % 3
    loss = jax.jit(functools.partial(loss_of, mix))
    np.testing.assert_array_equal(*(loss(VARIABLES, b, KEY)[0] for b in (batch, other)))


def test_everything_else_is_the_tasks():
    mix, batch = Mix(TASK, 0.2), batch_of()
    assert (mix.inputs, mix.batch_coupled) == (TASK.inputs, TASK.batch_coupled)
    jax.tree.map(np.testing.assert_array_equal, mix.init(KEY, batch), VARIABLES)
    outputs, sums = mix.evaluate(VARIABLES, batch)
    np.testing.assert_array_equal(outputs["logits"], TASK.predict(VARIABLES, batch)["logits"])
    assert set(sums) == {"loss", "accuracy"}
    host = {name: np.asarray(x) for name, x in outputs.items()}
    assert "per_class" in measured(mix, host)
    assert mix.postprocess({name: x[0] for name, x in host.items()}, {})["label"] in "012"


def test_what_else_the_task_has_is_had_too(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Worth(Classification):
        def shown(self):
            return "yes"

    mix = Mix(Worth(TASK.model), 0.2)
    assert mix.shown() == "yes" and mix.model is TASK.model
    assert mix.one_hot(np.array([1])).tolist() == [[0, 1, 0]]
    for absent in ("shown", "place", "unwrap", "task_"):
        assert not hasattr(Mix(TASK, 0.2), absent)
    assert pickle.loads(pickle.dumps(copy.deepcopy(Mix(TASK, 0.2)))) == Mix(TASK, 0.2)


def test_an_adapter_may_be_inside(tmp_path):
    batch, words = batch_of(), {"targets": "dense|head", "rank": 2}
    inside, outside = Mix(LoRA(TASK, **words), 1.0), LoRA(Mix(TASK, 1.0), **words)
    variables = outside.init(KEY, batch)
    variables["params"] = jax.tree.map(lambda x: x + jax.random.normal(KEY, x.shape), variables["params"])
    one, two = (loss_of(task, variables, batch, KEY)[0] for task in (inside, outside))
    np.testing.assert_allclose(one, two, rtol=1e-6)
    assert abs(one.total - loss_of(Mix(TASK, 1.0), VARIABLES, batch, KEY)[0].total) > 1e-3  # the adapter matters
    name = next(iter(flatten(TASK.init(KEY, batch)["params"])))
    assert inside.place(name) == outside.place(name) and inside.place(name)[0] == FROZEN
    for merged in (inside.unwrap(variables), merged_by_all(inside, variables), merged_by_all(outside, variables)):
        jax.tree.map(np.testing.assert_array_equal, merged, outside.unwrap(variables))
    save_adapter(tmp_path, next(t for t in chain(inside) if isinstance(t, LoRA)), variables)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path, outside, variables), variables)


def test_mistakes_are_told():
    with pytest.raises(UserError, match="even number of examples in each slice, not 7"):
        loss_of(Mix(TASK, 0.2), VARIABLES, batch_of(7), KEY)
    with pytest.raises(UserError, match="at least one of them a positive"):
        Mix(TASK)
    with pytest.raises(UserError, match=r"prob is 1\.5"):
        Mix(TASK, 0.2, prob=1.5)
    with pytest.raises(UserError, match="classification task, not MLP"):
        Mix(MLP(2), 0.2)
