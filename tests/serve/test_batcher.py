"""Batches: what a row gives does not depend on its neighbours, nobody waits for ever, an error stays with its row."""

import asyncio
import threading
import time

import jax
import numpy as np
import pytest
import toy

from bigbase_jax.core import UserError
from bigbase_jax.inference.predictor import Predictor, Reading
from bigbase_jax.serve import models
from bigbase_jax.serve.batcher import Batcher
from bigbase_jax.serve.refused import Refused
from bigbase_jax.serve.served import CRASHES, Options, Served


def examples(count, seed=0):
    return [{"x": x} for x in np.random.default_rng(seed).normal(size=(count, toy.WIDTH)).astype(np.float32)]


def together(batcher, *parts):
    async def ask():
        return await asyncio.gather(*(batcher.compute(part) for part in parts))

    return asyncio.run(ask())


def test_a_row_gives_the_same_whoever_shares_its_batch():
    sizes = []
    predictor = toy.predictor(hook=lambda x: sizes.append(len(x)))
    batcher = Batcher(predictor, 8)
    batcher.warm()
    assert batcher.sizes == (1, 2, 4, 8) and sizes == [1, 1, 2, 2, 4, 4, 8, 8]  # compiled, and then measured
    mine = examples(1)
    (alone,) = together(batcher, mine)
    seen = []
    for others in ([1], [1, 2], [3, 1, 1], [5], [7, 7, 7]):
        sizes.clear()
        parts = [examples(n, seed) for seed, n in enumerate(others, 1)]
        assert not any(np.array_equal(mine[0]["x"], part[0]["x"]) for part in parts)
        found = together(batcher, *parts[: len(parts) // 2], mine, *parts[len(parts) // 2 :])
        seen += sizes
        np.testing.assert_allclose(found[len(parts) // 2][0]["y"], alone[0]["y"], atol=1e-6)
        for part, outputs in zip(parts, [*found[: len(parts) // 2], *found[len(parts) // 2 + 1 :]], strict=True):
            right = toy.predictor().computed(part, 1)  # each by itself
            np.testing.assert_allclose([o["y"] for o in outputs], [o["y"] for o in right], atol=1e-6)
    assert len(set(seen)) > 2  # they did share batches, of several sizes
    batcher.close()


def test_several_threads_compute_what_one_input_holds():
    batcher, mine = Batcher(toy.predictor(), 2, threads=3), examples(41)
    (found,) = together(batcher, mine)
    right = toy.predictor().computed(mine, 1)
    np.testing.assert_allclose([o["y"] for o in found], [o["y"] for o in right], atol=1e-6)
    batcher.close()


def test_in_a_batch_of_one_size_the_bits_are_the_same():
    batcher = Batcher(toy.predictor(), 4)
    mine, found = examples(1), []
    for seed in (1, 2):
        found.append(together(batcher, [*examples(1, seed), *mine, *examples(2, seed + 9)])[0])
    assert not np.array_equal(found[0][0]["y"], found[1][0]["y"])
    np.testing.assert_array_equal(found[0][1]["y"], found[1][1]["y"])
    batcher.close()


def test_requests_that_come_while_the_model_computes_share_the_next_batch():
    go, sizes = threading.Event(), []

    def hook(x):
        sizes.append(len(x))
        go.wait(60)

    batcher = Batcher(toy.predictor(hook=hook), 4)

    async def ask():
        tasks = [asyncio.create_task(batcher.compute(examples(1)))]
        while not sizes:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(batcher.compute(examples(1, seed))) for seed in range(5)]
        await asyncio.sleep(0)
        tasks[2].cancel()  # whose client has left
        go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(ask())
    assert sizes == [1, 4] and batcher.waiting == 0
    assert [isinstance(x, asyncio.CancelledError) for x in found] == [False, False, True, False, False, False]
    batcher.close()


def test_an_error_of_computing_stays_with_its_row():
    def hook(x):
        if (x > 100).any():
            raise FloatingPointError("no")

    batcher = Batcher(toy.predictor(hook=hook), 4)
    bad = [{"x": np.full(toy.WIDTH, 1000, np.float32)}]

    async def ask():
        return await asyncio.gather(
            *(batcher.compute(part) for part in (examples(1), bad, examples(1, 1))), return_exceptions=True
        )

    first, second, third = asyncio.run(ask())
    assert isinstance(second, FloatingPointError) and len(first) == len(third) == 1
    batcher.close()


def test_a_closed_batcher_computes_what_it_has_and_takes_no_more():
    batcher = Batcher(toy.predictor(), 4)
    batcher.close()
    with pytest.raises(Refused, match="being replaced"):
        together(batcher, examples(1))


def test_a_full_queue_is_refused_with_the_time_to_wait():
    go = threading.Event()
    served = Served("toy", toy.predictor(hook=lambda x: go.wait(60)), Options(max_batch=1, max_queue=2))

    async def ask():
        tasks = [asyncio.create_task(served.predict({"x": [i, 0, 0, 0]})) for i in range(3)]
        await asyncio.sleep(0)
        while not tasks[2].done():
            await asyncio.sleep(0.001)
        go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    *answered, refused = asyncio.run(ask())
    assert isinstance(refused, Refused) and refused.status == 429 and refused.retry_after >= 1
    assert all(len(found) == 1 for found in answered) and served.busy == 0
    served.close(1)


def test_a_model_that_crashes_is_loaded_again_and_the_others_answer_on(monkeypatch):
    broken, tries = [True], []
    monkeypatch.setattr(models, "AGAIN", 0.1)

    def hook(x):
        if broken[0] and x.any():
            raise RuntimeError("/secret/path: out of memory")

    def opened():
        tries.append(len(tries))
        if len(tries) == 2:
            raise UserError("the disk is gone")
        found = Served("bad", toy.predictor(hook=hook), Options(max_batch=1))
        found.reopen = opened
        return found

    with toy.client(good=toy.predictor(), bad=toy.predictor()) as client:
        client.models.switch("bad", opened())
        row = {"x": [1, 2, 3, 4]}
        for _ in range(CRASHES):
            response = client.post("/v1/predict/bad", json=row)
            assert response.status_code == 500 and "secret" not in response.text
            assert client.post("/v1/predict/good", json=row).status_code == 200
        broken[0] = False
        deadline = time.monotonic() + 60
        while (status := client.post("/v1/predict/bad", json=row).status_code) != 200 and time.monotonic() < deadline:
            assert status == 503
            time.sleep(0.01)
        assert status == 200 and len(tries) == 3 and client.get("/readyz").status_code == 200


def test_versions_are_switched_between_two_requests():
    with toy.client() as client:
        row, wrong = {"x": [1, 2, 3, 4]}, []
        right = {str(seed): toy.predictor(seed).answer(row)[0]["sum"] for seed in range(4)}
        assert len(set(right.values())) == 4

        def ask():
            for _ in range(100):
                response = client.post("/v1/predict/toy", json=row)
                found = response.json()
                if response.status_code != 200 or abs(found["answers"][0]["sum"] - right[found["version"]]) > 1e-5:
                    wrong.append(response.text)

        thread = threading.Thread(target=ask)
        thread.start()
        for seed in range(1, 4):
            client.models.switch("toy", Served("toy", toy.predictor(seed), Options(max_batch=2), str(seed)))
            time.sleep(0.02)
        thread.join()
        assert not wrong
        assert client.post("/v1/predict/toy", json=row).json()["version"] == "3"


class Sums:
    """Rows of up to 64 numbers above 0, padded with zeros; the model counts the places that it is given, too."""

    fields, padded, inputs = None, ("x",), ("x",)

    def predict(self, variables, inputs):
        return {"sum": inputs["x"].sum(1), "places": 0 * inputs["x"].sum(1) + inputs["x"].shape[1]}


def test_rows_share_a_batch_with_those_that_need_as_many_places():
    sums, seen = Sums(), []
    predictor = Predictor(sums, {}, {}, {"x": jax.ShapeDtypeStruct((64,), np.float32)}, lambda: Reading(sums))
    predictor.compute = lambda variables, batch: seen.append(batch["x"].shape) or sums.predict(variables, batch)
    assert predictor.lengths == (16, 32, 64)
    batcher = Batcher(predictor, 4)
    assert batcher.warm() == 3 * 3 and len(set(seen)) == 9
    lengths = (3, 40, 16, 17, 64, 1)
    whole = [{"x": np.where(np.arange(64) < n, 0.5, 0).astype(np.float32)} for n in lengths]
    found = together(batcher, *([predictor.cut([example])[0]] for example in whole))
    assert [float(output["sum"]) for (output,) in found] == [0.5 * n for n in lengths]
    assert [int(output["places"]) for (output,) in found] == [16, 64, 16, 32, 64, 16]
    ((uncut,),) = together(batcher, whole[:1])  # as tensors of the Open Inference Protocol are
    assert int(uncut["places"]) == 64
    batcher.close()


def test_a_batch_with_much_padding_is_computed_as_two_where_these_cost_less():
    batcher = Batcher(toy.predictor(), 8)
    shape = batcher._shape(examples(1)[0])
    for cost, wanted in (
        (lambda n: 1.0 * n, [1, 2, 2, 4, 4, 4, 4, 8, 8]),
        (lambda n: 1.0, [1, 2, 3, 4, 5, 6, 7, 8, 8]),
    ):
        batcher._costs = {(shape, size): cost(size) for size in batcher.sizes}
        found = [batcher._count(shape, there) for there in range(1, 10)]
        assert found == wanted
    batcher.close()
