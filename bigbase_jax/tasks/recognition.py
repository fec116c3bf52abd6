"""Speech recognition by CTC: what is said in a recording, and when.

Axes: B recordings of a batch, N of a split, T samples, F frames of features, M mel bands, S frames of the model,
U tokens of a transcript, V tokens, K candidates of a frame.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigbase_jax.audio.features import LogMel, fbank, scaled
from bigbase_jax.core import Batch, Evaluated, Example, Figure, Loss, Meter, Metric, Sum, UserError, Variables
from bigbase_jax.decoding import ctc
from bigbase_jax.evaluate import CollectAll
from bigbase_jax.models.speech_encoder import real
from bigbase_jax.tasks import figures
from bigbase_jax.tasks.audio_classification import spec_augment
from bigbase_jax.tasks.classification import applied_in_training
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.tasks.metrics import transcripts
from bigbase_jax.text import ngram
from bigbase_jax.text.tokenizer import load

_PAUSE = 1.0  # seconds without a word, between segments


class Transcribing:
    """What is measured and shown of a task that gives transcripts.

    Attributes:
      normalisation: of transcripts that are compared (``text.normalise``).
      read: the arrays of ``evaluate`` that ``texts`` reads, where there are such.
    """

    normalisation: str | None
    rate: int | None
    read: ClassVar[tuple[str, ...]]

    def texts(self, examples: Mapping[str, np.ndarray]) -> list[str]:
        """What is said in each of N recordings."""
        raise NotImplementedError

    def meters(self) -> Mapping[str, Meter]:
        """See ``metrics.transcripts``."""
        scores = lambda examples: transcripts.scores(self.errors(examples))  # noqa: E731
        return {"transcripts": CollectAll(scores, (*self.read, "reference"))}

    def errors(self, examples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``metrics.transcripts.errors`` of what ``evaluate`` gives of N utterances."""
        return transcripts.errors(self.texts(examples), transcripts.references(examples), self.normalisation or "words")

    def ratios(self, examples: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """``wer`` and ``cer`` by utterance: errors, and of how many words or characters, [N] each."""
        found = self.errors(examples)
        wrong = found["insertions"] + found["deletions"] + found["substitutions"]
        return {"wer": (wrong, found["words"]), "cer": (found["character_errors"], found["characters"])}

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """The utterances with the most errors."""
        if {self.read[0], "reference"} <= evaluated.examples.keys():
            said, true = self.texts(evaluated.examples), transcripts.references(evaluated.examples)
            yield figures.transcripts(
                said, true, self.normalisation or "words", evaluated.examples, self.rate or 16_000
            )


@dataclasses.dataclass(frozen=True)
class Recognition(Transcribing):
    """A model over log-mel bands that says a token or nothing in each frame (CTC, Graves et al. 2006).

    A batch holds ``audio`` i16[B,T], ``audio_length`` i32[B] in samples; and to learn from ``labels`` i32[B,U] and
    ``labels_length`` i32[B]; ``reference`` u8[B,R] (see ``data.sources.audio.transcribed``).

    Attributes:
      model: a Linen module ``(f32[B,F,M], lengths i32[B], train) -> (logits f32[B,S,V+1], lengths)``; the blank is
        the last label, or its attribute ``blank``.
      tokenizer: ``Tokenizer.state()``.
      rate: samples per second.
      normalisation: of transcripts (``text.normalise``).
      mels: M.
      whole: whether the mean of each band over the recording is taken off, which streams cannot know.
      mean, std: of features otherwise: they become ``(x - mean) / std``.
      floor: of a band's energy, of samples as 16-bit numbers: what is below it is quiet alike, so that digital silence
        is no extreme (Kaldi adds noise to samples instead, ``--dither``); None: what a float32 tells apart.
      time_masks, frequency_masks: SpecAugment (Park et al. 2019) in training: (how many, the largest share of the
        frames, or the most bands, that each covers).
      beams: of the search; 1: the likeliest label of each frame.
      language_model: an ARPA file's text, by which the search goes where there are several beams; None: the data's.
      language_weight, word_bonus: of its log-probabilities, and for each of its words.
      unknown: what a word that it does not have costs, nats.
      candidates: K.
      frame_seconds: from a frame of the model to the next; None: as the data was prepared for.

    Raises:
      UserError: a value out of range, or the data's facts are missing.
    """

    model: nn.Module
    tokenizer: str | None = None
    rate: int | None = None
    normalisation: str | None = None
    mels: int = 80
    whole: bool = True
    mean: float = 12.0
    std: float = 4.0
    floor: float | None = None
    time_masks: tuple[int, float] = (0, 0.0)
    frequency_masks: tuple[int, int] = (0, 0)
    beams: int = 1
    language_model: str | None = None
    language_weight: float = 0.5
    word_bonus: float = 0.0
    unknown: float = 10.0
    candidates: int = 32
    frame_seconds: float | None = None

    inputs: ClassVar[tuple[str, ...]] = ("audio", "audio_length")
    read: ClassVar[tuple[str, ...]] = ("path", "candidates", "log_p", "tokens", "scores")
    batch_coupled: ClassVar[bool] = False
    transcribes: ClassVar[bool] = True
    overlaps: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, Metric]] = {**transcripts.METRICS, "loss": Metric("min", "nats")}

    def __post_init__(self) -> None:
        for name in ("time_masks", "frequency_masks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("tokenizer", "rate", "frame_seconds"):
            if getattr(self, name) is None:
                raise UserError(f"the task does not know the {name} of the data; set it.")
        for name in ("beams", "candidates"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    @property
    def features(self) -> LogMel:
        """What the model reads: Kaldi's filter banks."""
        found = fbank(self.mels, self.rate or 0)
        return found if self.floor is None else dataclasses.replace(found, floor=self.floor)

    @property
    def blank(self) -> int:
        """The label that says nothing."""
        return int(getattr(self.model, "blank", load(self.tokenizer or "").size))

    def bands(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """f32[B,F,M], zero behind the end, and the frames before it, i32[B]."""
        audio_BT = jnp.asarray(batch["audio"])
        lengths_B = self.features.frames(jnp.asarray(batch["audio_length"]))
        missing = self.features.window - audio_BT.shape[1]
        x_BT = jnp.pad(audio_BT, ((0, 0), (0, max(missing, 0))))
        x_BFM = (self.features(x_BT) - self.mean) / self.std
        real_BF1 = real(lengths_B, x_BFM.shape[1])[..., None]
        if self.whole:
            total_B1M = jnp.sum(jnp.where(real_BF1, x_BFM, 0), 1, keepdims=True)
            x_BFM = x_BFM - total_B1M / jnp.maximum(lengths_B, 1)[:, None, None]
        return jnp.where(real_BF1, x_BFM, 0), lengths_B

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the features or the number of tokens.
        """
        x_1FM, lengths_1 = self.bands(
            {"audio": jnp.zeros((1, *batch["audio"].shape[1:])), "audio_length": jnp.ones(1, int)}
        )
        with model_errors():
            (logits_1SV, *_), variables = self.model.init_with_output(key, x_1FM, lengths_1)
        if logits_1SV.shape[-1] <= self.blank:
            raise UserError(f"the model gives {logits_1SV.shape[-1]} labels, and the blank is number {self.blank}.")
        return variables

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """The negative log-probability of the transcripts, in nats; its weight is the number of tokens."""
        x_BFM, lengths_B, key = self.masked(batch, key)
        (logits_BSV, frames_B), state = applied_in_training(self.model, variables, key, x_BFM, lengths_B)
        return Loss({"loss": self.ctc_loss(logits_BSV, frames_B, batch)}), state

    def masked(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``bands`` with SpecAugment, and a key for dropout."""
        mask_key, dropout_key = jax.random.split(key)
        x_BFM, lengths_B = self.bands(batch)
        x_BFM1 = spec_augment(mask_key, x_BFM[..., None], self.time_masks, self.frequency_masks, lengths_B)
        return x_BFM1[..., 0], lengths_B, dropout_key

    def ctc_loss(self, logits_BSV: jax.Array, frames_B: jax.Array, batch: Batch) -> Sum:
        """In nats per token; a transcript for which there are too few frames has no weight."""
        labels_BU, length_B = jnp.asarray(batch["labels"]), jnp.asarray(batch["labels_length"])
        nothing_BS = (~real(frames_B, logits_BSV.shape[1])).astype(jnp.float32)
        real_BU = real(length_B, labels_BU.shape[1])
        weight_B = self.alignable(frames_B, batch)
        nats_B = optax.ctc_loss(logits_BSV, nothing_BS, labels_BU, (~real_BU).astype(jnp.float32), blank_id=self.blank)
        return Sum(jnp.sum(weight_B * nats_B), jnp.sum(weight_B * jnp.maximum(length_B, 1)))

    def alignable(self, frames_B: jax.Array, batch: Batch) -> jax.Array:
        """f32[B]: 1 where there are frames enough for the transcript; 0 for a row of padding."""
        labels_BU, length_B = jnp.asarray(batch["labels"]), jnp.asarray(batch["labels_length"])
        same_BU = (labels_BU[:, 1:] == labels_BU[:, :-1]) & real(length_B, labels_BU.shape[1])[:, 1:]
        weight_B: jax.Array = jnp.asarray(batch["mask"]) * (frames_B >= length_B + jnp.sum(same_BU, 1))
        return weight_B

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``path`` i32[B,S], the likeliest label of each frame, -1 behind the end; for a search ``candidates``
        i32[B,S,K] (-1 behind the end) and their ``log_p`` f32[B,S,K]; ``seconds`` f32[B]."""
        return self.outputs(*self._logits(variables, inputs), inputs)

    def _logits(self, variables: Variables, inputs: Batch) -> tuple[jax.Array, jax.Array]:
        with model_errors():
            found: Any = self.model.apply(variables, *self.bands(inputs))
        return found

    def outputs(self, logits_BSV: jax.Array, frames_B: jax.Array, inputs: Batch) -> dict[str, jax.Array]:
        """What ``predict`` gives, of what the model gives of as many frames as are real."""
        real_BS = real(frames_B, logits_BSV.shape[1])
        found = {
            "path": jnp.where(real_BS, jnp.argmax(logits_BSV, -1), -1).astype(jnp.int32),
            "seconds": jnp.asarray(inputs["audio_length"]) / jnp.float32(self.rate),
        }
        if self.beams > 1:
            log_p, tokens = jax.lax.top_k(jax.nn.log_softmax(logits_BSV), min(self.candidates, logits_BSV.shape[-1]))
            found |= {"candidates": jnp.where(real_BS[..., None], tokens, -1).astype(jnp.int32), "log_p": log_p}
        return found

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """What ``predict`` gives, and ``reference``; ``loss`` as in training."""
        logits_BSV, frames_B = self._logits(variables, batch)
        outputs = self.outputs(logits_BSV, frames_B, batch)
        return {**outputs, "reference": jnp.asarray(batch["reference"])}, {
            "loss": self.ctc_loss(logits_BSV, frames_B, batch)
        }

    # -- on the host -----------------------------------------------------------------------------------------------

    def texts(self, examples: Mapping[str, np.ndarray]) -> list[str]:
        """What is said in each of N recordings."""
        kept = {name: examples[name] for name in self.read if name in examples}
        rows = (dict(zip(kept, row, strict=True)) for row in zip(*kept.values(), strict=True))
        return [self._text([token.token for token in self.tokens(row, False)]) for row in rows]

    def tokens(self, output: Mapping[str, np.ndarray], timed: bool = True) -> list[ctc.Token]:
        """The tokens of a recording; with times where asked for."""
        if self.beams == 1 or "candidates" not in output:
            return ctc.best_path(np.asarray(output["path"]), self.blank)
        tokens_SK, log_p_SK = np.asarray(output["candidates"]), np.asarray(output["log_p"], np.float64)
        tokens, _ = ctc.beam_search(tokens_SK, log_p_SK, self.blank, self.beams, self._scorer)[0]
        aligned = ctc.align(tokens_SK, log_p_SK, tokens, self.blank) if timed else []
        return aligned or [ctc.Token(token, 0, 0) for token in tokens]

    @functools.cached_property
    def _scorer(self) -> ctc.Scorer | None:
        if self.language_model is None:
            return None
        model = ngram.from_arpa(self.language_model)
        spelled = [piece.decode(errors="replace") for piece in load(self.tokenizer or "").spelled()]
        return ngram.Fusion(
            model,
            spelled,
            self.language_weight,
            self.word_bonus,
            self.unknown,
            by_character=self.normalisation == "characters",
        )

    def _text(self, tokens: Sequence[int]) -> str:
        return " ".join(load(self.tokenizer or "").decode(tokens).split())

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """``text``; ``words`` and ``segments`` (parts between pauses of a second) with their times; ``duration``. CTC
        models say a token late and in few frames: a time is right to about a fifth of a second."""
        seconds = self.frame_seconds or 0.0
        duration = float(output["seconds"])
        words: list[dict[str, Any]] = []
        tokens = self.tokens(output)
        pieces, open_word = load(self.tokenizer or "").spelled(), False
        for token, start, stop in tokens:
            for character in pieces[token].decode(errors="replace"):
                if character.isspace() or self.normalisation == "characters":
                    open_word = False
                if character.isspace():
                    continue
                if not open_word:
                    words.append({"word": "", "start": round(start * seconds, 3)})
                    open_word = True
                words[-1]["word"] += character
                words[-1]["end"] = round(min(stop * seconds, max(duration, start * seconds)), 3)
        text = self._text([token.token for token in tokens])
        segments: list[list[dict[str, Any]]] = []
        for word in words:
            if not segments or word["start"] - segments[-1][-1]["end"] >= _PAUSE:
                segments.append([])
            segments[-1].append(word)
        between = "" if self.normalisation == "characters" else " "
        parts = [
            {"start": some[0]["start"], "end": some[-1]["end"], "text": between.join(w["word"] for w in some)}
            for some in segments
        ]
        return {"text": text, "words": words, "segments": parts, "duration": round(duration, 3)}


@dataclasses.dataclass(frozen=True)
class WaveRecognition(Recognition):
    """``Recognition`` by a model of samples instead of features, such as wav2vec 2.0.

    Attributes:
      model: as for ``Recognition``, of samples f32[B,T] and their number; its blank is its attribute ``blank``.
      centred: whether a recording's samples become those of the mean 0 and the variance 1.
    """

    centred: bool = True

    def bands(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """f32[B,T], zero behind the end, and i32[B]."""
        audio_BT, length_B = jnp.asarray(batch["audio"]), jnp.asarray(batch["audio_length"])
        x_BT, real_BT = scaled(audio_BT), real(length_B, audio_BT.shape[1])
        if self.centred:
            count_B1 = jnp.maximum(length_B, 1)[:, None]
            x_BT = x_BT - jnp.sum(jnp.where(real_BT, x_BT, 0), 1, keepdims=True) / count_B1
            square_B1 = jnp.sum(jnp.where(real_BT, x_BT**2, 0), 1, keepdims=True) / count_B1
            x_BT = x_BT * jax.lax.rsqrt(square_B1 + 1e-7)
        return jnp.where(real_BT, x_BT, 0), length_B
