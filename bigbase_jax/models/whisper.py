"""Whisper: log-mel frames in, tokens of a transcript out (Radford et al. 2022).

Axes: B examples, F frames, M mel bands, S = F / 2 places of the encoder, L tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from bigbase_jax.models.layers import ACTIVATIONS, DTYPES, ModelError, constrain
from bigbase_jax.models.transformer import Context, Style, Transformer


class Whisper(Transformer):
    """Two convolutions over time and a transformer of two stacks, whose head is the embedding, transposed.

    ``encode`` gives what the decoder reads, once for each window; ``hidden`` and ``logits`` are the halves of a call;
    ``cache`` and ``decode`` write token by token (see ``decoding``), where the source is what ``encode`` gave.

    Attributes:
      vocab_size: V.
      mels: M; 80, or 128 from large-v3 on.
      frames: the most that are heard at once, 3,000 or 30 s as published; longer ones are an error.
      length: the most tokens of a transcript, with what is in front of it.
      width, depth, heads: D, blocks of the encoder, heads of both stacks.
      decoder_depth: blocks of the decoder; None: ``depth``.
      mlp_dim: of the hidden layers; None: 4 x width.
      style, dropout, dtype, remat, remat_policy, scan, sequence_attention, pipeline_microbatches: see ``Transformer``.

    Raises:
      ModelError: sizes that are missing or do not divide, or more frames or tokens than the model has places for.
    """

    vocab_size: int | None = None
    mels: int = 80
    frames: int = 3000
    length: int = 448
    width: int = 384
    depth: int = 4
    heads: int = 6
    decoder_depth: int | None = None
    mlp_dim: int | None = None
    style: Style = dataclasses.field(default=Style(epsilon=1e-5, key_bias=False, kernel_init="normal"), kw_only=True)

    def __post_init__(self) -> None:
        self.style.sizes(self.width, self.heads)
        if self.width % 2 or self.frames % 2:
            raise ModelError(f"a width of {self.width} and {self.frames} frames have to be even.")
        super().__post_init__()

    def setup(self) -> None:
        self.check_given("vocab_size")
        normal, dtype = nn.initializers.normal(0.02), DTYPES[self.dtype]
        self.embedding = self.param("embedding", normal, (self.vocab_size, self.width))
        self.conv1 = nn.Conv(self.width, (3,), padding=1, dtype=dtype)
        self.conv2 = nn.Conv(self.width, (3,), strides=2, padding=1, dtype=dtype)
        self.source_position = self.param("source_position", lambda _: sinusoids(self.frames // 2, self.width))
        self.target_position = self.param("target_position", normal, (self.length, self.width))
        self.encoder = self.stack(self.depth, self.heads, self.mlp_dim)
        self.decoder = self.stack(self.decoder_depth or self.depth, self.heads, self.mlp_dim, causal=True, cross=True)

    def __call__(
        self, features_BFM: Float[Array, "B F M"], tokens_BL: Int[Array, "B L"], train: bool = False
    ) -> Float32[Array, "B L V"]:
        """Logits of the token after each one."""
        return self.logits(self.hidden(features_BFM, tokens_BL, train))

    def hidden(
        self, features_BFM: Float[Array, "B F M"], tokens_BL: Int[Array, "B L"], train: bool = False
    ) -> Float[Array, "B L D"]:
        """What ``logits`` reads; no token sees those after it."""
        context = Context(memory=self.encode(features_BFM, train))
        return self.decoder(self._embed(tokens_BL, jnp.arange(tokens_BL.shape[1])[None]), train=train, context=context)

    def encode(self, features_BFM: Float[Array, "B F M"], train: bool = False) -> Float[Array, "B S D"]:
        """A window as the decoder reads it; its positions are fixed, as published."""
        F, M = features_BFM.shape[1:]
        if self.frames < F or F % 2 or self.mels != M:
            raise ModelError(
                f"{F} frames of {M} bands are not what the model hears: an even number up to {self.frames} of"
                f" {self.mels}."
            )
        gelu, dtype = ACTIVATIONS["gelu"], DTYPES[self.dtype]  # whatever that of the blocks is
        x_BSD = gelu(self.conv2(gelu(self.conv1(features_BFM.astype(dtype)))))
        x_BSD = x_BSD + jax.lax.stop_gradient(self.source_position)[: F // 2].astype(dtype)
        return self.encoder(constrain(x_BSD, "batch", "length", "width"), train=train)

    def decode(
        self,
        tokens_BL: Int[Array, "B L"],
        position_B: Int[Array, " B"],
        memory_BSD: Float[Array, "B S D"] | None = None,
    ) -> Float[Array, "B L D"]:
        """``hidden`` of the next tokens of transcripts whose earlier ones are in the variable collection "cache".

        ``apply(..., method="decode", mutable=["cache"])`` gives the cache with the new tokens in it as well.

        Args:
          position_B: of each transcript's first token here, which is its place in the cache too.
          memory_BSD: what ``encode`` gave, at the first call; later: None.
        """
        places = self.variables["cache"]["decoder"]["block_0"]["attention"]["keys"].shape[2]
        if places > self.length + 1:  # the last token is not read any more
            raise ModelError(f"a transcript of {places} tokens is longer than the model's {self.length} positions.")
        position_BL = position_B[:, None] + jnp.arange(tokens_BL.shape[1])
        mask_B1LK = (position_BL[..., None] >= jnp.arange(places))[:, None]
        context = Context(memory=memory_BSD, position_B=position_B)
        return self.decoder(self._embed(tokens_BL, position_BL), mask_B1LK, context=context)

    @nn.nowrap
    def cache(self, batch_size: int, length: int, source_length: int, dtype: str | None = None) -> dict[str, Any]:
        """An empty collection "cache" for ``decode``: keys and values of every block of the decoder, [B, G, length, K]
        of the transcript and [B, G, source_length, K] of the S places of the encoder (see ``empty_cache``)."""
        shapes = {"attention": (batch_size, length, self.width)}
        shapes["cross_attention"] = (batch_size, source_length, self.width)
        return {"decoder": self.empty_cache(self.decoder_depth or self.depth, self.heads, dtype, **shapes)}

    def logits(self, y_BLD: Float[Array, "B L D"]) -> Float32[Array, "B L V"]:
        """The head, whose products are summed in float32."""
        head_DV = self.embedding.T.astype(y_BLD.dtype)
        logits_BLV = jnp.einsum("bld,dv->blv", y_BLD, head_DV, preferred_element_type=jnp.float32)
        return constrain(logits_BLV, "batch", "length", "vocab")

    def _embed(self, tokens_BL: Array, position_BL: Array) -> Array:
        if tokens_BL.shape[1] > self.length:
            raise ModelError(f"{tokens_BL.shape[1]} tokens are more than the model's {self.length} positions.")
        x_BLD = self.embedding[tokens_BL] + self.target_position[position_BL]
        return constrain(x_BLD.astype(DTYPES[self.dtype]), "batch", "length", "width")


def sinusoids(length: int, width: int) -> np.ndarray:
    """f32[length, width]: as Whisper has them, whose last frequency is 1 / 10,000 exactly."""
    rate = 10_000.0 ** -(np.arange(width // 2) / max(width // 2 - 1, 1))
    angle = np.arange(length)[:, None] * rate
    return np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)
