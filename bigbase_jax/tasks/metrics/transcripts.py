"""How far transcripts are from references: word and character error rates, by jiwer.

Legend: N utterances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.core import Metric, UserError
from bigbase_jax.text.normalise import normalise, words

METRICS: Mapping[str, Metric] = {
    "wer": Metric("min", "%", "Word error rate"),
    "cer": Metric("min", "%", "Character error rate"),
    "insertions": Metric("min", "%"),
    "deletions": Metric("min", "%"),
    "substitutions": Metric("min", "%"),
}
"""What ``scores`` gives."""


def references(examples: Mapping[str, np.ndarray]) -> list[str]:
    """The texts of ``reference`` u8[N,R], UTF-8 and zeros."""
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in examples["reference"].astype(np.uint8)]


def errors(texts: Sequence[str], references: Sequence[str], kind: str = "words") -> dict[str, np.ndarray]:
    """``insertions``, ``deletions``, ``substitutions``, ``words`` (of the reference), ``character_errors`` and
    ``characters`` of each utterance, i64[N]; both sides are normalised (``text.normalise``), and spaces are characters.

    Raises:
      UserError: jiwer is not installed.
    """
    try:
        import jiwer
    except ImportError as error:
        raise UserError("word error rates need the package jiwer: pip install 'bigbase_jax[speech]'.") from error
    found = np.zeros((6, len(references)), np.int64)
    for n, (said, true) in enumerate(zip(texts, references, strict=True)):
        said, true = normalise(said, kind), normalise(true, kind)
        by_word = jiwer.process_words(" ".join(words(true, kind)), " ".join(words(said, kind)))
        by_character = jiwer.process_characters(true, said)
        wrong = by_character.insertions + by_character.deletions + by_character.substitutions
        counts = by_word.insertions, by_word.deletions, by_word.substitutions, len(words(true, kind))
        found[:, n] = *counts, wrong, len(true)
    names = ("insertions", "deletions", "substitutions", "words", "character_errors", "characters")
    return dict(zip(names, found, strict=True))


def scores(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """``wer`` and ``cer``, of all words and characters together, and ``insertions``, ``deletions`` and
    ``substitutions`` as shares of the words; of what ``errors`` gives."""
    total = {name: int(x.sum()) for name, x in found.items()}
    kinds = ("insertions", "deletions", "substitutions")
    by = max(total["words"], 1)
    return {
        "wer": sum(total[name] for name in kinds) / by,
        "cer": total["character_errors"] / max(total["characters"], 1),
        **{name: total[name] / by for name in kinds},
    }
