"""KServe's Open Inference Protocol, version 2, over HTTP, with its extension for binary tensors.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol. A model takes the arrays that its
compiled program takes, and gives the program's; or it takes rows, a tensor BYTES [N] for each entry, and gives
``answer`` BYTES [N], JSON each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from fastapi import APIRouter, Request, Response

from bigbase_jax.build import suggest
from bigbase_jax.inference.inputs import entries_of
from bigbase_jax.runtime.untrusted import parse_json
from bigbase_jax.serve.guard import as_json
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.refused import Refused, refusing
from bigbase_jax.serve.requests import all_of, using, within
from bigbase_jax.serve.served import Served

_BITS = {"int": "INT", "uint": "UINT", "float": "FP"}
TYPES = {
    "BOOL": np.dtype(bool),
    **{f"{short}{bits}": np.dtype(f"{kind}{bits}") for kind, short in _BITS.items() for bits in (16, 32, 64)},
    **{f"{short}8": np.dtype(f"{kind}8") for kind, short in list(_BITS.items())[:2]},
}
"""Datatypes of tensors but BYTES."""
_NAMES = {dtype: name for name, dtype in TYPES.items()}
_LENGTH = "inference-header-content-length"
Tensors = dict[str, np.ndarray]
"""By name; those of BYTES have the dtype object."""


def router(models: Models, max_inputs: int) -> APIRouter:
    """The protocol's routes; ``max_inputs``: rows of a request."""
    found = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

    @found.get("")
    async def server() -> Response:
        """What the server is."""
        return as_json({"name": "bigbase_jax", "version": "2", "extensions": ["binary_tensor_data"]})

    @found.get("/health/live")
    async def live() -> Response:
        """Whether the process is alive."""
        return as_json({"live": True})

    @found.get("/health/ready")
    async def ready() -> Response:
        """Whether every model answers."""
        return as_json({"ready": models.ready}, 200 if models.ready else 503)

    @found.get("/models/{name}")
    @found.get("/models/{name}/versions/{version}")
    async def about(name: str, version: str = "") -> Response:
        """The tensors of a model."""
        with models.use(name) as served:
            _check_version(served, version)
            return as_json(_about(served))

    @found.get("/models/{name}/ready")
    @found.get("/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str = "") -> Response:
        """Whether a model answers."""
        with models.use(name) as served:
            _check_version(served, version)
            return as_json({"name": name, "ready": True})

    @found.post("/models/{name}/infer", openapi_extra={"requestBody": _BODY})
    @found.post("/models/{name}/versions/{version}/infer", openapi_extra={"requestBody": _BODY})
    async def infer(name: str, request: Request, version: str = "") -> Response:
        """What a model gives of tensors."""
        with using(models, name, request, version) as served:
            _check_version(served, version)
            asked, tensors = _read(await request.body(), request.headers.get(_LENGTH))
            given = await within(request, _infer(served, tensors, max_inputs))
            return _written(served, asked, given)

    return found


_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype", "data"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "datatype": {"enum": [*TYPES, "BYTES"]},
        "data": {"type": "array"},
    },
}
_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": {"type": "string"},
                    "inputs": {"type": "array", "minItems": 1, "items": _TENSOR},
                    "outputs": {"type": "array", "items": {"type": "object", "required": ["name"]}},
                },
            }
        }
    },
}


def _check_version(served: Served, version: str) -> None:
    if version not in ("", served.version):
        raise Refused(404, f"{served.name!r} answers with version {served.version!r}, not {version[:40]!r}.")


def _about(served: Served) -> dict[str, Any]:
    predictor = served.predictor
    one = {key: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for key, x in predictor.spec.items()}
    gives = jax.eval_shape(predictor.task.predict, predictor.variables, one) if served.batcher is not None else {}
    return {
        "name": served.name,
        "versions": [served.version],
        "platform": f"bigbase_jax_{served.card.get('engine', 'jax')}",
        "inputs": _described(one if gives else {}),
        "outputs": _described(gives),
    }


def _described(shapes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "datatype": _NAMES.get(np.dtype(x.dtype), "FP32"), "shape": [-1, *x.shape[1:]]}
        for name, x in shapes.items()
    ]


async def _infer(served: Served, tensors: Tensors, most: int) -> Tensors:
    spec = served.predictor.spec
    if served.batcher is None:
        raise Refused(404, f"{served.name!r} answers no tensors.")
    sizes = {len(x) if x.ndim else -1 for x in tensors.values()}
    if len(sizes) != 1 or min(sizes) < 1:
        raise Refused(422, "the inputs have to have one first axis, of the same size, at least 1.")
    (count,) = sizes
    if count > most:
        raise Refused(413, f"the request has {count:,} rows; at most {most} are answered at once.")
    if all(x.dtype == object for x in tensors.values()):
        return await _of_rows(served, tensors, count)
    if missing := set(spec) - set(tensors):
        raise Refused(422, f"the input {min(missing)!r} is missing; this model takes {', '.join(spec)}.")
    for key, x in tensors.items():
        if key not in spec:
            raise Refused(422, f"there is no input {key[:80]!r}.{suggest(key[:80], list(spec), 'input')}")
        wanted = spec[key]
        if x.dtype != wanted.dtype or x.shape[1:] != wanted.shape:
            right = f"{_NAMES.get(np.dtype(wanted.dtype))} {[-1, *wanted.shape]}"
            raise Refused(422, f"the input {key!r} is {_NAMES.get(x.dtype, 'BYTES')} {list(x.shape)}, not {right}.")
    outputs = await served.outputs([{key: x[i] for key, x in tensors.items()} for i in range(count)])
    try:
        return {key: np.stack([output[key] for output in outputs]) for key in outputs[0]}
    except ValueError:
        raise Refused(422, "the rows have answers of different lengths; send them one by one.") from None


async def _of_rows(served: Served, tensors: Tensors, count: int) -> Tensors:
    fields = served.predictor.reading.codec.fields
    rows = [{key: x.reshape(count, -1)[i] for key, x in tensors.items()} for i in range(count)]
    if any(len(x) != 1 for row in rows for x in row.values()):
        raise Refused(422, "a tensor of BYTES has the shape [N] or [N, 1]: one text or file for each row.")
    with refusing(422):
        given = [entries_of({key: x[0] for key, x in row.items()}, fields) for row in rows]
    answers = await all_of(served, given)
    said = [json.dumps(answer[0] if len(answer) == 1 else answer, ensure_ascii=False) for answer in answers]
    return {"answer": np.array(said, object)}


# --------------------------------------------------------------------------------------------------------------- bytes


def _read(body: bytes, header: str | None) -> tuple[dict[str, Any], Tensors]:
    """The request's JSON and its tensors."""
    if header is not None and not (header.isascii() and header.isdigit() and int(header) <= len(body)):
        raise Refused(400, "the header Inference-Header-Content-Length does not fit the body.")
    end = len(body) if header is None else int(header)
    with refusing(400):
        asked = parse_json(body[:end], "the body")
    inputs = asked.get("inputs") if isinstance(asked, dict) else None
    if not isinstance(inputs, list) or not inputs or not all(isinstance(x, dict) for x in inputs):
        raise Refused(400, "the request has no list of 'inputs', which are objects.")
    if not isinstance(asked.get("outputs", []), list) or not isinstance(asked.get("id", ""), str):
        raise Refused(400, "'outputs' is a list, and 'id' a text.")
    tensors: Tensors = {}
    for given in inputs:
        name = given.get("name")
        if not isinstance(name, str) or name in tensors:
            raise Refused(400, "each input has a 'name' of its own.")
        tensors[name], end = _tensor(given, name[:80], body, end)
    if end != len(body):
        raise Refused(400, f"{len(body) - end:,} bytes after the JSON belong to no tensor.")
    return asked, tensors


def _tensor(given: Mapping[str, Any], name: str, body: bytes, at: int) -> tuple[np.ndarray, int]:
    shape, kind = given.get("shape"), given.get("datatype")
    if not isinstance(shape, list) or len(shape) > 16 or not all(type(n) is int and 0 <= n < 1 << 31 for n in shape):
        raise Refused(400, f"the input {name!r} has no 'shape' of whole numbers.")
    if not isinstance(kind, str) or (kind != "BYTES" and kind not in TYPES):
        raise Refused(400, f"the input {name!r} has no 'datatype' of {', '.join(TYPES)}, BYTES.")
    count, told = math.prod(shape), given.get("parameters")
    size = told.get("binary_data_size") if isinstance(told, dict) else None
    try:
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(body) - at:
                raise ValueError("binary_data_size does not fit the body")
            data = body[at : at + size]
            flat = _strings(data, count) if kind == "BYTES" else np.frombuffer(data, TYPES[kind].newbyteorder("<"))
            return flat.astype(flat.dtype.newbyteorder("=")).reshape(shape), at + size
        flat = np.array(given.get("data"), object).reshape(-1)
        if flat.size != count:
            raise ValueError(f"{flat.size:,} values for {count:,} places")
        if kind == "BYTES":
            if not all(isinstance(x, str) for x in flat):
                raise ValueError("BYTES in JSON are texts")
            return flat.reshape(shape), at
        if not all(type(x) in (int, float, bool) for x in flat):
            raise ValueError("not numbers")
        return flat.astype(TYPES[kind]).reshape(shape), at
    except (ValueError, TypeError, OverflowError) as error:
        raise Refused(400, f"the data of {name!r} does not fit its shape and datatype ({error}).") from error


def _strings(data: bytes, count: int) -> np.ndarray:
    """BYTES: each behind its length in four bytes; text where it is UTF-8."""
    found: list[str | bytes] = []
    at = 0
    while at + 4 <= len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        piece = data[at + 4 : at + 4 + size]
        at += 4 + size
        try:
            found.append(piece.decode())
        except UnicodeDecodeError:
            found.append(piece)
    if at != len(data) or len(found) != count:
        raise ValueError(f"{len(found):,} texts for {count:,} places")
    return np.array(found, object)


def _written(served: Served, asked: Mapping[str, Any], tensors: Tensors) -> Response:
    """The response: JSON, and behind it the tensors that were asked for as bytes."""
    words = asked.get("parameters")
    every = isinstance(words, dict) and words.get("binary_data_output") is True
    wanted = [x for x in asked.get("outputs", []) if isinstance(x, dict)]
    if unknown := {str(x.get("name")) for x in wanted} - set(tensors):
        raise Refused(422, f"there is no output {min(unknown)[:80]!r}; this model gives {', '.join(tensors)}.")
    outputs, tail = [], b""
    for one in wanted or [{"name": name} for name in tensors]:
        x = tensors[one["name"]]
        kind = "BYTES" if x.dtype == object else _NAMES.get(x.dtype)
        if kind is None:  # bfloat16
            x, kind = x.astype(np.float32), "FP32"
        described: dict[str, Any] = {"name": one["name"], "datatype": kind, "shape": list(x.shape)}
        told = one.get("parameters")
        if (told.get("binary_data") if isinstance(told, dict) else None) is True or (every and told is None):
            data = (
                x.tobytes()
                if kind != "BYTES"
                else b"".join(len(raw := piece.encode()).to_bytes(4, "little") + raw for piece in x.reshape(-1))
            )
            described["parameters"], tail = {"binary_data_size": len(data)}, tail + data
        else:
            described["data"] = x.reshape(-1).tolist()
        outputs.append(described)
    said = {"model_name": served.name, "model_version": served.version, "outputs": outputs}
    response = as_json({**said, **({"id": asked["id"]} if "id" in asked else {})})
    if tail:
        length = str(len(response.body))
        content = bytes(response.body) + tail
        return Response(content, headers={_LENGTH: length}, media_type="application/octet-stream")
    return response
