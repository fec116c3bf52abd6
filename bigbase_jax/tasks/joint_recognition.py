"""Speech recognition by CTC and attention together: trained at once, and searched at once (Watanabe et al. 2017).

The search is one pass: beams of the decoder, each next token scored by CTC's prefix probability as well. It needs
nothing but what ``decoding.beams`` has, runs within the compiled step, and so is the same in evaluation, prediction
and service; the language model then chooses among the beams that are left.

Axes: see ``tasks.recognition``; N beams, L = V + 1 labels, b = B x N, D width of the model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Batch, Loss, Metric, PyTree, Sum, UserError, Variables
from bigbase_jax.decoding import ctc, ctc_prefix
from bigbase_jax.decoding.beams import NEVER, beam_tokens
from bigbase_jax.models.speech_encoder import real
from bigbase_jax.tasks.classification import applied_in_training
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.tasks.recognition import Recognition


@dataclasses.dataclass(frozen=True)
class JointRecognition(Recognition):
    """``Recognition`` by a model that has a decoder as well.

    Attributes:
      model: see ``models.joint_ctc.JointCTC``.
      ctc_weight: of CTC's loss and scores; the decoder's have the rest.
      label_smoothing: of the decoder's targets.
      max_tokens: that a transcript may have; None: as many as there are frames.
    """

    ctc_weight: float = 0.3
    label_smoothing: float = 0.1
    max_tokens: int | None = None

    metrics: ClassVar[Mapping[str, Metric]] = {
        **Recognition.metrics,
        "ctc": Metric("min", "nats", "CTC loss"),
        "attention": Metric("min", "nats", "Attention loss"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ctc_weight", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is 0 to 1.")

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """The weighted sum of both losses, in nats per token; each is logged."""
        x_BFM, lengths_B, key = self.masked(batch, key)
        target_BU, out_BU = self._targets(batch)
        found: Any
        found, state = applied_in_training(self.model, variables, key, x_BFM, lengths_B, target_BU)
        sums = self._losses(found, out_BU, batch, self.label_smoothing)
        return Loss({"loss": sums.pop("loss")}, sums), state

    def _targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(the start and the tokens, the tokens and the end), i32[B,U+1]; behind the end the end again."""
        labels_BU, length_B = jnp.asarray(batch["labels"]), jnp.asarray(batch["labels_length"])
        tokens_BU = jnp.where(real(length_B, labels_BU.shape[1]), labels_BU, self.blank)
        pad = functools.partial(jnp.pad, tokens_BU, constant_values=self.blank)
        return pad(((0, 0), (1, 0))), pad(((0, 0), (0, 1)))

    def _losses(self, found: tuple[Any, Any, Any], out_BU: Any, batch: Batch, smoothing: float) -> dict[str, Sum]:
        logits_BSL, frames_B, next_BUL = found
        by_ctc, weight = self.ctc_loss(logits_BSL, frames_B, batch), self.ctc_weight
        length_B = jnp.asarray(batch["labels_length"])
        log_p_BUL = jax.nn.log_softmax(next_BUL)
        chosen_BU = jnp.take_along_axis(log_p_BUL, out_BU[..., None], -1)[..., 0]
        nats_BU = -(1 - smoothing) * chosen_BU - smoothing * jnp.mean(log_p_BUL, -1)
        weight_B1 = self.alignable(frames_B, batch)[:, None]
        total = jnp.sum(weight_B1 * real(length_B + 1, out_BU.shape[1]) * nats_BU)
        attention = Sum(total, by_ctc.weight)
        both = Sum(weight * by_ctc.total + (1 - weight) * total, by_ctc.weight)
        return {"loss": both, "ctc": by_ctc, "attention": attention}

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """What ``Recognition`` gives, and of a search ``tokens`` i32[B,N,T], -1 behind the end, the best first, and
        their ``scores`` f32[B,N]."""
        with model_errors():
            heard: Any = self.model.apply(variables, *self.bands(inputs), method="encode")
            logits_BSL: Any = self.model.apply(variables, heard[0], method="heard")
        found = self.outputs(logits_BSL, heard[1], inputs)
        if self.beams > 1:
            tokens_BNT, found["scores"] = self._searched(variables, heard, logits_BSL)
            ended_BNT = jnp.cumsum(tokens_BNT == self.blank, axis=-1) > 0
            found["tokens"] = jnp.where(ended_BNT, -1, tokens_BNT)
        return found

    def _searched(self, variables: Variables, heard: tuple[Any, Any], logits_BSL: Any) -> tuple[Any, Any]:
        h_BSD, frames_B = heard
        log_p_BSL = ctc_prefix.framed(logits_BSL, frames_B)
        writes = _Writes(self.model, log_p_BSL, frames_B, self.ctc_weight)
        return beam_tokens(
            writes,
            variables,
            jnp.full((len(h_BSD), 1), self.blank, jnp.int32),
            max_new_tokens=min(self.max_tokens or h_BSD.shape[1] + 1, h_BSD.shape[1] + 1),
            beams=self.beams,
            end=self.blank,
            length_penalty=0.0,
            source_BS=h_BSD,
            scores=True,
        )

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """What ``predict`` gives, and ``reference``; the losses without smoothing."""
        outputs = self.predict(variables, batch)
        target_BU, out_BU = self._targets(batch)
        found: Any = self.model.apply(variables, *self.bands(batch), target_BU)
        sums = self._losses(found, out_BU, batch, 0.0)
        return {**outputs, "reference": jnp.asarray(batch["reference"])}, sums

    # -- on the host -----------------------------------------------------------------------------------------------

    def tokens(self, output: Mapping[str, np.ndarray], timed: bool = True) -> list[ctc.Token]:
        """The tokens of the best beam, by the language model as well where there is one."""
        if "tokens" not in output:
            return super().tokens(output, timed)
        rows = [tuple(row[row >= 0].tolist()) for row in np.asarray(output["tokens"])]
        scores = np.asarray(output["scores"], np.float64)
        ranked = [
            (score + self._judged(row), row) for score, row in zip(scores, rows, strict=True) if score > NEVER / 2
        ]
        best = max(ranked)[1] if ranked else ()
        tokens_SK, log_p_SK = np.asarray(output["candidates"]), np.asarray(output["log_p"], np.float64)
        aligned = ctc.align(tokens_SK, log_p_SK, best, self.blank) if timed else []
        return aligned or [ctc.Token(token, 0, 0) for token in best]

    def _judged(self, tokens: tuple[int, ...]) -> float:
        if self._scorer is None:
            return 0.0
        state, total = self._scorer.start(), 0.0
        for token in tokens:
            more, state = self._scorer.after(state, token)
            total += more
        return total + self._scorer.end(state)


@dataclasses.dataclass(frozen=True)
class _Writes:
    """The model as ``decoding`` sees it: what it calls logits are the weighted log-probabilities of both heads."""

    model: Any
    log_p_BSL: jax.Array
    frames_B: jax.Array
    weight: float

    def cache(self, batch_size: int, length: int, frames: int) -> PyTree:
        none = jax.tree.map(jnp.zeros_like, ctc_prefix.empty(self.log_p_BSL))
        return {"decoder": self.model.cache(batch_size, length, frames), "prefix": none}

    def apply(self, variables: Variables, *args: Any, method: str, **words: Any) -> Any:
        if method == "logits":
            return args[0]
        kept: Any = variables["cache"]
        tokens_b1, position_b, *source = args
        given = {**variables, "cache": kept["decoder"]}
        frames = (self.frames_B,) if source else ()
        y_b1D, after = self.model.apply(given, tokens_b1, position_b, *source, *frames, **words, method="decode")
        next_bL = jax.nn.log_softmax(self.model.apply(variables, y_b1D, method="logits")[:, 0])
        if source:
            prefix = ctc_prefix.empty(self.log_p_BSL)
        else:  # of a beam that has ended nothing is read any more
            token_b = jnp.minimum(tokens_b1[:, 0], self.log_p_BSL.shape[2] - 2)
            prefix = ctc_prefix.longer(self.log_p_BSL, kept["prefix"], token_b)
        more_bL = ctc_prefix.following(self.log_p_BSL, prefix) - prefix.score[:, None]
        score_bL = (1 - self.weight) * next_bL + self.weight * jnp.clip(more_bL, -1e4, 0)
        return score_bL[:, None], {"cache": {"decoder": after["cache"], "prefix": prefix}}
