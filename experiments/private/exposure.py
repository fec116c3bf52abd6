"""Secrets planted in the text of a small language model: their exposure with and without differential privacy.

python experiments/private/exposure.py none WORKDIR      without
python experiments/private/exposure.py 3 WORKDIR         to epsilon 3, for one caption added or removed

The text are Multi30k's English captions, an example each (no window has two), and in train eight sentences with a
secret of eight digits, twenty times each. Both runs have the same model, steps and mean size of a batch.
"""

import gzip
import os
import pathlib
import sys

import numpy as np
import optax
from ml_collections import ConfigDict

from bigbase_jax.build import deferred, target
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.splits import Split
from bigbase_jax.data.sources.text.text import read_text
from bigbase_jax.evaluators.membership import Exposure
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.language import CausalLanguageModel
from bigbase_jax.text.tokenizer import Symbols, dataset_info_of
from bigbase_jax.train import TrainConfig, train
from bigbase_jax.wrappers.private import Private

SECRETS = tuple(f"{n:08d}" for n in np.random.default_rng(0).integers(0, 10**8, 8))
PREFIX, COPIES = "The number of the safe is ", 20
MEAN, ROWS, STEPS = 256, 320, 200


class Captions:
    """A ``Dataset`` of one example for each caption."""

    description = f"Multi30k's English captions, and {len(SECRETS)} secrets, {COPIES} times each"

    def __init__(self, length: int = 96):
        self.dataset_info = {**dataset_info_of(Symbols(end=True)), "length": length}
        folder = pathlib.Path(os.environ["BIGBASE_DATA"]) / "multi30k"
        texts = {}
        for split in ("train", "val"):
            with gzip.open(next(folder.rglob(f"{split}.en.gz")), "rt") as file:
                texts[split] = [line.strip()[: length - 1] for line in file if line.strip()]
        texts["train"] += [f"{PREFIX}{secret}." for secret in SECRETS] * COPIES
        kept = {split: [self.read(text)[0] for text in some] for split, some in texts.items()}
        self.splits = {split: Split(split, len(x), x.__getitem__, "memory") for split, x in kept.items()}

    def read(self, text: str) -> list[dict[str, np.ndarray]]:
        return read_text({"text": text}, self.dataset_info)

    def fingerprint(self) -> str:
        return f"captions of multi30k, {COPIES} of {SECRETS}"


def main(epsilon: str, workdir: str) -> None:
    private = epsilon != "none"
    config = ConfigDict({"seed": 0, "init_from": None})
    config.data = target(
        Data,
        dataset=target(Captions),
        batch_size=ROWS if private else MEAN,
        poisson=float(MEAN) if private else None,
        eval_batch_size=128,
    )
    task = target(CausalLanguageModel, model=target(Decoder, depth=2, heads=4, width=64, dropout=0.0))
    config.task = target(Private, task=task, clip=1.0, epsilon=float(epsilon)) if private else task
    config.optim = target(
        Optimizer, learning_rate=3e-3, algorithm=deferred(optax.adam), schedule=deferred(optax.cosine_decay_schedule)
    )
    config.evaluators = ConfigDict({"secrets": target(Exposure, planted=SECRETS, prefix=PREFIX, suffix=".")})
    slices = 4 if private else 1
    config.train = target(TrainConfig, steps=STEPS, log_every=50, eval_every=STEPS, microbatches=slices)
    print(train(config, workdir))


if __name__ == "__main__":
    main(*sys.argv[1:])
