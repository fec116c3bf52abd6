"""What files that somebody sent may cost: every default, and the two ways to raise one.

``BIGBASE_LIMITS=2`` in the environment doubles every limit, for this process and those that it starts. Those of a data
set can be set one by one beside that (``data.files.Limits``, ``--config.data.dataset.limits.pixels=...``).
"""

from __future__ import annotations

import os

from bigbase_jax.core import UserError

VARIABLE = "BIGBASE_LIMITS"

# Of a data set; see ``data.files.Limits``.
PIXELS = 1 << 26  # of a picture
SECONDS = 3600.0  # of a recording that is decoded at once
TEXT = 1 << 22  # characters of a line, a row or a record
RATIO = 200.0  # bytes that come out of a packed file for each byte of it,
FREE = 1 << 26  # beyond those that any file may hold, however small it is

# Of a published folder, a run, a tokenizer or a template.
MOST_BYTES = 64 << 20  # of a file that is read whole; the largest published tokenizer.json has 34 MB
MOST_VALUES = 4_000_000  # of a JSON file, about 100 bytes in memory each; the largest tokenizer.json has 2.3 million
MOST_HEADER = 16 << 20  # of a safetensors file, in bytes: 100,000 tensors
MOST_UNPACKED = 1 << 29  # of an .npz file, in bytes
MOST_PIECES = 1 << 20  # entries of a vocabulary; the largest published one, of XLM-V, has 901,629
MOST_RULES = 64  # in a row, of what a tokenizer does
MOST_WORD = 1000  # characters; the time that WordPiece takes for a word grows with their square
GROWTH = 256  # published tokenizers grow a text to 72 times its characters at most, for what NFKC may make of one
MEMORY = 1 << 30  # of what a tokenizer or a template computes, in bytes of addresses


def limit(default: float) -> int:
    """``default`` times what the environment variable says (1); raises UserError if that is no number."""
    given = os.environ.get(VARIABLE, "1")
    try:
        return max(int(default * float(given)), 1)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{VARIABLE}={given!r} is no number; 2 doubles what files from elsewhere may cost.") from error


def too_much(what: str, cure: str | None = None) -> UserError:
    """The sentence for what is over a limit, with the way to raise it: ``cure``, where a config has a key for it."""
    if cure is None:
        return UserError(
            f"{what}; if you trust it, set the environment variable {VARIABLE}=2 (or 4, ...) to raise the limit."
        )
    return UserError(f"{what}; if it is honest, {cure} (or set {VARIABLE}=2 to double every limit).")
