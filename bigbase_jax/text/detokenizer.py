"""The text of tokens that come one by one: no broken characters, and nothing of a text at which to stop."""

from __future__ import annotations

import codecs
import contextlib
import functools
from collections.abc import Sequence

from bigbase_jax.text.tokenizer import Tokenizer, load


class IncrementalDetokenizer:
    """The text of tokens that come one by one, for someone who reads along.

    Incomplete characters are held back, and so is what may become a stop text.

    Args:
      tokenizer: whose tokens they are.
      before: the tokens before, such as a prompt's; some tokens are spelled by those before them.
      stop: texts at which the text ends.

    Attributes:
      text: what has been given so far.
      stopped: whether a stop text has come.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), stop: Sequence[str] = ()):
        self.text, self.stopped = "", False
        self._tokenizer, self._stop, self._held = tokenizer, tuple(stop), ""
        self._spelled = _spelled(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._known = [int(token) for token in before][-8:]
        if self._spelled is not None:  # the last character before may be incomplete
            self._utf8.decode(b"".join(self._bytes(token) for token in self._known))
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """What may be shown now that this token has come."""
        return self._show(self._of(int(token)))

    def finish(self) -> str:
        """The rest; of an incomplete character, U+FFFD."""
        if self.stopped:
            return ""
        if self._spelled is not None:
            rest = self._utf8.decode(b"", True)
        else:
            rest = self._difference()
            self._new = []
        return self._show(rest, last=True)

    def _of(self, token: int) -> str:
        """The characters that this token completes."""
        if self._spelled is not None:
            return self._utf8.decode(self._bytes(token))
        self._new.append(token)
        text = self._difference()
        if text.endswith("\ufffd") and len(self._new) < 4:  # as many bytes as a character has
            return ""
        self._known = [*self._known, *self._new][-8:]
        self._new = []
        return text

    def _bytes(self, token: int) -> bytes:
        return b"".join((self._spelled or [])[token : token + 1])  # none: only the model has this token

    def _difference(self) -> str:
        before = self._tokenizer.decode(self._known)
        return self._tokenizer.decode([*self._known, *self._new])[len(before) :]

    def _show(self, new: str, last: bool = False) -> str:
        if self.stopped:
            return ""
        held = self._held + new
        found = [at for at in (held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, keep = True, min(found)
        elif last:
            keep = len(held)
        else:
            keep = len(held) - max((_overlap(held, stop) for stop in self._stop), default=0)
        shown, self._held = held[:keep], held[keep:]
        self.text += shown
        return shown


def _spelled(tokenizer: Tokenizer) -> list[bytes] | None:
    """The bytes of every token, where a text is those of its tokens, one after the other; else None."""
    return _spelled_of(tokenizer.state())


@functools.lru_cache(maxsize=4)
def _spelled_of(state: str) -> list[bytes] | None:
    tokenizer = load(state)
    spelled = tokenizer.spelled()
    if tokenizer.token_bytes is not None:
        return spelled
    texts = {}
    for token in range(0, len(spelled), max(len(spelled) // 256, 1)):  # some of them
        with contextlib.suppress(UnicodeDecodeError):
            texts[token] = spelled[token].decode()
    first = next((token for token, text in texts.items() if text.isalpha()), None)
    if first is None:
        return None
    before = tokenizer.decode([first])
    joins = all(tokenizer.decode([first, token]) == before + text for token, text in texts.items() if text)
    return spelled if joins else None


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
