"""Files, folders, archives, globs, arrays and datasets -> an ordered list of image references."""

from __future__ import annotations

import functools
import glob
import os
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from ..exceptions import UnreadableImage, UsageError
from .datasets import dataset_refs, is_map_style
from .image_refs import FileRef, HeldRef, ImageRef, MissingRef, printable
from .memory import refs_in_memory

__all__ = [
    "IMAGE_SUFFIXES",
    "TAR_SUFFIXES",
    "ZIP_SUFFIXES",
    "FileRef",
    "HeldRef",
    "ImageRef",
    "MissingRef",
    "TarMemberRef",
    "TarRef",
    "ZipRef",
    "list_images",
    "printable",
    "split_archive",
]

# Formats that Pillow cannot decode out of the box are listed too: a folder of HEIC photographs
# must give rows that say so, not an empty answer.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".heic", ".heif", ".jxl"),
)
ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


@dataclass(frozen=True)
class ZipRef(ImageRef):
    """A member of a zip archive, read without unpacking the archive."""

    archive: str
    member: str

    def read(self) -> bytes:
        return _open_zip(self.archive, *_version(self.archive)).read(self.member)


@dataclass(frozen=True)
class TarRef(ImageRef):
    """A member of a plain tar archive: a stretch of the archive file."""

    archive: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.archive, "rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


@dataclass(frozen=True)
class TarMemberRef(ImageRef):
    """A member of a compressed tar archive, which can only be read front to back, or a link in any tar."""

    archive: str
    member: str
    sequential: ClassVar[bool] = True

    def read(self) -> bytes:
        with _READING:
            tar, members = _open_tar(self.archive, *_version(self.archive))
            stream = tar.extractfile(members[self.member])
            if stream is None:
                raise UnreadableImage("not a regular file")
            return stream.read()


_READING = threading.Lock()


def _version(archive: str) -> tuple[int, int, int, int]:
    """Changes when the file does, and in a forked child, which must not share the parent's file position."""
    status = os.stat(archive)
    return os.getpid(), status.st_ino, status.st_mtime_ns, status.st_size


# One open handle per archive: parsing the directory of a large zip for each member would be quadratic.
@functools.lru_cache(maxsize=16)
def _open_zip(archive: str, *version: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)


@functools.lru_cache(maxsize=16)
def _open_tar(archive: str, *version: int) -> tuple[tarfile.TarFile, dict[str, tarfile.TarInfo]]:
    tar = tarfile.open(archive)  # noqa: SIM115
    return tar, {member.name: member for member in tar.getmembers()}  # tarfile searches a list, for each member anew


def list_images(sources: object, stdin: IO[bytes] | None = None) -> list[ImageRef]:
    """Every image behind ``sources``, each path once, in a fixed order.

    Parameters
    ----------
    sources : str, Path, PIL image, array, tensor, dataset, ImageRef, or a list of these
        A file, a folder (searched recursively, sorted by path), a glob pattern, a zip or tar archive or a
        folder inside one (``data.zip/train``), ``-`` (paths on standard input, one a line), a PIL image,
        an array or tensor of uint8 or of floats in [0, 1], or a dataset.

        An array of two dimensions is a grey picture (H, W). Of three dimensions the last holds the channels if it is
        1, 3 or 4 long, (H, W, C), else the first, if that is, (C, H, W). A tensor is read the other way round: first,
        then last. Four dimensions are a stack of images, (N, H, W, C) or (N, C, H, W) by the same rule.

        A dataset has a length and items by number, such as a torch ``Dataset``, torchvision's ``ImageFolder`` or a
        Hugging Face ``Dataset``. Its first item is looked at. Items are pictures, tuples that begin with one, mappings
        that hold one under ``image`` or ``img``, bytes of image files, paths, or arrays of one image.
    stdin : binary stream, default ``sys.stdin.buffer``
        Read for ``-``.

    Returns
    -------
    list of ImageRef
        Things that hold no image are listed too; reading them fails with a reason.

    Raises
    ------
    UsageError
        Nothing was found at all.

    Examples
    --------
    >>> import numpy as np
    >>> from featdiff.data.references import list_images
    >>> [ref.path for ref in list_images(np.zeros((2, 8, 8, 3)))]
    ['array[0][0]', 'array[0][1]']
    """
    items = list(sources) if isinstance(sources, list | tuple) else [sources]
    refs: list[ImageRef] = []
    streamed = False

    for number, item in enumerate(items):
        if isinstance(item, str) and item == "-":
            streamed = True
            for line in (stdin or sys.stdin.buffer).read().splitlines():
                if line.strip():
                    refs += _from_path(os.fsdecode(line))
        elif isinstance(item, str | os.PathLike):
            refs += _from_path(os.fspath(item))
        elif isinstance(item, ImageRef):
            refs.append(item)
        elif is_map_style(item):
            refs += dataset_refs(item, "dataset" if len(items) == 1 else f"dataset[{number}]")
        elif isinstance(item, Iterator):
            raise UsageError("a generator can be read only once, and these images are needed again: give a dataset")
        else:
            refs += refs_in_memory(item, number)

    listed = bool(items) and all(isinstance(item, ImageRef) for item in items)  # the rest of an interrupted run, say
    if not (streamed or listed) and all(isinstance(ref, MissingRef) for ref in refs):
        first = refs[0] if refs else None
        raise UsageError(f"{first.path}: {first.reason}" if isinstance(first, MissingRef) else "no images were named")

    # one file may be named twice
    return list({ref.identity: ref for ref in refs}.values())


def _from_path(path: str) -> list[ImageRef]:
    if os.path.isdir(path):
        refs = sorted(_from_folder(path), key=lambda ref: ref.path)
        return refs or [MissingRef(printable(path), "no images in this folder")]

    inside = split_archive(path)
    if inside:
        return _from_archive(*inside)

    if os.path.lexists(path):
        return [FileRef(printable(path), path)]

    if glob.has_magic(path):
        refs = [ref for name in sorted(glob.glob(path, recursive=True)) for ref in _from_path(name)]
        return refs or [MissingRef(printable(path), "no file matches this pattern")]

    return [MissingRef(printable(path), "no such file or folder")]


def _from_folder(root: str) -> Iterator[ImageRef]:
    """Images below ``root``; links to folders are followed, loops are not."""
    seen: set[str] = set()
    problems: list[OSError] = []
    for folder, folders, files in os.walk(root, followlinks=True, onerror=problems.append):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)

        # sorted, so that a folder with several names is always listed under the same one
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if _is_image(name):
                path = os.path.join(folder, name)
                yield FileRef(printable(path), path)

    for problem in problems:
        yield MissingRef(printable(problem.filename), f"folder cannot be read: {problem.strerror}")


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not os.path.basename(name).startswith(".")


def split_archive(path: str) -> tuple[str, str] | None:
    """``a/data.zip/train`` -> (``a/data.zip``, ``train/``); None if no part of the path is an archive file."""
    parts = Path(path).parts
    for end in range(1, len(parts) + 1):
        archive = os.path.join(*parts[:end])
        if archive.lower().endswith(ZIP_SUFFIXES + TAR_SUFFIXES) and os.path.isfile(archive):
            return archive, "/".join((*parts[end:], ""))
    return None


def _from_archive(archive: str, prefix: str) -> list[ImageRef]:
    label = printable(archive)
    try:
        list_members = _zip_members if archive.lower().endswith(ZIP_SUFFIXES) else _tar_members
        refs = list_members(archive, label, prefix)
    except Exception as error:  # damaged archives raise zlib, lzma, struct and many other errors
        return [MissingRef(label, f"archive cannot be read: {' '.join(str(error).split())}")]

    return refs or [MissingRef(f"{label}/{prefix}".rstrip("/"), "no images in this archive")]


def _wanted(member: str, prefix: str) -> bool:
    """Whether a member is an image below ``prefix`` and not hidden."""
    name = _plain_name(member)
    parts = name.split("/")
    hidden = any(part.startswith(".") for part in parts) or parts[0] == "__MACOSX"
    return _is_image(name) and not hidden and (name.startswith(prefix) or name == prefix.rstrip("/"))


def _plain_name(member: str) -> str:
    """The name of a member; in archives of the folder ``.`` names begin with ``./``."""
    return _utf8(member.removeprefix("./"))


def _zip_members(archive: str, label: str, prefix: str) -> list[ImageRef]:
    infos = _open_zip(archive, *_version(archive)).infolist()
    names = sorted({info.filename for info in infos if not info.is_dir() and _wanted(info.filename, prefix)})
    return [ZipRef(f"{label}/{_plain_name(name)}", archive, name) for name in names]


def _tar_members(archive: str, label: str, prefix: str) -> list[ImageRef]:
    with tarfile.open(archive) as tar:
        # of members that were written twice the last one counts
        members = {m.name: m for m in tar.getmembers() if not m.isdir() and _wanted(m.name, prefix)}
        plain = tar.fileobj is not None and type(tar.fileobj).__module__ in ("io", "_io")

    refs: list[ImageRef] = []
    for name, member in members.items():
        path = f"{label}/{_plain_name(name)}"
        if plain and member.isreg() and not member.issparse():
            refs.append(TarRef(path, archive, member.offset_data, member.size))
        else:
            refs.append(TarMemberRef(path, archive, name))

    # a compressed archive reads fast only in its own order
    return sorted(refs, key=lambda ref: ref.path) if plain else refs


def _utf8(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
