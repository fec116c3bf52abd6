"""Tokenizers: text <-> integers. Bytes, characters, and whatever Hugging Face's ``tokenizers`` trains or loads.

What a config names (``Bytes``, ``Characters``, ``Subwords``, ``TokenizerFile``) is fitted to the training text once;
the ``Tokenizer`` that results is kept as one string among the data's facts, so a run needs no other file to read text.

Axes: T tokens of a text, V entries of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError

END = "<|endoftext|>"
"""The name of the token between documents, where a tokenizer has none of its own."""
_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")  # of published tokenizers
_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_NEVER = -1e4  # log-probability of a Unigram's byte pieces: the last resort

Texts = Callable[[], Iterator[str]]
"""Gives the training texts from the start, as often as it is called."""


class Tokenizer(Protocol):
    """Text <-> integers.

    Attributes:
      size: V; tokens are 0 to V - 1.
      end: the token between documents, which no text contains; None: there is none.
      token_bytes: i32[V], how many bytes of UTF-8 each token stands for; None where that depends on the text around.
    """

    size: int
    end: int | None
    token_bytes: np.ndarray | None

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens i32[T], bytes i32[T]) of each text: how many of its bytes each token stands for.

        The sum of the bytes is the text's length in UTF-8, but for text that has no tokens at all.

        Raises:
          UserError: a text cannot be written with this vocabulary.
        """
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; the end between documents has none, and bytes that are not UTF-8 become U+FFFD."""
        ...

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """Each token by itself, as a person reads it."""
        ...

    def state(self) -> str:
        """All there is to know, for ``load``."""
        ...


def load(state: str) -> Tokenizer:
    """The tokenizer of ``Tokenizer.state()``."""
    return _load(state)


@functools.lru_cache(maxsize=4)
def _load(state: str) -> Tokenizer:
    given = json.loads(state)
    kind = given.pop("kind")
    return Symbols(**given) if kind == "symbols" else Subword(**given)


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The tokens of one text, i32[T]; raises UserError if it cannot be written with this vocabulary."""
    return tokenizer.encode_batch([text])[0][0]


# ------------------------------------------------------------------------------------------------- bytes and characters


class Symbols:
    """Tokens that are characters, and bytes for all other characters: ``decode`` gives any text back exactly.

    Attributes: see ``Tokenizer``. Tokens are the ``characters``, then (where ``fallback``) the 256 bytes, then the end.
    """

    def __init__(self, characters: str = "", fallback: bool = True, end: bool = False):
        """
        Args:
          characters: each once; "" and ``fallback``: the tokens are bytes.
          fallback: write other characters as their bytes of UTF-8, instead of refusing them.
          end: have a token between documents.
        """
        self.characters, self.fallback = characters, fallback
        self._base = len(characters)
        spelled = [c.encode() for c in characters] + [bytes([b]) for b in range(256)] * fallback + [b""] * end
        self._spelled = spelled
        self.size = len(spelled)
        self.end = len(spelled) - 1 if end else None
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

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join([self._spelled[t] for t in tokens]).decode(errors="replace")

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        return [END if t == self.end else self._spelled[t].decode(errors="backslashreplace") for t in tokens]

    def state(self) -> str:
        given = {"characters": self.characters, "fallback": self.fallback, "end": self.end is not None}
        return json.dumps({"kind": "symbols", **given}, ensure_ascii=False)


def _codes(text: str) -> np.ndarray:
    """Code points, u32[characters]."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _utf8_lengths(codes: np.ndarray) -> np.ndarray:
    """Bytes of each character in UTF-8 (RFC 3629)."""
    return 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """256 tokens, one for each byte of UTF-8: any language, no training, ``decode`` exact."""

    def fit(self, texts: Texts, others: Texts, end: bool) -> Tokenizer:
        """``end``: have a token between documents."""
        return Symbols(end=end)


@dataclasses.dataclass(frozen=True)
class Characters:
    """One token for each character of the training text, in order of code points.

    Attributes:
      fallback: 256 more tokens, so that any other character is spelled in bytes. False: text with another character is
        refused. None: only where validation or test text has such characters.
    """

    fallback: bool | None = None

    def fit(self, texts: Texts, others: Texts, end: bool) -> Tokenizer:
        known = _characters(texts)
        fallback = bool(_characters(others) - known) if self.fallback is None else self.fallback
        return Symbols("".join(sorted(known)), fallback, end)


def _characters(texts: Texts) -> set[str]:
    found: set[str] = set()
    for text in texts():
        found.update(text)
    return found


# --------------------------------------------------------------------------------------------------- subwords


class Subword:
    """A tokenizer of Hugging Face's ``tokenizers``, without the special tokens that it may put around a text.

    What looks like a special token in a text is text: ``"<|endoftext|>"`` in a document never ends one.
    """

    def __init__(self, tokenizer: str, end: int | None):
        """``tokenizer``: the contents of a ``tokenizer.json``; ``end``: see ``Tokenizer``."""
        self._json = tokenizer
        self._tokenizer = _hugging_face().Tokenizer.from_str(tokenizer)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.end = end
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        given = json.loads(tokenizer)
        self._added = {entry["id"]: entry for entry in given["added_tokens"]}
        self._byte_level = any(part["type"] == "ByteLevel" for part in _flat(given["decoder"], "decoders"))
        self.token_bytes = self._table(given)

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        for text, encoding in zip(texts, self._tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            tokens_T = np.array(encoding.ids, np.int32)
            if self.token_bytes is not None:
                found.append((tokens_T, self.token_bytes[tokens_T]))
                continue
            # A token stands for the text from the end of those before it to its own; the last one for the rest too.
            byte_at = np.concatenate([[0], np.cumsum(_utf8_lengths(_codes(text)))])
            ends = np.array([stop for _, stop in encoding.offsets], np.int64)
            reached_T = byte_at[np.maximum.accumulate(ends)] if len(ends) else ends
            reached_T[-1:] = byte_at[-1]
            found.append((tokens_T, np.diff(reached_T, prepend=0).astype(np.int32)))
        return found

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode([int(t) for t in tokens if t != self.end], skip_special_tokens=False)

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        spelled = [(t, self._tokenizer.id_to_token(int(t)) or f"<{t}>") for t in tokens]
        if not self._byte_level:
            return [piece for _, piece in spelled]
        raw = _byte_of_character()
        return [
            piece if int(t) in self._added else bytes(raw[c] for c in piece).decode(errors="backslashreplace")
            for t, piece in spelled
        ]

    def state(self) -> str:
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


@dataclasses.dataclass(frozen=True)
class Subwords:
    """Subwords learned from the training text.

    Attributes:
      algorithm: "bpe" (byte-level, Radford et al. 2019), "unigram" (Kudo 2018, with bytes for other characters) or
        "wordpiece" (as BERT's, cased). ``decode`` is exact for "bpe" and, but for U+2581, for "unigram"; "wordpiece"
        loses spaces and writes unknown words as [UNK]. Training "unigram" or "wordpiece" twice may give two
        vocabularies; a run keeps its own.
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
        known = ("bpe", "unigram", "wordpiece")
        if self.algorithm not in known:
            raise UserError(f"there is no algorithm {self.algorithm!r}.{suggest(self.algorithm, known, 'algorithm')}")
        least = 257 if self.algorithm == "bpe" else 16
        if self.vocab_size < least:
            raise UserError(f"vocab_size is {self.vocab_size}; {self.algorithm} needs at least {least}.")

    def fit(self, texts: Texts, others: Texts, end: bool) -> Tokenizer:
        hf = _hugging_face()
        tokenizer, trainer = getattr(self, f"_{self.algorithm}")(hf)
        tokenizer.train_from_iterator(_capped(texts()), trainer)
        given = json.loads(tokenizer.to_str())
        if self.algorithm == "unigram":
            model = given["model"]
            model["vocab"] += [[f"<0x{b:02X}>", _NEVER] for b in range(256)]
            model["byte_fallback"] = True
            given["added_tokens"] = []  # "<unk>" in a text is text
            joined = [{"type": "ByteFallback"}, {"type": "Fuse"}, given["decoder"]]
            given["decoder"] = {"type": "Sequence", "decoders": joined}
        return _finish(hf.Tokenizer.from_str(json.dumps(given)), end)

    def _bpe(self, hf: Any) -> tuple[Any, Any]:
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

    def _unigram(self, hf: Any) -> tuple[Any, Any]:
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

    def _wordpiece(self, hf: Any) -> tuple[Any, Any]:
        tokenizer = _bert(hf, hf.models.WordPiece(unk_token="[UNK]"), lowercase=False)
        return tokenizer, hf.trainers.WordPieceTrainer(
            vocab_size=self.vocab_size,
            min_frequency=self.min_frequency,
            special_tokens=list(_BERT),
            show_progress=False,
        )


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


def _finish(tokenizer: Any, end: bool) -> Subword:
    """With a token between documents where that is asked for: its own if it has one, else a new one."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    name = next((name for name in _ENDS if name in vocabulary), None)
    if end and name is None:
        tokenizer.add_special_tokens([END])
        name = END
    return Subword(tokenizer.to_str(), tokenizer.token_to_id(name) if end else None)


def _hugging_face() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # no warning where a process forks later
    import tokenizers

    return tokenizers


# ---------------------------------------------------------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """A published tokenizer.

    Attributes:
      path: a ``tokenizer.json`` of Hugging Face, a ``vocab.txt`` of BERT, a ``.model`` of SentencePiece, or a folder
        with one of them (sought in this order).
      lowercase: of a ``vocab.txt``: lower-case the text first; None: as ``tokenizer_config.json`` beside it says, or
        else if no entry of the vocabulary has a capital letter.
    """

    path: str
    lowercase: bool | None = None

    def fit(self, texts: Texts, others: Texts, end: bool) -> Tokenizer:
        """
        Raises:
          UserError: there is no such file, or it is not what its name says.
        """
        path = self._file()
        hf = _hugging_face()
        try:
            if path.endswith(".txt"):
                tokenizer = self._wordpiece(hf, path)
            elif path.endswith(".model"):
                with open(path, "rb") as file:
                    tokenizer = _sentencepiece(hf, file.read())
            else:
                tokenizer = hf.Tokenizer.from_file(path)
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(
                f"{path} is not a tokenizer that can be read: {str(error) or type(error).__name__}."
            ) from error
        return _finish(tokenizer, end)

    def stamp(self) -> tuple[str, int, int]:
        """Name, size in bytes and modification time in ns of the file; raises UserError if there is none."""
        path = self._file()
        stat = os.stat(path)
        return os.path.basename(path), stat.st_size, stat.st_mtime_ns

    def _file(self) -> str:
        path = os.path.expanduser(self.path)
        if os.path.isfile(path):
            return path
        if not os.path.isdir(path):
            raise UserError(f"there is no tokenizer at {self.path}.")
        names = sorted(os.listdir(path))
        for wanted in ("tokenizer.json", "vocab.txt", ".model"):
            for name in names:
                if name == wanted or (wanted == ".model" and name.endswith(wanted)):
                    return os.path.join(path, name)
        raise UserError(f"{self.path} has no tokenizer.json, vocab.txt or *.model.")

    def _wordpiece(self, hf: Any, path: str) -> Any:
        with open(path, encoding="utf-8") as file:
            pieces = [line.rstrip("\r\n") for line in file]
        if "[UNK]" not in pieces:
            raise UserError(f"{path} has no entry [UNK]; a vocab.txt of BERT holds one entry a line.")
        lowercase = self.lowercase
        beside = os.path.join(os.path.dirname(path), "tokenizer_config.json")
        if lowercase is None and os.path.isfile(beside):
            with open(beside, encoding="utf-8") as file:
                lowercase = json.load(file).get("do_lower_case")
        if lowercase is None:
            lowercase = not any(p != p.lower() for p in pieces if not p.startswith("["))
        model = hf.models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
        tokenizer = _bert(hf, model, lowercase)
        tokenizer.add_special_tokens([piece for piece in _BERT if piece in pieces])
        return tokenizer


def _sentencepiece(hf: Any, data: bytes) -> Any:
    """The tokenizer in a ``.model`` (sentencepiece_model.proto), made as transformers' converter makes it."""
    model = _fields(data)
    pieces = [_fields(piece) for piece in model.get(1, [])]
    if not pieces:
        raise UserError("it holds no pieces.")
    names = [piece[1][0].decode() for piece in pieces]
    scores = [struct.unpack("<f", piece[2][0])[0] if 2 in piece else 0.0 for piece in pieces]
    kinds = [piece.get(3, [1])[0] for piece in pieces]  # 1 normal, 2 unknown, 3 control, 4 user-defined, 6 byte
    trainer, normalizer = (_fields(model[key][0]) if key in model else {} for key in (2, 3))
    unknown = kinds.index(2) if 2 in kinds else None
    byte_fallback = bool(trainer.get(35, [0])[0])
    if trainer.get(3, [1])[0] == 1:
        core = hf.models.Unigram(list(zip(names, scores, strict=True)), unk_id=unknown, byte_fallback=byte_fallback)
    elif trainer[3][0] == 2:
        vocabulary = {name: i for i, name in enumerate(names)}
        merges = [  # the pairs whose union is an entry, in the order of the entries (their scores fall)
            (score, left, right, name[:cut], name[cut:])
            for name, score, kind in zip(names, scores, kinds, strict=True)
            for cut in range(1, len(name) if kind == 1 else 0)
            if (left := vocabulary.get(name[:cut])) is not None and (right := vocabulary.get(name[cut:])) is not None
        ]
        merges.sort(key=lambda m: (-m[0], m[1], m[2]))
        core = hf.models.BPE(
            vocabulary,
            [(a, b) for *_, a, b in merges],
            unk_token=None if unknown is None else names[unknown],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    else:
        raise UserError("it is of SentencePiece's word or character kind; unigram and bpe can be read.")
    tokenizer = hf.Tokenizer(core)
    rules = []
    if normalizer.get(2, [b""])[0]:
        rules.append(hf.normalizers.Precompiled(normalizer[2][0]))
    if normalizer.get(4, [1])[0]:
        rules += [hf.normalizers.Strip(), hf.normalizers.Replace(hf.Regex(" {2,}"), " ")]
    if rules:
        tokenizer.normalizer = hf.normalizers.Sequence(rules)
    prefix = "always" if normalizer.get(3, [1])[0] else "never"
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme=prefix, split=trainer.get(3, [1])[0] == 1)
    joined = [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    tokenizer.decoder = hf.decoders.Sequence(joined + ([hf.decoders.Strip(" ", 1, 0)] if prefix == "always" else []))
    tokenizer.add_special_tokens([name for name, kind in zip(names, kinds, strict=True) if kind in (2, 3)])
    return tokenizer


def _fields(data: bytes) -> dict[int, list[Any]]:
    """The fields of a protocol buffer message by number: integers, or bytes (protobuf.dev, "Encoding").

    Raises:
      ValueError: it is not one.
    """

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError("it is not a SentencePiece model")
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at

    fields: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        key, at = varint(at)
        value: Any
        if key & 7 == 0:
            value, at = varint(at)
        elif key & 7 in (1, 2, 5):
            size, at = varint(at) if key & 7 == 2 else (8 if key & 7 == 1 else 4, at)
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError("it is not a SentencePiece model")
        else:
            raise ValueError("it is not a SentencePiece model")
        fields.setdefault(key >> 3, []).append(value)
    return fields
