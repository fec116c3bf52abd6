"""A candidate beside what answers: its share of the requests, and both answers compared."""

import json
import pathlib
import random
import sys
import time

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "serve"))
import toy

from bigbase_jax.core import UserError
from bigbase_jax.ops import samples
from bigbase_jax.ops.samples import Sampler
from bigbase_jax.serve.candidate import Trial, difference
from bigbase_jax.serve.served import Options, Served

ROW = {"x": [1.0, -2.0, 0.5, 3.0]}
WORDS = {"json": ROW}


def compared(client, count):
    """The counts of comparisons by what they found, once there are so many."""
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        found = {
            s.labels["same"]: int(s.value)
            for m in client.metrics.compared.collect()
            for s in m.samples
            if s.name.endswith("_total")
        }
        if sum(found.values()) >= count:
            return found
        time.sleep(0.01)
    raise AssertionError(found)


def candidate(client, seed, version, hook=None):
    made = Served("toy", toy.predictor(seed, hook), Options(max_batch=4), version, client.metrics)
    client.models.try_out("toy", made)
    return made


def test_a_canary_answers_its_share_and_a_shadow_none(tmp_path, capfd):
    random.seed(0)
    sampler = Sampler(tmp_path, share=1.0)
    right = {version: toy.predictor(seed).answer(ROW)[0]["y"] for version, seed in (("0", 0), ("7", 7))}
    assert right["0"] != right["7"]
    with toy.client(trial=Trial(canary=0.25), watch=sampler) as client:
        assert client.post("/v1/predict/toy", **WORDS).json()["version"] == "0"
        candidate(client, 7, "7")
        seen = []
        for _ in range(200):
            found = client.post("/v1/predict/toy", **WORDS).json()
            assert found["answers"][0]["y"] == pytest.approx(right[found["version"]], abs=1e-6)
            seen.append(found["version"])
        assert 30 < seen.count("7") < 72
        assert compared(client, seen.count("7")) == {"yes": seen.count("7")}
        assert client.get("/v1/models/toy").json()["version"] == "0"
        assert client.get("/v2/models/toy/versions/0").status_code == 200
    sampler.close()
    kept = [samples.read(tmp_path, 1000, "toy", version).rows for version in ("0", "7")]
    assert len(kept[0]) == 201 and {row["request"] for row in kept[1]} <= {row["request"] for row in kept[0]}
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"compared"' in line]
    assert len(lines) == seen.count("7") and lines[0]["compared"] == ["7", "0"] and "answers" not in lines[0]
    assert lines[0]["largest_difference"] > 0.01
    with toy.client(trial=Trial(shadow=True, contents=True)) as client:
        candidate(client, 7, "7")
        assert {client.post("/v1/predict/toy", **WORDS).json()["version"] for _ in range(20)} == {"0"}
        assert compared(client, 20) == {"yes": 20}
    (line, *_) = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"compared"' in line]
    assert line["compared"] == ["0", "7"] and len(line["answers"]) == 2


def test_a_candidate_that_crashes_fails_no_request_that_it_does_not_answer(capfd):
    broken = []

    def hook(_):
        if broken:
            raise RuntimeError("no")

    with toy.client(trial=Trial(shadow=True)) as client:
        old = candidate(client, 7, "7", hook)
        broken.append(True)
        assert {client.post("/v1/predict/toy", **WORDS).status_code for _ in range(10)} == {200}
        errors = compared(client, 3)["error"]
        time.sleep(0.2)  # a candidate that has crashed three times is asked no more
        assert compared(client, 3) == {"error": errors}
        candidate(client, 8, "8")
        client.models.switch("toy", Served("toy", toy.predictor(9), Options(max_batch=4), "9", client.metrics))
        assert client.post("/v1/predict/toy", **WORDS).json()["version"] == "9"
        assert compared(client, errors + 1) == {"error": errors, "yes": 1}
        assert old.version == "7"


def test_a_difference_is_of_what_is_said_and_of_numbers():
    a = [{"label": "cat", "probabilities": {"cat": 0.9, "dog": 0.1}, "n": 3}]
    assert difference(a, [{"label": "cat", "probabilities": {"cat": 0.7, "dog": 0.3}, "n": 3}]) == (
        True,
        pytest.approx(0.2),
    )
    assert not difference(a, [{"label": "dog", "probabilities": {"cat": 0.9, "dog": 0.1}, "n": 3}])[0]
    assert not difference(a, [{"label": "cat"}])[0]
    assert not difference(a, [{**a[0], "n": 4}])[0]
    for share in (1.0, -0.1, 2.0):
        with pytest.raises(UserError, match="no share"):
            Trial(canary=share)
