"""A server follows an alias: no request fails, and each answer is that of the version that it names."""

import asyncio
import json
import pathlib
import sys
import time

import pytest
from test_registry import make_run

sys.path.append(str(pathlib.Path(__file__).parents[1] / "serve"))
import itertools

import toy

from bigbase_jax.core import UserError
from bigbase_jax.ops.follow import Follower
from bigbase_jax.ops.registry import Registry
from bigbase_jax.serve.app import Settings, create
from bigbase_jax.serve.metrics import Metrics
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.served import Options, Served

REQUESTS, SWITCHES, CLIENTS = 10_000, 20, 16
ROW = {"x": [1.0, -2.0, 0.5, 3.0]}


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("follow")
    made = Registry.open(folder / "registry", create=True)
    for number in (1, 2):
        made.push("toy", make_run(folder / str(number)))
    made.promote("toy:1", "production")
    return made


async def post(app, path, body):
    """One request to the application, within this process: its status and what it says."""
    messages, got = [{"type": "http.request", "body": body, "more_body": False}], []

    async def receive():
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message):
        got.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    await app({**scope, "headers": headers, "http_version": "1.1", "scheme": "http"}, receive, send)
    return got[0]["status"], json.loads(b"".join(message.get("body", b"") for message in got[1:]))


def test_no_request_fails_while_the_alias_is_switched(registry, capsys):
    metrics, closed = Metrics(), []

    def load(version):
        served = Served("toy", toy.predictor(version.version), Options(max_batch=4), str(version.version), metrics)
        close = served.close
        served.close = lambda drain_s=30.0: (close(drain_s), closed.append(served))
        return served

    models = Models({"toy": lambda: load(registry.resolve("toy@production"))})
    models.load()
    right = {str(number): toy.predictor(number).answer(ROW)[0]["y"] for number in (1, 2)}
    assert right["1"] != right["2"]
    app = create(models, Settings(timeout_s=600), metrics)  # the machine may stand still for a while
    switched = []

    def switch(version):
        models.switch("toy", load(version))
        switched.append(version.version)

    follower = Follower(registry, "toy@production", switch, poll_s=0.01)
    follower.start(registry.find("toy@production"))
    body, asked, seen = json.dumps(ROW).encode(), 0, []

    async def client():
        nonlocal asked
        while asked < REQUESTS or len(switched) < SWITCHES:
            asked += 1
            status, found = await post(app, "/v1/predict/toy", body)
            assert status == 200, found
            (answer,) = found["answers"]
            assert answer["y"] == pytest.approx(right[found["version"]], abs=1e-6)
            seen.append(found["version"])

    async def promotions():
        for number in range(SWITCHES):
            while asked < number * REQUESTS // SWITCHES or len(switched) < number:
                await asyncio.sleep(0.005)
            registry.promote(f"toy:{2 - number % 2}", "production", why=f"switch {number}")

    async def all_together():
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(client())
            group.create_task(promotions())

    asyncio.run(all_together())
    follower.stop()
    assert len(seen) >= REQUESTS and switched == [2, 1] * (SWITCHES // 2)
    assert sum(a != b for a, b in itertools.pairwise(seen)) >= SWITCHES
    ends = time.monotonic() + 60
    while len(closed) < SWITCHES and time.monotonic() < ends:  # the old ones are drained in the background
        time.sleep(0.01)
    assert len(closed) == SWITCHES and not any(served.busy for served in closed)
    models.close(5)


def test_what_cannot_be_taken_over_changes_nothing_and_is_tried_again(registry, monkeypatch):
    monkeypatch.setattr("bigbase_jax.ops.follow.RETRY_S", 0.01)
    registry.promote("toy:1", "production")
    tries, taken = [], []

    def take(version):
        tries.append(version.version)
        if len(tries) < 3:
            raise UserError("it does not fit into memory")
        taken.append(version.version)

    follower = Follower(registry, "toy@production", take, poll_s=0.01)
    follower.start(registry.find("toy@production"))
    registry.promote("toy:2", "production")
    ends = time.monotonic() + 60
    while not taken and time.monotonic() < ends:
        time.sleep(0.01)
    follower.stop()
    assert tries == [2, 2, 2] and taken == [2]
