"""Score images as they arrive: one row each, and an alarm once they are no longer like those of the calibration."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..report.writers import open_writer
from ..verdicts.drift import DriftTest
from ..verdicts.results import OK, UNREADABLE, Scores
from .alarms import Alarm
from .cluster import Score
from .watch_sources import Arrival, Source
from .watch_state import Key, WatchState


class Watch:
    """A source of images, a model, and the rows of the images that have come.

    Parameters
    ----------
    source : Source
        Where images come from.
    score : callable
        From images to the parts of their rows.
    state : WatchState
        Where rows go, and what is known of those before.
    test : DriftTest, optional
        Sees the p-values; it goes on where the state says. None: there are no alarms.
    fpr : float
        The false-alarm rate of the rows, which alarms speak of.
    on_alarm : callable
        Told of each alarm once; once more if the process was killed meanwhile.
    tell : callable
        Takes a line on images without a p-value.

    Attributes
    ----------
    counts : Counts
        Of all rows.
    test : DriftTest, optional

    Raises
    ------
    UsageError
        The state of the test is damaged, or of another version.
    """

    def __init__(
        self,
        source: Source,
        score: Score,
        state: WatchState,
        test: DriftTest | None,
        fpr: float,
        on_alarm: Callable[[Alarm], None],
        tell: Callable[[str], None],
    ) -> None:
        self._source = source
        self._score = score
        self._state = state
        self._fpr = fpr
        self._on_alarm = on_alarm
        self._tell = tell
        self.counts = state.counts
        self.test = DriftTest.from_json(state.drift) if test and state.drift else test

    def run(self, once: bool = False, after_each: Callable[[], None] = lambda: None) -> None:
        """Score what comes.

        Parameters
        ----------
        once : bool, default False
            End when all is scored that was there at the first look.
        after_each : callable, optional
            Called after each look, and after each part of the rows.
        """
        self._alarms()  # that were not told when the process before was killed
        looks = 0
        while True:
            begun = time.monotonic()
            waiting = self._source.look(self._state.is_done)
            looked = time.monotonic() - begun
            looks += 1
            while arrivals := self._source.take():
                for _ in self._add(arrivals):
                    after_each()
            after_each()

            if self._source.over or (once and (looks > 1 or not waiting)):
                return
            if self._source.pause:
                time.sleep(max(self._source.pause, looked))  # a large folder shall not keep a disk busy

    def _add(self, arrivals: Sequence[Arrival]) -> Iterator[None]:
        """Score images that are whole; each part is done when it has its rows."""
        done = 0
        for part in self._score([arrival.ref for arrival in arrivals]):
            batch = arrivals[done : done + len(part)]
            done += len(part)
            kept = [i for i, arrival in enumerate(batch) if self._source.keeps(arrival, part.status[i] != UNREADABLE)]
            if kept:
                self._keep(part[kept], [batch[i].key for i in kept])
            yield

    def _keep(self, part: Scores, keys: Sequence[Key]) -> None:
        values = np.asarray(part.p_value, dtype=np.float64)
        counted = (np.array(part.status) == OK) & (values > 0) & (values <= 1)
        if self.test:
            self.test.update(values[counted])
        self.counts.add(part)
        self._state.add(keys, _lines(part), self.counts, self.test.to_json() if self.test else None)

        if not counted.all():
            first = part[int(np.argmin(counted))]
            others = f" and {(~counted).sum() - 1:,} more" if (~counted).sum() > 1 else ""
            reason = first.reason or f"p-value {first.p_value:g}"
            self._tell(f"without a p-value, so not in the test of drift: {first.path} ({reason}){others}")
        self._alarms()

    def _alarms(self) -> None:
        """Tell those that were not told."""
        if self.test is None:
            return
        told = self._state.told
        for side in self.test.alarms:
            if side not in told:
                self._on_alarm(Alarm.of(self.test, side, self._fpr, self.counts.rows, self._state.since))
                self._state.tell(side)


def _lines(part: Scores) -> bytes:
    stream = io.BytesIO()
    open_writer("jsonl", stream).write(part)
    return stream.getvalue()
