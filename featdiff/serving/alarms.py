"""An alarm of a watch: in words, for programs, and told by a command of the user's own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

from ..exceptions import FeatdiffError
from ..verdicts.drift import STRANGE, WINDOW, DriftTest

#: Seconds that a command may take.
PATIENCE = 60.0


@dataclass(frozen=True)
class Alarm:
    """A stream has changed.

    Attributes
    ----------
    side : str
        ``strange``: too many strange images; ``normal``: too few.
    layer : str
        The layer whose scores have changed; empty: the whole score.
    after : int
        Images in the test when its alarm came.
    counted, uncounted : int
        Images that are in the test by now, and rows without a p-value, which are not.
    rows : int
        All rows.
    fpr : float
        The false-alarm rate of the rows.
    share, low, high : float
        Share of the latest images with a p-value up to ``fpr``, and its interval at 95 %, in [0, 1]; of a layer, by the
        p-values of its scores.
    distance : float
        Kolmogorov-Smirnov distance of their p-values from even ones, in [0, 1].
    chance : float
        Normal images give any alarm with at most this probability, in all time.
    """

    side: str
    layer: str
    after: int
    counted: int
    uncounted: int
    rows: int
    fpr: float
    share: float
    low: float
    high: float
    distance: float
    chance: float

    @classmethod
    def of(cls, test: DriftTest, side: str, fpr: float, rows: int, since: int, chance: float, layer: str = "") -> Self:
        """The alarm of a side of a test that began after ``since`` of all ``rows``."""
        share, low, high = test.share(fpr)
        return cls(
            side=side,
            layer=layer,
            after=test.alarms[side],
            counted=test.count,
            uncounted=rows - since - test.count,
            rows=rows,
            fpr=fpr,
            share=share,
            low=low,
            high=high,
            distance=test.distance,
            chance=chance,
        )

    def in_words(self) -> str:
        """On one line."""
        what = "more small p-values than normal images have"
        if self.side != STRANGE:
            what = "fewer small p-values than normal images have, as with a frozen camera or images of the training"
        if self.layer:
            what = f"layer {self.layer} has {what}"
        rows = "row without a p-value is" if self.uncounted == 1 else "rows without a p-value are"
        without = f"; {self.uncounted:,} {rows} not counted" if self.uncounted else ""
        share, low, high, fpr = (f"{100 * value:.1f}" for value in (self.share, self.low, self.high, self.fpr))
        return (
            f"{what}, found after {self.after:,} images: of the latest {min(WINDOW, self.counted):,}, {share} % have "
            f"one up to {self.fpr:g} (95 % interval {low} to {high} %), where normal images have {fpr} %; the p-values "
            f"are {self.distance:.2f} from even ones (0: as of normal images, 1: as far as can be){without}"
        )

    def as_json(self) -> str:
        """All of it, and ``message``, the words."""
        return json.dumps({**asdict(self), "message": self.in_words()})


def run_command(words: Sequence[str], alarm: Alarm, patience: float = PATIENCE) -> None:
    """Run a command with an alarm as JSON on its standard input; what it prints goes to standard error.

    Parameters
    ----------
    words : sequence of str
        Program and arguments; no shell takes part.
    alarm : Alarm
    patience : float, default :data:`PATIENCE`
        Seconds after which it is killed, with all that it has started.

    Raises
    ------
    FeatdiffError
        It cannot be run, fails, or takes too long.
    """
    output = subprocess.DEVNULL if sys.stderr is None else 2
    try:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True)
    except OSError as error:
        raise FeatdiffError(f"{words[0]} cannot be run: {error.strerror or error}") from None
    try:
        process.communicate(alarm.as_json().encode() + b"\n", timeout=patience)
    except subprocess.TimeoutExpired:
        raise FeatdiffError(f"{words[0]} took more than {patience:g} s and was killed") from None
    finally:
        if process.poll() is None:
            _kill(process)
    if process.returncode:
        raise FeatdiffError(f"{words[0]} ended with code {process.returncode}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
