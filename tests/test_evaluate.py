"""Evaluation counts every example once, whatever the batch size and the devices."""

import io
import json

import jax
import numpy as np
import pytest
from toys import Regression, measured, regression_batch

from bigbase_jax import parallel
from bigbase_jax.core import Sum, UserError, add
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.synthetic.numerals import Numerals
from bigbase_jax.evaluate import CollectAll, Split, evaluate, evaluators
from bigbase_jax.evaluators.captions import ZeroShot
from bigbase_jax.evaluators.identification import Identification
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.tasks.language import CausalLanguageModel
from bigbase_jax.tasks.tagging import Tagging
from bigbase_jax.tasks.translation import Translation
from bigbase_jax.text.tokenizer import Symbols


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


def meters_of_tasks():
    rng = np.random.default_rng(0)
    target = rng.integers(-1, 5, (9, 6))
    likely = {"target": target, "likeliest": rng.random((9, 6)) < 0.8, "log_probability": (target >= 0) * -rng.random()}
    tags, tag = (np.where(target >= 0, rng.integers(0, 3, (9, 6)), -1) for _ in range(2))
    letters = Symbols("abcdefgh", fallback=False, end=True, special=("start", "pad"))
    written = rng.integers(0, 8, (2, 9, 1, 8))
    reference = np.array([[ord("abcdefgh"[i]) for i in row] for row in written[0][:, 0]], np.uint8)
    said = np.where(rng.random((9, 1, 8)) < 0.9, written[0], written[1])
    yield Classification(ConvNet(3)), {"probabilities": rng.dirichlet(np.ones(3), 9), "label": rng.integers(0, 3, 9)}
    yield Tagging(Bert(), ("B-PER", "I-PER", "O")), {"tags": tags, "tag": tag}
    yield CausalLanguageModel(Decoder(5, 6), weighted=True), likely
    yield (
        Translation(EncoderDecoder(11), letters.state(), end_id=letters.special.get("end")),
        {"tokens": said, "reference": reference, **likely},
    )


@pytest.mark.parametrize(("task", "examples"), meters_of_tasks(), ids=lambda x: type(x).__name__)
def test_what_two_hosts_have_seen_merges_to_what_one_sees(task, examples):
    examples = {**examples, "index": np.random.default_rng(1).permutation(9)}
    batches = [{name: x[rows] for name, x in examples.items()} for rows in (slice(0, 4), slice(4, 5), slice(5, 9))]
    expected = measured(task, examples)
    here, there = task.meters(), task.meters()
    found = {}
    for name, meter in here.items():
        meter.update(batches[0])
        for batch in batches[1:]:
            there[name].update(batch)
        file = io.BytesIO()
        np.savez(file, **there[name].state())
        file.seek(0)
        meter.merge(dict(np.load(file, allow_pickle=False)))
        assert meter.result() != there[name].result()
        found |= meter.result()
    numbers = {name: x for name, x in expected.items() if isinstance(x, float)}
    assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=1e-12) and len(numbers) >= 1
    rest = [{name: x for name, x in of.items() if name not in numbers} for of in (found, expected)]
    assert json.dumps(rest[0], sort_keys=True) == json.dumps(rest[1], sort_keys=True)


def test_arrays_of_several_lengths_are_filled_up_by_what_they_hold():
    kept = CollectAll(dict)
    for index, value, length in (([2, 0], 1, 3), ([1], 5, 2)):
        token = np.full((len(index), length), value, np.int32)
        kept.update({"index": np.array(index), "token": token, "score": token.astype(np.float32)})
    found = kept.result()
    assert found["token"].tolist() == [[1, 1, 1], [5, 5, -1], [1, 1, 1]]
    assert found["score"].tolist() == [[1, 1, 1], [5, 5, 0], [1, 1, 1]]


def test_examples_are_kept_where_they_are_wanted():
    task, mesh = Regression(), parallel.make_mesh(1)
    data = jax.device_get(regression_batch(8))
    step = parallel.eval_step(task, mesh)
    variables = task.init(jax.random.key(0), data)
    kept, without = (evaluate(task, step, variables, padded_batches(data, 8), mesh, "val", k) for k in (True, False))
    assert kept.examples.keys() == {"y", "y_hat", "index"} and not without.examples
    assert kept.metrics == without.metrics and kept.split == "val"


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


def test_a_split_that_an_evaluator_needs_is_missed_before_the_run():
    mesh, splits = parallel.make_mesh(), ("train", "test")
    own = {"more": Split("train"), "photos": Identification(), "other_data": ZeroShot(None, split="all")}
    assert [*evaluators(Regression(), mesh, splits, own).final] == ["test", *own]
    for other, said in ((Split("tset"), "'tset'. Did you mean 'test'"), (Identification(gallery="val"), "'val'")):
        with pytest.raises(UserError, match=f"config.evaluators.mine needs the split {said}"):
            evaluators(Regression(), mesh, splits, {"mine": other})
