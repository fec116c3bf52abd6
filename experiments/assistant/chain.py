"""The whole chain on recordings: does it wake, what does it hear, and does it want what was wanted?

python experiments/assistant/chain.py http://127.0.0.1:8000 [--threshold=0.5] [--count=130]

A recording is a second of quiet (noise, as rooms have), "yes" as a test speaker of speech_commands_12 says it, a third
of a second, a test utterance of AN4, and two seconds of quiet; then the same with another word or sound of
speech_commands_12 in the place of "yes", to which nothing should be answered. ``BIGBASE_DATA`` is the folder of both.
"""

import argparse
import collections
import csv
import json
import os
import pathlib
import re
import statistics

import numpy as np
from assistant import RATE, Served, answer, plain

from bigbase_jax.audio.files import decode
from bigbase_jax.tasks.metrics import transcripts

DATA = pathlib.Path(os.environ["BIGBASE_DATA"])
MONTHS = {"jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"}
CONTROL = {"rubout": "erase", "go": "start"} | {
    word: word for word in ("enter", "erase", "help", "repeat", "start", "stop", "yes", "no")
}


def wanted(text):
    """The intent of a transcript, by AN4's grammar; letters among numbers are spelt."""
    words = text.split()
    if words[0] in CONTROL:
        return CONTROL[words[0]]
    if any(word[:3] in MONTHS and len(word) > 2 for word in words):
        return "date"
    return "spell" if any(len(word) == 1 for word in words) else "number"


def utterances():
    """(sound, transcript) of AN4's test."""
    for line in (DATA / "an4/etc/an4_test.transcription").read_text().splitlines():
        text, name = re.fullmatch(r"(?:<s>)?\s*(.*?)\s*(?:</s>)?\s*\((\S+)\)", line).groups()
        yield decode(str(next((DATA / "an4").rglob(f"{name}.*"))), RATE), plain(text)


def words(label):
    """Sounds of the test split with this label, or, with "", with any other than yes."""
    with (DATA / "speech_commands_12/splits.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    chosen = [row["path"] for row in rows if (row["label"] == label if label else row["label"] != "yes")]
    order = np.random.default_rng(0).permutation(len(chosen))
    return [decode(str(DATA / "speech_commands_12" / chosen[i]), RATE) for i in order]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--count", type=int, default=130)
    args = parser.parse_args()
    served, asked = Served(args.url), list(utterances())[: args.count]
    rng, found = np.random.default_rng(0), collections.Counter()

    def quiet(seconds):  # a room at 57 dB below full scale
        return 0.0014 * rng.standard_normal(round(seconds * RATE)).astype(np.float32)

    said, heard, times = [], [], collections.defaultdict(list)
    for kind, first in (("asked", words("yes")), ("not asked", words(""))):
        for number, (said_T, text) in enumerate(asked):
            x_T = np.concatenate([quiet(1), first[number % len(first)], quiet(0.3), said_T, quiet(2)])
            told = [told for told, _ in answer(served, x_T, "yes", args.threshold)]
            found[f"{kind}: recordings"] += 1
            found[f"{kind}: woken"] += bool(told)
            if kind == "asked" and told:
                found["asked: intent right"] += told[0]["intent"] == wanted(text)
                said.append(text)
                heard.append(told[0]["text"])
                for name, ms in told[0]["ms"].items():
                    times[name].append(ms)
    errors = transcripts.scores(transcripts.errors(heard, said)) if said else {}
    print(json.dumps({**found, **errors, "ms": {name: statistics.median(x) for name, x in times.items()}}))


if __name__ == "__main__":
    main()
