"""From what a CTC model says in each frame to tokens: the best path, prefix beam search, and the times of tokens.

Legend: S frames, U tokens, V tokens and the blank, K candidates of a frame.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

_NEVER = -1e30


class Scorer(Protocol):
    """A language model as the search asks it (shallow fusion): weighted scores of tokens, each after those before."""

    def start(self) -> Any:
        """Before the first token."""
        ...

    def after(self, state: Any, token: int) -> tuple[float, Any]:
        """What is added to the score of a prefix with one more token, and where that leads."""
        ...

    def end(self, state: Any) -> float:
        """What is added to the score of a prefix where nothing follows it."""
        ...


class Token(NamedTuple):
    """A token and the frames in which it is said: ``start`` to ``stop``, which is not among them."""

    token: int
    start: int
    stop: int


def best_path(path_S: np.ndarray, blank: int) -> list[Token]:
    """The tokens of the likeliest label of each frame, repeats joined and blanks left out; -1 is no frame."""
    found: list[Token] = []
    before = blank
    for s, token in enumerate(path_S.tolist()):
        if token == before and token != blank and token >= 0:
            found[-1] = found[-1]._replace(stop=s + 1)
        elif token != blank and token >= 0:
            found.append(Token(token, s, s + 1))
        before = token
    return found


def beam_search(
    tokens_SK: np.ndarray,
    log_p_SK: np.ndarray,
    blank: int,
    beams: int,
    scorer: Scorer | None = None,
    least: float = -12.0,
) -> list[tuple[tuple[int, ...], float]]:
    """Prefix beam search (Hannun et al. 2014): of each prefix, the probability of all paths that give it.

    Args:
      tokens_SK, log_p_SK: candidates of each frame and their log-probabilities; -1 is none, and no frame where it is
        first.
      beams: prefixes that are kept.
      scorer: a language model.
      least: candidates of less log-probability are not tried.

    Returns:
      (prefix, score) of what is left, the best first; a score is of CTC and of the scorer together.
    """
    start = scorer.start() if scorer else None
    # prefix -> [log p of paths that end in a blank, and in its last token]; fused: prefix -> (score, scorer's state)
    kept: dict[tuple[int, ...], list[float]] = {(): [0.0, -math.inf]}
    fused: dict[tuple[int, ...], tuple[float, Any]] = {(): (0.0, start)}
    for tokens_K, log_p_K in zip(tokens_SK.tolist(), log_p_SK.tolist(), strict=True):
        candidates = [(t, p) for t, p in zip(tokens_K, log_p_K, strict=True) if t >= 0]
        if not candidates:
            continue
        best = max(p for _, p in candidates)
        candidates = [(t, p) for t, p in candidates if p >= min(least, best)]
        found: dict[tuple[int, ...], list[float]] = {}
        for prefix, (ends_blank, ends_token) in kept.items():
            either = _add(ends_blank, ends_token)
            last = prefix[-1] if prefix else -1
            for token, log_p in candidates:
                if token == blank:
                    entry = found.setdefault(prefix, [-math.inf, -math.inf])
                    entry[0] = _add(entry[0], either + log_p)
                    continue
                if token == last:
                    entry = found.setdefault(prefix, [-math.inf, -math.inf])
                    entry[1] = _add(entry[1], ends_token + log_p)
                before = ends_blank if token == last else either
                if before == -math.inf:  # a blank is between two of a kind
                    continue
                longer = (*prefix, token)
                entry = found.setdefault(longer, [-math.inf, -math.inf])
                entry[1] = _add(entry[1], before + log_p)
                if scorer and longer not in fused:
                    score, state = fused[prefix]
                    more, state = scorer.after(state, token)
                    fused[longer] = score + more, state
        scored = [
            (_add(*entry) + (fused[prefix][0] if scorer else 0.0), prefix, entry) for prefix, entry in found.items()
        ]
        scored.sort(key=lambda item: (-item[0], item[1]))
        kept = {prefix: entry for _, prefix, entry in scored[:beams]}
        fused = {prefix: fused[prefix] for prefix in kept} if scorer else fused
    ended = [
        (prefix, _add(*entry) + (fused[prefix][0] + scorer.end(fused[prefix][1]) if scorer else 0.0))
        for prefix, entry in kept.items()
    ]
    return sorted(ended, key=lambda item: (-item[1], item[0]))


def _add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))


def align(tokens_SK: np.ndarray, log_p_SK: np.ndarray, tokens: Sequence[int], blank: int) -> list[Token]:
    """When each of the given tokens is said: on the likeliest path that gives them (Viterbi). What is no candidate of a
    frame counts as ever so unlikely; with fewer frames than tokens there are no times, and none is given."""
    frames = int(np.sum(tokens_SK[:, 0] >= 0))
    if not tokens or frames < len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens)):
        return []
    labels = np.full(2 * len(tokens) + 1, blank)
    labels[1::2] = tokens
    size = len(labels)
    skips = np.zeros(size, bool)
    skips[2:] = (labels[2:] != blank) & (labels[2:] != labels[:-2])
    score = np.full(size, _NEVER)
    back = np.zeros((frames, size), np.int8)
    for s in range(frames):
        known = dict(zip(tokens_SK[s].tolist(), log_p_SK[s].tolist(), strict=True))
        floor = min(log_p_SK[s].min(), -12.0) - 5.0
        of_label = np.array([known.get(label, floor) for label in labels.tolist()])
        if s == 0:
            score[:2] = of_label[:2]
            continue
        ways = np.full((3, size), _NEVER)
        ways[0], ways[1, 1:] = score, score[:-1]
        ways[2, 2:] = np.where(skips[2:], score[:-2], _NEVER)
        back[s] = ways.argmax(0)
        score = ways.max(0) + of_label
    at = size - 1 if score[-1] >= score[-2] else size - 2
    spans: dict[int, Token] = {}
    for s in range(frames - 1, -1, -1):
        if at % 2:
            u = at // 2
            spans[u] = Token(tokens[u], s, spans[u].stop if u in spans else s + 1)
        at -= int(back[s, at])
    return [spans[u] for u in range(len(tokens))]
