"""Ctrl-C and the signals that ask a process to end, so that it can say what is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from .main import Stopped


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

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows lacks the last
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
