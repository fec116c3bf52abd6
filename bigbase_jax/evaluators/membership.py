"""Audits: what a model tells of the examples that it was trained on, and what epsilon it has at least.

Axes: N canaries, R reference runs, T thresholds.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats
from sklearn.metrics import roc_curve

from bigbase_jax import parallel
from bigbase_jax.compare.runs import Run
from bigbase_jax.core import Evaluated, Figure, Metric, Plot, Table, Task, UserError
from bigbase_jax.evaluate import collect
from bigbase_jax.wrappers.wrapper import Around

_SHARES = (0.02, 0.1, 0.3, 1.0)  # of the canaries, of which membership is guessed


@dataclasses.dataclass
class Membership:
    """A ``core.Evaluator`` that guesses which canaries were trained on, by their loss: members have the smaller one.

    ``epsilon_bound`` is what the model's epsilon is at least, with ``confidence``, given ``delta``: of so many right
    guesses about independent coins (Steinke, Nasr & Jagielski 2023, theorem 5.2), at the best of several numbers of
    guesses, each with its share of the doubt. It says nothing from above: an attack may be weak. ``exposure`` is how
    many bits of a member's place among the others the model gives away: ``log2(n + 1) - log2(rank)`` among the n that
    were not trained on (Carlini et al. 2019), on average and at most.

    With ``references`` the attack is LiRA, offline and with one variance for all (Carlini et al. 2022, "Membership
    inference attacks from first principles", section VI): not how small a canary's loss is counts, but how far its
    confidence ``log(p / (1 - p))``, where the loss is ``-log p``, lies above that of models that have not seen it.

    Attributes:
      split: of ``data.sources.canaries.Canaries``, whose examples say ``member``.
      references: runs on the same canaries with other ``coins``, and with an audit of their own under this name.
      delta: of the bound.
      confidence: in it.
    """

    split: str = "canary"
    references: tuple[str, ...] = ()
    delta: float = 1e-5
    confidence: float = 0.95
    final: bool = True

    metrics: ClassVar[Mapping[str, Metric]] = {
        "epsilon_bound": Metric("min", "", "Epsilon is at least"),
        "attack_auc": Metric("min", "", "AUC of the attack"),
        "attack_tpr": Metric("min", "%", "Members found at 1 % false alarms"),
        "exposure": Metric("min", "bits"),
        "exposure_most": Metric("min", "bits", "Exposure of the most exposed"),
    }

    def __post_init__(self) -> None:
        if not (0 <= self.delta < 1 and 0 < self.confidence < 1):
            raise UserError(f"Membership has delta={self.delta} and confidence={self.confidence}; both are below 1.")

    def run(self, task: Task, variables: Any, data: Any, mesh: Any) -> Evaluated:
        """See ``core.Evaluator``. Keeps ``loss``, ``score`` (larger where it looks trained on) and ``member``, f32[N].

        Raises:
          UserError: a split that does not say ``member``, or whose canaries are all of one kind; or a reference that
            has no audit of these canaries.
        """
        inner: Any = task
        while isinstance(inner, Around):
            inner, variables = inner.task, inner.unwrap(variables)

        def of_batch(variables: Any, batch: Any) -> Mapping[str, jax.Array]:
            if "member" not in batch:
                raise UserError(f"the examples of the split {self.split!r} do not say whether they are members.")

            def of_one(example: Any) -> jax.Array:
                row = {name: x[None] for name, x in example.items()}
                loss, _ = inner.loss(variables, row, jax.random.key(0))
                return jnp.asarray(sum(loss.scale.get(name, 1.0) * part.mean() for name, part in loss.terms.items()))

            return {"loss": jax.vmap(of_one)(dict(batch)), "member": batch["member"]}

        kept = collect(of_batch, variables, data.eval_batches(self.split, parallel.host(mesh)), mesh)
        loss_N, member_N = kept["loss"].astype(np.float64), kept["member"] > 0
        if member_N.all() or not member_N.any():
            raise UserError(f"the canaries of the split {self.split!r} are all of one kind; use more of them.")
        score_N = self._above(loss_N) if self.references else -loss_N
        found = {"loss": kept["loss"], "score": score_N.astype(np.float32), "member": kept["member"]}
        return Evaluated(self.split, self.measured(score_N, member_N), found)

    def _above(self, loss_N: np.ndarray) -> np.ndarray:
        """How far the confidence lies above the mean of the references' that were not trained on the canary; where all
        were, of all others'."""
        total_N, count_N = np.zeros(len(loss_N)), np.zeros(len(loss_N))
        for path in self.references:
            kept = Run.look(pathlib.Path(path)).evaluated("membership").examples
            if {"loss", "member"} - kept.keys() or len(kept["loss"]) != len(loss_N):
                raise UserError(f"the reference {path} has kept no audit of {len(loss_N)} canaries under `membership`.")
            out_N = kept["member"] == 0
            total_N += np.where(out_N, _confidence(kept["loss"].astype(np.float64)), 0)
            count_N += out_N
        mean_N = np.where(count_N > 0, total_N / np.maximum(count_N, 1), total_N.sum() / max(count_N.sum(), 1))
        return _confidence(loss_N) - mean_N

    def measured(self, score_N: np.ndarray, member_N: np.ndarray) -> dict[str, Any]:
        """The metrics of scores that should be larger for members, and ``guesses``: how many were right."""
        score_N = np.where(np.isfinite(score_N), score_N, -np.finfo(np.float64).max)
        false_T, true_T, _ = roc_curve(member_N, score_N, drop_intermediate=False)
        others = np.sort(score_N[~member_N])
        rank = 1 + len(others) - np.searchsorted(others, score_N[member_N], side="right")
        exposure = np.log2(len(others) + 1) - np.log2(rank)
        guesses = []
        for share in _SHARES:
            each = max(1, int(share * len(score_N)) // 2)
            order = np.argsort(-score_N, kind="stable")
            right = int(member_N[order[:each]].sum() + (~member_N[order[-each:]]).sum())
            doubt = (1 - self.confidence) / len(_SHARES)
            bound = epsilon_bound(len(score_N), 2 * each, right, self.delta, doubt)
            guesses.append({"guesses": 2 * each, "right": right, "epsilon_bound": bound})
        return {
            "epsilon_bound": max(row["epsilon_bound"] for row in guesses),
            "attack_auc": float(np.trapezoid(true_T, false_T)),
            "attack_tpr": float(true_T[false_T <= 0.01].max()),
            "exposure": float(exposure.mean()),
            "exposure_most": float(exposure.max()),
            "canaries": len(score_N),
            "guesses": guesses,
        }

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """The attack's ROC curve, the losses of both kinds, and what the bound rests on."""
        guesses = evaluated.metrics.get("guesses")
        if isinstance(guesses, list) and guesses:
            columns = ("guesses", "right", "epsilon_bound")
            rows = [[row.get(name) for name in columns] for row in guesses if isinstance(row, dict)]
            note = f"With {100 * self.confidence:g} % confidence, at delta {self.delta:g}."
            yield Table("Guessing who was trained on", ("Guesses", "Right", "Epsilon is at least"), rows, note)
        if not {"loss", "member"} <= evaluated.examples.keys():
            return
        loss_N, member_N = evaluated.examples["loss"], evaluated.examples["member"] > 0
        loss_N = np.nan_to_num(loss_N.astype(np.float64), posinf=1e6)
        if member_N.all() or not member_N.any():
            return
        score_N = np.nan_to_num(evaluated.examples.get("score", -loss_N).astype(np.float64))
        false_T, true_T, _ = roc_curve(member_N, score_N)
        some = np.unique(np.linspace(0, len(false_T) - 1, 200).astype(int))
        curve = false_T[some].tolist(), true_T[some].tolist()
        yield Plot("Members found", {"attack": curve}, "false alarms", "members found", diagonal=True)
        at = np.linspace(0, np.quantile(loss_N, 0.99) + 1e-6, 31)
        series = {
            name: (at[:-1].tolist(), (100 * np.histogram(loss_N[which], at)[0] / which.sum()).tolist())
            for name, which in (("trained on", member_N), ("not", ~member_N))
        }
        yield Plot("Losses of canaries", series, "loss", "share, %", bars=True)


def _confidence(loss_N: np.ndarray) -> np.ndarray:
    """``log(p / (1 - p))`` of ``loss = -log p``, f64[N]."""
    loss_N = np.clip(loss_N, 1e-9, 1e9)
    return -loss_N - np.log(-np.expm1(-loss_N))


@dataclasses.dataclass
class Exposure:
    """A ``core.Evaluator`` of secrets in the text that a language model was trained on (Carlini et al. 2019): whether
    it finds each likelier than others of the same form.

    ``prefix + secret + suffix`` is compared with ``alternatives`` that have random digits for the secret's digits, and
    random letters for its letters. The exposure is ``log2(alternatives + 1) - log2(rank)`` bits: at most
    ``log2(alternatives + 1)`` for one that comes first, and about 1 for one that the model does not know. Plant secrets
    for this; a config is no place for true ones.

    Attributes:
      planted: the secrets that were, or are in the text (a config refuses an argument called secrets).
      prefix, suffix: what is around them.
      alternatives: how many others each is compared with.
      seed: of these.
    """

    planted: tuple[str, ...]
    prefix: str = ""
    suffix: str = ""
    alternatives: int = 1000
    seed: int = 0
    final: bool = True

    metrics: ClassVar[Mapping[str, Metric]] = {
        "exposure": Metric("min", "bits"),
        "exposure_most": Metric("min", "bits", "Exposure of the most exposed"),
        "found": Metric("min", "%", "Secrets found"),
    }

    def __post_init__(self) -> None:
        if not self.planted or self.alternatives < 1:
            raise UserError("Exposure needs planted=('...',) that may be in the text, and alternatives of 1 or more.")
        for i, secret in enumerate(self.planted, 1):
            if not any(map(str.isalnum, secret)):
                raise UserError(f"the {i}. of the secrets has no letter or digit, so none has its form.")

    def run(self, task: Task, variables: Any, data: Any, mesh: Any) -> Evaluated:
        """See ``core.Evaluator``. No secret is among what is kept: they are told apart by their number.

        Raises:
          UserError: the data set does not read texts.
        """
        read = getattr(data.data.dataset, "read", None)
        if read is None:
            raise UserError("Exposure is for language models, whose data set reads a text; leave it out.")
        inner: Any = task
        while isinstance(inner, Around):
            inner, variables = inner.task, inner.unwrap(variables)

        @jax.jit
        def nats(variables: Any, batch: Any) -> jax.Array:
            def of_one(example: Any) -> jax.Array:
                row = {name: x[None] for name, x in example.items()}
                loss, _ = inner.loss(variables, {**row, "mask": jnp.ones(1)}, jax.random.key(0))
                return jnp.asarray(sum(jnp.sum(part.total) for part in loss.terms.values()))

            return jax.lax.map(of_one, batch, batch_size=32)

        rng, exposure = np.random.default_rng(self.seed), []
        for secret in self.planted:
            drawn = [_other(secret, rng) for _ in range(self.alternatives)]
            parts = [read(f"{self.prefix}{text}{self.suffix}") for text in (secret, *drawn)]
            owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
            examples = [example for part in parts for example in part]
            batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
            found = np.bincount(owner, np.asarray(nats(variables, batch), np.float64), len(parts))
            same = np.array([text == secret for text in drawn])
            rank = 1 + int((found[1:][~same] <= found[0]).sum())
            exposure.append(math.log2(1 + int((~same).sum())) - math.log2(rank))
        most = math.log2(self.alternatives + 1)
        told = [{"secret": i, "exposure": bits} for i, bits in enumerate(exposure, 1)]
        metrics = {
            "exposure": float(np.mean(exposure)),
            "exposure_most": max(exposure),
            "found": float(np.mean([bits >= most - 0.1 for bits in exposure])),
            "secrets": told,
        }
        return Evaluated("", metrics)

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """The exposure of each secret, by its number."""
        told = evaluated.metrics.get("secrets")
        if isinstance(told, list):
            rows = [[row.get("secret"), row.get("exposure")] for row in told if isinstance(row, dict)]
            note = f"In bits, of at most {math.log2(self.alternatives + 1):.1f}; about 1 is that of an unknown one."
            yield Table("Secrets in the text", ("Secret", "Exposure"), rows, note)


def _other(secret: str, rng: np.random.Generator) -> str:
    """A text of the same form: digits for digits, letters for letters."""
    kinds = ("0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    return "".join(next((kind[rng.integers(len(kind))] for kind in kinds if c in kind), c) for c in secret)


def epsilon_bound(canaries: int, guesses: int, right: int, delta: float, doubt: float) -> float:
    """What epsilon is at least but with probability ``doubt``, where so many guesses about coins were right (Steinke,
    Nasr & Jagielski 2023, algorithm 1 and theorem 5.2)."""
    if _probability(0.0, canaries, guesses, right, delta) >= doubt:
        return 0.0
    low, high = 0.0, 1.0
    while _probability(high, canaries, guesses, right, delta) < doubt:
        low, high = high, 2 * high
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(middle, canaries, guesses, right, delta) < doubt else (low, middle)
    return low


def _probability(epsilon: float, canaries: int, guesses: int, right: int, delta: float) -> float:
    """At most that of so many right guesses, or more, of an (epsilon, delta)-private algorithm."""
    chance = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    fewer = np.cumsum(chance.pmf(right - np.arange(1, right + 1)))  # of up to i fewer right ones
    worst = (fewer / np.arange(1, right + 1)).max(initial=0.0)
    return float(min(1.0, chance.sf(right - 1) + 2 * canaries * delta * worst))
