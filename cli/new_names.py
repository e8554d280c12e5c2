"""New names for flagged images: below a folder, none twice, none that is in use."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from featdiff.data.references import ImageRef
    from featdiff.report.manifest import Entry
    from featdiff.runtime.progress import Progress

# What a disk somewhere does not permit in a name, and control characters; members of archives may have any name.
_HOSTILE = re.compile(r'[\x00-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\\/:*?"<>|]')
# Longest part of a member's name that is kept, in letters; disks permit 255 bytes, and a number may follow.
_LONGEST = 60


class NewNames:
    """Which flagged image gets which name.

    Of its folders, those below the last one that all IMAGES share are kept.

    ``action``: as in a manifest; ``folder``: where they go; ``images``: as named on the command line; ``refs``: all of
    them.
    """

    def __init__(self, action: str, folder: Path, images: Sequence[str], refs: Sequence[ImageRef]) -> None:
        self._action = action
        self._folder = folder
        self._refs = refs
        self._shared = _shared_folders(images)
        self._taken: set[Path] = set()

    def entries(self, rows: Mapping[int, Mapping[str, object]], progress: Progress) -> list[Entry]:
        """One for each row; ``rows`` are those of flagged images, by their number."""
        entries = []
        for number, row in rows.items():
            entries.append(self._entry(self._refs[number], row))
            progress("planning", len(entries), len(rows))
        return entries

    def _entry(self, ref: ImageRef, row: Mapping[str, object]) -> Entry:
        from featdiff.files.placing import sha256_of
        from featdiff.report.manifest import COPY, LEFT, Entry

        entry = Entry(_absolute(ref), "", self._action, row=row)
        entry.note = self._refusal(ref)
        if self._action == COPY:
            try:
                entry.sha256 = sha256_of(content_of(ref))
            except Exception as error:  # damaged archives raise zlib, lzma, struct and many other errors
                entry.note = reason_of(error)

        if entry.note:
            entry.result = LEFT
        else:
            parts = _parts(ref)
            shared = os.path.commonprefix([self._shared, parts[:-1]])
            self._name(entry, self._folder.joinpath(*parts[len(shared) :]))
        return entry

    def _refusal(self, ref: ImageRef) -> str:
        """Why an image cannot be moved or linked; empty if it can."""
        from featdiff.data.references import FileRef
        from featdiff.report.manifest import COPY, MOVE

        if self._action == COPY:
            return ""
        if not isinstance(ref, FileRef):
            what = "a member of an archive" if hasattr(ref, "archive") else "what is no local file"
            return f"{what} cannot be {'moved' if self._action == MOVE else 'linked'}, only copied"
        if self._action == MOVE and os.path.islink(ref.file):
            return "a link, not a file: only files are moved"
        return "" if os.path.lexists(ref.file) else "it is gone"

    def _name(self, entry: Entry, wanted: Path) -> None:
        """Give it the first name that is free, or that it has already."""
        from featdiff.files.placing import numbered, same_for_any_disk
        from featdiff.report.manifest import ALREADY, MOVE

        for target in numbered(wanted):
            name = same_for_any_disk(target)
            in_use = os.path.lexists(target)
            if name in self._taken or (in_use and not _is_it(entry, target)):
                continue

            self._taken.add(name)
            entry.target = target.relative_to(self._folder).as_posix()
            if in_use and self._action != MOVE:  # a move that was interrupted is finished
                entry.result = ALREADY
            return


def content_of(ref: ImageRef) -> Path | bytes:
    """A file, or the content of a member of an archive."""
    from featdiff.data.references import FileRef
    from featdiff.exceptions import FeatdiffError

    if isinstance(ref, FileRef):
        return Path(ref.file)
    content = ref.read()
    if not isinstance(content, bytes):
        raise FeatdiffError("it is not a file")
    return content


def reason_of(error: Exception) -> str:
    """Why something failed, on one line."""
    from featdiff.exceptions import one_line

    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)


def _is_it(entry: Entry, target: Path) -> bool:
    """Whether an earlier run has put this very image there."""
    from featdiff.files.placing import sha256_of
    from featdiff.report.manifest import COPY, LINK

    if entry.action == LINK:
        return target.is_symlink() and os.readlink(target) == entry.source
    if target.is_symlink() or not target.is_file():
        return False
    if entry.action == COPY:
        return sha256_of(target) == entry.sha256
    return os.path.samestat(os.lstat(entry.source), os.lstat(target))


# ---- folders ----


def _shared_folders(images: Iterable[str]) -> tuple[str, ...]:
    """The folders that all ``images`` share, as they were named on the command line.

    They do not depend on what is in these folders now, so that the next run gives the same names.
    """
    folders = [_folder_of(image) for image in images]
    return tuple(os.path.commonprefix(folders))


def _folder_of(image: str) -> tuple[str, ...]:
    """The parts of a folder or an archive, or those of the folder of a file or a pattern."""
    from featdiff.data.image_refs import has_image_suffix
    from featdiff.data.references import split_archive
    from featdiff.files.remote import is_url

    if image == "-":  # paths are read from standard input
        return Path.cwd().parts
    inside = split_archive(image)
    if inside:
        archive, folder = inside
        return (*Path(_absolute_file(archive)).parts, *_member_parts(folder))
    if is_url(image) and not glob.has_magic(image) and not has_image_suffix(image):
        return tuple(_harmless(part) for part in Path(image).parts)
    if os.path.isdir(image):
        return Path(_absolute_file(os.path.join(image, "x"))).parts[:-1]
    if glob.has_magic(image) and not os.path.lexists(image):
        image = re.split(r"[*?[]", image)[0] + "x"
    return Path(_absolute_file(image)).parts[:-1]


def _parts(ref: ImageRef) -> tuple[str, ...]:
    """The folders of an image and its name, those of a member below the file of its archive."""
    from featdiff.files.remote import is_url

    archive = getattr(ref, "archive", None)
    if archive is None:
        place = _absolute(ref)
        return tuple(_harmless(part) for part in Path(place).parts) if is_url(place) else Path(place).parts
    return (*Path(_absolute_file(archive)).parts, *_member_parts(_inside(ref.path, archive)))


def _member_parts(name: str) -> Iterable[str]:
    """The parts of a member's name, as any disk permits them."""
    for part in name.split("/"):
        if part not in ("", "."):
            yield _harmless(part)


def _harmless(part: str) -> str:
    stem, dot, suffix = _HOSTILE.sub("_", part).rpartition(".")
    if len(suffix) > 8:  # not the ending of a picture
        return f"{stem}{dot}{suffix}"[:_LONGEST]
    return f"{stem[:_LONGEST]}{dot}{suffix}"


def _absolute(ref: ImageRef) -> str:
    """Where an image is: an absolute path, or that of an archive and the name in it."""
    archive = getattr(ref, "archive", None)
    if archive is None:
        return _absolute_file(getattr(ref, "file", ref.path))
    return f"{_absolute_file(archive)}/{_inside(ref.path, archive)}"


def _absolute_file(file: str) -> str:
    """Without ``..``, which a link before it may lead elsewhere; a URL as it is."""
    from featdiff.files.remote import is_url

    if is_url(file):
        return file
    file = os.path.join(os.getcwd(), file)
    if ".." in Path(file).parts:
        return os.path.join(os.path.realpath(os.path.dirname(file)), os.path.basename(file))
    return str(Path(file))


def _inside(path: str, archive: str) -> str:
    """The name of a member, as its reference prints it behind that of the archive."""
    from featdiff.data.references import printable

    return path.removeprefix(f"{printable(archive)}/")
