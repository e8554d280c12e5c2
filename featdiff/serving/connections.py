"""A connection as uvicorn has it, and a limit on how long a client may keep one without asking anything."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Connection(HttpToolsProtocol):
    """Closes when no request begins, or no head of one ends, or a refused body goes on, for ``timeout_keep_alive``.

    uvicorn has a limit for the time between two requests only.
    """

    _watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look_again()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def _look_again(self) -> None:
        self._watch = self.loop.call_later(self.timeout_keep_alive, self._look, self.cycle)

    def _look(self, before: Any) -> None:
        """``before``: the request of the last look."""
        is_idle = self.cycle is None or self.cycle.response_complete
        if not is_idle or self.cycle is not before:
            self._look_again()
        elif not self.transport.is_closing():
            if self.cycle is None:
                self.transport.write(_TOO_SLOW)
            self.transport.close()
