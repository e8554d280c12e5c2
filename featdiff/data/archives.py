"""Images inside zip and tar archives, read without unpacking them.

Whatever is wrong with an archive, what can be read of it is read, and the rest is a row with a reason.
"""

from __future__ import annotations

import bz2
import contextlib
import fnmatch
import functools
import gzip
import lzma
import os
import posixpath
import re
import tarfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from glob import has_magic
from typing import IO, Any, ClassVar

from ..exceptions import UnreadableImage, one_line
from ..files.remote import is_url, open_input, read_range, version_of
from .archive_names import ZIP_SUFFIXES
from .image_refs import ImageRef, MissingRef, has_image_suffix, printable

# What is read at a time, so that a false size takes no memory. Headers of a tar are shorter.
_AT_ONCE = 1 << 20
# The same of bzip2 and LZMA in a zip, where zipfile takes all that so many bytes give: up to a million times as much.
_AT_ONCE_OF_OTHERS = 128
# What is read ahead of a remote tar, whose headers lie between its members.
_TAR_AHEAD = 8 << 20
_NOT_THERE = "not in the archive"
_OUTSIDE = "its name leads out of the archive"
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]")
_SEPARATORS = re.compile(r"[/\\]")
_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_READING = threading.Lock()


@dataclass(frozen=True)
class ZipRef(ImageRef):
    """A member of a zip archive."""

    archive: str
    member: str

    def bytes_to_read(self) -> int:
        return self._info().file_size

    def read(self) -> bytes:
        archive = self._zip()
        info = self._info()
        parts = []
        with archive.open(info) as stream:
            at_once = _AT_ONCE
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                at_once = _AT_ONCE_OF_OTHERS
                stream.MIN_READ_SIZE = at_once  # type: ignore[attr-defined]
            while part := stream.read(at_once):  # ends at the declared size, whatever there is
                parts.append(part)
        return b"".join(parts)

    def _info(self) -> zipfile.ZipInfo:
        for name in (self.member, f"./{self.member}"):  # the latter in archives of the folder "."
            with contextlib.suppress(KeyError):
                return self._zip().getinfo(name)
        raise UnreadableImage(_NOT_THERE)

    def _zip(self) -> zipfile.ZipFile:
        return _open_zip(self.archive, *version_of(self.archive))


@dataclass(frozen=True)
class TarRef(ImageRef):
    """A member of a plain tar archive: a stretch of the archive file."""

    archive: str
    offset: int
    size: int

    def bytes_to_read(self) -> int:
        return self.size

    def read(self) -> bytes:
        if is_url(self.archive):
            return read_range(self.archive, self.offset, self.offset + self.size)
        with open(self.archive, "rb") as stream:
            stream.seek(self.offset)
            content = stream.read(self.size)
        if len(content) < self.size:
            raise UnreadableImage(_cut_short(len(content), self.size))
        return content


@dataclass(frozen=True)
class TarMemberRef(ImageRef):
    """A member of a compressed tar archive, which can only be read front to back, or a link in any tar."""

    archive: str
    member: str
    sequential: ClassVar[bool] = True

    def bytes_to_read(self) -> int:
        with _READING:
            return self._file().size

    def read(self) -> bytes:
        with _READING:
            file = self._file()
            stream = self._content().tar.extractfile(file)
            if stream is None:
                raise UnreadableImage("not a regular file")
            return b"".join(iter(functools.partial(stream.read, _AT_ONCE), b""))

    def _file(self) -> tarfile.TarInfo:
        return _follow(self._content(), self.member)

    def _content(self) -> _TarContent:
        return _open_tar(self.archive, *version_of(self.archive))


def _cut_short(found: int, size: int) -> str:
    return f"the archive ends in the middle of it, after {found:,} of {size:,} bytes"


# One open handle per archive: parsing the directory of a large zip for each member would be quadratic.
@functools.lru_cache(maxsize=16)
def _open_zip(archive: str, *version: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(open_input(archive) if is_url(archive) else archive)


# ---- tar: its directory ----


@dataclass
class _TarContent:
    """An open tar archive, and its members as far as they can be read.

    Attributes
    ----------
    tar : TarFile
    plain : bool
        Whether it is not compressed.
    end : int
        Bytes of the file.
    members : dict
        By name; of those that were written twice the last one counts. A hard link to a member before it is that member.
    problem : str
        Why the archive cannot be read to its end; empty if it can.
    """

    tar: tarfile.TarFile
    plain: bool
    end: int
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    problem: str = ""

    @functools.cached_property
    def by_plain_name(self) -> dict[str, tarfile.TarInfo]:
        """Members by their name as the target of a link."""
        return {posixpath.normpath(name): member for name, member in self.members.items()}


class _HeadersOnly:
    """A file that gives no more at once than headers of a tar need: a false size in one would take all memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.last = b""  # what was read last

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _AT_ONCE:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self.last = self._stream.read(size)
        return self.last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@functools.lru_cache(maxsize=16)
def _open_tar(archive: str, *version: int) -> _TarContent:
    file = open_input(archive, _TAR_AHEAD)
    start = file.read(6)
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)

    stream = _HeadersOnly(opener(file) if opener else file)
    tar = tarfile.TarFile(archive, fileobj=stream)
    content = _TarContent(tar, plain=opener is None, end=end)
    try:
        _list_members(content)
        if any(stream.last):  # tarfile takes a header that makes no sense for the end
            content.problem = f"a damaged header at byte {tar.offset:,}"
    except Exception as error:  # damaged archives raise zlib, lzma, struct and many other errors
        content.problem = one_line(error)
    return content


def _list_members(content: _TarContent) -> None:
    """Fill ``members``; stops with an error where the archive cannot be read."""
    while member := content.tar.next():
        before = content.members.get(member.linkname) if member.islnk() else None
        content.members[member.name] = before or member
        if member.size < 0:  # where the next one begins cannot be told
            raise tarfile.ReadError(f"{printable(member.name)} has a negative size")


def _follow(content: _TarContent, name: str) -> tarfile.TarInfo:
    """The member that a name leads to, through links (``UnreadableImage`` if to none)."""
    found = content.members.get(name) or content.by_plain_name.get(posixpath.normpath(name))
    if found is None:
        raise UnreadableImage(_NOT_THERE)
    member = found
    seen: set[str] = set()
    while member.issym() or member.islnk():
        name = posixpath.normpath(member.name)
        if name in seen:
            raise UnreadableImage("a link that leads to itself")
        seen.add(name)

        folder = posixpath.dirname(name) if member.issym() else ""
        target = posixpath.normpath(posixpath.join(folder, member.linkname))
        if target not in content.by_plain_name:
            raise UnreadableImage(f"a link to {printable(member.linkname)}, which is not in the archive")
        member = content.by_plain_name[target]
    return member


# ---- archives as references ----


def member_ref(archive: str, member: str, path: str) -> ImageRef:
    """One member of an archive, by its name in it, which is looked up when it is read."""
    if archive.lower().endswith(ZIP_SUFFIXES):
        return ZipRef(path, archive, member)
    return TarMemberRef(path, archive, member)


def archive_refs(archive: str, prefix: str) -> list[ImageRef]:
    """The images of an archive.

    Parameters
    ----------
    archive : str
        Its file, or its URL.
    prefix : str
        A folder, a file or a pattern inside it; empty for all.

    Returns
    -------
    list of ImageRef
        Members that must not be read, and whatever of the archive is lost, are listed with a reason.
    """
    label = printable(archive)
    try:
        list_members = _zip_refs if archive.lower().endswith(ZIP_SUFFIXES) else _tar_refs
        refs = list_members(archive, label, prefix)
    except Exception as error:  # see _open_tar
        return [MissingRef(label, f"archive cannot be read: {one_line(error)}")]

    return refs or [MissingRef(f"{label}/{prefix}".rstrip("/"), "no images in this archive")]


def _zip_refs(archive: str, label: str, prefix: str) -> list[ImageRef]:
    infos = _open_zip(archive, *version_of(archive)).infolist()
    names = sorted({info.filename for info in infos if not info.is_dir() and _is_wanted(info.filename, prefix)})

    refs: list[ImageRef] = []
    for name in names:
        path = f"{label}/{_plain_name(name)}"
        refs.append(MissingRef(path, _OUTSIDE) if _leads_outside(name) else ZipRef(path, archive, name))
    return refs


def _tar_refs(archive: str, label: str, prefix: str) -> list[ImageRef]:
    content = _open_tar(archive, *version_of(archive))
    end = content.end
    refs: list[ImageRef] = []
    for name, member in content.members.items():
        if member.isdir() or not _is_wanted(name, prefix):
            continue

        path = f"{label}/{_plain_name(name)}"
        if _leads_outside(name):
            refs.append(MissingRef(path, _OUTSIDE))
        elif member.size < 0:
            refs.append(MissingRef(path, "damaged: the archive gives it a negative size"))
        elif not content.plain or not member.isreg() or member.issparse():
            refs.append(TarMemberRef(path, archive, name))
        elif member.offset_data + member.size > end:
            refs.append(MissingRef(path, _cut_short(max(0, end - member.offset_data), member.size)))
        else:
            refs.append(TarRef(path, archive, member.offset_data, member.size))

    if content.plain:  # a compressed archive reads fast only in its own order
        refs.sort(key=lambda ref: ref.path)
    if content.problem:
        refs.append(MissingRef(label, f"archive cannot be read to its end: {content.problem}"))
    return refs


def _is_wanted(member: str, prefix: str) -> bool:
    """Whether a member is an image below ``prefix`` and not hidden."""
    name = _plain_name(member)
    wanted = prefix.rstrip("/")
    if not (name.startswith(prefix) or name == wanted or (has_magic(wanted) and fnmatch.fnmatchcase(name, wanted))):
        return False
    if _leads_outside(member):
        return has_image_suffix(name.replace("\\", "/"))

    parts = name.split("/")
    hidden = any(part.startswith(".") for part in parts) or parts[0] == "__MACOSX"
    return has_image_suffix(name) and not hidden


def _leads_outside(member: str) -> bool:
    """Whether a member is named like a file outside the archive, as in ``../a.png`` and ``/etc/a.png``."""
    return bool(_ABSOLUTE.match(member)) or ".." in _SEPARATORS.split(member)


def _plain_name(member: str) -> str:
    """The name of a member; in archives of the folder ``.`` names begin with ``./``."""
    return printable(member.removeprefix("./"))
