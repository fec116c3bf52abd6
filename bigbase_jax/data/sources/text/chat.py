"""Conversations to learn answers from: windows as for language modelling, where only what the assistant says counts.

Rows of JSON, Parquet or a saved data set (see ``rows``), in any of these forms:

- ``{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}``;
- ``{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}`` (ShareGPT);
- ``{"instruction": "...", "input": "...", "output": "..."}`` (Alpaca; ``input`` may be missing or empty);
- ``{"prompt": "...", "completion": "..."}``, or lists of messages under these names; also prompt and response,
  question and answer, instruction and response; ``system`` beside any of them.

An example holds, i32[L] each, the entries of ``Windows`` (``inputs``, ``targets``, ``segment_ids``, ``positions``,
``bytes``) and ``weights``, which is 1 for targets that count and 0 for those that are read alone. Several conversations
share a window, and none sees another.

Facts: ``vocab_size``, ``tokenizer``, ``length``, ``weighted`` (True, for ``CausalLanguageModel``), ``chat_template``
(``ChatTemplate.state()``), ``stop_id`` (the token that ends an answer), and the ids of other special tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Codec, Example, Fields, UserError
from bigbase_jax.data.cache import Store, Writer
from bigbase_jax.data.files import LIMITS, Limits, kind_of, limits_of, one_file
from bigbase_jax.data.rows import checked, rows
from bigbase_jax.data.sources.splits import Split
from bigbase_jax.data.sources.text.base import (
    SPLITS,
    Opened,
    TextCodec,
    TextRowFiles,
    TextRows,
    Write,
    narrow,
    split_indices,
    text_of_bytes,
    tokenizer_of,
)
from bigbase_jax.data.sources.text.text import read_text
from bigbase_jax.data.windows import packed, window
from bigbase_jax.text import chat_template
from bigbase_jax.text.chat_template import ChatTemplate, Message
from bigbase_jax.text.tokenizer import Subwords, Tokenizer, TokenizerFile, dataset_info_of, load

ROLES = ("turn", "stop")
"""Special tokens that a tokenizer learned here has."""
SUBWORDS = Subwords("bpe", 8192)
_SPEAKERS = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "bard", "bing"), "assistant"),
    **dict.fromkeys(("system",), "system"),
}
_LISTS = ("messages", "conversations", "conversation")
_TURNS = (
    *(("instruction", name) for name in ("output", "response")),
    *(("prompt", name) for name in ("completion", "response")),
    ("question", "answer"),
)


class Spoken(NamedTuple):
    """A conversation and where it stands."""

    messages: list[Message]
    where: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversations(TextRows):
    """Conversations, and how windows are made of them; see ``TextRows``. Subclasses say where they come from.

    A conversation that is longer than a window is cut, and one of which no answer is then left, or that has none, is
    left out: the description says how many.

    Attributes:
      tokenizer: fitted to what is said in training, or read (``TokenizerFile``).
      length: L.
      template: a file in Jinja, or a folder with a published tokenizer that has a template; None: that of the
        tokenizer, where it is read from a folder with one, else ``<|im_start|>ROLE\\nCONTENT<|im_end|>\\n``.

    Raises:
      UserError: a value out of its range, or a template that is not there.
    """

    tokenizer: Any = SUBWORDS
    length: int = 512
    template: str | None = None
    val_fraction: float = 0.05
    test_fraction: float = 0.0

    code = ("text.chat_template", "data.sources.text.chat")
    least: ClassVar[Mapping[str, int]] = {"length": 2}

    def conversations(self) -> Iterator[tuple[str, Spoken]]:
        """(split, or "" where it is to be dealt, conversation) of each, from the start at each call."""
        raise NotImplementedError

    def unused(self) -> list[str]:
        """What is there as well, and is not read."""
        return []

    def chat_template(self) -> ChatTemplate:
        """See ``template``."""
        if self.template is not None:
            found = chat_template.read(self.template)
            if found is None:
                raise UserError(
                    f"there is no chat template at {self.template}: a .jinja file, or tokenizer_config.json."
                )
            if not found.tokens and isinstance(self.tokenizer, TokenizerFile):
                beside = chat_template.read(self.tokenizer.path)
                found = dataclasses.replace(found, tokens=beside.tokens if beside else {})
            return found
        if not isinstance(self.tokenizer, TokenizerFile):
            return ChatTemplate()
        origin = getattr(self.tokenizer, "origin", None)  # of a copy that a run has kept
        return chat_template.read(self.tokenizer.path, origin) or ChatTemplate()

    def kept_for(self) -> list[Any]:
        return [self.chat_template().state()]

    def begin(self) -> Write:
        """
        Raises:
          UserError: no conversations, or one that cannot be read.
        """
        survey = self.dealt(
            self.conversations,
            lambda spoken: hashlib.blake2b(repr(spoken.messages).encode(), digest_size=8).hexdigest(),
            "conversations",
        )
        tokenizer: Tokenizer = survey.fit(self.tokenizer, _texts, False, ROLES)
        template = self.chat_template()

        def write(writer: Writer) -> Mapping[str, Any]:
            stops: Counter[int] = Counter()
            special = set(tokenizer.special_tokens.values())
            for split, spoken in survey.rows():
                tokens_T, answer_T, counts_T = _encoded(template, tokenizer, spoken)
                answer_T[:1] = False  # nothing stands before it
                last = np.flatnonzero(answer_T & ~np.append(answer_T[1:], False))
                stops.update(int(t) for t in tokens_T[last] if int(t) in special)
                first = int(answer_T.argmax()) if answer_T.any() else 0
                row: dict[str, Any] = {"tokens": narrow(tokens_T, tokenizer), "answer": answer_T.astype(np.uint8)}
                row |= {"bytes": np.minimum(counts_T, 65535).astype(np.uint16), "first": np.int32(first)}
                writer.add({**row, "split": np.uint8(SPLITS.index(split))})
            stop = stops.most_common(1)[0][0] if stops else None
            return {"tokenizer": tokenizer.state(), "stop": stop, "unused": self.unused()}

        return write

    def opened(self, rows_N: Store) -> Opened:
        """``description`` says how full the windows are, how much of them counts, and what was cut or left out.

        Raises:
          UserError: nothing to train on has an answer within a window.
        """
        tokenizer, template, about = tokenizer_of(rows_N), self.chat_template(), rows_N.about
        info = {
            **dataset_info_of(tokenizer),
            "length": self.length,
            "weighted": True,
            "chat_template": template.state(),
            **({} if about["stop"] is None else {"stop_id": about["stop"]}),
        }
        first_N, size_N = rows_N.values("first"), rows_N.lengths("tokens")
        seen_N = (first_N >= 1) & (first_N <= self.length)
        kept = {split: indices[seen_N[indices]] for split, indices in split_indices(rows_N).items()}
        windows = {split: _windows(rows_N, rows, self.length, split) for split, rows in kept.items() if rows.size}
        if "train" not in windows:
            raise UserError(
                f"no conversation of {self.origin()} to train on has an answer within length={self.length}; raise it."
            )
        train_P = np.minimum(size_N[kept["train"]] - 1, self.length)
        fill = int(train_P.sum()) / (len(windows["train"]) * self.length)
        counted = sum(int(rows_N.get("answer", i)[1 : self.length + 1].sum()) for i in kept["train"].tolist())
        counts = ", ".join(f"{split} {len(kept[split]):,}" for split in windows)
        cut, lost = int((seen_N & (size_N > self.length + 1)).sum()), int((~seen_N).sum())
        parts = [
            f"{self.origin()}: conversations: {counts}, written as {template.name}",
            f"a vocabulary of {tokenizer.size:,}",
            f"windows of {self.length}, {fill:.1%} filled, {counted / train_P.sum():.1%} of their tokens answers",
            f"{cut:,} cut to a window and {lost:,} without an answer in it left out",
        ]
        if template.jinja is None and not {chat_template.TURN, chat_template.STOP} <= set(tokenizer.special_tokens):
            parts.append(f"its tokenizer has no token {chat_template.TURN}, which is spelled out")
        if about["unused"]:
            parts.append(f"not used: {', '.join(about['unused'])}")
        identity = [self.file_signature(), self.dealing(), self.length, about["tokenizer"], template.state()]
        return Opened(windows, info, "; ".join(parts), identity)

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """A row is a conversation, in any of its forms."""
        fields = Fields(encoding=config.get("encoding", "utf-8"))
        return TextCodec(fields, read_chat, dataset_info, limits_of(config))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFiles(Conversations, TextRowFiles):
    """Conversations in files; see ``TextRowFiles`` and ``Conversations``."""

    def conversations(self) -> Iterator[tuple[str, Spoken]]:
        for split, files in self.files()[0].items():
            for file in files:
                for row in rows(file, self.encoding):
                    yield split, Spoken(messages_of(row.values, row.where), row.where)

    def file_signature(self) -> list[Any]:
        return [self.files_signature(), self.encoding]

    def unused(self) -> list[str]:
        return self.files()[1]


def _texts(spoken: Spoken) -> list[str]:
    """All that is said, and who says it."""
    return [f"{message['role']}\n{message['content']}\n" for message in spoken.messages]


def _windows(chats_N: Store, kept: np.ndarray, length: int, split: str) -> Split:
    """Conversations packed into windows (best fit decreasing)."""
    order, bins = packed(np.minimum(chats_N.lengths("tokens")[kept] - 1, length), length)
    pieces = kept[order]

    def example(index: int) -> Example:
        chosen = pieces[bins[index] : bins[index + 1]].tolist()
        arrays = ([chats_N.get(name, i) for name in ("tokens", "answer", "bytes")] for i in chosen)
        return window([_piece(*piece) for piece in arrays], length)

    return Split(split, len(bins) - 1, example, chats_N.kept)


def _piece(tokens_T: np.ndarray, answer_T: np.ndarray, bytes_T: np.ndarray) -> dict[str, np.ndarray]:
    """What ``window`` reads of a conversation."""
    return {"inputs": tokens_T[:-1], "targets": tokens_T[1:], "bytes": bytes_T[1:], "weights": answer_T[1:]}


def read_chat(given: Any, dataset_info: Mapping[str, Any], limits: Limits = LIMITS) -> list[Example]:
    """A user's file as windows: a text as ``read_text`` reads it, or conversations in JSON, a window each. A row is one
    conversation, and bytes are JSON where they read as an object or a list of them.

    All targets of a text count, and so do those of a conversation without an answer.

    Raises:
      UserError: unreadable, or too short to predict anything.
    """
    chats = _chats(given, dataset_info.get("encoding", "utf-8"), limits)
    if chats is None:
        windows = read_text(given, dataset_info, limits)
        return [{**example, "weights": (example["segment_ids"] > 0).astype(np.int32)} for example in windows]
    tokenizer, template = load(dataset_info["tokenizer"]), chat_template.load(dataset_info["chat_template"])
    found = []
    for values, where in chats:
        chat = _encoded(template, tokenizer, Spoken(messages_of(values, where), where))
        if len(chat.tokens) > 1:
            example = window([_piece(*chat)], dataset_info["length"])
            if not example["weights"].any():
                example["weights"] = (example["segment_ids"] > 0).astype(np.int32)
            found.append(example)
    if not found:
        raise UserError(f"{given if isinstance(given, str) else 'the row'} holds no conversation.")
    return found


def _chats(given: Any, encoding: str, limits: Limits) -> list[tuple[Mapping[str, Any], str]] | None:
    """(row, where it is) of the conversations that a user gives; None where it is a text."""
    if isinstance(given, Mapping):
        return [(given, "the row")]
    if isinstance(given, str):
        if kind_of(given) not in (".json", ".jsonl", ".ndjson"):
            return None
        return [(row.values, row.where) for row in rows(one_file(given, limits), encoding)]
    try:
        found = json.loads(text_of_bytes(given, encoding, limits))
    except (ValueError, RecursionError):
        return None
    listed = found if isinstance(found, list) else [found]
    objects = bool(listed) and all(isinstance(values, Mapping) for values in listed)
    return [(values, f"conversation {i}") for i, values in enumerate(listed, 1)] if objects else None


# --- rows -------------------------------------------------------------------------------------------------------------


def messages_of(values: Mapping[str, Any], where: str) -> list[Message]:
    """The messages of a row, in any of the forms that the top of this file lists.

    Raises:
      UserError: none of these forms, or an unknown speaker.
    """
    system = values.get("system")
    before = [_message(where, "system", system)] if isinstance(system, str) and system.strip() else []
    for name in _LISTS:
        if isinstance(values.get(name), list):
            said = [_said(where, entry) for entry in values[name]]
            if not said:
                raise UserError(f"{where} has no messages in {name!r}.")
            return said if said[0]["role"] == "system" else [*before, *said]
    for asked, answered in _TURNS:
        if asked in values and answered in values:
            question, answer = values[asked], values[answered]
            if isinstance(question, list) and isinstance(answer, list):
                return [*before, *(_said(where, entry) for entry in (*question, *answer))]
            more = values.get("input")
            if asked == "instruction" and isinstance(more, str) and more.strip() and isinstance(question, str):
                question = f"{question}\n\n{more}"
            return [*before, _message(where, "user", question), _message(where, "assistant", answer)]
    shown = ", ".join(repr(name) for name in list(values)[:8])
    raise UserError(
        f"{where} has {shown}; a conversation has 'messages', 'conversations', 'instruction' and 'output', or"
        " 'prompt' and 'completion'."
    )


def _said(where: str, entry: Any) -> Message:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: a message is {type(entry).__name__}, not an object with role and content.")
    for speaker, content in (("role", "content"), ("from", "value")):
        if speaker in entry and content in entry:
            role = entry[speaker]
            if role not in _SPEAKERS:
                raise UserError(f"{where}: nobody is called {role!r}.{suggest(str(role), _SPEAKERS, 'speaker')}")
            return _message(where, _SPEAKERS[role], entry[content])
    raise UserError(f"{where}: a message has {', '.join(map(repr, entry))}, not 'role' and 'content'.")


def _message(where: str, role: str, content: Any) -> Message:
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"{where}: what the {role} says is {type(content).__name__}, not text.")
    return {"role": role, "content": checked(content, where)}


def _encoded(template: ChatTemplate, tokenizer: Tokenizer, spoken: Spoken) -> chat_template.Chat:
    try:
        return chat_template.encode(template, tokenizer, spoken.messages)
    except UserError as error:
        raise UserError(f"{spoken.where}: {error}") from error
