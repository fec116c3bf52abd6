"""Evaluation counts every example once, whatever the batch size and the devices."""

import jax
import numpy as np
import pytest
from toys import Regression, regression_batch

from bigbase_jax import parallel
from bigbase_jax.core import Sum, add
from bigbase_jax.evaluate import evaluate


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
