"""Tagging of words: named entities, parts of speech.

Axes: B examples of a batch, N examples of a split, L length, D model width, K tags, W words of an example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import (
    Batch,
    Evaluated,
    Example,
    Figure,
    Highlights,
    Loss,
    Meter,
    Metric,
    Sum,
    UserError,
    Variables,
    joined,
)
from bigbase_jax.evaluate import Totals
from bigbase_jax.tasks import figures, textual
from bigbase_jax.tasks.metrics import spans
from bigbase_jax.tasks.textual import PADDING

NONE = -1
"""The tag of a token that begins no word."""


@dataclasses.dataclass(frozen=True)
class Tagging:
    """An encoder whose every word's first token is classified (Devlin et al. 2019, section 5.3).

    A batch holds ``tokens``, ``segment_ids``, ``token_type_ids``, ``starts`` and ``tags``, i32[B,L] each; see
    ``data.sources.tagged_text``.

    Attributes:
      model: a Linen module with the method ``hidden``; the heads that it can have are left out.
      tag_names: K names.
      tokenizer: ``Tokenizer.state()``, to show texts; None: tokens are shown as numbers.
      dropout: rate before the last layer.

    Raises:
      UserError: a value out of its range, or a model that does not read text.
    """

    model: nn.Module
    tag_names: tuple[str, ...] | None = None
    tokenizer: str | None = None
    dropout: float = 0.1

    inputs: ClassVar[tuple[str, ...]] = ("tokens", "segment_ids", "token_type_ids", "starts")
    batch_coupled: ClassVar[bool] = False
    chosen: ClassVar[str] = "tags"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "overall_f1": Metric("max", "%", "F1 of spans"),
        "accuracy": Metric("max", "%"),
        "loss": Metric("min", "nats"),
        "overall_precision": Metric("max", "%", "Precision of spans"),
        "overall_recall": Metric("max", "%", "Recall of spans"),
    }
    merge = staticmethod(joined)

    def __post_init__(self) -> None:
        textual.check_rate(self.dropout)
        if self.tag_names is not None and len(self.tag_names) < 2:
            raise UserError(f"the only tag is {self.tag_names[0]!r}; there must be two at least.")
        object.__setattr__(self, "model", textual.headless(self.model))

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the sentences, or the tags are not known.
        """
        if self.tag_names is None:
            raise UserError("the task does not know the tags; set tag_names.")
        return textual.init_with_head(self.model, len(self.tag_names), key, batch)

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """Cross-entropy in nats; its weight is the number of words."""
        logits_BLK, state = self.train_logits(variables, batch, key)
        return self.loss_from(logits_BLK, batch), state

    def train_logits(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[jax.Array, Variables]:
        """f32[B,L,K] in training, and the model state after it."""
        return self.logits(variables, batch, key), textual.state_of(variables)

    def loss_from(self, logits_BLK: jax.Array, batch: Batch) -> Loss:
        """The training loss of logits."""
        return Loss({"loss": Sum(*_of_tags(jax.nn.log_softmax(logits_BLK), batch))})

    def counts(self, batch: Batch) -> Any:
        """f32[B,L]: 1 for a word that counts."""
        return _counted(batch)

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``tokens`` i32[B,L] (-1: padding), ``tag`` i32[B,L], -1 where no word begins, its ``probability``, and
        ``log_probabilities`` f32[B,L,K]."""
        logp_BLK = jax.nn.log_softmax(self.logits(variables, inputs))
        starts_BL = jnp.asarray(inputs["starts"]) == 1
        return {
            "log_probabilities": logp_BLK,
            "tokens": textual.shown_tokens(inputs),
            "tag": jnp.where(starts_BL, jnp.argmax(logp_BLK, -1), NONE),
            "probability": jnp.where(starts_BL, jnp.exp(jnp.max(logp_BLK, -1)), 0.0),
        }

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """What ``predict`` gives, and ``tags``; ``loss`` in nats per word, and ``accuracy``, the share of words whose
        tag is right."""
        outputs = dict(self.predict(variables, batch))
        logp_BLK = outputs.pop("log_probabilities")
        nats, count = _of_tags(logp_BLK, batch)
        right_BL = (outputs["tag"] == batch["tags"]) * _counted(batch)
        sums = {"loss": Sum(nats, count), "accuracy": Sum(jnp.sum(right_BL), count)}
        return {**outputs, "tags": jnp.asarray(batch["tags"])}, sums

    def logits(self, variables: Variables, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """f32[B,L,K], of each tag at each token; without a key, without dropout."""
        body_key, head_key = (None, None) if key is None else jax.random.split(key)
        y_BLD = textual.hidden(self.model, variables, batch, body_key)
        return textual.head_logits(len(self.tag_names or ()), variables, y_BLD, self.dropout, head_key)

    # -- on the host -----------------------------------------------------------------------------------------------

    def meters(self) -> Mapping[str, Meter]:
        """``overall_f1`` of whole spans, its precision and recall, and those of each type; see ``spans.scores``."""

        def found(examples: Mapping[str, np.ndarray]) -> Mapping[str, int]:
            names = np.asarray(self.tag_names)
            pairs = zip(examples["tags"], examples["tag"], strict=True)
            return spans.counts((names[true[true != NONE]], names[guess[true != NONE]]) for true, guess in pairs)

        return {"spans": Totals(found, spans.scores)}

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """``words`` as the model saw them, the ``tags`` of each, and the ``entities``: type, text and first word."""
        words, tags = self._words(output["tokens"], output["tag"])
        found = [
            {"type": span.type, "text": " ".join(words[span.start : span.stop]), "word": span.start}
            for span in spans.spans(tags)
        ]
        return {"words": words, "tags": tags, "entities": found}

    def figures(self, evaluated: Evaluated, count: int = 12) -> Iterator[Figure]:
        """The scores of each type of span, and the sentences with the most wrong words, what was said of these beside
        them."""
        yield from figures.per_class(evaluated.metrics, "Types of spans", "Type")
        examples = evaluated.examples
        wrong_NL = (examples["tags"] != examples["tag"]) & (examples["tags"] != NONE)
        index_N, texts = examples.get("index", np.arange(len(wrong_NL))), []
        for n in np.argsort(-wrong_NL.sum(1), kind="stable")[:count]:
            words, guess = self._words(examples["tokens"][n], examples["tag"][n])
            _, truth = self._words(examples["tokens"][n], examples["tags"][n])
            pieces = [
                (f"{word} " if g == t else f"{word} [said {g}, is {t}] ", float(g != t))
                for word, g, t in zip(words, guess, truth, strict=True)
            ]
            texts.append((f"row {int(index_N[n]) + 1}: {int(wrong_NL[n].sum())} of {len(words)} words wrong", pieces))
        yield Highlights("Hardest sentences", texts, "Words with a wrong tag are shaded.", most=2.0)

    def _words(self, tokens_L: np.ndarray, tag_L: np.ndarray) -> tuple[list[str], list[str]]:
        """The words, and the names of their tags."""
        start_W = np.flatnonzero(tag_L != NONE)
        ends_W = [*start_W[1:], len(tokens_L)]
        pieces = [tokens_L[a:b][tokens_L[a:b] != PADDING].tolist() for a, b in zip(start_W, ends_W, strict=True)]
        words = [textual.text_of(self.tokenizer, piece).strip() for piece in pieces]
        return words, [(self.tag_names or ())[tag_L[start]] for start in start_W]


def _counted(batch: Batch) -> jax.Array:
    """f32[B,L]: 1 for a word that counts."""
    return (jnp.asarray(batch["tags"]) != NONE) * jnp.asarray(batch["mask"])[:, None]


def _of_tags(logp_BLK: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Nats of the true tags, and how many there are."""
    counted_BL = _counted(batch)
    tag_BL1 = jnp.maximum(jnp.asarray(batch["tags"]), 0)[..., None]
    nats_BL = -jnp.take_along_axis(logp_BLK, tag_BL1, -1)[..., 0]
    return jnp.sum(counted_BL * nats_BL), jnp.sum(counted_BL)
