"""Masked language modelling: hidden tokens, from those on both sides of them; and whether one text follows another.

Axes: B examples of a batch, N examples of a split, L length, M the most hidden tokens of an example, D model width, V
entries of the vocabulary, G guesses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Batch, Evaluated, Example, Figure, Loss, Meter, Metric, Sum, UserError, Variables, joined
from bigbase_jax.tasks import figures, textual
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.tasks.metrics import perplexity

NONE = -1
"""The place or the target of a hidden token that there is not."""
GUESSES = 5


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModel:
    """An encoder trained to guess hidden tokens (Devlin et al. 2019), and measured by how well it does.

    A batch holds ``tokens``, ``segment_ids``, ``positions`` and ``token_type_ids``, i32[B,L]; and ``at`` and
    ``targets``, i32[B,M]: where tokens were hidden, and what they were; -1: nowhere, or not known. See
    ``data.transforms.mask_tokens``. Logits are computed for these M positions alone.

    Where it learns to tell whether the second text of a pair follows the first (section 3.1), a batch also holds
    ``next`` i32[B], 0 where it does and 1 where it does not; see ``data.sources.masked_text``.

    Attributes:
      model: a Linen module with the methods ``hidden`` and ``masked_logits``, which an attribute ``masked`` gives it
        (``models.bert.Bert``), and ``next_logits`` (``next_sentence``): they are set, and the model's other heads are
        left out.
      tokenizer: ``Tokenizer.state()``, to show tokens as text; None: tokens are shown as numbers.
      next_sentence: learn ``next`` too. None: if the data has pairs.

    Raises:
      UserError: a model that cannot have such a head, or whose vocabulary is smaller than the tokenizer's.
    """

    model: nn.Module
    tokenizer: str | None = None
    next_sentence: bool | None = None

    inputs: ClassVar[tuple[str, ...]] = ("tokens", "segment_ids", "positions", "token_type_ids", "at", "targets")
    batch_coupled: ClassVar[bool] = False
    chosen: ClassVar[str] = "tokens"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "loss": Metric("min", "nats"),
        "masked_loss": Metric("min", "nats", "Loss of hidden tokens"),
        "masked_accuracy": Metric("max", "%", "Accuracy of hidden tokens"),
        "next_loss": Metric("min", "nats", "Loss of the next sentence"),
        "next_accuracy": Metric("max", "%", "Accuracy of the next sentence"),
        "perplexity": Metric("min"),
        "hidden_tokens": Metric(),
    }
    merge = staticmethod(joined)

    def __post_init__(self) -> None:
        if not hasattr(self.model, "masked"):
            raise UserError(f"{type(self.model).__name__} cannot guess hidden tokens; a model such as Bert can.")
        heads: dict[str, Any] = {"masked": True, "pooled": False, "num_classes": None}
        heads["next_sentence"] = bool(self.next_sentence)
        object.__setattr__(self, "model", self.model.clone(**heads))
        textual.check_vocabulary(self.model, self.tokenizer)

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the sequences, or there are no pairs of them.
        """
        if self.next_sentence and "next" not in batch:
            raise UserError("next_sentence needs pairs of texts; set config.data.dataset.next_sentence too.")
        one_1L = jnp.zeros((1, batch["tokens"].shape[1]), jnp.int32)
        with model_errors():
            return self.model.init(key, one_1L, one_1L, one_1L, one_1L)

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """Cross-entropy in nats; its weight is the number of hidden tokens.

        Devlin et al. add the mean over pairs to that over hidden tokens. Here each hidden token bears, beside its own
        cross-entropy, that of ``next`` of its row: the same where all rows hide as many, and a plain sum over rows,
        so exact with any padding, slices and devices.
        """
        logits_BMV, logits_B2 = self._logits(variables, batch, train=True, key=key)
        loss = self.loss_from(logits_BMV, batch)
        if logits_B2 is not None:
            next_B = _of_next(jax.nn.log_softmax(logits_B2), batch)
            total, weight = loss.terms["loss"]
            loss = Loss({"loss": Sum(total - jnp.sum(jnp.sum(self.counts(batch), 1) * next_B), weight)})
        return loss, textual.state_of(variables)

    def train_logits(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[jax.Array, Variables]:
        """f32[B,M,V] in training, and the model state after it."""
        return self._logits(variables, batch, train=True, key=key)[0], textual.state_of(variables)

    def logits(self, variables: Variables, inputs: Batch) -> jax.Array:
        """f32[B,M,V] of each token at each hidden place (anything where there is none)."""
        return self._logits(variables, inputs)[0]

    def loss_from(self, logits_BMV: jax.Array, batch: Batch) -> Loss:
        """The training loss of logits, without that of ``next``."""
        weight_BM = self.counts(batch)
        total = -jnp.sum(weight_BM * _of_targets(jax.nn.log_softmax(logits_BMV), batch))
        return Loss({"loss": Sum(total, jnp.sum(weight_BM))})

    def counts(self, batch: Batch) -> Any:
        """f32[B,M]: how much each row of logits counts."""
        return _known(batch) * batch["mask"][:, None]

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """What was hidden, and the ``GUESSES`` most probable tokens.

        Returns:
          ``tokens`` i32[B,L] (-1: padding), ``at`` and ``target`` i32[B,M], ``hidden`` i32[B,1], how many; ``guess``
          i32[B,M,G], ``guess_log_probability`` f32[B,M,G] and ``log_probability`` f32[B,M] of the target; with
          ``next_sentence``, ``next_log_probability`` f32[B,2].
        """
        logits_BMV, logits_B2 = self._logits(variables, inputs)
        logp_BMV = jax.nn.log_softmax(logits_BMV)
        guess_logp_BMG, guess_BMG = jax.lax.top_k(logp_BMV, min(GUESSES, logp_BMV.shape[-1]))
        at_BM = jnp.asarray(inputs["at"])
        return {
            "tokens": textual.shown_tokens(inputs),
            "at": at_BM,
            "target": jnp.asarray(inputs["targets"]),
            "hidden": jnp.sum(at_BM != NONE, 1, keepdims=True),
            "guess": guess_BMG,
            "guess_log_probability": guess_logp_BMG,
            "log_probability": _known(inputs) * _of_targets(logp_BMV, inputs),
            **({} if logits_B2 is None else {"next_log_probability": jax.nn.log_softmax(logits_B2)}),
        }

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """What ``predict`` gives, and ``next`` where there is one; ``loss`` in nats per hidden token, and
        ``masked_accuracy``, the share of them guessed at once.

        With ``next_sentence``, ``loss`` is what is trained, of which ``masked_loss`` is the part of the hidden tokens;
        ``next_loss`` and ``next_accuracy`` are means over pairs.
        """
        outputs = self.predict(variables, batch)
        known_BM = (outputs["target"] != NONE) * batch["mask"][:, None]
        right_BM = outputs["guess"][..., 0] == outputs["target"]
        count = jnp.sum(known_BM)
        found = {
            "loss": Sum(-jnp.sum(outputs["log_probability"] * known_BM), count),
            "masked_accuracy": Sum(jnp.sum(right_BM * known_BM), count),
        }
        if not self.next_sentence:
            return outputs, found
        logp_B2, mask_B = outputs["next_log_probability"], jnp.asarray(batch["mask"])
        nats_B, right_B = -_of_next(logp_B2, batch), jnp.argmax(logp_B2, -1) == batch["next"]
        masked, pairs = found["loss"], jnp.sum(mask_B)
        return {**outputs, "next": jnp.asarray(batch["next"])}, {
            **found,
            "loss": Sum(masked.total + jnp.sum(jnp.sum(known_BM, 1) * nats_B), count),
            "masked_loss": masked,
            "next_loss": Sum(jnp.sum(nats_B * mask_B), pairs),
            "next_accuracy": Sum(jnp.sum(right_B * mask_B), pairs),
        }

    def _logits(
        self, variables: Variables, batch: Batch, train: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """f32[B,M,V], and of ``next``, f32[B,2]."""
        words = (batch[name] for name in ("tokens", "segment_ids", "positions", "token_type_ids"))
        rngs = None if key is None else {"dropout": key}
        with model_errors():
            y_BLD: Any = self.model.apply(variables, *words, train=train, rngs=rngs, method="hidden")
            at_BM1 = jnp.maximum(jnp.asarray(batch["at"]), 0)[..., None]
            y_BMD = jnp.take_along_axis(y_BLD, at_BM1, 1)
            logits_BMV: Any = self.model.apply(variables, y_BMD, method="masked_logits")
            if not self.next_sentence:
                return logits_BMV, None
            logits_B2: Any = self.model.apply(variables, y_BLD, method="next_logits")
        return logits_BMV, logits_B2

    # -- on the host -----------------------------------------------------------------------------------------------

    def meters(self) -> Mapping[str, Meter]:
        """``perplexity``, the exponential of the mean loss of hidden tokens, and ``hidden_tokens``, their number."""
        return {"perplexity": perplexity.meter("hidden_tokens")}

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """What the model puts in place of hidden tokens.

        Returns:
          ``text``, the tokens as the model saw them; ``hidden``: for each hidden token its number in ``text``, what it
          was (``None`` where the text itself has a mask) and the guesses, [[token, probability], ...]; ``loss`` and
          ``masked_accuracy`` where something is known.
        """
        n = len(output["hidden"])  # examples that the text was read as
        tokens_nL, at_nM = (np.reshape(output[name], (n, -1)) for name in ("tokens", "at"))
        before_n = np.cumsum([0, *(tokens_nL != NONE).sum(1)[:-1]])
        at_M = np.where(at_nM != NONE, at_nM + before_n[:, None], NONE).reshape(-1)
        target_M, real_M = output["target"], at_M != NONE
        guess_MG, p_MG = output["guess"], np.exp(output["guess_log_probability"].astype(np.float64))
        hidden = [
            {
                "at": int(at_M[m]),
                "was": textual.pieces_of(self.tokenizer, [target_M[m]])[0] if target_M[m] != NONE else None,
                "guesses": [
                    [piece, round(float(p), 4)]
                    for piece, p in zip(textual.pieces_of(self.tokenizer, guess_MG[m]), p_MG[m], strict=True)
                ],
            }
            for m in np.flatnonzero(real_M)
        ]
        answer: dict[str, Any] = {
            "text": textual.pieces_of(self.tokenizer, tokens_nL[tokens_nL != NONE]),
            "hidden": hidden,
        }
        known_M = target_M != NONE
        if known_M.any():
            answer["loss"] = float(-output["log_probability"][known_M].astype(np.float64).mean())
            answer["masked_accuracy"] = float((guess_MG[known_M, 0] == target_M[known_M]).mean())
        return answer

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """The examples that were hardest to guess, with what was hidden and what was guessed in its place."""
        examples = evaluated.examples
        known_NM = examples["target"] != NONE

        def pieces(n: int) -> tuple[str, list[tuple[str, float]]]:
            tokens_T = examples["tokens"][n][examples["tokens"][n] != NONE]
            found = [(f"{piece} ", 0.0) for piece in textual.pieces_of(self.tokenizer, tokens_T)]
            for m in np.flatnonzero(known_NM[n]):
                was, guess = textual.pieces_of(self.tokenizer, [examples["target"][n, m], examples["guess"][n, m, 0]])
                shown = f"{was} " if was == guess else f"{was} (not {guess}) "
                found[examples["at"][n, m]] = (shown, -float(examples["log_probability"][n, m]))
            return "", found

        yield figures.hardest_passages(examples["log_probability"], known_NM, "hidden token", pieces)


def _known(batch: Batch) -> jax.Array:
    """f32[B,M]: 1 where it is known what was hidden."""
    return (jnp.asarray(batch["targets"]) != NONE).astype(jnp.float32)


def _of_targets(logp_BMV: jax.Array, batch: Batch) -> jax.Array:
    """f32[B,M]: the log-probability of what was hidden."""
    target_BM1 = jnp.maximum(jnp.asarray(batch["targets"]), 0)[..., None]
    return jnp.take_along_axis(logp_BMV, target_BM1, -1)[..., 0]


def _of_next(logp_B2: jax.Array, batch: Batch) -> jax.Array:
    """f32[B]: the log-probability of what is true of the second text."""
    return jnp.take_along_axis(logp_B2, jnp.asarray(batch["next"])[:, None], -1)[:, 0]
