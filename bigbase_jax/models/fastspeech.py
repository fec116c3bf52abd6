"""An acoustic model that says all frames of an utterance at once, with an alignment of its own.

FastSpeech 2 (Ren et al. 2021) with the pitch and energy of each phoneme (FastPitch, Lancucki 2021) and durations that
come from an alignment learned beside it (``models.alignment``) in the place of an aligner's. Blocks are convolutions,
which at this size cost less than attention and are as good (LightSpeech, Luo et al. 2021).

Legend: B examples, L phonemes, F frames, S phonemes or frames, M mel bands, D width, A width of the alignment.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bigbase_jax.models.alignment import spread
from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.layers import ACTIVATIONS, ModelError, product

_ALIGNED = 80  # A
_TEMPERATURE = 5e-4  # of the alignment's distances (Badlani et al. 2021, their code)


class Convolution(nn.Module):
    """Along a sequence, as one product with the ``taps`` neighbours of each place."""

    width: int
    taps: int = 1

    @nn.compact
    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S _"]:
        reach, size = self.taps // 2, x_BSD.shape[1]
        padded = jnp.pad(x_BSD, ((0, 0), (reach, reach), (0, 0)))
        near_BSN = jnp.concatenate([padded[:, i : i + size] for i in range(self.taps)], -1)
        return nn.Dense(self.width, dot_general=product)(near_BSN)


class Block(nn.Module):
    """A convolution and a product around a residual; what ``real_BS1`` is 0 at stays out of its neighbours' sums."""

    hidden: int
    taps: int
    dropout: float

    @nn.compact
    def __call__(self, x_BSD: Float[Array, "B S D"], real_BS1: Array, train: bool) -> Float[Array, "B S D"]:
        y = nn.LayerNorm()(x_BSD) * real_BS1
        y = ACTIVATIONS["gelu"](Convolution(self.hidden, self.taps)(y))
        y = Convolution(x_BSD.shape[-1])(y)
        return x_BSD + Dropout(self.dropout, deterministic=not train)(y)


class Predictor(nn.Module):
    """A number for each phoneme: two convolutions (section 2.3 of FastSpeech 2)."""

    dropout: float

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"], real_BL1: Array, train: bool) -> Float[Array, "B L"]:
        for _ in range(2):
            y = nn.relu(Convolution(x_BLD.shape[-1], 3)(x_BLD * real_BL1))
            x_BLD = Dropout(self.dropout, deterministic=not train)(nn.LayerNorm()(y))
        return nn.Dense(1)(x_BLD)[..., 0]


class FastSpeech(nn.Module):
    """Phonemes, and a speaker, to mel bands.

    Attributes:
      vocab_size: of phonemes, of which 0 is padding.
      num_speakers: who there are; None or 1: no embedding is learned.
      mels: M.
      width, hidden, taps: D, and the inner width and the taps of the blocks.
      encoder_layers, decoder_layers: blocks over phonemes and over frames.
      dropout: in the blocks; half as much again in the predictors.
      reduction: frames that the decoder says at once (Wang et al. 2017, section 3.3), which makes it as much cheaper.
    """

    vocab_size: int | None = None
    num_speakers: int | None = None
    mels: int = 80
    width: int = 128
    hidden: int = 384
    taps: int = 5
    encoder_layers: int = 3
    decoder_layers: int = 4
    dropout: float = 0.1
    reduction: int = 1

    def setup(self) -> None:
        if not self.vocab_size or self.vocab_size < 2:
            raise ModelError(f"the model's vocab_size is {self.vocab_size}; give it the number of phonemes.")
        if self.reduction < 1 or self.taps % 2 == 0:
            raise ModelError(f"reduction is {self.reduction} and taps {self.taps}; use 1 or more, and an odd number.")
        init = nn.initializers.normal(self.width**-0.5)
        self.symbols = nn.Embed(self.vocab_size, self.width, embedding_init=init)
        self.speakers = nn.Embed(self.num_speakers or 1, self.width) if (self.num_speakers or 1) > 1 else None
        block: Any = lambda: Block(self.hidden, self.taps, self.dropout)  # noqa: E731
        self.encoder = [block() for _ in range(self.encoder_layers)]
        self.decoder = [block() for _ in range(self.decoder_layers)]
        self.predictors = {n: Predictor(1.5 * self.dropout) for n in ("duration", "pitch", "energy")}
        self.embed = {n: Convolution(self.width, 3) for n in ("pitch", "energy")}
        self.keys = [Convolution(2 * self.width, 3), Convolution(_ALIGNED)]
        self.queries = [Convolution(2 * self.mels, 3), Convolution(self.mels), Convolution(_ALIGNED)]
        self.join = nn.Dense(self.width)
        self.norm = nn.LayerNorm()
        self.out = nn.Dense(self.reduction * self.mels)

    def __call__(self, phonemes_BL: Array, speaker_B: Array, mel_BFM: Array, frames_B: Array) -> Array:
        """All that has parameters, for ``init``."""
        self.align(phonemes_BL, mel_BFM, frames_B)
        h_BLD = self.encode(phonemes_BL, speaker_B)
        _, pitch_BL, energy_BL = self.variances(h_BLD, phonemes_BL)
        return self.decode(h_BLD, (pitch_BL, energy_BL), jnp.ones_like(phonemes_BL), mel_BFM.shape[1])

    def encode(self, phonemes_BL: Array, speaker_B: Array, train: bool = False) -> Float[Array, "B L D"]:
        """What the text says, and who says it; nothing of it depends on padding."""
        real_BL1 = (phonemes_BL > 0).astype(jnp.float32)[..., None]
        x_BLD = self.symbols(phonemes_BL)
        if self.speakers is not None:
            x_BLD = x_BLD + self.speakers(speaker_B)[:, None]
        for block in self.encoder:
            x_BLD = block(x_BLD, real_BL1, train)
        return x_BLD

    def align(self, phonemes_BL: Array, mel_BFM: Array, frames_B: Array) -> Float[Array, "B F L"]:
        """How near each frame is to each phoneme: at most 0; without the prior."""
        real_BL1 = (phonemes_BL > 0)[..., None]
        real_BF1 = (jnp.arange(mel_BFM.shape[1]) < frames_B[:, None])[..., None]
        key_BLA = self.keys[1](nn.relu(self.keys[0](self.symbols(phonemes_BL) * real_BL1)))
        query_BFA = nn.relu(self.queries[0](mel_BFM * real_BF1))
        query_BFA = self.queries[2](nn.relu(self.queries[1](query_BFA)))
        square_BFL = jnp.sum(query_BFA**2, -1)[..., None] + jnp.sum(key_BLA**2, -1)[:, None]
        return -_TEMPERATURE * (square_BFL - 2 * jnp.einsum("bfa,bla->bfl", query_BFA, key_BLA))

    def variances(self, h_BLD: Array, phonemes_BL: Array, train: bool = False) -> tuple[Array, Array, Array]:
        """Of each phoneme the logarithm of its frames and one, its pitch and its energy: f32[B,L] each."""
        real_BL1 = (phonemes_BL > 0).astype(jnp.float32)[..., None]
        duration_BL, pitch_BL, energy_BL = (
            self.predictors[name](h_BLD, real_BL1, train) * real_BL1[..., 0] for name in ("duration", "pitch", "energy")
        )
        return duration_BL, pitch_BL, energy_BL

    def decode(
        self, h_BLD: Array, variances: tuple[Array, Array], duration_BL: Array, F: int, train: bool = False
    ) -> Float[Array, "B F M"]:
        """The mel bands of the frames that durations, i32[B,L], come to; F is a multiple of ``reduction``.

        Args:
          variances: pitch and energy of each phoneme, f32[B,L]; 0 at padding.
        """
        for name, x_BL in zip(("pitch", "energy"), variances, strict=True):
            h_BLD = h_BLD + self.embed[name](x_BL[..., None])
        at_BF, real_BF = spread(duration_BL, F)
        path_BFL = (at_BF[..., None] == jnp.arange(h_BLD.shape[1])) & real_BF[..., None]
        x_BFD = jnp.einsum("bfl,bld->bfd", path_BFL.astype(jnp.float32), h_BLD)
        x_BFD = jnp.concatenate([x_BFD, _places(at_BF, duration_BL, real_BF)], -1)
        B, steps = len(x_BFD), F // self.reduction
        real_BS1 = real_BF.reshape(B, steps, -1).any(-1, keepdims=True).astype(jnp.float32)
        x_BSD = self.join(x_BFD.reshape(B, steps, -1))
        for block in self.decoder:
            x_BSD = block(x_BSD, real_BS1, train)
        return self.out(self.norm(x_BSD)).reshape(B, F, self.mels)


def _places(at_BF: Array, duration_BL: Array, real_BF: Array) -> Float[Array, "B F 4"]:
    """Where in its phoneme each frame is, forwards and backwards, as shares and as frames (as in Merlin, Wu et al.
    2016)."""
    start_BL = jnp.cumsum(duration_BL, axis=1) - duration_BL
    size_BF, start_BF = (jnp.take_along_axis(x, at_BF, 1) for x in (duration_BL, start_BL))
    place_BF = jnp.arange(at_BF.shape[1]) - start_BF + 0.5
    size_BF = jnp.maximum(size_BF, 1)
    parts = (place_BF / size_BF, 1 - place_BF / size_BF, place_BF / 10, (size_BF - place_BF) / 10)
    return jnp.where(real_BF[..., None], jnp.stack(parts, -1), 0.0)
