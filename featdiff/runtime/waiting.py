"""How long a run has waited for its images. Imports no torch: the command line shows it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")


class Stopwatch:
    """Adds up the time of several calls, on whatever thread.

    Attributes
    ----------
    seconds : float

    Examples
    --------
    >>> watch = Stopwatch()
    >>> watch.during(lambda: time.sleep(0.01))
    >>> watch.seconds > 0.009
    True
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()

    def during(self, work: Callable[[], _Result]) -> _Result:
        """Call it, and count the time that it takes, also if it fails."""
        start = time.monotonic()
        try:
            return work()
        finally:
            with self._lock:
                self.seconds += time.monotonic() - start


#: Time in which whoever wanted the next image had to wait until it was read and decoded, of all runs of this process.
WAITED = Stopwatch()
