"""Writes dirty JSON lines by seeded recombination of small sets, and what was planted in them.

python experiments/clean/make.py OUT MEGABYTES [SEED]

Reads wikitext2_valid_test, multi30k, zh_song_ci and online_shopping_10_cats below $BIGBASE_DATA. A document is a run of
sentences or clauses drawn from one language's pool, one word (character) in twenty replaced by another of the pool, so
that documents by chance share little. Planted, as shares of documents: near duplicates at a Jaccard similarity of
0.80 to 0.82 of word (character) 5-grams (5 %), pairs at 0.70 that are none (2.5 %), exact duplicates (3 %), lines of
boilerplate (10 %), junk (2 %), another language (1 %), mojibake (2 %), personal data (3 %).
"""

import csv
import gzip
import io
import json
import multiprocessing
import os
import pathlib
import random
import re
import sys
import zipfile

SHARDS = 32
BOILERPLATE = (
    "This site uses cookies. Read our privacy policy to learn more.",
    "Please enable JavaScript to view the comments.",
    "Sign up for our newsletter and never miss a story again, see our terms of use.",
)
FRENCH = [
    "le",
    "chat",
    "noir",
    "dort",
    "sur",
    "la",
    "table",
    "pendant",
    "que",
    "les",
    "enfants",
    "jouent",
    "dans",
    "le",
    "jardin",
    "avec",
    "leur",
    "nouveau",
    "chien",
]


def pools():
    data = pathlib.Path(os.environ["BIGBASE_DATA"])
    english = []
    for name in ("valid", "test"):
        for line in (data / f"wikitext2_valid_test/{name}.txt").read_text().splitlines():
            if line.strip() and not line.strip().startswith("="):
                text = re.sub(r" ([,.;:!?)'])", r"\1", line.strip().replace("<unk>", "").replace(" @-@ ", "-"))
                text = text.replace(" @,@ ", ",").replace(" @.@ ", ".").replace("( ", "(")
                english += [s for s in re.split(r"(?<=[.!?]) +", re.sub(" +", " ", text)) if 30 < len(s) < 400]
    for path in sorted((data / "multi30k").rglob("train.en.gz")):
        with gzip.open(path, "rt") as file:
            english += [line.strip() for line in file if len(line) > 40][:8000]
    chinese = []
    for path in sorted((data / "zh_song_ci").glob("ci.song.*.json")):
        for poem in json.loads(path.read_text()):
            chinese += [p for p in poem.get("paragraphs", []) if 10 < len(p) < 60]
    archive = zipfile.ZipFile(data / "online_shopping_10_cats/online_shopping_10_cats.zip")
    name = next(n for n in archive.namelist() if n.endswith(".csv"))
    for row in csv.DictReader(io.TextIOWrapper(archive.open(name), "utf-8-sig")):
        text = (row["review"] or "").strip().replace("\n", "")
        if 15 < len(text) < 200:
            chinese.append(text if text[-1] in "。！？" else text + "。")
    return english, chinese


def one(args):
    shard, out, size, seed = args
    draw = random.Random(f"{seed}/{shard}")
    english, chinese = pools()
    words = sorted({w for s in english for w in s.split() if w.isalpha() and len(w) > 3})
    characters = sorted({c for s in chinese for c in s if "\u4e00" <= c <= "\u9fff"})
    planted, count, written, before = [], 0, 0, []
    with open(out / f"part-{shard:02}.jsonl", "w") as file:

        def put(text, source, kind):
            nonlocal count, written
            name = f"{shard}-{count}"
            row = {"id": name, "text": text, "source": source, "license": "CC-BY-SA-3.0", "planted": kind}
            line = json.dumps(row, ensure_ascii=False) + "\n"
            count, written = count + 1, written + len(line.encode())
            file.write(line)
            return name

        while written < size:
            han = draw.random() < 0.5
            pool, vocabulary, join = (chinese, characters, "") if han else (english, words, " ")
            sentences = draw.choices(pool, k=draw.randint(6, 40))
            units = list("".join(sentences)) if han else " ".join(sentences).split(" ")
            body = [i for i, u in enumerate(units) if u.isalpha()]
            for i in draw.sample(body, len(body) // 20):
                units[i] = draw.choice(vocabulary)
            text, kind, roll = join.join(units), "", draw.random()
            # what near duplicates are compared by: letters and digits alone
            plain = [i for i, u in enumerate(units) if u.isalnum()] if han else list(range(len(units)))
            n = len(plain) - 4
            if roll < 0.075 and n >= 100:
                kind, j = ("near", 0.8) if roll < 0.05 else ("apart", 0.7)
                k = int(n * (1 - j) / (5 * (1 + j)))
                other = list(units)
                for i in range(k):
                    other[plain[int((i + 0.5) * len(plain) / k)]] = draw.choice(vocabulary)
                a = put(text, "zh" if han else "en", kind)
                b = put(join.join(other), "zh" if han else "en", kind)
                planted.append((kind, a, b))
                continue
            if roll < 0.105 and before:
                text, kind = draw.choice(before), "exact"
            elif roll < 0.205:
                text, kind = text + "\n" + draw.choice(BOILERPLATE), "boilerplate"
            elif roll < 0.225:
                text, kind = (
                    " ".join(draw.choices(["###", "...", "|", "12", "$", "click", ">>"], k=draw.randint(80, 300))),
                    "junk",
                )
            elif roll < 0.235:
                text, kind = " ".join(draw.choices(FRENCH, k=150)) + ".", "french"
            elif roll < 0.255 and not han:
                text, kind = (text + " “It’s a café”, she said.").encode().decode("cp1252", "ignore"), "mojibake"
            elif roll < 0.285:
                text, kind = (
                    f"{text} {draw.choice(words)}@example.org 138{draw.randrange(10**8):08} 10.0.{draw.randrange(256)}.7",  # noqa: E501
                    "pii",
                )
            before = [*before[-200:], text] if kind == "" else before
            put(text, "zh" if han else "en", kind)
    return planted


if __name__ == "__main__":
    out, size = pathlib.Path(sys.argv[1]), float(sys.argv[2]) * 1e6
    seed = sys.argv[3] if len(sys.argv) > 3 else "0"
    out.mkdir(parents=True, exist_ok=True)
    shards = SHARDS if size > 2e8 else 4
    with multiprocessing.Pool(2) as pool:
        planted = pool.map(one, [(s, out, size / shards, seed) for s in range(shards)], 1)
    with open(out.parent / f"{out.name}_planted.json", "w") as file:
        json.dump([pair for part in planted for pair in part], file)
