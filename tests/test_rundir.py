"""The run folder keeps a config, refuses another, and never holds half a file."""

import errno
import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
from ml_collections import ConfigDict

from bigbase_jax.core import UserError
from bigbase_jax.rundir import RunDir, differing


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
