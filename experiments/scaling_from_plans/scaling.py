"""Plans of ViT-B/16 and ViT-g/14 training steps on TPU v5p slices of 1 to 4,096 chips; one JSON line each.

python scaling.py --model=B --scaling=weak --chips=64 [--mesh=fsdp] [--level=0]

Needs `pip install 'bigbase_jax[tpu]'`, and no TPU. Pictures of 224x224 in 1,000 classes, AdamW, bfloat16 arithmetic.
The blocks are scanned, so that compilation does not depend on their number; loops count as often as they turn.
"""

import argparse
import dataclasses
import json
import sys

import numpy as np
import optax
from ml_collections import ConfigDict

from bigbase_jax.build import deferred, target
from bigbase_jax.data.pipeline import Data
from bigbase_jax.models.vit import ViT
from bigbase_jax.optim import Optimizer
from bigbase_jax.plan import topology
from bigbase_jax.plan.plan import QUICK, Planner
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.train import TrainConfig

SLICES = {  # chips -> the shapes that Google offers (cloud.google.com/tpu/docs/v5p), and parts of one host
    1: "1x1x1",
    4: "2x2x1",
    16: "2x2x4",
    64: "4x4x4",
    256: "4x8x8",
    1024: "8x8x16",
    4096: "16x16x16",
}
MODELS = {
    "B": {"variant": "B", "patch": 16},  # Dosovitskiy et al. 2021
    "g": {"variant": "L", "patch": 14, "width": 1408, "depth": 40, "heads": 16, "mlp_dim": 6144},  # Zhai et al. 2022
}
PER_CHIP = {"B": 128, "g": 64}
"""Examples of a chip in weak scaling, and the most it takes at once in strong scaling."""
GLOBAL = 4096
"""Examples of a batch in strong scaling."""


@dataclasses.dataclass(frozen=True)
class Blank:
    """As many black pictures as ImageNet has, of its size: a plan needs shapes only."""

    description: str = "shapes of ImageNet"

    @property
    def splits(self):
        return {"train": self}

    @property
    def dataset_info(self):
        return {"num_classes": 1000}

    def __len__(self):
        return 1_281_167

    def __getitem__(self, index):
        return {"image": np.zeros((224, 224, 3), np.uint8), "label": np.int32(0)}


def recipe(model, scaling, chips, mesh):
    batch = PER_CHIP[model] * chips if scaling == "weak" else GLOBAL
    config = ConfigDict({"seed": 0})
    config.data = target(Data, dataset=target(Blank), batch_size=batch)
    vit = target(ViT, dtype="bfloat16", scan=True, remat=True, remat_policy="dots_with_no_batch_dims_saveable",
                 pool="gap", **MODELS[model])  # fmt: skip
    config.task = target(Classification, model=vit)
    config.optim = target(Optimizer, learning_rate=1e-3, algorithm=deferred(optax.adamw), weight_decay=0.05)
    slices = max(1, GLOBAL // (chips * PER_CHIP[model])) if scaling == "strong" else 1
    config.train = target(TrainConfig, epochs=300.0, microbatches=slices)
    # Pieces that divide every width of the models and are a product of the slice's dimensions.
    config.train.mesh.fsdp = (16 if chips == 4096 else min(chips, 64)) if mesh == "fsdp" else 1
    return config


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--scaling", choices=["weak", "strong"], required=True)
    parser.add_argument("--chips", type=int, choices=SLICES, required=True)
    parser.add_argument("--mesh", choices=["data", "fsdp"], default="data")
    parser.add_argument("--level", type=int, default=QUICK, help="of the compiler's optimization; 0: as training")
    args = parser.parse_args()
    slice_ = topology.parse(f"v5p:{SLICES[args.chips]}")
    config = recipe(args.model, args.scaling, args.chips, args.mesh)
    planner = Planner(config, slice_, topology.devices(slice_), topology.chip(slice_))
    plan = planner.plan(planner.recipe(), args.level)
    print(json.dumps({"layout": args.mesh, **vars(args), **plan.numbers()}))
    print(plan.compile_seconds, file=sys.stderr)


if __name__ == "__main__":
    main()
