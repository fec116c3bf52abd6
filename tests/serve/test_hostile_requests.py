"""What clients send that is wrong: no crash, no place that stays taken, no traceback; more in experiments/serving."""

import asyncio
import importlib.util
import json
import pathlib
import time
import urllib.request
from collections import Counter

import hypothesis
import pytest
import schemathesis
import toy
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from bigbase_jax.serve.app import Settings, create
from bigbase_jax.serve.metrics import Metrics
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.served import Options, Served

PATH = pathlib.Path(__file__).parents[2] / "experiments" / "serving" / "hostile.py"
SPEC = importlib.util.spec_from_file_location("hostile", PATH)
hostile = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hostile)


SETTINGS = hypothesis.settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


@pytest.fixture(scope="module")
def app():
    metrics = Metrics()
    options = Options(max_batch=2, max_examples=8)
    models = Models({"toy": lambda: Served("toy", toy.predictor(), options, metrics=metrics)})
    models.load()
    yield create(models, Settings(timeout_s=10, max_body=1 << 16), metrics)
    models.close(5)


def test_what_the_openapi_allows_is_answered_as_it_says(app):
    checks, asked = [not_a_server_error, status_code_conformance, content_type_conformance], Counter()
    operations = [found.ok() for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]
    for operation in operations:

        @SETTINGS
        @hypothesis.given(case=operation.as_strategy(), known=hypothesis.strategies.booleans())
        def ask(case, known):
            if known and "name" in case.path_parameters:  # else hardly ever is a model asked that there is
                case.path_parameters["name"] = "toy"
            response = case.call()
            case.validate_response(response, checks=checks)
            asked[response.status_code // 100] += 1

        ask()
    assert len(operations) >= 15 and asked.total() > 150 and min(asked[2], asked[4]) > 20


def test_hostile_bytes_over_sockets_leave_nothing_behind(app, capfd):
    with toy.live(app) as port:
        found = asyncio.run(hostile.attack(port, "toy", {"x": [1, 2, 3, 4]}, 400))
        deadline = time.monotonic() + 60
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as response:
            assert json.load(response) == {"status": "alive"}
        while True:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
                left = hostile.left(response.read().decode())
            if not left or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    assert left == 0
    assert "Traceback" not in capfd.readouterr().err
    assert {kind for kind, _ in found} == set(hostile.KINDS) and len({status for _, status in found}) > 5
