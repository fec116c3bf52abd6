"""Quantised layers compute with the small numbers that are stored, whatever the model.

Axes: B examples, M inputs, N outputs.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractDevice, AbstractMesh
from marks import some_slow

from bigbase_jax.core import UserError, flatten
from bigbase_jax.inference.generation import Engine, SamplingParams
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.models.layers import product
from bigbase_jax.models.resnet import CifarResNet
from bigbase_jax.models.vit import ViT
from bigbase_jax.parallel import FROZEN
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.tasks.language import CausalLanguageModel
from bigbase_jax.tasks.text_classification import TextClassification
from bigbase_jax.tasks.translation import Translation
from bigbase_jax.wrappers import quantised
from bigbase_jax.wrappers.frozen import Frozen
from bigbase_jax.wrappers.lora import LoRA
from bigbase_jax.wrappers.quantised import Quantised

GPU = AbstractMesh((1,), ("device",), abstract_device=AbstractDevice("gpu", None, platform="gpu"))
KEY = jax.random.key(0)
SMALL = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 40, (4, 8)).astype(np.int32)
ONES = np.ones_like(TOKENS)
BATCH = {
    "image": RNG.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8),
    "label": RNG.integers(0, 3, 4),
    "mask": np.ones(4, np.float32),
    "segment_ids": ONES,
    "token_type_ids": 0 * ONES,
    "positions": np.cumsum(ONES, 1, dtype=np.int32) - 1,
    "source_segments": ONES,
    "bytes": ONES,
    **dict.fromkeys(("tokens", "inputs", "targets", "source", "target_in", "target_out"), TOKENS),
}
FAMILIES = {
    "convnet": lambda: Classification(ConvNet(3, stages=(8, 8), depths=(1, 1), dense=0, norm=True, pool="mean")),
    "resnet": lambda: Classification(CifarResNet(3, depth=8, width=8)),
    "vit": lambda: Classification(ViT(3, patch=8, **SMALL)),
    "bert": lambda: TextClassification(Bert(vocab_size=40, length=8, **SMALL), num_classes=3),
    "decoder": lambda: CausalLanguageModel(Decoder(vocab_size=40, length=8, **SMALL)),
    "translation": lambda: Translation(EncoderDecoder(vocab_size=40, length=8, **SMALL)),
}


def inputs_of(task):
    return {name: BATCH[name] for name in task.inputs}


def products(jaxpr):
    """The types of both sides of every product and convolution, also inside of what the program calls."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield tuple(str(x.aval.dtype) for x in eqn.invars[:2])
        for inner in jax.core.jaxprs_in_params(eqn.params):
            yield from products(inner)


@pytest.mark.parametrize("family", some_slow(FAMILIES, "vit", "bert"))
def test_every_family_computes_with_the_stored_numbers(family):
    task = FAMILIES[family]()
    variables, inputs = jax.jit(task.init)(KEY, BATCH), inputs_of(task)
    small = Quantised(task, "int8", dynamic=True, stored=True)
    chosen = small.chosen(variables, BATCH)
    stored = jax.jit(lambda v: small.store(v, chosen))(variables)
    assert not [path for path in flatten(stored["params"]) if path.endswith(("kernel", "embedding", "head"))]
    like = jax.eval_shape(small.init, KEY, BATCH)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), stored) == jax.tree.map(lambda x: (x.shape, x.dtype), like)

    layers = sum(N > 0 for N in chosen.values())
    with jax.sharding.use_abstract_mesh(GPU):  # on a CPU convolutions are float32
        found = list(products(jax.make_jaxpr(small.predict)(stored, inputs).jaxpr))
    assert found.count(("int8", "int8")) >= layers > 0
    plain, after = jax.jit(task.predict)(variables, inputs), jax.jit(small.predict)(stored, inputs)
    name = next(name for name, x in plain.items() if x.dtype == jnp.float32)
    error = jnp.linalg.norm(after[name] - plain[name]) / jnp.linalg.norm(plain[name])
    assert 0 < error < 0.05


class Layers(nn.Module):
    """One of each kind of layer."""

    @nn.compact
    def __call__(self, x_BM):
        x = nn.DenseGeneral((2, 8), dot_general=product, name="heads")(x_BM)
        x = nn.DenseGeneral(12, axis=(-2, -1), dot_general=product, name="join")(x)
        x = nn.Conv(8, (3, 3), name="conv")(x.reshape(-1, 2, 3, 2))
        return nn.Dense(4, name="out")(x.reshape(len(x), -1))


class Net:
    """A task of ``Layers``."""

    inputs = ("x",)

    def init(self, key, batch):
        return Layers().init(key, jnp.zeros((1, 16)))

    def predict(self, variables, inputs):
        return {"y": Layers().apply(variables, inputs["x"])}

    def loss(self, variables, batch, key):
        return jnp.sum(self.predict(variables, batch)["y"] ** 2), {}


X = {"x": np.asarray(jax.random.normal(KEY, (5, 16)))}


@pytest.mark.parametrize("scheme, bound", [("int8_weights", 0.02), ("int4", 0.2), ("int8", 0.03), ("fp8", 0.15)])
def test_layer_by_layer_the_error_is_that_of_the_type(scheme, bound):
    task = Net()
    variables = task.init(KEY, X)
    small = Quantised(task, scheme, dynamic=True, stored=True)
    stored = jax.jit(lambda v: small.store(v, small.chosen(variables, X)))(variables)

    def outputs(method, values):
        seen = {}

        def note(call, args, kwargs, context):
            y = call(*args, **kwargs)
            if context.method_name == "__call__" and context.module.name:
                seen[context.module.name] = y
            return y

        with nn.intercept_methods(note):
            method(values, X)
        return seen

    plain, after = (jax.jit(outputs, static_argnums=0)(t.predict, v) for t, v in ((task, variables), (small, stored)))
    large = small.unwrap(stored)["params"]
    assert plain.keys() == after.keys() == large.keys()
    for name, y in plain.items():
        assert jnp.abs(large[name]["kernel"] - variables["params"][name]["kernel"]).max() > 0, name
        assert 0 < jnp.linalg.norm(after[name] - y) / jnp.linalg.norm(y) < 2 * bound, name
    names = {path[-1]: x.dtype for path, x in flatten_dict(stored[FROZEN]).items()}
    assert names["kernel"] == {"int4": jnp.uint8}.get(scheme, quantised.SCHEMES[scheme].weights)


def test_an_int8_layer_is_the_integer_product_times_both_scales():
    layer, x = nn.Dense(4, name="out"), np.asarray(jax.random.normal(KEY, (3, 6)))

    class One(Net):
        def init(self, key, batch):
            return layer.init(key, jnp.zeros((1, 6)))

        def predict(self, variables, inputs):
            return {"y": layer.apply(variables, inputs["x"])}

    variables = One().init(KEY, None)
    small = Quantised(One(), "int8", stored=True)
    stored = small.store(variables, small.chosen(variables, {"x": x}), {("kernel",): 0.02})
    found, q = small.predict(stored, {"x": x})["y"], stored[FROZEN]
    x_q = np.clip(np.round(x / np.float32(0.02)), -128, 127).astype(np.int32)
    assert np.abs(x_q).max() > 60  # the range was right
    wanted = (x_q @ np.asarray(q["kernel"], np.int32)) * np.float32(0.02) * np.asarray(q["kernel_scale"])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert jnp.abs(found - layer.apply(variables, x)).max() > 1e-4


def test_training_sees_what_will_be_stored_and_has_the_gradient_of_the_weights():
    task = Net()
    variables = task.init(KEY, X)
    for scheme, only in (("int8", "heads"), ("int4", None)):  # what later layers read is on the edge of two values
        fake, small = Quantised(task, scheme, only), Quantised(task, scheme, only, dynamic=True, stored=True)
        stored = jax.jit(lambda v, small=small: small.store(v, small.chosen(variables, X)))(variables)
        wanted, found = jax.jit(small.predict)(stored, X)["y"], jax.jit(fake.predict)(variables, X)["y"]
        assert jnp.abs(wanted - task.predict(variables, X)["y"]).max() > 1e-3
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    grads = [
        jax.jit(jax.grad(lambda v, t=t: t.loss(v, X, None)[0]))(variables)["params"] for t in (Quantised(task), task)
    ]
    for name, g in flatten(grads[0]).items():
        plain = flatten(grads[1])[name]
        assert 0 < jnp.linalg.norm(g - plain) < 0.1 * jnp.linalg.norm(plain), name


def test_a_stack_of_layers_trains_as_its_layers_one_by_one():
    from bigbase_jax.models.transformer import stack_blocks

    plain = CausalLanguageModel(Decoder(vocab_size=40, length=8, **SMALL))
    scanned = CausalLanguageModel(Decoder(vocab_size=40, length=8, scan=True, remat=True, **SMALL))
    variables = jax.jit(plain.init)(KEY, BATCH)
    stacked = {"params": stack_blocks(variables["params"])}

    def total(task, variables):
        loss, _ = jax.jit(task.loss)(variables, BATCH, KEY)
        return sum(float(x.total) for x in loss.terms.values())

    only = r"block.*(query|up)$"  # a path of either
    one = total(Quantised(plain, only=only), variables)
    assert one == pytest.approx(total(Quantised(scanned, only=only), stacked), rel=1e-5)
    assert abs(one - total(plain, variables)) > 1e-4
    with pytest.raises(UserError, match="scan=False"):
        Quantised(scanned, stored=True).chosen(stacked, BATCH)


def test_generation_with_small_weights_and_a_small_cache():
    task = FAMILIES["decoder"]()
    variables = jax.tree.map(lambda x: 3 * x, jax.jit(task.init)(KEY, BATCH))  # sure of its tokens
    small = Quantised(task, "int8_weights", cache="int8", stored=True)
    model = small.runnable(task.model)
    cache = model.cache(2, 32)["encoder"]["block_0"]["attention"]
    assert cache["keys"].dtype == jnp.int8 and cache["keys_scale"].shape == (2, 2, 32, 1)
    stored = small.store(variables, small.chosen(variables, BATCH))
    params = SamplingParams(max_new_tokens=4)
    wanted, found = (
        Engine(m, v).generate([TOKENS[0, :3], TOKENS[1, :2]], params)
        for m, v in ((task.model, variables), (model, stored))
    )
    np.testing.assert_array_equal(np.stack(found), np.stack(wanted))


@pytest.mark.parametrize("shape, N", [((6, 4), 4), ((2, 6, 5), 5), ((3, 3, 4, 7), 7), ((4, 2, 3), 6), ((3, 5), 5)])
def test_two_numbers_of_four_bits_share_a_byte(shape, N):
    values = jnp.asarray(RNG.integers(-8, 8, shape), jnp.int4)
    packed = quantised._packed(values, N)
    if shape == (3, 5):  # odd
        assert packed.dtype == jnp.int8
    else:
        assert packed.dtype == jnp.uint8 and packed.size == values.size // 2
    np.testing.assert_array_equal(quantised._unpacked(packed, N), values)


def test_what_cannot_be_quantised_says_so():
    task = Net()
    variables = task.init(KEY, X)
    with pytest.raises(UserError, match="no quantize=int9. Did you mean 'int8'"):
        Quantised(task, "int9")
    with pytest.raises(UserError, match="only=haeds matches no layer .* Did you mean 'heads'"):
        Quantised(task, only="haeds").init(KEY, X)
    with pytest.raises(UserError, match="leave no layer"):
        Quantised(task, skip=".").init(KEY, X)
    with pytest.raises(UserError, match="except='\\(' is not a regular expression"):
        Quantised(task, skip="(")
    small = Quantised(task, "int4", group=12, stored=True)
    with pytest.raises(UserError, match="group=12 does not divide the 16 inputs of 'heads'; take 8, 16"):
        small.store(variables, small.chosen(variables, X))
    with pytest.raises(UserError, match="no gradient"):
        Quantised(task, stored=True).loss(variables, X, KEY)
    vit = FAMILIES["vit"]()
    with pytest.raises(UserError, match="frozen parameters already"):
        jax.eval_shape(Quantised(Frozen(vit, "head")).init, KEY, BATCH)
    jax.eval_shape(LoRA(Quantised(vit)).predict, jax.eval_shape(LoRA(Quantised(vit)).init, KEY, BATCH), inputs_of(vit))
