"""Files, folders, archives, globs and arrays -> an ordered list of image references. Nothing is decoded here.

A reference is small and picklable, and can be read on any thread or in a spawned process.
"""

from __future__ import annotations

import functools
import glob
import os
import stat
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from PIL import Image

from ..exceptions import UnreadableImage, UsageError

# Formats that Pillow cannot decode out of the box are listed too: a folder of HEIC photographs
# must give rows that say so, not an empty answer.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".heic", ".heif", ".jxl"),
)
ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


@dataclass(frozen=True)
class ImageRef:
    """One image that can be read later.

    A subclass with a ``read`` of its own brings in images from anywhere.

    Attributes
    ----------
    path : str
        The name that reports print: valid Unicode, never empty.
    sequential : bool
        True if reading out of order would be very slow; then one thread reads in order.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> from featdiff.data.references import ImageRef
    >>> @dataclass(frozen=True)
    ... class BucketRef(ImageRef):
    ...     key: str
    ...
    ...     def read(self):
    ...         return fetch(self.key)  # the bytes of an image file
    >>> BucketRef("s3://photos/1.jpg", key="1.jpg").path
    's3://photos/1.jpg'
    """

    path: str
    sequential: ClassVar[bool] = False

    def read(self) -> bytes | Image.Image:
        """The encoded bytes, or the picture itself if it never was a file.

        Raises
        ------
        OSError, UnreadableImage
            The image cannot be read.
        """
        raise UnreadableImage(f"{type(self).__name__} cannot be read")


@dataclass(frozen=True)
class FileRef(ImageRef):
    """An image file."""

    file: str

    def read(self) -> bytes:
        mode = os.stat(self.file).st_mode
        if not stat.S_ISREG(mode):  # a pipe or a device would block or never end
            raise UnreadableImage("a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file")

        with open(self.file, "rb") as stream:
            return stream.read()


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


@dataclass(frozen=True)
class HeldRef(ImageRef):
    """An image already in memory: a picture, or the bytes of a file."""

    content: bytes | Image.Image

    def read(self) -> bytes | Image.Image:
        return self.content


@dataclass(frozen=True)
class MissingRef(ImageRef):
    """Something that was named but holds no image; it becomes a row with a reason."""

    reason: str

    def read(self) -> bytes:
        raise UnreadableImage(self.reason)


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


def printable(path: str | os.PathLike[str]) -> str:
    """A path as valid Unicode; bytes that are not UTF-8 become ``\\xNN``."""
    try:
        text = os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate, which no file name can hold
        text = os.fspath(path).encode("utf-8", "backslashreplace").decode()
    return text or "(empty name)"


def list_images(sources: object, stdin: IO[bytes] | None = None) -> list[ImageRef]:
    """Every image behind ``sources``, each path once, in a fixed order.

    Parameters
    ----------
    sources : str, Path, PIL image, array, tensor, ImageRef, or a list of these
        A file, a folder (searched recursively, sorted by path), a glob pattern, a zip or tar archive or a
        folder inside one (``data.zip/train``), ``-`` (paths on standard input, one a line), a PIL image,
        an array (H, W), (H, W, C) or (N, H, W, C) of uint8 or of floats in [0, 1],
        a tensor (C, H, W) or (N, C, H, W) of the same.
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
        else:
            refs += _from_memory(item, number)

    if not streamed and all(isinstance(ref, MissingRef) for ref in refs):
        first = refs[0] if refs else None
        raise UsageError(f"{first.path}: {first.reason}" if isinstance(first, MissingRef) else "no images were named")

    # two different files may be printed alike, and one file may be named twice
    return list({getattr(ref, "file", ref.path): ref for ref in refs}.values())


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


def _from_memory(item: object, number: int) -> list[ImageRef]:
    """A picture, an array or a tensor; of a stack of images, one reference each."""
    if isinstance(item, Image.Image):
        return [HeldRef(f"image[{number}]", item)]

    array: Any = item
    channels_first = hasattr(item, "detach")  # a torch tensor, told without importing torch
    if channels_first:
        tensor = array.detach().cpu()
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # NumPy has no bfloat16
    if not isinstance(array, np.ndarray):
        raise UsageError(f"images cannot come from a {type(item).__name__}; give paths, PIL images, arrays or tensors")
    if array.ndim not in (2, 3, 4):
        raise UsageError(f"an image array has 2 to 4 dimensions, not {array.ndim}")

    label = f"array[{number}]"
    if array.ndim < 4:
        return [_array_ref(label, array, channels_first)]
    return [_array_ref(f"{label}[{i}]", image, channels_first) for i, image in enumerate(array)]


def _array_ref(label: str, image: np.ndarray, channels_first: bool) -> ImageRef:
    """uint8 as it is, floats in [0, 1] scaled to uint8; anything else becomes a row with a reason."""
    if channels_first and image.ndim == 3:
        image = np.moveaxis(image, 0, -1)

    if image.ndim == 3 and image.shape[2] not in (1, 3, 4):
        return MissingRef(label, f"an image has 1, 3 or 4 channels, not {image.shape[2]}")
    if 0 in image.shape:
        return MissingRef(label, "an empty array")

    if image.dtype != np.uint8:
        if not np.issubdtype(image.dtype, np.floating):
            return MissingRef(label, f"pixels are uint8 or floats in [0, 1], not {image.dtype}")
        if not np.isfinite(image).all():
            return MissingRef(label, "NaN or infinite pixels")
        if image.min() < 0 or image.max() > 1:
            return MissingRef(label, "float pixels must lie in [0, 1]; give a DataLoader for images already normalised")
        image = np.round(image * 255).astype(np.uint8)

    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    return HeldRef(label, Image.fromarray(image))
