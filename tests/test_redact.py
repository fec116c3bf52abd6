"""Secrets reach no file, page, line, sentence, traceback or process table."""

import contextlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import threading

import pytest
from ml_collections import ConfigDict

from bigbase_jax import cli
from bigbase_jax.core import UserError
from bigbase_jax.pages import report
from bigbase_jax.runtime import distributed, redact
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.sweep import Sweep, choice
from bigbase_jax.sweep import command as sweep_command
from bigbase_jax.sweep import study as studies

SECRET = "Tr0ub4dor/3"
URL = f"postgresql://anna:{SECRET}@db.example:5432/sweeps"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"cannot open {URL}.", "cannot open postgresql://anna:***@db.example:5432/sweeps."),
        (f"redis://:{SECRET}@host", "redis://:***@host"),
        ("mysql://u:p@ss/w:o?r@d@host/db", "mysql://u:***@host/db"),
        ("http://one/x,mysql://u:pw@host", "http://one/x,mysql://u:***@host"),
        ("https://ghp_16C7e42F292c6912E7@github.com/a/b", "https://***@github.com/a/b"),
        (f"mysql://host/db?user=a&password={SECRET}&ssl=1", "mysql://host/db?user=a&password=***&ssl=1"),
        (f"https://host/x?access_token={SECRET}", "https://host/x?access_token=***"),
        (f"--config.data.token={SECRET},root=/x", "--config.data.token=***,root=/x"),
        (f"configs/a.py:apiKey={SECRET},root=/x", "configs/a.py:apiKey=***,root=/x"),
        (f"{{'client_secret': '{SECRET}', 'x': 1}}", "{'client_secret': '***', 'x': 1}"),
        (f"OPENAI_KEY=sk-abcdef{SECRET}", "OPENAI_KEY=***"),
        ("step 5/10  loss 0.1  https://host:8080/path", "step 5/10  loss 0.1  https://host:8080/path"),
        ("image_key=image text_key=caption pad_token=<|reserved_special_token_0|> tokens=1000000000000a",) * 2,
        ("postgresql://anna@host/db max_token=5 sort=key",) * 2,
    ],
)
def test_secrets_are_found_by_their_form(text, shown):
    assert redact.hide(text) == shown
    assert redact.hide(shown) == shown


@pytest.fixture
def argv(monkeypatch):
    """A command with secrets in its arguments and its environment."""
    monkeypatch.setattr(sys, "argv", ["launch.py", "--seed=1", f"--sweep_storage={URL}", "--hf-token", "word by word"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://bob:quote%40me@mlflow.example")
    return sys.argv


def test_secrets_of_this_process_are_hidden_wherever_they_stand(argv):
    for secret in (SECRET, "Tr0ub4dor%2F3", "word by word", "quote%40me", "quote@me"):
        assert redact.hide(f"invalid literal: '{secret}'") == "invalid literal: '***'"
    shown = "postgresql://anna:***@db.example:5432/sweeps"
    assert redact.command(argv) == ["launch.py", "--seed=1", f"--sweep_storage={shown}", "--hf-token", "***"]


def test_neither_lines_nor_sentences_nor_tracebacks_hold_a_secret(argv, capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(cli.signals, "interruptible", contextlib.nullcontext)
    say(f"opening {URL}")

    def ended(error):
        def parse(argv):
            raise error

        monkeypatch.setattr(cli, "parse", parse)
        with pytest.raises(SystemExit) as exit_:
            try:
                cli.ending(len)()
            except RuntimeError as unexpected:
                sys.excepthook(type(unexpected), unexpected, unexpected.__traceback__)
                sys.exit(1)
        return exit_.value.code

    assert ended(UserError(f"cannot read {URL}")) == 2
    assert ended(RuntimeError(f"no answer from {URL}: {SECRET}")) == 1
    thread = threading.Thread(target=lambda: {}[URL])
    thread.start()
    thread.join()
    monkeypatch.setattr(os, "_exit", lambda status: None)
    distributed._exit(f"error: {URL}", 1)
    said = capsys.readouterr().err
    assert SECRET not in said and said.count("anna:***@db.example") >= 5 and "RuntimeError" in said


def test_the_command_that_a_run_keeps_and_its_report_shows_has_none(argv, tmp_path):
    run = RunDir(tmp_path)
    run.create(ConfigDict({"seed": 1}), "f")
    with run.training(0, 1, {"fingerprint": "f"}):
        pass
    old = shlex.join(["python", *argv, "--config.data.password=a b"])  # as earlier versions wrote it
    lineage = json.loads((tmp_path / "lineage.json").read_text())
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "lineage.json").write_text(json.dumps({**lineage, "command": old}))
    (tmp_path / "earlier" / "config.json").write_text(json.dumps({"data": {"root": URL, "token": "a b"}}))
    argv[1:] = []  # what follows is by form alone
    for folder in (tmp_path, tmp_path / "earlier"):
        page = pathlib.Path(report.write(str(folder))).read_text()
        assert "--sweep_storage=postgresql://anna:***@" in page and "--hf-token" in page
        for secret in (SECRET, "word by word", "a b"):
            assert secret not in page and secret not in (tmp_path / "lineage.json").read_text()


def test_a_config_that_would_be_kept_holds_no_secret(tmp_path, monkeypatch):
    for data, key in (
        ({"root": URL}, "data.root"),
        ({"dataset": {"token": "x"}}, "data.dataset.token"),
        ({"urls": ["https://host/?api_key=x"]}, "data.urls"),
        ({"secretAccessKey": "x"}, "data.secretAccessKey"),
    ):
        with pytest.raises(UserError, match=rf"config\.{key} holds a secret, .* environment variable") as caught:
            RunDir(tmp_path / "run").create(ConfigDict({"data": data}), "f")
        assert SECRET not in str(caught.value) and not (tmp_path / "run").exists()
    RunDir(tmp_path / "run").create(ConfigDict({"task": {"pad_token": "<pad>", "text_key": "text", "key": None}}), "f")

    sweep = Sweep("accuracy", space={"data.token": choice(a="xyz", b="abc")}, trials=2)
    monkeypatch.setattr(sweep_command.space, "load", lambda path: sweep)
    monkeypatch.setattr(sweep_command.space, "check", lambda *args: None)
    with pytest.raises(UserError, match=r"data\.token holds a secret"):
        sweep_command.run(ConfigDict({"data": {"token": None}}), "sweep.py", str(tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()


def test_processes_get_secrets_by_the_environment_not_by_their_arguments(argv, monkeypatch):
    code = "import sys; from bigbase_jax.runtime import redact; redact.receive(); print(*sys.argv[1:], sep='\\n')"
    command, env = redact.child([sys.executable, "-c", *argv[1:]])
    assert SECRET not in " ".join(command) and "word by word" not in command
    env = {name: json.dumps(json.loads(value)[1:]) for name, value in env.items()}  # Python takes -c for itself
    command = [*command[:2], code, *command[2:]]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == argv[1:]
    plain = [sys.executable, "launch.py", "--seed=1"]
    assert redact.child(plain) == (plain, {})

    started = []

    class Stopped(Exception):
        pass

    def popen(command, env, **kwargs):
        started.append((command, env))
        raise Stopped

    monkeypatch.setattr(subprocess, "Popen", popen)
    for start in (lambda: sweep_command._Child(0, sweep_command._Place({}, frozenset())), lambda: distributed.spawn(2)):
        with pytest.raises(Stopped):
            start()
    for command, env in started:
        assert SECRET not in " ".join(command) and SECRET in env[redact._ARGUMENTS]


def test_a_database_that_does_not_open_is_named_without_its_password(monkeypatch, tmp_path):
    monkeypatch.setattr(studies.time, "sleep", lambda seconds: None)

    def refused(url, **kwargs):
        raise ValueError(f"Could not parse {url}: invalid literal for int() with base 10: '{SECRET}@db'")

    monkeypatch.setattr(studies.optuna.storages, "RDBStorage", refused)
    monkeypatch.setattr(sys, "argv", ["launch.py", f"--sweep_storage={URL}"])
    with pytest.raises(UserError) as caught:
        studies._storage(URL)
    assert SECRET not in redact.hide(str(caught.value)) and "anna:***@db.example" in str(caught.value)
