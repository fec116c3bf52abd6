"""Causal language modelling: the next token, from those before it in the same document.

Axes: B examples of a batch, N examples of a split, L length, l = L / C positions of one of C chunks, D model width,
V entries of the vocabulary, T tokens of a text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Batch, Sum, UserError, Variables
from bigbase_jax.data.tokenizer import load
from bigbase_jax.models.layers import ModelError

CHUNK_LOGITS = 2**22
"""How many logits of an example are held at once, where ``logit_chunks`` is left open: 16 MB in float32."""
PADDING = -1
"""The target of a position that has none, in what ``predict`` gives."""


@dataclasses.dataclass(frozen=True)
class CausalLanguageModel:
    """A decoder trained to give the next token, and measured by how well it does.

    A batch holds, i32[B,L] each: ``inputs``; ``targets``, the token after each; ``segments``, the document that each
    belongs to, and 0 where there is no target; ``positions`` in the document; ``bytes`` of text in the target.

    Attributes:
      model: a Linen module with the methods ``hidden`` and ``logits`` (see ``models.decoder``).
      tokenizer: ``Tokenizer.state()``, to show tokens as text; None: tokens are shown as numbers.
      logit_chunks: C; the loss takes the positions in C parts one after the other, and its gradient computes their
        logits again, so that B x L x V logits never exist. Must divide L. None: as many as keep an example's logits of
        one part below 2^22.

    Raises:
      UserError: the model's vocabulary is smaller than the tokenizer's.
    """

    model: nn.Module
    tokenizer: str | None = None
    logit_chunks: int | None = None

    inputs: ClassVar[tuple[str, ...]] = ("inputs", "targets", "segments", "positions", "bytes")
    batch_coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        size = getattr(self.model, "vocab_size", None)
        if self.tokenizer is not None and size is not None and size < load(self.tokenizer).size:
            raise UserError(
                f"config.task.model.vocab_size is {size}, but the tokenizer has {load(self.tokenizer).size} tokens; "
                "leave it open to take theirs."
            )
        if self.logit_chunks is not None and self.logit_chunks < 1:
            raise UserError(f"logit_chunks is {self.logit_chunks}; it must be at least 1.")

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the sequences.
        """
        one = {name: jnp.zeros((1, *batch[name].shape[1:]), jnp.int32) for name in ("inputs", "segments", "positions")}
        try:
            self._chunks(one["inputs"].shape[1])
            return self.model.init(key, one["inputs"], one["segments"], one["positions"])
        except ModelError as error:
            raise UserError(str(error)) from error

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Sum, Variables]:
        """Cross-entropy in nats; its weight is the number of targets."""
        logp_BL = self.log_probability(variables, batch, train=True, key=key)
        weight_BL = _real(batch) * batch["mask"][:, None]
        return Sum(-jnp.sum(weight_BL * logp_BL), jnp.sum(weight_BL)), {
            k: v for k, v in variables.items() if k != "params"
        }

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``log_probability`` f32[B,L] of each target, ``target`` i32[B,L] (-1: none) and ``bytes`` i32[B,L] in it."""
        logp_BL = self.log_probability(variables, inputs)
        real_BL = _real(inputs)
        return {
            "log_probability": real_BL * logp_BL,
            "target": jnp.where(real_BL > 0, inputs["targets"], PADDING),
            "bytes": jnp.where(real_BL > 0, inputs["bytes"], 0),
        }

    def metrics(self, outputs: Mapping[str, jax.Array], batch: Batch) -> Mapping[str, Sum]:
        """``loss`` in nats per token, and ``bits_per_byte`` of text, which compares across tokenizers."""
        mask_B1 = batch["mask"][:, None]
        nats = -jnp.sum(outputs["log_probability"] * mask_B1)
        return {
            "loss": Sum(nats, jnp.sum((outputs["target"] != PADDING) * mask_B1)),
            "bits_per_byte": Sum(nats / math.log(2), jnp.sum(outputs["bytes"] * mask_B1)),
        }

    def log_probability(
        self, variables: Variables, batch: Batch, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """f32[B,L]: the log-probability of each target."""
        y_BLD = self.model.apply(
            variables,
            batch["inputs"],
            batch["segments"],
            batch["positions"],
            train=train,
            rngs=None if key is None else {"dropout": key},
            method="hidden",
        )
        B, L, D = y_BLD.shape  # type: ignore[union-attr]
        C = self._chunks(L)

        def of_chunk(y_BlD: jax.Array, target_Bl: jax.Array) -> jax.Array:
            logits_BlV: Any = self.model.apply(variables, y_BlD, method="logits")
            chosen_Bl = jnp.take_along_axis(logits_BlV, target_Bl[..., None], -1)[..., 0]
            return chosen_Bl - jax.nn.logsumexp(logits_BlV, -1)

        if C == 1:
            return of_chunk(y_BLD, batch["targets"])  # type: ignore[arg-type]
        # A chunk takes every C-th position: where devices share a sequence, each has its part of every chunk.
        y_CBlD = jnp.moveaxis(y_BLD.reshape(B, L // C, C, D), 2, 0)  # type: ignore[union-attr]
        target_CBl = jnp.moveaxis(jnp.asarray(batch["targets"]).reshape(B, L // C, C), 2, 0)
        logp_CBl = jax.lax.map(lambda chunk: jax.checkpoint(of_chunk)(*chunk), (y_CBlD, target_CBl))
        return jnp.moveaxis(logp_CBl, 0, 2).reshape(B, L)

    def _chunks(self, L: int) -> int:
        if self.logit_chunks is not None:
            if L % self.logit_chunks:
                raise UserError(f"logit_chunks {self.logit_chunks} does not divide a length of {L}.")
            return self.logit_chunks
        wanted = L * (getattr(self.model, "vocab_size", None) or 1) / CHUNK_LOGITS
        return next(c for c in range(1, L + 1) if L % c == 0 and (c >= wanted or c == L))

    # -- on the host -----------------------------------------------------------------------------------------------

    def report(self, examples: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        """``perplexity``, the exponential of the mean loss, and ``tokens``, the number of targets."""
        real_NL = examples["target"] != PADDING
        count = int(real_NL.sum())
        nats = -float(examples["log_probability"].sum(dtype=np.float64))
        return {"perplexity": _exp(nats / max(count, 1)), "tokens": count}

    def present(self, output: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """How well the model knows a text: ``tokens``, ``loss``, ``perplexity``, ``bits_per_byte`` and ``text``.

        ``text`` holds [token, natural logarithm of its probability] for every token that was predicted.
        """
        real_T = output["target"] != PADDING
        logp_T = output["log_probability"][real_T].astype(np.float64)
        nats, count, nbytes = -float(logp_T.sum()), int(real_T.sum()), int(output["bytes"].sum())
        pieces = self._pieces(output["target"][real_T])
        return {
            "tokens": count,
            "loss": nats / max(count, 1),
            "perplexity": _exp(nats / max(count, 1)),
            "bits_per_byte": nats / math.log(2) / nbytes if nbytes else None,
            "text": [[piece, round(float(p), 4)] for piece, p in zip(pieces, logp_T, strict=True)],
        }

    def passages(self, examples: Mapping[str, np.ndarray], count: int = 6) -> list[tuple[str, list[tuple[str, float]]]]:
        """The examples that were hardest to predict: (what to call it, [(token, its loss in nats), ...]) each."""
        real_NL = examples["target"] != PADDING
        mean_N = -examples["log_probability"].sum(1) / np.maximum(real_NL.sum(1), 1)
        found = []
        for n in np.argsort(-mean_N, kind="stable")[:count]:
            target_T, nats_T = examples["target"][n][real_NL[n]], -examples["log_probability"][n][real_NL[n]]
            pieces = self._pieces(target_T)
            found.append((f"{mean_N[n]:.3f} nats per token", list(zip(pieces, nats_T.tolist(), strict=True))))
        return found

    def _pieces(self, target_T: np.ndarray) -> list[str]:
        if self.tokenizer is None:
            return [str(t) for t in target_T]
        return load(self.tokenizer).pieces(target_T.tolist())


def _real(batch: Batch) -> jax.Array:
    """f32[B,L]: 1 where there is a target."""
    return (jnp.asarray(batch["segments"]) > 0).astype(jnp.float32)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
