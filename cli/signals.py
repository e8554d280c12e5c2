"""Ctrl-C and the signals that ask a process to end, so that it can say what is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from .main import Stopped

# Signals that ask a process to end; Windows lacks the last.
_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclass
class Stop:
    """Which signal came, if one did; work that it cut short goes on until the ``KeyboardInterrupt`` arrives."""

    signal: int = 0

    def stopped(self, kept: str) -> Stopped:
        """What leaves the command: what is kept, and the exit code that belongs to the signal."""
        return Stopped(f"interrupted; {kept}", 128 + (self.signal or signal.SIGINT))


@contextmanager
def catching_stop() -> Iterator[Stop]:
    """Inside, SIGTERM and SIGHUP raise ``KeyboardInterrupt`` as Ctrl-C does; signals that are ignored stay so."""
    stop = Stop()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        raise KeyboardInterrupt

    with _handled(on_signal, (signal.SIG_DFL, signal.default_int_handler)):
        yield stop


@contextmanager
def ending_by_signal(end: Callable[[], None]) -> Iterator[None]:
    """Inside, the first signal calls ``end``, for work that ends so; what the second one does is as before."""
    handlers: dict[int, Any] = {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        end()
        for known, handler in handlers.items():
            signal.signal(known, handler)

    with _handled(on_signal) as before:
        handlers |= before
        yield


@contextmanager
def _handled(
    on_signal: Callable[[int, FrameType | None], None], instead_of: Container[Any] = ()
) -> Iterator[dict[int, Any]]:
    """Signals that ask a process to end go to this handler, in place of these or of all; ignored ones stay so."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]
        for number in numbers:
            handler = signal.getsignal(number)
            if handler in instead_of or (not instead_of and handler not in (signal.SIG_IGN, None)):
                before[number] = signal.signal(number, on_signal)
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
