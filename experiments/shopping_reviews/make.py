"""Cuts the reviews into text without labels to learn the language from, few labelled ones, and a test set.

python make.py DATA/online_shopping_10_cats/online_shopping_10_cats.zip OUT

Writes OUT/text.jsonl, OUT/{500,4000}/{train,val,test}.tsv (text, label), the same val and test in both. No review
is in two of text, val and test; the labelled ones for training are among the text, as they would be.
"""

import csv
import io
import json
import pathlib
import random
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as archive:
    rows = list(csv.DictReader(io.TextIOWrapper(archive.open(archive.namelist()[0]), "utf-8-sig")))
reviews = {" ".join(row["review"].split()): "positive" if row["label"] == "1" else "negative" for row in rows}
reviews.pop("", None)
pairs = sorted(reviews.items())
random.Random(0).shuffle(pairs)
val, test, rest = pairs[:1000], pairs[1000:6000], pairs[6000:]
out = pathlib.Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
(out / "text.jsonl").write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text, _ in rest))
for size in (500, 4000):
    (out / str(size)).mkdir(exist_ok=True)
    for split, part in {"train": rest[:size], "val": val, "test": test}.items():
        with open(out / str(size) / f"{split}.tsv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([("text", "label"), *part])
print({"reviews": len(pairs), "text": len(rest), "characters": sum(len(text) for text, _ in rest)})
