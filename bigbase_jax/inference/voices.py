"""Published voices as they stand: folders of VITS and MMS-TTS with their vocabulary speak texts."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from textwrap import shorten
from typing import Any

import jax
import numpy as np

from bigbase_jax.core import Example, UserError, Variables
from bigbase_jax.data.files import LIMITS
from bigbase_jax.data.sources.audio.voices import RATES, SpokenCodec
from bigbase_jax.data.sources.text.base import named
from bigbase_jax.inference.predictor import Predictor, Reading
from bigbase_jax.models.vits import Vits
from bigbase_jax.pretrained.files import read_json
from bigbase_jax.pretrained.schema import FLAG, WORD, check
from bigbase_jax.tasks.vits import PublishedVoice
from bigbase_jax.text.phonemes import PAUSES, front_end

LENGTH = 512
"""Tokens of a sentence; of a longer one, parts are spoken."""
_SAID = {"language": WORD, **dict.fromkeys(("add_blank", "normalize", "phonemize", "is_uroman"), FLAG)}


def of_vits(path: str, model: Vits, variables: Variables) -> Predictor:
    """A voice that reads as the folder's ``vocab.json`` and ``tokenizer_config.json`` say.

    Raises:
      UserError: they are not there, are none of a VITS, or ask for what is not known here.
    """
    folder = pathlib.Path(path).expanduser()
    vocabulary = read_json(folder / "vocab.json")
    if not all(type(i) is int and 0 <= i < model.vocab_size for i in vocabulary.values()):
        raise UserError(f"{folder / 'vocab.json'} has numbers that are none of the model's {model.vocab_size} tokens.")
    where = folder / "tokenizer_config.json"
    said = check(read_json(where), _SAID, str(where)) if where.is_file() else {}
    if said.get("is_uroman"):
        raise UserError(
            f"{path} reads {said.get('language') or 'a language'} through uroman, which is not part of this program;"
            " take a voice that reads its own letters."
        )
    dataset_info = {"speakers": tuple(map(str, range(model.speakers))), "rate": model.samples}
    said = {name: value for name, value in said.items() if name != "is_uroman"}
    codec = VitsCodec(dataset_info, LIMITS, vocabulary, model.rate, **said)
    task: Any = PublishedVoice(model)
    shapes = {"present": (LENGTH,), "tokens": (LENGTH,), "speaker": ()}
    spec = {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in shapes.items()}
    spec["rate"] = jax.ShapeDtypeStruct((), np.float32)
    return Predictor(task, variables, dataset_info, spec, lambda: Reading(codec), rows=4)


@dataclasses.dataclass(frozen=True)
class VitsCodec(SpokenCodec):
    """A text to be spoken, as an example for each sentence; see ``SpokenCodec``.

    Attributes:
      vocabulary: token -> its number.
      usual: rate that 1 is.
      add_blank: whether the token 0 is around all others.
      normalize: whether letters that are not in the vocabulary are made small, and what is left of those dropped.
      phonemize: whether espeak-ng reads the text, as American English.
      language: of the voice.
    """

    vocabulary: Mapping[str, int] = dataclasses.field(default_factory=dict)
    usual: float = 1.0
    add_blank: bool = True
    normalize: bool = True
    phonemize: bool = True
    language: str = ""

    padded = ("present", "tokens")

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """
        Raises:
          UserError: no text, nothing in it that the voice can speak, or a wrong option.
        """
        row = given if isinstance(given, Mapping) else {}
        speaker, rate = self.speaker(row), self.number(row, "rate", 1.0, RATES)
        with named(given):
            sentences = self.sentences(given)
            found = [self.tokens(sentence) for sentence in sentences]
            if not any(found):
                shown = shorten(" ".join(sentences), 40, placeholder="...")
                raise UserError(f"there is nothing in {shown!r} that the voice can speak.")
        room = LENGTH // 2 - 1 if self.add_blank else LENGTH
        parts = [some[i : i + room] for some in found for i in range(0, len(some), room)]
        return [self._example(part, speaker, rate) for part in parts]

    def tokens(self, text: str) -> list[int]:
        """Those of a text, without blanks; what has none is left out."""
        known = self.vocabulary
        if self.normalize:
            text = "".join(c if c in known else c.lower() for c in text)
        if self.language == "ron":
            text = text.replace("ț", "ţ")
        if self.phonemize:
            text = self._phonemes(text)
        if self.normalize and not self.phonemize:
            text = "".join(c for c in text if c in known).strip()
        return [known[c] for c in text if c in known]

    def _phonemes(self, text: str) -> str:
        if not re.search(r"\w", text):
            return ""
        return "".join(s + " " * (s in PAUSES.strip()) for s in front_end("en-phonemes")(text)).strip()

    def _example(self, tokens: list[int], speaker: int, rate: float) -> Example:
        if self.add_blank:
            tokens = [0, *(t for token in tokens for t in (token, 0))]
        present, ids = np.zeros((2, LENGTH), np.int32)
        present[: len(tokens)], ids[: len(tokens)] = 1, tokens
        return {"present": present, "tokens": ids, "speaker": np.int32(speaker), "rate": np.float32(rate * self.usual)}
