"""Gradient boosting on the very rows and features that a model has learnt from: what the model has to beat.

Axes: N rows of a split, F features, K classes.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from sklearn import ensemble

from bigbase_jax import parallel
from bigbase_jax.compare import scores, statistics
from bigbase_jax.core import Evaluated, Figure, Metric, Table, Task, UserError
from bigbase_jax.evaluate import Split, collect
from bigbase_jax.runtime.log import say

TOLD = {"probabilities": "label", "value": "target"}
"""What a model says, of classes or of a number -> what is right."""
_BINS = 255  # values of a category that both libraries tell apart
_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Boosting:
    """A ``core.Evaluator``: scikit-learn's HistGradientBoosting, and LightGBM where it is installed, beside the model.

    They learn from ``train``, have as many trees as are best on ``val``, where there is that split, and are measured on
    ``split``, as the model is; whether a difference is more than chance, the paired bootstrap says.

    Attributes:
      split: its name.
      trees: at most.
      learning_rate, leaves: of each tree.
      rows: of the training split, at most, spread evenly over it.
      seed: of the libraries.
      cardinalities: how many values each feature of ``categories`` has; None: the data says it.
    """

    split: str = "test"
    trees: int = 300
    learning_rate: float = 0.1
    leaves: int = 31
    rows: int = 500_000
    seed: int = 0
    cardinalities: tuple[int, ...] | None = None
    final: bool = True

    metrics: ClassVar[Mapping[str, Metric]] = {
        **{name: scores.METRICS[name] for name in ("auc", "log_loss")},
        "rmse": Metric("min", title="RMSE"),
    }

    def run(self, task: Task, variables: Any, data: Any, mesh: Any) -> Evaluated:
        """See ``core.Evaluator``: the metrics of the best peer, ``models`` with those of all, and ``verdict``.

        Raises:
          UserError: the task tells no classes apart and predicts no number.
        """
        own = Split(self.split).run(task, variables, data, mesh).examples
        kind = next((kind for kind in TOLD if kind in own), None)
        if kind is None:
            raise UserError(f"{type(task).__name__} says nothing that boosting could say as well; leave it out.")
        wanted = ("numbers", "categories", TOLD[kind])

        def rows_of(split: str) -> tuple[np.ndarray, np.ndarray]:
            batches = data.eval_batches(split, parallel.host(mesh), self.rows if split == "train" else None)
            kept = collect(lambda _, batch: {k: batch[k] for k in wanted if k in batch}, variables, batches, mesh)
            x_NF = np.concatenate([kept[k] for k in wanted[:2] if k in kept], 1, dtype=np.float64)
            return x_NF, kept[wanted[2]]

        train, (x_NF, y_N) = rows_of("train"), rows_of(self.split)
        val = rows_of("val") if "val" in data.splits else None
        given = np.array([0] * (x_NF.shape[1] - len(self.cardinalities or ())) + [*(self.cardinalities or ())])
        categorical = np.flatnonzero((given > 0) & (given <= _BINS)).tolist()
        K = own[kind].shape[1] if kind == "probabilities" else 0
        models: dict[str, dict[str, Any]] = {}
        score = {"the model": _scores(own[kind], y_N)}
        for name, fit in _LIBRARIES.items():
            if name == "LightGBM" and importlib.util.find_spec("lightgbm") is None:
                continue
            began = time.perf_counter()
            said, trees = fit(self, K, *train, val, x_NF, categorical)
            score[name] = _scores(said, y_N)
            models[name] = {"trees": trees, "seconds": round(time.perf_counter() - began, 2)}
        first, *_ = score["the model"]
        sign = 1 if self.metrics[first].better == "max" else -1
        drawn_RC = statistics.resampled([s[first].sample for s in score.values()], len(y_N), _RESAMPLES, self.seed)
        for c, name in enumerate(score):
            once = np.ones((1, len(y_N)))
            models.setdefault(name, {}).update({m: float(s.sample(once)[0]) for m, s in score[name].items()})
            if c:
                low, high = statistics.percentiles(sign * (drawn_RC[:, c] - drawn_RC[:, 0]))
                models[name] |= {"ahead": sign * (models[name][first] - models["the model"][first])}
                models[name] |= {"low": low, "high": high}
        best = max([*score][1:], key=lambda name: models[name]["ahead"])
        verdict = _verdict(best, first, models)
        say(f"{self.split}: {verdict}")
        return Evaluated(self.split, {m: models[best][m] for m in score[best]} | {"verdict": verdict, "models": models})

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """The scores of the model and of its peers, and who wins."""
        models = evaluated.metrics["models"]
        columns = [
            c for c in (*self.metrics, "ahead", "low", "high", "trees", "seconds") if c in [*models.values()][-1]
        ]
        titles = [self.metrics[c].title or c if c in self.metrics else c for c in columns]
        rows = [(name, *(scores.get(c) for c in columns)) for name, scores in models.items()]
        yield Table("Gradient boosting", ("Model", *titles), rows, evaluated.metrics["verdict"])


class _RMSE(scores.Ratio):
    def sample(self, count_rN: np.ndarray) -> np.ndarray:
        return np.sqrt(super().sample(count_rN))


def _scores(said: np.ndarray, y_N: np.ndarray) -> dict[str, scores.Score]:
    """Of probabilities f[N,K] or of numbers f[N]; what decides is first."""
    one_N = np.ones(len(y_N))
    if said.ndim == 1:
        return {"rmse": _RMSE((said.astype(np.float64) - y_N) ** 2, one_N)}
    return {"auc": scores.AUC(said, y_N), "log_loss": scores.Ratio(_surprise(said, y_N), one_N)}


def _surprise(p_NK: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(p_NK[np.arange(len(y_N)), y_N].astype(np.float64), 1e-15))


def _of_classes(p: np.ndarray, classes: Any, K: int) -> np.ndarray:
    """f[N,K] of probabilities of those classes alone that the training rows have."""
    p_NK = np.zeros((len(p), K))
    p_NK[:, np.asarray(classes, int)] = p
    return p_NK


def _sklearn(self: Boosting, K: int, x: Any, y: Any, val: Any, x_NF: Any, categorical: Any) -> tuple[np.ndarray, int]:
    make = ensemble.HistGradientBoostingClassifier if K else ensemble.HistGradientBoostingRegressor
    how = {"max_iter": self.trees, "learning_rate": self.learning_rate, "max_leaf_nodes": self.leaves}
    model = make(**how, early_stopping=False, random_state=self.seed, categorical_features=categorical).fit(x, y)

    def staged(x_NF: np.ndarray) -> Iterator[np.ndarray]:
        if not K:
            return model.staged_predict(x_NF)
        return (_of_classes(p, model.classes_, K) for p in model.staged_predict_proba(x_NF))

    losses = [] if val is None else [_loss(said, val[1]) for said in staged(val[0])]
    trees = int(np.argmin(losses)) + 1 if losses else self.trees
    return next(itertools.islice(staged(x_NF), trees - 1, None)), trees


def _loss(said: np.ndarray, y_N: np.ndarray) -> float:
    return float(np.mean(_surprise(said, y_N) if said.ndim > 1 else (said - y_N) ** 2))


def _lightgbm(self: Boosting, K: int, x: Any, y: Any, val: Any, x_NF: Any, categorical: Any) -> tuple[np.ndarray, int]:
    lightgbm: Any = importlib.import_module("lightgbm")
    make = lightgbm.LGBMClassifier if K else lightgbm.LGBMRegressor
    how = {"n_estimators": self.trees, "learning_rate": self.learning_rate, "num_leaves": self.leaves}
    stop = {} if val is None else {"eval_set": [val], "callbacks": [lightgbm.early_stopping(self.trees, verbose=False)]}
    model = make(**how, random_state=self.seed, verbosity=-1).fit(x, y, categorical_feature=categorical, **stop)
    said = _of_classes(model.predict_proba(x_NF), model.classes_, K) if K else model.predict(x_NF)
    return said, int(model.best_iteration_ or self.trees)


_LIBRARIES = {"HistGradientBoosting": _sklearn, "LightGBM": _lightgbm}


def _verdict(best: str, metric: str, models: Mapping[str, Mapping[str, Any]]) -> str:
    """Who wins, in a sentence."""
    peer, own = models[best], models["the model"]
    against = f"{metric} {own[metric]:.4f} of the model, {peer[metric]:.4f} of {best}"
    ahead = f"the difference is {abs(peer['ahead']):.4f}, the 95 % interval {peer['low']:.4f} to {peer['high']:.4f}"
    if peer["low"] <= 0 <= peer["high"]:
        return f"Neither wins: {against}; {ahead} in favour of {best}."
    return f"{best if peer['ahead'] > 0 else 'The model'} wins: {against}; {ahead} in favour of {best}."
