"""An encoder of speech with two heads: CTC, and a decoder that writes by attention (Watanabe et al. 2017).

Axes: B recordings, F frames of features, M mel bands, S frames of the encoder, D width, V tokens, L = V + 1 labels,
U tokens of a transcript.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from bigbase_jax.models.encoder_decoder import sinusoids
from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.speech_encoder import real
from bigbase_jax.models.transformer import Context, Encoder, Transformer


class JointCTC(nn.Module):
    """An encoder as in ``speech_encoder.CTC``, its CTC head, and a causal stack that reads it.

    Label V is the blank of the one head, and the start and the end of the other's transcripts.

    Attributes:
      encoder: ``(features, lengths, train) -> (hidden, lengths)``, with an attribute ``width``, D.
      vocab_size: V; None: the data's.
      depth, heads: blocks of the decoder, and heads of each.
      dropout: of the decoder.

    Raises:
      ModelError: V is not known.
    """

    encoder: nn.Module
    vocab_size: int | None = None
    depth: int = 2
    heads: int = 4
    dropout: float = 0.1

    def setup(self) -> None:
        if self.vocab_size is None:
            raise ModelError("the model's vocab_size is None; give it the number of tokens.")
        labels = self.vocab_size + 1
        self.head = nn.Dense(labels)
        self.embedding = self.param("embedding", nn.initializers.normal(self._width**-0.5), (labels, self._width))
        words: Any = {"causal": True, "cross": True, "dropout": self.dropout}
        self.decoder = Encoder(depth=self.depth, heads=self.heads, **words)
        self.out = nn.Dense(labels)

    @property
    def _width(self) -> int:
        return int(getattr(self.encoder, "width"))  # noqa: B009

    def __call__(
        self,
        x_BFM: Float[Array, "B F M"],
        lengths_B: Int[Array, " B"],
        target_BU: Int[Array, "B U"] | None = None,
        train: bool = False,
    ) -> tuple[Array, ...]:
        """(CTC's logits f32[B,S,L], frames); and of targets, which begin with V, the logits of the token after each,
        f32[B,U,L]."""
        h_BSD, frames_B = self.encoder(x_BFM, lengths_B, train)
        if target_BU is None and self.is_initializing():
            target_BU = jnp.zeros((len(x_BFM), 1), jnp.int32)
        found = self.heard(h_BSD), frames_B
        if target_BU is None:
            return found
        memory = Context(memory=h_BSD, memory_mask=real(frames_B, h_BSD.shape[1])[:, None, None])
        y_BUD = self.decoder(self._embed(target_BU, jnp.arange(target_BU.shape[1])[None]), None, train, memory)
        return (*found, self.logits(y_BUD))

    def encode(
        self, x_BFM: Float[Array, "B F M"], lengths_B: Int[Array, " B"]
    ) -> tuple[Float[Array, "B S D"], Int[Array, " B"]]:
        """The encoder's frames, and how many are real."""
        found: Any = self.encoder(x_BFM, lengths_B)
        return found

    def heard(self, h_BSD: Float[Array, "B S D"]) -> Float32[Array, "B S L"]:
        """CTC's logits."""
        return self.head(h_BSD).astype(jnp.float32)

    def decode(
        self,
        tokens_BU: Int[Array, "B U"],
        position_B: Int[Array, " B"],
        h_BSD: Float[Array, "B S D"] | None = None,
        frames_B: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B U D"]:
        """What ``logits`` takes of the next tokens; see ``decoding.sampling``. The encoder's frames are given at first,
        and kept in the cache."""
        seen_BS: Any = self.get_variable("cache", "seen")
        if frames_B is not None:
            seen_BS = real(frames_B, seen_BS.shape[1])
            self.put_variable("cache", "seen", seen_BS)
        places = self.variables["cache"]["decoder"]["block_0"]["attention"]["keys"].shape[2]
        position_BU = position_B[:, None] + jnp.arange(tokens_BU.shape[1])
        mask_B1US = (position_BU[..., None] >= jnp.arange(places))[:, None]
        context = Context(memory=h_BSD, memory_mask=seen_BS[:, None, None], position_B=position_B)
        return self.decoder(self._embed(tokens_BU, position_BU), mask_B1US, False, context)

    @nn.nowrap
    def cache(self, batch_size: int, length: int, frames: int) -> dict[str, Any]:
        """An empty collection for ``decode``."""
        D = self._width
        shapes = {"attention": (batch_size, length, D), "cross_attention": (batch_size, frames, D)}
        blocks = Transformer().empty_cache(self.depth, self.heads, None, **shapes)
        return {"decoder": blocks, "seen": jnp.zeros((batch_size, frames), bool)}

    def logits(self, y_BUD: Float[Array, "B U D"]) -> Float32[Array, "B U L"]:
        """Of the next token."""
        return self.out(y_BUD).astype(jnp.float32)

    def _embed(self, tokens_BU: Any, position_BU: Any) -> Array:
        table = jnp.asarray(sinusoids(_PLACES, self._width))
        return self.embedding[tokens_BU] * self._width**0.5 + table[jnp.minimum(position_BU, _PLACES - 1)]


_PLACES = 1024  # of a transcript that have positions of their own
