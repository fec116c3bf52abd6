"""One step, many forms: jit, shard_map, one device, microbatches and padding agree."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import Detection, Net, Regression, loss_of, regression_batch

from bigbase_jax import parallel
from bigbase_jax.core import UserError, flatten


def start_program(task, devices, shape=None, batch_size=16, tx=None, **how):
    mesh = parallel.make_mesh(devices, parallel.MeshShape(**(shape or {})))
    return mesh, parallel.program(task, tx or optax.adam(0.05), regression_batch(batch_size), mesh, seed=1, **how)


def run_steps(task, devices, mode="jit", microbatches=1, batch_size=16, masked=0, steps=3, ema=None, **how):
    mesh, program = start_program(
        task, devices, batch_size=batch_size, mode=mode, microbatches=microbatches, ema_decay=ema, **how
    )
    state = program.init(parallel.put(jax.device_get(regression_batch(batch_size)), mesh))
    start = jax.device_get(state.params)
    losses = []
    for i in range(steps):
        batch = parallel.put(jax.device_get(regression_batch(batch_size, seed=i, masked=masked)), mesh)
        state, sums = program.step(state, batch)
        losses.append(float(sums["loss"].mean()))
    return start, jax.device_get(state), losses


def assert_same(a, b, tolerance=1e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), a, b)


def moved(start, state):
    return any(
        np.abs(a - b).max() > 1e-3 for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(state.params), strict=True)
    )


COLUMNS = ((r"hidden\.kernel$", (None, "tensor")), (r"out\.kernel$", ("tensor", None)), "replicated")


@pytest.mark.parametrize(
    "form",
    [
        {"devices": 8},
        {"devices": 8, "mode": "shard_map"},
        {"devices": 2, "mode": "shard_map", "microbatches": 4},
        {"devices": 1, "microbatches": 4},
        {"devices": 4, "microbatches": 2},
        {"devices": 8, "shape": {"fsdp": 4}, "sharding": ("fsdp:1",)},
        {"devices": 8, "shape": {"data": 1, "fsdp": 8}, "sharding": ("fsdp:1",), "microbatches": 2},
        {"devices": 8, "shape": {"fsdp": 2}, "sharding": ("fsdp:1",), "mode": "shard_map"},
        {
            "devices": 8,
            "shape": {"data": 1, "fsdp": 8},
            "sharding": ("fsdp:1",),
            "mode": "shard_map",
            "microbatches": 2,
        },
        {"devices": 5, "shape": {"tensor": 5}, "sharding": COLUMNS, "batch_size": 16},
    ],
)
@pytest.mark.parametrize("masked", [0, 5])
def test_every_form_of_the_step_agrees_with_the_plain_one(form, masked):
    start, plain, losses = run_steps(Regression(), 1, masked=masked)
    _, other, other_losses = run_steps(Regression(), **form, masked=masked)
    assert moved(start, plain)
    assert_same(losses, other_losses)
    assert_same(plain.params, other.params)


def ratio_of_sums(task, params, batch):
    loss, _ = task.loss({"params": params}, batch, None)
    return sum(loss.scale.get(name, 1.0) * term.total / term.weight for name, term in loss.terms.items()), loss


@pytest.mark.parametrize(
    "form",
    [
        {"devices": 1},
        {"devices": 8},
        {"devices": 1, "microbatches": 4},
        {"devices": 2, "microbatches": 4, "mode": "shard_map"},
        {"devices": 8, "shape": {"data": 1, "fsdp": 8}, "sharding": ("fsdp:1",), "mode": "shard_map"},
        {"devices": 8, "shape": {"fsdp": 4}, "sharding": ("fsdp:1",), "microbatches": 2},
    ],
)
def test_each_term_of_a_loss_is_divided_by_its_own_weight_over_the_whole_batch(form):
    """No slice and no device has the batch's share of boxes, some have none: a ratio of sums, not a mean of ratios."""
    task, tx = Detection(), optax.adam(0.05)
    start, after, losses = run_steps(task, **form, masked=5, tx=tx)
    params, opt_state, expected = start, tx.init(start), []
    for seed in range(3):
        batch = regression_batch(16, seed, masked=5)
        (value, loss), grads = jax.value_and_grad(functools.partial(ratio_of_sums, task), has_aux=True)(params, batch)
        updates, opt_state = tx.update(grads, opt_state)
        params, expected = optax.apply_updates(params, updates), [*expected, float(value)]
    rows = np.asarray(batch["mask"] * (batch["x"][:, 0] > 0.3)).reshape(4, 4)
    assert rows.sum(1).min() < loss.terms["boxes"].weight / 4 < rows.sum(1).max()
    assert moved(start, after)
    assert_same(losses, expected)
    assert_same(after.params, params)


def test_terms_and_what_is_logged_beside_them_are_told_by_name():
    task, batch = Detection(), regression_batch(16)
    mesh, program = start_program(task, 2, microbatches=2)
    state = program.init(parallel.put(jax.device_get(batch), mesh))
    value, loss = ratio_of_sums(task, jax.device_get(state.params), batch)
    _, sums = program.step(state, parallel.put(jax.device_get(batch), mesh))
    assert sums.keys() == {"loss", "classes", "boxes", "size", "grad_norm"}
    assert_same({name: sums[name] for name in ("classes", "boxes", "size")}, {**loss.terms, **loss.aux})
    np.testing.assert_allclose(sums["loss"].mean(), value, rtol=1e-5)


def test_weights_are_summed_without_another_forward_pass():
    spec = jax.eval_shape(lambda: regression_batch(16))
    counts = []
    for task in (Regression(Net(width=64)), Detection(Net(width=64))):
        mesh, program = start_program(task, 1, tx=optax.sgd(0.1), microbatches=2)
        text = program.step.lower(program.state, parallel.placed_batch(spec, mesh)).compile().as_text()
        counts.append(text.count(" dot("))
    assert counts[0] == counts[1] > 0


def test_names_of_a_loss_do_not_clash():
    class Twice(Detection):
        def loss(self, variables, batch, key):
            loss, state = super().loss(variables, batch, key)
            return loss._replace(aux={"boxes": loss.terms["boxes"]}), state

    class Named(Detection):
        def loss(self, variables, batch, key):
            loss, state = super().loss(variables, batch, key)
            return loss._replace(terms={**loss.terms, "loss": loss.terms["boxes"]}), state

    for task in (Twice(), Named()):
        with pytest.raises(ValueError, match="let all names differ"):
            run_steps(task, 1, steps=1)


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_batchnorm_statistics_are_those_of_the_global_batch(mode):
    _, plain, losses = run_steps(Regression(Net(norm=True)), 1)
    _, other, other_losses = run_steps(Regression(Net(norm=True)), 8, mode)
    assert np.abs(plain.model_state["batch_stats"]["norm"]["mean"]).max() > 1e-3
    assert_same(losses, other_losses)
    assert_same((plain.params, plain.model_state), (other.params, other.model_state), 1e-4)


def test_unsynchronised_batchnorm_would_differ(monkeypatch):
    _, plain, _ = run_steps(Regression(Net(norm=True)), 1)
    monkeypatch.setattr(parallel, "_synchronise_batchnorm", lambda call, args, kwargs, context: call(*args, **kwargs))
    _, other, _ = run_steps(Regression(Net(norm=True)), 8, "shard_map")
    with pytest.raises(AssertionError):
        assert_same(plain.params, other.params, 1e-4)


def test_padding_changes_nothing():
    task = Regression()
    mesh = parallel.make_mesh(1)
    full = regression_batch(16, masked=4)
    loss, _ = loss_of(task, task.init(jax.random.key(0), full), full)
    cut = {k: v[:12] for k, v in full.items()}
    loss_cut, _ = loss_of(task, task.init(jax.random.key(0), cut), cut)
    np.testing.assert_allclose(loss.mean(), loss_cut.mean(), rtol=1e-6)
    assert parallel.put(jax.device_get(full), mesh)["x"].shape == (16, 3)


def test_moving_average_follows_its_formula():
    _, state, _ = run_steps(Regression(), 1, steps=1, ema=0.99)
    start, after, _ = run_steps(Regression(), 1, steps=1)
    decay = min(0.99, 1 / 10)
    want = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, start, after.params)
    assert_same(state.ema["params"], want, 1e-6)
    assert state.variables() is state.ema


def test_coupled_losses_are_refused_where_the_batch_would_be_split():
    with pytest.raises(UserError, match="would split them"):
        run_steps(Regression(batch_coupled=True), 2, "shard_map")
    with pytest.raises(UserError, match="microbatches=2"):
        run_steps(Regression(batch_coupled=True), 1, microbatches=2)


def test_shard_map_fsdp_gathers_parameters_and_scatters_gradients():
    """Golden collectives, as above: one gather of each parameter in pieces, one reduce-scatter of its gradient."""
    shape, net = {"data": 1, "fsdp": 8}, Regression(Net(width=64))
    text = compiled_text(*start_program(net, 8, shape, tx=optax.sgd(0.1), sharding=("fsdp:1",), mode="shard_map"))
    pieces = 3  # hidden.kernel, hidden.bias and out.kernel; out.bias has one element
    assert text.count(" all-gather(") + text.count(" all-gather-start(") == pieces
    assert text.count(" reduce-scatter(") == pieces
    assert 1 <= text.count(" all-reduce(") <= 2  # the loss, its weight, the bias and the gradient's norm


def compiled_text(mesh, program, batch_size=16):
    spec = jax.eval_shape(lambda: regression_batch(batch_size))
    return program.step.lower(program.state, parallel.placed_batch(spec, mesh)).compile().as_text()


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_the_data_parallel_step_has_one_gradient_reduction(mode):
    """Golden collectives: if this changes, the step's communication changed; make sure that it is on purpose."""
    text = compiled_text(*start_program(Regression(), 8, tx=optax.sgd(0.1), mode=mode))
    assert text.count(" all-gather(") == 0
    assert 1 <= text.count(" all-reduce(") + text.count(" all-reduce-start(") <= 2


def test_errors_name_what_fits():
    mesh = parallel.make_mesh(8)
    with pytest.raises(UserError, match="batch_size 30 does not divide over 8 devices; use 24 or 32"):
        parallel.check_batch(30, mesh)
    parallel.check_batch(32, mesh, 4)
    with pytest.raises(UserError, match=r"8 devices x 4 microbatches; use 32 or 64"):
        parallel.check_batch(40, mesh, 4)
    with pytest.raises(UserError, match="has 8"):
        parallel.make_mesh(9)
    with pytest.raises(UserError, match="covers the parameter 'b.kernel'"):
        parallel.shardings({"a": {"kernel": 1}, "b": {"kernel": 1}}, mesh, (("^a", ()),))
    with pytest.raises(UserError, match="fills? the 8 there are|fill the 8"):
        parallel.make_mesh(8, parallel.MeshShape(data=3, tensor=2))
    with pytest.raises(UserError, match=r"data and tensor open"):
        parallel.MeshShape(tensor=-1)
    four = parallel.make_mesh(8, parallel.MeshShape(tensor=4))
    with pytest.raises(UserError, match=r"'kernel\$'.*does not divide the parameter 'a.kernel'.*tensor=4"):
        parallel.shardings({"a": {"kernel": jnp.zeros((8, 6))}}, four, (("kernel$", (None, "tensor")),))
    with pytest.raises(UserError, match="names the axis 'tensr'"):
        parallel.shardings({"a": {"kernel": jnp.zeros((8, 6))}}, four, (("kernel$", ("tensr",)),))
    with pytest.raises(UserError, match="names 'fdsp'"):
        parallel.shardings({"a": {"kernel": jnp.zeros((8, 6))}}, four, ("fdsp",))
    with pytest.raises(UserError, match="places 3 dimensions"):
        parallel.shardings({"a": {"kernel": jnp.zeros((8, 6))}}, four, (("kernel$", (None, None, "tensor")),))
    with pytest.raises(UserError, match="no parameter of this model is spread over that axis"):
        parallel.shardings({"a": {"kernel": jnp.zeros((8, 6))}}, four)
    with pytest.raises(UserError, match="knows the axes data, fsdp, expert; this mesh also has tensor=5"):
        run_steps(Regression(), 5, "shard_map", shape={"tensor": 5}, sharding=COLUMNS)
    with pytest.raises(UserError, match="24 does not divide over 16 rows|12 does not divide over 8 rows|use 8 or 16"):
        parallel.check_batch(9, parallel.make_mesh(8, parallel.MeshShape(fsdp=4)))
    with pytest.raises(UserError, match="'jit' or 'shard_map'"):
        run_steps(Regression(), 1, "pmap")


def test_rules_place_parameters_and_their_optimizer_slots_alike():
    rules = (*COLUMNS[:2], "fsdp:1")
    _, program = start_program(Regression(Net(width=6)), 8, {"fsdp": 2, "tensor": 2}, sharding=rules)
    specs = {name: x.sharding.spec for name, x in flatten(program.state).items()}
    P = jax.sharding.PartitionSpec
    assert specs["params.hidden.kernel"] == P(None, "tensor")
    assert specs["opt_state.0.mu.hidden.kernel"] == specs["opt_state.0.nu.hidden.kernel"] == P(None, "tensor")
    assert specs["step"] == specs["opt_state.0.count"] == specs["key"] == P()
    mesh = parallel.make_mesh(8, parallel.MeshShape(fsdp=4, tensor=2))
    shapes = {"encoder": {"block_0": {"mlp": {"up": {"kernel": jnp.zeros((64, 12)), "bias": jnp.zeros(12)}}}}}
    both = parallel.shardings(shapes, mesh, ("tensor", "fsdp:1"))["encoder"]["block_0"]["mlp"]["up"]
    assert both["kernel"].spec == P("fsdp", "tensor") and both["bias"].spec == P("tensor")
    assert parallel.shardings(shapes, mesh, ("tensor", "fsdp"))["encoder"]["block_0"]["mlp"]["up"]["kernel"].spec == P(
        None, "tensor"
    )
    assert parallel.shardings(
        {"w": jnp.zeros((3, 4, 8))}, parallel.make_mesh(8, parallel.MeshShape(fsdp=8)), ("fsdp:1",)
    )["w"].spec == P(None, None, "fsdp")


def test_the_step_is_compiled_for_each_shape_of_a_batch_and_counts_its_operations():
    mesh, program = start_program(Regression(), 2)
    batches = [jax.device_get(regression_batch(size)) for size in (8, 16)]
    steps = parallel.Steps(program, [parallel.global_spec(batch, mesh) for batch in batches], mesh)
    for batch in batches:
        placed = parallel.put(batch, mesh)
        (one, _), (same, _) = (step(program.init(placed), placed) for step in (steps, program.step))
        assert_same(one.params, same.params, 1e-6)
    assert 1.5 < steps.flops(batches[1]) / steps.flops(batches[0]) < 2.1


def test_parameters_are_born_where_they_live():
    """No device ever holds a whole parameter: the compiled init's largest buffer is a shard (and the shard's bits)."""

    class Wide(Net):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(4096, name="hidden")(x)[:, 0] + nn.Dense(1, name="out")(x)[:, 0]

    mesh, program = start_program(Regression(Wide()), 8, {"data": 1, "fsdp": 8}, sharding=("fsdp:1",))
    whole = (3 + 1) * 4096 * 4  # bytes of the kernel and the bias
    compiled = program.init.lower(parallel.placed_batch(jax.eval_shape(lambda: regression_batch(16)), mesh)).compile()
    memory = compiled.memory_analysis()
    assert 3 * whole / 8 <= memory.output_size_in_bytes < 3.1 * whole / 8  # parameters and Adam's two moments
    assert memory.temp_size_in_bytes < whole / 2
    kernel = program.init(parallel.put(jax.device_get(regression_batch(16)), mesh)).params["hidden"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 512)}


def test_no_process_is_left_without_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="leaves some of the 2 processes without any"):
        parallel.make_mesh(4)


def test_prefetch_keeps_the_order_and_closes_its_source():
    closed = []

    def numbers():
        try:
            for i in range(6):
                yield {"x": np.full((8, 1), i, np.float32)}
        finally:
            closed.append(True)

    mesh = parallel.make_mesh(8)
    assert [int(b["x"][0, 0]) for b in parallel.prefetch(numbers(), mesh)] == list(range(6))
    batches = parallel.prefetch(numbers(), mesh)
    next(batches)
    batches.close()
    assert len(closed) == 2


def test_all_finite_sees_one_bad_leaf():
    good = {"a": jnp.ones(3), "n": jnp.int32(1)}
    assert parallel.all_finite(good)
    assert not parallel.all_finite({**good, "b": jnp.array([1.0, jnp.inf])})
    assert not parallel.all_finite({**good, "b": jnp.array([jnp.nan])})
