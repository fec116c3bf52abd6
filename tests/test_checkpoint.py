"""Checkpoints restore bit for bit, or say in one sentence why they cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbase_jax.checkpoint import Checkpoints, Damaged
from bigbase_jax.core import TrainState, UserError, flatten
from bigbase_jax.parallel import make_mesh, shardings


def make_state(seed=0, features=4):
    params = {
        "a": {"kernel": jax.random.normal(jax.random.key(seed), (3, features)), "half": jnp.ones(2, jnp.bfloat16) / 3}
    }
    tx = optax.adam(1e-3)
    return TrainState(
        jnp.int32(seed), params, {"batch_stats": {"m": jnp.arange(3.0)}}, tx.init(params), None, jax.random.key(9)
    )


def abstract_of(tree, devices=1):
    homes = shardings(tree, make_mesh(devices))
    return jax.tree.map(lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), tree, homes)


def same_bits(a, b):
    for name, x in flatten(a).items():
        y = flatten(b)[name]
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def test_round_trip_is_bit_equal_on_one_device_and_eight(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = make_state(3)
    checkpoints.save(3, state, {"position": 7})
    checkpoints.close()
    for devices in (1, 8):
        restored = Checkpoints(tmp_path, read_only=True).restore(abstract_of(state, devices), 3)
        same_bits(state, restored)
        assert len(restored.params["a"]["kernel"].sharding.device_set) == devices
    assert Checkpoints(tmp_path, read_only=True).progress(3) == {"position": 7}


def test_a_save_is_not_touched_by_donating_its_buffers(tmp_path):
    state = {"x": jnp.zeros(1 << 20)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    for _ in range(20):
        state = overwrite(state)
    checkpoints.close()
    restored = checkpoints.restore(abstract_of({"x": jnp.zeros(1 << 20)}), 1)
    assert float(jnp.abs(restored["x"]).max()) == 0.0
    assert float(state["x"][0]) == 20.0


def test_the_latest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, keep_best=True)
    for step in range(1, 7):
        checkpoints.save(step, make_state(step), {}, best=step in (1, 3))
    checkpoints.close()
    assert checkpoints.steps() == [3, 6]


def test_parts_are_restored_without_the_rest(tmp_path):
    state = make_state(3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, {})
    checkpoints.close()
    part = checkpoints.restore({"params": abstract_of(state.params)}, 3)
    same_bits({"params": state.params}, part)


def test_a_checkpoint_of_another_model_lists_what_differs(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, make_state(3), {})
    checkpoints.close()
    with pytest.raises(UserError, match=r"another model: .*params.a.kernel is \(3, 4\) there and \(3, 5\) here"):
        checkpoints.restore(abstract_of(make_state(3, features=5)), 3)
    other = abstract_of(make_state(3))
    other = other.replace(params={"a": {"kernel": other.params["a"]["kernel"], "bias": other.params["a"]["half"]}})
    with pytest.raises(UserError, match=r"lacks params.a.bias; it also has params.a.half"):
        checkpoints.restore(other, 3)
    with pytest.raises(UserError, match=r"no checkpoint of step 4 .* steps \[3\] are there"):
        checkpoints.restore(other, 4)


def test_half_written_checkpoints_are_neither_seen_nor_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    checkpoints.close()
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / "3").mkdir()
    assert Checkpoints(tmp_path, read_only=True).steps() == [1]
    assert (tmp_path / "2.orbax-checkpoint-tmp").exists()
    writer = Checkpoints(tmp_path)
    assert writer.latest() == 1
    assert not (tmp_path / "2.orbax-checkpoint-tmp").exists()
    writer.save(3, make_state(3), {})
    writer.close()
    assert writer.steps() == [1, 3]


def test_a_damaged_checkpoint_is_said_and_set_aside(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {})
    checkpoints.wait()
    for file in (tmp_path / "2" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(Damaged, match="cannot be read"):
        checkpoints.restore(abstract_of(make_state(2)), 2)
    checkpoints.discard(2)
    assert checkpoints.latest() == 1
    same_bits(make_state(1), checkpoints.restore(abstract_of(make_state(1)), 1))
    assert (tmp_path / "2.damaged").is_dir()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use .*: (Not a directory|File exists)"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_full_disk_keeps_the_older_checkpoints(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()

    class Pending:
        def result(self):
            raise ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']")

    monkeypatch.setattr(checkpoints._checkpointer, "save_async", lambda *a, **k: Pending())
    checkpoints.save(2, make_state(2), {})
    with pytest.raises(UserError, match=r"step 2 .*No space left on device; the checkpoints of steps \[1\] are intact"):
        checkpoints.wait()
    same_bits(make_state(1), checkpoints.restore(abstract_of(make_state(1)), 1))
