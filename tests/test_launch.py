"""The command line as its users type it, in processes of its own: every recipe, every verb, restarts and mistakes."""

import errno
import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from forks import shared
from orbax.checkpoint import v1 as ocp
from PIL import Image

from bigbase_jax import verbs
from bigbase_jax.runtime import compilation

ROOT = pathlib.Path(__file__).parents[1]


def start(*args, **env):
    environment = {**os.environ, "XLA_FLAGS": "", "BIGBASE_PLAIN": "1", **env}
    command = [sys.executable, str(ROOT / "launch.py"), *map(str, args)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def launch(*args, status=0, **env):
    """Runs to the end; returns (the JSON of the last line on stdout or None, stdout, stderr)."""
    done = shared().run(*map(str, args), **env)
    out, err = done.out, done.err
    assert done.status == status, f"{args} ended with {done.status}:\n{err[-3000:]}"
    if status:
        assert "Traceback" not in err, err[-3000:]
        return None, out, err
    return json.loads(out.splitlines()[-1]), out, err


def arrays(workdir):
    """All arrays of the newest checkpoint, as bytes."""
    newest = max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    loaded = ocp.load(newest)
    return newest.name, {name: (str(x.dtype), np.asarray(x).tobytes()) for name, x in loaded.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run of the default recipe: (workdir, command, its result)."""
    workdir = tmp_path_factory.mktemp("runs") / "catdog"
    command = ["--config=configs/catdog.py:tiny", f"--workdir={workdir}"]
    return workdir, command, launch(*command)[0]


# --------------------------------------------------------------------------------------------------------------- train


def test_the_command_again_evaluates_a_finished_run_and_ends(finished):
    workdir, command, result = finished
    before = arrays(workdir)
    again, _, err = launch(*command)
    assert again == result
    assert arrays(workdir) == before
    assert "compiled the training step" not in err


def test_another_config_is_refused_and_what_differs_is_listed(finished):
    _, command, _ = finished
    _, _, err = launch(*command, "--config.optim.learning_rate=0.5", status=2)
    assert "config.optim.learning_rate is" in err and "0.5 here" in err
    assert len(err.strip().splitlines()) == 1


def test_eval_predict_and_report_take_the_folder_and_nothing_else(finished, tmp_path):
    workdir, _, result = finished
    evaluated, _, _ = launch("--mode=eval", f"--workdir={workdir}")
    assert evaluated == result
    on_val, _, _ = launch("--mode=eval", f"--workdir={workdir}", "--split=val", f"--step={result['step']}")
    assert on_val["split"] == "val" and on_val != result

    Image.new("RGB", (50, 70), (200, 100, 20)).save(tmp_path / "a.png")
    Image.new("L", (90, 40)).save(tmp_path / "b.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    _, out, _ = launch("--mode=predict", f"--workdir={workdir}", f"--input={tmp_path}", status=1)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [pathlib.Path(line["input"]).name for line in lines] == ["a.png", "b.jpg", "broken.jpg"]
    assert "error" in lines[2]
    for line in lines[:2]:
        assert line["label"] in line["probabilities"]
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    alone, _, _ = launch("--mode=predict", f"--workdir={workdir}", f"--input={tmp_path / '*.png'}")
    assert alone["probabilities"] == pytest.approx(lines[0]["probabilities"], abs=1e-6)

    (workdir / "report.html").unlink()
    page, _, _ = launch("--mode=report", f"--workdir={workdir}")
    assert pathlib.Path(page["report"]).read_text().startswith("<!doctype html>")


def test_an_evaluation_that_the_disk_refuses_is_told_and_said_not_to_be_kept(finished, monkeypatch, capsys):
    workdir, _, result = finished

    def refused(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refused)
    told = verbs.evaluate(str(workdir))
    assert told["step"] == result["step"] and told["loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert capsys.readouterr().err.count("Read-only file system") == 1
    assert not list(workdir.glob(".*.tmp"))


@pytest.mark.parametrize("said", ["", "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT", "--a=1"])
def test_what_the_user_says_of_xla_stays(monkeypatch, said):
    monkeypatch.setenv("XLA_FLAGS", said)
    for _ in range(2):
        compilation.setup()
    words = os.environ["XLA_FLAGS"].split()
    assert words[: len(said.split())] == said.split() and "ynn" in words[-1] and len(words) <= 2


def test_what_is_said_of_xla_comes_before_the_first_compilation():
    """Importing the verbs compiles nothing, so that flags still reach XLA, which then leaves convolutions to Eigen."""
    code = """
from bigbase_jax import verbs
verbs.compilation.setup()
import jax, jax.numpy as jnp
form = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", **form)
for f, *shapes in (convolve, (4, 32, 32, 32), (3, 3, 32, 32)), (jnp.sum, (512, 512)):
    print("ynn" in jax.jit(f).lower(*map(jnp.ones, shapes)).compile().as_text())
"""
    flag = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
    for flags, found in (("", ["False", "True"]), (flag, ["True", "False"])):
        env = {**os.environ, "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.split() == found


def test_a_compilation_cache_that_fails_is_one_line(capsys):
    shown = []
    show = functools.partial(compilation._show_warning, lambda *args, **kwargs: shown.append(args), [])
    for name in ("init", "step"):
        message = f"Error writing persistent compilation cache entry for 'jit_{name}': OSError: No space left on device"
        show(UserWarning(message), UserWarning, "compiler.py", 1)
    show(UserWarning("another"), UserWarning, "other.py", 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be used (OSError: No space left on device); each start compiles anew" in line and len(shown) == 1


def test_a_checkpoint_of_another_model_is_one_sentence(finished, tmp_path):
    workdir, _, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["task"]["model"]["stages"][1] += 1
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    _, _, err = launch("--mode=eval", f"--workdir={tmp_path / 'run'}", status=2)
    assert "is of another model" in err and "stage_1.conv_0.kernel" in err
    _, _, err = launch("--mode=eval", f"--workdir={workdir}", "--step=12345", status=2)
    assert "no checkpoint of step 12345" in err


def test_whoever_reads_the_answers_may_have_seen_enough(finished, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    process = start("--mode=predict", f"--workdir={finished[0]}", f"--input={tmp_path}")
    process.stdout.close()
    assert "Traceback" not in process.stderr.read() and process.wait(300) == 128 + signal.SIGPIPE


def test_predictions_of_a_folder_equal_those_of_the_evaluation(tmp_path):
    """What serves a model runs the transforms that evaluated it."""
    folder = make_folder(tmp_path / "photos", 24)
    recipe = f"--config=configs/catdog.py:tiny,data=folder,root={folder}"
    launch(recipe, f"--workdir={tmp_path / 'run'}")
    kept = np.load(tmp_path / "run" / "predictions-test.npz")
    _, out, _ = launch("--mode=predict", f"--workdir={tmp_path / 'run'}", f"--input={folder / 'test'}")
    classes = json.loads((tmp_path / "run" / "data.json").read_text())["dataset_info"]["class_names"]
    answers = [[json.loads(line)["probabilities"][name] for name in classes] for line in out.splitlines()]
    np.testing.assert_allclose(np.array(answers), kept["probabilities"], atol=1e-5)


def test_a_language_model_needs_its_folder_and_nothing_else(tmp_path):
    """Characters of a Chinese text: trained, evaluated, reported; then read with neither the text nor a cache."""
    text = tmp_path / "text.txt"
    text.write_text("明月几时有？把酒问青天。\n不知天上宫阙，今夕是何年。\n" * 60, encoding="utf-8")
    recipe = f"--config=configs/lm.py:tiny,data=text,root={text},tokenizer=chars"
    env = {"BIGBASE_CACHE": str(tmp_path / "cache")}
    result, _, err = launch(recipe, f"--workdir={tmp_path / 'run'}", **env)
    assert "a vocabulary of 24" in err and result["split"] == "val"
    assert result["perplexity"] == pytest.approx(np.exp(result["loss"]), rel=1e-5)
    evaluated, _, err = launch("--mode=eval", f"--workdir={tmp_path / 'run'}", **env)
    assert evaluated == result and "to tokenise it" not in err
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Hardest passages" in page and "Bits per byte" in page and "Confusion" not in page

    text.unlink()
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "in").mkdir()
    prompts = {
        "a.txt": "明月几时有？",
        "b.txt": "今夕是何年。\n" * 20,
        "broken.txt": b"\xff",
        "other.txt": "明X",
        "z.txt": "",
    }
    for name, prompt in prompts.items():
        (tmp_path / "in" / name).write_bytes(prompt if isinstance(prompt, bytes) else prompt.encode())
    _, out, _ = launch("--mode=predict", f"--workdir={tmp_path / 'run'}", f"--input={tmp_path / 'in'}", status=1, **env)
    a, b, *bad = [json.loads(line) for line in out.splitlines()]
    assert ["not utf-8" in bad[0]["error"], "'X'" in bad[1]["error"], "empty" in bad[2]["error"]] == [True] * 3
    for answer, prompt in ((a, prompts["a.txt"]), (b, prompts["b.txt"])):
        assert "".join(piece for piece, _ in answer["text"]) == prompt[1:]
        nats = -sum(logp for _, logp in answer["text"])
        assert answer["loss"] == pytest.approx(nats / (len(prompt) - 1), abs=1e-4)
        assert answer["bits_per_byte"] == pytest.approx(nats / np.log(2) / len(prompt[1:].encode()), abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ restarts

LONG = (
    "--config.train.steps=40",
    "--config.train.log_every=2",
    "--config.train.checkpoint_every=3",
    "--config.train.eval_every=20",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    began = time.monotonic()
    result, _, _ = launch("--config=configs/catdog.py:tiny", f"--workdir={workdir}", *LONG)
    return workdir, result, time.monotonic() - began


def kill_often(workdir, kills, duration, seed):
    """Kills the run at random times; returns how often it had a checkpoint to go on from."""
    chance, resumed = random.Random(seed), 0
    command = ("--config=configs/catdog.py:tiny", f"--workdir={workdir}", *LONG)
    for _ in range(kills):
        process = start(*command)
        time.sleep(chance.uniform(0.3, 1.0) * duration)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        checkpoints = workdir / "checkpoints"
        resumed += checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir())
    return launch(*command)[0], resumed


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_random_times_gives_the_same_bits(undisturbed, tmp_path, kills):
    workdir, result, duration = undisturbed
    killed, resumed = kill_often(tmp_path / "run", kills, duration, seed=kills)
    assert resumed, "no kill came after a checkpoint; the test showed nothing"
    assert killed == result
    assert arrays(tmp_path / "run") == arrays(workdir)
    assert told(tmp_path / "run") == told(workdir)
    assert not [path for path in (tmp_path / "run").rglob("*") if "tmp" in path.name]


def test_signals_save_after_the_step_in_progress_and_the_same_bits_follow(undisturbed, tmp_path):
    workdir, result, _ = undisturbed
    command = ("--config=configs/catdog.py:tiny", f"--workdir={tmp_path / 'run'}", *LONG)
    for number, step in ((signal.SIGINT, 2), (signal.SIGHUP, 12)):
        process = start(*command)
        while f"step {step}/" not in (line := process.stderr.readline()) and line:
            pass
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 128 + number, err
        stopped = json.loads(out.splitlines()[-1])
        assert stopped["signal"] == number
        assert f"{number.name}: the run stops" in err and f"stopped by {number.name}" in err
        assert str(stopped["step"]) == arrays(tmp_path / "run")[0]
        assert step <= stopped["step"] < 40
    assert launch(*command)[0] == result
    assert arrays(tmp_path / "run") == arrays(workdir)
    assert told(tmp_path / "run") == told(workdir)


PIECES = ("--config.train.mesh.data=1", "--config.train.mesh.fsdp=-1", "--config.train.sharding=('fsdp:16',)")


@pytest.mark.parametrize("devices", [[8, 1], pytest.param([8, 2, 16, 1], marks=pytest.mark.slow)], ids=str)
def test_a_run_goes_on_with_another_number_of_devices_and_sees_the_same_examples(undisturbed, tmp_path, devices):
    """Each start but the last has its parameters in pieces over all devices, and is stopped half-way."""
    workdir, result, _ = undisturbed
    command = ("--config=configs/catdog.py:tiny", f"--workdir={tmp_path / 'run'}", *LONG)
    for i, count in enumerate(devices[:-1]):
        flags = f"--xla_force_host_platform_device_count={count}"
        process = start(*command, *PIECES, XLA_FLAGS=flags)
        seen = ""
        while f"step {2 + 10 * i}/" not in (line := process.stderr.readline()) and line:
            seen += line
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 128 + signal.SIGTERM, err
        assert f"devices: {count} x cpu" in seen
    stopped = json.loads(out.splitlines()[-1])["step"]
    alone, _, _ = launch("--mode=eval", f"--workdir={tmp_path / 'run'}")  # on one device, whatever it was trained on
    assert alone["step"] == stopped and alone["loss"] > 0
    final, _, _ = launch(*command)
    assert final["loss"] == pytest.approx(result["loss"], rel=2e-2)
    losses, undisturbed_losses = (train_losses(path) for path in (tmp_path / "run", workdir))
    assert losses.keys() >= undisturbed_losses.keys()
    for step, loss in undisturbed_losses.items():
        assert losses[step] == pytest.approx(loss, rel=2e-3), step


def told(workdir):
    """The rows of the log without what depends on time."""
    timed = ("seconds", "step_seconds", "examples_per_second", "data_wait", "memory_gb", "compile_seconds")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def train_losses(workdir):
    """The mean training loss by the step that ends its interval: it depends on the very examples of the interval."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


@pytest.mark.slow
def test_a_damaged_checkpoint_is_left_for_the_one_before_it(undisturbed, tmp_path):
    workdir, result, _ = undisturbed
    command = ("--config=configs/catdog.py:tiny", f"--workdir={tmp_path / 'run'}", *LONG)
    launch(*command)
    newest = arrays(tmp_path / "run")[0]
    for file in (tmp_path / "run" / "checkpoints" / newest / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    again, _, err = launch(*command)
    assert "cannot be read" in err
    assert again == result
    assert arrays(tmp_path / "run") == arrays(workdir)


# ------------------------------------------------------------------------------------------------------------ mistakes


def make_folder(root, count):
    """Small pictures of two classes in train and test: {train,test}/{cat,dog}/N.png."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for k, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count // 2):
                pixels = rng.integers(0, 128, (40, 36 + i % 9, 3)) + np.array([120, 0, 0] if k else [0, 0, 120])
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i:03d}.png")
    return root


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--config=configs/catdgo.py"], "Did you mean 'configs/catdog.py'?"),
        (["--config=configs/catdog.py:dta=folder"], "Did you mean 'data'?"),
        (["--config=configs/catdog.py:data=foldr"], "Did you mean 'folder'?"),
        (["--config=configs/catdog.py:data=folder"], "needs root=DIR"),
        (["--config=configs/catdog.py:data=folder,root=/no/such/place"], "/no/such/place"),
        (["--config=configs/catdog.py:tiny", "--config.optim.learning_rat=1"], "learning_rat"),
        (
            ["--config=configs/catdog.py:tiny", "--config.data.batch_size=30"],
            "does not divide over 8 devices; use 24 or 32",
        ),
        (["--config=configs/catdog.py:tiny", "--config.train.parallel=pmap"], "'jit' or 'shard_map'"),
        (["--config=configs/catdog.py:tiny", "--config.task.model.depth=19"], "depth"),
        (["--config=configs/catdog.py:tiny", "--config.train.epochs=1", "--config.train.steps=3"], "exactly one of"),
        (["--mode=evaluate", "--workdir=x"], "Did you mean 'eval'?"),
        (["--mode=eval"], "needs --workdir"),
        (["--mode=eval", "--workdir=/no/such/run"], "not a run folder"),
        (["--config=configs/lm.py:data=text"], "needs root=FILE"),
        (["--config=configs/lm.py:tokenizer=charz"], "Did you mean 'chars'?"),
        (["--config=configs/lm.py:data=text,root=/no/such/text"], "there is no file or folder /no/such/text"),
        (["--config=configs/lm.py:tiny", "--config.task.model.length=8"], "longer than the 8 positions"),
        ([], "--config is missing"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_sentence(args, sentence, tmp_path):
    if args and args[0].startswith("--config"):
        args = [*args, f"--workdir={tmp_path / 'run'}"]
    _, out, err = launch(*args, status=2, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert sentence in err.splitlines()[-1], err
    assert not out


def test_help_shows_every_flag_below_the_verbs_that_take_it():
    done = subprocess.run([sys.executable, ROOT / "launch.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    groups = dict(part.split(":\n", 1) for part in done.stdout.split("\n\n") if ":\n" in part)
    sources = "".join(p.read_text() for p in (ROOT / "launch.py", ROOT / "bigbase_jax" / "cli.py"))
    flags = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', sources))
    assert {"config", "prompt", "sweep_index"} <= flags
    assert set(re.findall(r"^  --(?:\[no\])?(\w+)", done.stdout, re.MULTILINE)) == flags
    assert "--prompt=" in groups["generate"] and "--prompt=" not in groups["eval"] and "--split=" in groups["eval"]


def test_a_bug_in_a_recipe_keeps_its_traceback(tmp_path):
    (tmp_path / "buggy.py").write_text("def get_config(arg=None):\n    return {}['no such key']\n")
    process = start(f"--config={tmp_path / 'buggy.py'}")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" in err and "buggy.py" in err and err.strip().endswith("KeyError: 'no such key'")


def test_bad_pictures_stop_the_run_or_are_left_out(tmp_path):
    folder = make_folder(tmp_path / "photos", 24)
    (folder / "train" / "cat" / "000.png").write_bytes(b"broken")
    recipe = f"--config=configs/catdog.py:tiny,data=folder,root={folder}"
    _, _, err = launch(recipe, f"--workdir={tmp_path / 'run'}", status=2)
    assert "000.png" in err and "on_bad_example=skip" in err
    assert not (tmp_path / "run" / "checkpoints").exists()
    _, _, err = launch(recipe, f"--workdir={tmp_path / 'run'}", "--config.data.on_bad_example=skip")
    assert "unreadable, left out: 1" in err


def test_a_diverging_run_says_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    args = ("--config=configs/catdog.py:tiny", f"--workdir={tmp_path / 'run'}", "--config.train.steps=30")
    more = ("--config.train.checkpoint_every=2", "--config.optim.learning_rate=1e30", "--config.optim.warmup=10.0")
    _, _, err = launch(*args, *more, status=2)
    assert "at step" in err.splitlines()[-1]
    assert (tmp_path / "run" / "report.html").exists()
    for folder in (tmp_path / "run").glob("checkpoints/[0-9]*"):
        for name, x in ocp.load(folder).items():
            if name.startswith("params"):
                assert np.isfinite(np.asarray(x)).all(), (folder, name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    _, _, err = launch("--config=configs/catdog.py:tiny", f"--workdir={tmp_path / 'locked' / 'run'}", status=2)
    assert "Permission denied" in err


def test_a_workdir_below_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    _, _, err = launch("--config=configs/catdog.py:tiny", f"--workdir={tmp_path / 'file' / 'run'}", status=2)
    assert "Not a directory" in err


def test_neither_tensorflow_nor_torch_is_loaded_by_a_run(finished):
    workdir, _, _ = finished
    code = (
        f"import sys, runpy; sys.argv = ['launch.py', '--mode=eval', '--workdir={workdir}']\n"
        "try: runpy.run_path('launch.py', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "bad = {'tensorflow', 'torch'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
