"""Classes over the mesh: the loss, its gradient and the update are those of one device; and sampling of classes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbase_jax import parallel
from bigbase_jax.core import UserError, flatten
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.margin import CosineHead, sampled, unit, with_margin
from bigbase_jax.tasks.verification import FaceVerification

PEOPLE = 64


def task(**words):
    body = ConvNet(num_classes=8, stages=(4,), dense=0, pool="mean")
    return FaceVerification(CosineHead(body, num_classes=PEOPLE), scale=16.0, **words)


def batch(size=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, 8, 8, 3), np.uint8),
        "label": rng.integers(0, PEOPLE, size).astype(np.int32),
        "mask": np.ones(size, np.float32),
    }


def stepped(devices, steps=2, **shape):
    """Losses, gradient norms and parameters after some steps, and where the classes live."""
    mesh = parallel.make_mesh(devices, parallel.MeshShape(**shape))
    program = parallel.program(task(), optax.sgd(0.5), parallel.global_spec(batch(), mesh), mesh, seed=1)
    state, seen = program.init(parallel.put(batch(), mesh)), []
    for i in range(steps):
        state, sums = program.step(state, parallel.put(batch(seed=i), mesh))
        seen += [float(sums["loss"].mean()), float(sums["grad_norm"].mean())]
    return seen, flatten(jax.device_get(state.params)), state.params["classes"]


def test_classes_over_one_two_and_eight_devices_give_one_loss_gradient_and_update():
    plain, params, _ = stepped(1)
    assert plain[0] != plain[2] and plain[1] > 0.01
    for devices, shape, columns in (
        (2, {"data": 1, "tensor": 2}, PEOPLE // 2),
        (8, {"data": 1, "tensor": 8}, PEOPLE // 8),
        (8, {"data": 2, "tensor": 4}, PEOPLE // 4),
    ):
        seen, found, classes = stepped(devices, **shape)
        assert {shard.data.shape for shard in classes.addressable_shards} == {(8, columns)}
        np.testing.assert_allclose(seen, plain, rtol=2e-5)
        for name, x in params.items():
            np.testing.assert_allclose(found[name], x, rtol=2e-4, atol=2e-5, err_msg=name)


def test_no_device_holds_all_logits_or_all_classes():
    mesh = parallel.make_mesh(8, parallel.MeshShape(data=1, tensor=8))
    program = parallel.program(task(), optax.sgd(0.5), parallel.global_spec(batch(), mesh), mesh)
    text = program.step.lower(program.state, parallel.placed_batch(parallel.global_spec(batch(), mesh), mesh))
    compiled = text.compile().as_text()
    assert f"f32[16,{PEOPLE // 8}]" in compiled and "all-reduce" in compiled
    assert f"f32[16,{PEOPLE}]" not in compiled and f"f32[8,{PEOPLE}]" not in compiled


def test_a_number_of_people_that_does_not_divide_is_said():
    mesh = parallel.make_mesh(3, parallel.MeshShape(data=1, tensor=3))
    with pytest.raises(UserError, match=r"classes.*dimension 1 is 64, spread over tensor=3"):
        parallel.program(task(), optax.sgd(0.5), parallel.global_spec(batch(), mesh), mesh)


def test_a_sample_holds_the_classes_of_the_batch_and_each_other_as_often():
    label = jnp.array([5, 9, 5, 60])
    count = np.zeros(PEOPLE)
    for i in range(200):
        chosen, place = sampled(jax.random.key(i), label, PEOPLE, 20)
        assert len(set(chosen.tolist())) == 20 and (chosen[place] == label).all()
        count[chosen] += 1
    others = np.delete(count, [5, 9, 60])
    assert (count[[5, 9, 60]] == 200).all()
    assert others.mean() == pytest.approx(200 * 17 / 61) and np.abs(others - others.mean()).max() < 5 * others.std()


def test_a_sampled_loss_is_that_over_the_sample_and_all_classes_are_no_sample():
    part, whole, given = task(sampled=0.5), task(), batch()
    variables = whole.init(jax.random.key(0), given)
    loss, _ = part.loss(variables, given, jax.random.key(2))
    class_key = jax.random.split(jax.random.key(2))[1]
    chosen, place = sampled(class_key, jnp.asarray(given["label"]), PEOPLE, PEOPLE // 2)
    cosine = whole.predict(variables, given)["vector"] @ unit(variables["params"]["classes"], 0)[:, chosen]
    logits = with_margin(cosine, jax.nn.one_hot(place, PEOPLE // 2), 0.2, 16.0)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, place).sum()
    np.testing.assert_allclose(loss.terms["loss"].total, expected, rtol=1e-5)
    assert loss.terms["loss"].total < whole.loss(variables, given, jax.random.key(2))[0].terms["loss"].total
    gradient = jax.grad(
        lambda c: (
            part.loss({"params": {**variables["params"], "classes": c}}, given, jax.random.key(2))[0]
            .terms["loss"]
            .total
        )
    )(variables["params"]["classes"])
    moved = np.abs(gradient).max(0) > 0
    assert moved[chosen].all() and moved.sum() == PEOPLE // 2
    assert part.batch_coupled and not whole.batch_coupled
    with pytest.raises(UserError, match="a batch may have 16"):
        task(sampled=0.2).loss(variables, given, jax.random.key(0))
    with pytest.raises(UserError, match="share of the classes"):
        task(sampled=0.0)


def test_state_of_the_model_comes_back_where_it_was():
    body = ConvNet(num_classes=8, stages=(4,), dense=0, pool="mean", norm=True)
    part = FaceVerification(CosineHead(body, num_classes=PEOPLE), sampled=0.5)
    variables = part.init(jax.random.key(0), batch())
    _, state = part.loss(variables, batch(), jax.random.key(1))
    same = jax.tree.structure(state) == jax.tree.structure({k: v for k, v in variables.items() if k != "params"})
    assert same and jax.tree.leaves(state)
