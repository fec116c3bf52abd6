"""The real command: it starts, answers, and ends in order."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from PIL import Image

from bigbase_jax.ops.registry import Registry

ROOT = pathlib.Path(__file__).parents[2]
RUN = ROOT / "tests" / "earlier" / "pictures"


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registry")
    run = shutil.copytree(RUN, folder / "run")
    (run / "eval-test.json").write_text(json.dumps({"step": 3, "split": "test", "accuracy": 0.9}))
    made = Registry.open(folder / "registry", create=True)
    for _ in range(2):
        made.push("catdog", run)
    made.promote("catdog:1", "production")
    return made


@pytest.fixture(scope="module")
def server(registry):
    environment = {**os.environ, "XLA_FLAGS": "", "GLIBC_TUNABLES": ""}
    words = ["--mode=serve", f"--workdir={RUN}", f"--workdir=again={RUN}", "--port=0", "--max_batch=2"]
    words += [f"--registry={registry.folder}", "--model=catdog@production"]
    pipe = subprocess.PIPE
    started = subprocess.Popen(
        [sys.executable, "launch.py", *words], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )
    yield started
    started.kill()


def test_the_command_serves_runs_and_an_alias_until_sigterm(server, registry, tmp_path):
    line = server.stdout.readline()
    assert line, server.stderr.read()[-3000:]
    told = json.loads(line)
    assert told["models"] == ["again", "catdog", "pictures"] and told["serving"].startswith("http://127.0.0.1:")
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "a.png")
    url = f"{told['serving']}/v1/predict/pictures"
    with urllib.request.urlopen(urllib.request.Request(url, (tmp_path / "a.png").read_bytes())) as response:
        (answer,) = json.load(response)["answers"]
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    registry.promote("catdog:2", "production")
    version, ends = "1", time.monotonic() + 120
    while version == "1" and time.monotonic() < ends:
        with urllib.request.urlopen(f"{told['serving']}/v1/models/catdog") as response:
            version = json.load(response)["version"]
        time.sleep(0.1)
    assert version == "2"
    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=120)
    assert server.returncode == 0, err[-3000:]
    assert out == "" and "Traceback" not in err
    logged = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert {line["status"] for line in logged} == {200}
