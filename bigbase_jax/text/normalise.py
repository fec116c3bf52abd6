"""Transcripts as recognisers are trained on and measured by: what is a word, and what is left out.

``words``: Unicode NFKC, small letters, no punctuation but apostrophes inside words; words stand between spaces.
``characters``: the same without spaces, and each character is a word, as for Chinese and Japanese.
``none``: as it stands, but for spaces in a row.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError

KINDS = ("words", "characters", "none")
_APOSTROPHES = re.compile("[\u2018\u2019\u02bc`\u00b4]")
_NO_WORD = re.compile(r"(?<!\w)'|'(?!\w)|[^\w']|_")
_WIDE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def check_kind(kind: str) -> None:
    """Raises UserError where there is no such normalisation."""
    if kind not in KINDS:
        raise UserError(f"there is no normalisation {kind!r}.{suggest(kind, KINDS, 'normalisation')}")


def kind_of(texts: Iterable[str]) -> str:
    """``characters`` where more than half of the letters belong to scripts without spaces, else ``words``."""
    wide = letters = 0
    for text in texts:
        letters += sum(map(str.isalpha, text))
        wide += len(_WIDE.findall(text))
    return "characters" if 2 * wide > letters else "words"


def normalise(text: str, kind: str = "words") -> str:
    """The text in the form that is learned and compared."""
    if kind != "none":
        text = _APOSTROPHES.sub("'", unicodedata.normalize("NFKC", text).lower())
        text = _NO_WORD.sub(" ", text)
    return "".join(text.split()) if kind == "characters" else " ".join(text.split())


def words(text: str, kind: str = "words") -> list[str]:
    """The words of a normalised text."""
    return list(text) if kind == "characters" else text.split()
