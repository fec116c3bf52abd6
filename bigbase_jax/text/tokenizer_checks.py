"""What a tokenizer that somebody sent may ask for: checked in its file, then tried once in a process that may crash."""

from __future__ import annotations

import base64
import contextlib
import functools
import math
import multiprocessing
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from bigbase_jax.core import UserError
from bigbase_jax.runtime.limits import GROWTH, MOST_PIECES, MOST_RULES, MOST_WORD, limit, too_much
from bigbase_jax.runtime.untrusted import Refused, ask, parse_json

_DEPTH = 8
_GROWS = {"ByteLevel": 4, "BertNormalizer": 3, "Metaspace": 2, "WordPiece": 2, "BPEDecoder": 2}
_PARTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}


@contextlib.contextmanager
def one_sentence(wrong: str) -> Iterator[None]:
    """What goes wrong with what somebody sent, as a UserError; Rust's panics, which are no ``Exception``, too."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _panic(error):
            raise
        raise UserError(f"{wrong}: {_reason(error)}.") from error


@contextlib.contextmanager
def library() -> Iterator[None]:
    """What Hugging Face's ``tokenizers`` raises while it is used: bare Exceptions, and panics."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and not _panic(error):
            raise
        raise UserError(f"the tokenizer fails with this text ({_reason(error)}); take another tokenizer.") from error


def _panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def _reason(error: BaseException) -> str:
    name = type(error).__name__
    text = str(error).partition("\n")[0].rstrip(".")
    return text if text and not isinstance(error, LookupError) else f"{name} {text}".strip()


def check(content: str, name: str) -> None:
    """
    Args:
      content: of a ``tokenizer.json``.
      name: of the file, for sentences.

    Raises:
      UserError: it would take too much time or memory, crashes, or is no such file.
    """
    with one_sentence(f"{name} is not a tokenizer that can be read"):
        given = parse_json(content, name)
        model, added = given["model"], given["added_tokens"]
        pieces = model["vocab"]
        ids = [token["id"] for token in added]
        check_ids([*pieces.values(), *ids] if isinstance(pieces, dict) else [*range(len(pieces)), *ids], name)
        if not all(isinstance(t["content"], str) and isinstance(t["special"], bool) for t in added):
            raise UserError(f"{name} has added_tokens that are none.")
        word = model.get("max_input_chars_per_word") or 0
        if not isinstance(word, int) or word > limit(MOST_WORD):
            raise too_much(f"{name} has max_input_chars_per_word={word!r}; known are up to {limit(MOST_WORD):,}")
        rules = {part: _flat(given.get(part), key, name) for part, key in _PARTS.items()}
        before = [*rules["normalizer"], *rules["pre_tokenizer"]]
        for part, some in (
            ("rules", before),
            ("decoder", rules["decoder"]),
            ("post_processor", rules["post_processor"]),
        ):
            if math.prod(map(_growth, some)) > limit(GROWTH):
                raise too_much(f"{name}: its {part} let a text grow to more than {limit(GROWTH):,} times its length")
    attempt(content, name)


def attempt(content: str, name: str) -> None:
    """Uses a ``tokenizer.json`` once elsewhere, but in processes that this one has started: here it was tried.

    Raises:
      UserError: it fails, or takes too much time or memory.
    """
    if multiprocessing.parent_process() is None:
        try:
            ask(f"{name}: the tokenizer", "try_tokenizer", 6, content=content)
        except Refused as error:
            raise UserError(f"{name} is not a tokenizer that can be read: {error}.") from error


def check_ids(ids: Collection[Any], name: str) -> None:
    """Raises UserError for token ids that are no numbers from 0 to about as many as there are, or for too many."""
    if len(ids) > limit(MOST_PIECES):
        raise too_much(f"{name} has a vocabulary of {len(ids):,} entries, more than {limit(MOST_PIECES):,}")
    most = 2 * len(ids) + (1 << 16)
    for token in ids:
        if type(token) is not int or not 0 <= token < most:
            shown = repr(token)[:40]
            raise UserError(
                f"{name} has the token id {shown} in a vocabulary of {len(ids):,} entries, which count from 0."
            )


def _flat(node: Any, key: str, name: str, depth: int = _DEPTH) -> list[dict[str, Any]]:
    """The rules of a pipeline in a ``tokenizer.json``, in order."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    found = [] if depth == 0 else [rule for part in node[key] for rule in _flat(part, key, name, depth - 1)]
    if depth == 0 or len(found) > limit(MOST_RULES):
        raise too_much(f"{name} has {key} of more than {limit(MOST_RULES)} rules, or {_DEPTH} levels")
    return found


def _growth(rule: Mapping[str, Any]) -> int:
    """How many times its characters a text may have after a rule, but for what NFKC may make of a character."""
    kind = rule["type"]
    if kind == "Replace":
        size, pattern = _size(rule["content"]), rule["pattern"].get("String")
        return 1 + size if not pattern else max(-(-size // len(pattern)), 1)  # a regex may match between characters
    if kind == "Prepend":
        return 1 + _size(rule["prepend"])
    if kind == "Precompiled":
        return charsmap_growth(base64.b64decode(rule["precompiled_charsmap"], validate=True))
    if kind == "TemplateProcessing":
        return max(len(rule["single"]), len(rule["pair"]), 1)
    return _GROWS.get(kind, 1)


def charsmap_growth(data: bytes) -> int:
    """How many characters the rules of a SentencePiece model make of one: a trie, and the texts that it points to.

    Raises:
      UserError: it is cut short.
    """
    start = 4 + int.from_bytes(data[:4], "little")
    if len(data) < 4 or start > len(data) or start % 4:
        raise UserError("its precompiled_charsmap is damaged: it claims more than it holds.")
    return max(1, *(_size(text.decode(errors="replace")) for text in data[start:].split(b"\0")))


@functools.lru_cache(maxsize=1024)
def _size(text: str) -> int:
    return len(unicodedata.normalize("NFKD", text))
