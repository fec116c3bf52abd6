"""Published voices as they stand: folders of VITS and MMS-TTS with their vocabulary speak texts."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Codec, Example, Fields, UserError, Variables
from bigbase_jax.data.sources.text.base import given_text, named
from bigbase_jax.inference.predictor import Predictor, Reading
from bigbase_jax.models.vits import Vits
from bigbase_jax.pretrained.files import read_json
from bigbase_jax.pretrained.schema import FLAG, WORD, check
from bigbase_jax.tasks.vits import PublishedVoice
from bigbase_jax.text.phonemes import PAUSES, front_end

LENGTH = 512
"""Tokens of a sentence; of a longer one, parts are spoken."""
RATES = (0.5, 2.0)
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])|\n+")
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
    codec = VitsCodec(vocabulary, dataset_info, model.rate, **{k: v for k, v in said.items() if k != "is_uroman"})
    task: Any = PublishedVoice(model)
    shapes = {"present": (LENGTH,), "tokens": (LENGTH,), "speaker": ()}
    spec = {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in shapes.items()}
    spec["rate"] = jax.ShapeDtypeStruct((), np.float32)
    return Predictor(task, variables, dataset_info, spec, lambda: Reading(codec), rows=4)


@dataclasses.dataclass(frozen=True)
class VitsCodec(Codec):
    """A text to be spoken, as an example for each sentence; rows may have a ``speaker`` and a ``rate``.

    Attributes:
      vocabulary: token -> its number.
      dataset_info: names of ``speakers``.
      usual: rate that 1 is.
      add_blank: whether the token 0 is around all others.
      normalize: whether letters that are not in the vocabulary are made small, and what is left of those dropped.
      phonemize: whether espeak-ng reads the text, as American English.
      language: of the voice.
    """

    vocabulary: Mapping[str, int]
    dataset_info: Mapping[str, Any]
    usual: float = 1.0
    add_blank: bool = True
    normalize: bool = True
    phonemize: bool = True
    language: str = ""

    padded = ("present", "tokens")

    @property
    def fields(self) -> Fields:  # type: ignore[override]
        columns = {"text": [(name,) for name in ("text", "sentence", "transcript")]}
        return Fields(
            columns, lines=True, short={"speaker": self.dataset_info["speakers"]}, options=("speaker", "rate")
        )

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """
        Raises:
          UserError: no text, nothing in it that the voice can speak, or a wrong option.
        """
        row = given if isinstance(given, Mapping) else {}
        speaker, rate = self._speaker(row.get("speaker")), self._rate(row.get("rate"))
        with named(given):
            text = given_text(given, self.dataset_info)
            found = [self.tokens(sentence) for sentence in _SENTENCE.split(text)]
            if not any(found):
                shown = text if len(text) <= 40 else text[:40] + "..."
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

    def _speaker(self, given: Any) -> int:
        names = self.dataset_info["speakers"]
        if given in (None, ""):
            return 0
        if str(given) not in names:
            raise UserError(f"there is no speaker {given!r}.{suggest(str(given), names[:20], 'speaker')}")
        return int(names.index(str(given)))

    def _rate(self, given: Any) -> float:
        try:
            rate = 1.0 if given in (None, "") else float(given)
        except (TypeError, ValueError):
            rate = 0.0
        if not RATES[0] <= rate <= RATES[1]:
            raise UserError(f"rate is {given!r}; it is a number from {RATES[0]:g} to {RATES[1]:g}.")
        return rate
