"""Clicks that are made up: their best scores are those of the probabilities that drew them, and faults are told."""

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from bigbase_jax.core import UserError
from bigbase_jax.data.sources.synthetic.clicks import SyntheticClicks, best_scores


def test_the_best_scores_are_what_the_probabilities_reach_on_average():
    random = np.random.default_rng(0)
    p = random.beta(1, 3, 300)
    auc, loss = best_scores(p)
    drawn = [random.random(300) < p for _ in range(400)]
    aucs, losses = ([score(y, p) for y in drawn] for score in (roc_auc_score, log_loss))
    assert abs(np.mean(aucs) - auc) < 4 * np.std(aucs) / 20
    assert abs(np.mean(losses) - loss) < 4 * np.std(losses) / 20
    # pair by pair, by the definition
    first = p[:40]
    above, pairs = 0.0, 0.0
    for i, a in enumerate(first):
        for j, b in enumerate(first):
            if i != j:
                pairs += a * (1 - b)
                above += a * (1 - b) * (a > b)
    np.testing.assert_allclose(best_scores(first)[0], above / pairs)


def test_the_log_is_seeded_split_by_time_and_scored_by_its_test_rows(tmp_path):
    source = SyntheticClicks(count=4000, users=20, items=10)
    data = source.prepare(tmp_path, 1e9, print)
    columns, p_N = source.log()
    again, _ = SyntheticClicks(count=4000, users=20, items=10).log()
    assert all((columns[name] == again[name]).all() for name in columns)
    assert (columns["user"] != SyntheticClicks(count=4000, users=20, items=10, seed=1).log()[0]["user"]).any()
    assert max(data.rows["train"]) < min(data.rows["val"]) <= max(data.rows["val"]) < min(data.rows["test"])
    assert data.dataset_info["cardinalities"] == (21, 11, 21, 5)
    auc, loss = best_scores(p_N[data.rows["test"]])
    assert (data.dataset_info["best_auc"], data.dataset_info["best_loss"]) == (auc, loss)
    assert f"AUC {auc:.4f}" in data.description
    label = data.splits["test"].labels
    assert abs(roc_auc_score(label, p_N[data.rows["test"]]) - auc) < 0.05


def test_a_log_of_nothing_is_refused():
    with pytest.raises(UserError, match="at least 100 rows"):
        SyntheticClicks(users=1)
