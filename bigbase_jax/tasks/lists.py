"""Ranked lists as answers: what recommenders say, however they have found it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.core import Example


def answer(
    output: Mapping[str, np.ndarray],
    example: Example,
    top: int,
    names: Sequence[str] | None,
    titles: Sequence[str] | None,
) -> dict[str, Any]:
    """What a recommender says of one input: ``items``, the best ones, best first, that the history does not have, as
    many as the row or else ``top`` asks for, each with its name (``item``), its ``title`` where it has one, and its
    ``score``; ``history``, what of the given one the model has read; and ``unknown``, what it does not know.

    Args:
      output: ``items`` [K], from 1 (else: none), and their ``scores`` f32[K], the best first.
      example: ``history`` i32[L], with 0 for padding; ``top`` and ``unknown`` where the row has them.
      names, titles: of item 1, 2, ...; without names, they are numbers.
    """

    def about(item: int) -> dict[str, str]:
        title = titles[item - 1] if titles else ""
        name = names[item - 1] if names else str(item)
        return {"item": name, "title": title} if title else {"item": name}

    ranked = zip(output["items"].tolist(), output["scores"].tolist(), strict=True)
    history = [item for item in np.asarray(example["history"]).tolist() if item]
    seen = set(history)
    best = [{**about(item), "score": score} for item, score in ranked if item > 0 and item not in seen]
    found = {"items": best[: example.get("top", top)], "history": [about(item) for item in history]}
    return {**found, "unknown": example["unknown"]} if example.get("unknown") else found
