"""How long a run has waited for its images. Imports no torch: the command line shows it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up the time of several stretches of work, on whatever thread.

    Attributes
    ----------
    seconds : float

    Examples
    --------
    >>> watch = Stopwatch()
    >>> with watch.running():
    ...     time.sleep(0.01)
    >>> watch.seconds > 0.009
    True
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside the block."""
        start = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self.seconds += time.monotonic() - start


#: Time in which nothing but reading and decoding went on, in all runs of this process.
WAITED = Stopwatch()
