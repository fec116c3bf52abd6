"""The bidirectional encoder: BERT, RoBERTa and their kin, with the heads that they are trained and used with.

Axes: B examples, L length, M masked positions, D model width, V entries of the vocabulary, K classes.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.layers import ACTIVATIONS, DTYPES, ModelError, classes, constrain, look_up
from bigbase_jax.models.transformer import KERNEL_INITS, Context, Style, Transformer

_init = nn.initializers.normal(0.02)  # BERT's, of all tables
BERT = Style(post_norm=True, epsilon=1e-12, kernel_init="normal")
CLASSIFIERS = ("pooled", "dense", "mean")


class Bert(Transformer):
    """A transformer that reads both ways (Devlin et al. 2019); its size is that of BERT-base.

    RoBERTa (Liu et al. 2019) is ``type_vocab_size=1, position_offset=2, classifier="dense"`` and an epsilon of 1e-5;
    MiniLM (Wang et al. 2020) and Chinese BERT are BERT of another size and vocabulary. Unlike theirs, attention weights
    are not dropped, and activations of the hidden layers are.

    ``hidden`` is the model; ``masked_logits``, ``next_logits`` and ``classify`` are heads on what it gives.

    Attributes:
      vocab_size: V.
      length: the longest sequence.
      width, depth, heads: D, blocks, heads.
      mlp_dim: of the hidden layers; None: 4 x width.
      type_vocab_size: kinds of tokens: which of two texts they belong to. 1: there is no difference.
      position_offset: the row of the first position in the table of ``length + position_offset`` rows.
      pooled: have ``pool``, a layer on the first token.
      masked: have ``masked_logits``, which guesses tokens; its last layer is the embedding, transposed.
      next_sentence: have ``next_logits``, on ``pool``: whether the second text follows the first.
      num_classes: K; None: there is no ``classify``.
      classifier: what ``classify`` reads: "pooled" (BERT), "dense" (the first token through a layer of its own, as
        RoBERTa) or "mean" (of all tokens).
      dropout: as ``Transformer``'s, and before ``classify``.
      style, dtype, remat, remat_policy, scan, sequence_attention, pipeline_microbatches: see ``Transformer``.

    Raises:
      ModelError: an unknown word among the attributes, sizes that are missing or do not divide, a sequence that is too
        long, or a head that the model does not have.
    """

    vocab_size: int | None = None
    length: int | None = None
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int | None = None
    type_vocab_size: int = 2
    position_offset: int = 0
    pooled: bool = False
    masked: bool = False
    next_sentence: bool = False
    num_classes: int | None = None
    classifier: str = "pooled"
    style: Style = dataclasses.field(default=BERT, kw_only=True)
    dropout: float = dataclasses.field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        look_up(dict.fromkeys(CLASSIFIERS), self.classifier, "classifier")
        self.style.sizes(self.width, self.heads)
        for name, least in (("type_vocab_size", 1), ("position_offset", 0)):
            if getattr(self, name) < least:
                raise ModelError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        super().__post_init__()

    @property
    def has_pooler(self) -> bool:
        """Whether there is ``pool``, for itself or for a head that reads it."""
        return self.pooled or self.next_sentence or (self.num_classes is not None and self.classifier == "pooled")

    def setup(self) -> None:
        self.check_given("vocab_size", "length")
        self.embedding = self.param("embedding", _init, (self.vocab_size, self.width))
        rows = (self.length or 0) + self.position_offset
        self.position = self.param("position", _init, (rows, self.width))
        self.type = self.param("type", _init, (self.type_vocab_size, self.width))
        self.norm = nn.LayerNorm(epsilon=self.style.epsilon, dtype=DTYPES[self.dtype])
        self.encoder = self.stack(self.depth, self.heads, self.mlp_dim)
        if self.has_pooler:
            self.pooler = nn.Dense(
                self.width, dtype=DTYPES[self.dtype], kernel_init=KERNEL_INITS[self.style.kernel_init]
            )
        if self.masked:
            self.lm = MaskedHead(self.style, self.dtype)
        if self.next_sentence:
            self.next = nn.Dense(2, kernel_init=KERNEL_INITS[self.style.kernel_init])
        if self.num_classes is not None:
            hidden = self.classifier == "dense"
            self.head = ClassHead(classes(self.num_classes), hidden, self.dropout, self.dtype, self.style.kernel_init)

    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"] | None = None,
        positions_BL: Int[Array, "B L"] | None = None,
        types_BL: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """``hidden`` [B, L, D], and of what the model has: ``pooled`` [B, D], ``masked`` [B, L, V], ``next_sentence``
        [B, 2] and ``classes`` [B, K]; see ``hidden``.
        """
        y_BLD = self.hidden(tokens_BL, segments_BL, positions_BL, types_BL, train)
        found = {"hidden": y_BLD}
        if self.has_pooler:
            found["pooled"] = self.pool(y_BLD)
        if self.masked:
            found["masked"] = self.masked_logits(y_BLD)
        if self.next_sentence:
            found["next_sentence"] = self.next_logits(y_BLD)
        if self.num_classes is not None:
            found["classes"] = self.classify(y_BLD, segments_BL, train)
        return found

    def hidden(
        self,
        tokens_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"] | None = None,
        positions_BL: Int[Array, "B L"] | None = None,
        types_BL: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B L D"]:
        """What the heads read.

        Args:
          segments_BL: a token sees those of the same segment only; padding is a segment, 0. None: all.
          positions_BL: in each segment from 0; None: in the sequence.
          types_BL: None: all 0.
        """
        L, dtype = tokens_BL.shape[1], DTYPES[self.dtype]
        if (self.length or 0) < L:
            raise ModelError(f"a sequence of {L} tokens is longer than the {self.length} positions of the model.")
        at_BL = (jnp.arange(L)[None] if positions_BL is None else positions_BL) + self.position_offset
        type_BL = jnp.zeros((1, 1), jnp.int32) if types_BL is None or self.type_vocab_size == 1 else types_BL
        x_BLD = self.embedding[tokens_BL] + self.position[at_BL] + self.type[type_BL]
        x_BLD = self.norm(constrain(x_BLD.astype(dtype), "batch", "length", "width"))
        return self.encoder(x_BLD, train=train, context=Context(segment_ids=segments_BL))

    def pool(self, y_BLD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        """The first token through a layer and tanh."""
        if not self.has_pooler:
            raise ModelError("the model has no pooler; set pooled.")
        return jnp.tanh(self.pooler(y_BLD[:, 0]))

    def masked_logits(self, y_BMD: Float[Array, "B M D"]) -> Float32[Array, "B M V"]:
        """Of every token of the vocabulary, at the positions that ``hidden`` gave these vectors."""
        if not self.masked:
            raise ModelError("the model has no head for masked tokens; set masked.")
        return self.lm(y_BMD, self.embedding)

    def next_logits(self, y_BLD: Float[Array, "B L D"]) -> Float32[Array, "B 2"]:
        """Of: the second text follows the first, it does not."""
        if not self.next_sentence:
            raise ModelError("the model has no head for pairs of texts; set next_sentence.")
        return self.next(self.pool(y_BLD).astype(jnp.float32))

    def classify(
        self, y_BLD: Float[Array, "B L D"], segments_BL: Int[Array, "B L"] | None = None, train: bool = False
    ) -> Float32[Array, "B K"]:
        """Logits of the classes of whole sequences; padding, of segment 0, has no part in a mean."""
        if self.num_classes is None:
            raise ModelError("the model has no classes; give it num_classes.")
        if self.classifier == "pooled":
            return self.head(self.pool(y_BLD), train)
        return self.head(y_BLD[:, 0] if self.classifier == "dense" else mean(y_BLD, segments_BL), train)


class MaskedHead(nn.Module):
    """Dense, activation, norm, and the embedding, transposed, with a bias for each token."""

    style: Style
    dtype: str = "float32"

    @nn.compact
    def __call__(self, y_BMD: Float[Array, "B M D"], embedding_VD: Float[Array, "V D"]) -> Float32[Array, "B M V"]:
        V, D = embedding_VD.shape
        dense = nn.Dense(D, dtype=DTYPES[self.dtype], kernel_init=KERNEL_INITS[self.style.kernel_init], name="dense")
        h_BMD = self.style.normaliser(self.dtype, "norm")(ACTIVATIONS[self.style.activation](dense(y_BMD)))
        bias_V = self.param("bias", nn.initializers.zeros, (V,))
        table_VD = embedding_VD.astype(h_BMD.dtype)
        logits_BMV = jnp.einsum("bmd,vd->bmv", h_BMD, table_VD, preferred_element_type=jnp.float32)
        return constrain(logits_BMV + bias_V, "batch", None, "vocab")


class ClassHead(nn.Module):
    """Dropout and the classes; with ``hidden``, dropout, dense and tanh before them."""

    num_classes: int
    hidden: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    kernel_init: str = "normal"

    @nn.compact
    def __call__(self, y_BD: Float[Array, "B D"], train: bool = False) -> Float32[Array, "B K"]:
        init = KERNEL_INITS[self.kernel_init]
        drop = Dropout(self.dropout, deterministic=not train)
        if self.hidden:
            dense = nn.Dense(y_BD.shape[-1], dtype=DTYPES[self.dtype], kernel_init=init, name="dense")
            y_BD = jnp.tanh(dense(drop(y_BD)))
        logits_BK = nn.Dense(self.num_classes, kernel_init=init, name="out")(drop(y_BD.astype(jnp.float32)))
        return constrain(logits_BK, "batch", None)


def mean(y_BLD: Float[Array, "B L D"], segments_BL: Int[Array, "B L"] | None) -> Float32[Array, "B D"]:
    """The mean over what is not padding (segment 0)."""
    if segments_BL is None:
        return jnp.mean(y_BLD, 1, dtype=jnp.float32)
    real_BL1 = (segments_BL > 0).astype(jnp.float32)[..., None]
    return jnp.sum(real_BL1 * y_BLD, 1) / jnp.maximum(jnp.sum(real_BL1, 1), 1)
