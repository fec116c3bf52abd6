"""Captions for a text tower to read, without those of the study.

python experiments/clip/texts.py TRAIN.en.gz DIR OUT.txt

Multi30k's training captions are of Flickr30k, of which Flickr8k is a part: those that stand in DIR/captions.txt too are
left out, whatever their case and punctuation.
"""

import csv
import gzip
import pathlib
import re
import sys


def bare(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def main(given: str, study: str, out: str) -> None:
    with open(pathlib.Path(study) / "captions.txt", encoding="utf-8", newline="") as file:
        known = {bare(row["caption"]) for row in csv.DictReader(file)}
    with gzip.open(given, "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file]
    kept = [line for line in lines if bare(line) not in known]
    pathlib.Path(out).write_text("\n\n".join(kept) + "\n", encoding="utf-8")
    print(f"{len(kept):,} of {len(lines):,} captions; {len(lines) - len(kept):,} are in the study")


if __name__ == "__main__":
    main(*sys.argv[1:])
