"""How many rows a run has, and what became of them. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .results import Scores


@dataclass
class Counts:
    """Rows that were scored, and how many of them were flagged, could not be read, failed, or are training images."""

    rows: int = 0
    flagged: int = 0
    unreadable: int = 0
    failed: int = 0
    known: int = 0

    def add(self, part: Scores) -> None:
        """Count a part."""
        from .results import ERROR, UNREADABLE

        self.rows += len(part)
        self.flagged += part.flagged
        self.unreadable += part.status.count(UNREADABLE)
        self.failed += part.status.count(ERROR)
        if part.known is not None:
            self.known += int(part.known.sum())

    def add_counts(self, other: Counts) -> None:
        """Count the rows of another run."""
        self.rows += other.rows
        self.flagged += other.flagged
        self.unreadable += other.unreadable
        self.failed += other.failed
        self.known += other.known
