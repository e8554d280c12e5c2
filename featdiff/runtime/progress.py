"""How long runs report their progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..exceptions import UsageError

#: Called with (stage, done, total) as work goes on.
Progress = Callable[[str, int, int], None]

# What is done before the first report.
_LOADING = "loading the backbone"
# Seconds between two updates where each is a line of a log.
_IN_LOGS = 30.0


class Bars:
    """Bars for scripts and notebooks, by tqdm: one for each stage, below each other.

    Examples
    --------
    >>> from featdiff.runtime.progress import Bars
    >>> with Bars() as bars:
    ...     bars("features", 32, 64)
    ...     bars("features", 64, 64)
    """

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def __enter__(self) -> Bars:
        self._bar = _new_bar(_LOADING, None, leave=False)
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or done < self._bar.n:
            self._bar.close()
            self._bar = _new_bar(stage, total)
            self._stage = stage
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _new_bar(text: str, total: int | None, leave: bool = True) -> Any:
    from tqdm.auto import tqdm

    in_log = not sys.stderr.isatty() and "ipykernel" not in sys.modules
    return tqdm(desc=text, total=total, leave=leave, mininterval=_IN_LOGS if in_log else 0.1, dynamic_ncols=not in_log)


@contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """What an argument ``progress`` asks for.

    Parameters
    ----------
    progress : bool or callable (stage, done, total), optional
        True opens bars, which are closed at the end; a callable is used as it is.

    Yields
    ------
    callable or None

    Raises
    ------
    UsageError
        Anything else.
    """
    if progress is True:
        with Bars() as bars:
            yield bars
        return

    if progress is None or progress is False:
        yield None
        return

    if not callable(progress):
        raise UsageError(f"progress is True, or a callable (stage, done, total), not {progress!r}", argument="progress")
    yield progress


def part_of(progress: Progress | None, number: int, count: int, name: str = "") -> Progress | None:
    """Progress of one of several trainings of about one length.

    Parameters
    ----------
    progress : callable (stage, done, total), optional
    number, count : int
        Which of how many.
    name : str, optional
        What the stage is called; default: what the training calls it.
    """
    if progress is None:
        return None

    def report(stage: str, done: int, total: int) -> None:
        progress(name or stage, number * total + done, count * total)

    return report
