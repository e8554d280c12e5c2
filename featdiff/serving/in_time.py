"""An answer has a limit of time, and nobody works for a client that has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import HTTPException, Request

from .gate import GONE, RETRY_AFTER

T = TypeVar("T")


async def in_time(request: Request, work: Awaitable[T], seconds: float) -> T:
    """What work gives, unless it takes too long (``HTTPException`` 503), or the client goes: then it is given up."""
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({doing, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        if gone.done():
            raise HTTPException(GONE, "the client has gone")
        raise HTTPException(503, f"not scored within {seconds:g} seconds: try again", RETRY_AFTER)
    finally:
        gone.cancel()
        doing.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
