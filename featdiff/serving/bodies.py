"""What clients send -> references to images: bytes, a form, or JSON with base64. Nothing is ever fetched for them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from typing import Any

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile

from ..data.references import HeldRef, printable
from ..exceptions import one_line

#: The name of an image that was sent without one.
UNNAMED = "image"
_KEYS = {"path", "data"}


async def read_images(request: Request, most: int) -> list[HeldRef]:
    """The images of a request, in their order.

    Parameters
    ----------
    request : Request
        ``multipart/form-data`` with a file for each image; ``application/json``, ``{"images": [{"path": name, "data":
        base64}]}``; or anything else: the bytes of one image, named by ``?path=``.
    most : int
        Images of a request.

    Returns
    -------
    list of HeldRef
        At least one.

    Raises
    ------
    HTTPException
        400 for a body that is none of these, 413 for too many images, 415 for a compressed body.
    """
    check_encoding(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        refs = await _of_form(request, most)
    elif kind == "application/json":
        refs = await asyncio.to_thread(_of_json, await request.body(), most)
    else:
        refs = [_held(request.query_params.get("path", ""), await request.body())]
    return refs


def check_encoding(request: Request) -> None:
    """Refuse compressed bodies: a small one may hold gigabytes (``HTTPException`` 415)."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "compressed bodies are not taken: images are compressed already")


def parse_json(content: bytes) -> dict[str, Any]:
    """A JSON object (``HTTPException`` 400 for anything else)."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is no JSON: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return found


def check_count(images: int, most: int) -> None:
    """Refuse no images, and too many (``HTTPException``)."""
    if not images:
        raise HTTPException(400, "the request holds no image")
    if images > most:
        raise HTTPException(413, f"{images:,} images, more than the limit of {most:,} a request: send several requests")


def from_base64(data: object, what: str) -> bytes:
    """Bytes from base64 (``HTTPException`` 400)."""
    try:
        return base64.b64decode(data, validate=True)  # type: ignore[arg-type]
    except (binascii.Error, ValueError, TypeError) as error:
        raise HTTPException(400, f"{what} is no base64: {one_line(error)}") from None


async def _of_form(request: Request, most: int) -> list[HeldRef]:
    refs = []
    async with request.form(max_files=most + 1, max_fields=most + 1) as form:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                raise HTTPException(400, f"the field {printable(name)!r} is no file: curl -F image=@photo.jpg")
            refs.append(_held(value.filename or "", await value.read()))
    check_count(len(refs), most)
    return refs


def _of_json(content: bytes, most: int) -> list[HeldRef]:
    images = parse_json(content).get("images")
    if not isinstance(images, list):
        raise HTTPException(400, 'the JSON must be {"images": [{"path": name, "data": base64}]}')
    check_count(len(images), most)

    refs = []
    for i, image in enumerate(images):
        if not isinstance(image, dict) or "data" not in image or image.keys() - _KEYS:
            raise HTTPException(400, f'images[{i}] must be {{"path": name, "data": base64}}')
        path = image.get("path", "")
        if not isinstance(path, str):
            raise HTTPException(400, f"images[{i}].path must be text")
        refs.append(_held(path, from_base64(image["data"], f"images[{i}].data")))
    return refs


def _held(path: str, content: bytes) -> HeldRef:
    return HeldRef(printable(path) if path else UNNAMED, content)
