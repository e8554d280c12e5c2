"""What a reference to an image is, and the plain ones: a file, an open file, an image in memory, and no image at all.

A reference is small and picklable, and can be read on any thread or in a spawned process.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image

from ..exceptions import UnreadableImage
from .limits import MAX_BYTES, check_bytes

# Formats that Pillow cannot decode out of the box are listed too: a folder of HEIC photographs
# must give rows that say so, not an empty answer.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".heic", ".heif", ".jxl"),
)


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

    @property
    def identity(self) -> Hashable:
        """What tells this image from others in a list: of references with the same identity, one is listed."""
        return self.path

    def read(self) -> bytes | Image.Image:
        """The encoded bytes, or the picture itself if it never was a file.

        Raises
        ------
        OSError, UnreadableImage
            The image cannot be read.
        """
        raise UnreadableImage(f"{type(self).__name__} cannot be read")

    def bytes_to_read(self) -> int | None:
        """How many bytes :meth:`read` will give, as far as that is known before; it may raise the same errors."""
        return None

    def read_within(self, max_bytes: int) -> bytes | Image.Image:
        """As :meth:`read`; more than ``max_bytes`` is refused, before reading where the size is known."""
        check_bytes(self.bytes_to_read(), max_bytes)
        content = self.read()
        if isinstance(content, bytes):
            check_bytes(len(content), max_bytes)
        return content

    def held(self, max_bytes: int = MAX_BYTES) -> ImageRef:
        """The same image as any thread may read it, under the name it turned out to have.

        Errors are those of :meth:`read_within`.
        """
        return HeldRef(self.path, self.read_within(max_bytes))


@dataclass(frozen=True)
class FileRef(ImageRef):
    """An image file."""

    file: str

    @property
    def identity(self) -> Hashable:
        return self.file  # two different files may be printed alike

    def bytes_to_read(self) -> int:
        status = os.stat(self.file)
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device would block or never end
            raise UnreadableImage("a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        return status.st_size

    def read(self) -> bytes:
        size = self.bytes_to_read()
        with open(self.file, "rb") as stream:
            return stream.read(size)


@dataclass(frozen=True)
class StreamRef(ImageRef):
    """An open binary file, read on the calling thread: from its start, or if it cannot go back, from where it is."""

    stream: Any = field(compare=False, repr=False)
    sequential: ClassVar[bool] = True

    @property
    def identity(self) -> Hashable:
        return id(self.stream)

    def read(self) -> bytes:
        return self.read_within(MAX_BYTES)

    def read_within(self, max_bytes: int) -> bytes:
        self._rewind()
        content = self.stream.read(max_bytes + 1)  # it may have no end
        if isinstance(content, str):
            raise UnreadableImage("a file opened as text: open it with mode 'rb'")
        if not isinstance(content, bytes | bytearray | memoryview):
            raise UnreadableImage(f"its read() gives a {type(content).__name__}, not bytes")
        if len(content) > max_bytes:
            raise UnreadableImage(f"more bytes than the limit of {max_bytes:,} (max_bytes)", argument="max_bytes")
        return bytes(content)

    def _rewind(self) -> None:
        seek = getattr(self.stream, "seek", None)
        if seek is None:
            return
        try:
            seek(0)
        except OSError:  # a pipe or a socket
            return


@dataclass(frozen=True)
class HeldRef(ImageRef):
    """An image already in memory: a picture, or the bytes of a file."""

    content: bytes | Image.Image

    def bytes_to_read(self) -> int | None:
        return len(self.content) if isinstance(self.content, bytes) else None

    def read(self) -> bytes | Image.Image:
        return self.content


@dataclass(frozen=True)
class MissingRef(ImageRef):
    """Something that was named but holds no image; it becomes a row with a reason."""

    reason: str

    def read(self) -> bytes:
        raise UnreadableImage(self.reason)


def printable(path: str | os.PathLike[str]) -> str:
    """A path as valid Unicode; bytes that are not UTF-8 become ``\\xNN``."""
    try:
        text = os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate, which no file name can hold
        text = os.fspath(path).encode("utf-8", "backslashreplace").decode()
    return text or "(empty name)"


def has_image_suffix(name: str) -> bool:
    """Whether a file is an image by its name, and not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not os.path.basename(name).startswith(".")
