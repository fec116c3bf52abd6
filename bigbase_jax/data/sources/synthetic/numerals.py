"""Numbers and their names in English: parallel text that is made up here, for translation without a file or a network.

Examples and facts are those of ``parallel_text``. Numbers are drawn with every count of digits equally often, so that
short ones are no rarity, and each is in one split only.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from bigbase_jax.core import Example, Source, UserError
from bigbase_jax.data.sources.splits import digest
from bigbase_jax.data.sources.text.parallel_text import (
    ROLES,
    SEQUENCES,
    Encoder,
    ParallelText,
    pair_dataset_info,
    read_lines,
)
from bigbase_jax.text.tokenizer import Characters, Tokenizer, encode, sides

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
class Numerals:
    """Numbers from 0 to ``largest`` as source, their names as target; ``prepare`` makes them.

    Attributes:
      tokenizer: fitted to digits and words.
      source_length, target_length: S and T, special tokens included; numbers whose names are longer are left out.
      largest: the largest number.
      count: of numbers, over all splits; at most half of all that there are. A twentieth each is val and test.
      seed: of the drawing.

    Raises:
      UserError: a value out of its range.
    """

    tokenizer: Any = CHARACTERS
    source_length: int = 80
    target_length: int = 80
    largest: int = 999_999
    count: int = 12_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 39 <= self.largest <= 999_999_999:
            raise UserError(f"largest is {self.largest}; it lies between 39 and 999,999,999.")
        if self.count < 20:
            raise UserError(f"count is {self.count}; it must be at least 20.")
        if min(self.source_length, self.target_length) < 2:
            raise UserError(f"lengths are {self.source_length} and {self.target_length}; both must be at least 2.")

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> NamedNumbers:
        """See ``core.RawDataset``; nothing is kept in the cache.

        Raises:
          UserError: no name is short enough.
        """
        return NamedNumbers(self)

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

    fields, read = staticmethod(ParallelText.fields), staticmethod(read_lines)


class NamedNumbers:
    """A ``Dataset`` of numbers and names."""

    def __init__(self, data: Numerals):
        self._data = data
        drawn = data.draw()

        def texts(*splits: str) -> Callable[[], Iterator[str]]:
            return lambda: (text for s in splits for n in drawn[s] for text in (str(n), in_words(n)))

        both = sides(data.tokenizer.fit(texts("train"), texts("val", "test"), True, ROLES))
        self.dataset_info: Mapping[str, Any] = {
            **pair_dataset_info(*both, data.source_length, data.target_length),
            "shared": True,
            "source_language": "digits",
            "target_language": "en",
        }
        encoder = Encoder(self.dataset_info)
        width = max(len(in_words(n)) for numbers in drawn.values() for n in numbers)
        sources = {s: _Numbers(s, numbers, width, both, encoder, data) for s, numbers in drawn.items()}
        if not all(map(len, sources.values())):
            raise UserError(f"no name fits target_length={data.target_length}; raise it, or take a tokenizer of words.")
        self.splits: Mapping[str, Source] = sources
        self.description = (
            f"made up here: numbers from 0 to {data.largest:,} in digits and in English words; seed {data.seed}"
        )

    def fingerprint(self) -> str:
        """A digest of all that the pairs depend on."""
        data = self._data
        return digest(
            [data.largest, data.count, data.seed, data.source_length, data.target_length, *self.dataset_info.items()]
        )

    def read(self, given: str | Mapping[str, Any]) -> list[Example]:
        """See ``parallel_text.read_lines``."""
        return read_lines(given, self.dataset_info)


class _Numbers:
    """The ``Source`` of one split."""

    in_memory = "made anew each time"
    sequences = SEQUENCES

    def __init__(
        self,
        split: str,
        numbers: list[int],
        width: int,
        both: tuple[Tokenizer, Tokenizer],
        encoder: Encoder,
        data: Numerals,
    ):
        self._split, self._width, self._encoder = split, width, encoder
        self._rows: list[tuple[np.ndarray, np.ndarray, str]] = []
        for n in numbers:
            name = in_words(n)
            source_S, target_T = encode(both[0], str(n)), encode(both[1], name)
            if len(source_S) < data.source_length and len(target_T) < data.target_length:
                self._rows.append((source_S, target_T, name))
        self.lengths = np.array([max(len(source_S), len(target_T)) + 1 for source_S, target_T, _ in self._rows])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self._split} has {len(self)} numbers; there is no {index}")
        source_S, target_T, name = self._rows[index]
        reference = np.zeros(self._width, np.uint8)
        reference[: len(name)] = np.frombuffer(name.encode(), np.uint8)
        return {**self._encoder(source_S, target_T), "reference": reference}

    def name(self, index: int) -> str:
        """Such as ``val[17]``."""
        return f"{self._split}[{index}]"
