"""Score images as they arrive: one row each, and an alarm once they are no longer like those of the calibration."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..report.writers import open_writer
from ..verdicts.drift import DriftTest
from ..verdicts.layer_drift import LayerDrift
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
    layers : LayerDrift, optional
        Sees the scores of the layers, likewise. One alarm of a layer is told for each side, and none after that of the
        whole score.

    Attributes
    ----------
    counts : Counts
        Of all rows.
    test : DriftTest, optional
    layers : LayerDrift, optional

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
        layers: LayerDrift | None = None,
    ) -> None:
        self._source = source
        self._score = score
        self._state = state
        self._fpr = fpr
        self._on_alarm = on_alarm
        self._tell = tell
        self.counts = state.counts
        self.test = test
        self.layers = layers
        if test and state.drift:
            self.test = DriftTest.from_json(state.drift)
            self.layers = layers and layers.resumed(state.drift.get("layers"))
        self._chance = sum(each.alpha + each.delta for each in self._tests.values())

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
        if self.layers:
            self.layers.update(part[counted].layers)
        self.counts.add(part)
        self._state.add(keys, _lines(part), self.counts, self._drift())

        if not counted.all():
            first = part[int(np.argmin(counted))]
            others = f" and {(~counted).sum() - 1:,} more" if (~counted).sum() > 1 else ""
            reason = first.reason or f"p-value {first.p_value:g}"
            self._tell(f"without a p-value, so not in the test of drift: {first.path} ({reason}){others}")
        self._alarms()

    def _drift(self) -> dict[str, Any] | None:
        """The tests, as what JSON can hold."""
        if self.test is None:
            return None
        layers = {"layers": self.layers.to_json()} if self.layers else {}
        return self.test.to_json() | layers

    @property
    def alarms(self) -> list[tuple[str, str, DriftTest]]:
        """Layer, side and test of each alarm that stands; those of the whole score come first, with an empty name."""
        return [(layer, side, test) for layer, test in self._tests.items() for side in test.alarms]

    @property
    def _tests(self) -> dict[str, DriftTest]:
        whole = {"": self.test} if self.test else {}
        return whole | (self.layers.tests if self.layers else {})

    def _alarms(self) -> None:
        """Tell those that were not told."""
        for layer, side, test in self.alarms:
            told = self._state.told
            name = f"{layer}: {side}" if layer else side
            if name in told or (layer and any(before.endswith(side) for before in told)):
                continue
            rows = self.counts.rows
            self._on_alarm(Alarm.of(test, side, self._fpr, rows, self._state.since, self._chance, layer))
            self._state.tell(name)


def _lines(part: Scores) -> bytes:
    stream = io.BytesIO()
    open_writer("jsonl", stream).write(part)
    return stream.getvalue()
