"""Hides tokens that a model is to guess, anew for every use of an example.

Legend: L length, M the most tokens that are hidden, W words.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from bigbase_jax.core import Example, UserError

NONE = -1
"""In ``at``: no further token is hidden; in ``targets``: what was there is not known."""


@dataclasses.dataclass(frozen=True)
class MaskTokens:
    """Hides some of the tokens (Devlin et al. 2019, section 3.1), whole words at a time.

    Reads ``tokens`` and ``words`` i32[L] (the number of the word that each token belongs to; 0: never hidden) and the
    numbers ``mask_id`` and ``vocab_size``. Gives ``tokens`` with some replaced, and i32[M] each, in order and filled up
    with -1: ``at``, which were hidden, and ``targets``, what they were. Where the tokens have masks already, those are
    what is to be guessed.

    Attributes:
      rate: share of the tokens that are hidden; of every example at least one word, if one has no more than M tokens.
      whole_words: hide all tokens of a word, or none.
      replaced: share of the hidden tokens that become any token of the vocabulary.
      kept: share of them that stay as they are; the others become the mask.
      max_masked: M; None: the rate of the length.

    Raises:
      UserError: a value out of its range.
    """

    rate: float = 0.15
    whole_words: bool = True
    replaced: float = 0.1
    kept: float = 0.1
    max_masked: int | None = None

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise UserError(f"MaskTokens' rate is {self.rate}; it lies between 0 and 1, for example 0.15.")
        if min(self.replaced, self.kept) < 0 or self.replaced + self.kept > 1:
            raise UserError(f"replaced {self.replaced} and kept {self.kept} are shares; their sum is at most 1.")
        if self.max_masked is not None and self.max_masked < 1:
            raise UserError(f"max_masked is {self.max_masked}; it must be at least 1.")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """The example with tokens hidden; raises UserError where an entry is missing, or there are too many masks."""
        missing = [name for name in ("tokens", "words", "mask_id", "vocab_size") if name not in example]
        if missing:
            raise UserError(f"MaskTokens needs {', '.join(missing)}; the example has: {', '.join(example)}.")
        rest = {k: v for k, v in example.items() if k not in ("words", "mask_id", "vocab_size")}
        tokens_L, words_L, mask_id = np.array(example["tokens"]), example["words"], int(example["mask_id"])
        M = self.max_masked or math.ceil(self.rate * len(tokens_L))
        at, targets = np.full(M, NONE, np.int32), np.full(M, NONE, np.int32)
        asked = np.flatnonzero((tokens_L == mask_id) & (words_L > 0))
        if len(asked):
            if len(asked) > M:
                raise UserError(f"the text has {len(asked)} masks, and the model guesses {M} at a time.")
            at[: len(asked)] = asked
            return {**rest, "tokens": tokens_L, "at": at, "targets": targets}
        hidden = self._choose(words_L, M, rng)
        n = len(hidden)
        at[:n], targets[:n] = hidden, tokens_L[hidden]
        share_n, any_n = rng.random(n), rng.integers(0, int(example["vocab_size"]), n)
        masked_n = np.where(share_n < self.replaced, any_n, mask_id)
        tokens_L[hidden] = np.where(share_n < 1 - self.kept, masked_n, tokens_L[hidden])
        return {**rest, "tokens": tokens_L, "at": at, "targets": targets}

    def _choose(self, words_L: np.ndarray, M: int, rng: np.random.Generator) -> np.ndarray:
        """Which tokens are hidden, ascending."""
        places = np.flatnonzero(words_L)
        goal = min(max(round(self.rate * len(places)), 1), M)
        if not self.whole_words:
            return np.sort(rng.permutation(places)[:goal])
        _, first_W, size_W = np.unique(words_L[places], return_index=True, return_counts=True)
        chosen: list[np.ndarray] = []
        count = 0
        for w in rng.permutation(len(size_W)).tolist():
            size = int(size_W[w])
            if count + size <= goal or (not count and size <= M):
                chosen.append(places[first_W[w] : first_W[w] + size])
                count += size
            if count >= goal:
                break
        return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
