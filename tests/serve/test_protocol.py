"""The Open Inference Protocol: health, metadata, tensors as JSON and as bytes, rows, mistakes."""

import json
import struct

import numpy as np
import pytest
import toy

X = np.array([[1, -2, 0.5, 3], [0, 1, 2, -1]], np.float32)
TENSOR = {"name": "x", "shape": [2, 4], "datatype": "FP32", "data": X.tolist()}
INFER = "/v2/models/toy/infer"


@pytest.fixture(scope="module")
def client():
    with toy.client() as found:
        yield found


def right():
    return np.stack([output["y"] for output in toy.predictor().computed([{"x": x} for x in X], 1)])


def test_health_and_metadata(client):
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/toy/versions/0/ready").json()["ready"] is True
    assert client.get("/v2/models/toy/versions/1/ready").status_code == 404
    about = client.get("/v2/models/toy").json()
    assert about["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert about["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}]


def test_tensors_give_what_the_program_gives(client):
    for data in (X.tolist(), X.reshape(-1).tolist()):
        found = client.post(INFER, json={"id": "a", "inputs": [{**TENSOR, "data": data}]}).json()
        assert (found["id"], found["model_name"], found["model_version"]) == ("a", "toy", "0")
        (output,) = found["outputs"]
        assert (output["name"], output["datatype"], output["shape"]) == ("y", "FP32", [2, 3])
        np.testing.assert_allclose(np.reshape(output["data"], (2, 3)), right(), atol=1e-6)


def test_tensors_as_bytes(client):
    described = {"name": "x", "shape": [2, 4], "datatype": "FP32", "parameters": {"binary_data_size": X.nbytes}}
    head = json.dumps({"inputs": [described], "parameters": {"binary_data_output": True}}).encode()
    words = {"Inference-Header-Content-Length": str(len(head)), "content-type": "application/octet-stream"}
    response = client.post(INFER, content=head + X.tobytes(), headers=words)
    end = int(response.headers["inference-header-content-length"])
    (output,) = json.loads(response.content[:end])["outputs"]
    assert output["parameters"] == {"binary_data_size": 24}
    found = np.frombuffer(response.content[end:], "<f4").reshape(output["shape"])
    np.testing.assert_allclose(found, right(), atol=1e-6)


def test_rows_are_read_as_the_codec_reads_them():
    predictor = toy.predictor()
    codec = predictor.reading.codec
    read = codec.decode
    codec.decode = lambda row: read({"x": json.loads(row["x"])})  # of a text
    with toy.client(toy=predictor) as client:
        texts = [json.dumps(x.tolist()) for x in X]
        data = b"".join(struct.pack("<I", len(text)) + text.encode() for text in texts)
        given = {"name": "x", "shape": [2], "datatype": "BYTES"}
        head = json.dumps({"inputs": [{**given, "parameters": {"binary_data_size": len(data)}}]}).encode()
        words = {"Inference-Header-Content-Length": str(len(head))}
        for found in (
            client.post(INFER, json={"inputs": [{**given, "data": texts}]}),
            client.post(INFER, content=head + data, headers=words),
        ):
            (output,) = found.json()["outputs"]
            assert (output["name"], output["datatype"], output["shape"]) == ("answer", "BYTES", [2])
            np.testing.assert_allclose([json.loads(x)["y"] for x in output["data"]], right(), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "z"}, "'x' is missing"),
        ({"shape": [2, 5]}, "8 values for 10 places"),
        ({"shape": [1, 8]}, "not FP32"),
        ({"shape": [-2, -4]}, "no 'shape'"),
        ({"shape": [2**40, 2**40]}, "no 'shape'"),
        ({"shape": []}, "values for 1 places"),
        ({"shape": [0, 4], "data": []}, "at least 1"),
        ({"datatype": "FP33"}, "no 'datatype'"),
        ({"datatype": "INT64"}, "not FP32"),
        ({"datatype": "UINT8", "data": [300] * 8}, "does not fit"),
        ({"datatype": "BYTES"}, "BYTES in JSON are texts"),
        ({"data": [["a"] * 4] * 2}, "not numbers"),
        ({"data": [[1, 2], [3]]}, "does not fit"),
        ({"data": {"a": 1}}, "does not fit"),
        ({"parameters": {"binary_data_size": 10**9}}, "does not fit"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(client, change, said):
    response = client.post(INFER, json={"inputs": [{**TENSOR, **change}]})
    assert response.status_code in (400, 422)
    assert said in response.json()["error"]


@pytest.mark.parametrize(
    "asked", [[], {}, {"inputs": []}, {"inputs": [1]}, {"inputs": [TENSOR, TENSOR]}, {"inputs": [TENSOR], "outputs": 1}]
)
def test_what_is_no_request_is_refused(client, asked):
    assert client.post(INFER, json=asked).status_code == 400


def test_outputs_are_chosen(client):
    assert len(client.post(INFER, json={"inputs": [TENSOR], "outputs": [{"name": "y"}]}).json()["outputs"]) == 1
    response = client.post(INFER, json={"inputs": [TENSOR], "outputs": [{"name": "z"}]})
    assert response.status_code == 422 and "no output 'z'" in response.json()["error"]
    assert client.post("/v2/models/none/infer", json={"inputs": [TENSOR]}).json()["error"].startswith("there is no")
