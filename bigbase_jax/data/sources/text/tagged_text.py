"""Sentences in which every word has a tag: files of columns as those of CoNLL (Tjong Kim Sang & De Meulder 2003).

A line is a word with its tag, an empty line ends a sentence. An example is a sentence, or where that is longer, a part
of one, with L = ``length``:

- ``tokens``, ``segment_ids`` and ``token_type_ids`` i32[L]: as those of ``labelled_text``;
- ``starts`` i32[L]: 1 at the first token of each word, else 0;
- ``tags`` i32[L]: the word's tag there, else -1.

Facts: ``tag_names``, and those of ``labelled_text`` but for the classes.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from bigbase_jax.core import Codec, Example, Fields, UserError
from bigbase_jax.data.cache import Store, Writer
from bigbase_jax.data.documents import Format
from bigbase_jax.data.files import LIMITS, TABLES, File, Limits, kind_of, limits_of, list_files
from bigbase_jax.data.sources.splits import digest
from bigbase_jax.data.sources.text.base import (
    ROLES,
    SPLITS,
    Opened,
    Survey,
    TextCodec,
    TextRowFiles,
    TextRows,
    Write,
    given_text,
    named,
    narrow,
    splits_of,
    tokenizer_of,
)
from bigbase_jax.data.sources.text.labelled_text import SEQUENCES
from bigbase_jax.text.tokenizer import Encoder, Subwords, Tokenizer, dataset_info_of, load

SUBWORDS = Subwords("wordpiece", 8192)
_NOT_A_WORD = re.compile(r"(-DOCSTART-|#\s)")  # what begins a document, and comments of CoNLL-U
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|\w+(?:[.'’-]\w+)*|[^\w\s]")


class Sentence(NamedTuple):
    """Words, and the tag of each."""

    words: Sequence[str]
    tags: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaggedSentences(TextRows):
    """Sentences, and how examples are made of them; see ``TextRows``. Subclasses say where they come from.

    A word of which the tokenizer makes nothing of its own is left out, which is said.

    Attributes:
      length: L.

    Raises:
      UserError: a value out of its range.
    """

    tokenizer: Any = SUBWORDS
    length: int = 128

    code: ClassVar[tuple[str, ...]] = ("data.sources.text.tagged_text",)
    least: ClassVar[Mapping[str, int]] = {"length": 4}

    def sentences(self) -> Iterator[tuple[str, Sentence]]:
        """(split, or "" where it is to be dealt, sentence) of each, from the start at each call."""
        raise NotImplementedError

    def kept_for(self) -> list[Any]:
        return [self.length]

    def begin(self) -> Write:
        """
        Raises:
          UserError: no sentences, or a line that is none of a word and its tag.
        """
        survey = self.dealt(self.sentences, lambda sentence: digest(sentence.words), "sentences")
        tags = {tag for _, sentence in self.sentences() for tag in sentence.tags}
        tokenizer: Tokenizer = survey.fit(self.tokenizer, _text, False, ROLES)
        return lambda writer: _write(survey, tokenizer, sorted(tags), self.length, writer)

    def opened(self, rows_N: Store) -> Opened:
        tokenizer, about = tokenizer_of(rows_N), rows_N.about
        info = {
            **dataset_info_of(tokenizer),
            "length": self.length,
            "pair": False,
            "tag_names": tuple(about["tag_names"]),
        }
        encode = Encoder(tokenizer, self.length)

        def example(row: int) -> Example:
            tags_T = rows_N.get("tags", row)
            found, text_L = encoded(encode, rows_N.get("tokens", row), tags_T >= 0)
            tags_L = np.full_like(found["tokens"], -1)
            tags_L[text_L] = tags_T
            return {**found, "tags": tags_L}

        splits = splits_of(rows_N, example)
        words = (
            f"{self.origin()}: {about['sentences']:,} sentences of {about['words']:,} words in {len(rows_N):,} "
            f"examples; {len(about['tag_names'])} tags"
        )
        if alone := about["words"] - about["tagged"]:
            words += f"; {alone:,} words without a token of their own left out"
        parts = [self.file_signature(), self.dealing(), self.length, about["tokenizer"]]
        return Opened(splits, info, words, parts)

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """Of a text, or a line of a file."""
        columns = [(name,) for name in ("text", "sentence", "content")]
        fields = Fields({"text": columns}, lines=True, encoding=config.get("encoding", "utf-8"))
        return TextCodec(fields, read_text, dataset_info, limits_of(config))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConllFiles(TaggedSentences, TextRowFiles):
    """Sentences in files of columns by blanks or tabs (``.conll``, ``.bio``, ``.tsv``, ``.txt``); see ``TextRowFiles``
    and ``TaggedSentences``. Lines of ``-DOCSTART-`` and comments are passed over.

    Attributes:
      word, tag: which columns, from 0, or from -1 for the last.
    """

    word: int = 0
    tag: int = -1

    def listed(self) -> list[File]:
        """
        Raises:
          UserError: there are none.
        """
        found = [file for file in list_files(self.root, self.limits) if kind_of(file.name) not in TABLES - {".tsv"}]
        if not found:
            raise UserError(f"{self.root} holds no file of words and tags; .conll, .bio, .tsv and .txt are read.")
        return found

    def sentences(self) -> Iterator[tuple[str, Sentence]]:
        form = Format(unit="paragraph", encoding=self.encoding)
        for split, files in self.files()[0].items():
            for file in files:
                plain = file._replace(name=re.sub(r"\.tsv\b", ".txt", file.name))
                for document in form.documents(plain):
                    start = int(document.name.rpartition(":")[2])
                    lines = "".join(document.blocks).split("\n")
                    found = [self._line(line, f"{file}, line {start + i}") for i, line in enumerate(lines)]
                    pairs = [pair for pair in found if pair is not None]
                    if pairs:
                        words, tags = zip(*pairs, strict=True)
                        yield split, Sentence(words, tags)

    def _line(self, line: str, where: str) -> tuple[str, str] | None:
        if _NOT_A_WORD.match(line):
            return None
        columns = line.split("\t") if "\t" in line.strip() else line.split()
        try:
            word, tag = columns[self.word].strip(), columns[self.tag].strip()
        except IndexError:
            word = tag = ""
        if len(columns) < 2 or not word or not tag:
            raise UserError(
                f"{where} is {line.strip()[:60]!r}, which has no word in column {self.word} or no tag in column "
                f"{self.tag}; give word=... and tag=... after the recipe, from 0, or -1 for the last."
            )
        return word, tag

    def file_signature(self) -> list[Any]:
        return [self.files_signature(), [self.word, self.tag, self.encoding]]

    def origin(self) -> str:
        left = self.files()[1]
        return self.root + (f" (not used: {', '.join(left)})" if left else "")


def read_text(given: Any, dataset_info: Mapping[str, Any], limits: Limits = LIMITS) -> list[Example]:
    """A text as examples without tags. Its words are what blanks and punctuation part, and single ideographs.

    Raises:
      UserError: unreadable, or without a word.
    """
    with named(given):
        words = _WORD.findall(given_text(given, dataset_info, limits=limits))
        tokenizer = load(dataset_info["tokenizer"])
        encode = Encoder(tokenizer, dataset_info["length"])
        parts = _parts([words], tokenizer, encode.room)
        return [encoded(encode, tokens_T, word_T >= 0)[0] for _, tokens_T, word_T in parts]


def encoded(encode: Encoder, tokens_T: np.ndarray, start_T: np.ndarray) -> tuple[Example, np.ndarray]:
    """(an example without tags, bool[L]: which of its places are text); ``start_T``: where words begin."""
    found, text_L = encode([tokens_T])
    example = {name: found[name] for name in SEQUENCES}
    example["starts"] = np.zeros_like(example["tokens"])
    example["starts"][text_L] = start_T
    return example, text_L


def _parts(
    sentences: Sequence[Sequence[str]], tokenizer: Tokenizer, room: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(which sentence, tokens i32[T], word i32[T]) of each part of the sentences, T at most ``room``; ``word`` is the
    number of the word whose first token it is, else -1. What is longer than ``room`` is cut before a word."""
    encoded = tokenizer.encode_batch([" ".join(words) for words in sentences])
    for n, (words, (tokens_T, bytes_T)) in enumerate(zip(sentences, encoded, strict=True)):
        size_W = np.array([len(word.encode()) for word in words])
        first_W = np.cumsum(size_W + 1) - size_W - 1  # the byte at which each word begins
        token_W = np.searchsorted(np.cumsum(bytes_T), first_W, side="right")
        word_T = np.full(len(tokens_T) + 1, -1, np.int32)
        word_T[token_W[::-1]] = np.arange(len(words))[::-1]  # of words that share a token, the first
        begin = 0
        while begin < len(tokens_T):
            stop = min(begin + room, len(tokens_T))
            cuts = begin + 1 + np.flatnonzero(word_T[begin + 1 : stop + 1] >= 0)
            if stop < len(tokens_T) and len(cuts):
                stop = int(cuts[-1])
            yield n, tokens_T[begin:stop], word_T[begin:stop]
            begin = stop


def _text(sentence: Sentence) -> list[str]:
    return [" ".join(sentence.words)]


def _write(
    survey: Survey[Sentence], tokenizer: Tokenizer, names: Sequence[str], length: int, writer: Writer
) -> Mapping[str, Any]:
    """Adds the parts of all sentences."""
    number = {name: i for i, name in enumerate(names)}
    room = Encoder(tokenizer, length).room
    counts = Counter[str]()
    for some in survey.batches(_text):
        tags = [np.array([number[tag] for tag in sentence.tags]) for _, sentence in some]
        counts += Counter(sentences=len(some), words=sum(map(len, tags)))
        for n, tokens_T, word_T in _parts([sentence.words for _, sentence in some], tokenizer, room):
            tags_T = np.where(word_T >= 0, tags[n][word_T], -1).astype(np.int32)
            split = np.uint8(SPLITS.index(some[n][0]))
            writer.add({"tokens": narrow(tokens_T, tokenizer), "tags": tags_T, "split": split})
            counts["tagged"] += int((word_T >= 0).sum())
    return {"tokenizer": tokenizer.state(), "tag_names": list(names), **counts}
