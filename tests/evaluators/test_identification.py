"""Identification: ranks and open-set errors against their definitions, one at a time; and what is enrolled."""

import types

import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.evaluate import Split
from bigbase_jax.evaluators.identification import Identification
from bigbase_jax.tasks.metrics import identification, verification


def test_a_person_has_the_best_score_of_their_photos_and_ties_are_no_help():
    score = np.array([[0.1, 0.9, 0.4, 0.4], [0.5, 0.5, 0.5, 0.5]])
    of, people = identification.of_people(score, np.array([7, 3, 7, 5]))
    assert people.tolist() == [3, 5, 7] and of.tolist() == [[0.9, 0.4, 0.4], [0.5, 0.5, 0.5]]
    assert identification.ranks(of, np.array([2, 0])).tolist() == [3, 3]  # a model that says one thing finds nobody
    assert identification.ranks(of, np.array([0, 0])).tolist() == [1, 3]


def test_open_set_errors_are_counts_at_each_threshold():
    rng = np.random.default_rng(0)
    rank, best, stranger = rng.integers(1, 4, 200), rng.normal(1, 1, 200).round(1), rng.normal(0, 1, 100).round(1)
    fpir, fnir, threshold = identification.curve(rank, best, stranger)
    assert (np.diff(threshold) < 0).all() and fpir[0] == 0 and fnir[0] == 1 and len(set(fpir)) > 20
    for f, m, t in zip(fpir, fnir, threshold, strict=True):
        assert f == pytest.approx(np.mean(stranger >= t))
        assert m == pytest.approx(np.mean(~((rank == 1) & (best >= t))))
    found = identification.scores(rank, best, stranger, 0.05)
    assert np.mean(stranger >= found["threshold"]) <= 0.05 < np.mean(stranger >= found["threshold"] - 0.11)
    assert found["fnir"] == pytest.approx(np.mean(~((rank == 1) & (best >= found["threshold"]))))
    assert found["rank1"] == pytest.approx(np.mean(rank == 1)) and found["rank5"] == 1
    assert set(identification.scores(rank, best, np.empty(0))) == {"rank1", "rank5"}


def test_who_has_no_photo_left_to_be_searched_by_is_not_enrolled():
    chosen = identification.first_photos([4, 4, 4, 2, 9, 9], 2)
    assert chosen.tolist() == [True, True, False, False, False, False]
    assert identification.first_photos([4, 4, 2], 1).tolist() == [True, False, False]


def of(monkeypatch, splits, **words):
    """What an evaluator finds of vectors and labels by split."""

    def run(self, *_):
        vector, label = splits[self.split]
        return types.SimpleNamespace(examples={"vector": np.asarray(vector, np.float32), "label": np.asarray(label)})

    monkeypatch.setattr(Split, "run", run)
    evaluator = Identification(**words)
    return evaluator, evaluator.run(None, None, types.SimpleNamespace(splits=splits), None)


def test_probes_are_found_and_strangers_are_told(monkeypatch):
    photos = [[1, 0], [2, 0.2], [0, 1], [0.1, 3], [-1, 0.1]], [0, 0, 1, 1, 2]
    evaluator, found = of(monkeypatch, {"test": photos})
    assert found.metrics["rank1"] == 1 and found.metrics["people"] == 2 and found.metrics["strangers"] == 1
    assert found.metrics["fnir"] == 0 and found.metrics["threshold"] > 0.9
    assert [figure.title for figure in evaluator.figures(found)] == ["Cumulative match", "Open set"]
    _, half = of(monkeypatch, {"test": photos}, strangers=0.5)
    assert half.metrics["people"] == half.metrics["probes"] == 1 and half.metrics["strangers"] == 2
    enrolled = {"train": ([[1, 0], [0, 1]], [5, 6]), "test": ([[0.9, 0.1], [1, 0.2]], [5, 6])}
    evaluator, found = of(monkeypatch, enrolled, gallery="train")
    assert found.metrics["rank1"] == 0.5 and found.examples["rank"].tolist() == [1, 2]
    assert "fnir" not in found.metrics and len(list(evaluator.figures(found))) == 1
    with pytest.raises(UserError, match="nobody is both enrolled and searched"):
        of(monkeypatch, {"test": ([[1, 0], [0, 1]], [0, 1])})
    assert Identification(split="val", gallery="train").needs == ("val", "train")


def test_true_accepts_are_counted_at_the_lowest_threshold_that_is_strict_enough():
    score = np.array([5, 4, 3, 2, 1, 0.0])
    same = np.array([1, 0, 1, 1, 0, 0])
    assert verification.true_accepts(score, same, 0.0) == pytest.approx(1 / 3)
    assert verification.true_accepts(score, same, 0.34) == 1
