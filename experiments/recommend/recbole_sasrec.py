"""SASRec in RecBole 1.2.1 on a log: the last item of each user for test, the one before it for validation.

Run by run.py in a virtual environment of its own; prints a JSON line after each epoch: core-seconds of training so far,
and what RecBole measures on the test split: of a sequential model, all items ranked, those that the user has had too.
"""

import argparse
import json
import os
import pathlib
import resource
import time

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed


def core_seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("log", help="a folder NAME with NAME.inter: user_id, item_id, timestamp")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="core-seconds of training after which it ends")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=JSON of RecBole's config")
    args = parser.parse_args()
    folder = pathlib.Path(args.log)
    given = {
        "data_path": str(folder.parent),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        "metrics": ["Hit", "NDCG"],
        "topk": [10],
        "valid_metric": "NDCG@10",
        "train_neg_sample_args": None,
        "MAX_ITEM_LIST_LENGTH": 50,
        "use_gpu": False,
        "show_progress": False,
        "checkpoint_dir": str(folder / "saved"),
        **{key: json.loads(value) for key, _, value in (item.partition("=") for item in args.set)},
    }
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = Config(model="SASRec", dataset=folder.name, config_dict=given)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    init_seed(config["seed"], config["reproducibility"])
    model = get_model("SASRec")(config, train.dataset)
    trainer = Trainer(config, model)
    trainer.eval_collector.data_collect(train)
    used = wall = 0.0
    for epoch in range(1, args.epochs + 1):
        begin, since = core_seconds(), time.perf_counter()
        loss = trainer._train_epoch(train, epoch - 1, show_progress=False)
        used, wall = used + core_seconds() - begin, wall + time.perf_counter() - since
        found = {"epoch": epoch, "core_seconds": used, "seconds": wall, "loss": loss, "examples": len(train.dataset)}
        for name, split in (("valid", valid), ("test", test)):
            found |= {f"{name}_{key}": value for key, value in trainer.evaluate(split, load_best_model=False).items()}
        print(json.dumps(found), flush=True)
        if used > args.seconds:
            break


main()
