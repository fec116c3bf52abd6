"""The log: exact interval means, the step of a NaN, nothing read early, restarts, writers."""

import contextlib
import errno
import io
import json
import math
import os
import resource
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbase_jax.core import Sum, UserError
from bigbase_jax.runtime import log as log_module
from bigbase_jax.runtime.log import Diverged, Log, duration, jsonable, model_table, peak_flops, read_rows


def make(tmp_path, total=20, every=5, **kwargs):
    kwargs = {"writers": (), "plain": True, **kwargs}
    return Log(str(tmp_path), total, every, **kwargs)


def loss(value, weight=1.0):
    return {"loss": Sum(jnp.float32(value * weight), jnp.float32(weight))}


def rows(tmp_path, kind="train"):
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=lambda token: pytest.fail(f"{token} is no JSON")) for line in lines]
    return [row for row in found if row["kind"] == kind]


class Recorded:
    """An array that notes when it is waited for and when it is read."""

    def __init__(self, name, value, seen):
        self.name, self.value, self.seen = name, value, seen

    def block_until_ready(self):
        self.seen.append(("wait", self.name))
        return self

    def __array__(self, dtype=None, copy=None):
        self.seen.append(("read", self.name))
        return np.asarray(self.value, dtype)


def test_interval_means_merge_sums_exactly(tmp_path):
    rng = np.random.default_rng(0)
    total, weight = rng.normal(size=20).astype(np.float32), rng.integers(1, 33, 20).astype(np.float32)
    log = make(tmp_path)
    for step in range(1, 21):
        i = step - 1
        log.step(step, {"loss": Sum(jnp.asarray(total[i]), jnp.asarray(weight[i]))}, learning_rate=step / 10)
    log.close()
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [5, 10, 15, 20]
    for n, row in enumerate(found):
        part = slice(5 * n, 5 * n + 5)
        exact = math.fsum(map(float, total[part])) / math.fsum(map(float, weight[part]))
        mean_of_means = np.mean(total[part] / weight[part])
        assert abs(exact - mean_of_means) > 1e-4
        assert row["loss"] == pytest.approx(exact, rel=1e-14)
        assert row["learning_rate"] == pytest.approx((5 * n + 3) / 10)


def test_a_sum_without_weight_is_left_out(tmp_path):
    log = make(tmp_path, total=5)
    for step in range(1, 6):
        log.step(step, {**loss(1.0), "rare": Sum(jnp.float32(0), jnp.float32(0))})
    log.close()
    assert "rare" not in rows(tmp_path)[0] and rows(tmp_path)[0]["loss"] == 1.0


def test_an_interval_is_read_only_after_the_next_step_is_there(tmp_path):
    seen = []
    log = make(tmp_path)
    for step in range(1, 6):
        log.step(step, {"loss": Sum(Recorded(step, 1.0, seen), np.float32(1))})
        assert not [event for event in seen if event[0] == "read"]
        assert all(waited <= step - 2 for kind, waited in seen if kind == "wait")
    assert rows(tmp_path) == []
    seen.clear()
    log.step(6, {"loss": Sum(Recorded(6, 1.0, seen), np.float32(1))})
    assert {step for kind, step in seen if kind == "read"} == {1, 2, 3, 4, 5}
    assert ("wait", 6) not in seen and len(rows(tmp_path)) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_step_that_diverged_is_named(tmp_path, bad):
    log = make(tmp_path)
    with pytest.raises(Diverged, match=r"at step 8;.*learning_rate.*clip_norm") as caught:
        for step in range(1, 21):
            log.step(step, loss(bad if step >= 8 else 1.0))
    assert caught.value.step == 8 and isinstance(caught.value, UserError)
    assert step == 11  # the interval ended at 10
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [5, 7]
    assert [(row["step"], row["loss"]) for row in rows(tmp_path, "diverged")] == [(8, str(bad))]


def test_check_finds_a_nan_before_the_interval_ends(tmp_path):
    log = make(tmp_path)
    log.step(1, loss(1.0))
    log.step(2, loss(math.nan))
    log.check(1)
    with pytest.raises(Diverged, match="step 2"):
        log.check(2)


def test_the_rest_of_an_interval_is_logged_where_no_step_follows(tmp_path):
    for last in (False, True):
        log = make(tmp_path)
        for step in range(1, 8):
            log.step(step, loss(step))
        log.check(6)
        log.check(7, last)
        log.close()
        log.close()
        assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(5, 3.0), (7, 6.5)][: 1 + last]


def test_an_interval_goes_on_in_another_start_without_the_loss_of_a_bit(tmp_path):
    rng = np.random.default_rng(0)
    sums = {
        step: {
            "loss": Sum(jnp.float32(rng.normal()), jnp.float32(rng.integers(1, 99))),
            "load": Sum(jnp.asarray(rng.normal(size=(2, 3)), jnp.float32), jnp.float32(3)),
            "rare": Sum(jnp.asarray([math.inf, step]), jnp.asarray([1.0, math.nan])),
        }
        for step in range(1, 11)
    }

    def steps(log, first, last):
        for step in range(first, last + 1):
            log.step(step, sums[step])
        log.check(last)
        return json.loads(json.dumps(log.interval(), allow_nan=False))

    whole = make(tmp_path / "whole", total=10)
    steps(whole, 1, 10)
    whole.close()
    for stop in range(1, 10):
        log = make(tmp_path / "parts", total=10)
        log.pause().__enter__()
        kept = steps(log, 1, stop)
        assert kept["steps"] == stop % 5 and kept["seconds"] >= kept["waited"] >= 0
        log.close()
        log = make(tmp_path / "parts", total=10, start_step=stop, interval={**kept, "seconds": 1000.0, "waited": 500.0})
        steps(log, stop + 1, 10)
        log.close()
        found, timed = [], ("step_seconds", "data_wait", "memory_gb", "seconds")
        for folder in ("whole", "parts"):
            found.append([{k: v for k, v in row.items() if k not in timed} for row in rows(tmp_path / folder)])
        assert found[0] == found[1] and len(found[0]) == 2 and found[0][0]["load"] != found[0][1]["load"]
        timing = next(row for row in rows(tmp_path / "parts") if row["step"] > stop)
        assert timing["step_seconds"] >= 200 and timing["data_wait"] == pytest.approx(0.5, abs=0.01)


def test_opening_reads_a_few_rows_of_a_long_log_and_cuts_exactly(tmp_path, monkeypatch):
    path, read = tmp_path / "metrics.jsonl", []
    lines = [b'{"step": %d, "kind": "train", "seconds": %d.5}\n' % (10 * (n // 2 + 1), n) for n in range(4000)]
    parse = log_module._parse
    monkeypatch.setattr(log_module, "_parse", lambda line: read.append(line) or parse(line))
    for start, torn in ((0, b""), (10, b""), (15, b"[1]\nnot"), (9999, b'{"step": 2'), (20000, b"\0" * 99), (1e9, b"")):
        path.write_bytes(b"".join(lines) + torn)
        read.clear()
        found = log_module._Rows(str(path), start)
        assert len(read) < 40
        found.close()
        kept = [line for n, line in enumerate(lines) if 10 * (n // 2 + 1) <= start]
        assert path.read_bytes() == b"".join(kept) and found.empty == (not kept)
        assert found.seconds == (len(kept) - 0.5 if kept else 0)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_restart_drops_what_came_after_its_step(tmp_path):
    first = make(tmp_path)
    for step in range(1, 18):
        first.step(step, loss(1.0))
        if step % 6 == 0:
            first.metrics(step, "val", {"accuracy": step / 100})
    first.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 17, "kind": "tra')
    second = make(tmp_path, start_step=10)
    kept = (tmp_path / "metrics.jsonl").read_bytes()
    assert kept and before.startswith(kept) and len(kept) < len(before)
    for step in range(11, 21):
        second.step(step, loss(2.0))
    second.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(5, 1.0), (10, 1.0), (15, 2.0), (20, 2.0)]
    assert [row["step"] for row in rows(tmp_path, "eval")] == [6]
    seconds = [row["seconds"] for row in rows(tmp_path)]
    assert seconds == sorted(seconds)


def test_a_reader_of_a_living_run_skips_half_a_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "kind": "train"}\nnot json\n[1]\n{"step": 2, "ki')
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "kind": "train"}]
    assert read_rows(tmp_path / "none.jsonl") == []


def test_speed_leaves_pauses_and_counts_waiting(tmp_path):
    log = make(tmp_path, total=4, every=4, batch_size=10, steps_per_epoch=8)
    for step in range(1, 5):
        with log.data_wait():
            time.sleep(0.03)
        log.step(step, loss(1.0))
        if step == 2:
            with log.pause():
                log.check(step)
                time.sleep(1.0)
    log.close()
    (row,) = rows(tmp_path)
    assert row["epoch"] == 0.5 and 0.03 <= row["step_seconds"] < 0.2
    assert row["examples_per_second"] == pytest.approx(10 / row["step_seconds"])
    assert 0.3 < row["data_wait"] <= 1.0 and row["seconds"] > 1.0 and row["memory_gb"] > 0


def test_waiting_while_the_device_works_is_not_waiting(tmp_path):
    class Working(Recorded):
        def is_ready(self):
            return False

    log = make(tmp_path, total=4, every=4)
    for step in range(1, 5):
        if step > 1:
            with log.data_wait():
                time.sleep(0.01)
        log.step(step, {"loss": Sum(Working(step, 1.0, []), np.float32(1))})
    log.close()
    assert rows(tmp_path)[0]["data_wait"] == 0


def test_mfu_needs_a_known_device(tmp_path, monkeypatch):
    assert peak_flops() is None
    for kind, peak in {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA L4": 121e12, "NVIDIA L40S": 362e12, "Tesla T4": 65e12,
                       "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU v4": 275e12,
                       "NVIDIA A100-SXM4-40GB": 312e12, "Tesla V100-SXM2-16GB": 125e12}.items():  # fmt: skip
        assert peak_flops(types.SimpleNamespace(device_kind=kind)) == peak
    monkeypatch.setattr(log_module, "peak_flops", lambda: 1e12)
    log = make(tmp_path, total=2, every=2, devices=4)
    log.step(1, loss(1.0), 0.5e9)
    log.step(2, loss(1.0), 1.5e9)
    log.close()
    (row,) = rows(tmp_path)
    assert row["mfu"] == pytest.approx(1e9 / row["step_seconds"] / 4e12)


def test_evaluations_keep_nests_and_show_scalars(tmp_path, capsys):
    log = make(tmp_path)
    per_class = {"cat": {"f1": np.float32(0.5)}}
    log.metrics(5, "val", {"accuracy": 0.912, "auc": math.nan, "per_class": per_class, "confusion_matrix": np.eye(2)})
    log.close()
    (row,) = rows(tmp_path, "eval")
    assert row["split"] == "val" and row["accuracy"] == 0.912 and row["auc"] == "nan"
    assert row["per_class"] == {"cat": {"f1": 0.5}} and row["confusion_matrix"] == [[1.0, 0.0], [0.0, 1.0]]
    out, err = capsys.readouterr()
    assert "val @ 5: accuracy 0.912  auc nan\n" in err and out == ""


def test_lines_are_plain_where_there_is_no_terminal(tmp_path, capsys):
    log = make(tmp_path, total=10, batch_size=8, steps_per_epoch=4, plain=None)
    log.compiled(2.5)
    for step in range(1, 11):
        log.step(step, loss(0.25))
    log.close()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[0] == "compiled the training step in 2.5 s"
    assert lines[1].startswith("step 5/10  epoch 1.25  loss 0.2500  ") and "examples/s  data wait" in lines[1]
    assert "eta" in lines[1] and "eta" not in lines[2]


def test_a_terminal_gets_a_bar_and_stdout_nothing(tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv(log_module.PLAIN, raising=False)
    log = make(tmp_path, total=10, plain=None)
    for step in range(1, 11):
        log.step(step, loss(0.25))
    log_module.say("[not markup] above the bar")
    log.close()
    log_module.say("after")
    shown = screen.getvalue()
    assert "[not markup] above the bar" in shown and "loss 0.2500" in shown and "\x1b[" in shown
    assert shown.endswith("after\n") and capsys.readouterr().out == ""


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    log = make(tmp_path)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(log._rows, "_file", types.SimpleNamespace(write=full, close=lambda: None))
    with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device;"):
        log.metrics(1, "val", {"accuracy": 1.0})


@pytest.fixture
def room():
    """Limits how large a file may become, as a full disk does: ``room(bytes)``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writers", [(), ("tensorboard",)])
def test_a_disk_that_is_full_in_earnest_is_one_sentence_and_closing_hides_no_other(tmp_path, room, writers):
    log = make(tmp_path, total=1000, every=1, writers=writers)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(UserError, match="the first of all"))
        stack.enter_context(contextlib.closing(log))
        with pytest.raises(
            UserError, match=rf"cannot write .*{'tensorboard' if writers else 'metrics'}.*: File too large"
        ):
            for step in range(1, 1000):
                if step == 5:
                    size = {name: os.path.getsize(tmp_path / name) for name in ("metrics.jsonl",)}["metrics.jsonl"]
                    room(os.path.getsize(next((tmp_path / "tensorboard").iterdir())) + 100 if writers else size + 100)
                log.step(step, loss(1.0))
        assert step < 20
        room(resource.RLIM_INFINITY)
        raise UserError("the first of all")
    room(resource.RLIM_INFINITY)
    make(tmp_path, start_step=3, writers=writers).close()  # the same command goes on
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        make(tmp_path / "file")


def test_tensorboard_gets_scalars(tmp_path):
    log = make(tmp_path, total=5, writers=("tensorboard",))
    for step in range(1, 6):
        log.step(step, loss(1.0))
    log.metrics(5, "val", {"accuracy": 0.5, "per_class": {}})
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes() and b"val/accuracy" in file.read_bytes()


def test_writers_are_named_and_installed(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Did you mean 'tensorboard'"):
        make(tmp_path, writers=("tensorbord",))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'bigbase_jax\[wandb\]'"):
        make(tmp_path, writers=("wandb",))


def test_a_writer_that_does_not_start_is_one_sentence(tmp_path, monkeypatch):
    def init(**kwargs):
        raise RuntimeError("no login")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(UserError, match=r"'wandb' does not start \(no login\)"):
        make(tmp_path, writers=("wandb",))


def test_wandb_is_offline_and_goes_on_with_its_run(tmp_path, monkeypatch):
    started, logged, finished = [], [], []
    run = types.SimpleNamespace(log=lambda x, step: logged.append((step, x)), finish=lambda: finished.append(True))
    fake = types.SimpleNamespace(init=lambda **kwargs: started.append(kwargs) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    log = make(tmp_path, total=5, writers=("wandb",), name="catdog", config={"seed": 0})
    for step in range(1, 6):
        log.step(step, loss(2.0))
    log.metrics(5, "val", {"accuracy": 0.5, "per_class": {"a": 1}})
    log.close()
    assert started[0]["mode"] == "offline" and started[0]["name"] == "catdog" and started[0]["config"] == {"seed": 0}
    assert logged[0][0] == 5 and logged[0][1]["train/loss"] == 2.0 and logged[-1] == (5, {"val/accuracy": 0.5})
    assert finished == [True]
    monkeypatch.setenv("WANDB_MODE", "online")
    make(tmp_path, total=9, start_step=5, writers=("wandb",)).close()
    make(tmp_path, total=9, writers=("wandb",)).close()
    assert started[1]["mode"] == "online" and started[1]["id"] == started[0]["id"] != started[2]["id"]


def test_mlflow_stays_in_the_run_folder_and_goes_on_with_its_run(tmp_path, monkeypatch):
    calls = []

    class Fake(types.ModuleType):
        def __getattr__(self, name):
            def call(*args, **kwargs):
                calls.append((name, args, kwargs))
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

            return call

    monkeypatch.setitem(sys.modules, "mlflow", Fake("mlflow"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log = make(tmp_path, total=5, writers=("mlflow",), name="catdog")
    for step in range(1, 6):
        log.step(step, loss(2.0))
    log.close()
    named = {name: (args, kwargs) for name, args, kwargs in calls}
    assert named["set_tracking_uri"][0] == (f"file://{tmp_path / 'mlruns'}",)
    assert named["log_metrics"][0][0]["train/loss"] == 2.0 and named["log_metrics"][1] == {"step": 5}
    assert calls[-1][0] == "end_run"
    calls.clear()
    make(tmp_path, total=9, start_step=5, writers=("mlflow",)).close()
    assert ("start_run", (), {"run_id": "r1", "run_name": None}) in calls


def test_json_has_no_tokens_that_are_not_json():
    value = {"a": [math.nan, -math.inf, np.float32(1.5)], "b": np.arange(2), 3: jnp.float32(2), "c": None, "d": True}
    text = json.dumps(jsonable(value), allow_nan=False)
    assert json.loads(text) == {"a": ["nan", "-inf", 1.5], "b": [0, 1], "3": 2.0, "c": None, "d": True}


def test_the_model_table_counts_and_joins_alike_blocks():
    block = {"attention": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32), "bias": np.zeros(8, np.float32)}}
    params = {f"block{i}": block for i in range(3)} | {"head": {"kernel": np.zeros((8, 2), np.float32)}}
    table = model_table(params, 2.5e9)
    assert "block0.attention ... block2.attention" in table and "3 x (bias 8, kernel 8x8)" in table
    lines = table.splitlines()
    assert lines[-2].split()[1:] == ["232", "0.00", "MB"] and "2.5 GFLOPs" in lines[-1]
    assert len(model_table({f"a{i}": dict.fromkeys("pqr", block) for i in range(40)}).splitlines()) < 40


def test_the_model_table_counts_what_is_frozen_by_itself():
    trained = {"dense": {"lora_a": np.zeros((1000, 2), np.float32), "lora_b": np.zeros((2, 10), np.float32)}}
    frozen = {"dense": {"kernel": jax.ShapeDtypeStruct((1000, 1000), jnp.bfloat16)}, "bias": np.zeros(10, np.float32)}
    *_, first, second, third = model_table(trained, frozen=frozen).splitlines()
    assert first.split() == ["trained", "2,020", "0.01", "MB"]
    assert second.split() == ["frozen", "1,000,010", "2.00", "MB"]
    assert third.split() == ["total", "1,002,030", "2.01", "MB"]
    assert len({line.index(count) + len(count) for line, count in ((first, "2,020"), (third, "1,002,030"))}) == 1
    for nothing in (None, {}):
        lines = model_table(trained, frozen=nothing).splitlines()
        assert lines[-1].split()[:2] == ["total", "2,020"] and "trained" not in lines[-2]


def test_durations_read_as_on_a_clock():
    assert [duration(s) for s in (5, 135, 3735, 59.6)] == ["0:05", "2:15", "1:02:15", "1:00"]


def test_the_events_need_no_torch():
    code = "import sys; from bigbase_jax.runtime import log; log.tensorboard(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_importing_the_log_loads_no_writer():
    heavy = ("rich.progress", "tensorboardX", "wandb", "mlflow")
    code = f"import sys, bigbase_jax.runtime.log; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
