"""Run the fuzz targets for some time and print what was found.

    python tests/fuzz/run.py --minutes 10 --seed 0
    python tests/fuzz/run.py --cases 900 --only images
    python tests/fuzz/run.py --replay fuzz-failures/images-0-17

The time is split evenly. Each target runs in a process of its own, which is started again after a crash or a hang. What
fails is kept in a folder, two inputs of each kind of failure; --replay checks such a folder again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the helpers of the tests
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FEATDIFF_LOG_SECONDS"] = "0"  # an error is one line, however long it took
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fuzz.harness import Figures, Outcome, replay, run_one
from fuzz.place import make_place
from fuzz.targets import TARGETS

#: A case that takes longer than this hangs.
HANG_SECONDS = 60
#: Private memory of a process, so that a bomb ends in a MemoryError and not in the death of other processes.
MOST_MEMORY = 6 << 30


def work(name: str, seed: int, first: int, folder: Path, keep: Path, figures: Figures, answer: Connection) -> None:
    """Check cases without end, in a process of its own; answers with (outcome, where it is kept)."""
    _limit_memory()
    place = make_place(folder)
    answer.send(None)  # ready
    number = first
    while True:
        answer.send(run_one(TARGETS[name], place, seed, number, keep, figures))
        number += 1


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))


def fuzz(name: str, seed: int, seconds: float, cases: int, keep: Path) -> Figures:
    """All cases of one target that fit into the time; the start of its process does not count."""
    figures = Figures()
    left = seconds
    while left > 0 and figures.cases < cases:
        with tempfile.TemporaryDirectory() as folder:
            died, left = _until_it_dies(name, seed, left, cases, Path(folder), keep, figures)
        if died:
            kept = keep / f"{name}-{seed}-{figures.cases}"
            figures.add(Outcome(kind=died, message=died))
            print(f"{name}: {died}\n    {kept}", flush=True)
    return figures


def _until_it_dies(
    name: str, seed: int, seconds: float, cases: int, folder: Path, keep: Path, figures: Figures
) -> tuple[str, float]:
    """Count the answers of one process: what became of it, empty when the time is up, and the time that is left."""
    context = multiprocessing.get_context("spawn")
    answers, answer = context.Pipe(duplex=False)
    arguments = (name, seed, figures.cases, folder, keep, figures, answer)
    process = context.Process(target=work, args=arguments, daemon=True)
    process.start()
    answer.close()
    end = time.monotonic() + seconds
    died = ""
    try:
        if not answers.poll(10 * HANG_SECONDS):
            raise SystemExit("the detector that all cases need could not be fitted")
        answers.recv()

        end = time.monotonic() + seconds
        while time.monotonic() < end and figures.cases < cases and not died:
            if answers.poll(HANG_SECONDS):
                outcome, kept = answers.recv()
                figures.add(outcome)
                if kept:
                    print(f"{name}: {outcome.kind}: {outcome.message[:300]}\n    {kept}", flush=True)
            else:
                died = "hang"
    except EOFError:
        process.join()
        died = f"crash (exit code {process.exitcode})"
    finally:
        process.kill()
        process.join()
    return died, end - time.monotonic()


def table(found: dict[str, Figures]) -> str:
    """The figures as a table of Markdown."""
    lines = ["| target | cases | files | rows | failures by kind | hangs | lines of noise | peak memory, MB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, figures in found.items():
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in figures.kinds.items() if kind != "hang") or "none"
        counts = f"{figures.cases:,} | {figures.files:,} | {figures.rows:,} | {kinds}"
        hangs = figures.kinds.get("hang", 0)
        lines.append(f"| {name} | {counts} | {hangs} | {figures.noise:,} | {figures.peak >> 20:,} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="time for all targets together [10, or until --cases]")
    parser.add_argument("--cases", type=int, help="cases of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(TARGETS), action="append", help="this target; may be given again")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder of inputs that fail")
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="check a kept input again")
    arguments = parser.parse_args()
    if arguments.replay:
        return _replay(arguments.replay)

    names = arguments.only or list(TARGETS)
    minutes = arguments.minutes or (10 if arguments.cases is None else 24 * 60)
    cases = arguments.cases or sys.maxsize
    keep = arguments.keep.absolute()
    found = {name: fuzz(name, arguments.seed, 60 * minutes / len(names), cases, keep) for name in names}
    print(table(found))
    for name, figures in found.items():
        for like, count in sorted(figures.alike.items(), key=lambda item: -item[1]):
            print(f"{name}: {count:,} x {like}")
    return 1 if any(figures.kinds for figures in found.values()) else 0


def _replay(folder: Path) -> int:
    with tempfile.TemporaryDirectory() as place:
        outcome = replay(folder.absolute(), TARGETS, make_place(Path(place)))
    print(f"{outcome.kind or 'nothing is wrong'}: {outcome.message}")
    return 1 if outcome.kind else 0


if __name__ == "__main__":
    raise SystemExit(main())
