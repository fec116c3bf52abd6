"""Translation: a text in one language, written in another, token by token.

Axes: B examples of a batch, N examples of a split, S length of the source, T of the target, M of what is written, l
positions of one of several chunks, V entries of the vocabulary, R bytes of the longest reference.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import (
    Array,
    Batch,
    Evaluated,
    Example,
    Figure,
    Loss,
    Meter,
    Metric,
    PyTree,
    Sum,
    UserError,
    Variables,
    joined,
)
from bigbase_jax.decoding.beams import NEVER, beam_tokens
from bigbase_jax.decoding.sampling import greedy_tokens
from bigbase_jax.evaluate import CollectAll
from bigbase_jax.models.transformer import unstack_blocks
from bigbase_jax.tasks import chunked_loss, figures, textual
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.tasks.metrics import bleu, perplexity, transcripts
from bigbase_jax.tasks.textual import PADDING


@dataclasses.dataclass(frozen=True)
class Translation:
    """An encoder-decoder trained to give the next token of the target, and measured by what it writes.

    A batch holds ``source`` and ``source_segments`` (0: padding) i32[B,S]; ``target_in``, the start token and the
    target, and ``target_out``, the token after each, i32[B,T] (-1: none); ``reference`` u8[B,R], the target as text,
    padded with 0 (see ``data.sources.parallel_text``).

    Attributes:
      model: a Linen module with the methods ``hidden``, ``logits``, ``cache`` and ``decode`` (see
        ``models.encoder_decoder``).
      tokenizer: ``Tokenizer.state()`` of both languages; None: tokens are shown as numbers, and nothing is compared
        with references.
      label_smoothing: share of each target's probability that is spread over the vocabulary in training (Szegedy et
        al. 2016).
      generate: write translations wherever the model predicts; False: only the targets' probabilities are computed.
      beams: of the search (``decoding.beams.beam_tokens``); 1: the most probable token, again and again.
      length_penalty: see ``decoding.beams.beam_tokens``.
      max_length: M, the end token included; None: T, of its batch.
      pad_id, start_id: tokens that are never written.
      end_id: the token that ends a translation.
      target_language: what the target is called; the report does not go by it.
      shared: whether source and target have one vocabulary, as they must.
      logit_chunks: see ``tasks.language``.

    Raises:
      UserError: a value out of range, two vocabularies, or a model's that is smaller than the tokenizer's.
    """

    model: nn.Module
    tokenizer: str | None = None
    label_smoothing: float = 0.0
    generate: bool = True
    beams: int = 1
    length_penalty: float = 1.0
    max_length: int | None = None
    pad_id: int | None = None
    start_id: int | None = None
    end_id: int | None = None
    target_language: str | None = None
    shared: bool | None = None
    logit_chunks: int | None = None

    inputs: ClassVar[tuple[str, ...]] = ("source", "source_segments", "target_in", "target_out")
    batch_coupled: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "bleu": Metric("max", "", "BLEU"),
        "chrf": Metric("max", "", "chrF"),
        "accuracy": Metric("max", "%"),
        "loss": Metric("min", "nats"),
        "perplexity": Metric("min"),
    }
    merge = staticmethod(joined)

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}; it is at least 0 and below 1.")
        for name in ("beams", "max_length", "logit_chunks"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        if self.shared is False:
            raise UserError(
                "the model has one vocabulary for both languages, and the data has two tokenizers; leave "
                "target_tokenizer open."
            )
        textual.check_vocabulary(self.model, self.tokenizer)

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the sequences.
        """
        one = {name: jnp.zeros((1, *batch[name].shape[1:]), jnp.int32) for name in self.inputs}
        with model_errors():
            self.chunks(one["target_in"].shape[1])
            return self.model.init(key, one["source"], one["target_in"], one["source_segments"])

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """Cross-entropy in nats against the smoothed targets; its weight is the number of targets."""
        loss_BT = self._of_logits(self.cross_entropy, variables, batch, key)
        weight_BT = self.targets(batch)[1]
        return Loss({"loss": Sum(jnp.sum(weight_BT * loss_BT), jnp.sum(weight_BT))}), textual.state_of(variables)

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``log_probability`` f32[B,T] of each target, whether it is the most probable token (``correct`` bool[B,T]),
        ``target`` i32[B,T] (-1: none), and where ``generate`` says so the translation, ``tokens`` i32[B,1,M],
        whose second axis keeps the lines of a file apart where they are joined."""

        def of_chunk(logits_BlV: Any, target_Bl: Any) -> Any:
            logp_Bl = _chosen(logits_BlV, target_Bl) - jax.nn.logsumexp(logits_BlV, -1)
            return logp_Bl, jnp.argmax(logits_BlV, -1) == target_Bl

        logp_BT, correct_BT = self._of_logits(of_chunk, variables, inputs)
        target_BT = jnp.asarray(inputs["target_out"])
        real_BT = target_BT != PADDING
        outputs = {"log_probability": real_BT * logp_BT, "correct": real_BT & correct_BT, "target": target_BT}
        return {**outputs, "tokens": self.translate(variables, inputs)[:, None]} if self.generate else outputs

    def translate(self, variables: Variables, inputs: Batch) -> jax.Array:
        """i32[B,M]: what the model writes, up to the end token and then filled with it."""
        model: Any = self.model
        if getattr(model, "scan", False):  # a stack has no cache
            model = model.clone(scan=False)
            variables = {**variables, "params": unstack_blocks(variables["params"])}
        never = sorted({t for t in (self.pad_id, self.start_id) if t is not None and t != self.end_id})
        writes = _Writes(model, jnp.asarray(inputs["source_segments"]), never)
        start_B1 = jnp.asarray(inputs["target_in"])[:, :1]
        source_BS = jnp.asarray(inputs["source"])
        most = self.max_length or inputs["target_in"].shape[1]
        plain = nn.logical_axis_rules(()) if model is not self.model else contextlib.nullcontext()
        with model_errors(), plain:
            if self.beams == 1:
                return greedy_tokens(
                    writes, variables, start_B1, max_new_tokens=most, end=self.end_id, source_BS=source_BS
                )
            tokens_BNM, _ = beam_tokens(
                writes,
                variables,
                start_B1,
                max_new_tokens=most,
                beams=self.beams,
                end=self.end_id,
                length_penalty=self.length_penalty,
                source_BS=source_BS,
            )
            return tokens_BNM[:, 0]

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """What ``predict`` gives, and ``reference`` where there is one; ``loss`` in nats per token, without smoothing,
        and ``accuracy``, the share of tokens that are right where those before them are given."""
        outputs, mask_B1 = self.predict(variables, batch), batch["mask"][:, None]
        weight = jnp.sum(_real(outputs["target"]) * mask_B1)
        given = {name: jnp.asarray(batch[name]) for name in ("reference",) if name in batch}
        return {**outputs, **given}, {
            "loss": Sum(-jnp.sum(outputs["log_probability"] * mask_B1), weight),
            "accuracy": Sum(jnp.sum(outputs["correct"] * mask_B1), weight),
        }

    def _of_logits(self, of_chunk: Any, variables: Variables, batch: Batch, key: jax.Array | None = None) -> PyTree:
        """``of_chunk(logits, targets)`` of all positions; ``key``: as in training."""
        y_BTD = self.hidden(variables, batch, key is not None, key)

        def of_hidden(y_BlD: Any, target_Bl: Any) -> Any:
            return of_chunk(self.logits(variables, y_BlD), target_Bl)

        return chunked_loss.over_chunks(of_hidden, y_BTD, batch["target_out"], self.chunks(y_BTD.shape[1]))

    def hidden(
        self, variables: Variables, batch: Batch, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """f32[B,T,D]: what ``logits`` reads."""
        with model_errors():
            y_BTD: Any = self.model.apply(
                variables,
                batch["source"],
                batch["target_in"],
                batch["source_segments"],
                train=train,
                rngs=None if key is None else {"dropout": key},
                method="hidden",
            )
        return y_BTD

    def logits(self, variables: Variables, y_BlD: jax.Array) -> jax.Array:
        """f32[B,l,V] of each token."""
        logits_BlV: Any = self.model.apply(variables, y_BlD, method="logits")
        return logits_BlV

    def cross_entropy(self, logits_BlV: jax.Array, target_Bl: jax.Array) -> jax.Array:
        """f32[B,l]: what training counts, in nats against the smoothed targets."""
        smooth, chosen_Bl = self.label_smoothing, _chosen(logits_BlV, target_Bl)
        wanted_Bl = (1 - smooth) * chosen_Bl + smooth * jnp.mean(logits_BlV, -1) if smooth else chosen_Bl
        return jax.nn.logsumexp(logits_BlV, -1) - wanted_Bl

    def targets(self, batch: Batch) -> tuple[Any, jax.Array]:
        """The targets, i32[B,T], and how much each counts, f32[B,T]."""
        return batch["target_out"], _real(batch["target_out"]) * batch["mask"][:, None]

    def chunks(self, T: int) -> int:
        """C."""
        return chunked_loss.count(T, getattr(self.model, "vocab_size", None), self.logit_chunks)

    # -- on the host -----------------------------------------------------------------------------------------------

    def meters(self) -> Mapping[str, Meter]:
        """``perplexity``, and of what was written ``bleu`` (Papineni et al. 2002) and ``chrf`` (Popović 2015), both by
        sacrebleu against the references as they stand: 0 to 100. What BLEU takes for words follows the script of the
        references (see ``metrics.bleu``); ``bleu_signature`` is sacrebleu's line about it."""
        return {"perplexity": perplexity.meter(), "texts": CollectAll(self._compared, ("tokens", "reference"))}

    def _compared(self, examples: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        if not {"tokens", "reference"} <= examples.keys() or self.tokenizer is None:
            return {}
        return bleu.scores(self._texts(examples["tokens"][:, 0]), transcripts.references(examples))

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """The ``translation``, a line for each line that was read.

        Raises:
          UserError: the task does not generate.
        """
        if "tokens" not in output:
            raise UserError("config.task.generate is false: this model was not asked to write translations.")
        return {"translation": "\n".join(self._texts(output["tokens"]))}

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """The targets that were hardest to predict, and what was written in their place."""
        logp_NT, target_NT = (evaluated.examples[name] for name in ("log_probability", "target"))
        real_NT, tokens = target_NT != PADDING, evaluated.examples.get("tokens")

        def pieces(n: int) -> tuple[str, list[tuple[str, float]]]:
            written = "" if tokens is None else f"; written: {self._texts(tokens[n])[0]}"
            target_T = textual.pieces_of(self.tokenizer, target_NT[n][real_NT[n]])
            return written, list(zip(target_T, (-logp_NT[n][real_NT[n]]).tolist(), strict=True))

        yield figures.hardest_passages(logp_NT, real_NT, "token", pieces)

    def _texts(self, tokens_NM: np.ndarray) -> list[str]:
        """The text of each row, up to its end token."""
        rows = []
        for tokens_M in np.asarray(tokens_NM):
            row = tokens_M[tokens_M != PADDING].tolist()  # of batches of several lengths
            rows.append(row[: row.index(self.end_id)] if self.end_id in row else row)
        return [" ".join(textual.text_of(self.tokenizer, row).split()) for row in rows]


@dataclasses.dataclass(frozen=True)
class _Writes:
    """The model as ``decoding`` sees it: it knows what of the source is padding, and some tokens it never writes."""

    model: Any
    segments_BS: Array
    never: Sequence[int]

    def cache(self, *sizes: int) -> PyTree:
        return self.model.cache(*sizes)

    def apply(self, variables: Variables, *args: Any, method: str, **words: Any) -> Any:
        if method == "decode" and len(args) == 3:  # with a source
            args = (*args, self.segments_BS)
        found = self.model.apply(variables, *args, method=method, **words)
        return found.at[..., jnp.array(self.never, jnp.int32)].set(NEVER) if method == "logits" else found


def _chosen(logits_BlV: jax.Array, target_Bl: jax.Array) -> jax.Array:
    """The logit of each target; of any token where there is none."""
    return jnp.take_along_axis(logits_BlV, jnp.maximum(target_Bl, 0)[..., None], -1)[..., 0]


def _real(target_BT: Any) -> jax.Array:
    """f32[B,T]: 1 where there is a target."""
    return (jnp.asarray(target_BT) != PADDING).astype(jnp.float32)
