"""Text front ends of synthesis: from a text to the symbols whose sounds a voice has learned.

``front_end("en")`` reads English as espeak-ng's phonemes where that program is installed, else as characters;
``front_end("zh")`` reads Chinese as pypinyin's initials, finals and tones; ``front_end("characters")`` takes letters as
they are. A run keeps the ``name`` of what it was trained with, and ``front_end(name)`` gives just that or refuses.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bigbase_jax.core import UserError
from bigbase_jax.runtime.limits import limit, too_much
from bigbase_jax.runtime.log import say
from bigbase_jax.text import spoken

MOST = 20_000  # characters of a text that is spoken at once, times BIGBASE_LIMITS
PROGRAM = "espeak-ng"
SECONDS = 20.0  # that it may take for a text
PAUSES = " ,.?!;:"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_IPA = _LETTERS + "æçðøħŋœɐɑɒɔɕɖəɚɛɜɝɡɣɨɪɫɬɭɯɲɹɻɾʀʁʂʃʉʊʋʌʍʎʏʐʒʔʰʲβθχᵻˈˌː\u0303\u0329"
_LATIN = _LETTERS + "0123456789" + "".join(chr(c) for c in range(0xDF, 0x180) if chr(c).islower())
_INITIALS = (*"bpmfdtnlgkhjqxrzcs", "zh", "ch", "sh")
_FINALS = (
    "a o e ê ai ei ao ou an en ang eng er i ia ie iao iou ian in iang ing io iong u ua uo uai uei uan uen uang ueng"
    " ong ü üe üan ün m n ng hm hng"
)
_TONES = "12345"
_SPELT = r"A-Za-z\u00c0-\u024f' -"  # what espeak-ng is given
_SILENT = re.compile(r"""["'()\[\]{}<>«»“”„‘’《》〈〉「」『』【】_*|~^\\/\u200b-\u200f\ufeff-]""")


@dataclasses.dataclass(frozen=True)
class FrontEnd:
    """A text -> its symbols.

    Attributes:
      name: "en-phonemes", "en-characters", "zh-pinyin" or "characters": what ``front_end`` opens again.
      symbols: all that it can give, without one for padding; pauses are the first of them.
    """

    name: str
    symbols: tuple[str, ...]
    _read: Callable[[Sequence[str]], list[list[str]]] = dataclasses.field(repr=False)

    def __call__(self, text: str) -> list[str]:
        """The symbols of a text; characters without a sound are left out, and named in the log once.

        Raises:
          UserError: nothing in it can be spoken, it is too long, or espeak-ng fails.
        """
        ((found, unknown),) = self.read_all([text])
        if unknown:
            _told(unknown, self.name)
        return found

    def read_all(self, texts: Sequence[str]) -> list[tuple[list[str], str]]:
        """The symbols of each text, and the characters that were left out of it; raises as ``__call__`` does. There is
        one start of espeak-ng for all of them."""
        if (most := max(map(len, texts), default=0)) > limit(MOST):
            raise too_much(f"a text of {most:,} characters is too long to be spoken at once; cut it into sentences")
        return [self._checked(*pair) for pair in zip(texts, self._read(texts), strict=True)]

    def _checked(self, text: str, read: list[str]) -> tuple[list[str], str]:
        """One pause at most from sound to sound, the first that is more than a space; none before the first sound."""
        symbols: list[str] = []
        for symbol in filter(set(self.symbols).__contains__, read):
            if symbol in PAUSES and (not symbols or symbols[-1] in PAUSES):
                if symbols[-1:] == [" "]:
                    symbols[-1] = symbol
            else:
                symbols.append(symbol)
        if symbols[-1:] == [" "]:
            symbols.pop()
        if not symbols:
            shown = text if len(text) <= 40 else text[:40] + "..."
            raise UserError(f"there is nothing in {shown!r} that {self.name} can speak.")
        unknown = _SILENT.sub("", "".join(s for s in read if s not in self.symbols))
        return symbols, "".join(dict.fromkeys("".join(unknown.split())))


def front_end(language: str) -> FrontEnd:
    """The front end for a language, "en", "zh" or "characters"; or the one of this ``name`` and no other.

    Raises:
      UserError: there is none, or what it needs is not installed.
    """
    name = language
    if language == "en":
        name = "en-phonemes" if shutil.which(PROGRAM) else "en-characters"
        if name == "en-characters":
            say(f"{PROGRAM} is not installed: English is read by its letters, not as phonemes (apt install {PROGRAM})")
    elif language == "zh":
        name = "zh-pinyin"
    if name == "en-phonemes":
        if not shutil.which(PROGRAM):
            raise UserError(
                f"the voice was trained on the phonemes of {PROGRAM}, which is not here: install {PROGRAM}."
            )
        return FrontEnd(name, (*PAUSES, *_IPA), _phonemes)
    if name == "en-characters":
        return FrontEnd(name, (*PAUSES, *_LETTERS, "'"), _each(lambda text: _plain(spoken.english(text)).lower()))
    if name == "zh-pinyin":
        _library("pypinyin")
        syllables = (*_INITIALS, *_FINALS.split(), *_TONES, *_LETTERS.upper())
        return FrontEnd(name, (*PAUSES, *syllables), _each(_pinyin))
    if name == "characters":
        return FrontEnd(name, (*PAUSES, *_LATIN, "'"), _each(lambda text: spoken.tidy(text).lower()))
    known = "en, zh and characters; of these alone: en-phonemes, en-characters and zh-pinyin"
    raise UserError(f"there is no text front end {language!r}; there are {known}.")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"text front ends need the package {name}: pip install 'bigbase_jax[speech]'.") from error


@functools.lru_cache(64)
def _told(unknown: str, name: str) -> None:
    say(f"{name} has no sound for {' '.join(unknown[:20])}{' ...' if unknown[20:] else ''}, which is left out")


def _each(read: Callable[[str], Iterable[str]]) -> Callable[[Sequence[str]], list[list[str]]]:
    return lambda texts: [list(read(text)) for text in texts]


def _plain(text: str) -> str:
    """Letters without accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def _phonemes(texts: Sequence[str]) -> list[list[str]]:
    """Pauses as the texts have them; the Latin letters between two of them go through espeak-ng."""
    parts = [re.split(rf"([{re.escape(PAUSES.strip())}])", spoken.english(text)) for text in texts]
    spelt = [" ".join(re.sub(f"[^{_SPELT}]", " ", part).split()) for text in parts for part in text]
    said = iter(_espeak([part for part in spelt if part.strip("' -")]))
    left = iter(spelt)
    return [
        [
            symbol
            for part in text
            for symbol in (" ", *(next(said) if next(left).strip("' -") else ""), " ", *re.sub(f"[{_SPELT}]", "", part))
        ]
        for text in parts
    ]


def _espeak(parts: list[str]) -> list[str]:
    """The phonemes of each part: one paragraph each, which is a line of the answer."""
    answer = _answer("\n\n".join(parts)) if parts else []
    if len(answer) != len(parts):  # one of them is longer than a clause may be
        answer = [" ".join(_answer(part)) for part in parts]
    return answer


def _answer(text: str) -> list[str]:
    command = [PROGRAM, "-q", "--ipa", "-v", "en-us", "--stdin"]
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{PROGRAM} did not answer: {error}.") from error
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(f"{PROGRAM} failed: {reason[0]}.")
    return done.stdout.decode(errors="replace").replace("\u200d", "").strip().splitlines()


_MARKS = str.maketrans(
    {"，": ",", "。": ".", "！": "!", "？": "?", "；": ";", "：": ":", "、": ",", "…": ".", "—": ","}
)


def _pinyin(text: str) -> list[str]:
    """Of each syllable the initial, if it has one, the final and the tone (5: none)."""
    pypinyin = _library("pypinyin")
    style = pypinyin.Style
    symbols: list[str] = []
    for part in re.findall(r"[\u3007\u3400-\u9fff\U00020000-\U0003ffff]+|.", spoken.chinese(text), re.DOTALL):
        if len(part) == 1 and not pypinyin.pinyin(part, errors="ignore"):
            symbols += " " if part.isspace() else part.translate(_MARKS).upper()
            continue
        options: dict[str, Any] = {"strict": True, "tone_sandhi": True, "neutral_tone_with_five": True, "v_to_u": True}
        part = part.replace("嗯", "恩")  # which has no vowel as pypinyin knows it
        initials = pypinyin.lazy_pinyin(part, style.INITIALS, errors=list, **options)
        finals = pypinyin.lazy_pinyin(part, style.FINALS_TONE3, errors=list, **options)
        for character, initial, final in zip(part, initials, finals, strict=True):
            split = [final[:-1], final[-1]] if final[-1:].isdigit() else []
            symbols += [*([initial] if initial and split else []), *(split or [character])]
    return symbols
