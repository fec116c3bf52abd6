"""Cats and dogs by the Mixer of docs/examples/mixer.py, on pictures that the program draws.

python launch.py --config=docs/examples/mixer_recipe.py
"""

import optax
from ml_collections import ConfigDict

from bigbase_jax.build import deferred, parse_arg, target
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.synthetic.pictures import DrawnCatsAndDogs
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.train import TrainConfig
from docs.examples.mixer import Mixer


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: tiny."""
    args = parse_arg(arg, tiny=False)
    small = {"size": 32, "num_train": 64, "num_val": 32, "num_test": 32} if args.tiny else {}

    config = ConfigDict()
    config.seed = 0
    config.data = target(Data, dataset=target(DrawnCatsAndDogs, **small), batch_size=16 if args.tiny else 32)
    config.task = target(Classification, model=target(Mixer, width=16 if args.tiny else 64))
    config.optim = target(Optimizer, learning_rate=1e-3, algorithm=deferred(optax.adamw))
    config.train = target(TrainConfig, steps=8 if args.tiny else 1000, log_every=2 if args.tiny else 50)
    return config
