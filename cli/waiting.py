"""Which share of a run was spent in waiting for images, in words."""

from __future__ import annotations

from featdiff.runtime.waiting import WAITED

# From which share of the time, of at least so many seconds, waiting is worth a word.
_MUCH = 0.2
_LONG = 10.0


class Waits:
    """How long each stage of a run has waited for images."""

    def __init__(self) -> None:
        self._of_stages: dict[str, float] = {}
        self.begin()

    def begin(self) -> None:
        """What was waited up to now is no stage's."""
        self._last = WAITED.seconds

    def reach(self, stage: str) -> None:
        """What was waited since the last report is this stage's."""
        self._of_stages[stage] = self._of_stages.get(stage, 0.0) + WAITED.seconds - self._last
        self.begin()

    def in_words(self, stage: str, seconds: float) -> str:
        """A line on a stage that took so long; empty if it was short, or waiting a small share of it."""
        share = self._of_stages.get(stage, 0.0) / max(seconds, 1e-9)
        if seconds < _LONG or share < _MUCH:
            return ""
        return f"for {share:.0%} of that time the backbone waited for images: smaller files or more CPUs help"
