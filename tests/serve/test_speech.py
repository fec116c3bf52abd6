"""What is heard and spoken by OpenAI's API, asked by OpenAI's own client over a socket."""

import io
import json

import ears
import numpy as np
import openai
import pytest
import soundfile
import toy

from bigbase_jax.audio.files import decode
from bigbase_jax.serve.app import Settings, create
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.served import Options, Served

SAID = "two one three three"


@pytest.fixture(scope="module")
def client():
    made = {"ear": ears.ear, "plain": lambda: ears.ear(timed=False), "mouth": ears.mouth, "toy": toy.predictor}
    models = Models({name: lambda name=name: Served(name, made[name](), Options(max_batch=4)) for name in made})
    models.load()
    with toy.live(create(models, Settings(max_body=1 << 20, max_seconds=20))) as port:
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    models.close(5)


def heard(client, said=SAID, model="ear", file=None, **words):
    file = file or ("a.wav", ears.wav(ears.whistled(said)))
    return client.audio.transcriptions.create(model=model, file=file, **words)


def test_a_recording_is_transcribed_in_every_form(client):
    assert heard(client).text == SAID and heard(client, "one two").text == "one two"
    assert heard(client).usage.seconds == 2.0
    assert heard(client, response_format="text") == SAID + "\n"
    assert heard(client, response_format="srt") == f"1\n00:00:00,000 --> 00:00:02,000\n{SAID}\n"
    assert heard(client, response_format="vtt") == f"WEBVTT\n\n00:00:00.000 --> 00:00:02.000\n{SAID}\n"
    whole = heard(client, response_format="verbose_json", timestamp_granularities=["word", "segment"], language="en")
    assert (whole.text, whole.language, whole.duration) == (SAID, "en", 2.0)
    assert [(x.word, x.start, x.end) for x in whole.words[:2]] == [("two", 0, 0.5), ("one", 0.5, 1)]
    assert [(x.id, x.start, x.end, x.text) for x in whole.segments] == [(0, 0, 2, SAID)]
    long = " ".join(["three"] * 13)
    blocks = heard(client, long, response_format="srt").strip().split("\n\n")
    assert [block.splitlines()[1:] for block in blocks] == [
        ["00:00:00,000 --> 00:00:03,500", " ".join(["three"] * 7)],
        ["00:00:03,500 --> 00:00:06,500", " ".join(["three"] * 6)],
    ]
    assert heard(client, file=("a.flac", flac(ears.whistled(SAID, 16_000)))).text == SAID
    assert heard(client, model="plain", response_format="verbose_json").text == SAID


def flac(x_T, rate=16_000):
    file = io.BytesIO()
    soundfile.write(file, np.stack([x_T, 0 * x_T], 1), rate, format="FLAC")  # one of two channels is dead
    return file.getvalue()


def header(seconds):
    """A wav file whose header claims more than there is."""
    data = bytearray(ears.wav(ears.whistled("one")))
    data[40:44] = np.uint32(2 * ears.RATE * seconds).tobytes()
    return bytes(data)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ({"model": "eat"}, 404, "Did you mean 'ear'"),
        ({"model": "toy"}, 404, "does not transcribe"),
        ({"file": ("a.wav", b"")}, 400, "no file, or an empty one"),
        ({"file": ("a.wav", b"RIFF" + bytes(60))}, 400, "no recording that can be read"),
        ({"file": ("a.mp3", bytes(range(256)) * 40)}, 400, "no recording"),
        ({"file": ("a.wav", ears.wav(ears.whistled(" ".join(["one"] * 41))))}, 400, "20.5 seconds"),
        ({"file": ("a.wav", bytes(2 << 20))}, 413, "the body has more than"),
        ({"response_format": "xml"}, 400, "response_format"),
        ({"temperature": 0.5}, 400, "takes no temperature"),
        ({"temperature": 5}, 400, "temperature: Input should be less than or equal to 1"),
        ({"language": "fr"}, 400, "none that this model knows"),
        ({"timestamp_granularities": ["word"]}, 400, "response_format=verbose_json"),
        ({"stream": True}, 400, "stream"),
        ({"model": "plain", "response_format": "vtt"}, 400, "gives no times"),
        (
            {"model": "plain", "response_format": "verbose_json", "timestamp_granularities": ["word"]},
            400,
            "no times of words",
        ),
    ],
)
def test_a_wrong_request_is_one_sentence(client, words, status, said):
    with pytest.raises(openai.APIStatusError) as error:
        heard(client, **words)
    assert error.value.status_code == status and said in error.value.body["message"]
    assert "Traceback" not in json.dumps(error.value.body)


def test_hostile_forms_are_refused(client):
    url = str(client.base_url) + "audio/transcriptions"
    post = client._client.post
    right = {"file": ("a.wav", ears.wav(ears.whistled("one")))}
    assert post(url, files=right, data={"model": "ear"}).status_code == 200
    for words in (
        {"json": {"model": "ear"}},
        {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}},
        {"files": right},
        {"files": {"file": (None, "a text")}, "data": {"model": "ear"}},
        {"files": [("file", ("a.wav", b"a"))] * 3, "data": {"model": "ear"}},
        {"files": right, "data": {f"x{i}": "a" for i in range(100)}},
    ):
        response = post(url, **words)
        found = response.json()["error"]["message"]
        assert response.status_code == 400, (words, found)
    truncated = post(url, files={"file": ("a.wav", header(10**5))}, data={"model": "ear"})
    assert truncated.json()["text"] == "one"  # by what there is, not by what it claims


def test_a_text_is_spoken_in_every_format(client):
    speak = client.audio.speech.create
    sizes = {}
    for kind in ("wav", "flac", "mp3", "opus"):
        data = speak(model="mouth", input="Two one", voice="default", response_format=kind)
        assert heard(client, file=(f"a.{kind}", data.content)).text == "two one"
        sizes[kind] = len(data.content)
    assert sizes["mp3"] < sizes["flac"] < sizes["wav"]
    raw = speak(model="mouth", input="two one", voice="low", response_format="pcm")
    assert raw.response.headers["content-type"] == "audio/pcm" and len(raw.content) == 2 * 24_000
    fast = speak(model="mouth", input="two one", voice="high", speed=2, response_format="wav").content
    x_T = decode(fast, ears.RATE)
    assert len(x_T) == ears.RATE // 2 and 0.14 < np.abs(x_T).max() < 0.16


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ({"model": "ear"}, 404, "does not speak"),
        ({"input": ""}, 400, "input"),
        ({"input": "..."}, 400, "no word that can be spoken"),
        ({"input": "one " * 1100}, 400, "4096"),
        ({"voice": "alloy"}, 400, "it has low, high"),
        ({"speed": 9}, 400, "speed"),
        ({"response_format": "aac"}, 400, "response_format"),
        ({"instructions": "gladly"}, 400, "instructions"),
        ({"extra_body": {"pitch": 3}}, 400, "takes no pitch"),
    ],
)
def test_what_cannot_be_spoken_is_one_sentence(client, words, status, said):
    with pytest.raises(openai.APIStatusError) as error:
        client.audio.speech.create(**{"model": "mouth", "input": "one", "voice": "low", **words})
    assert error.value.status_code == status and said in error.value.body["message"]


def test_the_list_of_models_says_what_each_does(client):
    cards = {card.id: card for card in client.models.list()}
    assert cards["ear"].does == ["predict", "transcribe"] and cards["ear"].reads["options"] == ["language"]
    assert cards["mouth"].does == ["predict", "render"] and cards["mouth"].voices == ["low", "high"]
    assert cards["toy"].does == ["predict"]
