"""The manifest of flagged images that were copied, linked or moved, and how to take that back.

It is written in full before the first file is touched. Whatever happens then, it says which files may have new names;
:func:`undo` looks at each of them and never removes what exists only once.
"""

from __future__ import annotations

import contextlib
import csv
import filecmp
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..exceptions import FeatdiffError, UsageError, one_line
from ..files.atomic import write_output
from ..files.placing import copy_new, move_new, numbered, remove_empty, remove_leftovers, sha256_of
from .writers import CsvWriter, read_csv

#: Columns of each manifest; those of the rows follow.
COLUMNS = ("from", "to", "action", "result", "note", "sha256")
COPY = "copy"
LINK = "link"
MOVE = "move"
ACTIONS = (COPY, LINK, MOVE)

PLANNED = "planned"
DONE = "done"
ALREADY = "there already"
LEFT = "left"
TAKEN_BACK = "taken back"


@dataclass
class Entry:
    """One flagged image.

    Attributes
    ----------
    source : str
        Where it was: the absolute path of a file; of a member of an archive that of the archive, and its name in it.
    target : str
        Its new name, seen from the folder of the manifest, with ``/``; empty if it gets none.
    action : {"copy", "link", "move"}
    result : str, default "planned"
        ``planned`` (perhaps done, if the run was interrupted), ``done``, ``there already``, ``left`` or ``taken back``.
    note : str, default ""
        Why it was left.
    sha256 : str, default ""
        Of a copy.
    row : mapping, default {}
        What the scores say of it, by the name of the column.
    """

    source: str
    target: str
    action: str
    result: str = PLANNED
    note: str = ""
    sha256: str = ""
    row: Mapping[str, object] = field(default_factory=dict)


def write_new_manifest(folder: Path, entries: Sequence[Entry]) -> Path:
    """Write ``manifest.csv``, or if there is one, ``manifest-2.csv`` and so on.

    Parameters
    ----------
    folder : Path
        Where the images go; it exists.
    entries : sequence of Entry

    Returns
    -------
    Path
        The manifest.

    Raises
    ------
    OSError
        It cannot be written. Nothing is left behind.
    """
    content = _to_csv(entries)
    for file in numbered(folder / "manifest.csv"):
        try:
            copy_new(content, file)
        except FileExistsError:
            continue
        return file
    raise AssertionError("there is always another number")


def write_results(manifest: Path, entries: Sequence[Entry]) -> None:
    """Write a manifest anew; errors are those of :func:`featdiff.files.atomic.write_output`."""
    write_output(manifest, _to_csv(entries))


def read_manifest(manifest: Path) -> list[Entry]:
    """The entries of a manifest.

    Parameters
    ----------
    manifest : Path

    Raises
    ------
    UsageError
        There is no such file, or it is something else.
    """
    if manifest.is_dir():
        names = sorted(file.name for file in manifest.glob("manifest*.csv"))
        has = f"name one of its files ({', '.join(names)})" if names else "it holds no manifest"
        raise UsageError(f"{manifest} is a folder: {has}")
    try:
        with manifest.open("rb") as stream:
            rows = list(read_csv(stream))
    except OSError as error:
        raise UsageError(f"{manifest}: {error.strerror or error}") from None
    except (ValueError, csv.Error) as error:
        raise UsageError(f"{manifest} is not a manifest: {one_line(error)}") from None

    if not rows or not set(COLUMNS) <= set(rows[0]) or any(row["action"] not in ACTIONS for row in rows):
        raise UsageError(f"{manifest} is not a manifest that featdiff has written")
    return [_entry(row) for row in rows]


def undo(manifest: Path) -> list[Entry]:
    """Take back what a manifest lists: remove copies and links, move files back.

    Nothing is overwritten. A copy is removed only if it is unchanged and its original is there; a file that cannot move
    back, since its old name is in use again, stays. What was taken back is marked in the manifest, so that a second
    call does nothing.

    Parameters
    ----------
    manifest : Path

    Returns
    -------
    list of Entry
        ``taken back``, ``left`` with a note, or untouched.

    Raises
    ------
    UsageError
        It is not a manifest.
    FeatdiffError
        The manifest cannot be written anew.
    """
    entries = read_manifest(manifest)
    folder = manifest.parent
    try:
        for entry in entries:
            if entry.target and entry.result in (PLANNED, DONE, LEFT):
                _take_back(entry, folder)
    finally:  # also after Ctrl-C
        write_results(manifest, entries)
    return entries


def is_inside(target: Path, folder: Path) -> bool:
    """Whether a name lies below a folder, all links in the way to it followed."""
    real = Path(os.path.realpath(folder))
    parent = Path(os.path.realpath(target.parent))
    return parent == real or real in parent.parents


def _take_back(entry: Entry, folder: Path) -> None:
    target = folder / entry.target
    try:
        note = _not_inside(entry, folder) or _TAKING_BACK[entry.action](entry, target)
    except OSError as error:
        note = error.strerror or one_line(error)
    except (FeatdiffError, ValueError) as error:  # no name may hold what somebody has written into the manifest
        note = one_line(error)

    if entry.result == PLANNED:
        with contextlib.suppress(OSError):
            remove_leftovers(target)
    entry.note = note
    entry.result = LEFT if note else TAKEN_BACK
    if not note:
        remove_empty(target.parent, folder)


def _not_inside(entry: Entry, folder: Path) -> str:
    """Why a name that somebody has written into the manifest is not touched; empty if it may be."""
    name = PurePosixPath(entry.target)
    if name.is_absolute() or ".." in name.parts or not is_inside(folder / entry.target, folder):
        return "it does not lie in the folder of the manifest"
    return ""


def _remove_copy(entry: Entry, target: Path) -> str:
    """Remove it, or return why not."""
    if not os.path.lexists(target):
        return ""
    if target.is_symlink() or not target.is_file() or sha256_of(target) != entry.sha256:
        return "the copy was changed, so it is kept"
    if not _is_there(Path(entry.source)):
        return "the original is gone, so the copy is kept"
    target.unlink()
    return ""


def _remove_link(entry: Entry, target: Path) -> str:
    if not os.path.lexists(target):
        return ""
    if not target.is_symlink() or os.readlink(target) != entry.source:
        return "it is no longer that link, so it is kept"
    target.unlink()
    return ""


def _move_back(entry: Entry, target: Path) -> str:
    source = Path(entry.source)
    if not os.path.lexists(target):
        return "" if os.path.lexists(source) else "it is at neither place"
    if os.path.lexists(source) and not _is_same(source, target):
        return "its old name is in use"

    if os.path.lexists(source) and not os.path.samestat(os.lstat(source), os.lstat(target)):
        target.unlink()  # a copy on another disk, of a move that was interrupted
        return ""
    source.parent.mkdir(parents=True, exist_ok=True)
    move_new(target, source)
    return ""


_TAKING_BACK = {COPY: _remove_copy, LINK: _remove_link, MOVE: _move_back}


def _is_same(source: Path, target: Path) -> bool:
    """Whether two names lead to the same content, without links."""
    if source.is_symlink() or target.is_symlink():
        return False
    return filecmp.cmp(source, target, shallow=False)


def _is_there(original: Path) -> bool:
    """Whether a file exists, or the archive that it is a member of."""
    return os.path.lexists(original) or any(folder.is_file() for folder in original.parents)


def _to_csv(entries: Sequence[Entry]) -> bytes:
    names = dict.fromkeys(name for entry in entries for name in entry.row)
    stream = io.BytesIO()
    writer = CsvWriter(stream)
    writer.write_rows(_cells(entries), [*COLUMNS, *names])
    return stream.getvalue()


def _cells(entries: Iterable[Entry]) -> Iterable[dict[str, object]]:
    for entry in entries:
        own = (entry.source, entry.target, entry.action, entry.result, entry.note, entry.sha256)
        yield {**dict(zip(COLUMNS, own, strict=True)), **entry.row}


def _entry(cells: dict[str, Any]) -> Entry:
    row = {name: cell for name, cell in cells.items() if name not in COLUMNS}
    source, target, action, result, note, sha256 = (str(cells[name]) for name in COLUMNS)
    return Entry(source, target, action, result, note, sha256, row)
