"""Pictures and texts that belong together: two towers, trained so that either finds the other.

Axes: B examples, H height, W width, C captions of a picture, L length, E width of the vectors, K labels, T templates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Array, Batch, Example, Loss, Meter, Metric, Sum, UserError, Variables
from bigbase_jax.tasks import in_batch, textual
from bigbase_jax.tasks.classification import normalised
from bigbase_jax.tasks.errors import model_errors

TEMPLATES = ("{}", "a photo of a {}.", "a picture of a {}.")
"""The first is how a label reads by itself; see ``Contrastive.label_texts``."""


def check_templates(templates: Sequence[str]) -> None:
    """Raises UserError where one has no place for a label, or several, or there are none."""
    if not templates or not all(template.count("{}") == 1 for template in templates):
        raise UserError(f"templates are {str(tuple(templates))[:80]}; each has {{}} once, where the label goes.")


@dataclasses.dataclass(frozen=True, eq=False)
class Contrastive:
    """CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023): each picture is to find its caption among all those of
    the batch, whatever devices hold them, and the other way round.

    A batch holds ``image`` u8[B,H,W,3], or floating point, taken as it is; ``tokens`` and ``segment_ids`` i32[B,C,L],
    the captions, and 0 in all segments of those that a picture does not have (see ``data.sources.image.captions``). Of
    several captions, one is drawn for each step, and the first is measured.

    Attributes:
      model: see ``models.clip``.
      tokenizer: ``Tokenizer.state()``; texts of labels are read by it.
      length: L.
      loss_kind: "softmax" or "sigmoid"; see ``in_batch``.
      mean, std: of the pictures; see ``Classification``.
      labels: what ``predict`` tells pictures apart by; (): it looks them up among the captions of the data.
      templates: sentences with ``{}`` for the label: its vector is the mean of theirs.
      item_names, item_titles: captions that are looked up, by number from 1; None: their numbers.
      top: captions, or labels, of an answer.

    Raises:
      UserError: an unknown word, or a value out of range.
    """

    model: nn.Module
    tokenizer: str | None = None
    length: int | None = None
    loss_kind: str = "softmax"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] = TEMPLATES
    item_names: Sequence[str] | None = None
    item_titles: Sequence[str] | None = None
    top: int = 5

    inputs: ClassVar[tuple[str, ...]] = ("image",)
    batch_coupled: ClassVar[bool] = True
    indexed: ClassVar[bool] = True
    zero_shot: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, Metric]] = {"loss": Metric("min", "nats")}

    def __post_init__(self) -> None:
        if self.loss_kind not in ("softmax", "sigmoid"):
            kinds = ("softmax", "sigmoid")
            raise UserError(f"there is no loss_kind {self.loss_kind!r}.{suggest(self.loss_kind, kinds, 'loss')}")
        for name in ("mean", "std", "labels", "templates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("item_names", "item_titles"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        if self.top < 1:
            raise UserError(f"top is {self.top}; an answer has at least 1 item.")
        check_templates(self.templates)
        textual.check_vocabulary(getattr(self.model, "text", self.model), self.tokenizer)

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: a tower does not fit the pictures, or the length of texts is not known.
        """
        if self.length is None:
            raise UserError("the task does not know the length of texts; set length.")
        image_1HWC = self._normalised(jnp.zeros((1, *batch["image"].shape[1:]), batch["image"].dtype))
        tokens_1L = jnp.zeros((1, self.length), jnp.int32)
        with model_errors():
            return self.model.init(key, image_1HWC, tokens_1L, tokens_1L + 1)

    def loss(self, variables: Variables, batch: Batch, key: jax.Array | None) -> tuple[Loss, Variables]:
        """In nats for each picture; without a key, of the first captions and as in inference."""
        how: dict[str, Any] = {}
        draw, dropout = (None, None) if key is None else jax.random.split(key)
        if dropout is not None:
            mutable = [name for name in variables if name != "params"]
            how = {"train": True, "rngs": {"dropout": dropout}, "mutable": mutable}
        tokens_BL, segments_BL = textual.drawn(batch, draw)
        with model_errors():
            found: Any = self.model.apply(variables, self._normalised(batch["image"]), tokens_BL, segments_BL, **how)
        (u_BE, v_BE, scale, bias), state = found if how else (found, textual.state_of(variables))
        real_B = jnp.asarray(batch["mask"])
        if self.loss_kind == "softmax":
            loss_B = in_batch.clip(u_BE, v_BE, scale, real_B)
        else:
            loss_B = in_batch.sigmoid(u_BE, v_BE, scale, bias, real_B)
        total = jnp.sum(jnp.where(real_B > 0, loss_B, 0.0))
        aux = {"scale": Sum(scale, jnp.float32(1))}
        return Loss({"loss": Sum(total, jnp.sum(real_B))}, aux if how else {}), dict(state)

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``vector`` f32[B,E] of each picture, of length 1."""
        with model_errors():
            found: Any = self.model.apply(variables, self._normalised(inputs["image"]), method="pictures")
            return {"vector": found}

    def items(self, variables: Variables, items: Batch) -> jax.Array:
        """f32[B,E] of texts: ``tokens`` and ``segment_ids`` i32[B,L]."""
        with model_errors():
            found: Any = self.model.apply(variables, items["tokens"], items["segment_ids"], method="texts")
            return found

    def scores(self, variables: Variables) -> tuple[jax.Array, jax.Array]:
        """``scale`` and ``bias``: an inner product of vectors becomes the logit ``scale * u . v + bias``."""
        found: Any = self.model.apply(variables, method="scores")
        return found

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, Array], Mapping[str, Sum]]:
        """``vector`` f32[B,E] of the pictures, ``captions`` f32[B,C,E] and ``tokens`` i32[B,C,L], -1 where there are
        none; and ``loss``, among the pictures of an evaluation batch."""
        if "tokens" not in batch or not variables.get("params"):
            return {}, {}
        tokens_BCL, segments_BCL = jnp.asarray(batch["tokens"]), jnp.asarray(batch["segment_ids"])
        B, C, L = tokens_BCL.shape
        flat = {"tokens": tokens_BCL.reshape(-1, L), "segment_ids": segments_BCL.reshape(-1, L)}
        captions_BCE = self.items(variables, flat).reshape(B, C, -1)
        shown_BCL = jnp.where(segments_BCL > 0, tokens_BCL, textual.PADDING)
        loss = self.loss(variables, batch, None)[0]
        return {**self.predict(variables, batch), "captions": captions_BCE, "tokens": shown_BCL}, dict(loss.terms)

    def _normalised(self, image_BHWC: Array) -> jax.Array:
        with model_errors():
            return normalised(image_BHWC, self.mean, self.std)

    # -- on the host -----------------------------------------------------------------------------------------------

    def meters(self) -> Mapping[str, Meter]:
        """None: what is measured of rankings is an evaluator's."""
        return {}

    def texts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """``tokens`` and ``segment_ids`` i32[N,L] of texts, as ``items`` takes them.

        Raises:
          UserError: the tokenizer or the length is not known.
        """
        if self.tokenizer is None or self.length is None:
            raise UserError("the task does not know its tokenizer or its length; set them, or give it data that does.")
        return textual.encoded(self.tokenizer, texts, self.length)

    def label_texts(self, labels: Sequence[str]) -> list[str]:
        """Each of the K labels in each of the T templates, label by label."""
        return [template.replace("{}", label) for label in labels for template in self.templates]

    def label_vectors(self, variables: Variables, texts: Batch, labels: int) -> jax.Array:
        """f32[K,E]: of the tokens of ``label_texts``, the mean of each label's vectors, of length 1 (Radford et al.
        2021, section 3.1.4)."""
        mean_KE = jnp.mean(self.items(variables, texts).reshape(labels, len(self.templates), -1), 1)
        return mean_KE / jnp.maximum(jnp.linalg.norm(mean_KE, axis=-1, keepdims=True), 1e-12)

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """Of the labels, ``label``, the likeliest, its ``probability`` and the ``probabilities`` of the best; or
        ``captions``, those that fit best, each with its cosine as ``score``; or else the ``vector``."""
        top = int(example.get("top", self.top))
        if "labels" in output:
            names = example.get("labels", self.labels)
            best = np.argsort(-output["labels"], kind="stable")[:top].tolist()
            shown = {names[k]: float(output["labels"][k]) for k in best}
            return {"label": names[best[0]], "probability": shown[names[best[0]]], "probabilities": shown}
        if "items" not in output:
            return {"vector": output["vector"].tolist()}
        found = [
            {"caption": self.item_names[item - 1] if self.item_names else str(item), "score": score}
            for item, score in zip(output["items"].tolist(), output["scores"].tolist(), strict=True)
            if item > 0
        ]
        return {"captions": found[:top]}
