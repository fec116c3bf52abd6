"""wav2vec 2.0 and HuBERT with a head for CTC: samples in, a label for every 20 ms out.

What is behind the end of a recording never reaches what is before it, so that a padded one gives what it gives alone.

Axes: B recordings, T samples, S frames, C channels, D width, V labels, K taps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from bigbase_jax.models.layers import ACTIVATIONS, DTYPES, ModelError
from bigbase_jax.models.speech_encoder import real
from bigbase_jax.models.transformer import Style, Transformer


class Positions(nn.Module):
    """A grouped convolution over time, by whose result frames know where they are (Baevski et al. 2020); its kernel is
    a direction and a length for each tap (weight normalisation, Salimans & Kingma 2016).

    Attributes:
      taps: K.
      groups: of channels.
    """

    taps: int
    groups: int

    @nn.compact
    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        D = x_BSD.shape[-1]
        shape = (self.taps, D // self.groups, D)
        direction = self.param("direction", nn.initializers.normal((4 / (self.taps * D)) ** 0.5), shape)
        length_K = self.param("length", lambda _: jnp.sqrt(jnp.sum(direction**2, (1, 2))))
        bias = self.param("bias", nn.initializers.zeros, (D,))
        norm_K = jnp.sqrt(jnp.sum(direction**2, (1, 2)))
        kernel = (direction * (length_K / norm_K)[:, None, None]).astype(x_BSD.dtype)
        reach = self.taps // 2
        pad = [(reach, reach - (self.taps % 2 == 0))]
        axes = ("NWC", "WIO", "NWC")
        y_BSD = jax.lax.conv_general_dilated(
            x_BSD, kernel, (1,), pad, dimension_numbers=axes, feature_group_count=self.groups
        )
        return ACTIVATIONS["gelu"](y_BSD + bias.astype(x_BSD.dtype))


class Wav2Vec2(Transformer):
    """Convolutions over samples, a transformer, and a linear head (Baevski et al. 2020; Hsu et al. 2021).

    The base models have ``group_norm`` and normalise after each branch (``style.post_norm``); the large ones normalise
    every convolution and before each branch ("stable layer norm").

    Attributes:
      vocab_size: V, the blank among them.
      blank: its number.
      width, depth, heads, mlp_dim: of the transformer; D, blocks, heads, and the hidden layers (None: 4 x width).
      channels, kernels, strides: of each convolution.
      conv_bias: whether these have biases.
      group_norm: normalise the first convolution over time; False: each over its channels.
      project_norm: normalise what the convolutions give.
      position_taps, position_groups: see ``Positions``.
      hubert: whether its published name is HuBERT.
      style, dropout, dtype, remat, remat_policy, scan, sequence_attention, pipeline_microbatches: see ``Transformer``.

    Raises:
      ModelError: sizes that are missing or do not divide.
    """

    vocab_size: int | None = None
    blank: int = 0
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int | None = None
    channels: tuple[int, ...] = (512,) * 7
    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    group_norm: bool = True
    project_norm: bool = True
    position_taps: int = 128
    position_groups: int = 16
    hubert: bool = False
    style: Style = dataclasses.field(default=Style(epsilon=1e-5, post_norm=True, kernel_init="normal"), kw_only=True)

    def __post_init__(self) -> None:
        self.style.sizes(self.width, self.heads)
        if len({len(self.channels), len(self.kernels), len(self.strides)}) != 1:
            raise ModelError(f"channels, kernels and strides are of {len(self.channels)} convolutions and of others.")
        if self.width % self.position_groups:
            raise ModelError(f"a width of {self.width} does not divide into {self.position_groups} groups.")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x_BT: Float[Array, "B T"], lengths_B: Int[Array, " B"], train: bool = False
    ) -> tuple[Float32[Array, "B S V"], Int[Array, " B"]]:
        """Logits, and the frames before the end.

        Args:
          lengths_B: of the samples; what is behind is 0.
        """
        self.check_given("vocab_size")
        style, dtype = self.style, DTYPES[self.dtype]
        missing = self.least - x_BT.shape[1]
        x: Any = jnp.pad(x_BT, ((0, 0), (0, max(missing, 0))))[..., None].astype(dtype)
        layers = zip(self.channels, self.kernels, self.strides, strict=True)
        for i, (width, taps, stride) in enumerate(layers):
            conv = nn.Conv(width, (taps,), stride, "VALID", use_bias=self.conv_bias, dtype=dtype, name=f"conv_{i}")
            x, lengths_B = conv(x), jnp.maximum((lengths_B - taps) // stride + 1, 0)
            if not self.group_norm:
                x = nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=f"norm_{i}")(x)
            elif i == 0:
                norm = nn.GroupNorm(width, epsilon=1e-5, use_fast_variance=False, dtype=dtype, name="norm_0")
                real_BS1 = real(lengths_B, x.shape[1])[..., None]
                x = norm(x, mask=jnp.broadcast_to(real_BS1, x.shape))  # each channel over its recording's frames
            x = ACTIVATIONS["gelu"](x)
        if self.project_norm:
            x = style.normaliser(self.dtype, "project_norm")(x)
        x = nn.Dense(self.width, dtype=dtype, name="project")(x)
        real_BS = real(lengths_B, x.shape[1])
        x = jnp.where(real_BS[..., None], x, 0)
        x = x + Positions(self.position_taps, self.position_groups, name="positions")(x)
        if style.post_norm:
            x = style.normaliser(self.dtype, "norm")(x)
        encoder = self.stack(self.depth, self.heads, self.mlp_dim, name="encoder")
        y_BSD = encoder(x, real_BS[:, None, None, :], train=train)
        logits_BSV = nn.Dense(self.vocab_size or 0, dtype=dtype, name="head")(y_BSD)
        return logits_BSV.astype(jnp.float32), lengths_B

    @property
    def least(self) -> int:
        """Samples of one frame."""
        reach = 1
        for taps, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            reach = (reach - 1) * stride + taps
        return reach
