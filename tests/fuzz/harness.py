"""Cases of a fuzz target: made from a seed, checked, counted, and kept when they fail."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from helpers import printed

from featdiff.data.limits import trim_memory
from featdiff.exceptions import FeatdiffError

from .place import Place, Wrong

#: A case may not need more memory than this on top of what the process has.
MOST_BYTES = 2 << 30
#: Of failures that look alike, so many inputs are kept.
MOST_ALIKE = 2
# Time in which files of a failing case are left out.
_SHRINK_SECONDS = 15
# Warnings that Python itself does not show.
_HIDDEN = (DeprecationWarning, ImportWarning, PendingDeprecationWarning, ResourceWarning)
_TARGET = "target.json"


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes
    ----------
    name : str
    make : callable (rng, folder, place) -> None
        Writes the files of one case; the same files for the same generator.
    check : callable (folder, place) -> int
        Reads them as a user would. Returns how many rows were looked at, and raises ``Wrong`` or lets another
        exception through if the library fails.
    shrinks : bool
        Whether files may be left out of a case, to find the one that fails.
    """

    name: str
    make: Callable[[random.Random, Path, Place], None]
    check: Callable[[Path, Place], int]
    shrinks: bool = False


@dataclass
class Outcome:
    """What came of one case: ``kind`` is empty if all was well, else the name of an exception, or what was wrong."""

    rows: int = 0
    files: int = 0
    kind: str = ""
    message: str = ""
    noise: int = 0
    peak: int = 0


@dataclass
class Figures:
    """The sums over the cases of one target."""

    cases: int = 0
    files: int = 0
    rows: int = 0
    noise: int = 0
    peak: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    alike: dict[str, int] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> bool:
        """Count a case; whether it failed in a way that was not seen often before."""
        self.cases += 1
        self.files += outcome.files
        self.rows += outcome.rows
        self.noise += outcome.noise
        self.peak = max(self.peak, outcome.peak)
        if not outcome.kind:
            return False

        self.kinds[outcome.kind] = self.kinds.get(outcome.kind, 0) + 1
        like = _alike(outcome)
        self.alike[like] = self.alike.get(like, 0) + 1
        return self.alike[like] <= MOST_ALIKE


def _alike(outcome: Outcome) -> str:
    """The kind and message of a failure, without names and numbers."""
    words = re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S*|-?\d[\d.e+-]*", "*", outcome.message)
    return f"{outcome.kind}: {words[:100]}"


# ---- one case ----


def generator(target: Target, seed: int, number: int) -> random.Random:
    return random.Random(f"{target.name} {seed} {number}")


def check(target: Target, folder: Path, place: Place) -> Outcome:
    """Check the files of a folder; nothing that the library does wrong is raised."""
    outcome = Outcome(files=sum(1 for file in folder.rglob("*") if file.name != _TARGET and not file.is_dir()))
    before = _reset_peak()
    with _listening() as noise:
        try:
            outcome.rows = target.check(folder, place)
        except Wrong as error:
            outcome.kind = "wrong"
            outcome.message = str(error)
        except Exception as error:
            outcome.kind = type(error).__name__
            outcome.message = f"{error} ({_place_of(error)})"

    outcome.peak = max(0, _peak() - before)
    outcome.noise = len(noise)
    if not outcome.kind and noise:
        outcome.kind = "noise"
        outcome.message = noise[0]
    if not outcome.kind and outcome.peak > MOST_BYTES:
        outcome.kind = "memory"
        outcome.message = f"{outcome.peak >> 20} MB"
    return outcome


def _place_of(error: Exception) -> str:
    """The innermost line of the library that an exception went through."""
    place = "outside the library"
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/featdiff/" in file or "/featdiff_cli/" in file:
            place = f"{'/'.join(Path(file).parts[-2:])} line {trace.tb_lineno}"
        trace = trace.tb_next
    return place


@contextmanager
def _listening() -> Iterator[list[str]]:
    """The lines that reach file descriptor 2 inside the block, from any thread, and warnings of other libraries."""
    noise: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for hidden in _HIDDEN:
            warnings.simplefilter("ignore", hidden)
        try:
            with printed() as lines:
                yield noise
        finally:
            noise += [line for line in lines if line.strip()]
            noise += [
                f"{warning.category.__name__}: {warning.message}"
                for warning in warned
                if not issubclass(warning.category, FeatdiffError)
            ]


def _reset_peak() -> int:
    """Bytes in memory now; the peak is counted from here on."""
    trim_memory()  # else memory that was freed before would be used again, and not counted
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system than Linux, or not permitted: the peak is that of the whole process
        return 0
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(re.findall(rf"^{name}:\s+(\d+)", text, flags=re.M)[0]) << 10


# ---- many cases ----


def run(target: Target, place: Place, seed: int, count: int, keep: Path) -> Figures:
    """Cases 0, 1 ... of a seed; those that fail are kept in a folder."""
    figures = Figures()
    for number in range(count):
        outcome, kept = run_one(target, place, seed, number, keep, figures)
        if kept:
            print(f"{target.name}: {outcome.kind}: {outcome.message}\n    {kept}", flush=True)
    return figures


def run_one(
    target: Target, place: Place, seed: int, number: int, keep: Path, figures: Figures
) -> tuple[Outcome, Path | None]:
    """Make and check a case, and count it; where its files are kept, if it failed in a new way."""
    folder = keep / f"{target.name}-{seed}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target.make(generator(target, seed, number), folder, place)
    outcome = check(target, folder, place)
    if not figures.add(outcome):
        shutil.rmtree(folder)
        return outcome, None

    if target.shrinks:
        _shrink(target, folder, place, outcome)
    (folder / _TARGET).write_text(json.dumps({"target": target.name, "kind": outcome.kind, "message": outcome.message}))
    return outcome, folder


def _shrink(target: Target, folder: Path, place: Place, outcome: Outcome) -> None:
    """Take files away as long as the case fails in the same way."""
    like = _alike(outcome)
    aside = folder.with_name(f"{folder.name}-aside")
    end = time.monotonic() + _SHRINK_SECONDS
    for file in sorted(folder.iterdir()):
        if time.monotonic() > end:
            return
        file.rename(aside)
        if _alike(check(target, folder, place)) != like:
            aside.rename(file)
        else:
            aside.unlink()


def replay(folder: Path, targets: dict[str, Target], place: Place) -> Outcome:
    """Check the files of a case that was kept."""
    name = json.loads((folder / _TARGET).read_text())["target"]
    return check(targets[name], folder, place)
