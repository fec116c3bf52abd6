"""Spans that tags of words mark (B-PER, I-PER, O, ...), and how well they are found.

They are those of ``conlleval``, the script of the shared task, and of ``seqeval``: a tag begins a span where it says so
(B, S, U), or where the one before it ends or is of another type, so that IOB1, IOB2, BIOES and BILOU are read alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Span(NamedTuple):
    """``type``, and the words from ``start`` to before ``stop``."""

    type: str
    start: int
    stop: int


def spans(tags: Sequence[str]) -> list[Span]:
    """The spans of a sentence; a tag without "-" is one of its own kind, but for O."""
    found: list[Span] = []
    kind, start, last = "", 0, "O"
    for i, tag in enumerate([*tags, "O"]):
        mark, _, type_ = tag.partition("-")
        type_ = type_ or ("" if mark == "O" else "_")
        goes_on = last in ("B", "I", "M") and mark in ("I", "M", "E", "L") and type_ == kind
        if kind and not goes_on:
            found.append(Span(kind, start, i))
        if not goes_on:
            start = i
        kind, last = (type_, mark) if mark != "O" else ("", "O")
    return found


def counts(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> dict[str, int]:
    """How many spans of each type there are, are said to be, and are right: ``{"true PER": 3, "said PER": ...}``.

    Args:
      pairs: (true tags, predicted tags) of each sentence.
    """
    found = Counter[str]()
    for truth, guess in pairs:
        wanted, said = set(spans(truth)), set(spans(guess))
        for what, group in (("true", wanted), ("said", said), ("right", wanted & said)):
            found.update(f"{what} {span.type}" for span in group)
    return dict(found)


def scores(found: Mapping[str, Any]) -> dict[str, Any]:
    """``overall_precision``, ``overall_recall`` and ``overall_f1`` of spans over all sentences (micro averages), and
    those of each type under ``per_class``.

    Args:
      found: sums of ``counts``.
    """
    of: dict[str, Counter[str]] = {"true": Counter(), "said": Counter(), "right": Counter()}
    for name, number in found.items():
        what, _, kind = name.partition(" ")
        of[what][kind] = int(number)
    each = {kind: _scores(*(of[what][kind] for what in of)) for kind in sorted(of["true"] | of["said"])}
    whole = _scores(*(of[what].total() for what in of))
    return {**{f"overall_{name}": whole[name] for name in ("precision", "recall", "f1")}, "per_class": each}


def _scores(true: int, guessed: int, right: int) -> dict[str, Any]:
    f1 = 2 * right / (true + guessed) if true + guessed else 0.0
    return {
        "precision": right / guessed if guessed else 0.0,
        "recall": right / true if true else 0.0,
        "f1": f1,
        "support": true,
    }
