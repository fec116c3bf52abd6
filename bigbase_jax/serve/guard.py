"""Around every request: who asks, its number, its time, the size of its body, one line of log; no traceback leaves."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import sys
import time
import traceback
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from bigbase_jax.runtime import redact
from bigbase_jax.serve.metrics import Metrics
from bigbase_jax.serve.refused import Refused

_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_OPEN = ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/v2", "/v2/health/live", "/v2/health/ready")
"""What needs no key: it says nothing of any model but whether all are ready."""
_QUIET = ("/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout"}
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]
PROTOCOL, _KEY = "realtime", "openai-insecure-api-key."
"""Of a websocket: what it may say that it speaks, and how a browser, which can send no header, gives its key."""
_SHOWN = 4096  # bytes of a body that a line of log shows, where it is to


class Guard:
    """ASGI middleware; see the module.

    Args:
      app: what answers.
      settings: see ``app.Settings``.
      metrics: what is counted.
    """

    def __init__(self, app: Any, settings: Any, metrics: Metrics):
        self._app, self._settings, self._metrics = app, settings, metrics
        self._held = 0  # bytes of the bodies of all requests in progress

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        socket = scope["type"] == "websocket"
        began, status, size, whole = time.monotonic(), 0, 0, False
        headers, shown = dict(scope["headers"]), b""
        wished = headers.get(b"x-request-id", b"").decode("latin-1")
        scope["request_id"] = name = wished if _ID.fullmatch(wished) else f"{random.getrandbits(128):032x}"
        scope["deadline"] = deadline = began + self._seconds(headers.get(b"x-request-timeout"))

        async def received() -> Any:
            nonlocal size, whole, shown
            if whole or socket:  # nothing comes but that the client leaves
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise Refused(408, "the body took longer than the request may.") from None
            body, whole = message.get("body", b""), not message.get("more_body", False)
            size += len(body)
            self._held += len(body)
            if self._settings.log_contents and len(shown) < _SHOWN:
                shown += body[: _SHOWN - len(shown)]
            if size > self._settings.max_body:
                raise self._too_large()
            if self._held > self._settings.max_held:
                raise Refused(503, "the server holds as much as it can; ask again.", 1)
            return message

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "websocket.accept":
                status = 101
            if message["type"].endswith("http.response.start"):
                status = message["status"]
                added = [*_HEADERS, (b"x-request-id", name.encode())]
                if not (whole or socket) and status in (408, 413, 503):
                    added.append((b"connection", b"close"))  # the rest of the body is not waited for
                message["headers"] = [*message["headers"], *added]
            await send(message)

        self._metrics.running.inc()
        try:
            if socket:
                self._welcome(scope, headers)
            scope["holder"] = self._holder(scope["path"], headers)
            if int(headers.get(b"content-length", b"0")) > self._settings.max_body:
                raise self._too_large()
            await self._app(scope, received, sent)
        except Refused as error:
            await failure(scope, error.status, error.sentence, error.retry_after)(scope, receive, sent)
        except ClientDisconnect:
            status = 499
        except Exception as error:  # a mistake of ours
            sys.stderr.write(redact.hide(f"{name}: {''.join(traceback.format_exception(error))}"))
            if not status:
                await failure(scope, 500, "something went wrong here; the log says what.")(scope, receive, sent)
        finally:
            self._held -= 0 if socket else size
            status = scope.get("status", status)
            self._metrics.running.dec()
            seconds = time.monotonic() - began
            route = getattr(scope.get("route"), "path", "none")
            model = scope.get("model", "")
            self._metrics.requests.labels(route, model, status).inc()
            self._metrics.seconds.labels(route, model).observe(seconds)
            if scope["path"] not in _QUIET:
                line = {"time": round(time.time(), 3), "id": name, "method": scope.get("method", "WS"), "route": route}
                line |= {"model": model, "status": status, "ms": round(seconds * 1000, 2), "bytes": size}
                line |= {"key": scope["holder"]} if scope.get("holder") else {}
                line |= {"content": shown.decode("utf-8", "replace")} if self._settings.log_contents else {}
                print(json.dumps(line), file=sys.stderr, flush=True)

    def _holder(self, path: str, headers: dict[bytes, bytes]) -> str:
        keys = self._settings.keys
        if keys is None or path in _OPEN:
            return ""
        given = headers.get(b"x-api-key", b"") or headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        holder = keys.holder(given.decode("latin-1"))
        if holder is None:
            raise Refused(401, "this needs a key: the header Authorization: Bearer KEY.")
        if wait := keys.wait(holder):
            raise Refused(429, "this key has asked too often; ask again later.", wait)
        return str(holder)

    def _welcome(self, scope: Any, headers: dict[bytes, bytes]) -> None:
        """Refuses a websocket from a page of another site, which a browser would let through; takes its key."""
        origin, host = (headers.get(name, b"").decode("latin-1") for name in (b"origin", b"host"))
        if origin and origin.partition("://")[2] != host and not {origin, "*"} & {*self._settings.cors}:
            raise Refused(403, "pages of other sites may not ask here; --cors names those that may.")
        for protocol in scope.get("subprotocols", ()):
            if protocol.startswith(_KEY):
                headers[b"x-api-key"] = protocol.removeprefix(_KEY).encode("latin-1", "replace")

    def _too_large(self) -> Refused:
        return Refused(413, f"the body has more than {self._settings.max_body:,} bytes.")

    def _seconds(self, wished: bytes | None) -> float:
        most = self._settings.timeout_s
        try:
            seconds = float(wished) if wished else most
        except ValueError:
            return most
        return min(seconds, most) if seconds > 0 else most


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response; numbers that JSON does not have are null."""
    try:
        body = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        body = json.dumps(_finite(value), ensure_ascii=False, default=str)
    return Response(body.encode("utf-8", "replace"), status, headers, "application/json")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def failure(scope: Any, status: int, sentence: str, retry_after: float | None = None) -> Response:
    """The response to a request that gets no answer: in the Open Inference Protocol's form below /v2, else in OpenAI's,
    ``{"error": {"message", "type", "code", "param", "request_id"}}``."""
    headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return as_json(error_of(scope, status, sentence), status, headers)


def error_of(scope: Any, status: int, sentence: str) -> dict[str, Any]:
    """What ``failure`` says."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error: Any = {"message": sentence, "type": kind, "code": status, "param": None, "request_id": scope["request_id"]}
    return {"error": sentence if scope["path"].startswith("/v2") else error}
