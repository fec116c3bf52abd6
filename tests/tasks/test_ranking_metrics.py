"""Ranking metrics against cases by hand, scikit-learn and a slow reference."""

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from bigbase_jax.tasks.metrics import ranking


def test_by_hand():
    found = ranking.of_users(np.array([[1, 4], [3, 0], [11, 2]]), (2, 3))
    assert found["hr@2"].tolist() == [1, 0, 1] and found["hr@3"].tolist() == [1, 1, 1]
    assert found["recall@3"].tolist() == [0.5, 1, 0.5]
    ideal = 1 + 1 / np.log2(3)
    np.testing.assert_allclose(found["ndcg@2"], [1 / ideal, 0, 1 / np.log2(3) / ideal])
    np.testing.assert_allclose(found["ndcg@3"], [1 / ideal, 0.5, 1 / np.log2(3) / ideal])
    np.testing.assert_allclose(found["mrr"], [1, 1 / 3, 1 / 2])
    assert ranking.means(found)["hr@2"] == pytest.approx(2 / 3)


def test_ndcg_is_that_of_scikit_learn():
    random = np.random.default_rng(0)
    score_NI = random.permuted(np.tile(np.arange(30.0), (40, 1)), axis=1)
    relevant_NI = random.random((40, 30)) < 0.15
    relevant_NI[:, 0] = True
    rank_NI = (-score_NI).argsort(1).argsort(1) + 1
    rank_NT = np.where(relevant_NI, rank_NI, 0)
    assert len(set(relevant_NI.sum(1))) > 3
    for k in (1, 5, 10):
        found = ranking.of_users(rank_NT, (k,))[f"ndcg@{k}"].mean()
        assert found == pytest.approx(ndcg_score(relevant_NI, score_NI, k=k), abs=1e-12)


def test_lists():
    top_NK = np.array([[1, 2, 3], [1, 4, 0]])
    count_I = np.array([0, 6, 1, 1, 0, 0])  # the last item is never listed, the one before has no interaction
    found = ranking.of_lists(top_NK, count_I, (1, 3))
    assert found["coverage@1"] == 1 / 5 and found["coverage@3"] == 4 / 5
    assert found["novelty@1"] == pytest.approx(-np.log2(6 / 8))
    assert found["novelty@3"] == pytest.approx((2 * -np.log2(6 / 8) + 3 * 3) / 5)


def test_groups_hold_each_user_once():
    activity_N = np.array([1, 1, 1, 1, 2, 3, 8, 9, 40])
    found = ranking.by_activity(activity_N, 3)
    assert list(found) == ["1", "2 to 3", "4 to 40"]
    assert np.sum(list(found.values()), 0).tolist() == [1] * 9
    assert list(ranking.by_activity(np.full(4, 7), 3)) == ["7"]
