"""Conversations as text and tokens, and which of them the assistant says.

A template is the published tokenizer's own, in Jinja (``chat_template`` of ``tokenizer_config.json``, or
``chat_template.jinja``), or else ``<|im_start|>ROLE\\nCONTENT<|im_end|>\\n`` for each message. Jinja runs in a process
of its own (``sandbox``), with what ``transformers`` gives templates, except for the date of today: a conversation is
always the same tokens.

Axes: T tokens of a conversation.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.runtime.sandbox import CLOSE as _CLOSE
from bigbase_jax.runtime.sandbox import OPEN as _OPEN
from bigbase_jax.runtime.untrusted import Refused, ask, file_in, parse_json, read_object
from bigbase_jax.text.tokenizer import ROLES, Tokenizer

Message = Mapping[str, str]
"""``role`` ("system", "user", "assistant") and ``content``."""
TURN, STOP = ROLES["turn"][0], ROLES["stop"][0]
_LITERAL, _END = "\ufdd0", "\ufdd1"  # around the number of a text that looks like a special token
_OURS = "".join((_OPEN, _CLOSE, _LITERAL, _END))


class Chat(NamedTuple):
    """A conversation in tokens.

    Attributes:
      tokens: i32[T].
      answer: bool[T], what the assistant says, the end of its turn included.
      counts: i32[T], bytes of text in each token; special tokens have none.
    """

    tokens: np.ndarray
    answer: np.ndarray
    counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written.

    Attributes:
      jinja: the template; None: ours.
      tokens: names that a template may use (``bos_token``, ...), and what they stand for.
      name: where it comes from, for people.
    """

    jinja: str | None = None
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    name: str = "ChatML"

    def state(self) -> str:
        """All there is to know, for ``load``."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """The conversation as text; with ``prompt``, up to where the assistant is to go on.

        Raises:
          UserError: the template refuses the conversation, or is broken.
        """
        return self._render(messages, prompt).translate(_NO_SIGNS)

    def answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and (first, last) character of each answer in it.

        Where the template has ``{% generation %}`` marks, they say so. Else an answer begins where the template has
        the assistant go on, and ends with the mark of the turn's end.

        Raises:
          UserError: the template does not let answers be found.
        """
        marked = self._render(messages, False)
        if _OPEN in marked:
            return _spans(marked)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                span = self._between(messages, i, marked) or self._around(messages, i, marked)
                if span is None:
                    raise UserError(
                        f"the chat template of {self.name} does not show where an answer begins; put it between "
                        "{% generation %} and {% endgeneration %} there."
                    )
                spans.append(span)
        return marked, spans

    def _between(self, messages: Sequence[Message], i: int, whole: str) -> tuple[int, int] | None:
        """The answer as what comes after the prompt for it, in the text up to it."""
        try:
            before, through = self._render(messages[:i], True), self._render(messages[: i + 1], False)
        except UserError:
            return None
        end = next((k for k, (a, b) in enumerate(zip(whole, through, strict=False)) if a != b), len(through))
        content = messages[i]["content"].strip()
        at = whole.find(content, len(before), end)
        if not whole.startswith(before) or at < 0:
            return None
        tail = whole[at + len(content) : end]
        return len(before), at + len(content) + len(tail.rstrip())

    def _around(self, messages: Sequence[Message], i: int, whole: str) -> tuple[int, int] | None:
        """The answer as what the message holds, and a special token right after it."""
        content = messages[i]["content"].strip()
        changed = [*messages[:i], {**messages[i], "content": _OPEN + content + _CLOSE}, *messages[i + 1 :]]
        try:
            text, spans = _spans(self._render(changed, False))
        except UserError:
            return None
        if len(spans) != 1 or text != whole:
            return None
        first, last = spans[0]
        name = re.compile("|".join(re.escape(n) for n in sorted({*self.tokens.values(), STOP}, key=len, reverse=True)))
        after = name.match(whole, last)
        return first, after.end() if after else last

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        if self.jinja is None:
            parts = [f"{TURN}{m['role']}\n{_OPEN}{m['content']}{STOP}{_CLOSE}\n" for m in messages]
            for i, message in enumerate(messages):
                if message["role"] != "assistant":
                    parts[i] = parts[i].replace(_OPEN, "").replace(_CLOSE, "")
            return "".join(parts) + f"{TURN}assistant\n" * prompt
        whose = f"the chat template of {self.name}"
        if importlib.util.find_spec("jinja2") is None:
            raise UserError(f"{whose} needs the package jinja2: pip install 'bigbase_jax[text]'.")
        words = {**self.tokens, "messages": [dict(m) for m in messages], "add_generation_prompt": prompt}
        try:
            return ask(whose, "render", 2, template=self.jinja, words=words)
        except Refused as error:
            does = "is not Jinja" if error.kind == "TemplateSyntaxError" else "refuses a conversation"
            raise UserError(f"{whose} {does}: {error}.") from error


_NO_SIGNS = {ord(sign): None for sign in (_OPEN, _CLOSE)}


def load(state: str) -> ChatTemplate:
    """The template of ``ChatTemplate.state()``; raises UserError for anything else."""
    given = parse_json(state, "a chat template's state")
    given = given if isinstance(given, dict) else {}
    jinja, tokens, name = given.get("jinja"), given.get("tokens"), given.get("name")
    if not isinstance(tokens, dict) or not all(isinstance(x, str) for x in (jinja or "", name, *tokens.values())):
        raise UserError("what should be a chat template's state is none.")
    return ChatTemplate(jinja, tokens, str(name))


def read(path: str, origin: str | None = None) -> ChatTemplate | None:
    """The template in the folder of a published tokenizer, or of a file in Jinja; None where there is none.

    Args:
      origin: the folder that ``path`` is a copy of, after which the template is named; None: it is none.

    Raises:
      UserError: it cannot be read.
    """
    path = os.path.expanduser(path)
    if os.path.isfile(path) and path.endswith((".jinja", ".jinja2", ".j2")):
        return ChatTemplate(_read(path), {}, path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    config = _json(os.path.join(folder, "tokenizer_config.json"))
    given = config.get("chat_template")
    if isinstance(given, list):  # several, by name
        by_name = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = by_name.get("default")
    if beside := file_in(folder, "chat_template.jinja"):
        given = _read(str(beside))
    if not isinstance(given, str):
        return None
    tokens = {}
    for name, value in {**_json(os.path.join(folder, "special_tokens_map.json")), **config}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return ChatTemplate(given, tokens, os.path.expanduser(origin) if origin else folder)


def encode(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> Chat:
    """A conversation in tokens. Special tokens are the template's: what looks like one in a message is text.

    Raises:
      UserError: see ``ChatTemplate.answers``; or the tokenizer cannot write a text.
    """
    safe, literals = _hide(messages, tokenizer)
    text, spans = template.answers(safe)
    tokens_T, counts_T = _tokens(text, literals, tokenizer)
    if literals:
        text, spans = _shown(text, spans, literals)
    byte_of = np.concatenate([[0], np.cumsum([len(c.encode()) for c in text])]) if spans else np.zeros(1, int)
    end_T = np.cumsum(counts_T)
    start_T = end_T - counts_T
    answer_T = np.zeros(len(tokens_T), bool)
    for first, last in spans:
        answer_T |= (end_T > byte_of[first]) & (start_T < byte_of[last])
        within_T = (counts_T == 0) & (start_T > byte_of[first]) & (start_T <= byte_of[last])
        answer_T |= within_T  # the other bytes of a character that several tokens share
    counts_T = np.where(np.isin(tokens_T, list(tokenizer.special_tokens.values())), 0, counts_T)
    return Chat(tokens_T, answer_T, counts_T.astype(np.int32))


def prompt_tokens(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> np.ndarray:
    """i32[T]: a conversation up to where the assistant is to go on."""
    safe, literals = _hide(messages, tokenizer)
    return _tokens(template.render(safe, prompt=True), literals, tokenizer)[0]


# --- what looks like special tokens -----------------------------------------------------------------------------------


def _hide(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[dict[str, str]], list[str]]:
    """Messages in which signs stand for what looks like a special token, and these texts by number."""
    names = re.compile(
        "|".join(re.escape(n) for n in sorted(tokenizer.special_tokens, key=len, reverse=True)) or r"(?!)"
    )
    literals: list[str] = []

    def sign(match: re.Match[str]) -> str:
        literals.append(match[0])
        return f"{_LITERAL}{len(literals) - 1}{_END}"

    found = []
    for message in messages:
        content = message["content"].translate({ord(c): "\ufffd" for c in _OURS})
        found.append({**message, "content": names.sub(sign, content)})
    return found, literals


_SIGN = re.compile(f"{_LITERAL}([0-9]+){_END}")


def _tokens(text: str, literals: Sequence[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a text with signs, and the bytes of each (of a special token too)."""
    if not literals:
        return tokenizer.encode_special(text)
    parts = []
    for i, part in enumerate(_SIGN.split(text)):
        if i % 2:
            parts.append(tokenizer.encode_batch([literals[int(part)]])[0])
        elif part:
            parts.append(tokenizer.encode_special(part))
    tokens, counts = zip(*parts, strict=True)
    return np.concatenate(tokens), np.concatenate(counts)


def _shown(text: str, spans: Sequence[tuple[int, int]], literals: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The text with what the signs stand for, and the spans in it."""
    moves = [(m.end(), len(literals[int(m[1])]) - len(m[0])) for m in _SIGN.finditer(text)]

    def moved(at: int) -> int:
        return at + sum(by for end, by in moves if end <= at)

    return _SIGN.sub(lambda m: literals[int(m[1])], text), [(moved(a), moved(b)) for a, b in spans]


def _spans(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without the signs around answers, and where these are."""
    parts = re.split(f"([{_OPEN}{_CLOSE}])", marked)
    at = np.cumsum([0] + [0 if i % 2 else len(part) for i, part in enumerate(parts)]).tolist()
    if "".join(parts[1::2]).replace(_OPEN + _CLOSE, ""):  # a template that turns texts around
        return "".join(parts[::2]), []
    return "".join(parts[::2]), [(at[i], at[i + 2]) for i in range(1, len(parts), 4)]


# --- files ------------------------------------------------------------------------------------------------------------


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not utf-8'}.") from error


def _json(path: str) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
