"""Progress and summaries on standard error, where data never goes: bars on a terminal, else a line now and then."""

from __future__ import annotations

import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from .log import replaces_lines
from .rounds import Round, per_second
from .speech import is_first_process, say, say_warning
from .waiting import Waits

if TYPE_CHECKING:
    from featdiff.detectors.grouping import Grouping
    from featdiff.verdicts.calibration import Calibration

# What is going on before there is anything to count.
_LIBRARIES = "loading libraries and the model"
_BACKBONE = "loading the backbone"
# Without a terminal: seconds until the first line, and between two lines, unless the environment says otherwise.
_FIRST_LINE = 5.0
_NEXT_LINE = 30.0
_SECONDS = "FEATDIFF_LOG_SECONDS"


class Lines:
    """A line on standard error now and then, from a thread of its own, so that a long silent step has one, too.

    Parameters
    ----------
    text : callable
        The line at this moment.
    fields : callable, optional
        The same for programs, by name.
    """

    # When the last line was printed, by whichever object: they are about one command.
    _printed: ClassVar[float] = float("-inf")

    def __init__(self, text: Callable[[], str], fields: Callable[[], dict[str, Any]] = dict) -> None:
        self._text = text
        self._fields = fields
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._print, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _print(self) -> None:
        seconds = seconds_between_lines()
        if not seconds:
            return
        pause = max(_FIRST_LINE, Lines._printed + seconds - time.monotonic())
        while not self._over.wait(pause):
            say(self._text(), **self._fields())
            Lines._printed = time.monotonic()
            pause = seconds


def seconds_between_lines() -> float:
    """What the environment says, 0 for no lines; a value that is no number is as none."""
    try:
        return max(0.0, float(os.environ.get(_SECONDS, _NEXT_LINE)))
    except ValueError:
        return _NEXT_LINE


class Spinner:
    """A word on a terminal, for the time until there is something to count; then it is erased."""

    def __init__(self, text: str, console: Console) -> None:
        # whatever goes to standard output passes the spinner by
        self._line = Progress(
            SpinnerColumn(), TextColumn(text, markup=False), console=console, transient=True, redirect_stdout=False
        )
        self._line.add_task("")

    def start(self) -> None:
        self._line.start()

    def stop(self) -> None:
        self._line.stop()


# What says that a command is starting, until its first bars.
_starting: Lines | Spinner | None = None


@contextmanager
def starting(quiet: bool = False) -> Iterator[None]:
    """A word on the seconds in which libraries and the model are loaded, until the first :class:`Bars` begin."""
    global _starting

    if not quiet and is_first_process():
        _starting = _word(_LIBRARIES)
        _starting.start()
    try:
        yield
    finally:
        started()


@contextmanager
def saying(text: str, quiet: bool = False) -> Iterator[None]:
    """A word on seconds in which there is nothing to count; in logs only if they are many."""
    shown = None if quiet else _word(text)
    if shown is not None:
        shown.start()
    try:
        yield
    finally:
        if shown is not None:
            shown.stop()


def _word(text: str) -> Spinner | Lines:
    console = Console(stderr=True)
    return Spinner(text, console) if _is_terminal(console) else Lines(lambda: text)


def started() -> None:
    """End the word of :func:`starting`."""
    global _starting

    if _starting is not None:
        _starting.stop()
        _starting = None


def _is_terminal(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal and not replaces_lines()


class Bars:
    """How far a run is, and what was warned of below it. Detectors call it with (stage, done, total).

    On a terminal each stage has a bar. Elsewhere, as in logs, there is a line after some seconds, and then at most one
    every half minute.

    Parameters
    ----------
    quiet : bool, default False
        Show neither; times are measured all the same.

    Attributes
    ----------
    seconds : dict of str to float
        How long each stage took.
    counts : dict of str to int
        How many items each stage has done. A stage may come again with other items, and all are counted.
    waits : Waits
        How long each stage waited for images.
    """

    def __init__(self, quiet: bool = False) -> None:
        console = Console(stderr=True)
        on_terminal = _is_terminal(console)
        self._bars = Progress(
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            console=console,
            transient=True,
            disable=quiet or not on_terminal,
        )
        self._spinner = Spinner(_BACKBONE, console) if on_terminal and not quiet else None
        self._lines = None if on_terminal or quiet else Lines(self.line, self.fields)
        self._warnings = telling_warnings(quiet)
        self._tasks: dict[str, TaskID] = {}
        self._rounds: dict[str, Round] = {}
        self._stage = ""
        self._last = time.monotonic()
        self.waits = Waits()
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        latest = self._rounds.get(stage)
        if latest is None or latest.is_over(done, total, stage == self._stage):
            latest = self._rounds[stage] = Round(now, done)
        self.counts[stage] = self.counts.get(stage, 0) + done - latest.done
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        latest.reach(now, done, total)
        self.waits.reach(stage)
        self._stage = stage
        self._last = now

        self._draw(stage, done, total)

    def _draw(self, stage: str, done: int, total: int) -> None:
        if self._bars.disable:
            return
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None
            self._bars.start()
        if stage not in self._tasks:
            from featdiff.files.text import for_terminal

            self._tasks[stage] = self._bars.add_task(for_terminal(stage), total=total or None, rate="")
        self._bars.update(self._tasks[stage], completed=done, total=total or None, rate=per_second(self.rate(stage)))

    def rate(self, stage: str) -> float:
        """Items per second of a stage."""
        return self.counts.get(stage, 0) / max(self.seconds.get(stage, 0.0), 1e-9)

    def line(self) -> str:
        """How far the present stage is, in words."""
        if not self._stage:
            return _BACKBONE
        return f"{self._stage}: {self._rounds[self._stage].in_words(self.rate(self._stage))}"

    def fields(self) -> dict[str, Any]:
        """The same for programs."""
        latest = self._rounds.get(self._stage) or Round(0.0, 0)
        return {"stage": self._stage, "done": latest.done, "total": latest.total, "rate": self.rate(self._stage)}

    def __enter__(self) -> Self:
        started()
        self._warnings.__enter__()
        for shown in (self._spinner, self._lines):
            if shown is not None:
                shown.start()
        self._last = time.monotonic()
        self.waits.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shown in (self._spinner, self._lines):
            if shown is not None:
                shown.stop()
        self._bars.stop()
        self._warnings.__exit__(kind, value, trace)


@contextmanager
def telling_warnings(quiet: bool = False) -> Iterator[None]:
    """featdiff's own warnings as lines for people, with the command's options; shown when the work is done or fails."""
    from featdiff.exceptions import DamagedCache, LargeShift, LogStopped, NearCopiesFound, OtherEngine

    with warnings.catch_warnings(record=True) as caught:
        for category in (DamagedCache, LargeShift, LogStopped, NearCopiesFound, OtherEngine):
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
    unreadable: list[tuple[str, str]],
    quiet: bool = False,
    all_in: Path | None = None,
    most: int = 10,
    what: str = "left out: ",
) -> None:
    """Print which images were left out, and why; of many, the first ``most`` and the file that lists all."""
    for path, reason in unreadable[:most]:
        say(f"  {what}{path}: {reason}", quiet, path=path, reason=reason)

    if len(unreadable) > most:
        where = f", all listed in {all_in}" if all_in else ""
        say(f"  ... and {len(unreadable) - most} more{where}", quiet)
