"""Speech synthesis: from a text to mel bands, and by a vocoder to sound.

Legend: B examples, L phonemes, F frames, M mel bands, T samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigbase_jax.audio.features import LogMel, vocoder_mel
from bigbase_jax.audio.files import wav
from bigbase_jax.audio.griffin_lim import griffin_lim
from bigbase_jax.core import (
    Batch,
    Evaluated,
    Example,
    Figure,
    Loss,
    Meter,
    Metric,
    Plot,
    Rendered,
    Sum,
    UserError,
    Variables,
)
from bigbase_jax.models.alignment import NEVER, log_prior, monotonic
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.tasks.vocoding import open_vocoder

_FRAMES = 12  # of an utterance for each of its phonemes, at most
_BLANK = -1.0  # the logit of no phoneme in the forward sum (Badlani et al. 2021, their code)
_PAUSE = 0.2  # seconds between sentences


@dataclasses.dataclass(frozen=True)
class Synthesis:
    """An acoustic model that learns when each phoneme is said while it learns how.

    A batch holds what ``data.sources.audio.voices`` says.

    Attributes:
      model: a Linen module such as ``models.fastspeech.FastSpeech``.
      rate: samples per second; None: the data's.
      symbols, speakers: names of phonemes and of speakers; None: the data's.
      pitch_centre, pitch_spread: log2 Hz that become 0, and octaves that become 1; None: the data's.
      mean, std: of log-mel bands, which become ``(x - mean) / std``.
      weights: of the training loss's terms: mel bands, the alignment, durations, pitch and energy.
      iterations: of Griffin & Lim's algorithm.
      vocoder: the folder of a run of a vocoder (``tasks.vocoding``) to take in its place.
    """

    model: nn.Module
    rate: int | None = None
    symbols: tuple[str, ...] | None = None
    speakers: tuple[str, ...] | None = None
    pitch_centre: float | None = None
    pitch_spread: float | None = None
    mean: float = -5.0
    std: float = 2.0
    weights: tuple[float, ...] = (1.0, 1.0, 0.1, 0.1, 0.1)
    iterations: int = 32
    vocoder: str | None = None

    inputs: ClassVar[tuple[str, ...]] = ("phonemes", "speaker", "rate", "pitch")
    batch_coupled: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "loss": Metric("min", "", "mel error"),
        "duration_error": Metric("min", "ms"),
        "pitch_error": Metric("min", "semitones"),
        "alignment": Metric("min", "nats"),
    }

    def __post_init__(self) -> None:
        for name in ("rate", "symbols", "speakers", "pitch_centre", "pitch_spread"):
            if getattr(self, name) is None:
                raise UserError(f"the task does not know {name}; the data has it, or set it.")
        for name in ("symbols", "speakers", "weights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.weights) != 5:
            raise UserError(f"weights is {self.weights}; it has one for each of the five terms of the loss.")

    @property
    def features(self) -> LogMel:
        """What the model says."""
        return vocoder_mel(self.rate or 0)

    @property
    def _spread(self) -> float:
        return self.pitch_spread or 1.0

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit.
        """
        phonemes_1L = jnp.zeros((1, batch["phonemes"].shape[1]), jnp.int32)
        F = _FRAMES * getattr(self.model, "reduction", 1)
        mel_1FM, one_1 = jnp.zeros((1, F, self.features.mels)), jnp.zeros(1, jnp.int32)
        with model_errors():
            return self.model.init(key, phonemes_1L, one_1, mel_1FM, one_1)

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """L1 of the mel bands, the forward sum of the alignment in nats per phoneme, and squared errors of each
        phoneme's duration (log), pitch and energy."""
        found = self._taught(variables, batch, key)
        terms = {name: found[name] for name in ("mel", "alignment", "duration", "pitch", "energy")}
        scale = dict(zip(terms, self.weights, strict=True))
        return Loss(terms, scale=scale), {name: x for name, x in variables.items() if name != "params"}

    def _taught(self, variables: Variables, batch: Batch, key: jax.Array | None) -> dict[str, Any]:
        """Terms of the loss where the recording says the durations, pitch and energy; ``key``: as in training."""
        phonemes_BL, speaker_B, frames_B = (jnp.asarray(batch[name]) for name in ("phonemes", "speaker", "frames"))
        mel_BFM = (jnp.asarray(batch["mel"]) - self.mean) / self.std
        mask_B, F = batch["mask"], mel_BFM.shape[1]
        real_BF = (jnp.arange(F) < frames_B[:, None]) * mask_B[:, None]
        real_BL = (phonemes_BL > 0) * mask_B[:, None]
        train, rngs = key is not None, None if key is None else {"dropout": key}

        def apply(method: str, *args: Any, **words: Any) -> Any:
            return self.model.apply(variables, *args, method=method, rngs=rngs, **words)

        with model_errors():
            near_BFL = apply("align", phonemes_BL, mel_BFM, frames_B)
            sum_B, at_BF = aligned(near_BFL, phonemes_BL, frames_B)
            path_BFL = (at_BF[..., None] == jnp.arange(phonemes_BL.shape[1])) * real_BF[..., None]
            duration_BL = jnp.sum(path_BFL, 1)
            voiced_BF = batch["f0"] > 0
            octaves_BF = jnp.log2(jnp.where(voiced_BF, batch["f0"], 1.0)) - (self.pitch_centre or 0.0)
            voiced_BL = jnp.einsum("bfl,bf->bl", path_BFL, voiced_BF * 1.0)
            pitch_BL = jnp.einsum("bfl,bf->bl", path_BFL, voiced_BF * octaves_BF / self._spread)
            pitch_BL = pitch_BL / jnp.maximum(voiced_BL, 1)
            energy_BL = jnp.einsum("bfl,bf->bl", path_BFL, mel_BFM.mean(-1)) / jnp.maximum(duration_BL, 1)
            h_BLD = apply("encode", phonemes_BL, speaker_B, train=train)
            said = apply("variances", h_BLD, phonemes_BL, train=train)
            lengths_BL = duration_BL.astype(jnp.int32)
            mel_hat_BFM = apply("decode", h_BLD, (pitch_BL, energy_BL), lengths_BL, F, train=train)
        wanted = (jnp.log1p(duration_BL), pitch_BL, energy_BL)
        found: dict[str, Any] = {
            "mel": Sum(jnp.sum(jnp.abs(mel_hat_BFM - mel_BFM).mean(-1) * real_BF), jnp.sum(real_BF)),
            "alignment": Sum(jnp.sum(sum_B * mask_B), jnp.sum(real_BL)),
        }
        for name, x_BL, y_BL in zip(("duration", "pitch", "energy"), said, wanted, strict=True):
            found[name] = Sum(jnp.sum((x_BL - y_BL) ** 2 * real_BL), jnp.sum(real_BL))
        return {**found, "durations": lengths_BL, "said": said, "voiced": voiced_BL > 0, "wanted": wanted}

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``mel`` f32[B,F,M], of which ``frames`` i32[B] are said; ``durations`` i32[B,L] in frames, ``phonemes``
        i32[B,L]. F is in proportion to L; what is said more slowly than that is cut."""
        phonemes_BL = jnp.asarray(inputs["phonemes"])
        r = getattr(self.model, "reduction", 1)
        F = _FRAMES * phonemes_BL.shape[1] // r * r
        with model_errors():
            h_BLD: Any = self.model.apply(variables, phonemes_BL, jnp.asarray(inputs["speaker"]), method="encode")
            log_BL, pitch_BL, energy_BL = self.model.apply(variables, h_BLD, phonemes_BL, method="variances")  # type: ignore[misc]
            duration_BL = jnp.round(jnp.expm1(log_BL) / jnp.asarray(inputs["rate"])[:, None]).astype(jnp.int32)
            duration_BL = jnp.maximum(duration_BL, 1) * (phonemes_BL > 0)
            shift_B1 = jnp.asarray(inputs["pitch"])[:, None] / 12 / self._spread
            pitch_BL = pitch_BL + shift_B1 * (phonemes_BL > 0)
            mel_BFM: Any = self.model.apply(variables, h_BLD, (pitch_BL, energy_BL), duration_BL, F, method="decode")
        frames_B = jnp.minimum(jnp.sum(duration_BL, 1), F)
        return {
            "mel": mel_BFM * self.std + self.mean,
            "frames": frames_B,
            "durations": duration_BL,
            "phonemes": phonemes_BL,
        }

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """``durations`` and ``predicted`` i32[B,L], frames of each phoneme by the alignment and by the model;
        ``loss``, the L1 of the mel bands in units of ``std`` where the recording says all else; the mean absolute
        errors of the durations and of the pitch of what is voiced; the forward sum of the ``alignment``."""
        found = self._taught(variables, batch, None)
        real_BL = (jnp.asarray(batch["phonemes"]) > 0) * batch["mask"][:, None]
        log_BL, pitch_BL, _ = found["said"]
        predicted_BL = jnp.maximum(jnp.expm1(log_BL), 1) * real_BL
        off_BL = jnp.abs(predicted_BL - found["durations"]) * (1000 * self.features.hop / (self.rate or 1))
        semitones_BL = jnp.abs(pitch_BL - found["wanted"][1]) * (12 * self._spread)
        voiced_BL = found["voiced"] * real_BL
        return {
            "durations": found["durations"],
            "predicted": jnp.round(predicted_BL).astype(jnp.int32),
            "phonemes": jnp.asarray(batch["phonemes"]),
        }, {
            "loss": found["mel"],
            "alignment": found["alignment"],
            "duration_error": Sum(jnp.sum(off_BL * real_BL), jnp.sum(real_BL)),
            "pitch_error": Sum(jnp.sum(semitones_BL * voiced_BL), jnp.sum(voiced_BL)),
        }

    # -- on the host -----------------------------------------------------------------------------------------------

    def meters(self) -> Mapping[str, Meter]:
        """None."""
        return {}

    def merge(self, outputs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Sentences one after another, with a pause between them."""
        features = self.features
        pause = np.full((round(_PAUSE * features.rate / features.hop), features.mels), np.log(features.floor))
        parts: list[np.ndarray] = []
        durations: list[np.ndarray] = []
        for output in outputs:
            parts += [pause] * bool(parts) + [output["mel"][: output["frames"]]]
            real_L = output["phonemes"] > 0
            durations.append(np.stack([output["durations"][real_L], output["phonemes"][real_L]]))
            if len(parts) > 1:
                durations[-2][0, -1] += len(pause)
        mel_FM, both = np.concatenate(parts), np.concatenate(durations, 1)
        return {"mel": mel_FM, "frames": np.int32(len(mel_FM)), "durations": both[0], "phonemes": both[1]}

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """``duration`` in seconds, ``speaker``, and the ``phonemes``, each with the second where it begins."""
        hop = self.features.hop / self.features.rate
        start_L = np.cumsum(output["durations"]) - output["durations"]
        said = [
            {"phoneme": (self.symbols or ())[i], "start": round(float(start * hop), 3)}
            for i, start in zip(output["phonemes"].tolist(), start_L, strict=True)
            if i > 1
        ]
        speaker = (self.speakers or ("",))[int(example["speaker"])]
        return {"duration": round(float(output["frames"] * hop), 3), "speaker": speaker, "phonemes": said}

    def rendered(self, output: Mapping[str, np.ndarray], example: Example) -> Rendered:
        """The sound, as WAV of 16 bits."""
        return Rendered(".wav", "audio/wav", wav(self.wave(output["mel"][: output["frames"]]), self.rate or 0))

    def wave(self, mel_FM: np.ndarray) -> np.ndarray:
        """f32[T] of f32[F,M].

        Raises:
          UserError: there is no such vocoder, or it reads other bands.
        """
        if self.vocoder is not None:
            vocoder = open_vocoder(self.vocoder)
            if vocoder.features != self.features:
                raise UserError(
                    f"the vocoder in {self.vocoder} reads bands of {vocoder.features.rate} samples a second; this voice"
                    f" has {self.rate}."
                )
            return np.asarray(vocoder(np.asarray(mel_FM)[None])[0])
        wave_T: np.ndarray = griffin_lim(np.asarray(mel_FM)[None], self.features, self.iterations)[0]
        return wave_T

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """When each phoneme of some utterances is said, in the recording and by the model."""
        names = ("durations", "predicted", "phonemes")
        if not set(names) <= evaluated.examples.keys():
            return
        for n in range(min(3, len(evaluated.examples["durations"]))):
            durations_L, predicted_L, phonemes_L = (evaluated.examples[name][n] for name in names)
            real = phonemes_L > 0
            places = np.arange(real.sum() + 1).tolist()
            hop = self.features.hop / self.features.rate

            def starts(x_L: np.ndarray, real: np.ndarray = real, hop: float = hop) -> list[float]:
                return (np.concatenate([[0], np.cumsum(x_L[real])]) * hop).tolist()

            series = {"recording": (starts(durations_L), places), "said": (starts(predicted_L), places)}
            text = "".join((self.symbols or ())[i] for i in phonemes_L[real][1:-1])
            yield Plot(f"Alignment: {text}", series, "seconds", "phonemes")


def aligned(near_BFL: jax.Array, phonemes_BL: jax.Array, frames_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The forward sum over all monotonic alignments, in nats, f32[B], and the phoneme of each frame on the best one,
    i32[B,F]; of what ``align`` gives, with the prior."""
    B, F, L = near_BFL.shape
    count_B = jnp.sum(phonemes_BL > 0, 1)
    real_BL = phonemes_BL > 0
    near_BFL = jnp.where(real_BL[:, None], near_BFL, NEVER)
    log_BFL = jax.nn.log_softmax(near_BFL) + jnp.maximum(log_prior(count_B, frames_B, L, F), -18.0)
    log_BFL = jnp.where(real_BL[:, None], log_BFL, -1e5)
    logits_BFK = jnp.pad(log_BFL, ((0, 0), (0, 0), (1, 0)), constant_values=_BLANK)
    labels_BL = jnp.broadcast_to(jnp.arange(1, L + 1), (B, L))
    behind_BF = (jnp.arange(F) >= frames_B[:, None]) * 1.0
    sum_B = optax.ctc_loss(logits_BFK, behind_BF, labels_BL, 1.0 - real_BL)
    return sum_B, jax.lax.stop_gradient(monotonic(jax.lax.stop_gradient(log_BFL), count_B, frames_B))
