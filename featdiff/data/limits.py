"""How much memory one image may take, and all that are decoded at once."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..exceptions import UnreadableImage

#: Larger files and members of archives are refused before they are read; generous for photographs.
MAX_BYTES = 512_000_000
#: What all decoding threads of a process may hold at once: fifteen photographs of 12 million pixels.
DECODING = 750_000_000
# Memory of images that take a larger part of a budget than this goes back to the system after each.
_LARGE = 1 / 8


def check_bytes(size: int | None, max_bytes: int) -> None:
    """Refuse content of more than ``max_bytes`` (``UnreadableImage``); None: its size is not known."""
    if size is not None and size > max_bytes:
        raise UnreadableImage(f"{size:,} bytes, more than the limit of {max_bytes:,} (max_bytes)", argument="max_bytes")


class Budget:
    """Memory that threads share: they wait until there is room for what they are about to hold.

    An image has two steps. Its file is read while at most half of the budget is taken, then decoded while its pixels
    fit as well. An image that would never fit is decoded when no other one is, so that nothing waits for ever: whoever
    holds memory is either decoding, and will be done, or is let in as soon as nobody decodes.

    Parameters
    ----------
    limit : int
        In bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reset()

    def reset(self) -> None:
        """Start anew with nothing held, as a forked process does, whose parent's threads it lacks."""
        self._changed = threading.Condition()
        self._held = 0
        self._decoding = 0

    @contextmanager
    def reading(self, size: int) -> Iterator[None]:
        """Hold ``size`` bytes of a file inside the block."""

        def fits() -> bool:
            return self._held == 0 or self._held + size <= self.limit // 2

        self._take(size, 0, fits)
        try:
            yield
        finally:
            self._take(-size, 0)

    @contextmanager
    def decoding(self, size: int) -> Iterator[None]:
        """Hold ``size`` bytes more, for pixels, inside the block; much goes back to the system after it."""

        def fits() -> bool:
            return self._decoding == 0 or self._held + size <= self.limit

        self._take(size, 1, fits)
        try:
            yield
        finally:
            if size > self.limit * _LARGE:
                trim_memory()
            self._take(-size, -1)

    def _take(self, size: int, images: int, fits: Callable[[], bool] = lambda: True) -> None:
        with self._changed:
            self._changed.wait_for(fits)
            self._held += size
            self._decoding += images
            if size < 0 or images < 0:
                self._changed.notify_all()


def trim_memory() -> None:
    """Return freed memory to the system; glibc keeps it for the thread that freed it, and other threads take new."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return None
    return trim


#: The budget of this process.
MEMORY = Budget(DECODING)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=MEMORY.reset)
