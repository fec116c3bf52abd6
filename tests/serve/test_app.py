"""What clients ask and get: every form of an input, readiness, mistakes."""

import base64
import json

import numpy as np
import pytest
import toy

ROW = {"x": [1.0, -2.0, 0.5, 3.0]}


@pytest.fixture(scope="module")
def client():
    with toy.client() as found:
        yield found


def right(row):
    (answer,) = toy.predictor().answer(row)
    return answer


def test_every_form_of_an_input_gives_the_predictors_answer(client):
    other = {"x": [0.0, 1.0, 2.0, -1.0]}
    assert right(ROW) != right(other)
    file = json.dumps(ROW).encode()
    asked = [
        {"json": ROW},
        {"json": {"numbers": ROW["x"]}},
        {"json": {"inputs": [ROW]}},
        {"json": {"inputs": [{"base64": base64.b64encode(file).decode()}]}},
        {"files": {"file": ("a.json", file)}},
        {"content": file, "headers": {"content-type": "application/octet-stream"}},
    ]
    for words in asked:
        response = client.post("/v1/predict/toy", **words)
        assert response.status_code == 200, (words, response.text)
        assert response.json() == {"model": "toy", "version": "0", "answers": [right(ROW)]}
    found = client.post("/v1/predict/toy", json={"inputs": [ROW, other]}).json()["answers"]
    for i, (answer, row) in enumerate(zip(found, (ROW, other), strict=True)):
        assert answer.pop("input") == i
        np.testing.assert_allclose(answer["y"], right(row)["y"], atol=1e-6)


@pytest.mark.parametrize(
    ("path", "words", "status", "said"),
    [
        ("/v1/predict/tou", {"json": ROW}, 404, "Did you mean 'toy'"),
        ("/v1/predict/toy", {"json": {"x": ["a"]}}, 422, "holds no numbers"),
        ("/v1/predict/toy", {"json": {"y": [1]}}, 422, "a row has no 'x'"),
        ("/v1/predict/toy", {"json": {"x": [1, 2]}}, 422, "shape"),
        ("/v1/predict/toy", {"json": {"inputs": []}}, 422, "no input"),
        ("/v1/predict/toy", {"json": {"inputs": [{"base64": "?"}]}}, 422, "no base64"),
        ("/v1/predict/toy", {"content": b"{", "headers": {"content-type": "application/json"}}, 400, "JSON"),
        ("/v1/predict/toy", {"json": {"inputs": [ROW] * 65}}, 413, "at most 64"),
        ("/v1/nothing", {"json": ROW}, 404, "Not Found"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_request_s_number(client, path, words, status, said):
    response = client.post(path, **words)
    assert response.status_code == status
    error = response.json()["error"]
    assert said in error["message"]
    assert error["request_id"] == response.headers["x-request-id"]


def test_a_server_is_ready_when_every_model_is_compiled(monkeypatch):
    with toy.client(load=False) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 503
        assert client.post("/v1/predict/toy", json=ROW).status_code == 503
        client.models.load()
        assert client.get("/readyz").status_code == 200
        client.models.drain()
        assert client.get("/readyz").status_code == 503
        assert client.post("/v1/predict/toy", json=ROW).status_code == 200  # what still comes is answered
