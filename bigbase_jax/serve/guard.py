"""Around every request: its number, its time, the size of its body, one line of log, and no traceback in an answer."""

from __future__ import annotations

import json
import re
import sys
import time
import traceback
import uuid
from typing import Any

from bigbase_jax.runtime import redact
from bigbase_jax.serve.metrics import Metrics
from bigbase_jax.serve.refused import Refused

_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_QUIET = ("/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")


class Guard:
    """ASGI middleware; see the module.

    Args:
      app: what answers.
      settings: see ``app.Settings``.
      metrics: what is counted.
    """

    def __init__(self, app: Any, settings: Any, metrics: Metrics):
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, size = time.monotonic(), 0, 0
        headers = dict(scope["headers"])
        wished = headers.get(b"x-request-id", b"").decode("latin-1")
        scope["request_id"] = name = wished if _ID.fullmatch(wished) else uuid.uuid4().hex
        scope["deadline"] = began + self._seconds(headers.get(b"x-request-timeout"))

        async def received() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._settings.max_body:
                raise Refused(413, f"the body has more than {self._settings.max_body:,} bytes.")
            return message

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        self._metrics.running.inc()
        try:
            await self._app(scope, received, sent)
        except Exception as error:  # a mistake of ours
            sys.stderr.write(redact.hide("".join(traceback.format_exception(error))))
            if not status:
                from bigbase_jax.serve.app import failure

                await failure(500, "something went wrong here; the log says what.", name)(scope, receive, sent)
        finally:
            self._metrics.running.dec()
            seconds = time.monotonic() - began
            route = getattr(scope.get("route"), "path", "none")
            model = scope.get("path_params", {}).get("name", "") if status not in (404, 405) else ""
            self._metrics.requests.labels(route, model, status).inc()
            self._metrics.seconds.labels(route, model).observe(seconds)
            if scope["path"] not in _QUIET:
                line = {"time": round(time.time(), 3), "id": name, "method": scope["method"], "route": route}
                line |= {"model": model, "status": status, "ms": round(seconds * 1000, 2), "bytes": size}
                print(json.dumps(line), file=sys.stderr, flush=True)

    def _seconds(self, wished: bytes | None) -> float:
        most = self._settings.timeout_s
        try:
            return min(max(float(wished), 0.0), most) if wished else most
        except ValueError:
            return most
