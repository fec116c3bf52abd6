"""Recommendation of the next item: SASRec over histories of items, or two towers, beside popularity, item-kNN and ALS.

python launch.py --config=configs/recommend.py                       choices made up here; the best ranking is known
python launch.py --config=configs/recommend.py:root=ratings.csv      user, item[, rating][, time]: csv, tsv, Parquet
python launch.py --config=configs/recommend.py:root=DIR,items=movies.csv,min_rating=4    titles and words of items
python launch.py --config=configs/recommend.py:root=FILE,loss=sampled_softmax    or softmax, bce, gbce
python launch.py --config=configs/recommend.py:root=FILE,model=two_tower,hashed=1000000    rows that ids share
python launch.py --mode=predict --workdir=runs/recommend --input=users.csv --top=10    by user, history or item

The last item of each user is test, the one before it val; with split=time, what is later than a moment that all users
share. All items are ranked but those that the user has had; ``sampled/`` is the ranking among 100 drawn items, which
papers report. The softmax over all items suits catalogues of some thousands; sampled_softmax, with 512 drawn ones,
larger ones. bce is SASRec as published, gbce Petrov & Macdonald's (2023).

Measured on one core (experiments/recommend): Amazon Video Games with gbce, NDCG@10 0.0504 over all items, and 0.531
among 100 drawn ones (published: 0.536), where popularity has 0.0099 and 0.280, in 593 seconds.
"""

from typing import NamedTuple

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.synthetic.interactions import SyntheticInteractions
from bigbase_jax.data.sources.table.catalogue import Attributes
from bigbase_jax.data.sources.table.interactions import InteractionFiles
from bigbase_jax.evaluators.baselines import ALS, ItemKNN, Popularity
from bigbase_jax.evaluators.ranking import Ranking
from bigbase_jax.models.sasrec import SASRec
from bigbase_jax.models.two_tower import TwoTower
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.next_item import NextItem
from bigbase_jax.tasks.retrieval import Retrieval
from bigbase_jax.train import TrainConfig


class Loss(NamedTuple):
    """What of ``NextItem`` a loss is, and how many epochs it takes."""

    loss_kind: str
    negatives: int
    calibration: float
    epochs: float


LOSSES = {
    "softmax": Loss("softmax", 1, 0.0, 20.0),
    "sampled_softmax": Loss("sampled_softmax", 512, 0.0, 40.0),
    "bce": Loss("bce", 1, 0.0, 200.0),
    "gbce": Loss("bce", 256, 0.75, 60.0),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=FILE_OR_DIR, items=FILE (titles, attributes), model=sasrec|two_tower, loss=softmax|sampled_softmax|
    bce|gbce, split=last|time, length=50, width=64, dropout=0.5, core=0, min_rating=4, hashed=1000000, tiny.
    """
    args = parse_arg(
        arg,
        root=None,
        items=None,
        model="sasrec",
        loss="softmax",
        split="last",
        length=50,
        width=64,
        dropout=0.5,
        core=0,
        min_rating=None,
        hashed=None,
        tiny=False,
    )
    if args.loss not in LOSSES:
        raise UserError(f"there is no loss={args.loss}.{suggest(args.loss, LOSSES, 'loss')}")
    loss, width, pairs = LOSSES[args.loss], 16 if args.tiny else args.width, args.model == "two_tower"
    hashed = None if args.hashed is None else int(args.hashed)
    tasks = {
        "sasrec": target(
            NextItem,
            model=target(SASRec, width=width, dropout=args.dropout),
            loss_kind=loss.loss_kind,
            negatives=loss.negatives,
            calibration=loss.calibration,
        ),
        "two_tower": target(Retrieval, model=target(TwoTower, width=width, hashed=hashed)),
    }
    if args.model not in tasks:
        raise UserError(f"there is no model={args.model}.{suggest(args.model, tasks, 'model')}")
    if hashed and not pairs:
        raise UserError("hashed= is of model=two_tower; SASRec scores each item of its catalogue.")
    how = {"length": 8 if args.tiny else args.length, "split": args.split, "core": args.core, "pairs": pairs}
    if args.root:
        items = target(Attributes, root=args.items) if args.items else None
        least = None if args.min_rating is None else float(args.min_rating)
        dataset = target(InteractionFiles, root=args.root, items=items, min_rating=least, **how)
    else:
        count = {"users": 100, "num_items": 40, "groups": 4} if args.tiny else {}
        dataset = target(SyntheticInteractions, **count, **how)

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.data = target(
        Data,
        dataset=dataset,
        batch_size=8 if args.tiny else 512 if pairs else 128,
        eval_batch_size=16 if args.tiny else 256,
        buckets=() if pairs else tuple(size for size in (4, 8, 16, 32) if size < how["length"]),
    )
    config.task = tasks[args.model]
    peers = tuple(target(peer) for peer in (Popularity, ItemKNN, ALS))
    config.evaluators = ConfigDict({"ranking": target(Ranking, peers=peers)})
    if pairs:  # whose own loss says little of a ranking
        config.evaluators.ranking_val = target(Ranking, split="val", limit=2000, negatives=0, final=False)
    config.optim = target(Optimizer, learning_rate=1e-3, algorithm=deferred(optax.adam, b2=0.98))
    best = {"best_metric": "ranking_val/ndcg@10" if pairs else "ndcg@10", "log_every": 2 if args.tiny else 50}
    if args.tiny:
        config.train = target(TrainConfig, steps=8, eval_every=4, **best)
    else:
        epochs = 20.0 if pairs else loss.epochs
        config.train = target(TrainConfig, epochs=epochs, eval_every=1000 if args.root else 200, **best)
    return config
