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
import functools
import itertools
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbase_jax.core import Example, Fields, Source, UserError
from bigbase_jax.data import cache as caches
from bigbase_jax.data import ragged
from bigbase_jax.data.documents import Format
from bigbase_jax.data.files import LIMITS, TABLES, File, Limits, by_split, kind_of, list_files, unused
from bigbase_jax.data.ragged import Ragged
from bigbase_jax.data.sources.splits import digest, stratified, to_split_off
from bigbase_jax.data.sources.text.labelled_text import ROLES, Encoder
from bigbase_jax.data.sources.text.text import given_text, key_of, named
from bigbase_jax.text.tokenizer import FIRST, Subwords, Tokenizer, dataset_info_of, load

SUBWORDS = Subwords("wordpiece", 8192)
_CODE = (
    "data.files",
    "data.rows",
    "data.documents",
    "data.ragged",
    "text.tokenizer",
    "data.sources.splits",
    "data.sources.text.tagged_text",
)
_SPLITS = ("train", "val", "test")
_NOT_A_WORD = re.compile(r"(-DOCSTART-|#\s)")  # what begins a document, and comments of CoNLL-U
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|\w+(?:[.'’-]\w+)*|[^\w\s]")
_BATCH = 4096  # sentences that are encoded at once


class Sentence(NamedTuple):
    """Words, and the tag of each."""

    words: Sequence[str]
    tags: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaggedSentences:
    """Sentences, and how examples are made of them; ``prepare`` reads them. Subclasses say where they come from.

    Sentences without a split are dealt, equal ones to the same one. A word of which the tokenizer makes nothing of its
    own is left out, which is said.

    Attributes:
      tokenizer: fitted to the training sentences, or read (``TokenizerFile``).
      length: L.
      val_fraction, test_fraction: shares of the sentences.
      seed: of the dealing.

    Raises:
      UserError: a value out of its range.
    """

    tokenizer: Any = SUBWORDS
    length: int = 128
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 4:
            raise UserError(f"length is {self.length}; it must be at least 4.")

    # -- what subclasses say ---------------------------------------------------------------------------------------

    def sentences(self) -> Iterator[tuple[str, Sentence]]:
        """(split, or "" where it is to be dealt, sentence) of each, from the start at each call."""
        raise NotImplementedError

    def file_signature(self) -> list[Any]:
        """What changes when the sentences change, and all that says how to read them."""
        raise NotImplementedError

    def origin(self) -> str:
        """Where they come from, in words."""
        raise NotImplementedError

    # -- reading ---------------------------------------------------------------------------------------------------

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Tagged:
        """Reads and tokenises the sentences, unless that is in the cache; see ``core.RawDataset``.

        Raises:
          UserError: no sentences, or a line that is none of a word and its tag.
        """
        key = key_of(_CODE, [self.tokenizer], [self.file_signature(), self.dealing(), self.length])
        found = ragged.find(cache, key) if limit_bytes > 0 else None
        if found is None:
            say(f"data: reading {self.origin()} once, to tokenise it")
            split_N = _deal(self)
            texts = functools.partial(_texts, self, split_N)
            tokenizer = self.tokenizer.fit(
                functools.partial(texts, ("train",)), functools.partial(texts, ("val", "test")), False, ROLES
            )
            dtypes = {"tokens": np.min_scalar_type(tokenizer.size - 1), "tags": "<i4", "split": "u1"}
            where = (cache, key) if limit_bytes > 0 else None
            write = functools.partial(_write, self, split_N, tokenizer)
            found = ragged.make(write, dtypes, where, limit_bytes, say)
            if where is not None:
                caches.prune(cache, limit_bytes, [cache / f"cache-{key}"])
        return Tagged(self, found)

    def dealing(self) -> list[Any]:
        """What the splits depend on."""
        return [self.val_fraction, self.test_fraction, self.seed]

    @staticmethod
    def fields(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Fields:
        """A text, or a line of a file."""
        columns = [(name,) for name in ("text", "sentence", "content")]
        return Fields({"text": columns}, lines=True, encoding=config.get("encoding", "utf-8"))

    @staticmethod
    def read(given: str | Mapping[str, Any], dataset_info: Mapping[str, Any], limits: Limits = LIMITS) -> list[Example]:
        """A text as examples without tags. Its words are what blanks and punctuation part, and single ideographs.

        Raises:
          UserError: unreadable, or without a word.
        """
        with named(given):
            words = _WORD.findall(given_text(given, dataset_info, limits=limits))
            encode = _Encode(dataset_info)
            parts = _parts([words], load(dataset_info["tokenizer"]), encode.room)
            return [encode(tokens_T, word_T >= 0) for _, tokens_T, word_T in parts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConllFiles(TaggedSentences):
    """Sentences in files of columns by blanks or tabs (``.conll``, ``.bio``, ``.tsv``, ``.txt``); see ``prepare``.

    Files or folders named after splits (``train.conll``, ``dev/...``) keep them; a missing val is taken from train, and
    a missing test where there is nothing but train. Lines of ``-DOCSTART-`` and comments are passed over.

    Attributes:
      root: a file, an archive or a folder.
      word, tag: which columns, from 0, or from -1 for the last.
      train, val, test: what the files of the split are called, where not after it.
      encoding: of the files.
      limits: of reading a file.
    """

    root: str
    word: int = 0
    tag: int = -1
    train: str | None = None
    val: str | None = None
    test: str | None = None
    encoding: str = "utf-8"
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        super().__post_init__()
        Format(encoding=self.encoding)

    def files(self) -> tuple[dict[str, list[File]], list[str]]:
        """Files by split, all of them under "" where there are no splits; and what unused ones are called.

        Raises:
          UserError: there are none.
        """
        listed = [file for file in list_files(self.root, self.limits) if kind_of(file.name) not in TABLES - {".tsv"}]
        if not listed:
            raise UserError(f"{self.root} holds no file of words and tags; .conll, .bio, .tsv and .txt are read.")
        used = by_split(listed, self.root, {"train": self.train, "val": self.val, "test": self.test})
        return used, unused(listed, used)

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
        files, _ = self.files()
        listed = [[split, *file.file_signature] for split, given in files.items() for file in given]
        return [listed, [self.word, self.tag, self.encoding]]

    def origin(self) -> str:
        left = self.files()[1]
        return self.root + (f" (not used: {', '.join(left)})" if left else "")


class Tagged:
    """A ``Dataset`` of tagged sentences that were read; see the top of this file for what is in an example."""

    def __init__(self, data: TaggedSentences, rows_N: Ragged):
        self._data, about = data, rows_N.about
        self._tokenizer = about["tokenizer"]
        self.dataset_info: Mapping[str, Any] = {
            **dataset_info_of(load(self._tokenizer)),
            "length": data.length,
            "pair": False,
            "tag_names": tuple(about["tag_names"]),
        }
        split_N = np.asarray(rows_N.values["split"])
        encode = _Encode(self.dataset_info)
        found = {split: np.flatnonzero(split_N == i) for i, split in enumerate(_SPLITS)}
        self.splits: Mapping[str, Source] = {
            split: _Rows(rows_N, indices, encode, split) for split, indices in found.items() if indices.size
        }
        self.description = (
            f"{data.origin()}: {about['sentences']:,} sentences of {about['words']:,} words in {len(rows_N):,} "
            f"examples; {len(about['tag_names'])} tags"
        )
        if alone := about["words"] - about["tagged"]:
            self.description += f"; {alone:,} words without a token of their own left out"

    def fingerprint(self) -> str:
        """A digest of the sentences, the splits, the tokenizer and the length."""
        return digest([self._data.file_signature(), self._data.dealing(), self._data.length, self._tokenizer])

    def read(self, given: str | Mapping[str, Any]) -> list[Example]:
        """See ``TaggedSentences.read``."""
        return self._data.read(given, self.dataset_info)


class _Encode:
    """Tokens, and which of them begin a word, as an example.

    Attributes:
      room: tokens of text that fit into an example.
    """

    def __init__(self, dataset_info: Mapping[str, Any]):
        self._encode = Encoder(dataset_info)
        self._before = load(dataset_info["tokenizer"]).layout(False).tokens.index(FIRST)
        self.room = self._encode.room

    def __call__(self, tokens_T: np.ndarray, start_T: np.ndarray) -> Example:
        example = self._encode(tokens_T, tokens_T[:0])
        example["starts"] = np.zeros_like(example["tokens"])
        example["starts"][self._before : self._before + len(start_T)] = start_T
        return example


class _Rows:
    """The ``Source`` of one split."""

    def __init__(self, rows_N: Ragged, indices: np.ndarray, encode: _Encode, split: str):
        self._rows, self._indices, self._encode, self._split = rows_N, indices, encode, split
        self.in_memory: str = rows_N.kept

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self._split} has {len(self)} examples; there is no {index}")
        row = int(self._indices[index])
        tags_T = self._rows.get("tags", row)
        example = self._encode(self._rows.get("tokens", row), tags_T >= 0)
        tags_L = np.full_like(example["tokens"], -1)
        tags_L[example["starts"] == 1] = tags_T[tags_T >= 0]
        return {**example, "tags": tags_L}

    def name(self, index: int) -> str:
        """Such as ``val[17]``."""
        return f"{self._split}[{index}]"


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


def _deal(data: TaggedSentences) -> list[str]:
    """The split of each sentence, equal ones in the same where they are dealt.

    Raises:
      UserError: there are no sentences.
    """
    given, words = [], []
    for split, sentence in data.sentences():
        given.append(split)
        words.append(digest(sentence.words))
    if not given:
        raise UserError(f"{data.origin()} has no sentence.")
    fractions = to_split_off({split for split in given if split}, data.val_fraction, data.test_fraction)
    names = sorted({name for name, split in zip(words, given, strict=True) if split in ("", "train")})
    dealt = stratified(names, np.zeros(len(names)), fractions, data.seed)
    split_of = {names[i]: split for split, indices in dealt.items() for i in indices}
    return [split_of[name] if split in ("", "train") else split for name, split in zip(words, given, strict=True)]


def _texts(data: TaggedSentences, split_N: Sequence[str], splits: Sequence[str]) -> Iterator[str]:
    for split, (_, sentence) in zip(split_N, data.sentences(), strict=True):
        if split in splits:
            yield " ".join(sentence.words)


def _write(data: TaggedSentences, split_N: Sequence[str], tokenizer: Tokenizer, add: ragged.Add) -> Mapping[str, Any]:
    """Adds the parts of all sentences."""
    names = sorted({tag for _, sentence in data.sentences() for tag in sentence.tags})
    number = {name: i for i, name in enumerate(names)}
    room = data.length - sum(token >= 0 for token in tokenizer.layout(False).tokens)
    counts = Counter[str]()
    waiting = zip(split_N, data.sentences(), strict=True)
    while some := [(split, sentence) for split, (_, sentence) in itertools.islice(waiting, _BATCH)]:
        tags = [np.array([number[tag] for tag in sentence.tags]) for _, sentence in some]
        counts += Counter(sentences=len(some), words=sum(map(len, tags)))
        for n, tokens_T, word_T in _parts([sentence.words for _, sentence in some], tokenizer, room):
            tags_T = np.where(word_T >= 0, tags[n][word_T], -1)
            add(tokens=tokens_T, tags=tags_T, split=_SPLITS.index(some[n][0]))
            counts["tagged"] += int((word_T >= 0).sum())
    return {"tokenizer": tokenizer.state(), "tag_names": names, **counts}
