"""How far a stage of a run is with its items, in words."""

from __future__ import annotations


class Round:
    """How far a stage is with its items; the next round of the same stage has others.

    Parameters
    ----------
    now : float
        Time of the first report.
    done : int
        Items that were done by then.
    """

    def __init__(self, now: float, done: int) -> None:
        self._first = (now, done)
        self._now = now
        self.done = 0
        self.total = 0

    def is_over(self, done: int, total: int, is_present: bool) -> bool:
        """Whether a report is about other items; ``is_present``: no other stage has reported since."""
        return done < self.done or (total != self.total and not is_present)

    def reach(self, now: float, done: int, total: int) -> None:
        self._now = now
        self.done = done
        self.total = total

    def in_words(self, rate: float) -> str:
        """What is done, how fast, and the time left; ``rate`` counts as long as there was one report only."""
        start, first = self._first
        if self._now > start and self.done > first:
            rate = (self.done - first) / (self._now - start)

        of = f" of {self.total:,} ({self.done / self.total:.0%})" if self.total else ""  # 0: not known
        text = f"{self.done:,}{of}, {per_second(rate)}"
        if rate > 0 and self.total > self.done:
            text += f", about {_duration((self.total - self.done) / rate)} left"
        return text


def per_second(rate: float) -> str:
    """``12/s``, ``0.25/s``."""
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"


def _duration(seconds: float) -> str:
    """A time in words: ``40 s``, ``12 min``, ``3 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
