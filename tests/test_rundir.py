"""The run folder keeps a config, refuses another, and never holds half a file."""

import errno
import fcntl
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from bigbase_jax.core import UserError
from bigbase_jax.runtime.rundir import InUse, RunDir, differing


def test_the_same_config_finds_its_run_and_another_is_refused(tmp_path):
    config = ConfigDict({"a": {"x": 1, "t": (1, 2)}, "b": 0.1})
    run = RunDir(tmp_path / "run")
    run.create(config, "f")
    assert not run.begun
    run.create(ConfigDict({"a": {"x": 3}}), "f")  # its command had a mistake, nothing was trained: made anew
    assert run.config().to_dict() == {"a": {"x": 3}}
    run.create(config, "f")
    (run.checkpoints / "10").mkdir(parents=True)
    run.write_json("lineage.json", {"data": {"fingerprint": "f"}})
    run.create(config, "f")
    assert run.config().a.x == 1
    with pytest.raises(UserError, match="the data changed since the run"):
        run.create(config, "g")
    with pytest.raises(UserError, match=r"config.a.x is 1 there and 2 here; config.c is missing there"):
        run.create(ConfigDict({"a": {"x": 2, "t": (1, 2)}, "b": 0.1, "c": 3}), "f")


def test_where_a_run_computes_may_change_between_its_starts(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create(ConfigDict({"train": {"steps": 8, "mesh": {"data": 8}, "devices": 8}, "data": {"workers": 2}}), "f")
    run.write_json("lineage.json", {"data": {"fingerprint": "f"}})
    (run.checkpoints / "10").mkdir(parents=True)
    run.create(ConfigDict({"train": {"steps": 8, "mesh": {"data": 2}, "devices": 2}, "data": {"workers": 9}}), "f")
    with pytest.raises(UserError, match="config.train.steps is 8 there and 9 here"):
        run.create(ConfigDict({"train": {"steps": 9, "mesh": {"data": 8}, "devices": 8}, "data": {"workers": 2}}), "f")


def test_differences_are_listed_at_any_depth():
    assert differing({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) == []
    assert differing({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == ["config.a.c is missing there"]


def test_folders_that_are_no_runs_are_said(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        RunDir(tmp_path / "nowhere").config()
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(UserError, match="cannot be read"):
        RunDir(tmp_path).config()
    (tmp_path / "other" / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match="no config.json"):
        RunDir(tmp_path / "other").create(ConfigDict(), "f")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    run.write_json("a.json", {"x": 1})

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        run.write_json("a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_disk_that_is_only_read_is_one_sentence(tmp_path, monkeypatch):
    """There, removing what is not there fails too."""

    def refuses(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("unlink", "open", "replace", "mkdir"):
        monkeypatch.setattr(os, name, refuses)
    for name in ("unlink", "mkdir"):
        monkeypatch.setattr(pathlib.Path, name, refuses)
    monkeypatch.setattr("builtins.open", refuses)
    with pytest.raises(UserError, match=r"cannot write .*a\.json: Read-only file system\."):
        RunDir(tmp_path).write_json("a.json", {})


def test_what_a_kill_left_unfinished_goes_and_what_others_write_stays(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = [f".{name}.{gone.pid}.tmp" for name in ("a.json", "b.npz", "start")]
    stays = [f".a.json.{os.getppid()}.tmp", ".a.json.tmp", f"a.json.{gone.pid}.tmp", f".x.{gone.pid}.json"]
    for name in (*left[:2], f".a.json.{os.getpid()}.tmp", *stays):
        (tmp_path / name).write_text("half")
    (tmp_path / left[2] / "in").mkdir(parents=True)
    RunDir(tmp_path).write_json("a.json", {"x": 1})
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", *left[1:], *stays}
    RunDir(tmp_path).create(ConfigDict(), "f")
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", "config.json", *stays}


def test_numbers_keep_full_precision(tmp_path):
    run = RunDir(tmp_path)
    run.write_json("a.json", {"x": np.float32(0.1), "y": 1 / 3})
    assert run.read_json("a.json") == {"x": float(np.float32(0.1)), "y": 1 / 3}


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
file.write("process 77 on box (python launch.py --workdir=x)")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_trains_in_is_refused_until_that_ends(tmp_path):
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(
                InUse,
                match=r"run is in use by process 77 on box \(python .*\); wait for it, stop it, or .* own --workdir",
            ),
            RunDir(tmp_path / "run").locked(),
        ):
            pass
        other.kill()
    with RunDir(tmp_path / "run").locked():
        assert f"process {os.getpid()} on " in lock.read_text()
        with pytest.raises(InUse, match=f"in use by process {os.getpid()} on "), RunDir(tmp_path / "run").locked():
            pass
        second = subprocess.run([sys.executable, "-c", HOLDER, lock], stdin=subprocess.DEVNULL, capture_output=True)
        assert b"BlockingIOError" in second.stderr
        RunDir(tmp_path / "run").write_json("config.json", {})
    assert lock.exists()


FORKING = """
import os, signal, subprocess, sys
from bigbase_jax.runtime import rundir
rundir.jax.process_index = lambda: 0  # else JAX starts threads, with which no process should fork
run = rundir.RunDir(sys.argv[1])
with run.locked():
    run.write_json("config.json", {"data": {}, "task": {}, "train": {}})
    if not (pid := os.fork()):
        signal.pause()
    started = subprocess.Popen(["sleep", "60"], close_fds=False)
try:
    with run.locked():
        print("locked again")
finally:
    os.kill(pid, signal.SIGKILL)
    started.kill()
"""


def test_what_a_trainer_has_forked_or_started_does_not_keep_its_lock(tmp_path):
    command = [sys.executable, "-c", FORKING, tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "locked again\n", done.stderr


def test_a_start_that_writes_nothing_leaves_nothing(tmp_path):
    with RunDir(tmp_path / "run").locked():
        assert (tmp_path / "run" / ".lock").exists()
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with RunDir(tmp_path / "mine").locked():
        pass
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def none(file, how):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", none)
    with RunDir(tmp_path / "run").locked():
        RunDir(tmp_path / "run").write_json("a.json", {})
    assert "run has no locks (Operation not supported)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["a.jpg", "b.jpg", "cats/1.jpg", "z.txt"], "a.jpg, b.jpg, cats and 1 more in it"),
        (["config.json", "model.safetensors"], "config.json, model.safetensors in it"),
        (["catdog/config.json", "lm/config.json"], "catdog, lm in it"),
        ([".gitkeep", ".DS_Store", "slurm-7.out", "train.log", "output.txt"], None),
        ([], None),
    ],
)
def test_a_folder_of_other_things_is_not_written_into(tmp_path, files, named):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"model_type": "bert"}')
    before = sorted(tmp_path.rglob("*"))
    if named is None:
        with RunDir(tmp_path).locked():
            pass
    else:
        sentence = f"is not empty and holds no run \\({named}\\); give --workdir a new"
        with pytest.raises(UserError, match=sentence), RunDir(tmp_path).locked():
            pass
    assert sorted(path for path in tmp_path.rglob("*") if path.name != ".lock") == before
    assert named is None or not (tmp_path / ".lock").exists()


def test_each_start_that_trains_is_recorded_with_how_it_ended(tmp_path):
    run = RunDir(tmp_path)
    run.write_json("lineage.json", {"started": "2026-01-01", "starts": ["2026-01-01"], "data": {}})  # of before
    with run.training(0, 8, {"fingerprint": "f"}):
        pass  # killed
    with pytest.raises(ValueError), run.training(4, 8, {"fingerprint": "f"}):
        raise ValueError("first line\nsecond")
    with run.training(4, 2, {"fingerprint": "f"}):
        pass
    run.ended(6, "SIGTERM")
    with run.training(6, 2, {"fingerprint": "f"}):
        pass
    run.ended(9, "finished", finished=True)
    text = (tmp_path / "lineage.json").read_text()
    run.ended(9, "finished", finished=True)
    assert (tmp_path / "lineage.json").read_text() == text
    lineage = json.loads(text)
    starts = lineage["starts"]
    assert lineage["started"] == "2026-01-01" and lineage["finished"] and lineage["devices"]["count"] == 2
    assert [start.get("from_step") for start in starts] == [None, 0, 4, 4, 6]
    assert [start.get("to_step") for start in starts] == [None, None, None, 6, 9]
    assert [start.get("how") for start in starts] == [None, None, "first line", "SIGTERM", "finished"]
    assert all(start["versions"]["jax"] and start["command"] and start["devices"] for start in starts[1:])
