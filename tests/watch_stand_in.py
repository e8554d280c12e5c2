"""A watch of files that hold their p-value in place of a picture, and may hold the score of a layer after it; all but
the model is real. As a program it can kill itself at a chosen step.

    python tests/watch_stand_in.py FOLDER OUTPUT [--rotate BYTES] [--poll SECONDS] [--once] [--kill STEP --at NUMBER]
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from featdiff.data.image_refs import ImageRef
from featdiff.serving.alarms import Alarm
from featdiff.serving.watch import Watch
from featdiff.serving.watch_sources import open_source
from featdiff.serving.watch_state import WatchState
from featdiff.verdicts.drift import SIDES, DriftTest
from featdiff.verdicts.layer_drift import LayerDrift
from featdiff.verdicts.results import OK, UNREADABLE, Scores

HELD_OUT = 500
BATCH = 32
#: Where a process can be killed: with half a line written, with all rows written, in a transaction, before and after an
#: output gets its number, and when an alarm was told.
STEPS = ("half a line", "rows", "transaction", "before the rename", "after the rename", "alarm")


def score(refs: list[ImageRef]) -> Iterator[Scores]:
    """Parts of rows whose p-values are in the files."""
    for number in range(0, len(refs), BATCH):
        yield rows_of(refs[number : number + BATCH])


def rows_of(refs: list[ImageRef]) -> Scores:
    values, layer = np.full((2, len(refs)), np.nan)
    reasons = [""] * len(refs)
    for i, ref in enumerate(refs):
        try:
            numbers = [float(word) for word in ref.read().split()]  # type: ignore[union-attr]
            values[i], layer[i] = numbers[0], numbers[-1]
        except (OSError, ValueError, IndexError) as error:
            reasons[i] = str(error)
    status = [UNREADABLE if reason else OK for reason in reasons]
    paths = [ref.path for ref in refs]
    return Scores(paths, status, reasons, -values, values, values <= 0.05, {"stage": layer}, 0.05)


def fill(folder: Path, names: list[str], values: np.ndarray) -> None:
    """A file for each p-value."""
    folder.mkdir(exist_ok=True)
    for name, value in zip(names, values, strict=True):
        (folder / name).write_text(f"{value:.6f}")


def run(
    source: str,
    output: Path,
    *,
    once: bool = True,
    poll: float = 0.05,
    rotate: int = 0,
    tell: Callable[[str], None] = lambda text: None,
    on_alarm: Callable[[Alarm], None] = lambda alarm: None,
    after_each: Callable[[], None] = lambda: None,
    layers: LayerDrift | None = None,
    **options: Any,
) -> Watch:
    """A watch from its beginning to its end."""
    images = open_source(source, tell, poll, known=True, stdin=options.pop("stdin", None))
    with WatchState(output, {"model": "stand-in", "source": source}, rotate, **options) as state:
        watch = Watch(images, score, state, DriftTest(HELD_OUT, sides=SIDES), 0.05, on_alarm, tell, layers)
        watch.run(once, after_each)
    return watch


def kill_at(step: str, number: int) -> None:
    """Let this process be killed at the so many-th time that it comes to a step."""
    left = [number]

    def reached() -> bool:
        left[0] -= 1
        return left[0] < 0

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    write, fsync, rename, update = os.write, os.fsync, Path.rename, WatchState._update

    def written(descriptor: int, data: memoryview) -> int:
        if step == "half a line" and reached():
            write(descriptor, data[: len(data) // 2 - 7])
            kill()
        return write(descriptor, data)

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        if step == "rows" and reached():
            kill()

    def renamed(self: Path, target: Path) -> Path:
        if step == "before the rename":
            kill()
        found = rename(self, target)
        if step == "after the rename":
            kill()
        return found

    def updated(self: WatchState, *arguments: Any) -> None:
        update(self, *arguments)
        if step == "transaction" and self._database.in_transaction and reached():
            kill()

    os.write, os.fsync = written, synced  # type: ignore[assignment]
    Path.rename, WatchState._update = renamed, updated  # type: ignore[assignment, method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rotate", type=int, default=0)
    parser.add_argument("--poll", type=float, default=0.05)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--kill", choices=STEPS, default="")
    parser.add_argument("--at", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.kill:
        kill_at(arguments.kill, arguments.at)

    def on_alarm(alarm: Alarm) -> None:
        print(alarm.side, flush=True)
        if arguments.kill == "alarm":
            os.kill(os.getpid(), signal.SIGKILL)

    run(
        arguments.folder,
        arguments.output,
        once=arguments.once,
        poll=arguments.poll,
        rotate=arguments.rotate,
        on_alarm=on_alarm,
    )


if __name__ == "__main__":
    main()
