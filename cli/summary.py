"""What ``score`` says at the end: counts, the strangest images, and what to type next."""

from __future__ import annotations

import heapq
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import MODEL_FOLDER
from .speech import say

if TYPE_CHECKING:
    from featdiff import Scores
    from featdiff.verdicts.counts import Counts

#: How many of the strangest rows are named.
FEW = 5
# Columns of a terminal that are filled at most.
_WIDTH = 80


def in_words(counts: Counts, what: str, fpr: float, speed: str = "") -> str:
    """Counts of rows, of which one is called ``what`` without its s, on one line."""
    bad = f", {counts.unreadable:,} unreadable" if counts.unreadable else ""
    bad += f", {counts.failed:,} failed" if counts.failed else ""
    what = what.removesuffix("s") if counts.rows == 1 else what
    return f"{counts.rows:,} {what}{speed}: {counts.flagged:,} OOD at fpr {fpr:g}{bad}"


@dataclass
class Strangest:
    """The strangest rows of a run so far, strangest first."""

    rows: list[Mapping[str, Any]] = field(default_factory=list)

    def add(self, part: Scores) -> None:
        """Look at a part."""
        self.add_rows(part.sorted()[:FEW].rows())

    def add_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Look at rows of before; those without a score are passed over."""
        scored = (row for row in rows if row["ood_score"] is not None)
        self.rows = heapq.nsmallest(FEW, [*self.rows, *scored], key=_strangeness)

    def say(self, quiet: bool) -> None:
        """Print p-value, score and path of each."""
        if not self.rows:
            return
        say("The strangest:" if len(self.rows) > 1 else "Its result:", quiet)
        for row in self.rows:
            numbers = f"  p {row['p_value']:.4f}  score {row['ood_score']:6.2f}  "
            say(f"{numbers}{shortened(row['path'], _WIDTH - len(numbers))}", quiet)

    def say_next(self, model: str, quiet: bool) -> None:
        """Print the command that explains the strangest image."""
        from featdiff.files.text import for_terminal

        for row in self.rows:
            path = row["path"]
            if for_terminal(path) == path and not path.startswith("-"):  # else this is not what must be typed
                command = ["featdiff", "explain", path] + ([] if model == MODEL_FOLDER else ["-m", model])
                say(f"Next: {shlex.join([*command, '-o', 'explained'])}", quiet)
                if not click.get_current_context().params.get("report"):
                    say("      or the same featdiff score with --report report.html", quiet)
                return


def is_seen_as_table(output: Path | None, format_: str) -> bool:
    """Whether people see the rows on a terminal."""
    return output is None and format_ == "table" and sys.stdout.isatty()


def shortened(path: str, width: int) -> str:
    """The end of a path that fits into so many columns, behind ``...``; made safe for a terminal.

    Letters of East Asia take two columns.
    """
    from rich.cells import cell_len

    from featdiff.files.text import for_terminal

    text = for_terminal(path)
    if cell_len(text) <= width:
        return text
    while cell_len(text) > width - 3:
        text = text[max(1, (cell_len(text) - width + 3) // 2) :]
    return f"...{text}"


def _strangeness(row: Mapping[str, Any]) -> tuple[float, float]:
    """Small for strange images, as in :func:`featdiff.verdicts.results.strangest_first`."""
    return row["p_value"], -row["ood_score"]
