"""Prices of houses from a table of numbers: the data set and the task of docs/examples.

python launch.py --config=docs/examples/houses_recipe.py
python launch.py --mode=predict --workdir=runs/houses_recipe --input=docs/examples/new_houses.csv
"""

import optax
from ml_collections import ConfigDict

from bigbase_jax.build import deferred, parse_arg, target
from bigbase_jax.data.pipeline import Data
from bigbase_jax.models.mlp import MLP
from bigbase_jax.optim import Optimizer
from bigbase_jax.train import TrainConfig
from docs.examples.number_table import NumberTable
from docs.examples.regression import Regression


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=FILE, column=NAME, tiny."""
    args = parse_arg(arg, root="docs/examples/houses.csv", column="price", tiny=False)

    config = ConfigDict()
    config.seed = 0
    config.data = target(Data, dataset=target(NumberTable, path=args.root, column=args.column), batch_size=8)
    hidden = (8,) if args.tiny else (32, 32)
    config.task = target(Regression, model=target(MLP, num_classes=1, hidden=hidden, activation="relu"))
    config.optim = target(Optimizer, learning_rate=3e-3, algorithm=deferred(optax.adamw))
    config.train = target(
        TrainConfig,
        steps=8 if args.tiny else 600,
        log_every=2 if args.tiny else 50,
        best_metric="loss",
        best_mode="min",
    )
    return config
