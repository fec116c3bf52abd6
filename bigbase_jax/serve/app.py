"""The HTTP application: what clients ask, for the models of ``Models``."""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import json
import math
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import fastapi
from fastapi import FastAPI, Request, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from bigbase_jax.core import UserError
from bigbase_jax.inference.inputs import entries_of
from bigbase_jax.runtime.untrusted import parse_json
from bigbase_jax.serve.guard import Guard
from bigbase_jax.serve.metrics import Metrics
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.refused import Refused
from bigbase_jax.serve.served import Given, Served

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server lets clients do.

    Attributes:
      max_body: bytes of a request.
      max_inputs: of a request.
      timeout_s: seconds for a request; a client may ask for fewer by the header X-Request-Timeout.
    """

    max_body: int = 32 << 20
    max_inputs: int = 64
    timeout_s: float = 60.0


def create(models: Models, settings: Settings | None = None, metrics: Metrics | None = None) -> FastAPI:
    """The application.

    Args:
      metrics: those that ``models`` are measured by.
    """
    settings, metrics = settings or Settings(), metrics or Metrics()
    app = FastAPI(title="bigbase_jax", docs_url=None, redoc_url=None)
    app.state.models, app.state.settings, app.state.metrics = models, settings, metrics
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _not_found)
    app.include_router(_router(models, settings, metrics))
    return app


def _router(models: Models, settings: Settings, metrics: Metrics) -> fastapi.APIRouter:
    router = fastapi.APIRouter()

    @router.get("/healthz")
    async def healthz() -> Response:
        """Whether the process is alive."""
        return as_json({"status": "alive"})

    @router.get("/readyz")
    async def readyz() -> Response:
        """Whether every model is loaded and compiled, and the server is not about to end."""
        ready = models.ready
        return as_json({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    @router.get("/metrics")
    async def measured() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models")
    async def listed() -> Response:
        """The models, in OpenAI's form, each with what it does beside."""
        return as_json({"object": "list", "data": models.cards()})

    @router.get("/v1/models/{name}")
    async def card(name: str) -> Response:
        """One of them."""
        with models.use(name) as served:
            return as_json(served.card)

    @router.post("/v1/predict/{name}", openapi_extra={"requestBody": _BODY})
    async def predict(name: str, request: Request) -> Response:
        """The answers of a model to files or rows."""
        with models.use(name) as served:
            inputs = await inputs_of(request, served, settings.max_inputs)
            found = await within(request, _all(served, inputs))
        answers = [{**({"input": i} if len(found) > 1 else {}), **x} for i, part in enumerate(found) for x in part]
        return as_json({"model": name, "version": served.version, "answers": answers})

    return router


async def _all(served: Served, inputs: Sequence[Given]) -> list[list[dict[str, Any]]]:
    if len(inputs) == 1:
        return [await served.predict(inputs[0])]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(served.predict(given)) for given in inputs]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


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


async def inputs_of(request: Request, served: Served, most: int) -> list[Given]:
    """What a request wants to be answered: JSON, a form with files, or the bytes of a file.

    Raises:
      Refused: it is none of these, has nothing in it, or more than ``most`` inputs.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    given: list[Given]
    if kind == "multipart/form-data":
        given = await _of_form(request, most)
    elif kind == "application/json" or kind.endswith("+json"):
        found = await body_json(request)
        rows = found["inputs"] if isinstance(found, dict) and isinstance(found.get("inputs"), list) else [found]
        if len(rows) > most:
            raise Refused(413, f"the request has {len(rows):,} inputs; at most {most} are answered at once.")
        fields = served.predictor.reading.codec.fields if served.batcher is not None else None
        try:
            given = [_of_json(row, fields) for row in rows]
        except UserError as error:
            raise Refused(422, str(error)) from error
    else:
        given = [await request.body()]
    if not given or given == [b""]:
        raise Refused(422, 'the request has no input: send a file, or JSON such as {"inputs": [...]}.')
    return given


async def _of_form(request: Request, most: int) -> list[Given]:
    files: list[Given] = []
    row: dict[str, Any] = {}
    try:
        async with request.form(max_files=most, max_fields=most) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    files.append(await value.read())
                    row[name] = files[-1]
                else:
                    row[name] = value
    except HTTPException as error:
        raise Refused(400, f"the form cannot be read: {error.detail}") from error
    return [row] if any(isinstance(value, str) for value in row.values()) else files


def _of_json(row: Any, fields: Any) -> Given:
    if isinstance(row, dict) and set(row) == {"base64"}:
        try:
            return base64.b64decode(row["base64"], validate=True)
        except (TypeError, ValueError, binascii.Error) as error:
            raise UserError("'base64' holds no base64.") from error
    return entries_of(row, fields)


async def body_json(request: Request) -> Any:
    """The JSON of a request's body.

    Raises:
      Refused: it is none, or too much.
    """
    try:
        return parse_json(await request.body(), "the body")
    except UserError as error:
        raise Refused(400, str(error)) from error


async def within(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """``answer``, which is cancelled when the client leaves or its time is over.

    Raises:
      Refused: one of these.
    """
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait(
            (task, gone), timeout=request.scope["deadline"] - time.monotonic(), return_when="FIRST_COMPLETED"
        )
        if task.done():
            return task.result()
        if gone.done():
            raise Refused(499, "the client has left.")
        raise Refused(504, "the answer took longer than the request may.")
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response; numbers that JSON does not have are null."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, default=str)
    return Response(text.encode("utf-8", "replace"), status, headers, "application/json")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def failure(status: int, sentence: str, request_id: str = "", retry_after: float | None = None) -> Response:
    """The response to a request that gets no answer, in OpenAI's form."""
    error = {"message": sentence, "type": _TYPES.get(status, "invalid_request_error"), "code": status}
    headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return as_json({"error": {**error, "param": None, "request_id": request_id}}, status, headers)


_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout",
}


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return failure(error.status, error.sentence, request.scope.get("request_id", ""), error.retry_after)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = failure(error.status_code, str(error.detail), request.scope.get("request_id", ""))
    response.headers.update(error.headers or {})
    return response
