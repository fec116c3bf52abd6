"""The HTTP application: what clients ask, for the models of ``Models``."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import pathlib
import re
from typing import Any

import fastapi
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse

from bigbase_jax.serve import listening, openai, protocol, speech
from bigbase_jax.serve.guard import Guard, as_json, failure
from bigbase_jax.serve.keys import Keys
from bigbase_jax.serve.metrics import Metrics
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.refused import Refused
from bigbase_jax.serve.requests import all_of, inputs_of, using, within


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server lets clients do.

    Attributes:
      max_body: bytes of a request.
      max_inputs: of a request.
      max_seconds: of a recording that is transcribed at once, by its header.
      max_held: bytes of the bodies of all requests in progress.
      timeout_s: seconds for a request; a client may ask for fewer by the header X-Request-Timeout.
      keys: who may ask; None: everybody who reaches the server.
      log_contents: whether the log shows what requests hold.
      cors: origins whose pages may ask from a browser.
    """

    max_body: int = 32 << 20
    max_inputs: int = 64
    max_seconds: float = 3600.0
    max_held: int = 512 << 20
    timeout_s: float = 60.0
    keys: Keys | None = None
    log_contents: bool = False
    cors: tuple[str, ...] = ()


def create(models: Models, settings: Settings | None = None, metrics: Metrics | None = None) -> FastAPI:
    """The application.

    Args:
      metrics: those that ``models`` are measured by.
    """
    settings, metrics = settings or Settings(), metrics or Metrics()
    app = FastAPI(title="bigbase_jax", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.models, app.state.settings, app.state.metrics = models, settings, metrics
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    if settings.cors:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors, allow_methods=["*"], allow_headers=["*"])
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _not_found)
    most = settings.max_inputs
    routers = (protocol.router(models, most), openai.router(models, most), speech.router(models, settings.max_seconds))
    app.include_router(listening.router(models, settings.max_seconds, settings.timeout_s))
    for router in (_router(models, settings, metrics), *routers):
        app.include_router(router, responses=ERRORS)
    return app


def _router(models: Models, settings: Settings, metrics: Metrics) -> fastapi.APIRouter:
    router = fastapi.APIRouter()

    @router.post("/v1/predict/{name}", openapi_extra={"requestBody": _BODY})
    async def predict(name: str, request: Request) -> Response:
        """The answers of a model to files or rows."""
        with using(models, name, request) as served:
            inputs = await inputs_of(request, served, settings.max_inputs)
            found = await within(request, all_of(served, inputs))
        answers = [{**({"input": i} if len(found) > 1 else {}), **x} for i, part in enumerate(found) for x in part]
        return as_json({"model": name, "version": served.version, "answers": answers})

    html = (pathlib.Path(__file__).parent / "page.html").read_bytes()
    policy = _policy(html)

    @router.get("/", include_in_schema=False)
    @router.get("/docs", include_in_schema=False)
    async def page() -> Response:
        return Response(html, headers={"Content-Security-Policy": policy}, media_type="text/html")

    @router.get("/healthz")
    async def healthz() -> Response:
        """Whether the process is alive."""
        return as_json({"status": "alive"})

    @router.get("/readyz")
    async def readyz() -> Response:
        """Whether every model is loaded and compiled, and the server is not about to end."""
        ready = models.ready
        return as_json({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def measured() -> Response:
        """For Prometheus."""
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models")
    async def listed() -> Response:
        """The models, in OpenAI's form, each with what it does beside."""
        return as_json({"object": "list", "data": models.cards()})

    @router.get("/v1/models/{name}")
    async def card(name: str) -> Response:
        """One of them."""
        with models.use(name) as served:
            return as_json(served.card)

    return router


def _policy(html: bytes) -> str:
    """What a browser may load and run of the page: its own script and style, as they are, and what users give."""
    own = {
        tag: base64.b64encode(hashlib.sha256(re.findall(b"<%b>(.*?)</%b>" % (tag, tag), html, re.S)[0]).digest())
        for tag in (b"script", b"style")
    }
    parts = ["default-src 'none'", "connect-src 'self'", "img-src blob: data:", "media-src blob:", "base-uri 'none'"]
    parts.append("form-action 'none'")
    parts += [f"{tag.decode()}-src 'sha256-{digest.decode()}'" for tag, digest in own.items()]
    parts[-2] += " blob:"  # the part of the script that takes samples has to be a file, and is one of its own making
    return "; ".join([*parts, "frame-ancestors 'none'"])


ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": "why there is no answer", "content": {"application/json": {"schema": {"type": "object"}}}}
    for code in (422, "4XX", "5XX")
}
"""What OpenAPI says of requests that get no answer."""
_ROW = {"type": "object", "description": 'a row by entry, or {"base64": a file\'s bytes}'}
_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "anyOf": [
                    {
                        "type": "object",
                        "required": ["inputs"],
                        "properties": {
                            "inputs": {"type": "array", "minItems": 1, "items": {"anyOf": [_ROW, {"type": "string"}]}}
                        },
                    },
                    _ROW,
                ]
            }
        },
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
        },
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return failure(request.scope, error.status, error.sentence, error.retry_after)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = failure(request.scope, error.status_code, str(error.detail))
    response.headers.update(error.headers or {})
    return response
