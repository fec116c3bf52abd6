"""Structured pruning: what nothing reads can go, and the model that is left gives the same outputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from marks import some_slow
from ml_collections import ConfigDict

from bigbase_jax.build import build, target
from bigbase_jax.compress.compressed import Compressed, Unrolled
from bigbase_jax.compress.prune import prune
from bigbase_jax.compress.structured import _groups
from bigbase_jax.compress.units import rows_of
from bigbase_jax.core import Loss, Sum, flatten
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.models.mlp import MLP
from bigbase_jax.models.resnet import CifarResNet, ResNet
from bigbase_jax.models.transformer import LLAMA, stack_blocks, unstack_blocks
from bigbase_jax.models.vit import ViT


@dataclasses.dataclass(frozen=True)
class Probe:
    """A task whose prediction is what its model gives of all inputs, in order."""

    model: object
    inputs: tuple = ("a",)

    def init(self, key, batch):
        return self.model.init(key, *(batch[name] for name in self.inputs))

    def predict(self, variables, batch):
        out = self.model.apply(variables, *(batch[name] for name in self.inputs))
        return out["classes"] if isinstance(out, dict) else out

    def loss(self, variables, batch, key):
        params = {"params": variables["params"]}
        state = {name: x for name, x in variables.items() if name != "params"}
        out = self.predict({**params, **state}, batch)
        return Loss({"loss": Sum(jnp.sum(jnp.square(out - 1)), jnp.float32(len(out)))}), state


T = {"width": 16, "depth": 3, "heads": 4, "mlp_dim": 12}
TEXT = {"vocab_size": 11, "length": 6}
PICTURE, WORDS = ((2, 16, 16, 3), float), ((2, 6), int)
LLAMA_2 = dataclasses.replace(LLAMA, kv_heads=2, window=3, windowed=(True, False), qk_norm=True)
T5 = dataclasses.replace(LLAMA, gated=False, scale=1.0)
ALL = {"heads": 0.5, "mlp": 0.25, "layers": 1 / 3}
FAMILIES = {
    "vit": (ViT(num_classes=3, patch=8, **T), PICTURE, ALL),
    "bert": (Bert(num_classes=3, dropout=0.0, **T, **TEXT), WORDS, ALL),
    "gpt2, scanned": (Decoder(**T, **TEXT, scan=True), WORDS, ALL),
    "llama, whole groups": (Decoder(**T, **TEXT, positions="rope", style=LLAMA_2, tied=False), WORDS, ALL),
    "llama, queries of each group": (
        Decoder(**T, **TEXT, positions="rope", style=dataclasses.replace(LLAMA, kv_heads=1)),
        WORDS,
        {"heads": 0.25},
    ),
    "translation": (EncoderDecoder(**T, **TEXT, scan=True, decoder_depth=2), (*WORDS, "target"), ALL | {"layers": 0.4}),
    "t5": (EncoderDecoder(**T, **TEXT, positions="relative", style=T5), (*WORDS, "target"), ALL),
    "classic": (ConvNet(3, (4, 8), 6, (1, 2)), PICTURE, {"channels": 0.25, "dense": 0.5}),
    "convnet": (ConvNet(3, (4, 8), 0, norm=True, pool="mean"), PICTURE, {"channels": 0.5}),
    "resnet": (ResNet(3, 18, 4, "cifar"), PICTURE, {"channels": 0.25}),
    "bottlenecks": (ResNet(3, 50, 2, "patch"), PICTURE, {"channels": 0.5}),
    "cifar, padded": (CifarResNet(3, 8, 10), PICTURE, {"channels": 0.3}),
    "cifar": (CifarResNet(3, 14, 4, "conv"), PICTURE, {"channels": 0.25}),
    "mlp": (MLP(3, (8, 6)), PICTURE, {"dense": 0.5}),
}


def made(model, shape, kind, *more):
    """The task, its variables with biases and statistics that are not their first ones, and a batch."""
    rng = np.random.default_rng(0)
    task = Probe(model, ("a", *more))
    fill = (lambda: rng.integers(1, 11, shape)) if kind is int else (lambda: rng.normal(size=shape).astype(np.float32))
    batch = {name: fill() for name in task.inputs}
    variables = jax.jit(task.init)(jax.random.key(0), batch)

    def noisy(path, x):
        if (path[-1] == "bias" and not path[-2].startswith("norm")) or path[-1] == "mean":
            return 0.3 * rng.normal(size=x.shape).astype(np.float32)
        return np.asarray(x)

    return task, jax.tree.map(lambda x: x, _mapped(noisy, variables)), batch


def _mapped(f, tree):
    return unflatten_dict({path: f(path, x) for path, x in flatten_dict(tree).items()})


def compressed(task, variables):
    node = target(type(task.model), **{k: v for k, v in _fields(task.model).items() if v is not None})
    return Compressed(ConfigDict({"task": {"model": node}, "compression": {}}), task, variables)


def _fields(model):
    return {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ("parent", "name")}


def with_dead_units(found, shares, batch, made_of_zeros=False):
    """Variables in which, of each group, as many units as are to go are read with zeros; and which units are not."""
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    model = Unrolled.of(found, spec)
    rows, _ = rows_of(model.model, {k: x.shape for k, x in flatten(model.variables["params"]).items()}, shares)
    rng, alive = np.random.default_rng(1), {}
    arrays = {name: np.array(x) for name, x in flatten(model.variables).items()}
    for stacked in (False, True):
        tree = _tree(arrays)
        arrays = {name: np.array(x) for name, x in flatten(stack_blocks(tree) if stacked else tree).items()}
        groups = _groups(_tree(arrays), [row for row in rows if row.group.startswith("layers") == stacked])
        for group, places in groups.items():
            row = places[0].row
            parts = np.array_split(np.arange(len(row.places)), row.chunks)
            counts = [row.keep * (i + 1) // row.chunks - row.keep * i // row.chunks for i in range(row.chunks)]
            alive[group] = np.concatenate([np.sort(rng.permutation(p)[:k]) for p, k in zip(parts, counts, strict=True)])
            dead = np.setdiff1d(np.arange(len(row.places)), alive[group])
            for path, axis, row in places:
                if row.reads != (made_of_zeros and not stacked) and path.startswith("params."):
                    np.moveaxis(arrays[path], axis, 0)[row.places[dead].reshape(-1)] = 0
        if stacked:
            arrays = flatten(unstack_blocks(_tree(arrays)))
    return spec, model.rolled(_tree(arrays)), alive


def _tree(arrays):
    return unflatten_dict(arrays, sep=".")


def words(shares, **more):
    return ",".join(f"{name}={x}" for name, x in {**shares, **more}.items())


CASES = [(name, "magnitude") for name in FAMILIES] + [
    ("vit", "taylor"),
    ("t5", "taylor"),
    ("llama, whole groups", "activation"),
    ("classic", "activation"),
    ("cifar, padded", "taylor"),
    ("cifar, padded", "activation"),
]
ALIKE = [(name, "magnitude") for name in ("llama, queries of each group", "cifar", "cifar, padded")] + [
    ("t5", "taylor")
]


@pytest.mark.parametrize("case", some_slow(CASES, *ALIKE), ids=", ".join)
def test_units_that_nothing_reads_go_and_the_outputs_stay(case):
    name, score = case
    model, input_, shares = FAMILIES[name]
    task, variables, batch = made(model, *input_)
    found = compressed(task, variables)
    spec, dead, alive = with_dead_units(found, shares, batch, made_of_zeros=score == "activation")
    found = found._replace(variables=dead)
    after = prune(found, words(shares, score=score), spec, lambda: [batch])
    left = {stack: alive.get(f"layers {stack}", range(3)) for stack in ("encoder", "decoder")}
    gone = [f"{stack}.block_{i}." for stack, blocks in left.items() for i in range(3) if i not in blocks]
    for group, index in alive.items():
        if score == "magnitude" and not any(
            block in f"{group} ".replace(" ", ".") for block in gone
        ):  # other zeros are ties
            assert after.about["kept"][group] == index.tolist(), group
    sizes = [sum(x.size for x in jax.tree.leaves(v["params"])) for v in (variables, after.variables)]
    assert sizes[1] < sizes[0]
    fresh = jax.eval_shape(after.task.init, jax.random.key(0), batch)
    assert {k: x.shape for k, x in flatten(fresh).items()} == {k: x.shape for k, x in flatten(after.variables).items()}
    rebuilt = build(after.config.task.model)
    assert _fields(rebuilt) == _fields(after.task.model)
    before, now = (jax.jit(t.predict)(v, batch) for t, v in ((task, dead), (after.task, after.variables)))
    assert np.abs(before - jax.jit(task.predict)(variables, batch)).max() > 1e-3  # what died was alive
    np.testing.assert_allclose(now, before, rtol=1e-5, atol=1e-6)
