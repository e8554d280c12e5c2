"""Progress bars and summaries on standard error; data never goes there, and bars only on a terminal."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .speech import say, say_warning

if TYPE_CHECKING:
    from featdiff.detectors.grouping import Grouping
    from featdiff.verdicts.calibration import Calibration


class Bars:
    """One bar per stage, and what was warned of below them. Detectors call it with (stage, done, total).

    Parameters
    ----------
    quiet : bool, default False
        Show neither; times are measured all the same.

    Attributes
    ----------
    seconds : dict of str to float
        How long each stage took.
    counts : dict of str to int
        How many items each stage has done.
    """

    def __init__(self, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal or console.is_dumb_terminal,
        )
        self._warnings = telling_warnings(quiet)
        self._tasks: dict[str, TaskID] = {}
        self._last = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self.counts[stage] = done
        self._last = now

        if stage not in self._tasks:
            from featdiff.files.text import for_terminal

            self._tasks[stage] = self._bars.add_task(for_terminal(stage), total=total, rate="")
        rate = f"{self.rate(stage):,.0f}/s"
        self._bars.update(self._tasks[stage], completed=done, total=total, rate=rate)

    def rate(self, stage: str) -> float:
        """Items per second of a stage."""
        return self.counts.get(stage, 0) / max(self.seconds.get(stage, 0.0), 1e-9)

    def __enter__(self) -> Self:
        self._warnings.__enter__()
        self._bars.start()
        self._last = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        self._warnings.__exit__(kind, value, trace)


@contextmanager
def telling_warnings(quiet: bool = False) -> Iterator[None]:
    """featdiff's own warnings as lines for people, with the command's options; shown when the work is done or fails."""
    from featdiff.exceptions import DamagedCache, NearCopiesFound

    with warnings.catch_warnings(record=True) as caught:
        for category in (DamagedCache, NearCopiesFound):
            warnings.simplefilter("always", category)
        try:
            yield
        finally:
            _tell(caught, quiet)


def _tell(caught: list[warnings.WarningMessage], quiet: bool) -> None:
    """Print what was warned of; other libraries' warnings in their own way."""
    from featdiff.exceptions import FeatdiffError

    for warning in caught:
        if issubclass(warning.category, FeatdiffError):
            text = re.sub(r"\b([a-z]+)=(?=\w)", r"--\1 ", str(warning.message))
            say(f"WARNING: {text}", quiet)
        else:
            say_warning(warning.message, warning.category, warning.filename, warning.lineno)


def calibrated(calibration: Calibration, grouping: Grouping, what: str) -> str:
    """A line on what p-values are compared with."""
    from featdiff.verdicts.calibration import smallest_rate

    groups = ""
    if grouping.count is not None:
        groups = f" in {calibration.groups:,} groups ({grouping.how})"
    least = smallest_rate(calibration.groups)
    return f"calibrated on {len(calibration):,} held-out {what}{groups}: --fpr from {least} up"


def list_unreadable(
    unreadable: list[tuple[str, str]], quiet: bool = False, all_in: Path | None = None, most: int = 10
) -> None:
    """Print which images were left out, and why; of many, the first ``most`` and the file that lists all."""
    for path, reason in unreadable[:most]:
        say(f"  left out: {path}: {reason}", quiet)

    if len(unreadable) > most:
        where = f", all listed in {all_in}" if all_in else ""
        say(f"  ... and {len(unreadable) - most} more{where}", quiet)
