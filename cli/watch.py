"""``featdiff watch``."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_FAILED, EXIT_OOD, EXIT_UNREADABLE
from .options import model_option, runtime_options, weights_option
from .progress import seconds_between_lines, started
from .rates import rate_options
from .shards import Asked, asked_of
from .signals import Stop, catching_stop
from .speech import say
from .summary import in_words

if TYPE_CHECKING:
    from featdiff import Scores
    from featdiff.data.image_refs import ImageRef
    from featdiff.serving.alarms import Alarm
    from featdiff.serving.watch import Watch
    from featdiff.serving.watch_sources import Source
    from featdiff.serving.watch_state import WatchState
    from featdiff.verdicts.drift import DriftTest
    from featdiff.verdicts.layer_drift import LayerDrift

# Chance of a false alarm for an unlucky calibration set.
_DELTA = 0.01


@click.command("watch")
@click.argument("source", metavar="FOLDER|MANIFEST|-")
@model_option
@weights_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default="rows.jsonl",
    show_default=True,
    metavar="FILE",
    help="JSON lines are added to it; FILE.state beside it says what is done.",
)
@click.option("--once", is_flag=True, help="Score what is there, then leave; with exit code 4 while an alarm stands.")
@click.option(
    "--poll",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks; a file that they find the same is whole.",
)
@click.option(
    "--rotate-mb",
    type=click.FloatRange(0, min_open=True),
    metavar="N",
    help="Once the rows have N MB, number their file, and begin a new one [never].",
)
@click.option("--on-alarm", metavar="COMMAND", help="Run at each alarm; reads it as JSON on its standard input.")
@rate_options
@click.option(
    "--alpha", type=float, default=0.01, show_default=True, help="Chance of a false alarm, in all time, of the stream."
)
@click.option("--restart-drift", is_flag=True, help="Begin the test of drift anew; accept another model or rate.")
@runtime_options
def command(source: str, output: Path, once: bool, quiet: bool, **options: Any) -> int:
    """Score images as they arrive in a FOLDER, are named in a MANIFEST, or on standard input (-, paths, one a line).

    One row each, as from featdiff score, is added to -o. A stream whose images are no longer like those of the
    training, or too much like them, gives an alarm: one line on standard error, and --on-alarm. It stays until
    --restart-drift.

    A process may be killed at any moment: the same command goes on, and each image has its row once.

    \b
    Example: featdiff watch incoming/ -m my-model -o rows.jsonl
    Example: featdiff watch incoming/ -m my-model -o rows.jsonl --once
    Example: featdiff watch incoming/ -m my-model --on-alarm 'mail -s drift me@example.org'
    """
    from featdiff.runtime.allocator import keep_freed_memory
    from featdiff.serving.watch_sources import open_source
    from featdiff.serving.watch_state import SOURCE, SUFFIX

    _check_output(output)
    on_alarm = _words(options["on_alarm"])
    known = Path(f"{os.path.realpath(output)}{SUFFIX}").exists()
    images = open_source(source, say, options["poll"], known)
    keep_freed_memory()
    asked = asked_of({**options, "exclude_known": False, "ray": None})
    made_with = {**asked.made_with, SOURCE: source if source == "-" else os.path.abspath(source)}
    made_with["alpha"] = options["alpha"]
    tests = _tests(asked, options["alpha"], on_alarm, quiet)
    rotate = int((options["rotate_mb"] or 0) * 1e6)

    with catching_stop() as stop:
        try:
            with _open_state(output, made_with, rotate, options["restart_drift"]) as state:
                watch = _watch(images, asked, state, tests, on_alarm, stop, quiet)
                started()
                before = replace(watch.counts)
                say(f"watching {source}: {before.rows:,} rows are in {output}", quiet)
                watch.run(once, _Lines(watch, asked.fpr, quiet))
        except KeyboardInterrupt:
            raise stop.stopped(f"all rows so far are in {output}: the same command goes on from there") from None

    counts = watch.counts
    new = f"{counts.rows - before.rows:,} new; all: {in_words(counts, 'images', asked.fpr)}, in {output}"
    say(new, quiet, fpr=asked.fpr, **asdict(counts))
    if watch.alarms:
        return EXIT_OOD
    if images.troubled:
        return EXIT_FAILED
    return EXIT_UNREADABLE if counts.unreadable + counts.failed > before.unreadable + before.failed else 0


def _check_output(output: Path) -> None:
    from featdiff.exceptions import UsageError

    if output.suffix.lower() not in (".jsonl", ".ndjson"):
        raise UsageError(f"{output}: rows of a watch are JSON lines: choose a name like rows.jsonl", argument="output")


def _open_state(output: Path, made_with: dict[str, Any], rotate: int, restart: bool) -> WatchState:
    from featdiff.exceptions import UsageError
    from featdiff.serving.watch_state import WatchState

    try:
        return WatchState(output, made_with, rotate, restart)
    except UsageError as error:
        if error.argument != "restart":
            raise
        raise UsageError(f"{error}; --restart-drift goes on with the new one") from None


def _words(on_alarm: str | None) -> list[str]:
    """The words of a command, whose program there is (``UsageError``)."""
    from featdiff.exceptions import UsageError

    try:
        words = shlex.split(on_alarm or "")
    except ValueError as error:
        raise UsageError(f"{on_alarm!r}: {error}", argument="on_alarm") from None
    program = words[0] if words else ""
    if on_alarm is not None and shutil.which(program) is None:
        raise UsageError(f"no program {program!r}", argument="on_alarm")
    return words


def _tests(
    asked: Asked, alpha: float, on_alarm: Sequence[str], quiet: bool
) -> tuple[DriftTest | None, LayerDrift | None]:
    """Tests of drift of the whole score and of its layers, if there are enough held-out images."""
    from featdiff.verdicts.drift import FEWEST, SIDES, DriftTest
    from featdiff.verdicts.layer_drift import LayerDrift

    calibration = asked.detector.calibration_
    groups = calibration.groups
    if groups >= FEWEST and calibration.layers:  # either has half of the chance of a false alarm
        alpha, delta = alpha / 2, _DELTA / 2
        return DriftTest(groups, alpha, delta, SIDES), LayerDrift(calibration, alpha, delta, SIDES)
    if groups >= FEWEST:
        return DriftTest(groups, alpha, _DELTA, SIDES), None
    say(
        f"WARNING: no alarms: a test of drift needs at least {FEWEST} held-out images, or groups of them, and the "
        f"model has {groups}; train it on more images",
        quiet and not on_alarm,
    )
    return None, None


def _watch(
    images: Source,
    asked: Asked,
    state: WatchState,
    tests: tuple[DriftTest | None, LayerDrift | None],
    on_alarm: Sequence[str],
    stop: Stop,
    quiet: bool,
) -> Watch:
    from featdiff.exceptions import FeatdiffError
    from featdiff.serving.alarms import run_command
    from featdiff.serving.models import scoring
    from featdiff.serving.watch import Watch

    score = scoring(asked.detector, asked.fpr)

    def parts(refs: list[ImageRef]) -> Iterator[Scores]:
        for part in score(refs):
            if stop.signal:  # it may have cut the part short
                raise KeyboardInterrupt
            yield part

    def tell(alarm: Alarm) -> None:
        facts = {name: getattr(alarm, name) for name in ("side", "layer", "after", "share", "distance")}
        say(f"ALARM: {alarm.in_words()}; it stays until --restart-drift", **facts)
        if not on_alarm:
            return
        try:
            run_command(on_alarm, alarm)
        except FeatdiffError as error:
            say(f"WARNING: --on-alarm: {error}; the watch goes on")

    test, layers = tests
    return Watch(images, parts, state, test, asked.fpr, tell, lambda text: say(text, quiet), layers)


class _Lines:
    """A line on the rows so far, now and then, if there are new ones."""

    def __init__(self, watch: Watch, fpr: float, quiet: bool) -> None:
        self._watch = watch
        self._fpr = fpr
        self._quiet = quiet
        self._rows = watch.counts.rows
        self._last = time.monotonic()

    def __call__(self) -> None:
        seconds = seconds_between_lines()
        now = time.monotonic()
        if not seconds or now < self._last + seconds or self._watch.counts.rows == self._rows:
            return
        say(in_words(self._watch.counts, "images", self._fpr), self._quiet)
        self._rows = self._watch.counts.rows
        self._last = now
