"""The voice assistant of experiments/assistant, driven by recordings: of toys that are right, and of tiny runs."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import wave

import ears
import numpy as np
import pytest
import toy
from forks import shared

from bigbase_jax.serve.app import create
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.served import Options, Served

ROOT = pathlib.Path(__file__).parents[2]
STUDY = ROOT / "experiments" / "assistant"
RECIPES = {
    "wake": "configs/commands.py:tiny",
    "recogniser": "configs/speech.py:tiny",
    "intent": f"configs/text_classify.py:root={STUDY / 'sentences.csv'},model=bow,tiny",
}


@pytest.fixture(scope="module")
def assistant():
    sys.path.insert(0, str(STUDY))
    import assistant

    yield assistant
    sys.path.remove(str(STUDY))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, recipe in RECIPES.items():
        done = shared().run(f"--config={recipe}", f"--workdir={folder / name}")
        assert done.status == 0, done.err[-3000:]
    words = ["--mode=serve", "--port=0", "--max_batch=1", *(f"--workdir={folder / name}" for name in RECIPES)]
    started = subprocess.Popen(
        [sys.executable, "launch.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = started.stdout.readline()
    assert line, started.stderr.read()[-3000:]
    yield json.loads(line)["serving"]
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=60)


def test_what_follows_the_wake_word_is_cut_out(assistant):
    rate, rng = assistant.RATE, np.random.default_rng(0)

    def sound(seconds, level, hz=0.0):
        t = np.arange(round(seconds * rate)) / rate
        return (level * np.sin(2 * np.pi * hz * t) + 0.0005 * rng.normal(size=len(t))).astype(np.float32)

    def wakes(x_T):  # a whistle of 2 kHz
        return np.abs(np.fft.rfft(x_T))[1900:2100].max() > 1000

    parts = [
        sound(1.3, 0),
        sound(0.6, 0.3, 2000),
        sound(0.4, 0),
        sound(1.0, 0.3, 440),
        sound(0.3, 0),
        sound(0.5, 0.2, 300),
    ]
    rest = [sound(1.5, 0), sound(0.8, 0.3, 600), sound(1.2, 0), sound(0.6, 0.3, 2000), sound(2.0, 0)]
    found = assistant.asked(np.concatenate([*parts, *rest]), wakes)
    assert len(found) == 1  # a sentence with a short pause in it; none after the second wake word; none without one
    at, said_T = found[0]
    assert 1.3 < at < 2.3 and 1.8 < len(said_T) / rate < 3.2
    spectrum = np.abs(np.fft.rfft(said_T))
    hz = np.fft.rfftfreq(len(said_T), 1 / rate)
    assert abs(hz[spectrum.argmax()] - 440) < 5 and spectrum[abs(hz - 300) < 5].max() > 500
    assert spectrum[abs(hz - 600) < 5].max() < 100


class Wakes(ears.Hears):
    """Whether most of a second is "three"."""

    def postprocess(self, output, example):
        share = super().postprocess(output, example)["text"].split().count("three") / 2
        return {"label": "three", "probabilities": {"three": share, "other": 1 - share}}


class Wants(toy.Linear):
    """What a text wants."""

    def postprocess(self, output, example):
        return {"label": "enter" if "one" in example["text"] else "help", "probability": 1.0}


def models():
    def made(task, of):
        found = of()
        found.task = task()
        return found

    opened = {"wake": lambda: made(Wakes, ears.ear), "recogniser": ears.ear, "voice": ears.mouth}
    opened["intent"] = lambda: made(Wants, ears.mouth)
    opened["live"] = ears.ear
    served = {name: Served(name, model(), Options(max_batch=4)) for name, model in opened.items()}
    ears.listening(served["live"])
    return Models({name: lambda name=name: served[name] for name in served})


def test_a_question_is_heard_understood_and_answered(assistant, monkeypatch):
    quiet, rate = np.zeros(assistant.RATE, np.float32), assistant.RATE
    x_T = np.concatenate([quiet, ears.whistled("three three", rate), quiet[: rate // 2]])
    x_T = np.concatenate([x_T, ears.whistled("one one two two", rate), quiet, quiet])
    monkeypatch.setitem(assistant.REPLIES, "enter", "{rest}")
    there = models()
    there.load()
    with toy.live(create(there)) as port:
        served = assistant.Served(f"http://127.0.0.1:{port}")
        for recogniser in ("recogniser", "live"):
            names = ("wake", recogniser, "intent", "voice")
            ((told, sound),) = assistant.answer(served, x_T, "three", 0.9, names)
            assert told["text"].startswith("one") and "two two" in told["text"]
            assert (told["intent"], told["speaker"]) == ("enter", "voice") and 1.4 < told["awake"] < 2.5
            assert told["reply"] == told["text"].removeprefix("one ")
            assert len(sound) > 2 * ears.RATE  # a second of it
        assert not list(assistant.answer(served, x_T, "three", 1.1, names))
        with pytest.raises(SystemExit, match="there is no model 'mute'"):
            list(assistant.answer(served, x_T, "three", 0.9, ("wake", "recogniser", "mute", "voice")))
    there.close(5)


@pytest.mark.slow
def test_recordings_are_answered_by_one_process(assistant, server, tmp_path, monkeypatch, capsys):
    from bigbase_jax.data.sources.synthetic.sounds import SpokenTones, WhistledWords

    word, tones = WhistledWords(16_000, 2, 1, 1), SpokenTones(16_000, 2, 1, 1)
    wake = word.dataset_info["class_names"][int(word.splits["train"][0]["label"])]
    example = tones.splits["train"][0]
    said = example["audio"][: int(example["audio_length"])]
    quiet = np.zeros(16_000, np.int16)
    data = np.concatenate([quiet, word.splits["train"][0]["audio"], quiet[:6000], said, quiet])
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16_000)
        file.writeframes(data.tobytes())
    arguments = ["--threshold=0", f"--wake={wake}", f"--output={tmp_path / 'answers'}"]  # a tiny model knows no word
    monkeypatch.setattr(sys, "argv", ["assistant.py", server, str(tmp_path / "a.wav"), *arguments])
    heard = assistant.Served.transcribe

    def written(served, model, x_T):
        return f"{heard(served, model, x_T)} Enter six-two."  # it may have written nothing

    monkeypatch.setattr(assistant.Served, "transcribe", written)
    assistant.main()
    (told,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert told["intent"] in assistant.REPLIES and 0 < told["probability"] <= 1 and told["reply"]
    assert told["text"].endswith("enter six two")
    assert set(told["ms"]) == {"transcribe", "intent", "speak"} and 1 < told["asked_s"] < 9
    assert ("file" in told) == (told["speaker"] != "nobody")
    for path in (tmp_path / "answers").glob("*"):
        with wave.open(str(path)) as file:
            assert file.getframerate() > 0 and os.path.getsize(path) > 5000
    monkeypatch.setattr(sys, "argv", ["assistant.py", server, str(tmp_path / "no.wav")])
    with pytest.raises(Exception, match="no.wav"):
        assistant.main()
