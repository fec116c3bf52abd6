"""Predictions sampled by a server, held against the run's own examples: the page, its status, live accuracy."""

import csv
import json
import pathlib
import shutil
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from forks import shared
from pyarrow import parquet

sys.path.append(str(pathlib.Path(__file__).parents[1] / "serve"))
import toy

from bigbase_jax.core import UserError
from bigbase_jax.ops import samples
from bigbase_jax.ops.features import CLASS, CONFIDENCE, FILE, features, reference
from bigbase_jax.ops.registry import Registry
from bigbase_jax.ops.samples import Sampler
from bigbase_jax.runtime.rundir import RunDir

EARLIER = pathlib.Path(__file__).parents[1] / "earlier" / "pictures"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with its reference, made of its own data."""
    folder = shutil.copytree(EARLIER, tmp_path_factory.mktemp("monitor") / "run")
    found = reference(RunDir(folder))
    assert {len(x) for name, x in found.items() if name.startswith("input.")} == {64}  # the training split
    assert {len(found[name]) for name in (CLASS, CONFIDENCE)} == {32}  # the validation split
    again = reference(RunDir(folder))  # from the file
    assert (folder / FILE).stat().st_size < 20_000
    for name, x in found.items():
        np.testing.assert_array_equal(x, again[name])
    return folder


def sampled(folder, run, shift=0.0, count=60):
    """Samples whose inputs are those of the reference but for ``shift``; every fourth answer is wrong."""
    known = reference(RunDir(run))
    sampler = Sampler(folder, share=1.0)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        share = rng.random()  # of each half, the features of one example
        row = {name: float(x[int(share * len(x))]) for name, x in known.items()}
        row["input.image.mean"] += shift
        about = {"request": f"r{i}", "at": 1e9 + i, "model": "catdog", "version": "1", "label": "cat"}
        rows.append({**about, "features": json.dumps(row)})
    sampler._held += rows
    sampler.close()
    labels = folder / "labels.csv"
    with open(labels, "w", newline="") as file:
        csv.writer(file).writerows([["request", "label"], *([f"r{i}", "cat" if i % 4 else "dog"] for i in range(40))])
    return folder, labels


def launch(run, folder, *words):
    done = shared().run("--mode=monitor", f"--workdir={run}", f"--input={folder}", *words)
    assert done.status in (0, 1), done.err
    return done.status, json.loads(done.out.splitlines()[-1])


def test_a_change_gives_status_1_and_a_page(run, tmp_path):
    folder, labels = sampled(tmp_path / "same", run)
    status, said = launch(run, folder, f"--labels={labels}")
    assert status == 0 and not said["alarm"] and said["predictions"] == 60
    assert said["live_accuracy"] == 0.75 and said["labelled"] == 40
    low, high = said["interval"]
    assert 0.58 < low < 0.75 < high < 0.87
    assert "as trained" in pathlib.Path(said["page"]).read_text()
    folder, _ = sampled(tmp_path / "changed", run, shift=80.0)
    status, said = launch(run, folder, f"--output={tmp_path / 'page.html'}")
    assert status == 1 and "input.image.mean" in said["changed"] and CLASS not in said["changed"]
    page = (tmp_path / "page.html").read_text()
    assert "<b>changed</b>" in page and "<svg" in page


def test_the_server_keeps_a_share_and_no_contents(tmp_path):
    sampler = Sampler(tmp_path / "samples", share=1.0, seconds=0.01)
    with toy.client(watch=sampler) as client:
        for i in range(20):
            words = {"json": {"x": [i, 1.0, 2.0, 3.0]}, "headers": {"x-request-id": f"id-{i}"}}
            assert client.post("/v1/predict/toy", **words).status_code == 200
    sampler.close()
    found = samples.read(tmp_path / "samples", 100)
    assert sorted(row["request"] for row in found.rows) == sorted(f"id-{i}" for i in range(20))
    assert {(row["model"], row["version"]) for row in found.rows} == {("toy", "0")}
    assert sorted(found.features["input.x.0"]) == list(range(20)) and "output.y.mean" in found.features
    for path in (tmp_path / "samples").glob("*/*.parquet"):
        assert parquet.read_table(path)["answer"].null_count == parquet.read_table(path).num_rows
    assert len(samples.read(tmp_path / "samples", 5).rows) == 5


def test_of_several_models_and_versions_one_is_looked_at(tmp_path):
    sampler = Sampler(tmp_path, share=1.0)
    for model, version in (("a", "1"), ("b", "1"), ("a", "2"), ("a", "2")):
        sampler.keep(f"{model}{version}", model, version, [{"x": np.ones(3)}], [{"y": np.ones(2)}], [{}])
    sampler.close()
    with pytest.raises(UserError, match="samples of a, b; choose one by --model"):
        samples.read(tmp_path, 10)
    assert [row["request"] for row in samples.read(tmp_path, 10, "a").rows] == ["a2", "a2"]
    assert [row["request"] for row in samples.read(tmp_path, 10, "a", "1").rows] == ["a1"]


def test_a_version_of_a_registry_is_held_against_its_own_reference(run, tmp_path):
    from bigbase_jax.ops.monitor import monitor

    (run / "eval-test.json").write_text(json.dumps({"step": 3, "split": "test", "accuracy": 0.9}))
    registry = Registry.open(tmp_path / "registry", create=True)
    registry.push("catdog", run)
    registry.promote("catdog", "production")
    folder, _ = sampled(tmp_path / "samples", run)
    words = {"registry": str(tmp_path / "registry"), "specs": ["catdog@production"]}
    assert monitor([], str(folder), **words)["predictions"] == 60
    assert registry.resolve("catdog@production")  # nothing was written into it


def test_shares_limits_and_a_disk_that_refuses(tmp_path, monkeypatch, capsys):
    def fill(sampler, count):
        for i in range(count):
            if sampler.wanted():
                sampler.keep(
                    str(i), "m", "1", [{"x": np.ones(3)}], [{"y": np.ones(2)}], [{"label": "a", "secret": "s"}]
                )

    sampler = Sampler(tmp_path / "share", share=0.1, contents=True)
    fill(sampler, 2000)
    sampler.close()
    found = samples.read(tmp_path / "share", 2000)
    assert 120 < len(found.rows) < 290 and found.rows[0]["label"] == "a"
    (path,) = (tmp_path / "share").glob("*/*.parquet")
    assert "secret" in parquet.read_table(path)["answer"][0].as_py()
    size = path.stat().st_size
    kept = Sampler(tmp_path / "kept", share=1.0, most_mb=3.5 * size / 1e6)
    for _ in range(6):
        fill(kept, len(found.rows))
        kept._write()
    total = sum(path.stat().st_size for path in (tmp_path / "kept").glob("*/*.parquet"))
    assert 0 < total <= 3.5 * size
    old = Sampler(tmp_path / "kept", share=1.0, days=1e-9)
    time.sleep(0.01)
    fill(old, 1)
    old._write()
    assert not list((tmp_path / "kept").glob("*/*.parquet"))
    monkeypatch.setattr(samples, "_WAITING", 50)
    refused = Sampler(tmp_path / "refused", share=1.0)
    shutil.rmtree(tmp_path / "refused")
    (tmp_path / "refused").write_text("a file is in the way")
    fill(refused, 200)
    refused._write()
    assert len(refused._held) == 50 and "samples are not kept" in capsys.readouterr().err
    for sampler in (kept, old, refused):
        sampler.close()


def test_mistakes_are_one_sentence(run, tmp_path):
    from bigbase_jax.ops.monitor import monitor

    folder, _ = sampled(tmp_path / "samples", run)
    (tmp_path / "bad" / "day").mkdir(parents=True)
    bad = tmp_path / "bad" / "day" / "a.parquet"
    for spoil in (
        lambda: bad.write_bytes(b"PAR1 no"),
        lambda: parquet.write_table(pa.table({"x": [1]}), bad),
        lambda: (bad.unlink(), bad.symlink_to("/etc/hosts")),
    ):
        spoil()
        with pytest.raises(UserError, match="holds no samples|outside of its folder"):
            samples.read(tmp_path / "bad", 10)
    (tmp_path / "empty").mkdir()
    for words, said in (
        ({"pattern": None}, "needs --input"),
        ({"pattern": str(tmp_path / "empty")}, "holds no samples"),
        ({"pattern": str(folder), "false_alarms": 2.0}, "is no probability"),
        ({"pattern": str(folder), "specs": ["pets"]}, "no samples of pets"),
        ({"pattern": str(folder), "specs": ["a", "b"]}, "takes the run by --workdir"),
        ({"pattern": str(folder), "labels": str(bad)}, "is no CSV file"),
        ({"pattern": str(folder), "labels": str(tmp_path / "none.csv")}, "is no CSV file"),
    ):
        with pytest.raises(UserError, match=said):
            monitor([str(run)], **words)
    with pytest.raises(UserError, match="is not above 0"):
        Sampler(tmp_path / "x", share=0.0)
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / FILE).write_bytes(b"PK no")
    with pytest.raises(UserError, match="delete it"):
        monitor([str(broken)], str(folder))
    assert features({}, {}) == {}
