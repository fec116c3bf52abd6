"""What is heard while it comes, by a real websocket client over a socket; who may ask, how much, and who leaves."""

import json
import urllib.request

import ears
import numpy as np
import pytest
import toy
from waiting import until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from bigbase_jax.serve import keys
from bigbase_jax.serve.app import Settings, create
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.served import Options, Served


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    key = keys.add(file, "ann")
    models = Models(
        {
            "ear": lambda: ears.listening(Served("ear", ears.ear(), Options(streams=2))),
            "toy": lambda: Served("toy", toy.predictor(), Options()),
        }
    )
    models.load()
    settings = Settings(keys=keys.Keys(file), max_seconds=20, timeout_s=1.5, cors=("https://ours.example",))
    with toy.live(create(models, settings)) as port:
        yield port, key, models
    models.close(5)


def opened(server, query="?model=ear", key=None, **words):
    port, right, _ = server
    headers = {"Authorization": f"Bearer {key or right}"}
    words.setdefault("additional_headers", headers)
    return connect(f"ws://127.0.0.1:{port}/v1/audio/stream{query}", **words)


def heard(socket, x_T, chunk=1000):
    """All that comes back, with the samples sent bit by bit."""
    said = [json.loads(socket.recv())]
    data = np.int16(32767 * x_T).tobytes()
    for i in range(0, len(data), chunk):
        socket.send(data[i : i + chunk])
    socket.send(json.dumps({"type": "end"}))
    return said + [json.loads(line) for line in socket]


def left(server):
    models = server[2]
    with models.use("ear") as served:
        return served._streams


def test_texts_come_while_the_recording_does(server):
    x_T = np.concatenate([ears.whistled("two one"), np.zeros(ears.BLOCK), ears.whistled("three")]).astype(np.float32)
    with opened(server) as socket:
        first, *said = heard(socket, x_T)
    assert (first["type"], first["model"], first["rate"]) == ("session", "ear", ears.RATE)
    kinds = [(x["type"], x.get("text")) for x in said]
    assert kinds[:2] == [("partial", "two"), ("partial", "two one")]
    finals = [(x["text"], x["start"], x["end"]) for x in said if x["type"] == "final"]
    assert finals == [("two one", 0, 1), ("three", 1.5, 2)] and said[-1] == {"type": "end", "duration": 2.0}
    with opened(server, "?model=ear&rate=16000") as socket:
        said = heard(socket, ears.whistled("two one", 16_000), 4000)
    assert [x["text"] for x in said if x["type"] == "final"] == ["two one"]


@pytest.mark.parametrize(
    ("query", "words", "status", "why"),
    [
        ("?model=eat", {}, 404, "Did you mean 'ear'"),
        ("?model=toy", {}, 404, "hears no streams"),
        ("", {}, 400, "model: Field required"),
        ("?model=ear&rate=12", {}, 400, "rate"),
        ("?model=ear", {"key": "bb-wrong"}, 401, "needs a key"),
        ("?model=ear", {"origin": "https://other.example"}, 403, "pages of other sites"),
    ],
)
def test_who_may_not_is_told_before_the_socket_opens(server, query, words, status, why):
    with pytest.raises(InvalidStatus) as error, opened(server, query, **words):
        pass
    response = error.value.response
    assert response.status_code == status and why in json.loads(response.body)["error"]["message"]
    assert left(server) == 0


def test_a_page_gives_its_key_as_a_protocol(server):
    port, key, _ = server
    protocols = ["realtime", f"openai-insecure-api-key.{key}"]
    for origin in (f"http://127.0.0.1:{port}", "https://ours.example"):
        with opened(server, subprotocols=protocols, origin=origin, additional_headers={}) as socket:
            assert socket.subprotocol == "realtime" and json.loads(socket.recv())["type"] == "session"


@pytest.mark.parametrize(
    ("sent", "status", "why"),
    [
        ([b"abc"], 400, "2 bytes each"),
        (["hello"], 400, "a message is samples"),
        (["[" * 900], 400, "a message is samples"),
        ([bytes(1 << 18)] * 2, 413, "20 seconds at most"),
        ([], 408, "nothing came"),
    ],
)
def test_a_wrong_stream_ends_with_a_sentence_and_frees_its_place(server, sent, status, why):
    with opened(server) as socket:
        socket.recv()
        for message in sent:
            socket.send(message)
        *_, last = map(json.loads, _rest(socket))
    assert last["type"] == "error" and last["error"]["code"] == status and why in last["error"]["message"]
    until(lambda: left(server) == 0)


def _rest(socket):
    try:
        while True:
            yield socket.recv()
    except ConnectionClosed:
        return


def test_a_message_that_is_too_large_and_a_client_that_leaves_free_their_places(server):
    with opened(server) as one, opened(server) as two:
        one.recv(), two.recv()
        with pytest.raises(InvalidStatus) as error, opened(server):
            pass
        assert error.value.response.status_code == 429 and error.value.response.headers["retry-after"] == "5"
        two.socket.close()  # without a word
        one.socket.sendall(b"\x82\xff" + (3 << 20).to_bytes(8) + bytes(4))  # its length is enough to refuse it
        assert not list(_rest(one)) and one.protocol.close_code == 1009
    until(lambda: left(server) == 0)
    with opened(server) as again:
        assert "one" in [x.get("text") for x in heard(again, ears.whistled("one"))]
    port, key, _ = server
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"X-API-Key": key})
    text = urllib.request.urlopen(asked).read().decode()
    assert 'route="/v1/audio/stream",status="101"' in text and "bigbase_requests_running 1.0" in text
