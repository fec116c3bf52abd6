"""The ranking of a whole catalogue against a slow one, and baselines against their definitions."""

import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from bigbase_jax import parallel
from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.synthetic.interactions import SyntheticInteractions
from bigbase_jax.data.sources.table.interactions import InteractionFiles
from bigbase_jax.evaluators.baselines import ALS, ItemKNN, Popularity
from bigbase_jax.evaluators.ranking import Ranking
from bigbase_jax.tasks.metrics import ranking

ITEMS = 23


@pytest.fixture(scope="module", params=["last", "time"])
def data(request):
    made = SyntheticInteractions(
        users=30, num_items=ITEMS, groups=3, split=request.param, val_fraction=0.2, test_fraction=0.2
    )
    return Data(made, batch_size=8, eval_batch_size=8, cache_limit_gb=0.0).prepare(lambda line: None)


class Vectors:
    """Users and items as vectors; many scores are the same, some are NaN."""

    def users(self, variables, batch):
        return jnp.sum(variables["items"][batch["history"]], 1) + batch["user"][:, None]

    def items(self, variables, items):
        return variables["items"][items["item"]]


class Scores(Vectors):
    def __init__(self):
        self.inner = Vectors()

    def scores(self, variables, batch):
        return self.inner.users(variables, batch) @ variables["items"].T

    users = property()  # there is none


VARIABLES = {
    "items": jnp.asarray(np.random.default_rng(0).integers(-2, 3, (ITEMS + 1, 3)), jnp.float32).at[5].set(jnp.nan)
}


def slow(data, evaluator):
    """Ranks and lists, one user and one item after another."""
    source = data.data.dataset.splits[evaluator.split]
    items = np.asarray(VARIABLES["items"])
    ranks, tops = [], []
    for n in range(len(source)):
        seen, relevant = (f(np.array([n]))[0] for f in (source.seen, source.relevant))
        seen = set(seen.tolist()) if evaluator.remove_seen else set()
        x = items[source[n]["history"]].sum(0) + source[n]["user"]
        score = {i: float(x @ items[i]) for i in range(1, ITEMS + 1)}
        score = {i: -np.inf if np.isnan(s) else s for i, s in score.items()}
        there = [i for i in score if i not in seen]
        ranks.append([])
        for item in filter(None, relevant.tolist()):
            others = [i for i in there if i != item]
            equal = sum(score[i] == score[item] for i in others)
            ranks[-1].append(1 + sum(score[i] > score[item] for i in others) + equal // 2)
        tops.append(sorted(there, key=lambda i: (-score[i], i))[: max(evaluator.ks)])
    return ranks, tops


@pytest.mark.parametrize("task", [Vectors(), Scores()], ids=["vectors", "scores"])
@pytest.mark.parametrize(("chunk", "remove_seen"), [(4, True), (64, False)])
def test_the_whole_catalogue_is_ranked(data, task, chunk, remove_seen):
    evaluator = Ranking(ks=(1, 3, 7), chunk=chunk, remove_seen=remove_seen, groups=2)
    found = evaluator.run(task, VARIABLES, data, parallel.make_mesh())
    ranks, tops = slow(data, evaluator)
    kept = found.examples
    assert [[r for r in row if r > 0] for row in kept["rank"].tolist()] == ranks
    assert [[i for i in row if i > 0] for row in kept["top"].tolist()] == tops
    assert kept["index"].tolist() == list(range(len(ranks)))
    most = max(map(len, ranks))
    padded = np.array([row + [0] * (most - len(row)) for row in ranks])
    for name, x in ranking.means(ranking.of_users(padded, (1, 3, 7))).items():
        assert found.metrics[name] == pytest.approx(x), name
    assert found.metrics["coverage@3"] == len({i for top in tops for i in top[:3]}) / ITEMS
    groups = found.metrics["per_group"].values()
    assert sum(group["users"] for group in groups) == len(ranks) == found.metrics["users"]
    mean = sum(group["users"] * group["hr@7"] for group in groups) / len(ranks)
    assert mean == pytest.approx(found.metrics["hr@7"])
    assert set(found.metrics) - {"users", "per_group", "peers"} == set(evaluator.metrics)
    json.dumps(found.metrics)


def test_a_hundred_are_drawn_as_published(data):
    evaluator = Ranking(ks=(1, 10))
    source, mesh = data.data.dataset.splits["test"], parallel.make_mesh()
    every = np.arange(len(source))
    drawn = evaluator._drawn(source.seen(every), every, ITEMS)
    for n, row in enumerate(drawn):
        free = set(range(1, ITEMS + 1)) - set(source.seen(np.array([n]))[0].tolist())
        assert set(row.tolist()) <= free and len(set(row.tolist())) > 0.8 * len(free)
    assert (evaluator._drawn(source.seen(every[3:5]), every[3:5], ITEMS) == drawn[3:5]).all()  # whatever the batch
    assert (Ranking(seed=1)._drawn(source.seen(every), every, ITEMS) != drawn).mean() > 0.8
    counts = np.bincount(Ranking(negatives=20000)._drawn(np.array([[2, 4]]), np.array([0]), 5)[0], minlength=6)
    assert counts[[0, 2, 4]].tolist() == [0, 0, 0] and abs(counts[[1, 3, 5]] / 20000 - 1 / 3).max() < 0.02
    assert (evaluator._drawn(np.array([[1, 2, 3]]), np.array([0]), 3) == 0).all()  # nothing is left to draw

    items, ranks = np.asarray(VARIABLES["items"]), []
    for n in every:
        target = source.relevant(np.array([n]))[0, 0]
        x = items[source[n]["history"]].sum(0) + source[n]["user"]
        score = np.nan_to_num(items[[target, *drawn[n]]] @ x, nan=-1e9)
        ranks.append([1 + (score[1:] > score[0]).sum() + (score[1:] == score[0]).sum() // 2])
    expected = ranking.means(ranking.of_users(np.array(ranks), (1, 10)))
    found = evaluator.run(Vectors(), VARIABLES, data, mesh).metrics
    for name in ("hr@1", "hr@10", "ndcg@10"):
        assert found[f"sampled/{name}"] == pytest.approx(expected[name])


def test_peers_and_the_best_possible(data):
    evaluator = Ranking(ks=(3,), peers=(Popularity(), ItemKNN(), ALS(factors=4, iterations=2)), negatives=0)
    found = evaluator.run(Vectors(), VARIABLES, data, parallel.make_mesh())
    peers, dataset = found.metrics["peers"], data.data.dataset
    known = ["the best possible"] if dataset.best is not None else []
    assert list(peers) == ["popularity", "item-kNN", "ALS", *known]
    if known:
        assert peers["the best possible"]["ndcg@3"] == max(peer["ndcg@3"] for peer in peers.values())
    test = dataset.splits["test"]
    seen, relevant = (f(np.arange(len(test))) for f in (test.seen, test.relevant))
    hits = []
    for gone, then in zip(seen.tolist(), relevant.tolist(), strict=True):
        left = [i for i in range(1, ITEMS + 1) if i not in gone]
        order = sorted(left, key=lambda i: -dataset.counts[i])
        hits.append(bool(set(order[:3]) & set(then)))
    ties = any((np.diff(np.sort(dataset.counts[1:])) == 0).tolist())
    assert peers["popularity"]["hr@3"] == pytest.approx(np.mean(hits), abs=0.15 if ties else 1e-9)
    figures = list(evaluator.figures(found))
    assert [figure.title for figure in figures] == ["Against baselines", "By activity", "Recommended"]
    assert [row[0] for row in figures[0].rows] == ["the model", *peers] and "is best" in figures[0].note
    assert figures[2].rows[0][0].startswith("item ")
    named = Ranking(ks=(3,), item_names=dataset.dataset_info["item_names"])
    assert list(named.figures(found))[2].rows[0][2].startswith("thing ")


def test_what_cannot_be_ranked_is_said(data):
    mesh = parallel.make_mesh()
    with pytest.raises(UserError, match="does not say what its users had chosen"):
        Ranking(split="train").run(Vectors(), VARIABLES, data, mesh)
    with pytest.raises(UserError, match="ranks nothing"):
        Ranking().run(object(), VARIABLES, data, mesh)
    with pytest.raises(UserError, match="ks is"):
        Ranking(ks=())


def interactions():
    return scipy.sparse.csr_matrix(
        np.random.default_rng(0).poisson(0.3, (40, 12)).astype(np.float32) * (np.arange(12) > 0)
    )


def test_als_is_the_minimum_of_its_objective():
    r_UI, als = interactions(), ALS(factors=5, regularisation=0.3, alpha=4.0, iterations=3, steps=30)
    _, y_ID = als.factorise(r_UI)
    x_UD = als.solve(r_UI, y_ID, np.zeros((40, 5), np.float32), 60)
    for u, row in enumerate((r_UI.toarray() > 0).astype(float)):  # Hu et al. 2008, equation 4
        c_I = 1 + 4.0 * row
        exact = np.linalg.solve(y_ID.T * c_I @ y_ID + 0.3 * np.eye(5), y_ID.T @ (c_I * row))
        np.testing.assert_allclose(x_UD[u], exact, atol=2e-4)
    history = np.array([[1, 2, 2, 0], [0, 0, 0, 0]])
    scores = als.fit(r_UI)(history)
    assert scores.shape == (2, 12) and (scores[1] == 0).all() and scores[0, [1, 2]].min() > np.median(scores[0])


def test_als_and_neighbours_do_not_depend_on_blocks(monkeypatch):
    r_UI, als, knn = interactions(), ALS(factors=3, iterations=2), ItemKNN(neighbours=4)
    whole, similar = als.factorise(r_UI), knn.similarities(r_UI).toarray()
    monkeypatch.setattr("bigbase_jax.evaluators.baselines._BLOCK", 20)
    for a, b in zip(als.factorise(r_UI), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_allclose(knn.similarities(r_UI).toarray(), similar, rtol=1e-6)


def test_neighbours_are_those_of_the_shrunk_cosine():
    r_UI = interactions()
    x_UI = (r_UI.toarray() > 0).astype(float)
    length_I = np.sqrt(x_UI.sum(0))
    similar = x_UI.T @ x_UI / (np.outer(length_I, length_I) + 2.0)
    np.fill_diagonal(similar, 0)
    order = np.argsort(-similar, 1, kind="stable")[:, :3]
    kept = np.zeros_like(similar)
    np.put_along_axis(kept, order, np.take_along_axis(similar, order, 1), 1)
    np.testing.assert_allclose(ItemKNN(3, 2.0).similarities(r_UI).toarray(), kept, rtol=1e-5)
    history = np.array([[4, 7, 0], [4, 4, 7]])
    scores = ItemKNN(3, 2.0).fit(r_UI)(history)
    np.testing.assert_allclose(scores, np.stack([kept[4] + kept[7]] * 2), rtol=1e-5)


@pytest.mark.realdata
def test_popularity_on_games_is_as_published(tmp_path):
    """Kang & McAuley 2018, table III: PopRec has HR@10 0.4724 and NDCG@10 0.2779 among 100 drawn items."""
    if "BIGBASE_DATA" not in os.environ:
        pytest.skip("BIGBASE_DATA is not set")
    root = pathlib.Path(os.environ["BIGBASE_DATA"]) / "amazon_video_games_sasrec"
    games = Data(InteractionFiles(root=str(root)), batch_size=8, eval_batch_size=256, cache_limit_gb=0.0)
    prepared = games.prepare(lambda line: None)
    assert (prepared.dataset_info["num_users"], prepared.dataset_info["num_items"]) == (31013, 23715)
    evaluator = Ranking(ks=(10,), limit=3000, peers=(Popularity(),))
    variables = {"items": jnp.zeros((23716, 3))}
    found = evaluator.run(Vectors(), variables, prepared, parallel.make_mesh()).metrics
    assert found["hr@10"] == found["sampled/hr@10"] == 0  # what says nothing gains nothing
    popularity = found["peers"]["popularity"]
    assert popularity["sampled/hr@10"] == pytest.approx(0.4724, abs=0.03)
    assert popularity["sampled/ndcg@10"] == pytest.approx(0.2779, abs=0.03)
