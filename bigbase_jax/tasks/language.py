"""Causal language modelling: the next token, from those before it in the same document.

Axes: B examples of a batch, N examples of a split, L length, l positions of one of C chunks, D model width, V entries
of the vocabulary, T tokens of a text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Batch, Evaluated, Example, Figure, Loss, Meter, Metric, Sum, UserError, Variables, joined
from bigbase_jax.tasks import chunked_loss, figures, textual
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.tasks.metrics import perplexity
from bigbase_jax.tasks.textual import PADDING


@dataclasses.dataclass(frozen=True)
class CausalLanguageModel:
    """A decoder trained to give the next token, and measured by how well it does.

    A batch holds, i32[B,L] each: ``inputs``; ``targets``, the token after each; ``segment_ids``, the document that each
    belongs to, and 0 where there is no target; ``positions`` in the document; ``bytes`` of text in the target; and
    where ``weighted``, ``weights``: 0 for a target that is read but not counted (what others say in a chat).

    Attributes:
      model: a Linen module with the methods ``hidden`` and ``logits`` (see ``models.decoder``).
      tokenizer: ``Tokenizer.state()``, to show tokens as text; None: tokens are shown as numbers.
      logit_chunks: C; the loss takes the positions in C parts one after the other, and its gradient computes their
        logits again, so that B x L x V logits never exist. Must divide L. None: as many as keep an example's logits of
        one part below 2^22.
      weighted: whether the data gives ``weights``; None: it does not.

    Raises:
      UserError: the model's vocabulary is smaller than the tokenizer's.
    """

    model: nn.Module
    tokenizer: str | None = None
    logit_chunks: int | None = None
    weighted: bool | None = None

    batch_coupled: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "loss": Metric("min", "nats"),
        "bits_per_byte": Metric("min", "bits"),
        "perplexity": Metric("min"),
        "tokens": Metric(),
        "exact_match": Metric("max", "%"),
        "answers": Metric(),
    }
    merge = staticmethod(joined)

    def __post_init__(self) -> None:
        textual.check_vocabulary(self.model, self.tokenizer)
        if self.logit_chunks is not None and self.logit_chunks < 1:
            raise UserError(f"logit_chunks is {self.logit_chunks}; it must be at least 1.")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the entries that ``predict`` reads."""
        return ("inputs", "targets", "segment_ids", "positions", "bytes") + ("weights",) * bool(self.weighted)

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the sequences, or ``weighted`` the data.
        """
        if ("weights" in batch) != bool(self.weighted):
            raise UserError(
                f"config.task.weighted is {self.weighted}, but this data gives {'' if 'weights' in batch else 'no '}"
                "weights; leave it open."
            )
        one = {
            name: jnp.zeros((1, *batch[name].shape[1:]), jnp.int32) for name in ("inputs", "segment_ids", "positions")
        }
        with model_errors():
            self.chunks(one["inputs"].shape[1])
            return self.model.init(key, one["inputs"], one["segment_ids"], one["positions"])

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """Cross-entropy in nats; its weight is the number of targets that count."""
        logp_BL = self.log_probability(variables, batch, train=True, key=key)
        weight_BL = self.targets(batch)[1]
        loss = Loss({"loss": Sum(-jnp.sum(weight_BL * logp_BL), jnp.sum(weight_BL))})
        return loss, textual.state_of(variables)

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """Of targets that count: ``log_probability`` f32[B,L], ``target`` i32[B,L] (-1: none), ``bytes`` i32[B,L].

        Where ``weighted``, also ``likeliest`` bool[B,L]: no other token is likelier than the target.
        """
        logp_BL, likeliest_BL = self._predicted(variables, inputs)
        real_BL = self._real(inputs)
        found = {
            "log_probability": real_BL * logp_BL,
            "target": jnp.where(real_BL > 0, inputs["targets"], PADDING),
            "bytes": jnp.where(real_BL > 0, inputs["bytes"], 0),
        }
        return {**found, "likeliest": (real_BL > 0) & likeliest_BL} if self.weighted else found

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """What ``predict`` gives; ``loss`` in nats per token, and ``bits_per_byte`` of text, which compares across
        tokenizers."""
        outputs, mask_B1 = self.predict(variables, batch), batch["mask"][:, None]
        nats = -jnp.sum(outputs["log_probability"] * mask_B1)
        return outputs, {
            "loss": Sum(nats, jnp.sum((outputs["target"] != PADDING) * mask_B1)),
            "bits_per_byte": Sum(nats / math.log(2), jnp.sum(outputs["bytes"] * mask_B1)),
        }

    def log_probability(
        self, variables: Variables, batch: Batch, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """f32[B,L]: the log-probability of each target."""
        return self._predicted(variables, batch, train, key)[0]

    def _predicted(
        self, variables: Variables, batch: Batch, train: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The log-probability f32[B,L] of each target, and whether (bool[B,L]) none is likelier."""
        y_BLD = self.hidden(variables, batch, train, key)

        def of_chunk(y_BlD: jax.Array, target_Bl: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits_BlV = self.logits(variables, y_BlD)
            chosen_Bl = jnp.take_along_axis(logits_BlV, target_Bl[..., None], -1)[..., 0]
            return chosen_Bl - jax.nn.logsumexp(logits_BlV, -1), chosen_Bl == jnp.max(logits_BlV, -1)

        targets_BL = batch["targets"]
        return chunked_loss.over_chunks(of_chunk, y_BLD, targets_BL, self.chunks(targets_BL.shape[1]))

    def hidden(
        self, variables: Variables, batch: Batch, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """f32[B,L,D]: what ``logits`` reads."""
        y_BLD: Any = self.model.apply(
            variables,
            batch["inputs"],
            batch["segment_ids"],
            batch["positions"],
            train=train,
            rngs=None if key is None else {"dropout": key},
            method="hidden",
        )
        return y_BLD

    def logits(self, variables: Variables, y_BlD: jax.Array) -> jax.Array:
        """f32[B,l,V] of each token."""
        logits_BlV: Any = self.model.apply(variables, y_BlD, method="logits")
        return logits_BlV

    def cross_entropy(self, logits_BlV: jax.Array, target_Bl: jax.Array) -> jax.Array:
        """f32[B,l]: what training counts, in nats."""
        return jax.nn.logsumexp(logits_BlV, -1) - jnp.take_along_axis(logits_BlV, target_Bl[..., None], -1)[..., 0]

    def targets(self, batch: Batch) -> tuple[Any, jax.Array]:
        """The targets, i32[B,L], and how much each counts, f32[B,L]."""
        return batch["targets"], self._real(batch) * batch["mask"][:, None]

    def _real(self, batch: Batch) -> jax.Array:
        """f32[B,L]: 1 where there is a target that counts."""
        real_BL = jnp.asarray(batch["segment_ids"]) > 0
        if self.weighted:
            real_BL = real_BL & (jnp.asarray(batch["weights"]) > 0)
        return real_BL.astype(jnp.float32)

    def chunks(self, L: int) -> int:
        """C."""
        return chunked_loss.count(L, getattr(self.model, "vocab_size", None), self.logit_chunks)

    # -- on the host -----------------------------------------------------------------------------------------------

    def meters(self) -> Mapping[str, Meter]:
        """``perplexity``, the exponential of the mean loss, and ``tokens``, the number of targets.

        Where ``weighted``, also ``answers``, the number of runs of targets that count, and ``exact_match``, the share
        of them that the model writes as they stand when it takes the likeliest token each time: those of which every
        token is the likeliest after the ones before it.
        """
        found = {"perplexity": perplexity.meter("tokens")}
        return {**found, "answers": perplexity.exact_match()} if self.weighted else found

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """How well the model knows a text: ``tokens``, ``loss``, ``perplexity``, ``bits_per_byte`` and ``text``.

        ``text`` holds [token, natural logarithm of its probability] for every token that was predicted.
        """
        real_T = output["target"] != PADDING
        logp_T = output["log_probability"][real_T].astype(np.float64)
        nats, count, nbytes = -float(logp_T.sum()), int(real_T.sum()), int(output["bytes"].sum())
        pieces = textual.pieces_of(self.tokenizer, output["target"][real_T])
        return {
            "tokens": count,
            "loss": nats / max(count, 1),
            "perplexity": perplexity.exp(nats / max(count, 1)),
            "bits_per_byte": nats / math.log(2) / nbytes if nbytes else None,
            "text": [[piece, round(float(p), 4)] for piece, p in zip(pieces, logp_T, strict=True)],
        }

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """The examples that were hardest to predict."""
        logp_NL, target_NL = (evaluated.examples[name] for name in ("log_probability", "target"))
        real_NL = target_NL != PADDING

        def pieces(n: int) -> tuple[str, list[tuple[str, float]]]:
            target_T = textual.pieces_of(self.tokenizer, target_NL[n][real_NL[n]])
            return "", list(zip(target_T, (-logp_NL[n][real_NL[n]]).tolist(), strict=True))

        yield figures.hardest_passages(logp_NL, real_NL, "token", pieces)
