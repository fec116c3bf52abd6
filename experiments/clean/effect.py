"""Writes a clean text, and the same made dirty, for a language model to be trained on each.

python experiments/clean/effect.py OUT
python experiments/clean/effect.py OUT CLEANED      after OUT/dirty was cleaned: OUT/cleaned has the same val.jsonl

Paragraphs of wikitext-2's valid and test text (all of it that is at hand) are documents; every tenth is val.
``OUT/clean`` and ``OUT/dirty`` have the same ``val.jsonl``. The dirty train has, for each document of the clean one:
one and a half copies of a twentieth of them, half with a word in fifty replaced; and half a document of junk, menus and
cookie notices.
"""

import json
import os
import pathlib
import random
import shutil
import sys

import pyarrow.parquet as pq

MENU = "Home | News | Sport | Weather | Log in | Sign up | Share | Tweet | Print | Next page >>"
NOTICE = (
    "This site uses cookies to improve your experience. By using it you accept our privacy policy and terms of use."
)


def main(out):
    draw = random.Random(0)
    data = pathlib.Path(os.environ["BIGBASE_DATA"]) / "wikitext2_valid_test"
    lines = [line.strip() for name in ("valid", "test") for line in (data / f"{name}.txt").read_text().splitlines()]
    texts = [line for line in lines if len(line.split()) >= 60 and not line.startswith("=")]
    val, train = texts[::10], [text for i, text in enumerate(texts) if i % 10]
    words = sorted({word for text in train for word in text.split()})
    popular = draw.sample(train, len(train) // 20)
    copies = []
    for _ in range(3 * len(train) // 2):
        parts = draw.choice(popular).split(" ")
        if draw.random() < 0.5:
            for _ in range(len(parts) // 50):
                parts[draw.randrange(len(parts))] = draw.choice(words)
        copies.append(" ".join(parts))
    junk = []
    for i in range(len(train) // 2):
        tokens = draw.choices(["###", "click", "$$", "12", "...", "buy", "now", "|", ">>"], k=draw.randint(60, 200))
        junk.append((" ".join(tokens), f"{MENU}\n" * 8 + NOTICE, " ".join([NOTICE] * 6))[i % 3])
    dirty = [*train, *copies, *junk]
    draw.shuffle(dirty)
    for name, own in (("clean", train), ("dirty", dirty)):
        (out / name).mkdir(parents=True, exist_ok=True)
        for split, documents in (("train", own), ("val", val)):
            rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
            (out / name / f"{split}.jsonl").write_text("".join(rows))
    print({"clean": len(train), "dirty": len(dirty), "val": len(val), "bytes": sum(map(len, train))})


def cleaned(out, folder):
    (out / "cleaned").mkdir(exist_ok=True)
    shutil.copy(out / "dirty/val.jsonl", out / "cleaned")
    texts = [
        text for path in sorted(folder.glob("train-*.parquet")) for text in pq.read_table(path)["text"].to_pylist()
    ]
    (out / "cleaned/train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


if __name__ == "__main__":
    out, *folder = map(pathlib.Path, sys.argv[1:])
    cleaned(out, *folder) if folder else main(out)
