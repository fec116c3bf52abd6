"""Sentences with names of people, places and organisations, made up here, to learn to find such names without a file.

Examples and facts are those of ``tagged_text``. Many a name may be of any kind (Jordan, Lincoln, Chase), so that what
stands around it has to be read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from bigbase_jax.data.sources.text.tagged_text import Sentence, TaggedSentences

_ANY = ["Jordan", "Lincoln", "Chase", "Carter", "Florence", "Victoria", "Austin", "Houston", "Madison", "Hudson"]
_FIRST = {
    "PER": ["Maria", "Chen", "Ahmed", "Olga", "Kenji", "Amara", "Lucas", "Priya", "Ingrid", "Mateo", *_ANY],
    "LOC": ["New", "East", "North", "Port", "Saint", "Lake"],
    "ORG": ["Apex", "Boreal", "Cobalt", "Delta", "Everest", "Fulcrum", "Granite", "Helix", "Ionic", *_ANY],
}
_LAST = {
    "PER": ["Okafor", "Silva", "Novak", "Tanaka", "Weber", "Rossi", "Haddad", "Larsen", "Kowalski", *_ANY],
    "LOC": ["Aldford", "Brunnen", "Castova", "Dunmere", "Elmira", "Farholt", "Grenna", "Halden", "Ivora", *_ANY],
    "ORG": ["Bank", "Motors", "Airlines", "Institute", "Group", "Press", "United", "Systems"],
}
_SENTENCES = [
    "{PER} moved from {LOC} to {LOC} last year .",
    "{ORG} has hired {PER} as its new director .",
    "The talks in {LOC} between {ORG} and {ORG} failed .",
    "{PER} , who was born in {LOC} , will leave {ORG} in May .",
    "Shares of {ORG} fell by 3 % after {PER} resigned .",
    '" We like {LOC} , " said {PER} of {ORG} .',
    "{PER} beat {PER} 6-3 , 6-4 in the final in {LOC} .",
    "It rained in {LOC} on Monday .",
    "{ORG} opens an office in {LOC} .",
    "Nobody has seen {PER} since the fire .",
    "The report did not name any of them .",
    "{LOC} is larger than {LOC} , writes {PER} .",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeUpNames(TaggedSentences):
    """Sentences with names, tagged B-PER, I-PER, B-LOC, ..., O; ``prepare`` makes them.

    Attributes:
      count: of sentences, over all splits.

    Raises:
      UserError: too few sentences.
    """

    count: int = 1000

    least: ClassVar[Mapping[str, int]] = {**TaggedSentences.least, "count": 20}

    def file_signature(self) -> list[Any]:
        return ["made-up names", self.count, self.seed]

    def origin(self) -> str:
        return f"sentences about nobody, made up here (seed {self.seed})"

    def sentences(self) -> Iterator[tuple[str, Sentence]]:
        random = np.random.default_rng(self.seed)
        for _ in range(self.count):
            words: list[str] = []
            tags: list[str] = []
            for word in str(random.choice(_SENTENCES)).split():
                kind = word.strip("{}")
                name = _name(kind, random) if kind in _FIRST else [word]
                words += name
                tags += [f"{'I' if j else 'B'}-{kind}" if kind in _FIRST else "O" for j in range(len(name))]
            yield "", Sentence(words, tags)


def _name(kind: str, random: np.random.Generator) -> list[str]:
    """One word or two."""
    name = [str(random.choice(_FIRST[kind])), str(random.choice(_LAST[kind]))]
    return name if random.random() < 0.6 else name[:1] if kind == "ORG" else name[1:]
