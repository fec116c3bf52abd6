"""Text to pretrain on, from $BIGBASE_DATA: the sentences of SST-2's training split, and paragraphs of WikiText-2.

python experiments/sst2/corpus.py FOLDER

Writes FOLDER/train.jsonl and FOLDER/val.jsonl (every twentieth paragraph and sentence). Labels are not read, and
neither are SST-2's dev and test sentences.
"""

import json
import os
import pathlib
import sys


def texts():
    data = pathlib.Path(os.environ["BIGBASE_DATA"])
    for line in (data / "sst2" / "train.tsv").read_text().splitlines():
        yield line.rpartition("\t")[0]
    for name in ("valid.txt", "test.txt"):
        for line in (data / "wikitext2_valid_test" / name).read_text().splitlines():
            if len(line.split()) > 10:  # not a heading
                yield line.strip().lower().replace("<unk>", "unknown")


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("w") as train, (folder / "val.jsonl").open("w") as val:
        for i, text in enumerate(texts()):
            (val if i % 20 == 0 else train).write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main()
