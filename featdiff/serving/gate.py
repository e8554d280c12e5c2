"""What stands before all routes: who may ask, how much is read, how long it may take, and what is counted."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .settings import Settings

#: Seconds after which a client that was refused may try again.
RETRY_AFTER = {"Retry-After": "1"}
#: Status of a client that did not wait for its answer, as nginx calls it.
GONE = 499
# Answered without a key, and whatever the load is.
_OPEN = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")


def answer(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as all routes give it."""
    return JSONResponse({"error": message}, status, headers)


class Gate:
    """Refuses what cannot be taken on before its body is read.

    Parameters
    ----------
    app : ASGI application
    settings : Settings
    metrics : Metrics
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._inside = 0  # requests with a body that are not answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        begun = time.perf_counter()
        status = GONE

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal(scope, receive, counted)
            elif scope["method"] == "POST":
                await self._within_limits(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")  # not what was asked: anybody may ask for anything
            self._metrics.answered(route, status, time.perf_counter() - begun)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        """Why a request is not taken on; None if it is."""
        headers = Headers(scope=scope)
        if scope["path"] not in _OPEN and not self._may_ask(headers):
            hint = {"WWW-Authenticate": "Bearer"}
            return answer(401, "send the key of this server as Authorization: Bearer KEY", hint)
        if scope["method"] != "POST":
            return None

        length = headers.get("content-length", "0")
        limit = self._settings.max_request
        if not length.isdecimal() or int(length) > limit:
            return answer(413, f"{length} bytes, more than the limit of {limit:,} a request")
        if self._inside >= self._settings.max_queue:
            return answer(503, "too many requests at once: try again", RETRY_AFTER)
        return None

    def _may_ask(self, headers: Headers) -> bool:
        expected = f"Bearer {self._settings.api_key}"
        given = headers.get("authorization", "")
        return not self._settings.api_key or hmac.compare_digest(given.encode(), expected.encode())

    async def _within_limits(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0
        until = asyncio.get_running_loop().time() + self._settings.timeout

        async def limited() -> Message:
            nonlocal read
            if read < 0:  # the whole body is there: what comes now is that the client goes
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                seconds = f"{self._settings.timeout:g} seconds"
                raise HTTPException(408, f"the request did not come within {seconds}") from None

            read += len(message.get("body", b""))
            if read > self._settings.max_request:
                raise HTTPException(413, f"more bytes than the limit of {self._settings.max_request:,} a request")
            if not message.get("more_body"):
                read = -1
            return message

        self._inside += 1
        try:
            await self._app(scope, limited, send)
        finally:
            self._inside -= 1
