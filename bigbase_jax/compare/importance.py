"""Which settings matter for the goal of a sweep: optuna's answer where its study is at hand, else a random forest's."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.compare.studies import studies

FEWEST = 8
"""Different settings below which nothing is said, however many seeds each has."""
_REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Importance:
    """Of each setting for the goal.

    Attributes:
      method: by which, in words.
      shares: by setting, the largest first; they sum to 1, or are all 0.
    """

    method: str
    shares: dict[str, float]


def weigh(
    trials: Sequence[tuple[Mapping[str, Any], float]], folders: Sequence[pathlib.Path], storage: str | None = None
) -> Importance | str:
    """The importance of settings, or the sentence why it is not known.

    Args:
      trials: (the settings that differ between trials, the goal's value) of each.
      folders: of the sweep, in which an optuna study may lie.
      storage: where it is otherwise; see ``studies``.
    """
    settings = len({json.dumps(design, sort_keys=True, default=str) for design, _ in trials})
    if settings < FEWEST:
        return f"The importance of settings needs at least {FEWEST} trials with a validated goal, not {settings}."
    for folder in folders:
        found = _of_study(folder, storage, {name for design, _ in trials for name in design})
        if found is not None:
            return found
    return of_forest(trials)


def of_forest(trials: Sequence[tuple[Mapping[str, Any], float]], seed: int = 0) -> Importance | str:
    """Permutation importance (Breiman 2001, section 10) of a random forest that was fitted to the trials."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    names = list(dict.fromkeys(name for design, _ in trials for name in design))
    columns = {name: encoded([design.get(name) for design, _ in trials]) for name in names}
    columns = {name: column for name, column in columns.items() if len(set(column)) > 1}
    value_N = np.asarray([value for _, value in trials])
    if not columns or not np.ptp(value_N):
        return "The importance of settings is not known: the settings, or the goal, are the same in all trials."
    x_NF = np.stack(list(columns.values()), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of examples that are in every tree, which a small sweep may have
        forest = RandomForestRegressor(200, oob_score=True, min_samples_leaf=2, random_state=seed).fit(x_NF, value_N)
        found = permutation_importance(forest, x_NF, value_N, n_repeats=_REPEATS, random_state=seed)
    raised_F = np.maximum(found.importances_mean, 0)
    share_F = raised_F / raised_F.sum() if raised_F.sum() else raised_F
    order = np.argsort(-share_F, kind="stable")
    fit = float(forest.oob_score_)
    trust = "" if fit >= 0.3 else ", so little that this is a guess" if fit > 0 else ": nothing, so this says little"
    return Importance(
        f"permutation importance of a random forest (scikit-learn) fitted to {len(trials)} trials; it explains "
        f"{100 * max(fit, 0):.0f} % of the goal's variance in trials that it has not seen{trust}",
        {list(columns)[i]: float(share_F[i]) for i in order},
    )


def encoded(values: Sequence[Any]) -> np.ndarray:
    """f64[N]: numbers as they are, where all are; else the place of each value among the sorted distinct ones."""
    if all(isinstance(value, (int, float)) and np.isfinite(value) for value in values):
        return np.asarray(values, np.float64)
    words = [json.dumps(value, sort_keys=True, default=str) for value in values]
    return np.unique(words, return_inverse=True)[1].astype(np.float64)


def _of_study(folder: pathlib.Path, storage: str | None, names: Collection[str]) -> Importance | None:
    """fANOVA (Hutter, Hoos & Leyton-Brown 2014) by optuna; None without a study of enough trials of these settings."""
    for study in studies(folder, storage):
        import optuna

        complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        if len(complete) < FEWEST or len(study.directions) != 1:
            continue
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        with contextlib.suppress(ValueError, RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
            if not set(found) & set(names):
                continue  # a study of numbered settings, say
            return Importance(
                f"fANOVA of optuna {optuna.__version__} over the {len(complete)} complete trials of its study",
                {name: float(share) for name, share in sorted(found.items(), key=lambda item: -item[1])},
            )
    return None
