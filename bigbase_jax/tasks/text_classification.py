"""Classification of texts, or of pairs of texts: sentiment, topics, entailment.

Axes: B examples of a batch, N examples of a split, L length, D model width, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Array, Batch, Figure, UserError, Variables
from bigbase_jax.tasks import figures, textual
from bigbase_jax.tasks.classification import Classifier
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.tasks.textual import PADDING

POOLS = {"last": "lasttoken", "mean": "mean_tokens"}


def _mean(y_BLD: Array, weight_BL: Array) -> Array:
    return jnp.sum(weight_BL[..., None] * y_BLD, 1) / jnp.maximum(jnp.sum(weight_BL, 1), 1)[:, None]


VECTORS: Mapping[str, Callable[[Any, Any], Any]] = {
    "cls_token": lambda y_BLD, real_BL: y_BLD[:, 0],
    "max_tokens": lambda y_BLD, real_BL: jnp.max(jnp.where(real_BL[..., None] > 0, y_BLD, -jnp.inf), 1),
    "mean_tokens": _mean,
    "mean_sqrt_len_tokens": lambda y_BLD, real_BL: _mean(y_BLD, real_BL) * jnp.sqrt(jnp.sum(real_BL, 1))[:, None],
    "weightedmean_tokens": lambda y_BLD, real_BL: _mean(y_BLD, real_BL * jnp.arange(1, real_BL.shape[1] + 1)),
    "lasttoken": lambda y_BLD, real_BL: jnp.take_along_axis(
        y_BLD, jnp.maximum(jnp.sum(real_BL, 1) - 1, 0).astype(jnp.int32)[:, None, None], 1
    )[:, 0],
}
"""What of f32[B,L,D] makes f32[B,D], by its name in sentence-transformers; f32[B,L] is 0 for padding, else 1."""


def pool_of(task: Any, model: Any) -> str:
    """What of ``VECTORS`` a task says with ``pool``; where it says nothing, that of a decoder is its last token."""
    return POOLS[getattr(task, "pool", None) or ("last" if hasattr(model, "decode") else "mean")]


@dataclasses.dataclass(frozen=True)
class TextClassification(Classifier):
    """An encoder or a decoder that tells texts apart.

    A batch holds ``tokens``, ``segment_ids`` (1, and 0 for the padding at the end) and ``token_type_ids`` (of which
    text of a pair), i32[B,L] each; and what ``Classifier`` says, whose attributes and errors these are too:

    Attributes:
      model: a Linen module with the method ``hidden``. If it has ``classify`` too (``models.bert.Bert``), its logits
        are that; what other heads it can have are left out. Otherwise a linear layer, ``head``, reads one vector of
        each text, and the head that a decoder may have for tokens is left out.
      tokenizer: ``Tokenizer.state()``, to show texts; None: tokens are shown as numbers.
      pool: which vector: "last", that of the last token, the only one of a decoder that has seen all others; or
        "mean". None: "last" where the model is a decoder, else "mean". Unread where the model has ``classify``.
      dropout: rate on that vector; unread likewise.
    """

    tokenizer: str | None = None
    pool: str | None = None
    dropout: float = 0.0

    inputs: ClassVar[tuple[str, ...]] = ("tokens", "segment_ids", "token_type_ids")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in (None, *POOLS):
            raise UserError(f"there is no pool {self.pool!r}.{suggest(str(self.pool), POOLS, 'pool')}")
        textual.check_rate(self.dropout)
        object.__setattr__(self, "model", textual.headless(self.model, self.num_classes))

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the texts, or the number of classes is not known.
        """
        if self.num_classes is None:
            raise UserError("the task does not know the number of classes; set num_classes.")
        if not hasattr(self.model, "classify"):
            return textual.init_with_head(self.model, self.num_classes, key, batch)
        with model_errors():
            return self.model.init(jax.random.split(key)[0], *textual.words_of(self.model, textual.one_text(batch)))

    def train_logits(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[jax.Array, Variables]:
        return self._logits(variables, batch, key), textual.state_of(variables)

    def logits(self, variables: Variables, inputs: Batch) -> jax.Array:
        return self._logits(variables, inputs, None)

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``logits`` and ``probabilities`` (see ``Classifier``), and ``tokens`` i32[B,L], -1 where there is padding."""
        return {**super().predict(variables, inputs), "tokens": textual.shown_tokens(inputs)}

    def _logits(self, variables: Variables, batch: Batch, key: jax.Array | None) -> jax.Array:
        body_key, head_key = (None, None) if key is None else jax.random.split(key)
        y_BLD = textual.hidden(self.model, variables, batch, body_key)
        if hasattr(self.model, "classify"):
            how: dict[str, Any] = {} if head_key is None else {"train": True, "rngs": {"dropout": head_key}}
            with model_errors():
                y_BK: Any = self.model.apply(variables, y_BLD, batch["segment_ids"], **how, method="classify")
                return y_BK
        real_BL = (jnp.asarray(batch["segment_ids"]) > 0).astype(jnp.float32)
        y_BD: Any = VECTORS[pool_of(self, self.model)](y_BLD, real_BL)
        return textual.head_logits(self.num_classes or 0, variables, y_BD, self.dropout, head_key)

    # -- on the host -----------------------------------------------------------------------------------------------

    def examples_shown(
        self, p_NK: np.ndarray, label_N: np.ndarray, index_N: np.ndarray, examples: Mapping[str, np.ndarray]
    ) -> Figure:
        """The texts whose class was given the least probability."""

        def text(n: int) -> str:
            return textual.text_of(self.tokenizer, examples["tokens"][n][examples["tokens"][n] != PADDING])

        return figures.hardest_texts(p_NK, label_N, index_N, self._names(p_NK.shape[-1]), text)
