"""Text for masked language modelling: documents as a bidirectional encoder reads them, packed into rows of one length,
or cut into pairs of texts, of which half belong together.

Axes: L length of a row, D documents, P pieces of them, T tokens of a piece.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.core import Codec, Example, UserError
from bigbase_jax.data import tokens as token_rows
from bigbase_jax.data.cache import Store
from bigbase_jax.data.files import LIMITS, Limits
from bigbase_jax.data.sources.splits import Split, digest
from bigbase_jax.data.sources.text.base import ROLES, SPLITS, Opened, given_text, named
from bigbase_jax.data.sources.text.text import Corpus, PythonReference, TextFiles, documents, text_codec
from bigbase_jax.data.tokens import Tokens
from bigbase_jax.data.windows import packed, places_of
from bigbase_jax.text.tokenizer import (
    Encoder,
    Texts,
    Tokenizer,
    TokenizerFile,
    dataset_info_of,
    lacking,
    load,
    word_starts,
)

PASSES = 10
"""How often the training text is paired anew before pairs come again (``dupe_factor`` of Devlin et al. 2019's code)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedCorpus(Corpus):
    """The documents of a corpus for ``MaskTokens``, as a base beside the class that says where they come from.

    A document stands between the special tokens of the tokenizer ([CLS] and [SEP]); one that is too long is cut into
    pieces, each between its own. What does not fill a row is packed with others, which it does not see. ``stride`` and
    ``separate`` are for other kinds of models.

    Attributes:
      next_sentence: rows are pairs of texts instead, as BERT itself was trained on; see ``Pairs``. An epoch is then
        ``PASSES`` times the training text.

    Raises:
      UserError: rows too short for the special tokens and a text.
    """

    next_sentence: bool = False

    code = (*Corpus.code, "data.sources.text.masked_text")

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 6 if self.next_sentence else 4
        if self.length < least:
            raise UserError(f"length is {self.length}; it must be at least {least}.")

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Any:
        given = self.tokenizer
        file_signature = given.file_signature() if isinstance(given, TokenizerFile) else None
        plain = dataclasses.replace(self, tokenizer=_WithRoles(given, file_signature), separate=False, stride=None)
        return Corpus.prepare(plain, cache, limit_bytes, say)

    def opened(self, rows_N: Store) -> Opened:
        """A ``Dataset`` of rows; ``description`` says how full they are.

        Raises:
          UserError: there are no tokens to train on.
        """
        tokens = token_rows.of_rows(rows_N)
        kind = functools.partial(Pairs, seed=self.seed) if self.next_sentence else Rows
        rows: dict[str, Rows | Pairs] = {
            split: kind(_spans(tokens, split), tokens, self.length, split) for split in SPLITS if split in tokens.about
        }
        splits = {split: source for split, source in rows.items() if len(source)}
        if "train" not in splits:
            raise UserError(f"{self.origin()} has no tokens to train on.")
        pairs = {"next_sentence": True} if self.next_sentence else {}
        parts = [f"{split} {documents(about)} of {about['tokens']:,} tokens" for split, about in tokens.about.items()]
        words = (
            f"{self.origin()}, for masked language modelling: {'; '.join(parts)}; a vocabulary of "
            f"{tokens.tokenizer.size:,}; rows of {self.length}, {rows['train'].fill:.1%} filled"
        )
        if self.next_sentence:
            words += f", with two texts each, half of them of two documents, {PASSES} times anew"
        info = {**dataset_info_of(tokens.tokenizer), "length": self.length, **pairs}
        about = ["masked pairs" if self.next_sentence else "masked", digest(self.identity(tokens.tokenizer))]
        return Opened(splits, info, words, about)

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        return text_codec(config, dataset_info, read_text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedTextFiles(MaskedCorpus, TextFiles):
    """See ``MaskedCorpus`` and ``TextFiles``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedPythonReference(MaskedCorpus, PythonReference):
    """See ``MaskedCorpus`` and ``PythonReference``."""

    test_fraction: float = 0.1


@dataclasses.dataclass(frozen=True)
class _WithRoles:
    """A tokenizer that is fitted with special tokens. Its ``repr`` is part of the cache's key, and so are its files."""

    tokenizer: Any
    file_signature: tuple[str | int, ...] | None

    def fit(self, texts: Texts, others: Texts, end: bool, special: Sequence[str] = ()) -> Tokenizer:
        """
        Raises:
          UserError: a published one that has no mask.
        """
        fitted: Tokenizer = self.tokenizer.fit(texts, others, end, ROLES)
        lacking(fitted, ("mask",))
        return fitted


class Rows(Split):
    """A ``Source`` of rows: pieces of documents between their special tokens, packed (best fit decreasing).

    Attributes:
      in_memory: where the tokens are; examples are made of them and kept nowhere else.
      fill: share of the positions that are not padding.
    """

    def __init__(self, spans_D2: np.ndarray, tokens: Tokens, length: int, split: str):
        """``spans_D2``: where each document begins among the tokens, and where it ends."""
        self._tokens = tokens.tokens
        self._encode = Encoder(tokens.tokenizer, length)
        room = self._encode.room
        start_D, size_D = spans_D2[:, 0], spans_D2[:, 1] - spans_D2[:, 0]
        which_P, nth_P = places_of(-(-size_D // room))
        start_P, size_P = start_D[which_P] + nth_P * room, np.minimum(size_D[which_P] - nth_P * room, room)
        order, self._bins = packed(size_P + length - room, length)
        self._pieces = np.stack([start_P[order], size_P[order]], 1)
        super().__init__(split, len(self._bins) - 1, self._row, tokens.kept)
        self.fill = float((size_P + length - room).sum()) / max(len(self) * length, 1)

    def _row(self, index: int) -> Example:
        """See ``encoded``."""
        pieces = self._pieces[self._bins[index] : self._bins[index + 1]]
        return encoded(self._encode, [(self._tokens[start : start + size],) for start, size in pieces])


class Pairs(Split):
    """A ``Source`` of pairs of texts (Devlin et al. 2019, section 3.1): does the second one follow the first?

    Documents are cut into equal pieces that fit into a row, and a piece into a first and a second text. Every other
    piece keeps its second text (``next`` is 0), the rest get as many tokens from the end of a piece of another document
    (``next`` is 1); in the next pass over the text it is the other way round, with other cuts and other documents. So
    neither the first text, nor how long the second one is or where it begins and ends, tells whether it follows.

    Attributes:
      in_memory: where the tokens are; examples are made of them and kept nowhere else.
      fill: share of the positions that are not padding.

    Raises:
      UserError: there are no two documents of two tokens or more.
    """

    def __init__(self, spans_D2: np.ndarray, tokens: Tokens, length: int, split: str, seed: int = 0):
        """``spans_D2``: where each document begins among the tokens, and where it ends."""
        self._tokens, self._tokenizer = tokens.tokens, tokens.tokenizer
        self._encode = Encoder(tokens.tokenizer, length, pair=True)
        self._seed = [seed % 2**64, SPLITS.index(split)]
        self._passes = PASSES if split == "train" else 1
        room = self._encode.room
        spans_D2 = spans_D2[spans_D2[:, 1] - spans_D2[:, 0] >= 2]
        if len(spans_D2) < 2:
            raise UserError(
                f"next_sentence takes every other second text from another document, and {split} has "
                f"{len(spans_D2)} of two tokens or more; give it more documents, or leave next_sentence out."
            )
        start_D, size_D = spans_D2[:, 0], spans_D2[:, 1] - spans_D2[:, 0]
        count_D = -(-size_D // room)
        stop_D = np.cumsum(count_D)
        which_P, nth_P = places_of(count_D)
        first_P, last_P = (size_D[which_P] * (nth_P + i) // count_D[which_P] for i in (0, 1))
        self._pieces = np.stack([first_P, last_P], 1) + start_D[which_P, None]
        self._family = np.stack([stop_D - count_D, stop_D], 1)[which_P]  # the pieces of the same document
        super().__init__(split, self._passes * len(self._pieces), self._pair, tokens.kept)
        self.fill = float((last_P - first_P + length - room).mean()) / length

    def _pair(self, index: int) -> Example:
        """See ``encoded``; and ``next`` i32."""
        nth, piece = divmod(index, len(self._pieces))
        rng = np.random.default_rng([*self._seed, nth, piece])
        first, last = self._family[piece]
        other = int(rng.integers(len(self._pieces) - (last - first)))
        own_T, other_T = self._text(piece), self._text(other if other < first else other + last - first)
        size = int(rng.choice(self._sizes(own_T, other_T)))
        strange = (piece + nth) % 2
        pair = (own_T[: len(own_T) - size], (other_T if strange else own_T)[-size:])
        return {**encoded(self._encode, [pair]), "next": np.int32(strange)}

    def _text(self, piece: int) -> np.ndarray:
        first, last = self._pieces[piece]
        return self._tokens[first:last]

    def _sizes(self, own_T: np.ndarray, other_T: np.ndarray) -> np.ndarray:
        """How many tokens a second text may have: so many that it begins with a word in both pieces, if that can be."""
        own, other = (len(x_T) - np.flatnonzero(_starts(self._tokenizer, x_T)) for x_T in (own_T, other_T))
        sizes = np.intersect1d(own[1:], other)
        return sizes if len(sizes) else np.arange(1, min(len(own_T) - 1, len(other_T)) + 1)


def encoded(encode: Encoder, pieces: Sequence[Sequence[np.ndarray]]) -> Example:
    """What ``Encoder`` makes of pieces; ``words`` i32[L], which number the words of the row from 1 and are 0 elsewhere;
    and ``mask_id`` and ``vocab_size``."""
    (example, text_L), tokenizer = encode(*pieces), encode.tokenizer
    words_L = np.zeros_like(example["tokens"])
    words_L[text_L] = np.cumsum(np.concatenate([_starts(tokenizer, x_T) for texts in pieces for x_T in texts]))
    ids = {"mask_id": np.int32(tokenizer.special["mask"]), "vocab_size": np.int32(tokenizer.size)}
    return {**example, "words": words_L, **ids}


def _starts(tokenizer: Tokenizer, text_T: np.ndarray) -> np.ndarray:
    """bool[T]: where words begin; the first token begins one, whatever it is."""
    starts_T = word_starts(tokenizer, text_T)
    starts_T[:1] = True
    return starts_T


def _spans(tokens: Tokens, split: str) -> np.ndarray:
    """i64[D, 2]: the documents of a split that have tokens."""
    spans = np.stack([np.concatenate([[0], tokens.stops[:-1]]), tokens.stops], 1)
    return spans[(tokens.split == SPLITS.index(split)) & (spans[:, 1] > spans[:, 0])]


def read_text(given: Any, dataset_info: Mapping[str, Any], limits: Limits = LIMITS) -> list[Example]:
    """A user's file, or the ``text`` of a row, as rows, in order. Where it names the mask ("[MASK]"), that is what the
    model is to guess.

    Raises:
      UserError: unreadable, not UTF-8, or empty.
    """
    text, tokenizer, length = (
        given_text(given, dataset_info, limits=limits).strip(),
        load(dataset_info["tokenizer"]),
        dataset_info["length"],
    )
    with named(given):
        tokens_T, _ = tokenizer.encode_special(text)
    encode = Encoder(tokenizer, length)
    starts = range(0, len(tokens_T), encode.room)
    return [encoded(encode, [(tokens_T[start : start + encode.room],)]) for start in starts]
