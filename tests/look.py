"""What one of several processes sees of the data; ``python look.py ADDRESS COUNT INDEX FOLDER`` writes INDEX.json.

Legend: B examples in a batch, G position in the stream of training examples.
"""

import json
import os
import pathlib
import sys
import time
from typing import ClassVar

import jax
import numpy as np
from toys import Regression

from bigbase_jax import parallel
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.text.labelled_text import LabelledText
from bigbase_jax.evaluate import evaluate
from bigbase_jax.runtime import distributed
from bigbase_jax.text.tokenizer import Bytes

SIZES = {"train": 20, "test": 21}
B, EPOCHS = 8, 2


class Rows:
    """Points in memory."""

    in_memory = True

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        x = np.random.default_rng(index).normal(size=3).astype(np.float32)
        return {"x": x, "y": np.float32(x.sum())}


class Files(Rows):
    """The same, as if each were a file: who reads which is written down."""

    in_memory = False

    def __init__(self, count, log):
        super().__init__(count)
        self.log = log

    def __getitem__(self, index):
        with open(self.log / f"{os.getpid()}.log", "a") as file:
            file.write(f"{index}\n")
        time.sleep(0.02)  # so that the others come while one reads
        return super().__getitem__(index)


class Points:
    splits: ClassVar = {name: Rows(count) for name, count in SIZES.items()}
    dataset_info: ClassVar = {}
    description: ClassVar = "points for a test"

    def fingerprint(self):
        return "points"

    def __init__(self, log=None):
        if log is not None:
            self.splits = {"train": Files(30, log)}


def prepare(folder):
    """Reads files through a cache that all share, where one checks and keeps them; returns what was said of a text."""
    folder = pathlib.Path(folder)
    for limit, log in ((1.0, folder / "kept"), (0.0, folder / "checked")):
        log.mkdir(exist_ok=True)
        Data(Points(log), B, cache_dir=str(folder / "cache"), cache_limit_gb=limit).prepare(lambda line: None)
    said = []
    text = LabelledText(root=str(folder / "text.csv"), tokenizer=Bytes())
    Data(text, B, cache_dir=str(folder / "cache")).prepare(said.append)
    return [line for line in said if "once, to tokenise it" in line]


def look(devices=None):
    """[G, example] of every training row on this process's devices, and an evaluation of the same fresh parameters."""
    data = Data(Points(), batch_size=B).prepare(lambda line: None)
    mesh = parallel.make_mesh(devices)
    used = []
    with data.train_batches(0, parallel.host(mesh)) as batches:
        for step in range(EPOCHS * SIZES["train"] // B):
            batch = parallel.put(next(batches), mesh)
            for shard in batch["index"].addressable_shards:
                first = B * step + (shard.index[0].start or 0)
                used += [[first + row, int(example)] for row, example in enumerate(shard.data)]
    task = Regression()
    variables = jax.tree.map(np.asarray, task.init(jax.random.key(0), {"x": np.zeros((B, 3), np.float32)}))
    test = data.eval_batches("test", parallel.host(mesh))
    found = evaluate(task, parallel.eval_step(task, mesh), variables, test, mesh)
    examples = {name: values.tolist() for name, values in found.examples.items()}
    return {"used": used, "metrics": found.metrics, "examples": examples}


if __name__ == "__main__":
    address, count, index, folder = sys.argv[1:]
    with distributed.joined(distributed.Place(address, int(count), int(index))):
        seen = {**look(), "said": prepare(folder)}
        with open(f"{folder}/{index}.json", "w") as file:
            json.dump(seen, file)
