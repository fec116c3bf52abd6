"""How well a recommender ranks the whole catalogue for users of a split, and baselines for the same users.

A task takes part that has one of:

- ``users(variables, batch)``, f32[B,D], and ``items(variables, items)``, f32[n,D], of what ``dataset.items(ids)`` says
  of items i32[n]: the score of an item is the product. Scores are made in chunks, so that the catalogue may be large;
- ``scores(variables, batch)``, f32[B,I+1], of the items from 1 on; what is said of 0 is not read.

The data set is one of ``data.sources.table.interactions``: what users had chosen before, and what they chose then.

Axes: B users of a batch, N of the split, S items they had chosen, T items they chose then, K places of a list, M drawn
items, D width, C items of a chunk, I items; item 0 is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bigbase_jax import parallel
from bigbase_jax.core import Batch, Evaluated, Figure, Metric, Table, Task, UserError
from bigbase_jax.evaluate import collect
from bigbase_jax.evaluators.baselines import Baseline, Scorer
from bigbase_jax.tasks.metrics import ranking

_SHOWN = 8  # users whose lists the report shows
_ATTEMPTS = 100  # to draw an item that a user has not chosen
_ORACLE = "the best possible"


@dataclasses.dataclass(frozen=True)
class Ranking:
    """A ``core.Evaluator``: every item that a user had not chosen is ranked, and where those are that were chosen then.

    Attributes:
      split: its name.
      ks: lengths of lists.
      limit: users, at most, spread evenly over the split; None: all.
      remove_seen: whether items that a user had chosen before are left out of lists, and of those before an item.
      negatives: M of the sampled protocol of Kang & McAuley 2018, measured beside: the item that was chosen next among
        so many others, drawn uniformly, with replacement, from those not chosen before. It flatters, and which of two
        models is better may turn around (Krichene & Rendle 2020). 0: it is left out.
      groups: of users, by how much they had chosen, each measured on its own.
      peers: baselines, fitted to train, and ranked for the same users.
      chunk: C.
      seed: of what is drawn.
      item_names, item_titles: of the items from 1 on; None: the data says it.
      final: see ``core.Evaluator``.

    Raises:
      UserError: a value out of its range.
    """

    split: str = "test"
    ks: tuple[int, ...] = (5, 10, 20)
    limit: int | None = None
    remove_seen: bool = True
    negatives: int = 100
    groups: int = 3
    peers: tuple[Baseline, ...] = ()
    chunk: int = 8192
    seed: int = 0
    item_names: tuple[str, ...] | None = None
    item_titles: tuple[str, ...] | None = None
    final: bool = True

    def __post_init__(self) -> None:
        for name, value in (("ks", min(self.ks, default=0)), ("groups", self.groups), ("chunk", self.chunk)):
            if value < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.negatives < 0 or (self.limit is not None and self.limit < 1):
            raise UserError(f"negatives is {self.negatives} and limit {self.limit}; they are at least 0 and 1.")

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """See ``core.Evaluator``; k of the second of ``ks``, or else the first, comes first."""
        ks = sorted(self.ks, key=lambda k: k != self.ks[:2][-1])
        found = {
            f"{name}@{k}": about._replace(title=f"{about.title}@{k}") for name, about in _METRICS.items() for k in ks
        }
        found["mrr"] = Metric("max", title="MRR")
        for name in self._sampled:
            found[f"sampled/{name}"] = found[name]._replace(title=f"{found[name].title}, {self.negatives} drawn")
        return found

    @property
    def _sampled(self) -> Sequence[str]:
        return [f"{name}@{k}" for k in self.ks for name in ("ndcg", "hr")] if self.negatives else []

    def run(self, task: Task, variables: Any, data: Any, mesh: Any) -> Evaluated:
        """See ``core.Evaluator``. Beside the metrics: ``users``; ``per_group``, by interactions before; and ``peers``.
        Examples: ``index``, ``rank`` i32[N,T] (0: no item), ``top`` i32[N,K], ``target`` i32[N] and
        ``history`` i32[N,S], the last few items chosen before.

        Raises:
          UserError: a data set or a task that cannot be ranked.
        """
        dataset = data.data.dataset
        source = dataset.splits[self.split]
        if not hasattr(source, "relevant"):
            raise UserError(f"{self.split} does not say what its users had chosen and chose then, as histories do.")
        of_batch, given = self._model(task, variables, data, mesh)
        found = self._ranked(of_batch, given, data, source, mesh)
        activity_N = (source.end - source.begin)[found["index"]]
        metrics: dict[str, Any] = {**self._measured(found, dataset), "users": len(activity_N)}
        of_N = ranking.of_users(found["rank"], self.ks)
        groups = ranking.by_activity(activity_N, self.groups)
        metrics["per_group"] = {
            name: {"users": int(group_N.sum()), **ranking.means({m: x_N[group_N] for m, x_N in of_N.items()})}
            for name, group_N in groups.items()
        }
        scorers = {peer.name: peer.fit(dataset.matrix()) for peer in self.peers}
        if self.peers and dataset.best is not None:
            scorers[_ORACLE] = dataset.best
        metrics["peers"] = {
            name: self._measured(self._ranked(_given_scores, None, data, source, mesh, scorer), dataset)
            for name, scorer in scorers.items()
        }
        shown = {
            "target": source.relevant(found["index"])[:, 0],
            "history": dataset.history(source.begin[found["index"]], source.end[found["index"]]),
        }
        return Evaluated(self.split, metrics, {**{name: found[name] for name in ("index", "rank", "top")}, **shown})

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """The baselines, groups of users, and some lists beside the histories."""
        metrics, ks = evaluated.metrics, self.ks
        k = ks[:2][-1]
        names = [f"ndcg@{k}", f"hr@{k}", "mrr", f"coverage@{k}", f"novelty@{k}", f"sampled/ndcg@{k}", f"sampled/hr@{k}"]
        names = [name for name in names if name in metrics]
        titles = [self.metrics[name].title or name for name in names]
        shares = [title for name, title in zip(names, titles, strict=True) if self.metrics[name].unit == "%"]
        rows = {"the model": metrics, **metrics.get("peers", {})}
        cells = [(name, *(row.get(metric) for metric in names)) for name, row in rows.items()]
        yield Table("Against baselines", ("", *titles), cells, _note(metrics, f"ndcg@{k}"), shares)
        names = [f"ndcg@{k}", f"hr@{k}", f"recall@{k}", "mrr"]
        titles = ["Users", *(self.metrics[name].title or name for name in names)]
        groups = metrics.get("per_group", {}).items()
        cells = [(group, row.get("users"), *(row.get(metric) for metric in names)) for group, row in groups]
        yield Table("By activity", ("Interactions before", *titles), cells, shares=[f"HR@{k}", f"Recall@{k}"])
        examples = evaluated.examples
        if {"top", "history", "target", "rank"} <= examples.keys():
            n = len(examples["top"])
            lists = [self._list(examples, i) for i in np.unique(np.linspace(0, n - 1, min(_SHOWN, n)).astype(int))]
            note = "What users had chosen last, what they are recommended, and what they chose then."
            yield Table("Recommended", ("Chosen before", "Recommended", "Chosen then", "Its rank"), lists, note)

    def _list(self, examples: Mapping[str, np.ndarray], i: int) -> tuple[str, str, str, int]:
        history = examples["history"][i]
        before, top = history[history > 0][-5:], examples["top"][i][:5]
        then, rank = examples["target"][i], int(examples["rank"][i, 0])
        return self._named(before), self._named(top[top > 0]), self._named([then]), rank

    def _named(self, items: Any) -> str:
        names, titles = self.item_names or (), self.item_titles or ()

        def of(i: int) -> str:
            title = titles[i - 1] if 0 < i <= len(titles) else ""
            return title or (names[i - 1] if 0 < i <= len(names) else f"item {i}")

        return "; ".join(map(of, map(int, items)))

    def _measured(self, found: Mapping[str, np.ndarray], dataset: Any) -> dict[str, float]:
        metrics = ranking.means(ranking.of_users(found["rank"], self.ks))
        metrics |= ranking.of_lists(found["top"], dataset.counts, self.ks)
        if self.negatives:
            sampled = ranking.means(ranking.of_users(found["sampled"], self.ks))
            metrics |= {f"sampled/{name}": sampled[name] for name in self._sampled}
        return metrics

    # -- on the device ---------------------------------------------------------------------------------------------

    def _model(self, task: Any, variables: Any, data: Any, mesh: Any) -> tuple[Callable[..., _Scores], Any]:
        """What gives the scores of a batch, from what is given beside it."""
        if not jax.tree.leaves(variables):
            raise UserError(f"--engine gives no scores of all items, which this ranks; try --split={self.split}.")
        if hasattr(task, "users") and hasattr(task, "items"):
            dataset, count = data.data.dataset, data.data.dataset.dataset_info["num_items"] + 1
            size = min(self.chunk, count) + -min(self.chunk, count) % parallel.shards(mesh)
            i, hosts = parallel.host(mesh)

            def catalogue() -> Iterator[dict[str, np.ndarray]]:
                for start in range(0, count, size):
                    ids = np.arange(start + size * i // hosts, start + size * (i + 1) // hosts)
                    real = ids < count
                    items = dataset.items(np.where(real, ids, 0))
                    yield {**items, "index": ids.astype(np.int32), "mask": real.astype(np.float32)}

            found = collect(lambda v, items: {"vector": task.items(v, items)}, variables, catalogue(), mesh)
            items_XD = np.pad(found["vector"], ((0, -count % size), (0, 0)))
            items = jax.device_put(items_XD, NamedSharding(mesh, PartitionSpec()))
            return lambda given, batch: _products(task.users(given[0], batch), given[1], size, count), (
                variables,
                items,
            )
        if hasattr(task, "scores"):
            return lambda given, batch: _whole(task.scores(given, batch)), variables
        raise UserError(f"{type(task).__name__} has neither users and items nor scores, so that it ranks nothing.")

    def _ranked(
        self,
        of_batch: Callable[..., _Scores],
        given: Any,
        data: Any,
        source: Any,
        mesh: Any,
        scorer: Scorer | None = None,
    ) -> dict[str, np.ndarray]:
        """``index``, ``rank`` i32[N,T], ``top`` i32[N,K] and, if anything is drawn, ``sampled`` i32[N,1]."""

        def step(given: Any, batch: Batch) -> dict[str, jax.Array]:
            scores = of_batch(given, batch)
            gone = batch["seen"] if self.remove_seen else jnp.zeros((len(batch["seen"]), 1), jnp.int32)
            rank_BT, top_BK = _rank(scores, gone, batch["relevant"], max(self.ks))
            found = {"rank": rank_BT, "top": top_BK}
            return found | ({"sampled": _rank_of_first(scores, batch["drawn"])} if self.negatives else {})

        most = {"seen": (source.end - source.begin).max(), "relevant": (source.stop - source.end).max()}

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for batch in data.eval_batches(self.split, parallel.host(mesh), self.limit):
                index = batch["index"]
                own = {"seen": source.seen(index), "relevant": source.relevant(index)}
                if self.negatives:
                    drawn = self._drawn(own["seen"], index, data.dataset_info["num_items"])
                    batch["drawn"] = np.concatenate([own["relevant"][:, :1], drawn], 1)
                batch |= {name: _widened(x, int(most[name])) for name, x in own.items()}
                yield batch | ({"scores": scorer(own["seen"]).astype(np.float32)} if scorer is not None else {})

        return collect(step, given, batches(), mesh)

    def _drawn(self, seen_BS: np.ndarray, index_B: np.ndarray, items: int) -> np.ndarray:
        """i32[B,M]: for a user of this index always the same, whatever the batch; 0 where all items were chosen."""
        width = items + 1
        place_BM = index_B.astype(np.uint64)[:, None] * np.uint64(self.negatives) + np.arange(
            self.negatives, dtype=np.uint64
        )
        row_B = np.arange(len(index_B))[:, None] * width
        own = np.unique(row_B + seen_BS)
        drawn_BM = np.zeros(place_BM.shape, np.int64)
        for attempt in range(_ATTEMPTS):
            again = np.isin(row_B + drawn_BM, own) | (drawn_BM == 0)
            if not again.any():
                break
            bits = _mixed(place_BM[again] * np.uint64(_ATTEMPTS) + np.uint64(attempt), self.seed)
            drawn_BM[again] = 1 + (bits % np.uint64(items)).astype(np.int64)
        return np.where(np.isin(row_B + drawn_BM, own), 0, drawn_BM).astype(np.int32)


_METRICS = {
    "ndcg": Metric("max", title="NDCG"),
    "hr": Metric("max", "%", "HR"),
    "recall": Metric("max", "%", "Recall"),
    "coverage": Metric("max", "%", "Coverage"),
    "novelty": Metric(None, "bits", "Novelty"),
}


class _Scores(NamedTuple):
    """Scores of all items for the users of a batch.

    Attributes:
      size: C.
      number: of items, with item 0.
      chunk: f32[B,C], of the items from a place on.
      of: f32[B,T], of items i32[B,T].
    """

    size: int
    number: int
    chunk: Callable[[Any], jax.Array]
    of: Callable[[jax.Array], jax.Array]


def _whole(scores_BX: jax.Array) -> _Scores:
    """Given all at once, f32[B,I+1]."""
    count = scores_BX.shape[1]
    return _Scores(count, count, lambda start: scores_BX, lambda items_BT: jnp.take_along_axis(scores_BX, items_BT, 1))


def _products(users_BD: jax.Array, items_XD: jax.Array, size: int, count: int) -> _Scores:
    """Of vectors f32[B,D] and f32[X,D], X items rounded up to whole chunks."""

    def chunk(start: Any) -> jax.Array:
        items_CD = jax.lax.dynamic_slice_in_dim(items_XD, start, size)
        return jnp.einsum("bd,cd->bc", users_BD, items_CD, preferred_element_type=jnp.float32)

    def of(items_BT: jax.Array) -> jax.Array:
        return jnp.einsum("bd,btd->bt", users_BD, items_XD[items_BT], preferred_element_type=jnp.float32)

    return _Scores(size, count, chunk, of)


def _given_scores(_: Any, batch: Batch) -> _Scores:
    return _whole(jnp.asarray(batch["scores"]))


def _rank(scores: _Scores, gone_BS: Any, relevant_BT: Any, K: int) -> tuple[jax.Array, jax.Array]:
    """(i32[B,T], ranks of the relevant items among all but item 0 and what is gone, 0 for item 0; i32[B,K], the items
    that come first, 0 where there are fewer). NaN counts as the lowest of scores."""
    B, T = relevant_BT.shape
    C, K = scores.size, min(K, scores.number - 1)
    rows_B1 = jnp.arange(B)[:, None]
    own_BT = _plain(scores.of(relevant_BT))

    def add(carry: Any, start: jax.Array) -> Any:
        ahead_BT, equal_BT, best_BK, top_BK = carry
        place_BS = jnp.where((gone_BS >= start) & (gone_BS < start + C), gone_BS - start, C)
        item_C = start + jnp.arange(C)
        open_BC = jnp.broadcast_to((item_C > 0) & (item_C < scores.number), (B, C))
        open_BC = open_BC.at[rows_B1, place_BS].set(False, mode="drop")
        score_BC = _plain(scores.chunk(start))

        def against(own_B_item_B: Any) -> tuple[jax.Array, jax.Array]:
            own_B, item_B = own_B_item_B
            other_BC = open_BC & (item_C != item_B[:, None])
            ahead_B = jnp.sum(other_BC & (score_BC > own_B[:, None]), 1)
            return ahead_B, jnp.sum(other_BC & (score_BC == own_B[:, None]), 1)

        more_TB, same_TB = jax.lax.map(against, (own_BT.T, relevant_BT.T))
        k = min(K, C)
        best_Bk, place_Bk = jax.lax.top_k(jnp.where(open_BC, score_BC, -jnp.inf), k)
        best_BX = jnp.concatenate([best_BK, best_Bk], 1)
        top_BX = jnp.concatenate([top_BK, jnp.where(jnp.take_along_axis(open_BC, place_Bk, 1), start + place_Bk, 0)], 1)
        best_BK, place_BK = jax.lax.top_k(best_BX, K)
        top_BK = jnp.take_along_axis(top_BX, place_BK, 1)
        return (ahead_BT + more_TB.T, equal_BT + same_TB.T, best_BK, top_BK), None

    none_BT = jnp.zeros((B, T), jnp.int32)
    carry = (none_BT, none_BT, jnp.full((B, K), -jnp.inf), jnp.zeros((B, K), jnp.int32))
    starts = jnp.arange(0, scores.number, C)
    (ahead_BT, equal_BT, _, top_BK), _ = jax.lax.scan(add, carry, starts) if len(starts) > 1 else add(carry, starts[0])
    return jnp.where(relevant_BT > 0, 1 + ahead_BT + equal_BT // 2, 0), top_BK


def _rank_of_first(scores: _Scores, items_BM: Any) -> jax.Array:
    """i32[B,1]: the rank of the first item among all of them; 0 among the others is none."""
    score_BM = _plain(scores.of(items_BM))
    other_BM, own_B1 = items_BM[:, 1:] > 0, score_BM[:, :1]
    ahead_B1 = jnp.sum(other_BM & (score_BM[:, 1:] > own_B1), 1, keepdims=True)
    return 1 + ahead_B1 + jnp.sum(other_BM & (score_BM[:, 1:] == own_B1), 1, keepdims=True) // 2


def _plain(scores: jax.Array) -> jax.Array:
    """In f32, the lowest finite number for NaN and -inf: what is scored so is still ahead of what is left out."""
    low = jnp.finfo(jnp.float32).min
    return jnp.nan_to_num(scores.astype(jnp.float32), nan=low, neginf=low)


def _widened(x_BS: np.ndarray, most: int) -> np.ndarray:
    """With 0 behind, up to a power of four, so that few widths are compiled; alike in all processes."""
    width = most if jax.process_count() > 1 else min(4 ** int(np.ceil(np.log(x_BS.shape[1]) / np.log(4))), most)
    return np.pad(x_BS, ((0, 0), (0, max(width, x_BS.shape[1]) - x_BS.shape[1])))


def _mixed(bits: np.ndarray, seed: int) -> np.ndarray:
    """u64 -> u64 that look random: SplitMix64 (Steele et al. 2014)."""
    bits = (bits + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % 2**64)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _note(metrics: Mapping[str, Any], name: str) -> str:
    """Whether a baseline wins, in words."""
    peers = {peer: row[name] for peer, row in metrics.get("peers", {}).items() if peer != _ORACLE}
    if not peers:
        return ""
    best = max(peers, key=lambda peer: peers[peer])
    return f"By {name}, {'the model' if metrics[name] > peers[best] else best} is best."
