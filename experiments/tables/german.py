"""German credit: five times repeated five-fold cross-validation of an ensemble and of HistGradientBoosting.

python experiments/tables/german.py --root=$BIGBASE_DATA/german_credit/german.data --workdir=runs/german

Each fold is a run of its own: a fifth of the rows is tested, a fifth is val, three fifths are train. Both models stop,
are calibrated and get their threshold on val alone. A line of JSON for each fold, then the means and their intervals.
"""

import argparse
import itertools
import json
import pathlib
import runpy
import time

import numpy as np
from scipy import stats
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedKFold

from bigbase_jax.build import build
from bigbase_jax.runtime import compilation
from bigbase_jax.tasks.metrics import risk
from bigbase_jax.train import train

COST = ((0.0, 1.0), (5.0, 0.0))  # german.doc, section 8: rows good, bad; columns taken for good, for bad
GRID = [{"learning_rate": rate, "max_leaf_nodes": leaves} for rate in (0.05, 0.1) for leaves in (4, 8, 31)]
REPEATS = FOLDS = 5


def boosting(data) -> dict:
    """The best of ``GRID``, and its number of trees, by the log loss on val."""

    def rows(split):
        found = data.source(split).batch(np.arange(data.num_examples(split)))
        return np.concatenate([found["numbers"], found["categories"]], 1, dtype=np.float64), found["label"]

    (x, y), (x_val, y_val), (x_test, y_test) = map(rows, ("train", "val", "test"))
    numbers = len(data.dataset_info["number_names"])
    tried = []
    for how in GRID:
        fixed = {"categorical_features": list(range(numbers, x.shape[1])), "early_stopping": False, "max_iter": 150}
        model = HistGradientBoostingClassifier(**how, **fixed, random_state=0).fit(x, y)
        staged = enumerate(model.staged_predict_proba(x_val))
        loss, trees = min((risk.probability_scores(p[:, 1], y_val)["log_loss"], i) for i, p in staged)
        tried.append((loss, len(tried), trees, model))
    _, chosen, trees, model = min(tried)
    p_val, p_test = (next(itertools.islice(model.staged_predict_proba(x), trees, None))[:, 1] for x in (x_val, x_test))
    calibration = risk.calibrated("temperature", p_val, y_val)
    q_val, q_test = calibration(p_val), calibration(p_test)
    thresholds = {
        "cheapest": risk.cheapest_threshold(q_val, y_val, COST),
        "bayes": risk.bayes_threshold(COST),
    }
    costs = {f"cost_{rule}": risk.mean_cost(q_test >= t, y_test, COST) for rule, t in thresholds.items()}
    return {**risk.probability_scores(q_test, y_test), **costs, **GRID[chosen], "trees": trees + 1}


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval, which allows for folds that share rows (Nadeau & Bengio 2003,
    equation 9)."""
    n = len(values)
    variance = np.var(values, ddof=1) * (1 / n + 1 / (FOLDS - 1))
    return float(np.mean(values)), float(stats.t.ppf(0.975, n - 1) * variance**0.5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", required=True)
    parser.add_argument("--workdir", default="runs/german")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    given = parser.parse_args()
    compilation.setup()
    lines = [line.split() for line in pathlib.Path(given.root).read_text().splitlines() if line.strip()]
    header, rows = lines[0], lines[1:]
    good = np.array([row[-1] for row in rows])
    recipe = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "configs" / "table.py"))["get_config"]
    folder, results = pathlib.Path(given.workdir), []
    for repeat in range(given.repeats):
        folds = [part for _, part in StratifiedKFold(FOLDS, shuffle=True, random_state=repeat).split(rows, good)]
        for fold in range(FOLDS):
            order = [folds[(fold + i) % FOLDS] for i in range(FOLDS)]
            parts = {"test": order[0], "val": order[1], "train": np.concatenate(order[2:])}
            place = folder / f"{repeat}-{fold}"
            (place / "data").mkdir(parents=True, exist_ok=True)
            for split, part in parts.items():
                text = "\n".join(",".join(row) for row in [header, *(rows[i] for i in part)])
                (place / "data" / f"{split}.csv").write_text(f"{text}\n")
            kinds = "+".join(f"{name}:category" for name in header if not rows[0][header.index(name)].isdigit())
            config = recipe(
                f"root={place / 'data'},target={header[-1]},positive=2,members={given.members},batch=32,peers=false,"
                f"cost=5+1,kinds={kinds}"
            )
            config.seed = repeat * FOLDS + fold
            config.train.writers = ()
            began = time.process_time()
            found = train(config, str(place / "run"))
            own = {name: found["risk"][name] for name in ("auc", "ks", "log_loss", "brier")}
            with np.load(place / "run" / "predictions-risk.npz") as kept:
                by_bayes = risk.mean_cost(kept["probability"] >= risk.bayes_threshold(COST), kept["label"], COST)
            own |= {"cost_cheapest": found["risk"]["cost"], "cost_bayes": by_bayes}
            middle = time.process_time()
            peer = boosting(build(config.data, _path="config.data").prepare(lambda line: None))
            seconds = {"ours": middle - began, "boosting": time.process_time() - middle}
            results.append({"repeat": repeat, "fold": fold, "ours": own, "boosting": peer, "seconds": seconds})
            print(json.dumps(results[-1]), flush=True)
    for name in ("auc", "ks", "log_loss", "brier", "cost_cheapest", "cost_bayes"):
        ours, peer = ([result[who][name] for result in results] for who in ("ours", "boosting"))
        of = {"ours": ours, "boosting": peer, "difference": [a - b for a, b in zip(ours, peer, strict=True)]}
        print(json.dumps({"metric": name, **{who: [round(x, 4) for x in interval(v)] for who, v in of.items()}}))


if __name__ == "__main__":
    main()
