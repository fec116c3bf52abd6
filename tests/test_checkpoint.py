"""Checkpoints restore bit for bit, or say in one sentence why they cannot."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbase_jax.core import TrainState, UserError, flatten
from bigbase_jax.parallel import make_mesh, shardings
from bigbase_jax.runtime.checkpoint import Checkpoints, Damaged


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
    assert writer.steps() == [1]
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
    restored, progress = checkpoints.restore_latest(abstract_of(make_state(1)))
    same_bits(make_state(1), restored)
    assert progress == {} and checkpoints.steps() == [1]
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


# -------------------------------------------------------------------------------------------------------------- damage


def flip(data, rng):
    changed = bytearray(data)
    changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return bytes(changed)


HARMS = {  # what a disk does to a file; None deletes it
    "flip": flip,
    "truncate": lambda data, rng: data[: len(data) // 2],
    "empty": lambda data, rng: b"",
    "garbage": lambda data, rng: rng.bytes(len(data)),
    "delete": lambda data, rng: None,
}
KINDS = (  # every file that a checkpoint consists of
    "_CHECKPOINT_METADATA",
    "checksums.json",
    "commit_success.txt",
    "metrics/commit_success.txt",
    "metrics/metrics",
    "state/_METADATA",
    "state/_sharding",
    "state/array_metadatas/process_0",
    "state/commit_success.txt",
    "state/d/*",
    "state/manifest.ocdbt",
    "state/ocdbt.process_0/d/*",
    "state/ocdbt.process_0/manifest.ocdbt",
)


def large(seed):
    """Large enough for its arrays to lie beside orbax's index, which has checksums of its own."""
    return {"w": jax.random.normal(jax.random.key(seed), (300, 300)), "b": jnp.full(3, seed)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints 1 (the best), 2 and 3."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3, keep_best=True)
    for step in (1, 2, 3):
        checkpoints.save(step, large(step), {"best_step": 1, "data_step": step}, best=step == 1)
    checkpoints.close()
    return folder


def test_each_kind_of_file_is_known(saved):
    for step in "123":
        files = [path for path in (saved / step).rglob("*") if path.is_file()]
        assert {path for kind in KINDS for path in (saved / step).glob(kind)} == set(files)
    assert [path.name for path in saved.iterdir() if not path.is_dir()] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", HARMS)
def test_any_damage_is_said_by_name_and_never_gives_other_numbers(saved, tmp_path, capsys, kind, harm):
    for step, instead in ((1, 3), (3, 1)):  # of the best and the newest
        folder = tmp_path / f"{step}-damaged"
        shutil.copytree(saved, folder)
        for path in (folder / str(step)).glob(kind):
            data = HARMS[harm](path.read_bytes(), np.random.default_rng(list(f"{kind} {harm}".encode())))
            path.unlink() if data is None else path.write_bytes(data)
        abstract, reader = abstract_of(large(1)), Checkpoints(folder, read_only=True)
        restored, used = reader.restore_best(abstract)
        said = capsys.readouterr().err
        same_bits(large(used), restored)
        if (kind, harm) == ("checksums.json", "delete"):  # as one of an earlier version, which is whole
            assert used == 1 and not said
            continue
        assert used == instead
        if step == 1 or said:  # of the newest, only what names the best was read
            assert f"the checkpoint {folder / str(step)} cannot be read (" in said
            assert f"step {used}" in said.splitlines()[-1]
        with pytest.raises(Damaged, match=r"cannot be read \(.*\)\.$"):
            reader.restore(abstract, step)
        assert {path.name for path in folder.iterdir()} == set("123")  # a reader renames nothing

        (folder / f"{step}.damaged").mkdir()  # an earlier one
        writer = Checkpoints(folder, keep=3, keep_best=True)
        restored, progress = writer.restore_latest(abstract)
        same_bits(large(progress["data_step"]), restored)
        assert progress == {"best_step": 1, "data_step": 2 if step == 3 else 3}
        restored, used = writer.restore_best(abstract)
        assert used == instead
        said = capsys.readouterr().err
        assert f"it is set aside as {step}.damaged-2." in said and (folder / f"{step}.damaged-2").is_dir()
        if harm == "empty":
            writer.save(step, large(step), {"best_step": step, "data_step": step}, best=True)
            writer.wait()
            same_bits(large(step), writer.restore(abstract, step))
        writer.close()


@pytest.mark.parametrize("kind", ["_CHECKPOINT_METADATA", "metrics/metrics", "state/d/*", "state/_METADATA"])
@pytest.mark.parametrize("harm", ["truncate", "empty", "garbage", "delete"])
def test_a_damaged_one_without_checksums_does_not_shut_the_run(saved, tmp_path, capsys, kind, harm):
    shutil.copytree(saved, tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "3" / "checksums.json").unlink()
    for path in (tmp_path / "checkpoints" / "3").glob(kind):
        data = HARMS[harm](path.read_bytes(), np.random.default_rng(0))
        path.unlink() if data is None else path.write_bytes(data)
    restored, used = Checkpoints(tmp_path / "checkpoints", read_only=True).restore_best(abstract_of(large(1)))
    same_bits(large(1), restored)
    assert used == 1
    restored, progress = Checkpoints(tmp_path / "checkpoints", keep=3, keep_best=True).restore_latest(
        abstract_of(large(1))
    )
    same_bits(large(progress["data_step"]), restored)
    if (kind, harm) == ("metrics/metrics", "delete"):
        assert progress["data_step"] == 3
    else:
        assert progress["data_step"] == 2 and "it is set aside as 3.damaged." in capsys.readouterr().err


def test_a_removal_that_was_interrupted_is_ended(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "checkpoints")
    for step in "12":  # the best, and one that is not kept
        (tmp_path / "checkpoints" / step / "_CHECKPOINT_METADATA").unlink()
    Checkpoints(tmp_path / "checkpoints", keep=1, keep_best=True).close()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1.damaged", "3"}
    assert capsys.readouterr().err.count("set aside") == 1


def test_where_all_are_damaged_it_is_one_sentence(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "checkpoints")
    for path in (tmp_path / "checkpoints").glob("*/state/manifest.ocdbt"):
        path.write_bytes(b"")
    reader = Checkpoints(tmp_path / "checkpoints", read_only=True)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read; all of them \(3\) are damaged"):
        reader.restore_best(abstract_of(large(1)))
    with pytest.raises(UserError, match="there is no checkpoint in .* yet"):
        Checkpoints(tmp_path / "nowhere", read_only=True).restore_best(abstract_of(large(1)))
    capsys.readouterr()
    writer = Checkpoints(tmp_path / "checkpoints")
    assert writer.restore_latest(abstract_of(large(1))) == (None, {})
    assert "the run begins anew" in capsys.readouterr().err
    assert sorted(path.name for path in writer.directory.iterdir()) == ["1.damaged", "2.damaged", "3.damaged"]


def test_a_fifo_in_the_place_of_a_file_is_not_opened(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    place = tmp_path / "checkpoints" / "3" / "state" / "_sharding"
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(Damaged, match="state/_sharding is missing"):
        Checkpoints(tmp_path / "checkpoints", read_only=True).restore(abstract_of(large(1)), 3)
