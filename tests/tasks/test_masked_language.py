"""Masked language modelling: the loss by hand, exact sums over padding, no logits but where they are asked, answers;
and of pairs of texts, which belong together."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_launch import launch
from toys import loss_of, measured, sums_of

from bigbase_jax import parallel
from bigbase_jax.core import Evaluated, Task, UserError, add
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.tasks.masked_language import NONE, MaskedLanguageModel
from bigbase_jax.text.tokenizer import Symbols

L, M, V = 12, 4, 17
TINY = {"vocab_size": V, "length": L, "width": 16, "depth": 1, "heads": 2, "dropout": 0.0}


def batch_of(size, seed=0, masked=0):
    """Two pieces and padding in each row, and 4, 3, 2, ... hidden tokens."""
    rng = np.random.default_rng(seed)
    segment_ids = np.tile([1] * 5 + [2] * 4 + [0] * 3, (size, 1)).astype(np.int32)
    positions = np.tile([*range(5), *range(4), 0, 0, 0], (size, 1)).astype(np.int32)
    at, targets = np.full((size, M), NONE, np.int32), np.full((size, M), NONE, np.int32)
    for b in range(size):
        n = M - b % M
        at[b, :n] = np.sort(rng.permutation(9)[:n])
        targets[b, :n] = rng.integers(0, V, n)
    tokens = (rng.integers(0, V, (size, L)) * (segment_ids > 0)).astype(np.int32)
    mask = np.ones(size, np.float32)
    mask[size - masked :] = 0
    arrays = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions, "token_type_ids": segment_ids * 0}
    return {name: jnp.asarray(x) for name, x in {**arrays, "at": at, "targets": targets, "mask": mask}.items()}


def ready(**more):
    task = MaskedLanguageModel(Bert(**TINY), **more)
    shapes = jax.eval_shape(task.init, jax.random.key(0), (pairs_of if task.next_sentence else batch_of)(2))
    random = np.random.default_rng(0)
    return task, jax.tree.map(lambda x: jnp.float32(0.3 * random.normal(size=x.shape)), shapes)


@functools.cache
def compiled(task):
    def loss(params, batch):
        total, _ = loss_of(task, {"params": params}, batch, jax.random.key(0))
        return total.total / total.weight, total

    return jax.jit(jax.value_and_grad(loss, has_aux=True)), jax.jit(task.predict)


def test_the_loss_is_the_mean_over_what_was_hidden():
    task, variables = ready()
    batch = batch_of(3, masked=1)
    step, predict = compiled(task)
    (_, (total, weight)), _ = step(variables["params"], batch)
    words = (batch[name] for name in ("tokens", "segment_ids", "positions", "token_type_ids"))
    logp_BLV = jax.nn.log_softmax(jax.jit(task.model.apply)(variables, *words)["masked"])  # at all positions
    pairs = [(b, m) for b in range(2) for m in range(M) if batch["at"][b, m] != NONE]
    chosen = [float(logp_BLV[b, batch["at"][b, m], batch["targets"][b, m]]) for b, m in pairs]
    assert len(pairs) == weight == 4 + 3
    np.testing.assert_allclose(total, -sum(chosen), rtol=1e-5)
    outputs = predict(variables, {name: batch[name] for name in task.inputs})
    np.testing.assert_allclose([outputs["log_probability"][b, m] for b, m in pairs], chosen, rtol=1e-5)
    best = np.argsort(-np.asarray(logp_BLV), -1)[..., :5]
    for b, m in pairs:
        np.testing.assert_array_equal(outputs["guess"][b, m], best[b, batch["at"][b, m]])
    assert all(hasattr(task, name) for name in [*Task.__annotations__, *vars(Task)] if not name.startswith("_"))


def test_padding_and_empty_places_change_nothing():
    task, variables = ready()
    step, _ = compiled(task)
    padded = batch_of(3, masked=1)
    (_, found), gradient = step(variables["params"], padded)
    rest = {"at": padded["at"].at[2].set(NONE), "targets": padded["targets"].at[2].set(NONE)}
    tokens = {"tokens": padded["tokens"].at[2].set(3), "mask": jnp.ones(3)}
    (_, other), others = step(variables["params"], {**padded, **rest, **tokens})
    np.testing.assert_allclose(found, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, others)
    (_, none), _ = step(variables["params"], {**padded, "targets": jnp.full((3, M), NONE)})
    assert none.total == 0 and none.weight == 0 and found.weight == 4 + 3


def test_metrics_add_up_over_batches():
    task, variables = ready()
    _, predict = compiled(task)
    measure = jax.jit(lambda batch: sums_of(task, variables, batch))
    whole = batch_of(4, seed=1)
    parts = [{name: x[i : i + 2] for name, x in whole.items()} for i in (0, 2)]
    total = add(*(measure(part) for part in parts))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), total, measure(whole))
    outputs = jax.device_get(predict(variables, whole))
    known = outputs["target"] != NONE
    right = (outputs["guess"][..., 0] == outputs["target"])[known]
    np.testing.assert_allclose(measure(whole)["masked_accuracy"].mean(), right.mean(), rtol=1e-6)
    report = measured(task, {**outputs, "index": np.arange(4)})
    assert report["hidden_tokens"] == 4 + 3 + 2 + 1
    np.testing.assert_allclose(np.log(report["perplexity"]), measure(whole)["loss"].mean(), rtol=1e-5)


def one_segment(arrays):
    """A batch of rows that are one segment from end to end."""
    shape = arrays["tokens"].shape
    arrays = {**arrays, "segment_ids": np.ones(shape), "positions": np.tile(np.arange(L), (shape[0], 1))}
    return {"mask": jnp.ones(shape[0]), **{k: jnp.asarray(v, jnp.int32) for k, v in arrays.items()}}


def test_logits_exist_for_hidden_tokens_alone():
    task, variables = ready()
    batch = batch_of(3)
    text = jax.jit(
        lambda v: jax.grad(lambda p: loss_of(task, {"params": p}, batch, jax.random.key(0))[0].total)(v["params"])
    )
    text = text.lower(variables).as_text()
    assert f"tensor<3x{M}x{V}xf32>" in text and f"tensor<3x{L}x{V}xf32>" not in text


def test_it_learns_what_is_hidden():
    """Rows of one repeated token: what is hidden is what stands beside it."""
    task = MaskedLanguageModel(Bert(**TINY))
    rng = np.random.default_rng(0)
    tx = optax.adam(2e-2)

    def draw(size):
        token_B1 = rng.integers(1, V, (size, 1))
        tokens = np.repeat(token_B1, L, 1)
        at = np.sort(np.argsort(rng.random((size, L)), 1)[:, :2], 1)
        np.put_along_axis(tokens, at, 0, 1)
        token_type_ids = np.zeros((size, L), np.int32)
        return one_segment(
            {"tokens": tokens, "token_type_ids": token_type_ids, "at": at, "targets": np.repeat(token_B1, 2, 1)}
        )

    @jax.jit
    def step(params, opt, batch, key):
        def loss(params):
            total, _ = loss_of(task, {"params": params}, batch, key)
            return total.total / total.weight

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt, value

    params = jax.jit(task.init)(jax.random.key(0), draw(2))["params"]
    opt = tx.init(params)
    losses = []
    for i in range(250):
        params, opt, value = step(params, opt, draw(32), jax.random.key(i))
        losses.append(float(value))
    assert losses[0] > 2.5 and np.mean(losses[-5:]) < 0.5
    batch = draw(64)
    sums = jax.jit(lambda b: sums_of(task, {"params": params}, b))(batch)
    assert sums["masked_accuracy"].mean() > 0.9


# --------------------------------------------------------------------------------------------------------------- pairs


def pairs_of(size, seed=0, masked=0):
    """As ``batch_of``, a pair of texts in each row."""
    batch, rng = batch_of(size, seed, masked), np.random.default_rng(seed)
    token_type_ids = np.tile([0] * 5 + [1] * 4 + [0] * 3, (size, 1)).astype(np.int32)
    row = {"segment_ids": jnp.minimum(batch["segment_ids"], 1), "token_type_ids": jnp.asarray(token_type_ids)}
    return {**batch, **row, "next": jnp.asarray(rng.integers(0, 2, size), jnp.int32)}


def test_each_hidden_token_bears_the_loss_of_its_row():
    task, variables = ready(next_sentence=True)
    batch = pairs_of(3, masked=1)
    (_, (total, weight)), _ = compiled(task)[0](variables["params"], batch)
    words = [batch[name] for name in ("tokens", "segment_ids", "positions", "token_type_ids")]
    found = jax.jit(task.model.apply)(variables, *words)
    logp_BLV, next_logp_B2 = jax.nn.log_softmax(found["masked"]), jax.nn.log_softmax(found["next_sentence"])
    chosen = [
        float(logp_BLV[b, batch["at"][b, m], batch["targets"][b, m]] + next_logp_B2[b, batch["next"][b]])
        for b in range(2)
        for m in range(M)
        if batch["at"][b, m] != NONE
    ]
    assert len(chosen) == weight == 4 + 3
    np.testing.assert_allclose(total, -sum(chosen), rtol=1e-5)
    inputs = {name: batch[name] for name in task.inputs}
    np.testing.assert_allclose(compiled(task)[1](variables, inputs)["next_log_probability"], next_logp_B2, rtol=1e-5)


def test_padded_rows_of_pairs_change_nothing():
    task, variables = ready(next_sentence=True)
    step, _ = compiled(task)
    measure = jax.jit(lambda batch: sums_of(task, variables, batch))
    whole, padded = pairs_of(4, masked=1), pairs_of(4, masked=1)
    padded["next"] = padded["next"].at[3].set(1 - padded["next"][3])
    padded["tokens"] = padded["tokens"].at[3].set(5)
    assert padded["next"][3] != whole["next"][3]
    real = {name: x[:3] for name, x in whole.items()}
    (_, found), gradient = step(variables["params"], padded)
    for other in (whole, real):
        (_, expected), gradients = step(variables["params"], other)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, gradients)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), measure(padded), measure(other))
    assert measure(padded)["next_accuracy"].weight == 3 and jnp.abs(gradient["next"]["kernel"]).max() > 1e-3


def test_slices_and_batches_of_pairs_add_up_exactly():
    """Rows hide 4, 3, 2 and 1 tokens: a mean of means would give another gradient."""
    task = MaskedLanguageModel(Bert(**TINY), next_sentence=True)
    batch = pairs_of(8, masked=1)
    mesh, tx = parallel.make_mesh(1), optax.sgd(1.0)
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}

    def after(microbatches):
        program = parallel.program(task, tx, spec, mesh, microbatches=microbatches)
        state, sums = program.step(program.init(batch), parallel.put(jax.device_get(batch), mesh))
        return state.params, sums["loss"]

    (whole, loss), (sliced, again) = after(1), after(4)
    fresh = jax.jit(task.init)(jax.random.key(0), batch)["params"]
    assert jax.tree.structure(fresh) == jax.tree.structure(whole)
    np.testing.assert_allclose(loss, again, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, sliced)

    task, variables = ready(next_sentence=True)
    measure = jax.jit(lambda batch: sums_of(task, variables, batch))
    parts = [{name: x[i : i + 4] for name, x in batch.items()} for i in (0, 4)]
    total, expected = add(*(measure(part) for part in parts)), measure(batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), total, expected)
    (_, trained), _ = compiled(task)[0](variables["params"], batch)
    np.testing.assert_allclose(expected["loss"], trained, rtol=1e-5)  # without dropout, as it is trained
    assert expected["loss"].total > expected["masked_loss"].total + 1
    outputs = compiled(task)[1](variables, batch)
    logp_B = np.take_along_axis(outputs["next_log_probability"], np.asarray(batch["next"])[:, None], 1)[:7, 0]
    np.testing.assert_allclose(expected["next_loss"].mean(), -logp_B.mean(), rtol=1e-5)
    np.testing.assert_allclose(expected["next_accuracy"].mean(), (logp_B > np.log(0.5)).mean(), rtol=1e-6)


def test_it_learns_which_texts_belong_together():
    """Rows of two texts, of one repeated token each: the second follows if it has the same token, not the next one."""
    task = MaskedLanguageModel(Bert(**TINY), next_sentence=True)
    rng, tx = np.random.default_rng(0), optax.adam(1e-2)

    def draw(size):
        first_B, next_B = rng.integers(0, 3, size), rng.integers(0, 2, size)
        token_type_ids = np.tile(np.arange(L) >= L // 2, (size, 1)).astype(np.int32)
        tokens = 1 + (first_B[:, None] + token_type_ids * next_B[:, None]) % 3
        at = np.full((size, 1), 2)
        targets = np.take_along_axis(tokens, at, 1)
        return one_segment(
            {"tokens": tokens, "token_type_ids": token_type_ids, "at": at, "targets": targets, "next": next_B}
        )

    @jax.jit
    def step(params, opt, batch, key):
        def loss(params):
            total, _ = loss_of(task, {"params": params}, batch, key)
            return total.total / total.weight

        updates, opt = tx.update(jax.grad(loss)(params), opt)
        return optax.apply_updates(params, updates), opt

    params = jax.jit(task.init)(jax.random.key(0), draw(2))["params"]
    measure = jax.jit(lambda params, b: sums_of(task, {"params": params}, b))
    batch = draw(128)
    assert measure(params, batch)["next_accuracy"].mean() < 0.7
    opt = tx.init(params)
    for i in range(200):
        params, opt = step(params, opt, draw(32), jax.random.key(i))
    assert measure(params, batch)["next_accuracy"].mean() > 0.95


@pytest.mark.slow
def test_the_recipe_with_pairs(tmp_path):
    """Trained, evaluated again to the same numbers, and asked for a hidden word in a single text."""
    run = f"--workdir={tmp_path / 'run'}"
    result, _, said = launch("--config=configs/bert.py:tiny,next_sentence", run)
    assert {"masked_loss", "next_loss", "next_accuracy", "masked_accuracy", "perplexity"} <= set(result)
    assert 0 < result["next_accuracy"] < 1 and result["loss"] > result["masked_loss"]
    np.testing.assert_allclose(np.log(result["perplexity"]), result["masked_loss"], rtol=1e-5)
    assert "with two texts each" in said
    kept = np.load(tmp_path / "run" / "predictions-test.npz")
    assert kept["next_log_probability"].shape == (len(kept["next"]), 2)
    assert launch("--mode=eval", run)[0] == result
    (tmp_path / "a.txt").write_text("the [MASK] statement")
    answer, _, _ = launch("--mode=predict", run, f"--input={tmp_path / 'a.txt'}")
    assert len(answer["hidden"]) == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["dataset"]["next_sentence"] and config["task"]["next_sentence"] is None


def test_what_users_read():
    tokenizer = Symbols("abcdefghijkl", fallback=False, special=("pad", "cls", "sep", "mask"))
    task, variables = ready(tokenizer=tokenizer.state())
    cls, sep, mask = (tokenizer.special[role] for role in ("cls", "sep", "mask"))
    row = np.zeros((2, L), np.int32)
    row[0, :5], row[1, :4] = [cls, 0, mask, 2, sep], [cls, mask, 1, sep]
    segment_ids = (np.arange(L)[None] < np.array([[5], [4]])).astype(np.int32)
    at = np.array([[2, NONE], [1, 2]], np.int32)
    targets = np.array([[NONE, NONE], [3, 1]], np.int32)
    batch = {
        "tokens": row,
        "segment_ids": segment_ids,
        "positions": np.tile(np.arange(L), (2, 1)),
        "token_type_ids": row * 0,
    }
    outputs = jax.device_get(compiled(task)[1](variables, {**batch, "at": at, "targets": targets}))
    single = task.postprocess({name: x[0] for name, x in outputs.items()}, {})
    assert single["text"] == ["[CLS]", "a", "[MASK]", "c", "[SEP]"] and "loss" not in single
    (hidden,) = single["hidden"]
    assert hidden["at"] == 2 and hidden["was"] is None and len(hidden["guesses"]) == 5
    assert all(0 <= p <= 1 for _, p in hidden["guesses"]) and hidden["guesses"][0][1] >= hidden["guesses"][1][1]
    joined = task.postprocess({name: np.concatenate(list(x)) for name, x in outputs.items()}, {})
    assert joined["text"][5:] == ["[CLS]", "[MASK]", "b", "[SEP]"]
    assert [(h["at"], h["was"]) for h in joined["hidden"]] == [(2, None), (6, "d"), (7, "b")]
    np.testing.assert_allclose(joined["loss"], -outputs["log_probability"][1].mean(), rtol=1e-5)
    (shown,) = task.figures(Evaluated("test", {}, outputs))
    title, pieces = shown.texts[0]
    assert "nats per hidden token" in title and [p.split()[0] for p, _ in pieces] == ["[CLS]", "d", "b", "[SEP]"]
    assert [nats > 0 for _, nats in pieces] == [False, True, True, False]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="Decoder cannot guess hidden tokens"):
        MaskedLanguageModel(Decoder())
    with pytest.raises(UserError, match="vocab_size is 5, but the tokenizer has 256"):
        MaskedLanguageModel(Bert(vocab_size=5), Symbols().state())
    task = MaskedLanguageModel(Bert(**{**TINY, "length": 4}))
    with pytest.raises(UserError, match="12 tokens is longer than the 4 positions"):
        jax.jit(task.init)(jax.random.key(0), batch_of(2))
    with pytest.raises(UserError, match=r"set config\.data\.dataset\.next_sentence too"):
        MaskedLanguageModel(Bert(**TINY), next_sentence=True).init(jax.random.key(0), batch_of(2))
    task = MaskedLanguageModel(Bert(**TINY, num_classes=3, pooled=True))
    assert task.model.masked and task.model.num_classes is None and not task.model.has_pooler
