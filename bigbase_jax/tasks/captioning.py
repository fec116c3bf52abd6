"""What is on a picture, in words: a decoder that reads the picture and writes its caption, or goes on with a prompt.

Axes: B examples, N examples of a split, H height, W width, C captions of a picture, L length, D width of the decoder, P
places of a picture, Q tokens of a prompt, T tokens that are written.
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
    Array,
    Batch,
    Card,
    Evaluated,
    Example,
    Figure,
    Gallery,
    Loss,
    Meter,
    Metric,
    Sum,
    UserError,
    Variables,
)
from bigbase_jax.decoding.sampling import greedy_tokens
from bigbase_jax.evaluate import CollectAll
from bigbase_jax.tasks import figures, textual
from bigbase_jax.tasks.classification import normalised
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.tasks.metrics import bleu


@dataclasses.dataclass(frozen=True, eq=False)
class Captioning:
    """A picture-reading decoder (see ``models.picture_reader``), trained on captions.

    A batch holds what ``tasks.contrastive.Contrastive`` says; and ``prompt`` i32[B,Q], tokens with -1 behind them,
    which the answer goes on from: none, where a caption is wanted. ``tokens`` have it too, and it is not learned: an
    answer begins behind it. Of several captions, one is drawn for each step; all are measured.

    Attributes:
      model: see ``models.picture_reader``.
      tokenizer: ``Tokenizer.state()``, to show texts; None: they are shown as numbers.
      length: L.
      cls_id, sep_id, end_id: what a caption begins with, and what it ends with: ``sep_id``, or else ``end_id``.
      mean, std: of the pictures; see ``Classification``.
      max_length: T; None: L.

    Raises:
      UserError: a value out of range.
    """

    model: nn.Module
    tokenizer: str | None = None
    length: int | None = None
    cls_id: int | None = None
    sep_id: int | None = None
    end_id: int | None = None
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    max_length: int | None = None

    inputs: ClassVar[tuple[str, ...]] = ("image", "prompt")
    batch_coupled: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "bleu": Metric("max", title="BLEU"),
        "chrf": Metric("max", title="chrF"),
        "loss": Metric("min", "nats"),
    }

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"max_length is {self.max_length}; it must be at least 1.")
        textual.check_vocabulary(getattr(self.model, "decoder", self.model), self.tokenizer)

    @property
    def end(self) -> int | None:
        """The token that a caption ends with."""
        return self.end_id if self.sep_id is None else self.sep_id

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the pictures, or the length of texts is not known.
        """
        if self.length is None or self.end is None:
            raise UserError("the task does not know the length of captions or the token that ends them; set them.")
        image_1HWC = self._normalised(jnp.zeros((1, *batch["image"].shape[1:]), batch["image"].dtype))
        with model_errors():
            return self.model.init(key, image_1HWC, jnp.zeros((1, self.length - 1), jnp.int32))

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """Cross-entropy in nats; its weight is the number of tokens."""
        draw, dropout = jax.random.split(key)
        tokens_BL, segments_BL = textual.drawn(batch, draw)
        mutable = [name for name in variables if name != "params"]
        how: dict[str, Any] = {"train": True, "rngs": {"dropout": dropout}, "mutable": mutable}
        with model_errors():
            given = self._normalised(batch["image"]), tokens_BL[:, :-1], segments_BL[:, :-1]
            logits_BLV, state = self.model.apply(variables, *given, **how)
        answer_BL = (segments_BL > 0) & _behind(batch["prompt"], tokens_BL.shape[1])
        weight_BL = answer_BL[:, 1:] * jnp.asarray(batch["mask"])[:, None]
        return Loss({"loss": _nats(logits_BLV, tokens_BL[:, 1:], weight_BL)}), dict(state)

    def see(self, variables: Variables, image_BHWC: Array) -> jax.Array:
        """f32[B,P,D]: pictures as the decoder reads them."""
        with model_errors():
            found: Any = self.model.apply(variables, self._normalised(image_BHWC), method="see")
            return found

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``written`` i32[B,T]: the likeliest token each time, up to the end and then filled with -1."""
        model: Any = self.model
        seen_BPD = self.see(variables, inputs["image"])
        with model_errors():
            prompt_BQ = jnp.asarray(inputs["prompt"])
            found_BT = greedy_tokens(
                model,
                variables,
                jnp.maximum(prompt_BQ, 0),
                jnp.maximum(jnp.sum(prompt_BQ >= 0, 1), 1),
                max_new_tokens=self.max_length or self.length or 1,
                end=self.end,
                source_BS=seen_BPD,
            )
        ended_BT = jnp.cumsum(found_BT == self.end, axis=1) > 0
        return {"written": jnp.where(ended_BT, textual.PADDING, found_BT)}

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, Array], Mapping[str, Sum]]:
        """What ``predict`` gives, and ``tokens`` i32[B,C,L], -1 where there are none; ``loss`` over all captions."""
        tokens_BCL, segments_BCL = jnp.asarray(batch["tokens"]), jnp.asarray(batch["segment_ids"])
        B, C, L = tokens_BCL.shape
        seen_BPD = self.see(variables, batch["image"])
        with model_errors():
            tokens_NL, segments_NL = tokens_BCL.reshape(B * C, L), segments_BCL.reshape(B * C, L)
            given = jnp.repeat(seen_BPD, C, 0), tokens_NL[:, :-1], segments_NL[:, :-1]
            hidden: Any = self.model.apply(variables, *given, method="hidden")
            logits: Any = self.model.apply(variables, hidden, method="logits")
        answer_BCL = (segments_BCL > 0) & _behind(batch["prompt"], L)[:, None]
        weight_NL = answer_BCL.reshape(B * C, L)[:, 1:] * jnp.repeat(jnp.asarray(batch["mask"]), C)[:, None]
        shown_BCL = jnp.where(answer_BCL, tokens_BCL, textual.PADDING)
        sums = {"loss": _nats(logits, tokens_NL[:, 1:], weight_NL)}
        return {**self.predict(variables, batch), "tokens": shown_BCL}, sums

    def _normalised(self, image_BHWC: Array) -> jax.Array:
        with model_errors():
            return normalised(image_BHWC, self.mean, self.std)

    # -- on the host -----------------------------------------------------------------------------------------------

    def meters(self) -> Mapping[str, Meter]:
        """``bleu`` and ``chrf`` against all captions of a picture."""

        def scores(examples: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
            written = [self._text(x) for x in examples["written"]]
            said = [[self._text(x) or None for x in some] for some in examples["tokens"]]
            first = [texts[0] or "" for texts in said]
            return bleu.scores(written, first, [list(column) for column in zip(*said, strict=True)][1:])

        return {"captions": CollectAll(scores, ("written", "tokens"))}

    def _text(self, tokens_T: np.ndarray) -> str:
        known = tokens_T[tokens_T >= 0]
        marks = [token for token in (self.cls_id, self.end) if token is not None]
        return textual.text_of(self.tokenizer, known[~np.isin(known, marks)].tolist()).strip()

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """``caption``, or what goes on from the prompt."""
        return {"caption": self._text(np.asarray(output["written"]))}

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """Pictures, each with what was written and with its first caption."""
        x = evaluated.examples
        if not {"written", "tokens"} <= x.keys():
            return
        index_N = x.get("index", np.arange(len(x["written"])))
        cards = [
            Card(int(index_N[n]), f"{self._text(x['written'][n])} (given: {self._text(x['tokens'][n, 0])})")
            for n in range(min(len(index_N), figures.SHOWN))
        ]
        yield Gallery("Captions", cards)


def _behind(prompt_BQ: Array, length: int) -> jax.Array:
    """bool[B,L]: where a text of so many tokens is behind its prompt."""
    return jnp.arange(length) >= jnp.sum(jnp.asarray(prompt_BQ) >= 0, 1)[:, None]


def _nats(logits_NLV: Array, target_NL: Array, weight_NL: Array) -> Sum:
    logp_NLV = jax.nn.log_softmax(logits_NLV)
    chosen_NL = jnp.take_along_axis(logp_NLV, jnp.asarray(target_NL)[..., None], -1)[..., 0]
    return Sum(-jnp.sum(chosen_NL * weight_NL), jnp.sum(weight_NL).astype(jnp.float32))
