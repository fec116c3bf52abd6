"""The real command: it starts, answers, and ends in order."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import urllib.request

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
RUN = ROOT / "tests" / "earlier" / "pictures"


@pytest.fixture(scope="module")
def server():
    environment = {**os.environ, "XLA_FLAGS": "", "GLIBC_TUNABLES": ""}
    words = ["--mode=serve", f"--workdir={RUN}", f"--workdir=again={RUN}", "--port=0", "--max_batch=2"]
    pipe = subprocess.PIPE
    started = subprocess.Popen(
        [sys.executable, "launch.py", *words], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )
    yield started
    started.kill()


def test_the_command_serves_a_run_until_sigterm(server, tmp_path):
    line = server.stdout.readline()
    assert line, server.stderr.read()[-3000:]
    told = json.loads(line)
    assert told["models"] == ["again", "pictures"] and told["serving"].startswith("http://127.0.0.1:")
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "a.png")
    url = f"{told['serving']}/v1/predict/pictures"
    with urllib.request.urlopen(urllib.request.Request(url, (tmp_path / "a.png").read_bytes())) as response:
        (answer,) = json.load(response)["answers"]
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=120)
    assert server.returncode == 0, err[-3000:]
    assert out == "" and "Traceback" not in err
    logged = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [line["status"] for line in logged] == [200]
