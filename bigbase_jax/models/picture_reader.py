"""A decoder that reads a picture and then a text: LLaVA (Liu et al. 2023) and its kin.

Axes: B examples, H height, W width, C channels, h x w = P places of a picture, L length, D width of the decoder, V
entries of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from bigbase_jax.models.decoder import Decoder


class PictureReader(nn.Module):
    """What a picture tower gives of each place of a picture, projected by two layers (Liu et al. 2024, LLaVA-1.5) and
    read by a decoder before the text.

    Attributes:
      picture: a ``ViT``, whose tokens are read, or a ``ResNet``, of whose last stage the places are.
      decoder: a ``Decoder``; of learned positions, it has as many as a picture and a text take together.
      places: P, for caches that are made before a picture is seen; None: none is.
    """

    picture: nn.Module
    decoder: Decoder
    places: int | None = None

    def setup(self) -> None:
        self.projection_norm = nn.LayerNorm()
        self.projection = [nn.Dense(self.decoder.width), nn.Dense(self.decoder.width)]

    def __call__(
        self,
        x_BHWC: Float[Array, "B H W C"],
        tokens_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> Float32[Array, "B L V"]:
        """Logits of the token after each one."""
        return self.logits(self.hidden(self.see(x_BHWC, train), tokens_BL, segments_BL, train))

    def see(self, x_BHWC: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B P D"]:
        """Pictures as the decoder reads them."""
        if hasattr(self.picture, "patch"):
            y_BPC: Any = self.picture(x_BHWC, train=train, upto="tokens")
        else:
            y_BhwC = self.picture(x_BHWC, train=train, features=True)[-1]
            y_BPC = y_BhwC.reshape(len(y_BhwC), -1, y_BhwC.shape[-1])
        y_BPC = self.projection_norm(y_BPC.astype(jnp.float32))
        return self.projection[1](jax.nn.gelu(self.projection[0](y_BPC)))

    def hidden(
        self,
        pictures_BPD: Float[Array, "B P D"],
        tokens_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B L D"]:
        """What ``logits`` reads, of each token. ``segments_BL`` is 1 for tokens, and 0 for the padding behind them."""
        y_BSD = self.decoder.hidden(tokens_BL, segments_BL, None, train, pictures_BPD)
        return y_BSD[:, pictures_BPD.shape[1] :]

    def logits(self, y_BLD: Float[Array, "B L D"]) -> Float32[Array, "B L V"]:
        """See ``Decoder.logits``."""
        return self.decoder.logits(y_BLD)

    def decode(
        self,
        tokens_BL: Int[Array, "B L"],
        position_B: Int[Array, " B"],
        pictures_BPD: Float[Array, "B P D"] | None = None,
    ) -> Float[Array, "B L D"]:
        """See ``decoding.sampling``: the pictures come with the first tokens, and stand before position 0."""
        seen_B: Any = self.get_variable("cache", "places")
        if pictures_BPD is None:
            return self.decoder.decode(tokens_BL, position_B + seen_B)
        self.put_variable("cache", "places", jnp.full_like(seen_B, pictures_BPD.shape[1]))
        return self.decoder.decode(tokens_BL, position_B, pictures_BPD)[:, pictures_BPD.shape[1] :]

    @property
    def positions(self) -> str:
        """See ``Decoder``."""
        return self.decoder.positions

    @property
    def length(self) -> int | None:
        """Of a text, behind the places of a picture."""
        most = self.decoder.length
        return most if most is None or self.positions != "learned" else most - (self.places or 0)

    @nn.nowrap
    def cache(
        self, batch_size: int, length: int, places: int | None = None, dtype: str | None = None
    ) -> dict[str, Any]:
        """See ``Decoder.cache``; with room for the places of a picture."""
        inner = self.decoder.cache(batch_size, length + ((self.places or 0) if places is None else places), dtype)
        return {"decoder": inner, "places": jnp.zeros(batch_size, jnp.int32)}
