"""OpenAI's API for models that write texts or give vectors: /v1/completions, /v1/chat/completions, /v1/embeddings.

https://platform.openai.com/docs/api-reference. ``top_k``, ``min_p`` and ``repetition_penalty`` are taken too, as vLLM
does. What a model here cannot do, such as tools, is refused and not left out in silence.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import json
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from starlette.responses import StreamingResponse

from bigbase_jax.core import UserError
from bigbase_jax.decoding.sampling import SamplingParams
from bigbase_jax.inference.generation import Engine
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.inference.slots import TOP, Closed, Full, Handle, Logprob, Piece, Slots
from bigbase_jax.serve.guard import as_json, failure
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.refused import Refused, refusing
from bigbase_jax.serve.requests import body_json, body_of, checked, using, within
from bigbase_jax.serve.served import Served
from bigbase_jax.text import chat_template
from bigbase_jax.text.tokenizer import Tokenizer, load

_REASONS = {"end": "stop", "stop": "stop", "length": "length"}
_MOST_TEXT = 1 << 20  # characters of a prompt
_Tokens = list[int]


class Writing(BaseModel):
    """What both ways to ask for a text have in common; what is None is OpenAI's default."""

    model: str
    n: int = Field(1, ge=1, le=32)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None


class Completing(Writing):
    """A request to /v1/completions."""

    prompt: str | list[str] | _Tokens | list[_Tokens]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=TOP)
    best_of: int | None = None
    echo: bool = False
    suffix: str | None = None


class Chatting(Writing):
    """A request to /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=TOP)
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None


class Embedding(BaseModel):
    """A request to /v1/embeddings."""

    model: str
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


def router(models: Models, most: int) -> APIRouter:
    """The API's routes; ``most``: texts of a request, prompts times ``n``."""
    found = APIRouter(prefix="/v1", tags=["OpenAI"])

    @found.post("/completions", openapi_extra=body_of(Completing))
    async def completions(request: Request) -> Response:
        """Continues texts."""
        asked = checked(Completing, await body_json(request))
        _refuse(asked, best_of=asked.n, echo=False, suffix=None)
        prompts: Any = asked.prompt
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        return await _answer(request, models, asked, prompts, most, asked.logprobs, _Completion(asked))

    @found.post("/chat/completions", openapi_extra=body_of(Chatting))
    async def chat(request: Request) -> Response:
        """Answers the last message of a conversation."""
        asked = checked(Chatting, await body_json(request))
        _refuse(asked, tools=[], functions=[], response_format={"type": "text"})
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        return await _answer(request, models, asked, [_messages(asked.messages)], most, top, _Chat(asked))

    @found.post("/embeddings", openapi_extra=body_of(Embedding))
    async def embeddings(request: Request) -> Response:
        """A vector for each text."""
        asked = checked(Embedding, await body_json(request))
        _refuse(asked, dimensions=None)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        if not 1 <= len(texts) <= most:
            raise Refused(400, f"input has {len(texts)} texts; from 1 to {most} are answered at once.")
        texts = [_valid(text) for text in texts]
        with using(models, asked.model, request) as served:
            vectors, tokens = await within(request, served.embed(texts))
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, asked.encoding_format)}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return as_json({"object": "list", "data": data, "model": asked.model, "usage": usage})

    return found


def _refuse(asked: BaseModel, **unused: Any) -> None:
    """Raises Refused for what is asked for and not done here: anything but None or the value that says no more."""
    for name, value in {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, **unused}.items():
        if getattr(asked, name, None) not in (None, value):
            raise Refused(400, f"{name} is not supported; leave it out.")


def _messages(given: Sequence[dict[str, Any]]) -> tuple[list[dict[str, str]], bytes | None]:
    """A conversation's texts, and the last of its pictures: the bytes of its file."""
    found, picture = [], None
    for i, message in enumerate(given):
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list):
            parts = [part for part in content if isinstance(part, dict)]
            texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
            pictures = [part["image_url"] for part in parts if part.get("type") == "image_url" and "image_url" in part]
            if len(pictures) > 1:
                raise Refused(400, f"messages.{i} has {len(pictures)} pictures; one is read at a time.")
            picture = _picture(pictures[0], i) if pictures else picture
            content = "".join(texts) if len(texts) + len(pictures) == len(content) else None
        if role == "developer":
            role = "system"
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise Refused(400, f"messages.{i} must have a role (system, user, assistant) and a text as its content.")
        found.append({"role": role, "content": content})
    return found, picture


def _picture(given: Any, i: int) -> bytes:
    """The file in ``{"url": "data:image/...;base64,..."}``; nothing is fetched."""
    url = given.get("url") if isinstance(given, dict) else given
    about, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    try:
        if comma and re.fullmatch(r"data:image/[\w.+-]+;base64", about):
            return base64.b64decode(data, validate=True)
    except ValueError:  # of base64, and of text that is not ASCII
        pass
    raise Refused(400, f"messages.{i} has a picture that is no data:image/...;base64,... URL; others are not fetched.")


def _params(asked: Any) -> list[SamplingParams]:
    """Those of each of the ``n`` texts; as OpenAI does, tokens are drawn unless the temperature is 0."""
    temperature = 1.0 if asked.temperature is None else asked.temperature
    words: dict[str, Any] = {
        "max_new_tokens": getattr(asked, "max_completion_tokens", None) or asked.max_tokens,
        "stop": tuple([asked.stop] if isinstance(asked.stop, str) else asked.stop or ()),
        "repetition_penalty": 1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
    }
    if len(words["stop"]) > 16 or any(len(text) > 256 for text in words["stop"]):
        raise Refused(400, "stop has at most 16 texts, of 256 characters each.")
    if temperature > 0:
        filters = {"top_p": asked.top_p, "top_k": asked.top_k if asked.top_k != -1 else None, "min_p": asked.min_p}
        words |= {name: value for name, value in filters.items() if value is not None}
    seed = secrets.randbits(32) if asked.seed is None else asked.seed
    with refusing(400):
        return [SamplingParams(temperature=temperature, seed=(seed + i) % 2**32, **words) for i in range(asked.n)]


# -------------------------------------------------------------------------------------------------------------- writing


class _Completion:
    """The form of /v1/completions."""

    kind, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, asked: Completing):
        self.asked = asked

    def read(self, engine: Engine, predictor: Predictor, prompt: str | _Tokens) -> tuple[np.ndarray, None]:
        """The tokens of a prompt; it has no picture."""
        if isinstance(prompt, str):
            return engine.encode(_valid(prompt)), None
        if any(not 0 <= token < 2**31 for token in prompt):
            raise UserError("a prompt's tokens are none.")
        return np.array(prompt, np.int32), None

    def part(self, index: int, text: str, said: Any, reason: str | None) -> dict[str, Any]:
        """A choice, whole or of a chunk."""
        return {"index": index, "text": text, "logprobs": said, "finish_reason": reason}

    whole = part

    def first(self, index: int) -> dict[str, Any] | None:
        """A choice of what comes before all chunks."""
        return None

    def logprobs(self, pieces: Sequence[Piece], offset: int, spell: Callable[[int], bytes]) -> dict[str, Any]:
        """Of tokens, whose texts begin at ``offset``."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, said in _each(pieces):
            text = spell(token).decode("utf-8", "replace")
            found["tokens"].append(text)
            found["token_logprobs"].append(said.logprob)
            found["top_logprobs"].append({spell(t).decode("utf-8", "replace"): x for t, x in said.top})
            found["text_offset"].append(offset)
            offset += len(text)
        return found


class _Chat:
    """The form of /v1/chat/completions."""

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, asked: Chatting):
        self.asked = asked

    def read(
        self, engine: Engine, predictor: Predictor, asked: tuple[list[dict[str, str]], bytes | None]
    ) -> tuple[np.ndarray, jax.Array | None]:
        """The tokens of a conversation, up to where the assistant is to go on, and what is seen of its picture.

        A model that reads pictures takes the last message's text for its prompt, and no other.
        """
        messages, picture = asked
        for message in messages:
            _valid(message["content"])
        if engine.see is not None:
            if picture is None:
                raise UserError("the model reads pictures, and the conversation has none; send an image_url part.")
            row = {"image": picture, "prompt": messages[-1]["content"]}
            (example,) = predictor.examples(row)
            return example["prompt"][example["prompt"] >= 0], engine.see(example["image"][None])
        if picture is not None:
            raise UserError("the model reads texts, and no pictures.")
        template = predictor.dataset_info.get("chat_template")
        if template is None or engine.tokenizer is None:
            raise UserError("the model has no chat template; POST /v1/completions continues texts.")
        return chat_template.prompt_tokens(chat_template.load(template), engine.tokenizer, messages), None

    def whole(self, index: int, text: str, said: Any, reason: str) -> dict[str, Any]:
        """A choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": said, "finish_reason": reason}

    def part(self, index: int, text: str, said: Any, reason: str | None) -> dict[str, Any]:
        """A choice of a chunk."""
        delta = {"content": text} if text or reason is None else {}
        return {"index": index, "delta": delta, "logprobs": said, "finish_reason": reason}

    def first(self, index: int) -> dict[str, Any] | None:
        """A choice of what comes before all chunks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def logprobs(self, pieces: Sequence[Piece], offset: int, spell: Callable[[int], bytes]) -> dict[str, Any]:
        """Of tokens."""

        def one(token: int, logprob: float) -> dict[str, Any]:
            spelled = spell(token)
            return {"token": spelled.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelled)}

        content = [
            {**one(token, said.logprob), "top_logprobs": [one(*other) for other in said.top]}
            for token, said in _each(pieces)
        ]
        return {"content": content, "refusal": None}


def _each(pieces: Sequence[Piece]) -> Iterator[tuple[int, Logprob]]:
    for piece in pieces:
        yield from zip(piece.tokens, piece.logprobs, strict=True)


def _valid(text: str) -> str:
    if len(text) > _MOST_TEXT:
        raise Refused(413, f"a text has {len(text):,} characters; at most {_MOST_TEXT:,} are read.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(400, "a text is not valid Unicode.") from None
    return text


async def _answer(
    request: Request, models: Models, asked: Any, prompts: Sequence[Any], most: int, top: int | None, form: Any
) -> Response:
    if not 1 <= len(prompts) * asked.n <= most:
        raise Refused(400, f"{len(prompts)} prompts and n={asked.n}; from 1 to {most} texts are written at once.")
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(using(models, models.base_of(asked.model), request))
        if served.slots is None:
            raise Refused(404, f"{asked.model!r} writes no text; POST /v1/predict/{asked.model} answers inputs.")
        texts = stack.enter_context(contextlib.closing(_Texts(served, served.slots, asked.model, form, request)))
        await within(request, texts.ask(prompts, _params(asked), top))
        if not asked.stream:
            return as_json(await within(request, texts.whole()))
        return _Stream(texts.parts(request.scope), stack.pop_all())


class _Stream(StreamingResponse):
    """Server-sent events; when the client has all of them, or leaves, or was never there, the stack is closed."""

    def __init__(self, events: AsyncIterator[bytes], stack: contextlib.ExitStack):
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._stack:
            await super().__call__(scope, receive, send)


class _Texts:
    """The texts of a request: prompts times ``n`` of them, which share the model's slots with those of others."""

    def __init__(self, served: Served, slots: Slots, name: str, form: Any, request: Request):
        self._slots, self._form, self._deadline = slots, form, request.scope["deadline"]
        self._predictor = served.predictor
        self._handles: list[Handle] = []
        self._coming: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._prompt_tokens = self._tokens = 0
        self._adapter = name if name in slots.adapters else None
        kind = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        self._about = {**kind, "system_fingerprint": f"{served.name}-{served.version}"}
        tokenizer = self._slots.engine.tokenizer
        assert tokenizer is not None
        self._spell = functools.partial(_spelled, tokenizer)
        self._says = self._closed = False

    async def ask(self, prompts: Sequence[Any], params: Sequence[SamplingParams], top: int | None) -> None:
        """Submits all of them.

        Raises:
          Refused: they do not fit, too many wait, or the model is closed.
        """
        loop, self._says = asyncio.get_running_loop(), top is not None

        def submit() -> None:
            for prompt in prompts:
                tokens, seen = self._form.read(self._slots.engine, self._predictor, prompt)
                self._prompt_tokens += len(tokens) + (0 if seen is None else seen.shape[1])
                for each in params:
                    index = len(self._handles)
                    on_piece = functools.partial(told, index)
                    self._handles.append(self._slots.submit(tokens, each, on_piece, top, self._adapter, seen))
                    if self._closed:  # the client has left meanwhile
                        self.close()
                        return

        def told(index: int, piece: Piece) -> None:
            loop.call_soon_threadsafe(self._coming.put_nowait, (index, piece))

        try:
            await asyncio.to_thread(submit)
        except Full as error:
            raise Refused(429, str(error), 1) from error
        except Closed as error:
            raise Refused(503, str(error), 5) from error
        except UserError as error:
            raise Refused(400, str(error)) from error

    def close(self) -> None:
        """Ends those that have not ended."""
        self._closed = True
        for handle in self._handles:
            handle.cancel()

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        going = len(self._handles)
        while going:
            try:
                async with asyncio.timeout(self._deadline - time.monotonic()):
                    index, piece = await self._coming.get()
            except TimeoutError:
                raise Refused(504, "the answer took longer than the request may.") from None
            if piece.finish_reason == "error":
                raise Refused(500 if "failed" in piece.error else 503, f"{piece.error}.")
            self._tokens += len(piece.tokens)
            going -= piece.finish_reason is not None
            yield index, piece

    @property
    def _usage(self) -> dict[str, int]:
        total = self._prompt_tokens + self._tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._tokens, "total_tokens": total}

    async def whole(self) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        found: list[list[Piece]] = [[] for _ in self._handles]
        async for index, piece in self._pieces():
            found[index].append(piece)
        choices = []
        for index, pieces in enumerate(found):
            said = self._form.logprobs(pieces, 0, self._spell) if self._says else None
            reason = _REASONS[pieces[-1].finish_reason or ""]
            choices.append(self._form.whole(index, "".join(piece.text for piece in pieces), said, reason))
        return {**self._about, "object": self._form.kind, "choices": choices, "usage": self._usage}

    async def parts(self, scope: Any) -> AsyncIterator[bytes]:
        """Server-sent events, one for each piece."""
        about = {**self._about, "object": self._form.chunk}
        wants_usage = bool((self._form.asked.stream_options or {}).get("include_usage"))
        more = {"usage": None} if wants_usage else {}
        offsets = [0] * len(self._handles)
        try:
            for index in range(len(self._handles)):
                if (choice := self._form.first(index)) is not None:
                    yield _event({**about, "choices": [choice], **more})
            async for index, piece in self._pieces():
                said = self._form.logprobs([piece], offsets[index], self._spell) if self._says else None
                offsets[index] += sum(len(self._spell(t).decode("utf-8", "replace")) for t in piece.tokens)
                reason = None if piece.finish_reason is None else _REASONS[piece.finish_reason]
                if piece.text or reason is not None or (said is not None and piece.tokens):
                    choice = self._form.part(index, piece.text, said, reason)
                    yield _event({**about, "choices": [choice], **more})
            if wants_usage:
                yield _event({**about, "choices": [], "usage": self._usage})
        except Refused as error:  # the status has been sent
            yield b"data: " + bytes(failure(scope, error.status, error.sentence).body) + b"\n\n"
        yield b"data: [DONE]\n\n"


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


def _spelled(tokenizer: Tokenizer, token: int) -> bytes:
    """A token's bytes; of a special one, its name's."""
    spelled = _table(tokenizer.state())
    return spelled[token] if token < len(spelled) else b""


@functools.lru_cache(maxsize=4)
def _table(state: str) -> list[bytes]:
    tokenizer = load(state)
    spelled = tokenizer.spelled()
    for name, token in tokenizer.special_tokens.items():
        spelled[token] = spelled[token] or name.encode()
    return spelled


def _encoded(vector: Sequence[float], form: str) -> Any:
    return vector if form == "float" else base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
