"""Quantising a trained model: what calibration and GPTQ find, what a layer costs, and the real command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from toys import Net, Regression, regression_batch

from bigbase_jax.build import target
from bigbase_jax.compress import quantise
from bigbase_jax.compress.compressed import Compressed
from bigbase_jax.compress.compressed import plain as plain_of
from bigbase_jax.core import UserError, flatten
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.parallel import FROZEN
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.wrappers.lora import LoRA
from bigbase_jax.wrappers.quantised import Quantised

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    """(predictor, plain model, batches) of a regression."""
    task = Regression(Net(width=16))
    batches = [{name: np.asarray(x) for name, x in regression_batch(16, seed).items()} for seed in range(2)]
    variables = task.init(KEY, batches[0])
    spec = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}

    def plain():
        config = ConfigDict({"task": target(Regression, model=target(Net, width=16))})
        return Compressed(config.unlock() or config, task, variables)

    return Predictor(task, variables, {}, spec, lambda: None), plain, lambda: batches


def test_calibrated_ranges_hold_what_layers_read(model):
    predictor, plain, batches = model
    found = quantise.quantise(predictor, plain(), "int8", batches)
    assert found.about["calibrated_on"] == 32 and found.about["layers"] == 2
    frozen = flatten(found.variables[FROZEN])
    most = max(np.abs(batch["x"]).max() for batch in batches())
    scale = float(frozen["hidden.input_scale"])
    assert 0.4 * most / 127 <= scale <= most / 127 * 1.001
    assert float(frozen["out.input_scale"]) <= 1.001 / 127  # after tanh
    x = batches()[0]["x"]
    after, before = (
        t.predict(v, {"x": x})["y_hat"] for t, v in ((found.task, found.variables), (plain().task, plain().variables))
    )
    assert 0 < np.abs(after - before).max() < 0.05
    assert found.config.task.quantize == "int8" and found.config.task.stored


def test_an_adapter_is_merged_first(model):
    predictor, _, batches = model
    task = LoRA(Regression(Net(width=16)), targets="hidden")
    variables = task.init(KEY, batches()[0])
    adapter = jax.tree.map(lambda x: x + 0.3, variables["params"])
    config = ConfigDict({"task": target(LoRA, task=target(Regression, model=target(Net, width=16)), targets="hidden")})
    words = {"run": RunDir("a"), "config": config}
    adapted = Predictor(task, {**variables, "params": adapter}, {}, predictor.spec, lambda: None, **words)
    found = quantise.quantise(adapted, plain_of(adapted), "int8_weights", batches)
    assert found.config.task.task.target.endswith(":Regression")
    x = batches()[0]
    wanted = adapted.task.predict(adapted.variables, x)["y_hat"]
    assert np.abs(wanted - task.predict(variables, x)["y_hat"]).max() > 0.1
    np.testing.assert_allclose(found.task.predict(found.variables, x)["y_hat"], wanted, atol=0.05)


def test_gptq_is_that_of_qwix_and_loses_less_of_the_output():
    from qwix._src.core.qarray import HowToQuantize
    from qwix.contrib import gptq_core

    mixing = jax.random.normal(KEY, (16, 16)) / 4
    x_RM = jax.random.normal(jax.random.key(1), (64, 16)) @ mixing
    x_MN = jax.random.normal(jax.random.key(2), (16, 5))
    hessian_MM = x_RM.T @ x_RM
    found = quantise.gptq(x_MN, hessian_MM, jnp.int4, 16)
    how = HowToQuantize(qtype=jnp.int4, channelwise_axes=[0])
    theirs, _ = gptq_core.quantize_weight(x_MN.T, hessian_MM, how)
    np.testing.assert_array_equal(found.qvalue, theirs.qvalue.T)
    np.testing.assert_allclose(found.scale, theirs.scale.T, rtol=1e-6)
    zeros_MN = jnp.where(jax.random.bernoulli(KEY, 0.5, x_MN.shape), x_MN, 0)
    assert jnp.all(quantise.gptq(zeros_MN, hessian_MM, jnp.int4, 16).qvalue[zeros_MN == 0] == 0)
    for group in (16, 4):
        errors = []
        for small in (quantise.gptq(x_MN, hessian_MM, jnp.int4, group), quantise.nearest((), x_MN, jnp.int4, group)):
            large = small.qvalue.astype(jnp.float32) * jnp.repeat(small.scale, group, 0)
            errors.append(float(jnp.linalg.norm(x_RM @ (large - x_MN))))
        assert 0 < errors[0] < 0.8 * errors[1]


def test_the_command_takes_gptq(model):
    predictor, plain, batches = model
    near, solved = (
        quantise.quantise(predictor, plain(), f"int4,only=out,method={method}", batches) for method in quantise.METHODS
    )
    a, b = (flatten(found.variables[FROZEN])["out.kernel"] for found in (near, solved))
    assert a.shape == b.shape == (16, 1) and (a != b).any()


def test_sensitivity_is_what_one_layer_alone_costs(model, capsys):
    predictor, plain, batches = model
    found = quantise.sensitivity(predictor, plain(), "int8,dynamic", batches)
    assert {row["layer"] for row in found["layers"]} == {"hidden", "out"}
    only = Quantised(plain().task, "int8", only="hidden")
    sums = [only.evaluate(plain().variables, batch)[1]["error"] for batch in batches()]
    wanted = sum(s.total for s in sums) / sum(s.weight for s in sums)
    row = next(row for row in found["layers"] if row["layer"] == "hidden")
    assert row["error"] == pytest.approx(float(wanted), rel=1e-5)
    assert row["error"] - found["before"]["error"] == pytest.approx(row["change"]) and row["change"] != 0
    assert "hidden" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("int9", "no --quantize=int9. Did you mean 'int8'"),
        ("int8,onyl=x", "no argument 'onyl'"),
        ("int4,method=gtpq", "no method=gtpq. Did you mean 'gptq'"),
        ("int4,group=5", "does not divide"),
        ("int8,except=hiden", "except=hiden matches no layer"),
    ],
)
def test_mistakes_are_one_sentence(model, text, sentence):
    predictor, plain, batches = model
    with pytest.raises(UserError, match=sentence):
        quantise.quantise(predictor, plain(), text, batches)


def test_no_examples_and_twice(model):
    predictor, plain, _ = model
    with pytest.raises(UserError, match="needs training examples"):
        quantise.quantise(predictor, plain(), "int8", lambda: [])
    found = quantise.quantise(predictor, plain(), "int8_weights", lambda: [])
    words = {"run": RunDir("a"), "config": found.config}
    again = Predictor(found.task, found.variables, {}, predictor.spec, lambda: None, **words)
    with pytest.raises(UserError, match="a is quantised already"):
        plain_of(again)
