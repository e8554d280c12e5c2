"""Keeps what image libraries say of damaged files from standard error, while featdiff decodes and nowhere else.

Three ways lead there: Python's warnings, a logger of Pillow, and libtiff, which prints by itself. Each is asked to pass
over the threads that are inside :func:`quietly`. What others decode in the same process is reported as ever, and no
setting of theirs is changed.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import _imaging

_LONGEST = 200
_thread = threading.local()
_lock = threading.Lock()


@contextmanager
def quietly() -> Iterator[list[str]]:
    """Inside the block, this thread's image libraries print nothing.

    Yields
    ------
    list of str
        Gets what libtiff and Pillow's logger would have printed, a line each.
    """
    _tame_libraries()
    _put_filter_first()

    outer = _messages()
    messages: list[str] = []
    _thread.messages = messages
    try:
        yield messages
    finally:
        _thread.messages = outer


def _messages() -> list[str] | None:
    """Where this thread's messages go; None outside :func:`quietly`."""
    return getattr(_thread, "messages", None)


# ---- Python's warnings ----


class _InQuietThread:
    """Stands in a warnings filter where a regular expression for the text would: matches inside :func:`quietly`.

    ``warnings.catch_warnings`` is no way: it swaps the filters of all threads, and may leave them swapped.
    """

    pattern = r"(?!)"  # for those who copy filters as text: matches nothing

    def match(self, text: str) -> bool:
        return _messages() is not None


_FILTER: Any = ("ignore", _InQuietThread(), Warning, None, 0)


def _put_filter_first() -> None:
    """Others may have put theirs before it, or restored filters from before it was there."""
    filters: Any = warnings.filters
    if filters and filters[0] is _FILTER:
        return

    with _lock:
        while _FILTER in filters:
            filters.remove(_FILTER)
        filters.insert(0, _FILTER)


# ---- Pillow's logger, and libtiff ----


@functools.cache
def _tame_libraries() -> None:
    logging.getLogger("PIL.TiffImagePlugin").addFilter(_keep_record)
    _tame_libtiff()


def _keep_record(record: logging.LogRecord) -> bool:
    messages = _messages()
    if messages is None:
        return True
    if record.levelno >= logging.WARNING:
        messages.append(_line(record.getMessage()))
    return False


def _tame_libtiff() -> None:
    """Put a function of ours before libtiff's own, which prints; of Pillow's libtiff, and where it can be reached."""
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
    try:
        set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
        format_ = ctypes.pythonapi.PyOS_vsnprintf
    except (OSError, AttributeError):  # linked into Pillow without its names, as on Windows
        return
    set_handler.argtypes = [handler_type]
    set_handler.restype = handler_type
    format_.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p]

    def handle(module: bytes | None, text: bytes, values: int) -> None:
        messages = _messages()
        if messages is None:
            if previous:
                previous(module, text, values)
            return
        buffer = ctypes.create_string_buffer(_LONGEST)
        format_(buffer, _LONGEST, text, values)
        messages.append(_line(buffer.value.decode(errors="replace")))

    ours = handler_type(handle)
    previous = set_handler(ours)
    atexit.register(lambda: (set_handler(previous), ours))  # ours must outlive every call


def _line(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:_LONGEST]
