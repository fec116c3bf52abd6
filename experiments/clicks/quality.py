"""Test AUC and logloss of the recipe's models beside scikit-learn's, on made-up clicks or on MovieLens as clicks.

python experiments/clicks/quality.py [--movielens=FOLDER] [--seeds=3]      one line of JSON for each run

MovieLens: ``ratings.csv`` of its release; a rating of 4 or more is a click. Split by time: 70/10/20.
"""

import argparse
import csv
import json
import pathlib
import sys
import tempfile
import time

import numpy as np
import sklearn.metrics
from scipy.sparse import csr_matrix, hstack
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import OneHotEncoder

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from bigbase_jax.build import build
from bigbase_jax.train import train
from configs import clicks

MODELS = ("linear", "mlp", "dlrm", "dcn")


def as_clicks(folder, path):
    with open(pathlib.Path(folder) / "ratings.csv") as given, open(path, "w", newline="") as made:
        writer = csv.writer(made)
        writer.writerow(["user", "movie", "time", "click"])
        for row in csv.DictReader(given):
            writer.writerow([row["userId"], row["movieId"], row["timestamp"], int(float(row["rating"]) >= 4)])


def told(model, seed, seconds, auc, loss):
    found = {"model": model, "seed": seed, "cpu_s": round(seconds, 1), "auc": round(auc, 4), "logloss": round(loss, 4)}
    print(json.dumps(found), flush=True)


def peers(config, folder):
    """Logistic regression on one-hot categories, its C the best on val; boosting with its own defaults."""
    data = build(config.data.dataset).prepare(pathlib.Path(folder), 1e9, lambda line: None)
    rows = {split: source.batch(np.arange(len(source))) for split, source in data.splits.items()}
    one_hot = OneHotEncoder(handle_unknown="ignore").fit(rows["train"]["categories"])

    def sparse(x):
        parts = [one_hot.transform(x["categories"])]
        return hstack([*parts, csr_matrix(x["numbers"])]).tocsr() if "numbers" in x else parts[0]

    def dense(x):
        return np.concatenate([x["categories"], *([x["numbers"]] if "numbers" in x else [])], 1)

    began = time.process_time()
    fits = [
        LogisticRegression(C=c, max_iter=500).fit(sparse(rows["train"]), rows["train"]["label"]) for c in (0.03, 0.3, 3)
    ]
    logistic = min(
        fits, key=lambda m: sklearn.metrics.log_loss(rows["val"]["label"], m.predict_proba(sparse(rows["val"])))
    )
    for name, model, features in (
        ("logistic regression", logistic, sparse),
        ("HistGradientBoosting", HistGradientBoostingClassifier(random_state=0), dense),
    ):
        if name != "logistic regression":
            began = time.process_time()
            model.fit(features(rows["train"]), rows["train"]["label"])
        p = model.predict_proba(features(rows["test"]))[:, 1]
        y = rows["test"]["label"]
        scores = sklearn.metrics.roc_auc_score(y, p), sklearn.metrics.log_loss(y, p)
        told(name, 0, time.process_time() - began, *map(float, scores))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--movielens")
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arg = ""
        if flags.movielens:
            path = pathlib.Path(folder) / "likes.csv"
            as_clicks(flags.movielens, path)
            arg = f",root={path},target=click,positive=1,by_time=time,kinds=user:category+movie:category+click:category"
        peers(clicks.get_config(f"model=dlrm{arg}"), folder)
        for model in MODELS:
            for seed in range(flags.seeds):
                config = clicks.get_config(f"model={model}{arg}")
                config.seed, config.train.writers = seed, ()
                began = time.process_time()
                found = train(config, str(pathlib.Path(folder) / f"{model}-{seed}"))
                told(model, seed, time.process_time() - began, found["auc"], found["loss"])
