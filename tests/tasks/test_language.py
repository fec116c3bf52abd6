"""Causal language modelling: the loss in chunks, exact sums over padding, bits per byte by hand, what users read."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import loss_of, measured, sums_of

from bigbase_jax import parallel
from bigbase_jax.core import Evaluated, Task, UserError, add
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.tasks.language import PADDING, CausalLanguageModel
from bigbase_jax.text.tokenizer import Symbols

L, V = 12, 11
TINY = {"vocab_size": V, "length": L, "width": 16, "depth": 1, "heads": 2}


def batch_of(size, seed=0, masked=0):
    """Two documents and padding in each row."""
    rng = np.random.default_rng(seed)
    segment_ids = np.tile([1] * 5 + [2] * 4 + [0] * 3, (size, 1)).astype(np.int32)
    positions = np.tile([*range(5), *range(4), 0, 0, 0], (size, 1)).astype(np.int32)
    real = segment_ids > 0
    arrays = {name: (rng.integers(0, V, (size, L)) * real).astype(np.int32) for name in ("inputs", "targets")}
    bytes_BL = (rng.integers(0, 4, (size, L)) * real).astype(np.int32)
    mask = np.ones(size, np.float32)
    mask[size - masked :] = 0
    arrays |= {"segment_ids": segment_ids, "positions": positions, "bytes": bytes_BL, "mask": mask}
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def ready(**more):
    task = CausalLanguageModel(Decoder(**TINY), **more)
    shapes = jax.eval_shape(task.init, jax.random.key(0), batch_of(2))
    random = np.random.default_rng(0)
    return task, jax.tree.map(lambda x: jnp.float32(0.3 * random.normal(size=x.shape)), shapes)


@functools.cache
def compiled(task):
    def loss(params, batch):
        total, _ = loss_of(task, {"params": params}, batch, jax.random.key(0))
        return total.total / total.weight, total

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def value_and_grad(task, variables, batch):
    (_, total), grads = compiled(task)(variables["params"], batch)
    return total, grads


def test_the_loss_is_the_mean_over_real_targets():
    task, variables = ready()
    batch = batch_of(3, masked=1)
    (total, weight), state = jax.jit(functools.partial(loss_of, task))(variables, batch, jax.random.key(0))
    apply = jax.jit(task.model.apply)
    logits = apply(variables, batch["inputs"], batch["segment_ids"], batch["positions"])
    logp = jax.nn.log_softmax(logits)
    chosen = [float(logp[b, t, batch["targets"][b, t]]) for b in range(2) for t in range(9)]
    assert weight == 2 * 9 and state == {}
    np.testing.assert_allclose(total, -sum(chosen), rtol=1e-5)
    assert all(hasattr(task, name) for name in [*Task.__annotations__, *vars(Task)] if not name.startswith("_"))


def test_what_has_no_weight_is_read_but_does_not_count():
    task, variables = ready()
    weighted = CausalLanguageModel(Decoder(**TINY), weighted=True)
    batch = batch_of(3, masked=1)
    weights = np.zeros((3, L), np.int32)
    weights[:, 2:4] = weights[:, 7:10] = 1  # the last of them is padding
    chosen = {**batch, "weights": jnp.asarray(weights)}
    assert weighted.inputs == (*task.inputs, "weights") and "weights" not in task.inputs
    total, _ = value_and_grad(weighted, variables, chosen)
    outputs = jax.jit(task.predict)(variables, {name: batch[name] for name in task.inputs})
    found = jax.jit(weighted.predict)(variables, {name: chosen[name] for name in weighted.inputs})
    counted = (weights > 0) & (np.asarray(batch["segment_ids"]) > 0)
    np.testing.assert_array_equal(found["target"], np.where(counted, outputs["target"], PADDING))
    np.testing.assert_array_equal(found["bytes"], np.where(counted, outputs["bytes"], 0))
    np.testing.assert_allclose(found["log_probability"], outputs["log_probability"] * counted, rtol=1e-6)
    assert total.weight == counted[:2].sum() == 8
    np.testing.assert_allclose(total.total, -np.asarray(found["log_probability"])[:2].sum(), rtol=1e-5)
    early = value_and_grad(weighted, variables, {**chosen, "targets": chosen["targets"].at[:, 0].add(1) % V})
    np.testing.assert_allclose(early[0].total, total.total, rtol=1e-6)  # that target does not count,
    seen = {**chosen, "inputs": chosen["inputs"].at[:, 0].add(1) % V}
    assert abs(value_and_grad(weighted, variables, seen)[0].total - total.total) > 1e-3  # but what stands there is read
    for wrong, given in ((task, chosen), (weighted, batch)):
        with pytest.raises(UserError, match="config.task.weighted is"):
            jax.eval_shape(wrong.init, jax.random.key(0), given)


@pytest.mark.parametrize("chunks", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_the_loss_in_chunks_is_the_loss(chunks):
    plain, variables = ready()
    chunked, _ = ready(logit_chunks=chunks)
    batch = batch_of(3, masked=1)
    expected, ours = (value_and_grad(task, variables, batch) for task in (plain, chunked))
    assert plain.chunks(L) == 1
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), ours[1], expected[1])
    outputs = [jax.jit(task.predict)(variables, batch)["log_probability"] for task in (plain, chunked)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


def test_logits_never_exist_as_a_whole():
    task, variables = ready(logit_chunks=4)
    batch = batch_of(3)
    lowered = jax.jit(
        lambda v: jax.grad(lambda p: loss_of(task, {"params": p}, batch, jax.random.key(0))[0].total)(v["params"])
    )
    text = lowered.lower(variables).as_text()
    assert f"tensor<3x{L // 4}x{V}xf32>" in text and f"tensor<3x{L}x{V}xf32>" not in text
    plain, _ = ready()
    text = jax.jit(lambda v: loss_of(plain, v, batch, jax.random.key(0))[0].total).lower(variables).as_text()
    assert f"tensor<3x{L}x{V}xf32>" in text


@pytest.mark.parametrize(
    ("vocab", "length", "chunks"), [(65, 64, 1), (50257, 1024, 16), (50257, 1021, 1021), (2**23, 8, 8)]
)
def test_large_vocabularies_are_chunked_by_themselves(vocab, length, chunks):
    assert CausalLanguageModel(Decoder(vocab_size=vocab, length=length)).chunks(length) == chunks


def test_padded_examples_and_positions_change_nothing():
    task, variables = ready()
    batch = batch_of(4, masked=2)
    alone = {name: x[:2] for name, x in batch.items()}
    noisy = {**batch, "targets": batch["targets"].at[2:].set(7).at[:, 9:].set(3)}
    noisy["inputs"] = batch["inputs"].at[:, 9:].set(5)
    for other in (alone, noisy):
        expected, ours = (value_and_grad(task, variables, b) for b in (batch, other))
        np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), ours[1], expected[1])
    sums = [jax.jit(functools.partial(sums_of, task))(variables, b) for b in (batch, alone)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *sums)


def test_microbatches_add_up():
    task, variables = ready()
    batch = batch_of(4, masked=1)
    loss = jax.jit(functools.partial(loss_of, task))
    whole, _ = loss(variables, batch, jax.random.key(0))
    parts = [loss(variables, {k: x[i : i + 2] for k, x in batch.items()}, jax.random.key(0))[0] for i in (0, 2)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), add(*parts), whole)


def test_bits_per_byte_and_perplexity_by_hand():
    """Tokens of probability 1/2, 1/8 and 1/4 that stand for 1, 3 and 0 bytes: 1 + 3 + 2 bits over 4 bytes."""

    class Given(CausalLanguageModel):
        def predict(self, variables, inputs):
            return variables

    task = Given(Decoder(**TINY))
    outputs = {
        "log_probability": jnp.log(jnp.array([[0.5, 0.125, 0.25, 1.0], [0.5, 1.0, 1.0, 1.0]])),
        "target": jnp.array([[1, 2, 3, PADDING], [1, PADDING, PADDING, PADDING]]),
        "bytes": jnp.array([[1, 3, 0, 0], [1, 0, 0, 0]]),
    }
    first = {"mask": jnp.array([1.0, 0.0])}
    sums = sums_of(task, outputs, first)
    assert float(sums["bits_per_byte"].mean()) == pytest.approx(6 / 4, rel=1e-6)
    assert float(sums["loss"].mean()) == pytest.approx(6 * math.log(2) / 3, rel=1e-6)
    both = sums_of(task, outputs, {"mask": jnp.ones(2)})
    assert float(both["bits_per_byte"].mean()) == pytest.approx(7 / 5, rel=1e-6)
    report = measured(task, {name: np.asarray(x) for name, x in outputs.items()})
    assert report == {"perplexity": pytest.approx(2 ** (7 / 4), rel=1e-6), "tokens": 4}


def test_what_a_user_reads():
    tokenizer = Symbols("abcdefghij", fallback=False, end=True)
    task, _ = ready(tokenizer=tokenizer.state())
    output = {
        "log_probability": np.log(np.array([0.5, 0.25, 1.0, 0.125], np.float32)),
        "target": np.array([0, 1, PADDING, 10]),
        "bytes": np.array([1, 1, 0, 0]),
    }
    answer = task.postprocess(output, {})
    assert [piece for piece, _ in answer["text"]] == ["a", "b", "<|endoftext|>"]
    assert answer["text"][1][1] == pytest.approx(math.log(0.25), abs=1e-4)
    assert (
        answer["tokens"] == 3
        and answer["perplexity"] == pytest.approx(4)
        and answer["bits_per_byte"] == pytest.approx(3)
    )
    numbers = ready()[0].postprocess(output, {})
    assert [piece for piece, _ in numbers["text"]] == ["0", "1", "10"]
    rows = {name: np.stack([x, x]) for name, x in output.items()}
    rows["log_probability"][1] *= 2
    title, passage = next(task.figures(Evaluated("test", {}, rows))).texts[0]
    assert title == f"{2 * math.log(4):.3f} nats per token"
    assert [piece for piece, _ in passage] == ["a", "b", "<|endoftext|>"]
    assert passage[0][1] == pytest.approx(2 * math.log(2), rel=1e-6)


@pytest.mark.slow
def test_it_learns_to_count():
    task = CausalLanguageModel(Decoder(**TINY))
    tokens = (np.arange(4)[:, None] + np.arange(L + 1)) % V
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "bytes": np.ones((4, L)), "mask": np.ones(4)}
    batch = {**batch, "segment_ids": np.ones((4, L)), "positions": np.tile(np.arange(L), (4, 1))}
    batch = {name: jnp.asarray(x, jnp.float32 if name == "mask" else jnp.int32) for name, x in batch.items()}
    variables = jax.jit(task.init)(jax.random.key(0), batch)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        key = jax.random.key(0)
        loss, grads = jax.value_and_grad(lambda p: loss_of(task, {"params": p}, batch, key)[0].mean())(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    params, state = variables["params"], tx.init(variables["params"])
    losses = []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(math.log(V), rel=0.05) and losses[-1] < 0.1


def train(model, devices=1, mesh=None, **how):
    """(losses, parameters) after two steps of ``parallel.program`` in chunks, from batches with uneven masks."""
    task = CausalLanguageModel(model, logit_chunks=3)
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch_of(8).items()}
    mesh = parallel.make_mesh(devices, parallel.MeshShape(**(mesh or {})))
    program = parallel.program(task, optax.sgd(0.3), spec, mesh, seed=1, **how)
    state, losses = program.init(parallel.put(batch_of(8), mesh)), []
    start = jax.device_get(state.params)
    for step in range(2):
        state, sums = program.step(state, parallel.put(batch_of(8, seed=step, masked=3), mesh))
        losses.append(float(sums["loss"].mean()))
    after = jax.device_get(state.params)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (start, after)), strict=True)) > 1e-2
    return losses, after


STACK = Decoder(**{**TINY, "depth": 4}, scan=True, pipeline_microbatches=2)


@pytest.mark.parametrize(
    ("model", "form"),
    [
        (Decoder(**TINY), {"devices": 2, "mesh": {"sequence": 2}}),
        pytest.param(
            Decoder(**TINY),
            {"mesh": {"fsdp": 2, "sequence": 2}, "sharding": ("fsdp:16",), "microbatches": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(Decoder(**TINY), {"mode": "shard_map", "mesh": {"fsdp": 2}}, marks=pytest.mark.slow),
        pytest.param(Decoder(**TINY), {"mesh": {"tensor": 2, "sequence": 2}}, marks=pytest.mark.slow),
        pytest.param(STACK, {"mesh": {"pipeline": 2}}, marks=pytest.mark.slow),
    ],
    ids=["sequence", "fsdp-sequence", "shard_map", "tensor-sequence", "pipeline"],
)
def test_where_a_step_is_computed_changes_nothing(model, form):
    expected, ours = train(model), train(model, **{"devices": 8, **form})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, expected)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ready(logit_chunks=5), "logit_chunks 5 does not divide a length of 12"),
        (lambda: ready(logit_chunks=0), "logit_chunks is 0"),
        (lambda: ready(tokenizer=Symbols().state()), "vocab_size is 11, but the tokenizer has 256"),
        (
            lambda: CausalLanguageModel(Decoder(**{**TINY, "length": 8})).init(jax.random.key(0), batch_of(1)),
            "longer than the 8 positions",
        ),
    ],
)
def test_mistakes_are_one_sentence(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_exact_match_is_the_share_of_answers_that_greedy_decoding_writes():
    """Row by row: two answers, of which the second has one wrong token; one right answer; none at all."""
    task = CausalLanguageModel(Decoder(5, 6, 16, 1, 2), weighted=True)
    target = np.array([[1, 2, -1, 3, 4, -1], [-1, -1, 2, 2, 2, 2], [-1] * 6])
    likeliest = target != -1
    likeliest[0, 4] = False
    examples = {"target": target, "likeliest": likeliest, "log_probability": np.zeros(target.shape)}
    found = measured(task, examples)
    assert found["answers"] == 3 and found["exact_match"] == pytest.approx(2 / 3)
    assert "exact_match" not in measured(CausalLanguageModel(task.model), examples)


def test_the_likeliest_tokens_are_those_of_the_logits():
    task = CausalLanguageModel(Decoder(5, 6, 16, 1, 2), logit_chunks=2, weighted=True)
    random = np.random.default_rng(0)
    batch = {name: random.integers(0, 5, (2, 6)).astype(np.int32) for name in ("inputs", "targets", "bytes")}
    batch |= {"segment_ids": np.ones((2, 6), np.int32), "positions": np.tile(np.arange(6, dtype=np.int32), (2, 1))}
    batch |= {"weights": np.tile(np.int32([0, 1, 1]), (2, 2)), "mask": np.ones(2, np.float32)}
    variables = jax.jit(task.init)(jax.random.key(0), batch)
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    logits = task.model.apply(variables, batch["inputs"], batch["segment_ids"], batch["positions"])
    batch["targets"] = batch["targets"].at[0].set(jnp.argmax(logits[0], -1))
    expected = (np.argmax(logits, -1) == batch["targets"]) & (batch["weights"] > 0)
    np.testing.assert_array_equal(task.predict(variables, batch)["likeliest"], expected)
    assert 0 < expected.sum() < batch["weights"].sum()
