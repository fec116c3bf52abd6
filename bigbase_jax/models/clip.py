"""Two towers, of pictures and of texts, whose vectors are compared: CLIP, SigLIP, LiT.

Axes: B examples, H height, W width, C channels, L length, D width of the text tower, E width of the vectors.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.layers import ModelError, look_up

_MOST = 100.0  # of the scale (Radford et al. 2021, section 2.5)


class TextEncoder(Decoder):
    """``Decoder``'s embedding, positions and blocks, read both ways: SigLIP's text tower. It cannot ``decode``."""

    causal = False


class CLIP(nn.Module):
    """A picture tower and a text tower (Radford et al. 2021); either gives a vector of length 1.

    Attributes:
      picture: gives f32[B,E] of pictures, as the logits of a classifier: a ``ViT``, a ``ResNet``. Its ``num_classes``
        is E, unless it has no head.
      text: has ``hidden``, which gives f[B,L,D] of tokens and segments: a ``Decoder`` (CLIP), a ``Bert``, a
        ``TextEncoder`` (SigLIP).
      width: E.
      pool: which of the text's vectors is projected: that of the "first" token, of the "last" one that is no padding,
        of the last "place", padding or not (SigLIP), or the "mean" of those that are no padding.
      text_bias: whether the projection of texts has biases (SigLIP); that of pictures is the tower's own.
      padding: whether tokens may see padding (SigLIP was trained so).
      temperature: that scores are divided by at the start; it is learned.
      bias: that is added to scores at the start, and learned (SigLIP: -10); None: there is none.

    Raises:
      ModelError: an unknown word among the attributes, or a temperature out of range.
    """

    picture: nn.Module
    text: nn.Module
    width: int = 512
    pool: str = "last"
    text_bias: bool = False
    padding: bool = False
    temperature: float = 0.07
    bias: float | None = None

    def __post_init__(self) -> None:
        look_up(dict.fromkeys(("first", "last", "place", "mean")), self.pool, "pool")
        if not self.temperature > 0:
            raise ModelError(f"the model's temperature is {self.temperature}; it must be above 0, for example 0.07.")
        own = getattr(self.picture, "num_classes", self.width)
        if own != self.width and getattr(self.picture, "head", "") != "none":
            if own is not None:
                raise ModelError(f"the picture tower gives vectors of {own}, and width is {self.width}.")
            object.__setattr__(self, "picture", self.picture.clone(num_classes=self.width))
        super().__post_init__()

    def setup(self) -> None:
        self.text_projection = nn.Dense(self.width, use_bias=self.text_bias, kernel_init=nn.initializers.lecun_normal())
        self.log_scale = self.param("log_scale", lambda _: jnp.float32(-math.log(self.temperature)))
        if self.bias is not None:
            self.score_bias = self.param("score_bias", lambda _: jnp.float32(self.bias or 0.0))

    def __call__(
        self,
        x_BHWC: Float[Array, "B H W C"],
        tokens_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"],
        train: bool = False,
    ) -> tuple[Float32[Array, "B E"], Float32[Array, "B E"], Float32[Array, ""], Float32[Array, ""]]:
        """Vectors of pictures and of texts, and what makes scores of them: ``scale * u . v + bias``."""
        scores = self.scores()
        return self.pictures(x_BHWC, train), self.texts(tokens_BL, segments_BL, train), *scores

    def scores(self) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
        """``scale`` and ``bias``; the scale is at most 100."""
        bias = self.score_bias if self.bias is not None else jnp.float32(0)
        return jnp.minimum(jnp.exp(self.log_scale), _MOST), bias

    def pictures(self, x_BHWC: Float[Array, "B H W C"], train: bool = False) -> Float32[Array, "B E"]:
        """Of length 1."""
        return _unit(self.picture(x_BHWC, train=train))

    def texts(
        self, tokens_BL: Int[Array, "B L"], segments_BL: Int[Array, "B L"], train: bool = False
    ) -> Float32[Array, "B E"]:
        """Of length 1. ``segments_BL`` is 1 for tokens, and 0 for the padding behind them."""
        text: Any = self.text
        y_BLD = text.hidden(tokens_BL, None if self.padding else segments_BL, train=train).astype(jnp.float32)
        real_BL = (segments_BL > 0).astype(jnp.float32)
        if self.pool == "mean":
            y_BD = jnp.einsum("bld,bl->bd", y_BLD, real_BL) / jnp.maximum(jnp.sum(real_BL, 1, keepdims=True), 1)
        elif self.pool == "last":
            last_B = jnp.maximum(jnp.sum(real_BL, 1) - 1, 0).astype(jnp.int32)
            y_BD = jnp.take_along_axis(y_BLD, last_B[:, None, None], 1)[:, 0]
        else:
            y_BD = y_BLD[:, 0 if self.pool == "first" else -1]
        return _unit(self.text_projection(y_BD))


def _unit(x_BE: Array) -> Array:
    return x_BE / jnp.maximum(jnp.linalg.norm(x_BE, axis=-1, keepdims=True), 1e-12)
