"""How well tokens are predicted, by ``log_probability`` f32[N,L] and ``target`` i[N,L], -1 where there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bigbase_jax.evaluate import Totals


def meter(count: str | None = None) -> Totals:
    """A meter of the exponential of the mean loss; and of how many targets there are, under the name ``count``."""

    def summed(examples: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        nats = -examples["log_probability"].sum(dtype=np.float64)
        return {"nats": nats, "count": (examples["target"] != -1).sum()}

    def measured(sums: Mapping[str, Any]) -> Mapping[str, Any]:
        found = {"perplexity": exp(float(sums["nats"] / max(sums["count"], 1)))}
        return {**found, count: int(sums["count"])} if count else found

    return Totals(summed, measured)


def exact_match() -> Totals:
    """A meter of ``answers``, the number of runs of targets, and ``exact_match``, the share of them of which every
    token is the likeliest after the ones before it (``likeliest`` bool[N,L])."""

    def counted(examples: Mapping[str, np.ndarray]) -> Mapping[str, int]:
        real_NL = examples["target"] != -1
        before_NL = np.pad(real_NL[:, :-1], ((0, 0), (1, 0)))
        run_NL = np.cumsum(real_NL & ~before_NL).reshape(real_NL.shape) - 1
        wrong = np.unique(run_NL[real_NL & ~examples["likeliest"].astype(bool)])
        return {"answers": int(run_NL.max(initial=-1)) + 1, "wrong": len(wrong)}

    def measured(sums: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"exact_match": 1 - sums["wrong"] / max(sums["answers"], 1), "answers": int(sums["answers"])}

    return Totals(counted, measured)


def exp(x: float) -> float:
    """Infinite where it would be too large."""
    return math.exp(x) if x < 700 else math.inf
