"""How long runs report their progress."""

from __future__ import annotations

from collections.abc import Callable

#: Called with (stage, done, total) as work goes on.
Progress = Callable[[str, int, int], None]
