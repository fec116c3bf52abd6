"""A convolutional encoder of speech, and the head by which an encoder says a token, or nothing, in each frame.

What is behind the end of a recording never reaches what is before it: it is zero wherever a kernel looks over frames.

Axes: B recordings, F frames of features, M mel bands, S frames of the encoder, D width, K taps, V tokens,
L = V + 1 labels.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from bigbase_jax.models.conformer import depthwise
from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.layers import ACTIVATIONS, ModelError


def real(lengths_B: Int[Array, " B"], frames: int) -> Bool[Array, "B S"]:
    """Which frames are before the end."""
    return jnp.arange(frames) < lengths_B[:, None]


class Subsampling(nn.Module):
    """Convolutions over time of 5 taps and stride 2 until the rate is as low as it should be: S = ceil(F / factor).

    Attributes:
      width: D.
      factor: a power of two.

    Raises:
      ModelError: another factor.
    """

    width: int
    factor: int = 4

    @nn.compact
    def __call__(
        self, x_BFM: Float[Array, "B F M"], lengths_B: Int[Array, " B"]
    ) -> tuple[Float[Array, "B S D"], Int[Array, " B"]]:
        if self.factor < 2 or self.factor & (self.factor - 1):
            raise ModelError(f"subsampling is {self.factor}; it is 2, 4, 8 or another power of two.")
        for i in range(self.factor.bit_length() - 1):
            x_BFM = jnp.where(real(lengths_B, x_BFM.shape[1])[..., None], x_BFM, 0)
            x_BFM = jax.nn.relu(nn.Conv(self.width, (5,), 2, padding=[(2, 2)], name=f"conv_{i}")(x_BFM))
            lengths_B = (lengths_B + 1) // 2
        return x_BFM, lengths_B


class Depthwise(nn.Module):
    """A kernel over time for each channel.

    Attributes:
      taps: K, odd.
    """

    taps: int

    @nn.compact
    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(), batch_axis=1)
        kernel_KD = self.param("kernel", init, (self.taps, x_BSD.shape[-1]))
        reach = self.taps // 2
        return depthwise(jnp.pad(x_BSD, ((0, 0), (reach, self.taps - 1 - reach), (0, 0))), kernel_KD)


class Block(nn.Module):
    """Depthwise convolution, normalisation, two products with squeeze and excitation between (ContextNet, Han et al.
    2020; laid out as ConvNeXt, Liu et al. 2022), and a shortcut.

    Attributes:
      taps: K.
      expansion: of the width between the two products.
      dropout: of what is added.
      excite: whether there is squeeze and excitation, by which every frame knows of the whole recording.
    """

    taps: int
    expansion: int
    dropout: float
    excite: bool

    @nn.compact
    def __call__(
        self, x_BSD: Float[Array, "B S D"], real_BS1: Bool[Array, "B S 1"], train: bool
    ) -> Float[Array, "B S D"]:
        width = x_BSD.shape[-1]
        y_BSD = Depthwise(self.taps, name="depthwise")(jnp.where(real_BS1, x_BSD, 0))
        y_BSD = nn.LayerNorm(name="norm")(y_BSD)
        y = ACTIVATIONS["silu"](nn.Dense(self.expansion * width, name="up")(y_BSD))
        if self.excite:
            count_B11 = jnp.maximum(jnp.sum(real_BS1, 1, keepdims=True), 1)
            mean_B1D = jnp.sum(jnp.where(real_BS1, y, 0), 1, keepdims=True) / count_B11
            gate = jax.nn.relu(nn.Dense(max(width // 4, 1), name="squeeze")(mean_B1D))
            y = y * jax.nn.sigmoid(nn.Dense(y.shape[-1], name="excite")(gate))
        y_BSD = nn.Dense(width, name="down")(y)
        return x_BSD + Dropout(self.dropout, deterministic=not train, name="dropout")(y_BSD)


class SpeechEncoder(nn.Module):
    """Subsampling, then blocks of convolutions that see the whole recording by squeeze and excitation alone.

    Attributes:
      width: D.
      depth: blocks.
      taps: of each, over frames of the encoder.
      expansion, dropout, excite: see ``Block``. On few hours, excitation learns utterances by heart.
      subsampling: frames of features for each frame of the encoder.
    """

    width: int = 256
    depth: int = 10
    taps: int = 11
    expansion: int = 2
    dropout: float = 0.1
    excite: bool = False
    subsampling: int = 4

    @nn.compact
    def __call__(
        self, x_BFM: Float[Array, "B F M"], lengths_B: Int[Array, " B"], train: bool = False
    ) -> tuple[Float[Array, "B S D"], Int[Array, " B"]]:
        x_BSD, lengths_B = Subsampling(self.width, self.subsampling, name="subsampling")(x_BFM, lengths_B)
        real_BS1 = real(lengths_B, x_BSD.shape[1])[..., None]
        x_BSD = nn.LayerNorm(name="norm_in")(x_BSD)
        x_BSD = Dropout(self.dropout, deterministic=not train, name="dropout")(x_BSD)
        for i in range(self.depth):
            x_BSD = Block(self.taps, self.expansion, self.dropout, self.excite, name=f"block_{i}")(
                x_BSD, real_BS1, train
            )
        return nn.LayerNorm(name="norm_out")(x_BSD), lengths_B


class CTC(nn.Module):
    """An encoder and a linear head of V tokens and, last, the blank (Graves et al. 2006).

    Attributes:
      encoder: ``(features, lengths, train) -> (hidden, lengths)``, with an attribute ``subsampling``.
      vocab_size: V; None: the data's.

    Raises:
      ModelError: V is not known.
    """

    encoder: nn.Module
    vocab_size: int | None = None

    @nn.compact
    def __call__(
        self, x_BFM: Float[Array, "B F M"], lengths_B: Int[Array, " B"], train: bool = False
    ) -> tuple[Float32[Array, "B S L"], Int[Array, " B"]]:
        if self.vocab_size is None:
            raise ModelError("the model's vocab_size is None; give it the number of tokens.")
        h_BSD, lengths_B = self.encoder(x_BFM, lengths_B, train)
        return nn.Dense(self.vocab_size + 1, name="head")(h_BSD).astype(jnp.float32), lengths_B
