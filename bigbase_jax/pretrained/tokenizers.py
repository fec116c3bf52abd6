"""Tokenizers of ours as the files that transformers' ``AutoTokenizer`` loads."""

from __future__ import annotations

import json
from typing import Any

from bigbase_jax.text.tokenizer import Marian, Subword, Symbols, Tokenizer

_ROLES = {"cls": "cls_token", "sep": "sep_token", "pad": "pad_token", "mask": "mask_token", "start": "bos_token"}


def published(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The contents of ``tokenizer.json``, or of the three files of Marian's, and of ``tokenizer_config.json``."""
    if isinstance(tokenizer, Marian):
        return {**tokenizer.files(), "tokenizer_config.json": _json({"tokenizer_class": "MarianTokenizer"})}
    if isinstance(tokenizer, Symbols):
        content = _of_symbols(tokenizer)
    else:
        assert isinstance(tokenizer, Subword), tokenizer
        content = json.loads(tokenizer.state())["tokenizer"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    roles = {_ROLES[role]: token for role, token in tokenizer.special.items() if role in _ROLES}
    if tokenizer.end is not None:
        roles["eos_token"] = tokenizer.end
    config |= {name: tokenizer.pieces([token])[0] for name, token in roles.items()}
    return {"tokenizer.json": content.encode(), "tokenizer_config.json": _json(config)}


def ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """What ``config.json`` says of special tokens; None where there are none, as transformers has defaults."""
    return {
        "bos_token_id": tokenizer.special.get("start"),
        "eos_token_id": tokenizer.end,
        "pad_token_id": tokenizer.special.get("pad"),
    }


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


def _of_symbols(tokenizer: Symbols) -> str:
    """Characters as a byte-pair encoding without pairs: those that it does not have fall back to bytes."""
    import tokenizers as hf

    bytes_ = [f"<0x{b:02X}>" for b in range(256)] if tokenizer.fallback else []
    vocabulary = {piece: i for i, piece in enumerate([*tokenizer.characters, *bytes_])}
    found = hf.Tokenizer(hf.models.BPE(vocabulary, [], byte_fallback=tokenizer.fallback))
    found.decoder = hf.decoders.Sequence([hf.decoders.ByteFallback(), hf.decoders.Fuse()])
    found.add_special_tokens(tokenizer.pieces(range(len(vocabulary), tokenizer.size)))
    return found.to_str()
