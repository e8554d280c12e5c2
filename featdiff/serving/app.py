"""The routes of a server."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteError
from starlette.requests import ClientDisconnect

from ..files.text import for_json
from ..runtime.allocator import keep_freed_memory
from .batching import Batcher, Busy
from .bodies import read_images
from .gate import GONE, RETRY_AFTER, Gate, answer
from .in_time import in_time
from .inference import add_inference
from .metrics import CONTENT_TYPE, Metrics, forget_process
from .pages import ABOUT, EXPLAINED, IMAGES, SCORED
from .served import Served, open_served
from .settings import Settings


def create(settings: Settings) -> FastAPI:
    """Load the model and put routes before it; each process of a server does.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    FastAPI

    Raises
    ------
    ModelError, UsageError, WeightsError
        The model cannot be loaded.
    """
    keep_freed_memory()
    return make_app(open_served(settings), settings)


def make_app(served: Served, settings: Settings) -> FastAPI:
    """Routes before a model that is loaded."""
    metrics = Metrics(served.calibration)
    batcher = Batcher(served, settings, metrics)

    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()
        forget_process(os.getpid())

    app = FastAPI(title="featdiff", version=version("featdiff"), description=ABOUT, lifespan=living, redoc_url=None)
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    app.add_exception_handler(StarletteError, _refused)
    app.add_exception_handler(RequestValidationError, _no_sense)
    app.add_exception_handler(Busy, _busy)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _failed)
    _add_state(app, batcher, metrics)
    _add_scores(app, served, batcher, settings)
    add_inference(app, served, batcher, settings)
    return app


def _add_state(app: FastAPI, batcher: Batcher, metrics: Metrics) -> None:
    @app.get("/healthz", summary="Whether the process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", summary="Whether images are scored")
    async def readyz() -> dict[str, str]:
        if not batcher.is_running:
            raise HTTPException(503, "no images are scored")
        return {"status": "ready"}

    @app.get("/metrics", summary="Numbers for Prometheus", response_class=Response)
    async def numbers() -> Response:
        return Response(await asyncio.to_thread(metrics.page), media_type=CONTENT_TYPE)


def _add_scores(app: FastAPI, served: Served, batcher: Batcher, settings: Settings) -> None:
    @app.post("/v1/score", summary="Score images", openapi_extra=IMAGES, responses=SCORED, response_class=Response)
    async def score(request: Request) -> Response:
        refs = await read_images(request, settings.max_queue)
        rows = await in_time(request, batcher.score(refs), settings.timeout)
        return as_json({"model": served.name, "fpr": served.fpr, "images": rows})

    @app.post("/v1/explain", summary="Explain one image", openapi_extra=IMAGES, responses=EXPLAINED,
              response_class=Response)  # fmt: skip
    async def explain(request: Request, nearest: int = 5) -> Response:
        if served.explain is None:
            raise HTTPException(501, "this model cannot explain: it is exported, or of the pixel mode")
        if not 1 <= nearest <= 100:
            raise HTTPException(400, "nearest must be from 1 to 100")
        (ref,) = await read_images(request, 1)
        explanation = await in_time(request, batcher.explain(ref, nearest), settings.timeout)
        if "image/png" not in request.headers.get("accept", "") or explanation.status != "ok":
            return as_json(explanation.to_json())

        from ..report.explanation_page import draw

        return Response(await asyncio.to_thread(draw, explanation), media_type="image/png")


def as_json(content: dict[str, Any]) -> Response:
    """An answer in JSON, on one line, with the numbers and the text that the command line writes."""
    text = for_json(json.dumps(content, ensure_ascii=False, allow_nan=False))
    return Response(text, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteError)
    return answer(error.status_code, str(error.detail), error.headers)


async def _no_sense(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return answer(400, f"{first['loc'][-1]}: {first['msg']}")


async def _busy(request: Request, error: Exception) -> Response:
    return answer(503, "the queue is full: try again", RETRY_AFTER)


async def _left(request: Request, error: Exception) -> Response:
    return answer(GONE, "the client has gone")  # for the numbers: nobody reads it


async def _failed(request: Request, error: Exception) -> Response:
    return answer(500, f"a bug: {type(error).__name__}: please report it")
