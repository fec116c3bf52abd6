"""Two replicas behind Ray Serve: one is killed, and no request is lost but those that it had in hand."""

import contextlib
import http.client
import json
import os
import pathlib
import signal
import threading
import time

import pytest
import toy

from bigbase_jax.core import UserError
from bigbase_jax.serve import replicas
from bigbase_jax.serve.served import Options, Served

HERE = pathlib.Path(__file__).parent
CLIENTS = 4


def opened(metrics):
    return Served("toy", toy.predictor(), Options(max_batch=4), metrics=metrics)


def processes():
    """Of replicas, by number."""
    found = set()
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::ServeReplica:"):
                found.add(int(path.parent.name))
    return found


def test_without_models_or_ray_a_sentence_says_what_is_missing(monkeypatch):
    monkeypatch.setenv(replicas.VARIABLE, "")
    with pytest.raises(UserError, match="names no run"):
        replicas.app()
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[serve,ray\]'"):
        replicas.deployment({"toy": opened})


@pytest.mark.slow
def test_a_killed_replica_loses_only_what_it_had_in_hand():
    ray = pytest.importorskip("ray")
    from ray import serve

    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), *__import__("sys").path])
    ray.init(
        num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}}
    )
    results, stop = [], threading.Event()
    try:
        serve.start(http_options={"port": 8199})
        serve.run(replicas.deployment({"toy": opened}, num_replicas=2, health_check_period_s=1), name="toy")
        before = processes()
        assert len(before) == 2
        right = toy.predictor().answer({"x": [1, 2, 3, 4]})[0]["sum"]

        def ask():
            while not stop.is_set():
                began, good = time.monotonic(), False
                with contextlib.suppress(OSError, http.client.HTTPException):
                    connection = http.client.HTTPConnection("127.0.0.1", 8199, timeout=60)
                    connection.request(
                        "POST", "/v1/predict/toy", json.dumps({"x": [1, 2, 3, 4]}), {"content-type": "application/json"}
                    )
                    response = connection.getresponse()
                    body = response.read()
                    good = response.status == 200 and abs(json.loads(body)["answers"][0]["sum"] - right) < 1e-5
                results.append((began, time.monotonic(), good))

        clients = [threading.Thread(target=ask) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(2)
        os.kill(min(before), signal.SIGKILL)
        killed = time.monotonic()
        while len(processes() - {min(before)}) < 2 and time.monotonic() < killed + 60:
            time.sleep(0.2)
        after = processes()
        time.sleep(3)
        stop.set()
        for client in clients:
            client.join()
    finally:
        stop.set()
        serve.shutdown()
        ray.shutdown()
    lost = [began for began, _, good in results if not good]
    assert len(after - before) == 1 and len(results) > 100
    assert sum(good for began, _, good in results if began > killed) > 50
    assert len(lost) <= CLIENTS and all(began <= killed + 0.5 for began in lost), (lost, killed)
    print(f"{len(results)} requests, {len(lost)} lost")
