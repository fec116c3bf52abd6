"""The causal decoder: a language model that reads from left to right.

Axes: B examples, L length, P vectors before the tokens, D model width, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from bigbase_jax.models.layers import DTYPES, ModelError, constrain, look_up
from bigbase_jax.models.rope import frequencies, rotation
from bigbase_jax.models.transformer import Context, Transformer

_init = nn.initializers.normal(0.02)  # GPT-2's, of embeddings, positions and a free head


class Decoder(Transformer):
    """A causal transformer: GPT-2 (Radford et al. 2019), of whose shape and size the default is, Llama and its kin.

    ``hidden`` and ``logits`` are the two halves of a call, so that a loss need not hold all logits at once.

    Attributes:
      vocab_size: V.
      length: the longest sequence; as many learned positions; rotary ones continue beyond it.
      width, depth, heads: D, blocks, heads.
      mlp_dim: of the hidden layers; None: 4 x width.
      tied: the head is the embedding, transposed (Press & Wolf 2017); otherwise it has parameters of its own.
      positions: "learned" or "rope" (``models.rope``).
      rope_theta, rope_scaling: see ``rope.frequencies``.
      style, dropout, dtype, remat, remat_policy, scan, sequence_attention, pipeline_microbatches: see ``Transformer``.

    Raises:
      ModelError: an unknown word among the attributes, sizes that are missing or do not divide, or a sequence that is
        too long.
    """

    vocab_size: int | None = None
    length: int | None = None
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int | None = None
    tied: bool = True
    positions: str = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None
    causal = True

    def __post_init__(self) -> None:
        look_up({"learned": None, "rope": None}, self.positions, "positions")
        _, K = self.style.sizes(self.width, self.heads)
        if self.positions == "rope":
            frequencies(K, self.rope_theta, self.rope_scaling)
        super().__post_init__()

    def setup(self) -> None:
        self.check_given("vocab_size", "length")
        self.embedding = self.param("embedding", _init, (self.vocab_size, self.width))
        if self.positions == "learned":
            self.position = self.param("position", _init, (self.length, self.width))
        self.encoder = self.stack(self.depth, self.heads, self.mlp_dim, causal=self.causal)
        if not self.tied:
            self.head = self.param("head", _init, (self.width, self.vocab_size))

    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"] | None = None,
        positions_BL: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> Float32[Array, "B L V"]:
        """Logits of the token after each one; see ``hidden``."""
        return self.logits(self.hidden(tokens_BL, segments_BL, positions_BL, train))

    def hidden(
        self,
        tokens_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"] | None = None,
        positions_BL: Int[Array, "B L"] | None = None,
        train: bool = False,
        before_BPD: Float[Array, "B P D"] | None = None,
    ) -> Float[Array, "B S D"]:
        """What ``logits`` reads.

        Args:
          segments_BL: a token sees those before it in the same segment only; None: all before it.
          positions_BL: in each segment from 0; None: in the sequence.
          before_BPD: vectors that are read before the tokens, such as those of a picture, in the first segment: of
            them and of the tokens, S = P + L together, what is returned is. Positions are then those of the sequence.
        """
        L = tokens_BL.shape[1]
        if before_BPD is not None:
            P = before_BPD.shape[1]
            L, positions_BL = L + P, None
            if segments_BL is not None:
                segments_BL = jnp.pad(segments_BL, ((0, 0), (P, 0)), constant_values=1)
        if self.positions == "learned" and (self.length or 0) < L:
            raise ModelError(f"a sequence of {L} tokens is longer than the {self.length} positions of the model.")
        positions_BL = jnp.arange(L)[None] if positions_BL is None else positions_BL
        x_BLD, context = self._embed(tokens_BL, positions_BL, before_BPD)
        return self.encoder(x_BLD, train=train, context=context._replace(segment_ids=segments_BL))

    def decode(
        self,
        tokens_BL: Int[Array, "B L"],
        position_B: Int[Array, " B"],
        before_BPD: Float[Array, "B P D"] | None = None,
    ) -> Float[Array, "B S D"]:
        """``hidden`` of the next tokens of sequences whose earlier ones are in the variable collection "cache".

        ``apply(..., method="decode", mutable=["cache"])`` gives the cache with the new tokens in it as well.

        Args:
          position_B: of each sequence's first token here, which is its place in the cache too. Tokens see those of
            lower positions, which earlier calls have read.
          before_BPD: see ``hidden``; the first of them is at ``position_B``.
        """
        L, S = tokens_BL.shape[1], self.variables["cache"]["encoder"]["block_0"]["attention"]["keys"].shape[2]
        L += 0 if before_BPD is None else before_BPD.shape[1]
        position_BL = position_B[:, None] + jnp.arange(L)
        mask_B1LS = (position_BL[..., None] >= jnp.arange(S))[:, None]
        x_BLD, context = self._embed(tokens_BL, position_BL, before_BPD)
        return self.encoder(x_BLD, mask_B1LS, context=context._replace(position_B=position_B))

    @nn.nowrap
    def cache(self, batch_size: int, length: int, dtype: str | None = None) -> dict[str, Any]:
        """An empty collection "cache" for ``decode``: keys and values [B, G, length, K]; see ``empty_cache``."""
        return {"encoder": self.empty_cache(self.depth, self.heads, dtype, attention=(batch_size, length, self.width))}

    def _embed(self, tokens_BL: Array, positions_BL: Array, before_BPD: Array | None = None) -> tuple[Array, Context]:
        x_BLD = self.embedding[tokens_BL].astype(DTYPES[self.dtype])
        if before_BPD is not None:
            x_BLD = jnp.concatenate([before_BPD.astype(x_BLD.dtype), x_BLD], 1)
        context = Context()
        if self.positions == "learned":
            x_BLD = x_BLD + self.position[positions_BL].astype(x_BLD.dtype)
        else:
            _, K = self.style.sizes(self.width, self.heads)
            context = Context(rotation=rotation(positions_BL, K, self.rope_theta, self.rope_scaling))
        return constrain(x_BLD, "batch", "length", "width"), context

    def logits(self, y_BLD: Float[Array, "B L D"]) -> Float32[Array, "B L V"]:
        """The head, whose products are summed in float32."""
        head_DV = (self.embedding.T if self.tied else self.head).astype(y_BLD.dtype)
        logits_BLV = jnp.einsum("bld,dv->blv", y_BLD, head_DV, preferred_element_type=jnp.float32)
        return constrain(logits_BLV, "batch", "length", "vocab")
