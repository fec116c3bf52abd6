"""What routes share: the inputs of a request, and answers that end when the client leaves or its time is over."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from bigbase_jax.core import UserError
from bigbase_jax.inference.inputs import entries_of
from bigbase_jax.runtime.untrusted import parse_json
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.refused import Refused, refusing
from bigbase_jax.serve.served import REQUEST, Given, Served

T = TypeVar("T")
Asked = TypeVar("Asked", bound=BaseModel)


async def all_of(served: Served, inputs: Sequence[Given]) -> list[list[dict[str, Any]]]:
    """The answers to each input; of several errors, the first."""
    if len(inputs) == 1:
        return [await served.predict(inputs[0])]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(served.predict(given)) for given in inputs]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


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
        with refusing(422):
            given = [_of_json(row, fields) for row in rows]
    else:
        given = [await request.body()]
    if not given or given == [b""]:
        raise Refused(422, 'the request has no input: send a file, or JSON such as {"inputs": [...]}.')
    return given


async def _of_form(request: Request, most: int) -> list[Given]:
    given = await form_of(request, most, most)
    return [dict(given)] if any(isinstance(value, str) for _, value in given) else [value for _, value in given]


async def form_of(request: Request, files: int, fields: int) -> list[tuple[str, Any]]:
    """The entries of a form by name, texts and the bytes of files, at most so many of each.

    Raises:
      Refused: it cannot be read.
    """
    try:
        async with request.form(max_files=files, max_fields=fields) as form:
            return [(k, await x.read() if isinstance(x, UploadFile) else x) for k, x in form.multi_items()]
    except HTTPException as error:
        raise Refused(400, f"the form cannot be read: {error.detail}") from error


def _of_json(row: Any, fields: Any) -> Given:
    if isinstance(row, dict) and set(row) == {"base64"}:
        try:
            return base64.b64decode(row["base64"], validate=True)
        except (TypeError, ValueError) as error:
            raise UserError("'base64' holds no base64.") from error
    return entries_of(row, fields)


async def body_json(request: Request) -> Any:
    """The JSON of a request's body.

    Raises:
      Refused: it is none, or too much.
    """
    with refusing(400):
        return parse_json(await request.body(), "the body")


def body_of(kind: type[BaseModel], media_type: str = "application/json", **more: Any) -> dict[str, Any]:
    """What OpenAPI says of a body with the fields of ``kind`` and, required too, ``more``."""
    schema = kind.model_json_schema()
    schema["properties"] |= more
    schema["required"] = [*schema.get("required", ()), *more]
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def checked(kind: type[Asked], found: Any) -> Asked:
    """What a request says, by its fields; those that are null are left out.

    Raises:
      Refused: it does not fit.
    """
    try:
        if isinstance(found, dict):
            found = {name: value for name, value in found.items() if value is not None}
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"][:2])) or "the body"
        raise Refused(400, f"{where}: {first['msg']}.") from error


@contextlib.contextmanager
def using(models: Models, name: str, request: HTTPConnection, version: str = "") -> Iterator[Served]:
    """``models.use``, for the whole of a request, which the log and the metrics then know by the model's name.

    Args:
      version: that the request asks for, "" being any: a candidate may answer it.
    """
    with models.use(name, candidate=not version) as served:
        request.scope["model"] = name
        REQUEST.set(request.scope["request_id"])
        yield served


async def within(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """``answer``, which is cancelled when the client leaves or its time is over.

    Raises:
      Refused: one of these.
    """
    try:
        async with asyncio.timeout(request.scope["deadline"] - time.monotonic()) as limit:
            gone = asyncio.ensure_future(_gone(request, limit))
            try:
                return await answer
            finally:
                gone.cancel()
    except TimeoutError:
        if not limit.expired():
            raise
        if gone.done():
            raise Refused(499, "the client has left.") from None
        raise Refused(504, "the answer took longer than the request may.") from None


async def _gone(request: Request, limit: asyncio.Timeout) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    if not limit.expired():
        limit.reschedule(0)
