"""Captions and pictures that find each other over a whole split, and labels that find pictures.

Axes: N pictures, C captions of a picture, M captions in all, E width of the vectors, K labels, n pictures of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.compare.statistics import wilson
from bigbase_jax.core import Card, Evaluated, Figure, Gallery, Metric, Table, Task, UserError
from bigbase_jax.evaluate import Split, collect
from bigbase_jax.parallel import host
from bigbase_jax.tasks import figures, textual
from bigbase_jax.tasks.metrics import classes

WAYS = {"image_to_text": "a caption of a picture", "text_to_image": "the picture of a caption"}
_CHUNK, _SHOWN = 512, 3


@dataclasses.dataclass(frozen=True)
class CaptionRetrieval:
    """A ``core.Evaluator`` of how often the right one is among the first K: of all captions of the split for a picture
    (R@K counts a picture whose best caption is among them), and of all its pictures for a caption; as Karpathy &
    Fei-Fei (2015) and all who report Flickr8k, Flickr30k and COCO.

    Those of equal score share their ranks. With each number comes ``chance``, what random order gives, and an interval
    of 95 % by the bootstrap over pictures, whose captions are not independent.

    Attributes:
      split: its name.
      ks: K.
      resamples: of the bootstrap; 0: there are no intervals.
      tokenizer: ``Tokenizer.state()``, for what is shown.
    """

    split: str = "test"
    ks: tuple[int, ...] = (1, 5, 10)
    resamples: int = 2000
    tokenizer: str | None = None
    final: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "ks", tuple(self.ks))

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """See ``core.Evaluator``."""
        named = {
            f"{way}_r@{k}": Metric("max", "%", f"Recall@{k}, {way.replace('_', ' ')}") for way in WAYS for k in self.ks
        }
        return {**named, "mean_recall": Metric("max", "%")}

    def run(self, task: Task, variables: Any, data: Any, mesh: Any) -> Evaluated:
        """See ``core.Evaluator``. Keeps of each picture the ``rank`` of its best caption, ``caption_rank`` i32[N,C] of
        the picture for each caption (0: there is none), and ``best`` i32[N,3] captions with their ``score``.

        Raises:
          UserError: the task gives no vectors of captions.
        """
        examples = Split(self.split).run(task, variables, data, mesh).examples
        if "vector" not in examples or "captions" not in examples:
            raise UserError(
                "CaptionRetrieval needs a task that gives vectors of pictures and of captions; leave it out."
            )
        real_NC = np.asarray((examples["tokens"] >= 0).any(-1))
        found = ranks(examples["vector"], examples["captions"], real_NC)
        rank_N, rank_NC = found["rank"], found["caption_rank"]
        metrics = self.recalls(rank_N, rank_NC, real_NC)
        kept = {**found, "index": examples["index"], "tokens": examples["tokens"]}
        return Evaluated(self.split, {**metrics, "pictures": len(rank_N), "captions": int(real_NC.sum())}, kept)

    def recalls(self, rank_N: np.ndarray, rank_NC: np.ndarray, real_NC: np.ndarray) -> dict[str, Any]:
        """R@K both ways, with ``_low``, ``_high`` and ``_chance`` of each, and ``mean_recall``."""
        N, M, count_N = len(rank_N), int(real_NC.sum()), real_NC.sum(1)
        drawn_RN = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), self.resamples)
        found: dict[str, Any] = {}
        for way in WAYS:
            for k in self.ks:
                if way == "image_to_text":
                    hit_N, weight_N = (rank_N <= k).astype(float), np.ones(N)
                    chance = float(np.mean([_any_of(int(c), M, k) for c in count_N]))
                else:
                    hit_N, weight_N = ((rank_NC <= k) & real_NC).sum(1).astype(float), count_N.astype(float)
                    chance = min(k / N, 1.0)
                name = f"{way}_r@{k}"
                found |= {name: float(hit_N.sum() / max(weight_N.sum(), 1)), f"{name}_chance": chance}
                if self.resamples:
                    share_R = (drawn_RN @ hit_N) / np.maximum(drawn_RN @ weight_N, 1)
                    found[f"{name}_low"], found[f"{name}_high"] = np.quantile(share_R, [0.025, 0.975]).tolist()
        found["mean_recall"] = float(np.mean([found[f"{way}_r@{k}"] for way in WAYS for k in self.ks]))
        return found

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """R@K as a table, and pictures with the captions that were found, those whose own came last first."""
        m = evaluated.metrics
        rows = [
            (what, k, *(m.get(f"{way}_r@{k}{end}") for end in ("", "_low", "_high", "_chance")))
            for way, what in WAYS.items()
            for k in self.ks
        ]
        columns = ("Is among the first", "K", "Recall", "from", "to", "by chance")
        yield Table("Retrieval", columns, rows, "95 % by the bootstrap over pictures", columns[2:])
        x = evaluated.examples
        if not {"rank", "best", "tokens", "index"} <= x.keys():
            return
        C = x["tokens"].shape[1]

        def text(number: int) -> str:
            tokens_L = x["tokens"][number // C, number % C]
            return textual.text_of(self.tokenizer, tokens_L[tokens_L >= 0])

        order = np.argsort(-x["rank"], kind="stable")
        some = order[np.linspace(0, len(order) - 1, min(len(order), figures.SHOWN)).astype(int)]
        cards = [
            Card(
                int(x["index"][n]),
                " | ".join(text(number) for number in x["best"][n].tolist())
                + f" (its own: {x['rank'][n]:.0f}. of all, {text(n * C)})",
                bool(x["best"][n, 0] // C == n),
            )
            for n in some
        ]
        yield Gallery("Captions found for pictures", cards, "From the worst to the best.")


def ranks(vector_NE: np.ndarray, caption_NCE: np.ndarray, real_NC: np.ndarray) -> dict[str, np.ndarray]:
    """See ``CaptionRetrieval.run``: ``rank`` f32[N], ``caption_rank`` f32[N,C], ``best`` i32[N,3], ``score`` f32[N,3].

    Captions are numbered n * C + c.
    """
    N, C, _ = caption_NCE.shape
    at_M = np.flatnonzero(real_NC.ravel())
    caption_ME = np.asarray(caption_NCE.reshape(N * C, -1)[at_M], np.float32)
    owner_M = at_M // C
    own_M = np.einsum("me,me->m", caption_ME, vector_NE[owner_M])
    more_M, same_M = np.zeros(len(at_M)), np.zeros(len(at_M))
    rank_N, best_N3, score_N3 = np.zeros(N, np.float32), np.zeros((N, _SHOWN), np.int32), np.zeros((N, _SHOWN))
    for start in range(0, N, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, N))
        score_nM = vector_NE[rows] @ caption_ME.T
        own_nM = owner_M[None] == rows[:, None]
        score_nM[own_nM] = own_M[np.nonzero(own_nM)[1]]  # to the bit, whatever the order of the sum was
        more_M += (score_nM > own_M).sum(0)
        same_M += ((score_nM == own_M) & ~own_nM).sum(0)
        top_n1 = np.where(own_nM, score_nM, -np.inf).max(1, keepdims=True)
        rank_N[rows] = 1 + ((score_nM > top_n1) & ~own_nM).sum(1) + ((score_nM == top_n1) & ~own_nM).sum(1) / 2
        best_n3 = np.argsort(-score_nM, 1, kind="stable")[:, :_SHOWN]
        best_n3 = np.pad(best_n3, ((0, 0), (0, _SHOWN - best_n3.shape[1])), mode="edge")
        best_N3[rows], score_N3[rows] = at_M[best_n3], np.take_along_axis(score_nM, best_n3, 1)
    rank_NC = np.zeros(N * C, np.float32)
    rank_NC[at_M] = 1 + more_M + same_M / 2
    return {
        "rank": rank_N,
        "caption_rank": rank_NC.reshape(N, C),
        "best": best_N3,
        "score": score_N3.astype(np.float32),
    }


def _any_of(right: int, total: int, k: int) -> float:
    """That at least one of so many right ones is among the first k of a random order."""
    wrong = total - right - np.arange(min(k, total))
    return float(1 - np.prod(np.maximum(wrong, 0) / (total - np.arange(min(k, total)))))


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """A ``core.Evaluator`` of classification by names alone (Radford et al. 2021, section 3.1): a picture is of the
    class whose texts are nearest. ``--answers=NAME`` answers so.

    Attributes:
      dataset: pictures of classes, with ``class_names``, such as ``sources.image.folder.ImageFolder``.
      class_names: in their place.
      templates: see ``tasks.contrastive.Contrastive``; (): the task's.
      split: of that data set.
    """

    dataset: Any
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    split: str = "test"
    final: bool = True
    needs: ClassVar[tuple[str, ...]] = ()  # of its own data

    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("max", "%"),
        "top5_accuracy": Metric("max", "%", "Top-5 accuracy"),
        "f1": Metric("max", "%", "F1 (macro)"),
    }

    def run(self, task: Task, variables: Any, data: Any, mesh: Any) -> Evaluated:
        """See ``core.Evaluator``. Keeps ``probabilities`` f32[N,K] and ``label`` i32[N].

        Raises:
          UserError: no such split, no names of classes, or the task has no texts.
        """
        own = dataclasses.replace(data.data, dataset=self.dataset, train_transforms=(), check="none").prepare()
        if self.split not in own.splits:
            raise UserError(f"ZeroShot needs the split {self.split!r}.{suggest(self.split, own.splits, 'split')}")
        names = tuple(self.class_names) or tuple(own.dataset_info.get("class_names", ()))
        classing: Any = self._classing(task, names)
        texts = classing.texts(classing.label_texts(names))
        label_KE = jax.jit(classing.label_vectors, static_argnums=2)(variables, texts, len(names))

        def of_batch(variables: Any, batch: Any) -> Mapping[str, Any]:
            scale, _ = classing.scores(variables)
            logits_BK = scale * classing.predict(variables, batch)["vector"] @ label_KE.T
            return {"probabilities": jax.nn.softmax(logits_BK), "label": batch["label"], "mask": batch["mask"]}

        examples = collect(of_batch, variables, own.eval_batches(self.split, host(mesh)), mesh)
        p_NK, label_N = examples["probabilities"], examples["label"]
        right_N = p_NK.argmax(1) == label_N
        found: dict[str, Any] = {"accuracy": float(right_N.mean()), **classes.scores(p_NK, label_N, names)}
        low, high = wilson(int(right_N.sum()), len(right_N))
        found |= {"accuracy_low": low, "accuracy_high": high, "accuracy_chance": 1 / len(names), "labels": list(names)}
        if len(names) > 5:
            found["top5_accuracy"] = float((np.argsort(-p_NK, 1)[:, :5] == label_N[:, None]).any(1).mean())
        return Evaluated(self.split, found, {"probabilities": p_NK, "label": label_N})

    def answering(self, task: Task, metrics: Mapping[str, Any]) -> Task:
        """See ``core.Evaluator``."""
        names = metrics.get("labels")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError("this run has kept no labels; evaluate it again.")
        found: Task = self._classing(task, tuple(names))
        return found

    def _classing(self, task: Any, names: Sequence[str]) -> Any:
        if not hasattr(task, "label_vectors"):
            raise UserError(f"ZeroShot is for pictures and texts, and {type(task).__name__} is another task.")
        if len(names) < 2:
            raise UserError("ZeroShot needs the names of at least 2 classes; set class_names.")
        return dataclasses.replace(task, labels=tuple(names), templates=tuple(self.templates) or task.templates)

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """Scores of each class and the confusion matrix."""
        yield from figures.per_class(evaluated.metrics)
        if "confusion_matrix" in evaluated.metrics:
            yield figures.confusion(evaluated.metrics["confusion_matrix"], evaluated.metrics["labels"])
