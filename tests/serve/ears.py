"""A model that hears in whistles and one that speaks in them: compiled in a moment, and right about what they do."""

import dataclasses
import io
import wave

import jax
import jax.numpy as jnp
import numpy as np
import toy

from bigbase_jax.audio.files import decode
from bigbase_jax.core import Fields, Rendered, UserError
from bigbase_jax.inference.predictor import Predictor, Reading

RATE, PITCHES = 8000, {"one": 500, "two": 1000, "three": 2000}
BLOCK = RATE // 2  # a word is a whistle of half a second


def whistled(text, rate=RATE, speed=1.0):
    """f32[T]: a word every half second."""
    t = np.arange(round(rate / 2 / speed)) / rate
    return np.concatenate([0.3 * np.sin(2 * np.pi * PITCHES[w] * t) for w in text.split()]).astype(np.float32)


def wav(x_T, rate=RATE):
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(np.int16(32767 * x_T).tobytes())
    return file.getvalue()


class Sounds:
    """Reads recordings, half a second each; a language may be told."""

    fields = Fields({"audio": [("audio",)]}, files=True, options=("language",))

    def decode(self, given):
        row = given if isinstance(given, dict) else {"audio": given}
        if row.get("language", "en") != "en":
            raise UserError(f"language={row['language']!r} is none that this model knows: en.")
        x_T = decode(row["audio"], RATE)
        count = max(len(x_T) // BLOCK, 1)
        x_NT = np.resize(np.pad(x_T, (0, max(count * BLOCK - len(x_T), 0))), (count, BLOCK))
        return [{"audio": x, "seconds": len(x_T) / RATE} for x in x_NT]

    def fit(self, example, shapes):
        return example


@dataclasses.dataclass(frozen=True)
class Hears:
    """A word for the loudest pitch of each half second, and the times of all."""

    inputs = ("audio",)
    transcribes = True
    timed: bool = True

    def predict(self, variables, inputs):
        peak_B = jnp.argmax(jnp.abs(jnp.fft.rfft(inputs["audio"])), -1)
        return {"hz": peak_B * RATE / BLOCK, "loud": jnp.abs(inputs["audio"]).max(-1)}

    def merge(self, outputs):
        return {key: np.stack([x[key] for x in outputs]) for key in outputs[0]}

    def postprocess(self, output, example):
        pairs = list(zip(np.atleast_1d(output["hz"]), np.atleast_1d(output["loud"]), strict=True))
        words = [
            {"word": min(PITCHES, key=lambda w: abs(PITCHES[w] - hz)), "start": i / 2, "end": (i + 1) / 2}
            for i, (hz, loud) in enumerate(pairs)
            if loud > 0.01
        ]
        times = {"words": words, "duration": example["seconds"]} if self.timed else {}
        return {"text": " ".join(x["word"] for x in words), **times}


class Listens:
    """As ``inference.streaming`` does it: a word each half second; silence ends a part."""

    rate, latency = RATE, 0.5

    def __init__(self):
        self.waiting, self.words, self.at = np.zeros(0, np.float32), [], 0.0

    def feed(self, audio_T):
        assert audio_T.dtype == np.int16
        self.waiting, final = np.concatenate([self.waiting, audio_T / np.float32(32768)]), []
        while len(self.waiting) >= BLOCK:
            x_T, self.waiting = self.waiting[:BLOCK], self.waiting[BLOCK:]
            output = Hears().predict({}, {"audio": x_T[None]})
            for word in Hears().postprocess(output, {"seconds": 0.5})["words"]:
                times = {"start": self.at, "end": self.at + 0.5}
                self.words.append({**word, **times})
            if np.abs(x_T).max() < 0.01:
                final += self.ended()
            self.at += 0.5
        return {"final": final, "text": " ".join(x["word"] for x in self.words), "words": self.words}

    def ended(self):
        said, self.words = self.words, []
        part = {"text": " ".join(x["word"] for x in said), "words": said}
        return [{**part, "start": said[0]["start"], "end": said[-1]["end"]}] if said else []

    def finish(self):
        return {"final": self.ended(), "text": "", "words": []}


def listening(served):
    served.listen = Listens
    served.card["does"].append("stream")
    return served


class Words:
    """Reads texts of the words that there are."""

    fields = Fields({"text": [("text",)]}, lines=True, short={"speaker": ["low", "high"]}, options=("speaker", "rate"))

    def decode(self, given):
        words = given["text"].lower().split()
        if not words or set(words) - set(PITCHES):
            raise UserError(f"{given['text'][:40]!r} has no word that can be spoken.")
        times = {"speaker": given.get("speaker", "low"), "rate": float(given.get("rate", 1))}
        return [{"x": np.zeros(toy.WIDTH, np.float32), "text": " ".join(words), **times}]

    def fit(self, example, shapes):
        return example


class Speaks(toy.Linear):
    def rendered(self, output, example):
        x_T = whistled(example["text"], speed=example["rate"])
        return Rendered(".wav", "audio/wav", wav(x_T if example["speaker"] == "low" else x_T / 2))


def ear(timed=True):
    spec = {"audio": jax.ShapeDtypeStruct((BLOCK,), np.float32)}
    return Predictor(Hears(timed), {"params": {}}, {}, spec, lambda: Reading(Sounds()))


def mouth():
    found = toy.predictor()
    found.task, found.read = Speaks(), lambda: Reading(Words())
    return found
