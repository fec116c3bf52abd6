"""Questions with one right answer each: conversations that are made up here, to learn to answer without any file.

Examples and facts are those of ``chat``. Each question is in one split only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from bigbase_jax.data.sources.text.chat import Conversations, Spoken
from bigbase_jax.text.chat_template import Message
from bigbase_jax.text.tokenizer import Characters

CHARACTERS = Characters()
_WORDS = [
    "apple",
    "bread",
    "candle",
    "desert",
    "engine",
    "forest",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kitchen",
    "ladder",
    "market",
    "needle",
    "orange",
    "pencil",
    "quiver",
    "ribbon",
    "silver",
    "tunnel",
    "unicorn",
    "violin",
    "winter",
    "yellow",
    "zebra",
    "anchor",
    "bottle",
    "circus",
    "dragon",
    "eagle",
]


def _sum(random: np.random.Generator) -> tuple[str, str]:
    a, b = random.integers(0, 50, 2).tolist()
    return f"What is {a} + {b}?", str(a + b)


def _larger(random: np.random.Generator) -> tuple[str, str]:
    a, b = random.choice(1000, 2, replace=False).tolist()
    return f"Which is larger, {a} or {b}?", str(max(a, b))


def _letter(random: np.random.Generator) -> tuple[str, str]:
    word = "".join(random.choice(_WORDS, 2).tolist())
    return f"How does {word} end?", f"With the letter {word[-1]}."


def _reversed(random: np.random.Generator) -> tuple[str, str]:
    letters = "".join(random.choice(list("abcdefgh"), 4).tolist())
    return f"Write {letters} backwards.", letters[::-1]


_KINDS: tuple[Callable[[np.random.Generator], tuple[str, str]], ...] = (_sum, _larger, _letter, _reversed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions(Conversations):
    """Sums, comparisons, last letters and reversed letters, asked and answered; ``prepare`` makes them.

    Attributes:
      count: of questions, over all splits; repeated ones count once.

    Raises:
      UserError: too few questions.
    """

    tokenizer: Any = CHARACTERS
    val_fraction: float = 0.1
    count: int = 8000

    least: ClassVar[Mapping[str, int]] = {**Conversations.least, "count": 20}

    def file_signature(self) -> list[Any]:
        return ["questions", self.count, self.seed]

    def origin(self) -> str:
        return f"questions that nobody asked, made up here (seed {self.seed})"

    def conversations(self) -> Iterator[tuple[str, Spoken]]:
        random = np.random.default_rng(self.seed)
        seen: set[str] = set()
        for i in range(self.count):
            question, answer = _KINDS[i % len(_KINDS)](random)
            if question not in seen:
                seen.add(question)
                said: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                yield "", Spoken(said, f"question {i}")
