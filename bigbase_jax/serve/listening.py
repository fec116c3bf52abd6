"""/v1/audio/stream, a websocket: samples come, and what has been said so far goes back (``inference.streaming``).

``?model=NAME&rate=16000``; messages of bytes are samples, i16, the lower byte first, one channel; ``{"type": "end"}``
says that there are no more. Back come ``session``, ``partial`` (which the next one replaces), ``final`` (with times),
and at last ``end``, or ``error`` in place of any of them. A browser's key is a protocol, as in OpenAI's Realtime API.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.websockets import WebSocket, WebSocketDisconnect

from bigbase_jax.audio.files import RATES, Resampler
from bigbase_jax.serve.guard import PROTOCOL, error_of, failure
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.refused import Refused, refusing
from bigbase_jax.serve.requests import checked, using
from bigbase_jax.serve.served import Served

MESSAGE = 1 << 20
"""Bytes of a message, at most."""


class Listening(BaseModel):
    """The query of the socket's address."""

    model: str
    rate: int | None = Field(None, ge=RATES[0], le=RATES[1])


def router(models: Models, most: float, patience: float) -> APIRouter:
    """The socket's route; ``most``: seconds of a recording; ``patience``: without a message."""
    found = APIRouter()

    @found.websocket("/v1/audio/stream")
    async def stream(socket: WebSocket) -> None:
        opened = False
        try:
            asked = checked(Listening, dict(socket.query_params))
            with using(models, asked.model, socket) as served, served.hearing() as heard:
                await socket.accept(PROTOCOL if PROTOCOL in socket.scope["subprotocols"] else None)
                opened = True
                about = {"model": served.name, "version": served.version, "latency": round(heard.latency, 3)}
                rate = asked.rate or heard.rate
                await socket.send_json({"type": "session", **about, "rate": rate, "id": socket.scope["request_id"]})
                seconds = await _listen(socket, served, heard, rate, most, patience)
                await socket.send_json({"type": "end", "duration": round(seconds, 3)})
                await socket.close()
        except WebSocketDisconnect:
            socket.scope["status"] = 499
        except Refused as error:
            socket.scope["status"] = error.status
            if opened:
                await socket.send_json({"type": "error", **error_of(socket.scope, error.status, error.sentence)})
                await socket.close(1013 if error.status == 429 else 1008)
            else:
                await failure(socket.scope, error.status, error.sentence, error.retry_after)(
                    socket.scope, socket.receive, socket.send
                )

    return found


async def _listen(socket: WebSocket, served: Served, heard: Any, rate: int, most: float, patience: float) -> float:
    """Until the client says that it was all; gives the seconds that came."""
    resampler, samples, before = Resampler(rate, heard.rate), 0, ""
    ends = time.monotonic() + most + patience
    while True:
        try:
            async with asyncio.timeout(min(patience, ends - time.monotonic())):
                message = await socket.receive()
        except TimeoutError:
            raise Refused(408, f"nothing came for {patience:g} seconds, or the stream is too slow.") from None
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect
        data = message.get("bytes")
        if last := data is None:
            if not _is_end(message.get("text")):
                raise Refused(400, 'a message is samples as bytes, or {"type": "end"}.')
            data = b""
        if len(data) % 2:
            raise Refused(400, "samples are of 2 bytes each, and the message has an odd number.")
        samples += len(data) // 2
        if samples > most * rate:
            raise Refused(413, f"a stream has {most:,g} seconds at most.")
        with refusing(400):
            said = await served.in_thread(_feed, heard, resampler, np.frombuffer(data, "<i2").astype(np.int16), last)
        for part in said["final"]:
            await socket.send_json({"type": "final", **part})
        if said["text"] != before or said["final"]:
            before = said["text"]
            await socket.send_json({"type": "partial", "text": before, "words": said["words"]})
        if last:
            return samples / rate


def _feed(heard: Any, resampler: Resampler, audio_T: np.ndarray, last: bool) -> dict[str, Any]:
    said: dict[str, Any] = heard.feed(resampler(audio_T, last))
    if last:
        rest = heard.finish()
        said = {**rest, "final": [*said["final"], *rest["final"]]}
    return said


def _is_end(text: Any) -> bool:
    try:
        return isinstance(text, str) and len(text) < 1000 and json.loads(text) == {"type": "end"}
    except (ValueError, RecursionError):
        return False
