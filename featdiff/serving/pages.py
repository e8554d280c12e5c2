"""What the OpenAPI page says of requests and answers."""

from __future__ import annotations

from typing import Any

ABOUT = (
    "Out-of-distribution scores over HTTP. An image that cannot be read is an answer with the status `unreadable` and "
    'a reason, not an error. Errors are `{"error": "one line"}`: 400 a body that makes no sense, 401 no key, 408 the '
    "body came too slowly, 413 too large, 415 compressed, 503 too busy (`Retry-After` says when to try again)."
)
_TEXT = {"type": "string"}
_NUMBER = {"type": "number", "nullable": True}
_ROW = {
    "type": "object",
    "description": "The columns of `featdiff score`; `p_value_<name>` and `layer_<name>` follow, where there are any.",
    "properties": {
        "path": _TEXT,
        "status": {"type": "string", "enum": ["ok", "unreadable", "error"]},
        "reason": _TEXT,
        "ood_score": {**_NUMBER, "description": "higher = stranger"},
        "p_value": _NUMBER,
        "is_ood": {"type": "boolean", "nullable": True},
    },
    "additionalProperties": _NUMBER,
}
_FILES = {"type": "object", "properties": {"image": {"type": "array", "items": {**_TEXT, "format": "binary"}}}}
_LISTED = {
    "type": "object",
    "required": ["images"],
    "properties": {
        "images": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["data"],
                "properties": {"path": _TEXT, "data": {**_TEXT, "format": "byte", "description": "base64"}},
                "additionalProperties": False,
            },
        }
    },
}

#: The three forms of a request with images.
IMAGES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": {**_TEXT, "format": "binary"}},
            "multipart/form-data": {"schema": _FILES},
            "application/json": {"schema": _LISTED},
        },
    },
    "parameters": [
        {"name": "path", "in": "query", "schema": _TEXT, "description": "Name of an image that is sent as bytes."}
    ],
}
_ANSWER = {
    "type": "object",
    "properties": {"model": _TEXT, "fpr": {"type": "number"}, "images": {"type": "array", "items": _ROW}},
}
#: What ``/v1/score`` gives.
SCORED: dict[int | str, dict[str, Any]] = {
    200: {"description": "A row for each image.", "content": {"application/json": {"schema": _ANSWER}}}
}
#: What ``/v1/explain`` gives.
EXPLAINED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "What `featdiff explain` writes; its picture, if `Accept` asks for `image/png`.",
        "content": {"application/json": {"schema": {"type": "object"}}, "image/png": {}},
    }
}
