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
import functools
import hashlib
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Example, Fields, Source, UserError
from bigbase_jax.data import cache as caches
from bigbase_jax.data import ragged
from bigbase_jax.data.documents import Format
from bigbase_jax.data.files import LIMITS, File, Limits, by_split, kind_of, one_file, unused
from bigbase_jax.data.ragged import Ragged
from bigbase_jax.data.rows import checked, rows, tables
from bigbase_jax.data.sources.splits import digest, stratified, to_split_off
from bigbase_jax.data.sources.text import text as texts
from bigbase_jax.data.windows import pack
from bigbase_jax.text import chat_template
from bigbase_jax.text.chat_template import ChatTemplate, Message
from bigbase_jax.text.tokenizer import Subwords, Tokenizer, TokenizerFile, dataset_info_of, load

ROLES = ("turn", "stop")
"""Special tokens that a tokenizer learned here has."""
SUBWORDS = Subwords("bpe", 8192)
_CODE = (
    "data.files",
    "data.rows",
    "data.ragged",
    "text.tokenizer",
    "text.chat_template",
    "data.sources.splits",
    "data.sources.text.chat",
)
_SPLITS = ("train", "val", "test")
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
_ENTRIES = ("inputs", "targets", "segment_ids", "positions", "bytes", "weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversations:
    """Conversations, and how windows are made of them; ``prepare`` reads them. Subclasses say where they come from.

    Those without a split are dealt, equal conversations to the same one. A conversation that is longer than a window is
    cut, and one of which no answer is then left, or that has none, is left out: the description says how many.

    Attributes:
      tokenizer: fitted to what is said in training, or read (``TokenizerFile``).
      length: L.
      template: a file in Jinja, or a folder with a published tokenizer that has a template; None: that of the
        tokenizer, where it is read from a folder with one, else ``<|im_start|>ROLE\\nCONTENT<|im_end|>\\n``.
      val_fraction, test_fraction: shares of the conversations; 0: none.
      seed: of the dealing.

    Raises:
      UserError: a value out of its range, or a template that is not there.
    """

    tokenizer: Any = SUBWORDS
    length: int = 512
    template: str | None = None
    val_fraction: float = 0.05
    test_fraction: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 2:
            raise UserError(f"length is {self.length}; it must be at least 2.")

    # -- what subclasses say ---------------------------------------------------------------------------------------

    def conversations(self) -> Iterator[tuple[str, Spoken]]:
        """(split, or "" where it is to be dealt, conversation) of each, from the start at each call."""
        raise NotImplementedError

    def file_signature(self) -> list[Any]:
        """What changes when the conversations change, and all that says how to read them."""
        raise NotImplementedError

    def origin(self) -> str:
        """Where they come from, in words."""
        raise NotImplementedError

    def unused(self) -> list[str]:
        """What is there as well, and is not read."""
        return []

    # -- reading ---------------------------------------------------------------------------------------------------

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

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Chats:
        """Reads and tokenises the conversations, unless that is in the cache; see ``core.RawDataset``.

        Raises:
          UserError: no conversations, or one that cannot be read.
        """
        template = self.chat_template()
        key = texts.key_of(_CODE, [self.tokenizer], [self.file_signature(), self.dealing(), template.state()])
        found = ragged.find(cache, key) if limit_bytes > 0 else None
        if found is None:
            say(f"data: reading {self.origin()} once, to tokenise it")
            survey = _Survey(self)
            tokenizer = self.tokenizer.fit(
                functools.partial(survey.texts, ("train",)),
                functools.partial(survey.texts, ("val", "test")),
                False,
                ROLES,
            )
            dtypes = {"tokens": np.min_scalar_type(tokenizer.size - 1), "answer": "u1", "bytes": "<u2"}
            dtypes |= {"first": "<i4", "split": "u1"}
            where = (cache, key) if limit_bytes > 0 else None
            write = functools.partial(survey.write, tokenizer, template)
            found = ragged.make(write, dtypes, where, limit_bytes, say)
            if where is not None:
                caches.prune(cache, limit_bytes, [cache / f"cache-{key}"])
        return Chats(self, found, template)

    def dealing(self) -> list[Any]:
        """What the splits depend on."""
        return [self.val_fraction, self.test_fraction, self.seed]

    @staticmethod
    def fields(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Fields:
        """A row is a conversation, in any of its forms."""
        return Fields(encoding=config.get("encoding", "utf-8"))

    @staticmethod
    def read(given: str | Mapping[str, Any], dataset_info: Mapping[str, Any], limits: Limits = LIMITS) -> list[Example]:
        """See ``read_chat``."""
        return read_chat(given, dataset_info, limits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFiles(Conversations):
    """Conversations in a file or folder; see ``Conversations``.

    Files named after splits keep them; a missing val is taken from train.

    Attributes:
      root: the file or folder.
      train, val, test: what the files of the split are called, where not after it (``train="train_sft"``).
      encoding: of all but Parquet and Arrow.
      limits: of reading a file.
    """

    root: str
    train: str | None = None
    val: str | None = None
    test: str | None = None
    encoding: str = "utf-8"
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        super().__post_init__()
        Format(encoding=self.encoding)

    def files(self) -> tuple[dict[str, list[File]], list[str]]:
        """Files by split, all of them under "" where there are no splits; and what unused ones are called."""
        found = tables(self.root, self.encoding, self.limits)
        used = by_split(found, self.root, {"train": self.train, "val": self.val, "test": self.test})
        return used, unused(found, used)

    def conversations(self) -> Iterator[tuple[str, Spoken]]:
        for split, files in self.files()[0].items():
            for file in files:
                for row in rows(file, self.encoding):
                    yield split, Spoken(messages_of(row.values, row.where), row.where)

    def file_signature(self) -> list[Any]:
        return [
            [[split, *file.file_signature] for split, given in self.files()[0].items() for file in given],
            self.encoding,
        ]

    def origin(self) -> str:
        return self.root

    def unused(self) -> list[str]:
        return self.files()[1]


class Chats:
    """A ``Dataset`` of windows over conversations that were read; see the top of this file for examples and facts.

    ``description`` says how full the windows are, how much of them counts, and what was cut or left out.
    """

    def __init__(self, data: Conversations, chats_N: Ragged, template: ChatTemplate):
        self._data, self._chats, self._template = data, chats_N, template
        about = chats_N.about
        tokenizer = load(about["tokenizer"])
        stop = {} if about["stop"] is None else {"stop_id": about["stop"]}
        self.dataset_info: Mapping[str, Any] = {
            **dataset_info_of(tokenizer),
            "length": data.length,
            "weighted": True,
            "chat_template": template.state(),
            **stop,
        }
        split_N, first_N = (np.asarray(chats_N.values[name]) for name in ("split", "first"))
        size_N = chats_N.lengths("tokens")
        seen_N = (first_N >= 1) & (first_N <= data.length)
        windows: dict[str, ChatWindows] = {}
        for i, split in enumerate(_SPLITS):
            kept = np.flatnonzero((split_N == i) & seen_N)
            if kept.size:
                windows[split] = ChatWindows(chats_N, kept, data.length, split)
        if "train" not in windows:
            raise UserError(
                f"no conversation of {data.origin()} to train on has an answer within length={data.length}; raise it."
            )
        self.splits: Mapping[str, Source] = windows
        counts = ", ".join(f"{split} {len(w.kept):,}" for split, w in windows.items())
        train = windows["train"]
        cut, lost = int((seen_N & (size_N > data.length + 1)).sum()), int((~seen_N).sum())
        parts = [
            f"{data.origin()}: conversations: {counts}, written as {template.name}",
            f"a vocabulary of {tokenizer.size:,}",
            f"windows of {data.length}, {train.fill:.1%} filled, {train.share:.1%} of their tokens answers",
            f"{cut:,} cut to a window and {lost:,} without an answer in it left out",
        ]
        if template.jinja is None and not {chat_template.TURN, chat_template.STOP} <= set(tokenizer.marks):
            parts.append(f"its tokenizer has no token {chat_template.TURN}, which is spelled out")
        if about["unused"]:
            parts.append(f"not used: {', '.join(about['unused'])}")
        self.description = "; ".join(parts)

    def fingerprint(self) -> str:
        """A digest of the conversations, the splits, the tokenizer, the template and the windows."""
        data = self._data
        return digest(
            [data.file_signature(), data.dealing(), data.length, self._chats.about["tokenizer"], self._template.state()]
        )

    def read(self, given: str | Mapping[str, Any]) -> list[Example]:
        """See ``read_chat``."""
        return read_chat(given, self.dataset_info)


class ChatWindows:
    """The ``Source`` of one split: conversations packed into windows (best fit decreasing).

    Attributes:
      kept: the conversations, i64[P].
      in_memory: where the tokens are.
      fill: share of the positions that hold a token to predict.
      share: of these, the share that counts.
    """

    def __init__(self, chats_N: Ragged, kept: np.ndarray, length: int, split: str):
        self._chats, self._length, self._split, self.kept = chats_N, length, split, kept
        self.in_memory: str = chats_N.kept
        size_P = np.minimum(chats_N.lengths("tokens")[kept] - 1, length)
        bin_P = pack(size_P, length)
        order = np.argsort(bin_P, kind="stable")
        self._order = kept[order]
        self._bins = np.searchsorted(bin_P[order], np.arange(bin_P.max(initial=-1) + 2))
        self.fill = float(size_P.sum()) / max(len(self) * length, 1)
        counted = sum(int(chats_N.get("answer", int(i))[1 : length + 1].sum()) for i in kept)
        self.share = counted / max(int(size_P.sum()), 1)

    def __len__(self) -> int:
        return len(self._bins) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self._split} has {len(self)} windows; there is no {index}")
        pieces = self._order[self._bins[index] : self._bins[index + 1]].tolist()
        return window_of([[self._chats.get(n, i) for n in ("tokens", "answer", "bytes")] for i in pieces], self._length)

    def name(self, index: int) -> str:
        """Such as ``val[17]``."""
        return f"{self._split}[{index}]"


def window_of(pieces: Sequence[Sequence[np.ndarray]], length: int) -> Example:
    """The example of some conversations, (tokens, answer, bytes) each, one after the other."""
    example: Example = {name: np.zeros(length, np.int32) for name in _ENTRIES}
    at = 0
    for segment, (tokens_T, answer_T, bytes_T) in enumerate(pieces, 1):
        n = min(len(tokens_T) - 1, length - at)
        here = slice(at, at + n)
        example["inputs"][here] = tokens_T[:n]
        example["targets"][here] = tokens_T[1 : n + 1]
        example["segment_ids"][here] = segment
        example["positions"][here] = np.arange(n)
        example["bytes"][here] = bytes_T[1 : n + 1]
        example["weights"][here] = answer_T[1 : n + 1]
        at += n
    return example


def read_chat(
    given: str | Mapping[str, Any], dataset_info: Mapping[str, Any], limits: Limits = LIMITS
) -> list[Example]:
    """A user's file as windows: a text as ``read_text`` reads it, or conversations in JSON, a window each. A row is one
    conversation.

    All targets of a text count, and so do those of a conversation without an answer.

    Raises:
      UserError: unreadable, or too short to predict anything.
    """
    if isinstance(given, str) and kind_of(given) not in (".json", ".jsonl", ".ndjson"):
        windows = texts.read_text(given, dataset_info, limits)
        return [{**window, "weights": (window["segment_ids"] > 0).astype(np.int32)} for window in windows]
    tokenizer, template = load(dataset_info["tokenizer"]), chat_template.load(dataset_info["chat_template"])
    found = []
    if isinstance(given, str):
        chats = [
            (row.values, row.where) for row in rows(one_file(given, limits), dataset_info.get("encoding", "utf-8"))
        ]
    else:
        chats = [(given, "the row")]
    for values, where in chats:
        chat = _encoded(template, tokenizer, Spoken(messages_of(values, where), where))
        if len(chat.tokens) > 1:
            window = window_of([chat], dataset_info["length"])
            if not window["weights"].any():
                window["weights"] = (window["segment_ids"] > 0).astype(np.int32)
            found.append(window)
    if not found:
        raise UserError(f"{given if isinstance(given, str) else 'the row'} holds no conversation.")
    return found


# --- rows -------------------------------------------------------------------------------------------------------------


class Spoken(NamedTuple):
    """A conversation and where it stands."""

    messages: list[Message]
    where: str


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


class _Survey:
    """What one reading of all conversations tells: which is in which split."""

    def __init__(self, data: Conversations):
        self._data = data
        self._unused = data.unused()
        given: list[str] = []
        print_N: list[bytes] = []
        for split, spoken in data.conversations():
            given.append(split)
            print_N.append(hashlib.blake2b(repr(spoken.messages).encode(), digest_size=8).digest())
        if not given:
            raise UserError(f"{data.origin()} holds no conversations.")
        self._split_N = [split or "train" for split in given]
        fractions = to_split_off(set(given) - {"", "train"}, data.val_fraction, data.test_fraction)
        groups: dict[bytes, list[int]] = {}
        for i, split in enumerate(self._split_N):
            if split == "train":
                groups.setdefault(print_N[i], []).append(i)
        names = sorted(groups)
        dealt = stratified([name.hex() for name in names], np.zeros(len(names), int), fractions, data.seed)
        for split, chosen in dealt.items():
            for group in chosen:
                for i in groups[names[group]]:
                    self._split_N[i] = split

    def texts(self, splits: Sequence[str]) -> Iterator[str]:
        """All that is said in some splits, and who says it."""
        for split, (_, spoken) in zip(self._split_N, self._data.conversations(), strict=True):
            if split in splits:
                for message in spoken.messages:
                    yield f"{message['role']}\n{message['content']}\n"

    def write(self, tokenizer: Tokenizer, template: ChatTemplate, add: ragged.Add) -> Mapping[str, Any]:
        """Adds the tokens of all conversations."""
        stops: Counter[int] = Counter()
        special = set(tokenizer.marks.values())
        for split, (_, spoken) in zip(self._split_N, self._data.conversations(), strict=True):
            tokens_T, answer_T, counts_T = _encoded(template, tokenizer, spoken)
            answer_T[:1] = False  # nothing stands before it
            last = np.flatnonzero(answer_T & ~np.append(answer_T[1:], False))
            stops.update(int(t) for t in tokens_T[last] if int(t) in special)
            first = int(answer_T.argmax()) if answer_T.any() else 0
            counts_T = np.minimum(counts_T, 65535)
            add(tokens=tokens_T, answer=answer_T, bytes=counts_T, first=first, split=_SPLITS.index(split))
        stop = stops.most_common(1)[0][0] if stops else None
        return {"tokenizer": tokenizer.state(), "stop": stop, "unused": self._unused}
