"""The real command: it starts, answers, and ends in order."""

import asyncio
import http.server
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from PIL import Image

from bigbase_jax import verbs
from bigbase_jax.core import UserError
from bigbase_jax.ops.registry import Registry
from bigbase_jax.serve import keys
from bigbase_jax.serve.served import Options, Served

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
def traces():
    """What takes OpenTelemetry's traces: its address, and what came."""
    came = []

    class Sink(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            came.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sink) as sink:
        threading.Thread(target=sink.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{sink.server_port}", came
        sink.shutdown()


@pytest.fixture(scope="module")
def server(registry, traces):
    environment = {**os.environ, "XLA_FLAGS": "", "GLIBC_TUNABLES": "", "OTEL_EXPORTER_OTLP_ENDPOINT": traces[0]}
    words = [
        "--mode=serve",
        f"--workdir={RUN}",
        f"--workdir=again={RUN}",
        "--port=0",
        "--max_batch=2",
        "--max_pixels=2000",
    ]
    words += ["--max_batch=2", "--max_pixels=2000"]
    words += [f"--registry={registry.folder}", "--model=catdog@production"]
    pipe = subprocess.PIPE
    started = subprocess.Popen(
        [sys.executable, "launch.py", *words], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )
    yield started
    started.kill()


def test_the_command_serves_runs_and_an_alias_until_sigterm(server, registry, traces, tmp_path):
    line = server.stdout.readline()
    assert line, server.stderr.read()[-3000:]
    told = json.loads(line)
    assert told["models"] == ["again", "catdog", "pictures"] and told["serving"].startswith("http://127.0.0.1:")
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "a.png")
    url = f"{told['serving']}/v1/predict/pictures"
    with urllib.request.urlopen(urllib.request.Request(url, (tmp_path / "a.png").read_bytes())) as response:
        (answer,) = json.load(response)["answers"]
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    Image.new("RGB", (50, 50)).save(tmp_path / "large.png")
    with pytest.raises(urllib.error.HTTPError, match="422") as refused:
        urllib.request.urlopen(urllib.request.Request(url, (tmp_path / "large.png").read_bytes()))
    assert "50 x 50" in json.load(refused.value)["error"]["message"]
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
    assert {line["status"] for line in logged} == {200, 422}
    told = b"".join(body for path, body in traces[1] if path == "/v1/traces")
    assert b"/v1/predict/{name}" in told and b"bigbase_jax" in told
    assert {path for path, _ in traces[1]} == {"/v1/traces"}


def test_another_engine_gives_the_same_answers(tmp_path):
    run = str(shutil.copytree(RUN, tmp_path / "run"))
    verbs.export(run, to="onnx", output=None)
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "a.png")
    found = {}
    for engine in ("jax", "onnxruntime"):
        served = Served.open("run", run, engine=engine, options=Options(max_batch=1))
        served.warm()
        (found[engine],) = asyncio.run(served.predict((tmp_path / "a.png").read_bytes()))
        assert served.card["engine"] == engine
        served.close(1)
    for name, p in found["jax"]["probabilities"].items():
        assert found["onnxruntime"]["probabilities"][name] == pytest.approx(p, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"workdirs": []}, "needs --workdir"),
        ({"workdirs": ["a/run", "b/run"]}, "both be called 'run'"),
        ({"workdirs": ["run"], "max_queue": 0}, "--max_queue=0"),
        ({"workdirs": ["run"], "rate": 1.0}, "give --api_keys"),
        ({"workdirs": ["run"], "add_key": "ann"}, "needs --api_keys"),
        ({"workdirs": ["run"], "api_keys": "none"}, "--api_keys=none cannot be read"),
        ({"workdirs": ["run"], "host": "256.1.1.1"}, "--host=256.1.1.1"),
        ({"workdirs": ["no-such-run"], "port": 0}, "no-such-run"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_served(words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        verbs.serve(**words)


def test_a_port_that_is_taken_is_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another --port"):
            verbs.serve(["run"], port=taken.getsockname()[1])


def test_a_key_is_printed_once_and_kept_as_a_hash(tmp_path, capsys):
    assert verbs.serve([], api_keys=str(tmp_path / "keys"), add_key="ann") == 0
    key = json.loads(capsys.readouterr().out)["key"]
    assert keys.Keys(tmp_path / "keys").holder(key) == "ann" and key not in (tmp_path / "keys").read_text()
