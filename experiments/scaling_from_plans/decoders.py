"""Plans of Llama-shaped decoders' training steps on TPU v5p slices; one JSON line each, as scaling.py.

python decoders.py --model=8B --scaling=weak --chips=64 [--level=0]

Sequences of 4,096 tokens, AdamW, bfloat16 arithmetic, blocks scanned and rematerialised, parameters in pieces.
"""

import argparse
import dataclasses
import json
import sys

import numpy as np
import optax
from ml_collections import ConfigDict
from scaling import SLICES

from bigbase_jax.build import deferred, target
from bigbase_jax.data.pipeline import Data
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.transformer import LLAMA as LLAMA_STYLE
from bigbase_jax.optim import Optimizer
from bigbase_jax.plan import topology
from bigbase_jax.plan.plan import QUICK, Planner
from bigbase_jax.tasks.language import CausalLanguageModel
from bigbase_jax.train import TrainConfig

LENGTH = 4096
LLAMA = {
    "vocab_size": 128_256,
    "length": LENGTH,
    "tied": False,
    "positions": "rope",
    "rope_theta": 500_000.0,
    "style": dataclasses.replace(LLAMA_STYLE, kv_heads=8),
}
MODELS = {  # Grattafiori et al. 2024; 1B is Llama 3.2's
    "1B": {"width": 2048, "depth": 16, "heads": 32, "mlp_dim": 8192, "tied": True},
    "8B": {"width": 4096, "depth": 32, "heads": 32, "mlp_dim": 14_336},
    "70B": {"width": 8192, "depth": 80, "heads": 64, "mlp_dim": 28_672},
}
PER_CHIP = {"1B": 4, "8B": 2, "70B": 1}
"""Sequences of a chip in weak scaling, and the most it takes at once in strong scaling."""
GLOBAL = 4096
"""Sequences of a batch in strong scaling: 16.8 million tokens."""
PIECES = {"1B": 16, "8B": 64, "70B": 256}
"""Over how many chips, at most, the parameters are spread."""


@dataclasses.dataclass(frozen=True)
class Blank:
    """Sequences of zeros: a plan needs shapes only."""

    description: str = "shapes of text"

    @property
    def splits(self):
        return {"train": self}

    @property
    def dataset_info(self):
        return {}

    def __len__(self):
        return 10_000_000

    def __getitem__(self, index):
        return {name: np.zeros(LENGTH, np.int32) for name in CausalLanguageModel.inputs}


def recipe(model, scaling, chips):
    batch = PER_CHIP[model] * chips if scaling == "weak" else GLOBAL
    config = ConfigDict({"seed": 0})
    config.data = target(Data, dataset=target(Blank), batch_size=batch)
    decoder = target(Decoder, dtype="bfloat16", scan=True, remat=True, **{**LLAMA, **MODELS[model]})
    config.task = target(CausalLanguageModel, model=decoder, logit_chunks=8)
    config.optim = target(Optimizer, learning_rate=3e-4, algorithm=deferred(optax.adamw), weight_decay=0.1)
    slices = max(1, GLOBAL // (chips * PER_CHIP[model])) if scaling == "strong" else 1
    config.train = target(TrainConfig, steps=1000, microbatches=slices)
    # A product of the slice's dimensions, or of a part of one.
    config.train.mesh.fsdp = min(chips, PIECES[model])
    return config


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--scaling", choices=["weak", "strong"], required=True)
    parser.add_argument("--chips", type=int, choices=SLICES, required=True)
    parser.add_argument("--level", type=int, default=QUICK, help="of the compiler's optimization; 0: as training")
    args = parser.parse_args()
    slice_ = topology.parse(f"v5p:{SLICES[args.chips]}")
    config = recipe(args.model, args.scaling, args.chips)
    planner = Planner(config, slice_, topology.devices(slice_), topology.chip(slice_))
    plan = planner.plan(planner.recipe(), args.level)
    print(json.dumps({"layout": "fsdp", **vars(args), **plan.numbers()}), flush=True)
    print(plan.compile_seconds, file=sys.stderr)


if __name__ == "__main__":
    main()
