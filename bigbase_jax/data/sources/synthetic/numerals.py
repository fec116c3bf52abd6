"""Numbers and their names in English: parallel text that is made up here, for translation without a file or a network.

Examples and facts are those of ``parallel_text``. Numbers are drawn with every count of digits equally often, so that
short ones are no rarity, and each is in one split only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.data.cache import Store
from bigbase_jax.data.sources.text.base import Opened
from bigbase_jax.data.sources.text.parallel_text import Pair, ParallelTexts
from bigbase_jax.text.tokenizer import Characters

CHARACTERS = Characters()
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(n: int) -> str:
    """The name of a number below 10^9, as it is said in Britain: 105 is "one hundred and five"."""
    if n < 20:
        return _SMALL[n]
    if n < 100:
        return _TENS[n // 10 - 2] + (f"-{_SMALL[n % 10]}" if n % 10 else "")
    for unit, name in ((1_000_000, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= unit:
            rest = n % unit
            joint = " and " if rest < 100 else " "
            return f"{in_words(n // unit)} {name}" + (joint + in_words(rest) if rest else "")
    raise AssertionError(n)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numerals(ParallelTexts):
    """Numbers from 0 to ``largest`` as source, their names as target; see ``ParallelTexts``.

    Attributes:
      tokenizer: fitted to digits and words.
      largest: the largest number.
      count: of numbers, over all splits; at most half of all that there are. A twentieth each is val and test.

    Raises:
      UserError: a value out of its range.
    """

    tokenizer: Any = CHARACTERS
    source_length: int = 80
    target_length: int = 80
    largest: int = 999_999
    count: int = 12_000

    code = (*ParallelTexts.code, "data.sources.synthetic.numerals")
    least: ClassVar[Mapping[str, int]] = {**ParallelTexts.least, "count": 20}
    cuts = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 39 <= self.largest <= 999_999_999:
            raise UserError(f"largest is {self.largest}; it lies between 39 and 999,999,999.")

    def draw(self) -> dict[str, list[int]]:
        """The numbers of each split."""
        random = np.random.default_rng(self.seed)
        wanted, found = min(self.count, (self.largest + 1) // 2), dict[int, None]()
        digits = len(str(self.largest))
        while len(found) < wanted:
            most = 10 ** int(random.integers(1, digits + 1))
            n = int(random.integers(0, min(most, self.largest + 1)))
            found.setdefault(n)
        numbers, part = list(found), max(wanted // 20, 1)
        numbers = [numbers[i] for i in random.permutation(wanted)]
        return {"train": numbers[2 * part :], "val": numbers[:part], "test": numbers[part : 2 * part]}

    def pairs(self) -> Iterator[tuple[str, Pair]]:
        for split, numbers in self.draw().items():
            for n in numbers:
                yield split, Pair(str(n), in_words(n))

    def languages(self) -> dict[str, Any]:
        return {"source_language": "digits", "target_language": "en"}

    def origin(self) -> str:
        return f"made up here: numbers from 0 to {self.largest:,} in digits and in English words; seed {self.seed}"

    def file_signature(self) -> list[Any]:
        return [self.largest, self.count]

    def opened(self, rows_N: Store) -> Opened:
        found = super().opened(rows_N)
        found.description = self.origin()
        return found

    def identity(self, dataset_info: Mapping[str, Any]) -> list[Any]:
        own = [self.largest, self.count, self.seed, self.source_length, self.target_length]
        return [*own, *dataset_info.items()]
