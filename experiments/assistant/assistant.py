"""A voice assistant of served models: a wake word, what is said behind it, what that wants, an answer, its sound.

python experiments/assistant/assistant.py http://127.0.0.1:8000 a.wav b.wav --output=answers

A recording is walked through as a microphone would give it, a tenth of a second at a time. Prints a JSON line for each
thing that was asked; with ``--output``, the answers as wav files. Without a served voice, espeak-ng speaks where it is
installed, and the line says so.
"""

import argparse
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import wave

import numpy as np

from bigbase_jax.audio.files import decode

RATE, STEP = 16_000, 0.1
REPLIES = {
    "enter": "I have entered {rest}.",
    "erase": "I have erased {rest}.",
    "spell": "You spelt {text}.",
    "number": "The number is {text}.",
    "date": "The date is {text}.",
    "help": "Say enter, erase, spell a name, or say a date.",
    "repeat": "You said {last}.",
    "start": "We begin.",
    "stop": "We stop here.",
    "yes": "Very well.",
    "no": "Then not.",
    "nothing": "I have heard nothing.",
}


def wav(x_T, rate=RATE):
    """The bytes of a file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(np.int16(32767 * np.clip(x_T, -1, 1)).tobytes())
    return file.getvalue()


class Served:
    """The models of a server, asked over HTTP."""

    def __init__(self, url, key=None):
        self.url, self.key = url.rstrip("/"), key
        self.cards = {card["id"]: card for card in json.loads(self.ask("/v1/models"))["data"]}

    def ask(self, path, data=None, kind="application/octet-stream"):
        headers = {"Content-Type": kind, **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        try:
            return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60).read()
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{path}: {json.loads(error.read())['error']['message']}") from None
        except urllib.error.URLError as error:
            raise SystemExit(f"{self.url} does not answer: {error.reason}") from None

    def predict(self, model, data):
        if not isinstance(data, bytes):
            return json.loads(self.ask(f"/v1/predict/{model}", json.dumps(data).encode(), "application/json"))[
                "answers"
            ][0]
        return json.loads(self.ask(f"/v1/predict/{model}", data))["answers"][0]

    def transcribe(self, model, x_T):
        """By the stream where the model hears one, else in a form, as OpenAI's clients do."""
        if "stream" in self.cards[model]["does"]:
            return self._streamed(model, x_T)
        edge, form = "7d0c2a4e", b""
        for name, data in (('"model"', model.encode()), ('"file"; filename="a.wav"', wav(x_T))):
            head = f"--{edge}\r\nContent-Disposition: form-data; name={name}\r\n\r\n"
            form += head.encode() + data + b"\r\n"
        kind = f"multipart/form-data; boundary={edge}"
        return json.loads(self.ask("/v1/audio/transcriptions", form + f"--{edge}--\r\n".encode(), kind))["text"]

    def _streamed(self, model, x_T):
        from websockets.sync.client import connect

        query = urllib.parse.urlencode({"model": model, "rate": RATE})
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        with connect(
            f"{self.url.replace('http', 'ws', 1)}/v1/audio/stream?{query}", additional_headers=headers
        ) as socket:
            step = round(RATE * STEP)
            for start in range(0, len(x_T), step):
                socket.send(np.int16(32767 * np.clip(x_T[start : start + step], -1, 1)).tobytes())
            socket.send('{"type": "end"}')
            told = [json.loads(line) for line in socket]
        if told[-1]["type"] == "error":
            raise SystemExit(told[-1]["error"]["message"])
        return " ".join(part["text"] for part in told if part["type"] == "final")

    def speak(self, model, text):
        """(the sound of a text as a wav file, or None; who spoke)."""
        if model in self.cards:
            asked = {"model": model, "input": text, "voice": "default", "response_format": "wav"}
            return self.ask("/v1/audio/speech", json.dumps(asked).encode(), "application/json"), model
        if shutil.which("espeak-ng"):
            done = subprocess.run(["espeak-ng", "--stdout", text], capture_output=True, check=True)
            return done.stdout, "espeak-ng"
        return None, "nobody"


def plain(text):
    """As sentences.csv has texts: small letters, words alone."""
    text = unicodedata.normalize("NFKC", text).lower()
    return " ".join(re.findall(r"[a-z]+|\d+", text))


def asked(x_T, wakes, longest=8.0, pause=0.7):
    """What follows each wake word in a recording: (seconds at which it was heard, the samples behind it).

    Args:
      wakes: of a second of samples, whether it holds the wake word.
      longest: seconds of what is asked.
      pause: seconds of quiet that end it.
    """
    step, at, loudest = round(RATE * STEP), RATE, 0.0
    level = [float(np.sqrt(np.mean(x_T[i : i + step] ** 2))) for i in range(0, len(x_T), step)]
    found, quiet = [], lambda i: level[i] < max(0.002, 0.08 * loudest)
    while at <= len(x_T):
        loudest = max(0.9 * loudest, *level[max(at // step - 10, 0) : at // step] or [0.0])
        if loudest < 0.005 or not wakes(x_T[at - RATE : at]):
            at += 2 * step
            continue
        i = at // step
        while i < len(level) and not quiet(i) and i * step < at + 0.5 * RATE:  # the end of the wake word itself
            i += 1
        start, spoken, still = i, False, 0
        while i < len(level) and (i - start) * STEP < longest and (not spoken or still * STEP < pause):
            loud = not quiet(i)
            spoken, still, i = spoken or loud, 0 if loud else still + 1, i + 1
            if not spoken and (i - start) * STEP > 3:  # nobody asks anything
                break
        if spoken:
            found.append((at / RATE, x_T[start * step : i * step]))
        at = i * step + RATE
    return found


def answer(served, x_T, wake, threshold=0.5, models=("wake", "recogniser", "intent", "voice"), last=""):
    """What was asked in a recording, and the answer to each, as dicts."""
    spotter, recogniser, classifier, voice = models

    def wakes(second_T):
        return served.predict(spotter, wav(second_T))["probabilities"].get(wake, 0.0) >= threshold

    for at, said_T in asked(x_T, wakes):
        began = time.monotonic()
        text = plain(served.transcribe(recogniser, said_T))
        heard = time.monotonic()
        intent = served.predict(classifier, {"text": text}) if text else {"label": "nothing", "probability": 1.0}
        known = time.monotonic()
        rest = " ".join(text.split()[1:]) or "nothing"
        reply = REPLIES[intent["label"]].format(text=text, rest=rest, last=last or "nothing")
        sound, speaker = served.speak(voice, reply)
        times = {"transcribe": heard - began, "intent": known - heard, "speak": time.monotonic() - known}
        yield (
            {
                "awake": round(at, 2),
                "asked_s": round(len(said_T) / RATE, 2),
                "text": text,
                "intent": intent["label"],
                "probability": intent["probability"],
                "reply": reply,
                "speaker": speaker,
                "ms": {name: round(1000 * seconds, 1) for name, seconds in times.items()},
            },
            sound,
        )
        last = text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("recordings", nargs="+")
    parser.add_argument("--wake", default="yes", help="the class of the model 'wake' that wakes the assistant")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--key")
    parser.add_argument("--output", type=pathlib.Path, help="a folder for the answers as wav files")
    args = parser.parse_args()
    served = Served(args.url, args.key)
    if missing := {"wake", "recogniser", "intent"} - set(served.cards):
        sys.exit(f"the server has no model called {', '.join(sorted(missing))}; serve it as --workdir=NAME=FOLDER.")
    for path in args.recordings:
        for number, (told, sound) in enumerate(answer(served, decode(path, RATE), args.wake, args.threshold)):
            if args.output and sound:
                args.output.mkdir(parents=True, exist_ok=True)
                told["file"] = str(args.output / f"{pathlib.Path(path).stem}-{number}.wav")
                pathlib.Path(told["file"]).write_bytes(sound)
            print(json.dumps({"recording": path, **told}), flush=True)


if __name__ == "__main__":
    main()
