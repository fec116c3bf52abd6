"""Precision and recall of near duplicates on what ``make.py`` planted.

python experiments/clean/planted.py CLEANED PLANTED.json      CLEANED with ``--config.clean.keep_steps=True``

Recall: of planted pairs at a Jaccard similarity of 0.8 or more that both reach the step, those in one cluster.
Precision: of all documents that the step dropped, those whose similarity with the one that stays is 0.8 or more, by
sets of 5-grams in plain Python. ``apart``: planted pairs below 0.8 (most at 0.7) that were put together.
"""

import json
import pathlib
import re
import sys

import pyarrow.parquet as pq

HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff]|[^\\W_\u3400-\u9fff\uf900-\ufaff]+")


def grams(text, n=5):
    words = HAN.findall(text.lower())
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))}


def main(cleaned, planted):
    (folder,) = pathlib.Path(cleaned, ".clean").glob("*-near_duplicates-*")
    id_of, of, text = {}, {}, {}
    for path in sorted((folder / "rows").glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(4096, columns=["key", "id", "of"]):
            for row in batch.to_pylist():
                id_of[row["key"]] = row["id"]
                if row["of"] is not None:
                    of[row["key"]] = row["of"]
    key_of = {name: key for key, name in id_of.items()}
    pairs = [
        (kind, key_of[a], key_of[b])
        for kind, a, b in json.loads(pathlib.Path(planted).read_text())
        if a in key_of and b in key_of
    ]
    wanted = {*of, *of.values(), *(key for _, *pair in pairs for key in pair)}
    for path in sorted((folder / "rows").glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(4096, columns=["key", "text"]):
            keys = batch["key"].to_pylist()
            at = [i for i, key in enumerate(keys) if key in wanted]
            text |= {keys[i]: batch["text"][i].as_py() for i in at}

    def similarity(a, b):
        x, y = grams(text[a]), grams(text[b])
        return len(x & y) / len(x | y)

    found = {"similar": [0, 0], "apart": [0, 0]}
    for _, a, b in pairs:
        kind = "similar" if similarity(a, b) >= 0.8 else "apart"
        found[kind][0] += of.get(a, a) == of.get(b, b)
        found[kind][1] += 1
    similar = sum(similarity(a, b) >= 0.8 for a, b in of.items())
    print({"dropped": len(of), "precision": similar / max(len(of), 1)})
    print({"pairs": found["similar"][1], "recall": found["similar"][0] / max(found["similar"][1], 1)})
    print({"apart": found["apart"][1], "put together": found["apart"][0]})


if __name__ == "__main__":
    main(*sys.argv[1:])
