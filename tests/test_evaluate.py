"""Evaluation counts every example once, whatever the batch size and the devices."""

import jax
import numpy as np
import pytest
from toys import Regression, regression_batch

from bigbase_jax import parallel
from bigbase_jax.core import Sum, add
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.synthetic.numerals import Numerals
from bigbase_jax.evaluate import evaluate
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.tasks.translation import Translation


def padded_batches(data, size):
    n = len(data["y"])
    for start in range(0, n, size):
        rows = np.minimum(np.arange(start, start + size), n - 1)
        batch = {name: x[rows] for name, x in data.items()}
        batch["mask"] = (np.arange(start, start + size) < n).astype(np.float32)
        batch["index"] = rows
        yield batch


@pytest.mark.parametrize(("size", "devices"), [(37, 1), (8, 1), (8, 8), (40, 4)])
def test_any_batching_gives_the_numbers_of_the_whole(size, devices):
    task = Regression()
    data = jax.device_get(regression_batch(37))
    variables = task.init(jax.random.key(0), data)
    want = np.abs(np.asarray(task.predict(variables, data)["y_hat"]) - data["y"])
    mesh = parallel.make_mesh(devices)
    found = evaluate(task, parallel.eval_step(task, mesh), variables, padded_batches(data, size), mesh)
    assert found.metrics["error"] == pytest.approx(want.mean(), rel=1e-6)
    assert found.metrics["largest"] == pytest.approx(want.max(), rel=1e-6)
    np.testing.assert_array_equal(found.examples["index"], np.arange(37))
    np.testing.assert_array_equal(found.examples["y"], data["y"])


def test_sums_add_up_and_empty_ones_are_zero():
    a, b = Sum(np.float32(3), np.float32(2)), Sum(np.float32(1), np.float32(6))
    assert float(add(a, b).mean()) == 0.5
    assert float(Sum(np.float32(0), np.float32(0)).mean()) == 0.0


def test_batches_of_several_lengths_give_what_those_of_one_length_give(tmp_path):
    """In the order of the split, and filled up to one length."""
    words = {"dataset": Numerals(count=60, largest=999), "cache_dir": str(tmp_path)}
    plain, by_length = (Data(batch_size=8, buckets=b, **words).prepare(lambda line: None) for b in ((), (20, 30)))
    model = EncoderDecoder(vocab_size=plain.dataset_info["vocab_size"], depth=1, heads=2, width=16, mlp_dim=16)
    ids = {name: plain.dataset_info[name] for name in ("tokenizer", "pad_id", "start_id", "end_id")}
    task = Translation(model, max_length=9, **ids)
    variables = task.init(jax.random.key(0), plain.train_shapes()[0])
    mesh = parallel.make_mesh(2)
    step = parallel.eval_step(task, mesh)
    one, several = (evaluate(task, step, variables, list(d.eval_batches("train")), mesh) for d in (plain, by_length))
    lengths = [batch["source"].shape[1] for batch in by_length.eval_batches("train")]
    assert set(lengths) == {20, 30, 80} and several.examples["target"].shape == (54, 80)
    assert several.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-5)
    for name, x in one.examples.items():
        np.testing.assert_allclose(several.examples[name], x, rtol=1e-4, atol=1e-5, err_msg=name)
