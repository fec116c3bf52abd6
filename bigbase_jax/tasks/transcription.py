"""Transcription by Whisper and its like: what is said in a window of sound, written token by token, with times.

Axes: B windows, T samples, F frames, M mel bands, S places of the encoder, D its width, L tokens of a prompt, U those
of a transcript, N what is written.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.audio.features import LogMel, whisper
from bigbase_jax.build import suggest
from bigbase_jax.core import Array, Batch, Example, Loss, Metric, Sum, UserError, Variables
from bigbase_jax.decoding.transcripts import Rules, transcript_tokens
from bigbase_jax.tasks import textual
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.tasks.metrics import transcripts
from bigbase_jax.tasks.recognition import Transcribing
from bigbase_jax.text.tokenizer import load

STEP = 0.02
"""Seconds from a timestamp to the next; two frames."""
RATE = 16_000
ANY = -1
"""The language of a recording that has to be found out."""


class Format(NamedTuple):
    """The tokens around a transcript (Radford et al. 2022, figure 1), by their numbers; None or empty: there are none.

    All special tokens, the end first, come after those of text, and those of times after all others.
    """

    end: int
    start: int
    no_timestamps: int | None = None
    previous: int | None = None
    no_speech: int | None = None
    transcribe: int | None = None
    translate: int | None = None
    languages: Mapping[str, int] = {}

    @classmethod
    def of(cls, special: Mapping[str, int]) -> Format:
        """From special tokens by name; raises UserError where they are not Whisper's."""
        named = {name[2:-2]: token for name, token in special.items() if re.fullmatch(r"<\|.+\|>", name)}
        if not {"endoftext", "startoftranscript"} <= named.keys():
            raise UserError("the tokenizer has no <|endoftext|> and <|startoftranscript|>, as Whisper's has.")
        languages = {name: token for name, token in named.items() if re.fullmatch("[a-z]{2,3}", name)}
        return cls(
            named["endoftext"],
            named["startoftranscript"],
            named.get("notimestamps"),
            named.get("startofprev"),
            named.get("nospeech", named.get("nocaptions")),
            named.get("transcribe"),
            named.get("translate"),
            languages,
        )


@dataclasses.dataclass(frozen=True)
class Transcription(Transcribing):
    """A model that writes what it hears, taught by transcripts, and the rules of how it writes.

    A batch holds ``audio`` i16[B,T], zero behind the end and of any length up to the model's window; to learn from,
    ``labels`` i32[B,U], ``labels_length`` i32[B] and ``reference`` u8[B,R] (see ``data.sources.audio.transcribed``).

    Attributes:
      model: a Linen module with the methods ``encode``, ``hidden``, ``logits``, ``cache`` and ``decode`` (see
        ``models.whisper``).
      tokenizer: ``Tokenizer.state()``, whose special tokens are Whisper's.
      language: of the recordings, such as "en"; None: what the model takes it for.
      english: whether the model knows English alone, and its prompt names no language; None: as published ones of so
        many tokens do.
      translate: write English, whatever is said.
      timestamps: write times.
      first, suppress, begin_suppress: see ``decoding.transcripts.Rules``.
      max_length: of a transcript and its prompt, in tokens; None: the model's.
      temperatures: at which a window is written until it is good enough, the first first.
      compression: a text that zlib makes smaller than by this factor repeats itself, and is not good enough.
      log_p: nor is one of a smaller mean log-probability of its tokens; None, as of ``compression``: all are.
      no_speech: a window of a smaller ``log_p`` has no speech where this is less than its probability; None: all do.
      condition: let the model read what it has written of a recording so far.
      inputs: what ``predict`` reads; ``language`` i32[], a token or -1, is each recording's own.
      normalisation: of transcripts that are compared (``text.normalise``).
      rate: samples per second; 16,000.

    Raises:
      UserError: another rate, a language that the model does not know, or a tokenizer that is not Whisper's.
    """

    model: nn.Module
    tokenizer: str | None = None
    language: str | None = None
    english: bool | None = None
    translate: bool = False
    timestamps: bool = True
    first: int | None = 50
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    max_length: int | None = None
    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    compression: float | None = 2.4
    log_p: float | None = -1.0
    no_speech: float | None = 0.6
    condition: bool = False
    inputs: tuple[str, ...] = ("audio",)
    normalisation: str | None = None
    rate: int | None = None

    read: ClassVar[tuple[str, ...]] = ("tokens", "count")
    batch_coupled: ClassVar[bool] = False
    transcribes: ClassVar[bool] = True
    windowed: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, Metric]] = {**transcripts.METRICS, "loss": Metric("min", "nats")}

    def __post_init__(self) -> None:
        for name in ("suppress", "begin_suppress", "temperatures", "inputs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.rate not in (None, RATE):
            raise UserError(f"rate is {self.rate}; Whisper hears {RATE:,} samples a second.")
        if not self.temperatures:
            raise UserError("temperatures are none; give at least one, such as (0.0,).")
        textual.check_vocabulary(self.model, self.tokenizer)
        if self.language is not None:
            self.token_of(self.language)

    @functools.cached_property
    def format(self) -> Format:
        """The special tokens."""
        if self.tokenizer is None:
            raise UserError("the task does not know the tokenizer; set it, or give it data that has one.")
        return Format.of(load(self.tokenizer).special_tokens)

    @property
    def multilingual(self) -> bool:
        """Whether a prompt names the language."""
        english = getattr(self.model, "vocab_size", None) == 51_864 if self.english is None else self.english
        return not english and bool(self.format.languages)

    def token_of(self, language: str) -> int:
        """Of a language, such as "en"; raises UserError where the model does not know it."""
        known = self.format.languages if self.multilingual else {"en": ANY}
        if language not in known:
            some = ", ".join(sorted(known)[:12]) + (", ..." if len(known) > 12 else "")
            raise UserError(
                f"the model knows no language {language!r} (it knows {some}).{suggest(language, known, 'language')}"
            )
        return known[language]

    @functools.cached_property
    def features(self) -> LogMel:
        """What the model hears."""
        return whisper(getattr(self.model, "mels", 80))

    @property
    def window(self) -> int:
        """Samples that are heard at once."""
        return int(getattr(self.model, "frames", 3000)) * self.features.hop

    @property
    def places(self) -> int:
        """Of a prompt and a transcript together."""
        return min(self.max_length or 1 << 30, getattr(self.model, "length", 448))

    @functools.cached_property
    def rules(self) -> Rules:
        """What may be written."""
        f, size = self.format, getattr(self.model, "vocab_size", None) or 1 << 30
        timed = self.timestamps and f.no_timestamps is not None and f.no_timestamps + 1 < size
        return Rules(f.end, f.no_timestamps, timed, self.first, self.suppress, self.begin_suppress)

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def heard(self, audio_BT: Array) -> jax.Array:
        """f32[B,F,M] of a whole window, which is silent behind the recording's end, as published."""
        x_BT = jnp.asarray(audio_BT)
        missing = self.window - x_BT.shape[1]
        if missing < 0:
            raise UserError(f"{x_BT.shape[1]:,} samples are more than a window of {self.window:,}; set seconds=30.")
        features_BFM: jax.Array = self.features(jnp.pad(x_BT, ((0, 0), (0, missing))))
        return features_BFM

    def encode(self, variables: Variables, features_BFM: Array) -> jax.Array:
        """What ``write`` reads, f32[B,S,D]."""
        with model_errors():
            memory_BSD: Any = self.model.apply(variables, features_BFM, method="encode")
        return memory_BSD

    def detected(self, variables: Variables, memory_BSD: Array) -> jax.Array:
        """i32[B]: the token of the likeliest language (Radford et al. 2022, section 2.3)."""
        B, model = len(memory_BSD), self.model
        cache: Any = model.cache(B, 1, memory_BSD.shape[1])
        start_B1, zero_B = jnp.full((B, 1), self.format.start), jnp.zeros(B, jnp.int32)
        words: Any = {"method": "decode", "mutable": ["cache"]}
        y_B1D, _ = model.apply({**variables, "cache": cache}, start_B1, zero_B, memory_BSD, **words)
        logits_BV: Any = model.apply(variables, y_B1D, method="logits")
        tokens = jnp.array(sorted(self.format.languages.values()), jnp.int32)
        return tokens[jnp.argmax(logits_BV[:, 0, tokens], -1)]

    def prompt(self, language_B: Array, timed: bool) -> jax.Array:
        """i32[B,L]: what a transcript begins with."""
        f, B = self.format, len(language_B)
        task = (f.translate if self.translate else f.transcribe) if self.multilingual else None
        marks = [f.start, task, None if timed else f.no_timestamps]
        columns = [jnp.full((B, 1), mark, jnp.int32) for mark in marks if mark is not None]
        if self.multilingual:
            columns.insert(1, jnp.asarray(language_B, jnp.int32)[:, None])
        return jnp.concatenate(columns, 1)

    def write(
        self,
        variables: Variables,
        memory_BSD: Array,
        prompt_BL: Array,
        length_B: Array,
        start_B: Array,
        temperature: Any = 0.0,
        seed: Any = 0,
    ) -> dict[str, jax.Array]:
        """See ``decoding.transcripts``: ``tokens`` i32[B,N], ``count`` i32[B], ``log_p`` and ``no_speech`` f32[B]."""
        with model_errors():
            found = transcript_tokens(
                self.model,
                variables,
                memory_BSD,
                prompt_BL,
                length_B,
                start_B,
                self.rules,
                places=self.places,
                temperature=temperature,
                seed=seed,
                no_speech=self.format.no_speech,
            )
        return {name.rpartition("_")[0]: jnp.asarray(x) for name, x in found._asdict().items()}

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the recordings.
        """
        features_1FM = self.heard(jnp.zeros((1, *batch["audio"].shape[1:])))[:, :2]
        with model_errors():
            return self.model.init(key, features_1FM, jnp.zeros((1, 1), jnp.int32))

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """Cross-entropy of the transcripts and their ends, in nats; its weight is the number of these tokens."""
        return Loss({"loss": self._cross_entropy(variables, batch, key)}), textual.state_of(variables)

    def _cross_entropy(self, variables: Variables, batch: Batch, key: jax.Array | None = None) -> Sum:
        labels_BU, length_B = jnp.asarray(batch["labels"]), jnp.asarray(batch["labels_length"])[:, None]
        if self.multilingual and self.language is None:
            raise UserError("config.task.language is not set; say what the transcripts are in, for example en.")
        B, U = labels_BU.shape
        language = self.token_of(self.language) if self.language is not None else ANY
        prompt_BL = self.prompt(jnp.full(B, language), False)
        L = prompt_BL.shape[1]
        if self.places < L + U:
            raise UserError(f"a transcript of {U} tokens is longer than the model's {self.places - L}.")
        tokens_BX = jnp.concatenate([prompt_BL, labels_BU], 1)  # X = L + U
        at_U1 = jnp.arange(U + 1)
        target_BU1 = jnp.where(at_U1 < length_B, jnp.pad(labels_BU, ((0, 0), (0, 1))), self.format.end)
        rngs: Any = None if key is None else {"dropout": key}
        with model_errors():
            words: Any = {"train": key is not None, "rngs": rngs, "method": "hidden"}
            y_BXD: Any = self.model.apply(variables, self.heard(batch["audio"]), tokens_BX, **words)
            logits: Any = self.model.apply(variables, y_BXD[:, L - 1 :], method="logits")
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), target_BU1[..., None], -1)[..., 0]
        weight_BU1 = (at_U1 <= length_B) * batch["mask"][:, None]
        return Sum(-jnp.sum(log_p * weight_BU1), jnp.sum(weight_BU1))

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """What ``write`` gives of each recording, and its ``language`` i32[B], a token (-1: none)."""
        memory_BSD = self.encode(variables, self.heard(inputs["audio"]))
        B = len(memory_BSD)
        given_B = jnp.asarray(inputs["language"]) if "language" in self.inputs else jnp.full(B, ANY, jnp.int32)
        if self.language is not None:
            given_B = jnp.where(given_B == ANY, self.token_of(self.language), given_B)
        if self.multilingual and self.language is None:
            given_B = jnp.where(given_B == ANY, self.detected(variables, memory_BSD), given_B)
        prompt_BL = self.prompt(given_B, self.rules.timestamps)
        length_B = jnp.full(B, prompt_BL.shape[1], jnp.int32)
        found = self.write(variables, memory_BSD, prompt_BL, length_B, jnp.zeros(B, jnp.int32))
        return {**found, "language": given_B.astype(jnp.int32)}

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """What ``predict`` gives, and ``reference``; ``loss`` as in training."""
        outputs = {**self.predict(variables, batch), "reference": jnp.asarray(batch["reference"])}
        return outputs, {"loss": self._cross_entropy(variables, batch)}

    # -- on the host -----------------------------------------------------------------------------------------------

    def texts(self, examples: Mapping[str, np.ndarray]) -> list[str]:
        return [self.text(x[:n]) for x, n in zip(examples["tokens"], examples["count"], strict=True)]

    def text(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Tokens as text, without special ones and times."""
        return load(self.tokenizer or "").decode(token for token in map(int, tokens) if token < self.format.end)

    def segments(self, tokens: np.ndarray, frames: int) -> tuple[list[tuple[float, float, np.ndarray]], int]:
        """What was written of a window (without its end) in parts from time to time, and the frames that are done.

        What stands behind the last pair of times is thrown away: the next window begins there.

        Args:
          frames: of the window that are the recording's.

        Returns:
          (start and end in seconds of the window, tokens) of each, and where the next window begins.
        """
        if self.format.no_timestamps is None or not len(tokens):
            return [(0.0, frames // 2 * STEP, tokens)], frames
        begin = self.format.no_timestamps + 1
        is_time = tokens >= begin
        cuts = [i + 1 for i in range(len(tokens) - 1) if is_time[i] and is_time[i + 1]]
        if not cuts:
            times = tokens[is_time]
            stop = float(times[-1] - begin) * STEP if len(times) and times[-1] != begin else frames // 2 * STEP
            return [(0.0, stop, tokens)], frames
        ended = list(is_time[-2:]) == [False, True]  # a single time at the end: nothing is said behind it
        cuts = [*cuts, len(tokens)] if ended else cuts
        parts = [tokens[a:b] for a, b in zip([0, *cuts[:-1]], cuts, strict=True)]
        found = [((part[0] - begin) * STEP, (part[-1] - begin) * STEP, part) for part in parts]
        return found, frames if ended else int(tokens[cuts[-1] - 1] - begin) * 2

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """``text``, ``segments`` with their times, ``duration`` and ``language``, of one window."""
        tokens = np.asarray(output["tokens"])[: int(output["count"])]
        tokens = tokens[tokens != self.format.end]
        samples = int(example.get("audio_length", self.window))
        parts, _ = self.segments(tokens, min(samples, self.window) // self.features.hop)
        return self.answer(parts, samples / RATE, int(output["language"]))

    def answer(
        self, parts: Sequence[tuple[float, float, np.ndarray]], duration: float, language: int
    ) -> dict[str, Any]:
        """From segments, whose times are the recording's, to what a user reads."""
        said = [(start, stop, self.text(tokens)) for start, stop, tokens in parts]
        names = {token: name for name, token in self.format.languages.items()}
        return {
            "text": " ".join("".join(text for *_, text in said).split()),
            "segments": [
                {"start": round(float(start), 2), "end": round(float(min(stop, duration)), 2), "text": text.strip()}
                for start, stop, text in said
                if text.strip()
            ],
            "duration": round(duration, 3),
            "language": names.get(language, "en" if not self.multilingual else ""),
        }
