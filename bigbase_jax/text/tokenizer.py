"""Tokenizers: text <-> integers. Bytes, characters, and whatever Hugging Face's ``tokenizers`` trains or loads.

What a config names (``Bytes``, ``Characters``, ``Subwords``, ``TokenizerFile``) is fitted to the training text once;
the ``Tokenizer`` that results is kept as one string among the data's facts, so a run needs no other file to read text.

Special tokens have roles: ``pad``, ``cls`` and ``sep`` (around a text that is to be classified), ``mask``, ``start``
(of what a decoder writes), ``turn`` and ``stop`` (around what someone says). A tokenizer of ours has those that ``fit``
is asked for; a published one those that it was published with. Data sets tell them as facts, ``pad_id`` and so on.

Axes: T tokens of a text, V entries of the vocabulary.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError
from bigbase_jax.runtime.limits import MOST_PIECES, limit, too_much
from bigbase_jax.runtime.untrusted import parse_json, read_object, read_regular
from bigbase_jax.text.tokenizer_checks import (
    attempt,
    charsmap_growth,
    check,
    check_ids,
    library,
    one_sentence,
)

END = "<|endoftext|>"
"""The name of the token between documents, where a tokenizer has none of its own."""
_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")  # of published tokenizers
ROLES: Mapping[str, tuple[str, ...]] = {
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>"),
    "cls": ("[CLS]", "<cls>", "<s>", "<bos>"),
    "sep": ("[SEP]", "<sep>", "</s>", "<eos>"),
    "mask": ("[MASK]", "<mask>"),
    "start": ("<s>", "<bos>", "<|startoftext|>", "<|begin_of_text|>", "[CLS]"),
    "turn": ("<|im_start|>",),
    "stop": ("<|im_end|>", "<|eot_id|>", "<end_of_turn>"),
}
"""Roles of special tokens, and what they are called: new ones by the first name, published ones by any, in order."""
_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MARIAN = ("vocab.json", "source.spm", "target.spm")
_MOST_PIECE = 1024  # bytes of a SentencePiece model's pieces
_MOST_MODEL = 24 * MOST_PIECES  # bytes of it; published ones have 17 for each piece
_NEVER = -1e4  # log-probability of a Unigram's byte pieces: the last resort

Texts = Callable[[], Iterator[str]]
"""Gives the training texts from the start, as often as it is called."""


class Layout(NamedTuple):
    """What stands around one text or two.

    Attributes:
      tokens: in order; ``FIRST`` and ``SECOND`` are where the texts go.
      token_type_ids: of each, 0 or 1.
    """

    tokens: tuple[int, ...]
    token_type_ids: tuple[int, ...]


FIRST, SECOND = -1, -2


class Tokenizer(Protocol):
    """Text <-> integers.

    Attributes:
      size: V; tokens are 0 to V - 1.
      end: the token between documents, which no text contains; None: there is none.
      token_bytes: i32[V], how many bytes of UTF-8 each token stands for; None where that depends on the text around.
      special: tokens by role (see ``ROLES``), of those that it has.
      special_tokens: all of them by name, as ``encode_special`` finds them in a text.
      continues: whether pieces that go on with a word begin with "##".
    """

    size: int
    end: int | None
    token_bytes: np.ndarray | None
    special: Mapping[str, int]
    special_tokens: Mapping[str, int]
    continues: bool

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens i32[T], bytes i32[T]) of each text: how many of its bytes each token stands for.

        The sum of the bytes is the text's length in UTF-8, but for text that has no tokens at all.

        Raises:
          UserError: a text cannot be written with this vocabulary.
        """
        ...

    def encode_special(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """As ``encode_batch`` of one text, but names of special tokens in it are these tokens (and their bytes)."""
        names = "|".join(map(re.escape, self.special_tokens))
        found = [(np.zeros(0, np.int32), np.zeros(0, np.int32))]
        for part in re.split(f"({names})", text) if names else [text]:
            if part in self.special_tokens:
                found.append((np.array([self.special_tokens[part]], np.int32), np.array([len(part)], np.int32)))
            elif part:
                found += self.encode_batch([part])
        tokens_T, counts_T = map(np.concatenate, zip(*found, strict=True))
        return tokens_T, counts_T

    def layout(self, pair: bool) -> Layout:
        """The special tokens around one text, or around two: as published, else ``cls`` text ``sep`` (text ``sep``)."""
        ...

    def spelled(self) -> list[bytes]:
        """The text of every token in bytes, with "##" where it has that; of a special one, none."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; special tokens of ours have none, and bytes that are not UTF-8 become U+FFFD."""
        ...

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """Each token by itself, as a person reads it."""
        ...

    def state(self) -> str:
        """All there is to know, for ``load``."""
        ...


def load(state: str) -> Tokenizer:
    """The tokenizer of ``Tokenizer.state()``; raises UserError for anything else."""
    return _load(state)


@functools.lru_cache(maxsize=4)
def _load(state: str) -> Tokenizer:
    with one_sentence("what should be a tokenizer's state is none"):
        given = parse_json(state, "a tokenizer's state")
        kind = given.pop("kind")
        if kind == "subword":
            check(given["tokenizer"], "a tokenizer's state")
        return {"symbols": Symbols, "subword": Subword, "marian": Marian}[kind](**given)


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The tokens of one text, i32[T]; raises UserError if it cannot be written with this vocabulary."""
    return tokenizer.encode_batch([text])[0][0]


def source_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """What a source is read with, where this writes its translation: the same, unless it is Marian's target side."""
    return tokenizer.source if isinstance(tokenizer, Marian) else tokenizer


def dataset_info_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """``vocab_size``, ``tokenizer`` (its state), and ``end_id``, ``pad_id``, ``cls_id``, ... as far as it has them."""
    ids = {f"{role}_id": token for role, token in tokenizer.special.items()}
    ends = {} if tokenizer.end is None else {"end_id": tokenizer.end}
    return {"vocab_size": tokenizer.size, "tokenizer": tokenizer.state(), **ends, **ids}


def lacking(tokenizer: Tokenizer, roles: Iterable[str]) -> None:
    """Raises UserError where a tokenizer has no token of one of these roles."""
    for role in roles:
        if role not in tokenizer.special:
            raise UserError(
                f"this tokenizer has no {role} token ({', '.join(ROLES[role])}); take another, or learn one from the"
                " text (Subwords)."
            )


def compose(layout: Layout, texts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens i32[T], types i32[T], bool[T]: is it text) of one text or two with what stands around them, T at most
    ``length``.

    What is too long is cut at its end, the longer text first (Hugging Face's ``longest_first``); special tokens stay.
    """
    room = max(length - sum(token >= 0 for token in layout.tokens), 0)
    n, m = len(texts[0]), len(texts[1]) if len(texts) > 1 else 0
    if n + m > room and len(texts) == 1:
        n = room
    elif n + m > room:
        less = min(n, m)
        more = less if less > room else max(less, room - less)
        if less + more > room:
            less, more = room // 2, room - room // 2
        n, m = (less, more) if n <= m else (more, less)
    parts = {place: text_T[:size] for place, text_T, size in zip((FIRST, SECOND), texts, (n, m), strict=False)}
    pieces = [parts[token] if token < 0 else np.array([token]) for token in layout.tokens]
    token_type_ids = [np.full(len(piece), kind) for piece, kind in zip(pieces, layout.token_type_ids, strict=True)]
    text = [np.full(len(piece), token < 0) for piece, token in zip(pieces, layout.tokens, strict=True)]
    tokens_T, types_T = (np.concatenate(x).astype(np.int32)[:length] for x in (pieces, token_type_ids))
    return tokens_T, types_T, np.concatenate(text)[:length]


class Encoder:
    """Pieces of text with the tokenizer's special tokens around them, one after the other, as an example.

    Attributes:
      tokenizer: it.
      room: the most tokens of a piece, or of the two texts of a pair together.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, pair: bool = False):
        """
        Args:
          length: L.
          pair: whether a piece is two texts.
        """
        self.tokenizer, self._layout, self._length = tokenizer, tokenizer.layout(pair), length
        self._pad = tokenizer.special.get("pad", 0)
        self.room = length - sum(token >= 0 for token in self._layout.tokens)

    def __call__(self, *pieces: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(example, bool[L]: the places of the tokens that are text). What does not fit is cut; see ``compose``.

        An example is ``tokens``, ``segment_ids``, ``positions`` and ``token_type_ids``, i32[L]: ``segment_ids`` number
        the pieces from 1, 0 is padding; ``positions`` count from 0 in each.
        """
        example: dict[str, np.ndarray] = {name: np.zeros(self._length, np.int32) for name in _ENTRIES}
        example["tokens"][:] = self._pad
        text_L = np.zeros(self._length, bool)
        at = 0
        for segment, texts in enumerate(pieces, 1):
            tokens_T, types_T, text_T = compose(self._layout, texts, self._length)
            here = slice(at, at + len(tokens_T))
            example["tokens"][here], example["token_type_ids"][here], text_L[here] = tokens_T, types_T, text_T
            example["segment_ids"][here], example["positions"][here] = segment, np.arange(len(tokens_T))
            at += len(tokens_T)
        return example, text_L


_ENTRIES = ("tokens", "segment_ids", "positions", "token_type_ids")


def word_starts(tokenizer: Tokenizer, tokens_T: np.ndarray) -> np.ndarray:
    """bool[T]: does each token begin a word. What follows it up to the next one that does belongs to its word.

    A word is a run of letters, or one of digits, with the space before it where the tokenizer keeps that in one token;
    a Chinese or Japanese character, any other sign and a special token are words of their own.
    """
    lead_V, tail_V = _ends_of_pieces(tokenizer.state())
    lead_T = lead_V[tokens_T]
    before_T = np.concatenate([[_SIGN], tail_V[tokens_T[:-1]]])[: len(tokens_T)]
    return (lead_T == _SIGN) | ((lead_T != before_T) & (lead_T != _REST))


_SIGN, _LETTER, _DIGIT, _REST = range(4)


@functools.lru_cache(maxsize=4)
def _ends_of_pieces(state: str) -> tuple[np.ndarray, np.ndarray]:
    """i8[V] each: what the first and the last character of every token is; ``_REST``: the middle of a word."""
    tokenizer = load(state)
    special = {tokenizer.end, *tokenizer.special.values()}
    lead, tail = [], []
    for token, spelled in enumerate(tokenizer.spelled()):
        text = spelled.decode(errors="replace")
        if token in special or not text:
            first = last = _SIGN
        elif tokenizer.continues:
            first = last = _REST if text.startswith("##") else _SIGN
        else:
            first, last = (_kind_of(c) if c != "\ufffd" else _LETTER for c in (text[0], text[-1]))
            if text[0] == "\ufffd" and spelled[0] & 0xC0 == 0x80:
                first = _REST
            elif text[0] == "\ufffd" and 0xE3 <= spelled[0] <= 0xE9:  # the first bytes of U+3000 to U+9FFF
                first = _SIGN
        lead.append(first)
        tail.append(last)
    return np.array(lead, np.int8), np.array(tail, np.int8)


def _kind_of(character: str) -> int:
    if "\u3040" <= character <= "\u9fff" or character >= "\U00020000":  # kana and Han
        return _SIGN
    kind = unicodedata.category(character)[0]
    return {"L": _LETTER, "M": _LETTER, "N": _DIGIT}.get(kind, _SIGN)


# ------------------------------------------------------------------------------------------------- bytes and characters


class Symbols(Tokenizer):
    """Tokens that are characters, and bytes for all other characters: ``decode`` gives any text back exactly.

    Attributes: see ``Tokenizer``. Tokens are the ``characters``, then (where ``fallback``) the 256 bytes, then the end,
      then the special ones.
    """

    continues = False

    def __init__(self, characters: str = "", fallback: bool = True, end: bool = False, special: Sequence[str] = ()):
        """
        Args:
          characters: each once; "" and ``fallback``: the tokens are bytes.
          fallback: write other characters as their bytes of UTF-8, instead of refusing them.
          end: have a token between documents.
          special: roles of special tokens to have.
        """
        self.characters, self.fallback = characters, fallback
        self._base = len(characters)
        spelled = [c.encode() for c in characters] + [bytes([b]) for b in range(256)] * fallback + [b""] * end
        self.end = len(spelled) - 1 if end else None
        self.special: Mapping[str, int] = {role: len(spelled) + i for i, role in enumerate(special)}
        self._names = {token: ROLES[role][0] for role, token in self.special.items()}
        if self.end is not None:
            self._names[self.end] = END
        self.special_tokens: Mapping[str, int] = {name: token for token, name in self._names.items()}
        spelled += [b""] * len(special)
        self._spelled = spelled
        self.size = len(spelled)
        self.token_bytes: np.ndarray | None = np.array([len(b) for b in spelled], np.int32)
        codes = _codes(characters)
        self._token_of = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)  # the last: any higher character
        self._token_of[codes] = np.arange(len(codes))

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(tokens_T, self.token_bytes[tokens_T]) for tokens_T in map(self._encode, texts)]  # type: ignore[index]

    def _encode(self, text: str) -> np.ndarray:
        if not self.characters:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        codes = _codes(text)
        tokens = self._token_of[np.minimum(codes, len(self._token_of) - 1)]
        other = tokens < 0
        if not other.any():
            return tokens
        if not self.fallback:
            character = chr(codes[other][0])
            raise UserError(
                f"the character {character!r} (U+{ord(character):04X}) is not among the {len(self.characters):,} of the"
                " training text; train with Characters(fallback=True) to spell such characters in bytes."
            )
        lengths = np.where(other, _utf8_lengths(codes), 1)
        tokens_T, spelled_T = np.repeat(tokens, lengths), np.repeat(other, lengths)
        raw = codes[other].astype("<u4").tobytes().decode("utf-32-le").encode()
        tokens_T[spelled_T] = self._base + np.frombuffer(raw, np.uint8).astype(np.int32)
        return tokens_T

    def layout(self, pair: bool) -> Layout:
        return _around(self.special, pair)

    def spelled(self) -> list[bytes]:
        return self._spelled

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join([self._spelled[t] for t in tokens]).decode(errors="replace")

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        return [self._names.get(int(t)) or self._spelled[t].decode(errors="backslashreplace") for t in tokens]

    def state(self) -> str:
        given = {"characters": self.characters, "fallback": self.fallback, "end": self.end is not None}
        if self.special:
            given["special"] = list(self.special)
        return json.dumps({"kind": "symbols", **given}, ensure_ascii=False)


def _around(special: Mapping[str, int], pair: bool) -> Layout:
    """``cls`` text ``sep``, or ``cls`` text ``sep`` text ``sep``, without those that there are not."""
    cls, sep = ([special[role]] if role in special else [] for role in ("cls", "sep"))
    first = [*cls, FIRST, *sep]
    second = [SECOND, *sep] if pair else []
    return Layout((*first, *second), (0,) * len(first) + (1,) * len(second))


def _codes(text: str) -> np.ndarray:
    """Code points, u32[characters]."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _utf8_lengths(codes: np.ndarray) -> np.ndarray:
    """Bytes of each character in UTF-8 (RFC 3629)."""
    return 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """256 tokens, one for each byte of UTF-8: any language, no training, ``decode`` exact."""

    def fit(self, texts: Texts, others: Texts, end: bool, special: Sequence[str] = ()) -> Tokenizer:
        """``end``: have a token between documents; ``special``: roles of special tokens to have."""
        return Symbols(end=end, special=special)


@dataclasses.dataclass(frozen=True)
class Characters:
    """One token for each character of the training text, in order of code points.

    Attributes:
      fallback: 256 more tokens, so that any other character is spelled in bytes. False: text with another character is
        refused. None: only where validation or test text has such characters.
    """

    fallback: bool | None = None

    def fit(self, texts: Texts, others: Texts, end: bool, special: Sequence[str] = ()) -> Tokenizer:
        known = _characters(texts)
        fallback = bool(_characters(others) - known) if self.fallback is None else self.fallback
        return Symbols("".join(sorted(known)), fallback, end, special)


def _characters(texts: Texts) -> set[str]:
    found: set[str] = set()
    for text in texts():
        found.update(text)
    return found


# --------------------------------------------------------------------------------------------------- subwords


_WIDE = "[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
_BLANK = re.compile(f"(?<={_WIDE}) (?={_WIDE})")  # which a WordPiece decoder puts there, and no text has


class Subword:
    """A tokenizer of Hugging Face's ``tokenizers``, without the special tokens that it may put around a text.

    What looks like a special token in a text is text: ``"<|endoftext|>"`` in a document never ends one.

    Attributes: see ``Tokenizer``.
    """

    def __init__(self, tokenizer: str, end: int | None):
        """``tokenizer``: the contents of a ``tokenizer.json``; ``end``: see ``Tokenizer``."""
        self._json = tokenizer
        self._tokenizer = self._new(True)
        self.end = end
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = 1 + max(vocabulary.values())
        given = json.loads(tokenizer)
        self.special_tokens: Mapping[str, int] = {e["content"]: e["id"] for e in given["added_tokens"] if e["special"]}
        found = {role: next((n for n in known if n in self.special_tokens), None) for role, known in ROLES.items()}
        self.special: Mapping[str, int] = {role: vocabulary[n] for role, n in found.items() if n is not None}
        self._added = {entry["id"]: entry for entry in given["added_tokens"]}
        self.continues = given["model"].get("type") == "WordPiece"
        self._byte_level = any(part["type"] == "ByteLevel" for part in _flat(given["decoder"], "decoders"))
        self.token_bytes = self._table(given)

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        with library():
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            tokens_T = np.array(encoding.ids, np.int32)
            if self.token_bytes is not None:
                found.append((tokens_T, self.token_bytes[tokens_T]))
                continue
            found.append((tokens_T, _bytes_by_offsets(text, encoding)))
        return found

    def encode_special(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        with library():
            encoding = self._marked.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), _bytes_by_offsets(text, encoding)

    @functools.cached_property
    def _marked(self) -> Any:
        return self._new(False)

    def _new(self, special_is_text: bool) -> Any:
        tokenizer = _hugging_face().Tokenizer.from_str(self._json)
        tokenizer.encode_special_tokens = special_is_text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def layout(self, pair: bool) -> Layout:
        words = [self._tokenizer.encode("0", add_special_tokens=False) for _ in range(1 + pair)]
        whole = self._tokenizer.post_process(*words, add_special_tokens=True)
        tokens: list[int] = []
        token_type_ids: list[int] = []
        for token, place, kind in zip(whole.ids, whole.sequence_ids, whole.type_ids, strict=True):
            entry = token if place is None else (FIRST, SECOND)[place]
            if entry >= 0 or entry not in tokens:
                tokens.append(entry)
                token_type_ids.append(kind)
        published = FIRST in tokens and max(tokens) >= 0
        return Layout(tuple(tokens), tuple(token_type_ids)) if published else _around(self.special, pair)

    def spelled(self) -> list[bytes]:
        found = [b""] * self.size
        for piece, token in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if token in self._added:
                found[token] = b"" if self._added[token]["special"] else piece.encode()
            elif self._byte_level:
                found[token] = _bytes_of_piece(piece)
            elif match := re.fullmatch("<0x([0-9A-F]{2})>", piece):
                found[token] = bytes([int(match[1], 16)])
            else:
                found[token] = piece.replace("▁", " ").encode()
        return found

    def decode(self, tokens: Iterable[int]) -> str:
        hidden = {self.end, *self.special.values()}
        with library():
            text = self._tokenizer.decode([int(t) for t in tokens if t not in hidden], skip_special_tokens=False)
        return _BLANK.sub("", text) if self.continues else text

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        spelled = [(t, self._tokenizer.id_to_token(int(t)) or f"<{t}>") for t in tokens]
        if not self._byte_level:
            return [piece for _, piece in spelled]
        return [
            piece if int(t) in self._added else _bytes_of_piece(piece).decode(errors="backslashreplace")
            for t, piece in spelled
        ]

    def state(self) -> str:
        return self._state

    @functools.cached_property
    def _state(self) -> str:
        return json.dumps({"kind": "subword", "tokenizer": self._json, "end": self.end}, ensure_ascii=False)

    def _table(self, given: dict[str, Any]) -> np.ndarray | None:
        """i32[V] where every token stands for its own bytes: byte-level BPE that changes nothing of the text."""
        levels = [part for part in _flat(given["pre_tokenizer"], "pretokenizers") if part["type"] == "ByteLevel"]
        if given["normalizer"] or not levels or any(part["add_prefix_space"] for part in levels):
            return None
        table_V = np.zeros(self.size, np.int32)
        for piece, token in self._tokenizer.get_vocab(with_added_tokens=True).items():
            added = self._added.get(token)
            table_V[token] = len(piece) if added is None else 0 if added["special"] else len(piece.encode())
        return table_V


class Marian(Tokenizer):
    """One side of the two SentencePiece files of a Marian model, whose pieces one ``vocab.json`` numbers (opus-mt).

    A piece of the file that the vocabulary does not have is ``<unk>``, which has no text; a language in front of a text
    (``>>fr<<``) is one token.

    Attributes: see ``Tokenizer``.
    """

    continues = False
    token_bytes: np.ndarray | None = None

    def __init__(self, vocabulary: Mapping[str, int], models: Sequence[str], end: int | None):
        """
        Args:
          vocabulary: of all pieces of both sides, ``<unk>`` and ``</s>``.
          models: the source's ``.spm`` file in base64, and the target's where this is the target's side.
          end: see ``Tokenizer``.
        """
        check_ids(vocabulary.values(), _MARIAN[0])
        self._vocabulary, self._models, self.end = dict(vocabulary), list(models), end
        self._tokenizer = _sentencepiece(_hugging_face(), base64.b64decode(models[-1]), False)
        attempt(self._tokenizer.to_str(), "a Marian tokenizer")
        self._unknown = vocabulary["<unk>"]
        self._names = {token: piece for piece, token in vocabulary.items()}
        self.size = 1 + max(self._names)
        self.special: Mapping[str, int] = {"sep": vocabulary["</s>"]}
        if "<pad>" in vocabulary:
            self.special = {**self.special, "pad": vocabulary["<pad>"]}
        self._hidden = {self._unknown, *self.special.values()}
        self.special_tokens: Mapping[str, int] = {self._names[token]: token for token in self._hidden}
        self._tokens = {piece: token for piece, token in vocabulary.items() if piece not in self.special_tokens}

    @functools.cached_property
    def source(self) -> Tokenizer:
        """The tokenizer of the source; itself, if it is that."""
        return self if len(self._models) == 1 else Marian(self._vocabulary, self._models[:1], self.end)

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        cuts = [text.find("<<") + 2 if text.startswith(">>") and "<<" in text else 0 for text in texts]
        plain = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
        found = []
        with library():
            encodings = self._tokenizer.encode_batch(plain)
        for text, cut, rest, encoding in zip(texts, cuts, plain, encodings, strict=True):
            tokens = [self._tokens.get(piece, self._unknown) for piece in self._pieces(rest, encoding)]
            counts_T = _bytes_by_offsets(rest, encoding)
            if cut:
                tokens = [self._tokens.get(text[:cut], self._unknown), *tokens]
                counts_T = np.concatenate([np.array([len(text[:cut].encode())], np.int32), counts_T])
            found.append((np.array(tokens, np.int32), counts_T))
        return found

    def _pieces(self, text: str, encoding: Any) -> list[str]:
        """As SentencePiece gives them: the text itself where the file has no piece, which the vocabulary may have."""
        unknown, normalizer = getattr(self._tokenizer.model, "unk_token", None), self._tokenizer.normalizer
        if unknown not in encoding.tokens:  # which of a Unigram are such already
            return encoding.tokens
        text = normalizer.normalize_str(text) if normalizer else text
        encoding = self._tokenizer.encode(text, add_special_tokens=False)  # for places in the normalised text
        found = zip(encoding.tokens, encoding.offsets, strict=True)
        return [text[slice(*place)] if piece == unknown else piece for piece, place in found]

    def layout(self, pair: bool) -> Layout:
        tokens = (FIRST, *([SECOND] if pair else []), self.special["sep"])
        return Layout(tokens, (0,) * len(tokens))

    def spelled(self) -> list[bytes]:
        found = [b""] * self.size
        for token, piece in self._names.items():
            found[token] = b"" if token in self._hidden else piece.replace("▁", " ").encode()
        return found

    def decode(self, tokens: Iterable[int]) -> str:
        pieces = [self._names[int(t)] for t in tokens if int(t) in self._names and int(t) not in self._hidden]
        return self._tokenizer.decoder.decode(pieces).strip()

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        return [self._names.get(int(t)) or f"<{t}>" for t in tokens]

    def files(self) -> dict[str, bytes]:
        """The contents of ``vocab.json``, ``source.spm`` and ``target.spm``."""
        models = dict(zip(("source.spm", "target.spm"), map(base64.b64decode, self._models), strict=False))
        return {"vocab.json": json.dumps(self._vocabulary, indent=2).encode(), **models}

    def state(self) -> str:
        return self._state

    @functools.cached_property
    def _state(self) -> str:
        given = {"vocabulary": self._vocabulary, "models": self._models, "end": self.end}
        return json.dumps({"kind": "marian", **given}, ensure_ascii=False)


def _bytes_by_offsets(text: str, encoding: Any) -> np.ndarray:
    """i32[T]: a token stands for the text from the end of those before it to its own, the last one for the rest too."""
    byte_at = np.concatenate([[0], np.cumsum(_utf8_lengths(_codes(text)))])
    ends = np.array([stop for _, stop in encoding.offsets], np.int64)
    reached_T = byte_at[np.maximum.accumulate(ends)] if len(ends) else ends
    reached_T[-1:] = byte_at[-1]
    return np.diff(reached_T, prepend=0).astype(np.int32)


def _flat(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a pipeline in a ``tokenizer.json``."""
    if node is None:
        return []
    return [part for item in node[key] for part in _flat(item, key)] if node["type"] == "Sequence" else [node]


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The printable characters that byte-level BPE writes bytes with (Radford et al. 2019, ``bytes_to_unicode``)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(others)}}


def _bytes_of_piece(piece: str) -> bytes:
    """What a piece of byte-level BPE spells; of another one, its text."""
    raw = _byte_of_character()
    return bytes([raw[c] for c in piece]) if raw.keys() >= set(piece) else piece.encode()


@dataclasses.dataclass(frozen=True)
class Subwords:
    """Subwords learned from the training text.

    Attributes:
      algorithm: "bpe" (byte-level, Radford et al. 2019), "unigram" (Kudo 2018, with bytes for other characters) or
        "wordpiece" (as BERT's, cased), or "words" (whole, between spaces). ``decode`` is exact for "bpe" and, but for
        U+2581, for "unigram"; "wordpiece" and "words" lose spaces and write unknown words as [UNK]. The same texts give
        the same vocabulary, but for "unigram", of which a run keeps its own.
      vocab_size: entries to learn, the end between documents (and for "unigram" the 256 bytes) not counted; a small
        text gives fewer.
      min_frequency: of a pair that is merged.

    Raises:
      UserError: an unknown algorithm, or a vocabulary that is too small.
    """

    algorithm: str = "bpe"
    vocab_size: int = 4096
    min_frequency: int = 2

    def __post_init__(self) -> None:
        known = ("bpe", "unigram", "wordpiece", "words")
        if self.algorithm not in known:
            raise UserError(f"there is no algorithm {self.algorithm!r}.{suggest(self.algorithm, known, 'algorithm')}")
        least = {"bpe": 257, "words": 2}.get(self.algorithm, 16)
        if self.vocab_size < least:
            raise UserError(f"vocab_size is {self.vocab_size}; {self.algorithm} needs at least {least}.")

    def fit(self, texts: Texts, others: Texts, end: bool, special: Sequence[str] = ()) -> Tokenizer:
        hf = _hugging_face()
        tokenizer, trainer = getattr(self, f"_{self.algorithm}")(hf, texts)
        tokenizer.train_from_iterator(_capped(texts()), trainer)
        given = json.loads(tokenizer.to_str())
        if self.algorithm == "unigram":
            model = given["model"]
            model["vocab"] += [[f"<0x{b:02X}>", _NEVER] for b in range(256)]
            model["byte_fallback"] = True
            given["added_tokens"] = []  # "<unk>" in a text is text
            joined = [{"type": "ByteFallback"}, {"type": "Fuse"}, given["decoder"]]
            given["decoder"] = {"type": "Sequence", "decoders": joined}
        if self.algorithm == "wordpiece":
            given["added_tokens"] = [token for token in given["added_tokens"] if token["content"] in _BERT]
        return _finish(hf.Tokenizer.from_str(json.dumps(given)), end, special)

    def _bpe(self, hf: Any, texts: Texts) -> tuple[Any, Any]:
        tokenizer = hf.Tokenizer(hf.models.BPE())
        tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = hf.decoders.ByteLevel()
        alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
        return tokenizer, hf.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=self.min_frequency,
            initial_alphabet=alphabet,
            show_progress=False,
        )

    def _unigram(self, hf: Any, texts: Texts) -> tuple[Any, Any]:
        tokenizer = hf.Tokenizer(hf.models.Unigram())
        tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = hf.decoders.Metaspace(prepend_scheme="never")
        return tokenizer, hf.trainers.UnigramTrainer(
            vocab_size=self.vocab_size,
            initial_alphabet=list("<0x123456789ABCDEF>"),  # so that "<0x41>" in a text is not taken for a byte
            special_tokens=["<unk>"],
            unk_token="<unk>",
            show_progress=False,
        )

    def _wordpiece(self, hf: Any, texts: Texts) -> tuple[Any, Any]:
        # The library numbers the characters inside words as its hash table gives them, and merges pairs that are
        # equally frequent in the order of these numbers. So they are found first, and then given in order.
        tokenizer = _bert(hf, hf.models.WordPiece(unk_token="[UNK]"), lowercase=False)
        alphabet = hf.trainers.WordPieceTrainer(vocab_size=0, special_tokens=list(_BERT), show_progress=False)
        tokenizer.train_from_iterator(_capped(texts()), alphabet)
        inside = sorted(piece for piece in tokenizer.get_vocab() if piece.startswith("##"))
        tokenizer = _bert(hf, hf.models.WordPiece(unk_token="[UNK]"), lowercase=False)
        return tokenizer, hf.trainers.WordPieceTrainer(
            vocab_size=self.vocab_size,
            min_frequency=self.min_frequency,
            special_tokens=[*_BERT, *inside],
            show_progress=False,
        )

    def _words(self, hf: Any, texts: Texts) -> tuple[Any, Any]:
        tokenizer = hf.Tokenizer(hf.models.WordLevel(unk_token="[UNK]"))
        metaspace = {"prepend_scheme": "always", "split": False}
        tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence(
            [hf.pre_tokenizers.WhitespaceSplit(), hf.pre_tokenizers.Metaspace(**metaspace)]
        )
        tokenizer.decoder = hf.decoders.Metaspace(**metaspace)
        return tokenizer, hf.trainers.WordLevelTrainer(
            vocab_size=self.vocab_size, special_tokens=["[UNK]"], show_progress=False
        )


@dataclasses.dataclass(frozen=True)
class TranscriptBytes:
    """Tokens are bytes, and what stands around a transcript of Whisper's, but for times: for a model from scratch."""

    def fit(self, texts: Texts, others: Texts, end: bool, special: Sequence[str] = ()) -> Tokenizer:
        """The texts are not looked at."""
        hf = _hugging_face()
        alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
        tokenizer = hf.Tokenizer(hf.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = hf.decoders.ByteLevel()
        tokenizer.add_special_tokens(
            [END, "<|startoftranscript|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
        )
        return Subword(tokenizer.to_str(), None)


def _capped(texts: Iterable[str], characters: int = 200_000_000) -> Iterator[str]:
    """So much of the texts as learning subwords is better for; what comes after would only cost memory."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _bert(hf: Any, model: Any, lowercase: bool) -> Any:
    tokenizer = hf.Tokenizer(model)
    tokenizer.normalizer = hf.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = hf.decoders.WordPiece()
    return tokenizer


def _finish(tokenizer: Any, end: bool, special: Sequence[str] = ()) -> Subword:
    """With special tokens, and one between documents, where asked for: its own if it has them, else new ones."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    name = next((name for name in _ENDS if name in vocabulary), None)
    if end and name is None:
        tokenizer.add_special_tokens([END])
        name = END
    if special:
        has = Subword(tokenizer.to_str(), None).special
        tokenizer.add_special_tokens([ROLES[role][0] for role in special if role not in has])
    if {"cls", "sep"} <= set(special) and tokenizer.post_processor is None:  # for those who load it elsewhere
        roles = Subword(tokenizer.to_str(), None).special
        cls, sep = (tokenizer.id_to_token(roles[role]) for role in ("cls", "sep"))
        tokenizer.post_processor = _hugging_face().processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(cls, roles["cls"]), (sep, roles["sep"])],
        )
    return Subword(tokenizer.to_str(), tokenizer.token_to_id(name) if end else None)


def _hugging_face() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # no warning where a process forks later
    import tokenizers

    return tokenizers


# ---------------------------------------------------------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """A published tokenizer, with the special tokens that it has (``fit`` adds none but the end).

    Attributes:
      path: a ``tokenizer.json`` of Hugging Face, a ``vocab.txt`` of BERT, a ``.model`` or ``.spm`` of SentencePiece, a
        ``vocab.json`` with ``merges.txt`` beside it (GPT-2, Whisper) or without (characters; wav2vec 2.0); or a folder
        with the three files of a Marian model (see ``source_tokenizer``), or with one of those, sought in this order.
      lowercase: of a ``vocab.txt``: lower-case the text first; None: as ``tokenizer_config.json`` beside it says, or
        else if no entry of the vocabulary has a capital letter.
    """

    path: str
    lowercase: bool | None = None

    def fit(self, texts: Texts, others: Texts, end: bool, special: Sequence[str] = ()) -> Tokenizer:
        """
        Raises:
          UserError: there is no such file, or it is not what its name says.
        """
        path, *more = self._files()
        hf = _hugging_face()
        with one_sentence(f"{self.path if more else path} is not a tokenizer that can be read"):
            if more:
                return _marian(path, [self._read(p) for p in (path, *more)], end)
            if path.endswith(".txt"):
                tokenizer = self._wordpiece(hf, path)
            elif os.path.basename(path) == "vocab.json":
                tokenizer = self._vocabulary(hf, path)
                attempt(tokenizer.to_str(), path)
            elif path.endswith((".model", ".spm")):
                tokenizer = _sentencepiece(hf, self._read(path))
                attempt(tokenizer.to_str(), path)
            else:
                content = self._read(path).decode()
                check(content, path)
                tokenizer = hf.Tokenizer.from_str(content)
        return _finish(tokenizer, end)

    def file_signature(self) -> tuple[str | int, ...]:
        """Name, size in bytes and modification time in ns of each file; raises UserError if there is none."""
        stats = [(os.path.basename(path), os.stat(path)) for path in self._files()]
        return tuple(value for name, stat in stats for value in (name, stat.st_size, stat.st_mtime_ns))

    def _files(self) -> list[str]:
        path = os.path.expanduser(self.path)
        if os.path.isfile(path):
            return [path]
        if not os.path.isdir(path):
            raise UserError(f"there is no tokenizer at {self.path}.")
        names = sorted(os.listdir(path))
        if "source.spm" in names:
            if "target_vocab.json" in names:
                raise UserError(f"{self.path} has a vocabulary for each language; known here is one for both.")
            if absent := [name for name in _MARIAN if name not in names]:
                raise UserError(f"{self.path} has source.spm but no {' and no '.join(absent)}.")
            return [os.path.join(path, name) for name in _MARIAN]
        for wanted in ("tokenizer.json", "vocab.txt", ".model", "vocab.json"):
            for name in names:
                if name == wanted or (wanted == ".model" and name.endswith(wanted)):
                    return [os.path.join(path, name)]
        raise UserError(f"{self.path} has no tokenizer.json, vocab.txt, vocab.json or *.model.")

    def _read(self, path: str) -> bytes:
        """A file; where it was found in a folder, one of that folder."""
        return read_regular(path, None if path == os.path.expanduser(self.path) else os.path.dirname(path))

    def _vocabulary(self, hf: Any, path: str) -> Any:
        """That of ``vocab.json``: byte-level BPE with ``merges.txt`` and ``added_tokens.json`` beside it; or, without
        merges, a token for each character, of which one stands between words (``Wav2Vec2CTCTokenizer``)."""
        folder = os.path.dirname(path)
        vocabulary = parse_json(self._read(path), path)
        check_ids(vocabulary.values(), path)

        def beside(name: str) -> dict[str, Any]:
            there = os.path.join(folder, name)
            return dict(read_object(there)) if os.path.isfile(there) else {}

        merges, said = os.path.join(folder, "merges.txt"), beside("tokenizer_config.json")
        if os.path.isfile(merges):
            lines = self._read(merges).decode().splitlines()
            pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
            tokenizer = hf.Tokenizer(hf.models.BPE(vocabulary, pairs))
            tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = hf.decoders.ByteLevel()
            added = beside("added_tokens.json")
            check_ids(added.values(), folder)
            names = sorted(added, key=lambda name: int(added[name]))
            tokenizer.add_special_tokens([END] * (END in vocabulary) + [n for n in names if n not in vocabulary])
            if any(tokenizer.token_to_id(name) != added[name] for name in names):
                raise UserError("its added tokens do not follow its vocabulary")
            return tokenizer
        between, unknown = said.get("word_delimiter_token", "|"), said.get("unk_token", "<unk>")
        if not isinstance(between, str) or not isinstance(unknown, str) or unknown not in vocabulary:
            raise UserError("it has no merges.txt beside it, and no token for what is unknown")
        lower = said.get("do_lower_case") is True and len({key.lower() for key in vocabulary}) == len(vocabulary)
        pieces = {
            "▁" if key == between else key.lower() if lower and len(key) == 1 else key: token
            for key, token in vocabulary.items()
        }
        tokenizer = hf.Tokenizer(hf.models.WordLevel(pieces, unk_token=unknown))
        rules = [hf.normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = hf.normalizers.Sequence([*([hf.normalizers.Lowercase()] if lower else []), *rules])
        tokenizer.pre_tokenizer = hf.pre_tokenizers.Split(hf.Regex("."), "isolated")
        tokenizer.decoder = hf.decoders.Sequence([hf.decoders.Replace("▁", " "), hf.decoders.Fuse()])
        tokenizer.add_special_tokens([key for key in vocabulary if len(key) > 1])
        return tokenizer

    def _wordpiece(self, hf: Any, path: str) -> Any:
        data = self._read(path)
        check_ids(range(data.count(b"\n")), path)
        pieces = [line.rstrip("\n") for line in io.StringIO(data.decode(), newline=None)]
        if "[UNK]" not in pieces:
            raise UserError(f"{path} has no entry [UNK]; a vocab.txt of BERT holds one entry a line.")
        lowercase = self.lowercase
        beside = os.path.join(os.path.dirname(path), "tokenizer_config.json")
        if lowercase is None and os.path.isfile(beside):
            lowercase = read_object(beside).get("do_lower_case")
        if lowercase is None:
            lowercase = not any(p != p.lower() for p in pieces if not p.startswith("["))
        model = hf.models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
        tokenizer = _bert(hf, model, lowercase)
        tokenizer.add_special_tokens([piece for piece in _BERT if piece in pieces])
        return tokenizer


def _marian(path: str, contents: Sequence[bytes], end: bool) -> Marian:
    pieces = parse_json(contents[0], path)
    for name in ("<unk>", "</s>"):
        if name not in pieces:
            raise UserError(f"{path} has no {name}.")
    models = [base64.b64encode(model).decode() for model in contents[1:]]
    made = Marian(pieces, models, pieces["</s>"] if end else None)
    assert made.source  # which is read as well
    return made


def _sentencepiece(hf: Any, data: bytes, special: bool = True) -> Any:
    """The tokenizer in a ``.model`` (sentencepiece_model.proto), made as transformers' converter makes it.

    Without ``special``, its unknown and control pieces have no name, and no text holds them.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # whose bytes protobuf alone reads, which is made for those of anybody
    if len(data) > limit(_MOST_MODEL):  # parsed, empty pieces take 24 times their bytes
        raise too_much(f"it is larger than {limit(_MOST_MODEL):,} bytes")
    try:
        model = proto.ModelProto.FromString(data)
    except DecodeError as error:
        raise UserError("it is not a SentencePiece model.") from error
    if not model.pieces:
        raise UserError("it holds no pieces.")
    if len(model.pieces) > limit(MOST_PIECES):
        raise too_much(f"it holds more than {limit(MOST_PIECES):,} pieces")
    sizes = [len(piece.piece.encode()) for piece in model.pieces]
    if not min(sizes):
        raise UserError("it holds a piece without a name.")
    if max(sizes) > _MOST_PIECE:
        raise UserError(f"it holds a piece of more than {_MOST_PIECE:,} bytes.")
    piece, trainer, normalizer = proto.ModelProto.SentencePiece, model.trainer_spec, model.normalizer_spec
    kinds = [entry.type for entry in model.pieces]
    nameless = () if special else (piece.UNKNOWN, piece.CONTROL)
    names = [  # U+FDD0 is a character that Unicode has given to nobody
        f"\ufdd0{i}" if entry.type in nameless else entry.piece for i, entry in enumerate(model.pieces)
    ]
    scores = [entry.score for entry in model.pieces]
    unknown = kinds.index(piece.UNKNOWN) if piece.UNKNOWN in kinds else None
    unigram = trainer.model_type == trainer.UNIGRAM
    if unigram:
        core = hf.models.Unigram(
            list(zip(names, scores, strict=True)), unk_id=unknown, byte_fallback=trainer.byte_fallback
        )
    elif trainer.model_type == trainer.BPE:
        vocabulary = {name: i for i, name in enumerate(names)}
        merges = [  # the pairs whose union is an entry, in the order of the entries (their scores fall)
            (score, left, right, name[:cut], name[cut:])
            for name, score, kind in zip(names, scores, kinds, strict=True)
            for cut in range(1, len(name) if kind == piece.NORMAL else 0)
            if (left := vocabulary.get(name[:cut])) is not None and (right := vocabulary.get(name[cut:])) is not None
        ]
        merges.sort(key=lambda m: (-m[0], m[1], m[2]))
        core = hf.models.BPE(
            vocabulary,
            [(a, b) for *_, a, b in merges],
            unk_token=None if unknown is None else names[unknown],
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        raise UserError("it is of SentencePiece's word or character kind; unigram and bpe can be read.")
    tokenizer = hf.Tokenizer(core)
    rules = []
    if charsmap := normalizer.precompiled_charsmap:
        if charsmap_growth(charsmap) > 64:
            raise UserError("its rules make more than 64 characters of one.")
        rules.append(hf.normalizers.Precompiled(charsmap))
    if normalizer.remove_extra_whitespaces:
        rules += [hf.normalizers.Replace(hf.Regex(r"\A +| +\z"), ""), hf.normalizers.Replace(hf.Regex(" {2,}"), " ")]
    if rules:
        tokenizer.normalizer = hf.normalizers.Sequence(rules)
    prefix = "always" if normalizer.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme=prefix, split=unigram)
    joined = [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    tokenizer.decoder = hf.decoders.Sequence(joined + ([hf.decoders.Strip(" ", 1, 0)] if prefix == "always" else []))
    if special:
        apart = (piece.UNKNOWN, piece.CONTROL)
        tokenizer.add_special_tokens([name for name, kind in zip(names, kinds, strict=True) if kind in apart])
    return tokenizer
