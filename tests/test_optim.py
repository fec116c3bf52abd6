"""The optimizer a config describes is the optax chain one would write by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from bigbase_jax import parallel
from bigbase_jax.build import build, deferred, target
from bigbase_jax.core import UserError, flatten
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.optim import Optimizer, _matches
from bigbase_jax.runtime.checkpoint import Checkpoints
from bigbase_jax.tasks.language import CausalLanguageModel

PARAMS = {
    "conv1": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full((3,), 2.0)},
    "head": {"kernel": jnp.full((3, 1), 2.0)},
}
GRADS = jax.tree.map(lambda p: 0.3 * jnp.arange(1.0, p.size + 1).reshape(p.shape), PARAMS)


def after(tx, steps=3):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def same(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), a, b)


def test_adamw_with_warmup_cosine_clipping_and_mask_is_the_chain_by_hand():
    node = target(
        Optimizer,
        learning_rate=0.1,
        algorithm=deferred(optax.adamw, b1=0.8),
        schedule=deferred(optax.cosine_decay_schedule, alpha=0.1),
        warmup=0.2,
        weight_decay=0.5,
        clip_norm=1.0,
    )
    rate = optax.join_schedules([optax.linear_schedule(0, 0.1, 2), optax.cosine_decay_schedule(0.1, 8, alpha=0.1)], [2])
    mask = {"conv1": {"kernel": True, "bias": False}, "head": {"kernel": True}}
    by_hand = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.8, weight_decay=0.5, mask=mask))
    ours = after(build(node).transform(PARAMS, 10))
    assert abs(ours["conv1"]["kernel"] - PARAMS["conv1"]["kernel"]).max() > 1e-2
    same(ours, after(by_hand))


def test_sgd_takes_weight_decay_as_l2_like_pytorch():
    tx = Optimizer(0.1, functools.partial(optax.sgd, momentum=0.9), weight_decay=0.01, decay_mask=".*").transform(
        PARAMS, 10
    )
    same(after(tx), after(optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9))))


@pytest.mark.parametrize(
    "schedule",
    [
        optax.cosine_decay_schedule,
        functools.partial(optax.linear_schedule, end_value=0.0),
        optax.warmup_cosine_decay_schedule,
    ],
)
def test_schedules_of_any_spelling_reach_the_peak_and_decay(schedule):
    if schedule is optax.warmup_cosine_decay_schedule:
        schedule = functools.partial(schedule, warmup_steps=10)
    rate = Optimizer(0.2, schedule=functools.partial(schedule)).rate(100)
    values = [float(rate(s)) for s in range(101)]
    assert max(values) == pytest.approx(0.2) and values[-1] < 0.01


def test_groups_freeze_scale_and_insist_on_covering_everything():
    plain = after(Optimizer(0.1, functools.partial(optax.sgd)).transform(PARAMS, 10))
    grouped = Optimizer(
        0.1, functools.partial(optax.sgd), groups=(("^conv1.bias", 0.0), ("^conv1", 0.5), ("head", 1.0))
    )
    tx = grouped.transform(PARAMS, 10)
    got = after(tx)
    same(got["conv1"]["bias"], PARAMS["conv1"]["bias"])
    same(got["conv1"]["kernel"], (PARAMS["conv1"]["kernel"] + plain["conv1"]["kernel"]) / 2)
    same(got["head"], plain["head"])
    with pytest.raises(UserError, match=r"covers no rate for conv1.bias, conv1.kernel; add"):
        Optimizer(0.1, groups=(("head", 1.0),)).transform(PARAMS, 10)
    with pytest.raises(UserError, match="'nowhere' matches no parameter"):
        Optimizer(0.1, groups=(("nowhere", 0.0), (".*", 1.0))).transform(PARAMS, 10)
    with pytest.raises(UserError, match="not a regular expression"):
        Optimizer(0.1, groups=(("(", 0.0),)).transform(PARAMS, 10)


def test_frozen_parameters_keep_no_optimizer_state():
    tx = Optimizer(0.1, functools.partial(optax.adam), groups=(("conv1", 0.0), (".*", 1.0))).transform(PARAMS, 10)
    sizes = [x.size for x in jax.tree.leaves(tx.init(PARAMS)) if hasattr(x, "size") and x.size > 1]
    assert sizes == [3, 3]


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="warmup is 20 steps, but the run has only 10"):
        Optimizer(0.1, warmup=20).rate(10)


# ---------------------------------------------------------------------------- numbers that are no part of the program

TASK = toys.Regression(toys.Net())
BATCH = jax.device_get(toys.regression_batch(8))
SPEC = jax.eval_shape(lambda x: x, BATCH)
SHAPES = jax.eval_shape(TASK.init, jax.random.key(0), BATCH)["params"]
MASK = {"hidden": {"kernel": True, "bias": False}, "out": {"kernel": True, "bias": False}}
STEPS = 6


def started(tx, seed, numbers=None, **how):
    """(program, batch, text of its step, text of its init)."""
    mesh = parallel.make_mesh(1)
    program = parallel.program(TASK, tx, SPEC, mesh, seed=seed, numbers=numbers, **how)
    batch = parallel.put(BATCH, mesh)
    return program, batch, program.step.lower(program.state, batch).as_text(), program.init.lower(batch).as_text()


def run(program, batch):
    state, rates = program.init(batch), []
    for _ in range(STEPS):
        state, sums = program.step(state, batch)
        rates.append(float(sums["learning_rate"].mean()) if "learning_rate" in sums else None)
    return jax.device_get(state), rates


def cosine(rate):
    warm = optax.linear_schedule(0, rate, 2)
    return optax.join_schedules([warm, optax.cosine_decay_schedule(rate, STEPS - 2)], [2])


def adamw(rate, decay, clip):
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(rate, weight_decay=decay, mask=MASK))


def grouped(rate, decay, clip):
    def slower(step):
        return 0.5 * rate(step)

    labels = {"hidden": {"kernel": "slow", "bias": "frozen"}, "out": {"kernel": "full", "bias": "full"}}
    parts = {
        "slow": optax.adamw(slower, weight_decay=decay, mask=lambda params: MASK),
        "full": optax.adamw(rate, weight_decay=decay, mask=lambda params: MASK),
        "frozen": optax.set_to_zero(),
    }
    return optax.chain(optax.clip_by_global_norm(clip), optax.partition(parts, labels))


def sgd(rate, decay, clip):
    l2 = optax.add_decayed_weights(decay, MASK)
    return optax.chain(optax.clip_by_global_norm(clip), l2, optax.sgd(rate, momentum=0.9))


@pytest.mark.parametrize(
    ("by_hand", "algorithm", "schedule", "groups", "how"),
    [
        (adamw, optax.adamw, optax.cosine_decay_schedule, (), {"ema_decay": 0.9}),
        (sgd, functools.partial(optax.sgd, momentum=0.9), None, (), {"microbatches": 2}),
        (
            grouped,
            optax.adamw,
            optax.cosine_decay_schedule,
            (("hidden.bias", 0.0), ("hidden", 0.5), (".*", 1.0)),
            {"mode": "shard_map"},
        ),
    ],
    ids=["adamw", "sgd", "groups"],
)
def test_rate_decay_clip_and_seed_are_no_part_of_the_program(by_hand, algorithm, schedule, groups, how):
    """One text of step and init for all values; each run is that of optax with constants, also its logged rate."""
    texts, ends = [], []
    for rate, decay, clip, seed in ((0.1, 0.3, 0.5, 1), (0.03, 0.01, 0.2, 7)):
        warmup = 2 if schedule else 0
        optimizer = Optimizer(rate, algorithm, schedule, warmup, decay, clip_norm=clip, groups=groups)
        tx, numbers = optimizer.transform(SHAPES, STEPS), optimizer.numbers(STEPS)
        assert numbers == {"learning_rate": rate, "weight_decay": decay, "clip_norm": clip}
        program, batch, *text = started(tx, seed, numbers, **how)
        state, rates = run(program, batch)
        constant = cosine(rate) if schedule else optax.constant_schedule(rate)
        np.testing.assert_allclose(rates, [constant(step) for step in range(STEPS)], rtol=1e-6)
        plain, batch, *plain_text = started(by_hand(constant, decay, clip), seed, **how)
        same(state.params, run(plain, batch)[0].params)
        texts.append((*text, *plain_text))
        ends.append(state.params["out"]["kernel"])
    assert np.abs(ends[0] - ends[1]).max() > 1e-2
    assert texts[0][2] != texts[1][2], "constants are part of the text"
    assert texts[0][:2] == texts[1][:2]


def test_a_decay_of_zero_is_another_program_only_where_the_algorithm_has_none_of_its_own():
    for algorithm, differs in ((optax.sgd, True), (optax.adamw, False)):
        found = []
        for decay in (0.0, 0.1):
            optimizer = Optimizer(0.1, algorithm, weight_decay=decay)
            found.append((optimizer.numbers(STEPS), started(optimizer.transform(SHAPES, STEPS), 0)[2]))
        assert ("weight_decay" not in found[0][0]) == differs and "weight_decay" in found[1][0]
        assert (found[0][1] != found[1][1]) == differs


def test_a_rate_that_its_schedule_compares_in_python_stays_in_the_program():
    schedule = functools.partial(optax.warmup_cosine_decay_schedule, warmup_steps=2)
    optimizer = Optimizer(0.1, optax.sgd, schedule)
    assert optimizer.numbers(STEPS) == {}
    program, batch, *_ = started(optimizer.transform(SHAPES, STEPS), 0, {})
    state, rates = run(program, batch)
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, STEPS)
    np.testing.assert_allclose(rates, [rate(step) for step in range(STEPS)], rtol=1e-6)
    same(state.params, run(*started(optax.sgd(rate), 0)[:2])[0].params)


@pytest.mark.parametrize("seed", [0, 5, -1, 2**31 + 5, 2**40 + 3])
def test_a_seed_that_is_an_argument_gives_the_key_that_jax_gives(seed):
    program, batch, *_ = started(optax.sgd(0.1), seed)
    key = jax.random.split(jax.random.key(seed))[1]
    assert (jax.random.key_data(program.init(batch).key) == jax.random.key_data(key)).all()


def test_steps_leave_the_numbers_of_the_next_start_alone():
    """The step may overwrite the state's buffers, which must not be those of the arguments of ``init``."""
    optimizer = Optimizer(0.1, weight_decay=0.2, clip_norm=0.3)
    program, batch, *_ = started(optimizer.transform(SHAPES, STEPS), 3, optimizer.numbers(STEPS))
    first, _ = run(program, batch)
    again, _ = run(program, batch)
    jax.tree.map(np.testing.assert_array_equal, first.opt_state.hyperparams, again.opt_state.hyperparams)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert dict(first.opt_state.hyperparams) == pytest.approx(
        {"learning_rate": 0.1, "weight_decay": 0.2, "clip_norm": 0.3}
    )


# --------------------------------------------------------------------------------------------------------- Muon

MUON = functools.partial(optax.contrib.muon, beta=0.9)
MATRICES = {  # parameter -> its shape; [matrices, rows, columns]
    "encoder.blocks.attention.query.kernel": ((2, 6, 2, 4), (2, 6, 8)),
    "encoder.blocks.attention.out.kernel": ((2, 2, 4, 6), (2, 8, 6)),
    "encoder.blocks.mlp.up.kernel": ((2, 6, 9), (2, 6, 9)),
    "decoder.block_0.cross_attention.value.kernel": ((6, 2, 4), (1, 6, 8)),
    "decoder.block_0.cross_attention.out.kernel": ((2, 4, 6), (1, 8, 6)),
    "layer1_0.conv1.kernel": ((3, 3, 4, 8), (1, 36, 8)),
    "pooler.kernel": ((6, 6), (1, 6, 6)),
}
ADAMS = {
    "text.embedding": (7, 6),
    "text.head": (6, 7),
    "embedding.kernel": (4, 4, 3, 6),
    "depthwise.kernel": (3, 3, 1, 8),
    "head.out.kernel": (6, 2),
    "fc.kernel": (6, 2),
    "encoder.blocks.norm1.scale": (2, 6),
    "encoder.blocks.attention.query.bias": (2, 2, 4),
    "cls": (1, 1, 6),
}


def nested(flat):
    tree = {}
    for name, value in flat.items():
        node = tree
        for part in name.split(".")[:-1]:
            node = node.setdefault(part, {})
        node[name.split(".")[-1]] = value
    return tree


def newton_schulz(g_IO):
    """Jordan et al. 2024, after whom near orthogonal is good enough."""
    x = g_IO / np.linalg.norm(g_IO)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_orthogonalises_kernels_as_the_matrices_that_they_are_and_adam_has_the_rest():
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, (shape, _) in MATRICES.items()} | ADAMS
    params, grads = (nested({n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}) for _ in range(2))
    tx = Optimizer(0.1, MUON, weight_decay=0.3, decay_mask="kernel$|head$").transform(params, 10)
    updates = flatten(tx.update(grads, tx.init(params), params)[0])
    mask = functools.partial(_matches, pattern="kernel$|head$")
    adam = optax.adamw(0.1, nesterov=True, weight_decay=0.3, mask=mask)
    by_adam, params, flat = flatten(adam.update(grads, adam.init(params), params)[0]), flatten(params), flatten(grads)
    assert set(flat) == set(shapes)
    for name in ADAMS:
        np.testing.assert_allclose(updates[name], by_adam[name], rtol=1e-4, atol=1e-6)
    for name, (shape, (n, rows, columns)) in MATRICES.items():
        g_nIO = flat[name].reshape(n, rows, columns)
        orthogonal = 0.2 * max(columns, rows) ** 0.5 * np.stack([newton_schulz(g_IO) for g_IO in g_nIO]).reshape(shape)
        np.testing.assert_allclose(updates[name], -0.1 * (orthogonal + 0.3 * params[name]), atol=1e-4)
        assert np.abs(updates[name] - by_adam[name]).max() > 1e-2


@pytest.mark.slow
def test_muon_over_devices_with_accumulation_an_average_and_stacked_blocks_is_that_of_one(tmp_path):
    model = Decoder(vocab_size=11, length=8, width=16, depth=2, heads=2, scan=True, tied=False)
    tokens = np.random.default_rng(0).integers(0, 11, (8, 9), np.int32)
    ones = np.ones((8, 8), np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones, "bytes": ones}
    batch |= {"positions": ones * np.arange(8, dtype=np.int32), "mask": np.ones(8, np.float32)}
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    task = CausalLanguageModel(model)
    params = jax.eval_shape(task.init, jax.random.key(0), spec)["params"]

    def trained(algorithm, devices, **how):
        mesh = parallel.make_mesh(devices, parallel.MeshShape(fsdp=devices))
        tx = Optimizer(0.02, algorithm, weight_decay=0.1, clip_norm=1.0).transform(params, 10)
        program = parallel.program(task, tx, spec, mesh, seed=1, microbatches=2, ema_decay=0.9, **how)
        state, losses = program.init(parallel.put(batch, mesh)), []
        for _ in range(4):
            state, sums = program.step(state, parallel.put(batch, mesh))
            losses.append(float(sums["loss"].mean()))
        return losses, state

    one, _ = trained(optax.contrib.muon, 1)
    losses, state = trained(optax.contrib.muon, 2, sharding=("fsdp:16",))
    np.testing.assert_allclose(losses, one, rtol=1e-4)
    assert losses[-1] < losses[0]
    other, _ = trained(optax.adamw, 1)
    assert abs(other[-1] - one[-1]) > 1e-3
    spread = {name: x.sharding.spec for name, x in flatten(state.params).items()}
    slots = {name: x for name, x in flatten(state.opt_state).items() if ".mu." in name}
    for name, spec_of in spread.items():
        (slot,) = (x for path, x in slots.items() if path.endswith(f".mu.{name}"))
        assert slot.sharding.spec == spec_of
        by_muon = name.startswith("encoder.blocks") and name.endswith("kernel")
        assert any(path.endswith(f".mu.{name}") and ".muon." in path for path in slots) == by_muon
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, state, {})
    checkpoints.close()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    kept = Checkpoints(tmp_path, read_only=True).restore(abstract, 4)
    jax.tree.map(np.testing.assert_array_equal, kept.opt_state, state.opt_state)
