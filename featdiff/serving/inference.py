"""The Open Inference Protocol, version 2, with its extension for binary tensors, as clients of KServe and Triton speak.

The input ``image`` holds the bytes of image files (in JSON: base64). Each column of a row is an output.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response

from ..data.references import HeldRef
from .batching import Batcher, Row
from .bodies import UNNAMED, check_count, check_encoding, from_base64, parse_json
from .in_time import in_time
from .served import Served
from .settings import Settings

INPUT = "image"
_TEXTS = ("status", "reason")
_VERSION = "1"
_HEADER = "inference-header-content-length"


def add_inference(app: FastAPI, served: Served, batcher: Batcher, settings: Settings) -> None:
    """Put the routes of the protocol before a model."""
    outputs = [name for name in served.columns if name != "path"]
    place = "/v2/models/{name}"

    def check_name(name: str, model_version: str) -> None:
        if name != served.name or model_version != _VERSION:
            raise HTTPException(404, f"no model {name!r} of version {model_version}: here is {served.name}, version 1")

    @app.get("/v2", summary="Open Inference Protocol: the server")
    async def server() -> dict[str, Any]:
        return {"name": "featdiff", "version": version("featdiff"), "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live", summary="Open Inference Protocol: whether the process answers")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", summary="Open Inference Protocol: whether images are scored")
    async def ready() -> dict[str, bool]:
        if not batcher.is_running:
            raise HTTPException(503, "no images are scored")
        return {"ready": True}

    async def model(name: str, model_version: str = _VERSION) -> dict[str, Any]:
        check_name(name, model_version)
        return {
            "name": name,
            "versions": [_VERSION],
            "platform": "featdiff",
            "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}],
            "outputs": [{"name": output, "datatype": datatype_of(output), "shape": [-1]} for output in outputs],
        }

    async def model_ready(name: str, model_version: str = _VERSION) -> dict[str, Any]:
        check_name(name, model_version)
        await ready()
        return {"name": name, "ready": True}

    async def infer(request: Request, name: str, model_version: str = _VERSION) -> Response:
        check_name(name, model_version)
        asked, refs = await _read(request, settings.max_queue)
        wanted = _wanted(asked, outputs)
        rows = await in_time(request, batcher.score(refs), settings.timeout)
        about = {"model_name": name, "model_version": _VERSION}
        return _written(about | ({"id": asked["id"]} if "id" in asked else {}), rows, wanted)

    for path in (place, place + "/versions/{model_version}"):
        _get(app, path, model, "the model")
        _get(app, path + "/ready", model_ready, "whether the model is ready")
        app.post(path + "/infer", summary="Open Inference Protocol: score images", response_class=Response)(infer)


def _get(app: FastAPI, path: str, route: Callable[..., Awaitable[dict[str, Any]]], what: str) -> None:
    app.get(path, summary=f"Open Inference Protocol: {what}")(route)


def datatype_of(column: str) -> str:
    """Of an output, as the protocol calls it."""
    return "BYTES" if column in _TEXTS else "BOOL" if column == "is_ood" else "FP64"


async def _read(request: Request, most: int) -> tuple[dict[str, Any], list[HeldRef]]:
    """What is asked, and its images (``HTTPException`` 400)."""
    check_encoding(request)
    body = await request.body()
    length = request.headers.get(_HEADER, str(len(body)))
    if not length.isdecimal() or int(length) > len(body):
        raise HTTPException(400, f"{_HEADER} must be a number of bytes of the body, not {length}")
    asked = parse_json(body[: int(length)])
    inputs = asked.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise HTTPException(400, f"the request must have one input, {INPUT}")
    tensor = inputs[0]
    if tensor.get("name") != INPUT or tensor.get("datatype") != "BYTES":
        raise HTTPException(400, f"the input must be {INPUT} of type BYTES: the bytes of image files")

    if "data" in tensor:
        data = tensor["data"]
        if not isinstance(data, list):
            raise HTTPException(400, f"the data of {INPUT} must be a list")
        contents = [from_base64(text, f"element {i} of {INPUT}") for i, text in enumerate(data)]
    else:
        contents = _unpacked(body[int(length) :])
    check_count(len(contents), most)
    if _size(tensor.get("shape")) != len(contents):
        raise HTTPException(400, f"{len(contents)} images do not fill the shape {tensor.get('shape')}")
    return asked, [HeldRef(UNNAMED, content) for content in contents]


def _size(shape: object) -> int:
    """Elements of a shape; -1 for what is none."""
    if not isinstance(shape, list) or not all(isinstance(side, int) for side in shape):
        return -1
    return int(np.prod(shape))


def _unpacked(data: bytes) -> list[bytes]:
    """Elements of a tensor of BYTES: each has its length in front, four bytes."""
    found = []
    place = 0
    while place < len(data):
        if place + 4 > len(data):
            raise HTTPException(400, "the binary data ends within an element")
        (length,) = struct.unpack_from("<I", data, place)
        place += 4 + length
        if place > len(data):
            raise HTTPException(400, "the binary data ends within an element")
        found.append(data[place - length : place])
    return found


def _wanted(asked: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, bool]:
    """Outputs that are to be given, and whether as binary data."""
    parameters = asked.get("parameters") or {}
    all_binary = isinstance(parameters, dict) and bool(parameters.get("binary_data_output"))
    if not asked.get("outputs"):
        return dict.fromkeys(outputs, all_binary)

    wanted = {}
    for output in asked["outputs"] if isinstance(asked["outputs"], list) else [None]:
        given = output if isinstance(output, dict) else {}
        name = given.get("name", "")
        if name not in outputs:
            raise HTTPException(400, f"no output {name!r}; there are: {', '.join(outputs)}")
        own = given.get("parameters")
        wanted[name] = bool(own.get("binary_data", all_binary)) if isinstance(own, dict) else all_binary
    return wanted


def _written(about: dict[str, Any], rows: Sequence[Row], wanted: Mapping[str, bool]) -> Response:
    """The answer: JSON, followed by tensors as bytes where they were asked for."""
    outputs = []
    tail = b""
    for name, binary in wanted.items():
        values = [row[name] for row in rows]
        if name == "is_ood":
            values = [bool(value) for value in values]
        output: dict[str, Any] = {"name": name, "datatype": datatype_of(name), "shape": [len(rows)]}
        if binary:
            data = _packed(name, values)
            output["parameters"] = {"binary_data_size": len(data)}
            tail += data
        else:
            output["data"] = values
        outputs.append(output)

    head = json.dumps(about | {"outputs": outputs}, allow_nan=False).encode()
    if not tail:
        return Response(head, media_type="application/json")
    return Response(head + tail, media_type="application/octet-stream", headers={_HEADER: str(len(head))})


def _packed(name: str, values: Sequence[Any]) -> bytes:
    """A tensor as bytes; numbers that an unreadable image lacks are NaN."""
    if datatype_of(name) == "BYTES":
        texts = [value.encode() for value in values]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    kind = np.bool_ if name == "is_ood" else "<f8"
    return np.array([np.nan if value is None else value for value in values], dtype=kind).tobytes()
