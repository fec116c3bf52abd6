"""Who may ask, how much and how long; what the log and an answer say; clients that leave."""

import json
import socket
import stat
import threading
import time

import pytest
import toy

from bigbase_jax.core import UserError
from bigbase_jax.serve import command, keys
from bigbase_jax.serve.app import Settings, create
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.served import Options, Served

ROW = {"x": [1.0, -2.0, 0.5, 3.0]}
PATH = "/v1/predict/toy"


def logged(capsys):
    return [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]


def test_without_a_key_nothing_of_a_model_is_told(tmp_path, capsys):
    file = tmp_path / "keys"
    key, other = keys.add(file, "ann"), keys.add(file, "bob")
    assert key not in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
    with toy.client(settings=Settings(keys=keys.Keys(file))) as client:
        for path in ("/healthz", "/readyz"):
            assert client.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/v2/models/toy", "/v1/predict/none"):
            assert client.get(path).status_code == 401
        for given in ("", "Bearer", "Bearer x", f"Bearer {key}x", f"Basic {key}"):
            response = client.post(PATH, json=ROW, headers={"authorization": given})
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        capsys.readouterr()
        for words in ({"authorization": f"Bearer {key}"}, {"x-api-key": other}):
            assert client.post(PATH, json=ROW, headers=words).status_code == 200
        lines = logged(capsys)
        assert [line["key"] for line in lines] == ["ann", "bob"] and key not in json.dumps(lines)
        file.write_text("\n".join(line for line in file.read_text().splitlines() if not line.startswith("ann")))
        time.sleep(1.1)  # as often is the file looked at
        assert client.get("/v1/models", headers={"x-api-key": key}).status_code == 401
        assert client.get("/v1/models", headers={"x-api-key": other}).status_code == 200


def test_a_key_that_asks_too_often_waits_and_the_others_do_not(tmp_path):
    file = tmp_path / "keys"
    key, other = keys.add(file, "ann"), keys.add(file, "bob")
    file.write_text(file.read_text().replace("\n", " 0.001\n", 1))
    with toy.client(settings=Settings(keys=keys.Keys(file))) as client:
        first, second = (client.get("/v1/models", headers={"x-api-key": key}) for _ in range(2))
        assert (first.status_code, second.status_code) == (200, 429)
        assert 900 < int(second.headers["retry-after"]) <= 1000
        assert all(client.get("/v1/models", headers={"x-api-key": other}).status_code == 200 for _ in range(5))


@pytest.mark.parametrize("text", ["ann", "ann md5:00", "ann sha256:12"])
def test_a_file_of_keys_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UserError, match="NAME sha256:HEX"):
        keys.Keys(tmp_path / "keys")
    with pytest.raises(UserError, match="cannot be read"):
        keys.Keys(tmp_path / "none")
    with pytest.raises(UserError, match="no name"):
        keys.add(tmp_path / "new", "a b")


def test_a_request_has_a_number_and_a_line_without_contents(capsys):
    with toy.client() as client:
        capsys.readouterr()
        response = client.post(PATH, json={"x": ["secret"]}, headers={"x-request-id": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1" == response.json()["error"]["request_id"]
        other = client.post(PATH, json=ROW, headers={"x-request-id": "a b\x7f"}).headers["x-request-id"]
        assert len(other) == 32
        client.get("/healthz")
        err = capsys.readouterr().err
        assert "secret" not in err
        first, second = map(json.loads, err.splitlines())
        assert (first["id"], first["status"], first["model"]) == ("mine-1", 422, "toy")
        assert (second["id"], second["status"], second["route"]) == (other, 200, "/v1/predict/{name}")
    with toy.client(settings=Settings(log_contents=True)) as client:
        client.post(PATH, json=ROW)
    assert json.loads(logged(capsys)[-1]["content"]) == ROW


def test_a_body_has_a_limit_said_or_not():
    with toy.client(settings=Settings(max_body=1000)) as client:
        assert client.post(PATH, json=ROW).status_code == 200
        for words in ({"content": b"x" * 2000}, {"content": iter([b"x" * 600] * 3)}, {"files": {"a": b"x" * 2000}}):
            response = client.post(PATH, **words)
            assert response.status_code == 413 and "1,000 bytes" in response.text
    with toy.client(settings=Settings(max_held=100)) as client:
        assert client.post(PATH, json=ROW).status_code == 200
        response = client.post(PATH, json={"inputs": [ROW] * 9})
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        assert client.post(PATH, json=ROW).status_code == 200  # what was held is given back


def test_an_answer_that_takes_too_long_is_given_up_and_its_place_is_free():
    go = threading.Event()
    with toy.client(toy=toy.predictor(hook=lambda x: x.any() and go.wait(60))) as client:
        response = client.post(PATH, json=ROW, headers={"x-request-timeout": "0.05"})
        assert response.status_code == 504
        go.set()
        assert client.post(PATH, json=ROW).status_code == 200
        with client.models.use("toy") as served:
            assert served.busy == served.batcher.waiting == 0


def test_other_pages_may_not_ask_unless_they_are_named():
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with toy.client() as client:
        assert "access-control-allow-origin" not in client.options(PATH, headers=asked).headers
    with toy.client(settings=Settings(cors=("https://a.example",))) as client:
        assert client.options(PATH, headers=asked).headers["access-control-allow-origin"] == "https://a.example"


def test_metrics_count_what_was_asked():
    with toy.client() as client:
        for _ in range(3):
            client.post(PATH, json=ROW)
        client.post("/v1/predict/none", json=ROW)
        text = client.get("/metrics").text
    route = 'model="toy",route="/v1/predict/{name}",status="200"'
    assert f"bigbase_requests_total{{{route}}} 3.0" in text
    for name in ("read", "queue", "compute", "answer"):
        assert f'bigbase_stage_seconds_count{{model="toy",stage="{name}"}} 3.0' in text
    for name in ("queue_rows", "inputs_running", "model_ready", "batch_rows_count"):
        assert f'bigbase_{name}{{model="toy"}}' in text
    assert 'bigbase_model_info{model="toy",version="0"} 1.0' in text and "process_resident_memory_bytes" in text
    assert "none" not in [line.split('model="')[1].split('"')[0] for line in text.splitlines() if 'model="' in line]


# ------------------------------------------------------------------------------------------------------ over a socket


@pytest.fixture(scope="module")
def live():
    models = Models({"toy": lambda: Served("toy", toy.predictor(hook=lambda x: hook(x)), Options(max_batch=4))})
    models.load()
    with toy.live(create(models)) as port:
        yield port, models
    models.close(1)


def hook(x):
    pass


def sent(port, data):
    connection = socket.create_connection(("127.0.0.1", port), 60)
    connection.sendall(data)
    return connection


def post(body, more=""):
    head = f"POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}{more}\r\n{body}".encode()


def test_a_client_that_leaves_gives_its_place_back(live, monkeypatch):
    port, models = live
    go, computing = threading.Event(), threading.Event()
    monkeypatch.setitem(globals(), "hook", lambda x: (computing.set(), go.wait(60)))
    with models.use("toy") as served:
        first = sent(port, post(json.dumps(ROW)))
        assert computing.wait(60)
        others = [sent(port, post(json.dumps(ROW))) for _ in range(5)]
        while served.busy < 6:
            time.sleep(0.01)
        for connection in others:
            connection.close()
        while served.busy > 1:  # without a step of the model in between
            time.sleep(0.01)
        go.set()
        assert first.recv(100).startswith(b"HTTP/1.1 200")
        first.close()


def test_what_begins_no_request_is_closed(live, monkeypatch):
    port, _ = live
    monkeypatch.setattr(command, "HEAD_S", 0.1)
    for data in (b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nx: "):
        with sent(port, data) as connection:
            connection.settimeout(60)
            assert connection.recv(100) == b""
    monkeypatch.setattr(command, "HEAD_S", 60.0)
    with sent(port, b"GET /healthz HTTP/1.1\r\n") as connection, pytest.raises(OSError):
        for _ in range(200):
            connection.sendall(b"x: " + b"y" * 5000 + b"\r\n")
            time.sleep(0.001)


def test_a_slow_body_ends_with_its_time(live):
    port, models = live
    with sent(port, post("x" * 50, "x-request-timeout: 0.2\r\n")[:-20]) as connection:
        connection.settimeout(60)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    with models.use("toy") as served:
        assert served.busy == 0


def test_the_server_ends_when_what_was_asked_is_answered():
    go, computing = threading.Event(), threading.Event()
    hooked = toy.predictor(hook=lambda x: x.any() and (computing.set(), go.wait(60)))
    models = Models({"toy": lambda: Served("toy", hooked, Options(max_batch=1))})
    models.load()

    def later():
        time.sleep(0.3)
        go.set()

    with toy.live(create(models)) as port:
        connection = sent(port, post(json.dumps(ROW)))
        assert computing.wait(60)
        threading.Thread(target=later).start()
    assert connection.recv(100).startswith(b"HTTP/1.1 200")  # after the server was asked to end
    with pytest.raises(OSError):
        sent(port, b"")
    models.close(5)
