"""What the server adds to the bare predictor: one client, one input at a time, in turn.

python experiments/serving/overhead.py RUN --input='{"text": "a good film"}'    or --input=@picture.jpg
"""

import argparse
import asyncio
import http.client
import json
import pathlib
import statistics
import subprocess
import sys
import time

from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.runtime import compilation
from bigbase_jax.serve.app import create
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.served import Options, Served

ROOT = pathlib.Path(__file__).parents[2]


async def in_process(app, kind, body):
    """One request to the application, without a socket."""
    scope = {"type": "http", "method": "POST", "path": "/v1/predict/run", "headers": [(b"content-type", kind.encode())]}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("a", 1), "client": ("b", 2)}
    waiting, sent, done = [{"type": "http.request", "body": body}], [], asyncio.Event()

    async def receive():
        if waiting:
            return waiting.pop()
        await done.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    done.set()
    assert sent[0]["status"] == 200, sent


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--input", required=True)
    parser.add_argument("--requests", type=int, default=500)
    asked = parser.parse_args()
    compilation.setup()
    if asked.input.startswith("@"):
        body, kind = pathlib.Path(asked.input[1:]).read_bytes(), "application/octet-stream"
        given = body
    else:
        body, kind = asked.input.encode(), "application/json"
        given = json.loads(asked.input)
    predictor = Predictor.open(asked.run)
    models = Models({"run": lambda: Served("run", predictor, Options())})
    models.load()
    app = create(models)
    command = [sys.executable, "launch.py", "--mode=serve", f"--workdir=run={asked.run}", "--port=0"]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    server = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=null, text=True)
    seconds = {"bare": [], "in process": [], "loopback": []}
    try:
        address = json.loads(server.stdout.readline())["serving"].removeprefix("http://")
        connection = http.client.HTTPConnection(address)
        loop = asyncio.new_event_loop()

        def loopback():
            connection.request("POST", "/v1/predict/run", body, {"content-type": kind})
            response = connection.getresponse()
            response.read()
            assert response.status == 200

        ways = {
            "bare": lambda: predictor.answer(given),
            "in process": lambda: loop.run_until_complete(in_process(app, kind, body)),
            "loopback": loopback,
        }
        for number in range(asked.requests + 50):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                if number >= 50:
                    seconds[name].append(time.perf_counter() - began)
    finally:
        server.terminate()
        server.wait()
    found = {}
    for name, values in seconds.items():
        cut = statistics.quantiles(values, n=100)
        found[name] = {"p50_ms": round(cut[49] * 1e3, 3), "p90_ms": round(cut[89] * 1e3, 3)}
    for name in ("in process", "loopback"):
        found[name]["added_p50_ms"] = round(found[name]["p50_ms"] - found["bare"]["p50_ms"], 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
