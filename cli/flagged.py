"""``--copy-to``, ``--link-to``, ``--move-to`` and ``--undo`` of ``score``: what becomes of flagged files."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .main import EXIT_UNREADABLE
from .new_names import NewNames, content_of, reason_of
from .progress import Bars, list_unreadable
from .signals import catching_stop
from .speech import say

if TYPE_CHECKING:
    from featdiff import Scores
    from featdiff.data.references import ImageRef
    from featdiff.report.manifest import Entry

F = TypeVar("F", bound=Callable[..., Any])

_DONE = {"copy": "copied", "link": "linked", "move": "moved"}
_DOING = {"copy": "copying", "link": "linking", "move": "moving"}
_DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def flagged_options(function: F) -> F:
    """``--copy-to``, ``--link-to``, ``--move-to``, ``--undo``."""
    folder = click.Path(path_type=Path, file_okay=False)
    for option in (
        click.option(
            "--undo",
            "undo_manifest",
            type=click.Path(path_type=Path),
            metavar="MANIFEST",
            help="Take back what the manifest of such a folder lists.",
        ),
        click.option("--move-to", type=folder, metavar="DIR", help="Move flagged files to DIR."),
        click.option("--link-to", type=folder, metavar="DIR", help="Make symbolic links to flagged files in DIR."),
        click.option(
            "--copy-to", type=folder, metavar="DIR", help="Copy flagged files to DIR; nothing is overwritten."
        ),
    ):
        function = option(function)
    return function


def open_flagged(options: dict[str, Any], images: Sequence[str], features: str | None) -> Flagged | None:
    """What collects flagged images, by the options (which are taken out); None if nobody wants them.

    Whether the folder can be used is checked before the long work.
    """
    from featdiff.exceptions import UsageError

    folders = {action: options.pop(f"{action}_to") for action in _DONE}
    wanted = {action: folder for action, folder in folders.items() if folder is not None}
    if not wanted:
        return None
    if len(wanted) > 1:
        raise UsageError(f"{' and '.join(f'--{action}-to' for action in wanted)}: give one of them")

    ((action, folder),) = wanted.items()
    option = f"--{action}-to {folder}"
    if features:
        raise UsageError(f"{option} cannot go with --features: only image files are {_DONE[action]}")
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not above.is_dir():
        raise UsageError(f"{option}: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"{option}: {above} is read-only")

    real = Path(os.path.realpath(folder))
    for image in images:
        scored = Path(os.path.realpath(image))
        if os.path.isdir(image) and (scored == real or scored in real.parents):
            raise UsageError(f"{option} lies in {image}, which is scored: choose a folder outside of it")
    return Flagged(action, folder, images)


@dataclass
class Flagged:
    """Flagged images of a run, by their number, and where they go.

    ``images``: all, as they were named on the command line.
    """

    action: str
    folder: Path
    images: Sequence[str]
    rows: dict[int, Mapping[str, object]] = field(default_factory=dict)

    def add(self, part: Scores, start: int) -> None:
        """Flagged rows of a part whose first row has the number ``start``."""
        positions = part.is_ood.nonzero()[0]
        for position, row in zip(positions, part[positions].rows(), strict=True):
            self.rows[start + int(position)] = row

    def add_row(self, number: int, row: Mapping[str, object]) -> None:
        """A row of an interrupted run."""
        if row["is_ood"]:
            self.rows[number] = row

    def place(self, refs: Sequence[ImageRef], quiet: bool) -> int:
        """Copy, link or move them; returns the exit code."""
        from featdiff.report.manifest import ALREADY, DONE, LEFT, PLANNED

        if not self.rows:
            say(f"No image is flagged, so nothing is {_DONE[self.action]}.", quiet)
            return 0

        manifest = None
        with Bars(quiet) as bars:
            entries = NewNames(self.action, self.folder, self.images, refs).entries(self.rows, bars)
            if any(entry.result == PLANNED for entry in entries):
                manifest = _make_manifest(self.folder, entries)
                self._place_all(entries, refs, manifest, bars)

        counts = {result: sum(entry.result == result for entry in entries) for result in (DONE, ALREADY, LEFT)}
        there = f", {counts[ALREADY]:,} were there already" if counts[ALREADY] else ""
        say(f"{counts[DONE]:,} of {len(entries):,} flagged images {_DONE[self.action]} to {self.folder}{there}", quiet)
        if manifest:
            say(f"Take it back: {_undo(manifest)}", quiet)
        left = [(str(entry.row["path"]), entry.note) for entry in entries if entry.result == LEFT]
        list_unreadable(left, quiet, manifest)
        return EXIT_UNREADABLE if left else 0

    def _place_all(self, entries: list[Entry], refs: Sequence[ImageRef], manifest: Path, bars: Bars) -> None:
        """Do what is planned; afterwards the manifest says what was done, however this ends."""
        from featdiff.exceptions import FeatdiffError
        from featdiff.report.manifest import DONE, LEFT, PLANNED, write_results

        planned = [(entry, refs[n]) for entry, n in zip(entries, self.rows, strict=True) if entry.result == PLANNED]
        done = 0
        with catching_stop() as stop:
            try:
                for number, (entry, ref) in enumerate(planned, 1):
                    entry.note = self._place(entry, ref)
                    entry.result = LEFT if entry.note else DONE
                    if entry.note:
                        entry.target = ""  # what has that name is not ours
                    else:
                        done += 1
                    bars(_DOING[self.action], number, len(planned))
            except KeyboardInterrupt:
                write_results(manifest, entries)
                raise stop.stopped(self._how_to_go_on(done, len(planned), manifest)) from None
            except OSError as error:
                with contextlib.suppress(FeatdiffError):  # it can be undone with the manifest as it is
                    write_results(manifest, entries)
                how = self._how_to_go_on(done, len(planned), manifest)
                raise FeatdiffError(f"{self.folder}: {error.strerror}; {how}") from None
        write_results(manifest, entries)

    def _place(self, entry: Entry, ref: ImageRef) -> str:
        """Do it, or return why not; raises ``OSError`` where no other image would fare better."""
        from featdiff.exceptions import FeatdiffError
        from featdiff.files.placing import copy_new, link_new, move_new, remove_empty
        from featdiff.report.manifest import COPY, LINK, is_inside

        target = self.folder / entry.target
        try:
            content = content_of(ref) if entry.action == COPY else b""
        except Exception as error:  # damaged archives raise zlib, lzma, struct and many other errors
            return reason_of(error)

        try:
            if not is_inside(target, self.folder):
                return f"{target.parent} leads out of {self.folder}"
            target.parent.mkdir(parents=True, exist_ok=True)
            if entry.action == COPY:
                copy_new(content, target)
            elif entry.action == LINK:
                link_new(Path(entry.source), target)
            else:
                move_new(Path(entry.source), target)
        except OSError as error:
            remove_empty(target.parent, self.folder)
            if error.errno in _DISK_FULL:
                raise
            return f"{error.filename2 or error.filename or target}: {error.strerror or error}"
        except FeatdiffError as error:
            return str(error)
        return ""

    def _how_to_go_on(self, done: int, count: int, manifest: Path) -> str:
        return (
            f"{done:,} of {count:,} flagged images are {_DONE[self.action]}: the same command goes on, "
            f"and {_undo(manifest)} takes it back"
        )


def undo(manifest: Path, quiet: bool) -> int:
    """``--undo``: take back what a manifest lists; returns the exit code."""
    from featdiff.report import manifest as manifests

    with catching_stop() as stop:
        try:
            entries = manifests.undo(manifest)
        except KeyboardInterrupt:
            raise stop.stopped("the same command goes on") from None

    left = [entry for entry in entries if entry.target and entry.result == manifests.LEFT]
    taken_back = sum(entry.result == manifests.TAKEN_BACK for entry in entries)
    say(f"{taken_back:,} of {len(entries):,} images in {manifest} are taken back", quiet)
    list_unreadable([(str(manifest.parent / entry.target), entry.note) for entry in left], quiet, manifest)
    return EXIT_UNREADABLE if left else 0


def _undo(manifest: Path) -> str:
    """The command that takes it back."""
    return f"featdiff score --undo {shlex.quote(str(manifest))}"


@contextlib.contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    from featdiff.exceptions import FeatdiffError

    try:
        yield
    except OSError as error:
        raise FeatdiffError(f"{folder} cannot be written: {error.strerror or error}") from None


def _make_manifest(folder: Path, entries: Sequence[Entry]) -> Path:
    """The manifest in its folder; if it cannot be written, no folder is left behind."""
    from featdiff.report.manifest import write_new_manifest

    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with _named_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return write_new_manifest(folder, entries)
        except OSError:
            for path in missing:
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise
