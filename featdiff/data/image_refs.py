"""What a reference to an image is, and the plain ones: a file, an image in memory, and something without an image.

A reference is small and picklable, and can be read on any thread or in a spawned process.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from ..exceptions import UnreadableImage


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

    def held(self) -> HeldRef:
        """The same image after reading, under the name it turned out to have (errors as for :meth:`read`)."""
        return HeldRef(self.path, self.read())


@dataclass(frozen=True)
class FileRef(ImageRef):
    """An image file."""

    file: str

    @property
    def identity(self) -> Hashable:
        return self.file  # two different files may be printed alike

    def read(self) -> bytes:
        mode = os.stat(self.file).st_mode
        if not stat.S_ISREG(mode):  # a pipe or a device would block or never end
            raise UnreadableImage("a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file")

        with open(self.file, "rb") as stream:
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


def printable(path: str | os.PathLike[str]) -> str:
    """A path as valid Unicode; bytes that are not UTF-8 become ``\\xNN``."""
    try:
        text = os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate, which no file name can hold
        text = os.fspath(path).encode("utf-8", "backslashreplace").decode()
    return text or "(empty name)"
