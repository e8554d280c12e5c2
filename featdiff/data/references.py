"""Files, folders, archives, globs, arrays and datasets -> an ordered list of image references."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Hashable, Iterable, Iterator
from typing import IO

from ..exceptions import UsageError
from ..files.remote import is_url
from .archive_names import TAR_SUFFIXES, ZIP_SUFFIXES, split_archive
from .archives import TarMemberRef, TarRef, ZipRef, archive_refs, member_ref
from .datasets import dataset_refs, is_map_style, iter_refs
from .image_refs import IMAGE_SUFFIXES, FileRef, HeldRef, ImageRef, MissingRef, StreamRef, has_image_suffix, printable
from .memory import is_file_content, refs_in_memory
from .parquet_refs import holds_images, is_parquet, parquet_ref, parquet_refs
from .remote_refs import RemoteRef, is_pattern, remote_refs
from .streams import is_stream, stream_refs
from .videos import frame_ref, frame_refs, is_video

__all__ = [
    "IMAGE_SUFFIXES",
    "TAR_SUFFIXES",
    "ZIP_SUFFIXES",
    "FileRef",
    "HeldRef",
    "ImageRef",
    "MissingRef",
    "RemoteRef",
    "StreamRef",
    "TarMemberRef",
    "TarRef",
    "ZipRef",
    "iter_images",
    "list_images",
    "printable",
    "ref_of",
    "split_archive",
]


def list_images(sources: object, stdin: IO[bytes] | None = None, every: float | None = None) -> list[ImageRef]:
    """Every image behind ``sources``, each path once, in a fixed order.

    Parameters
    ----------
    sources : str, Path, bytes, open file, PIL image, array, tensor, dataset, ImageRef, or a list of these
        A file, a folder, a glob pattern, a zip or tar archive or a folder inside one (``data.zip/train``), a Parquet
        file with images in its rows, a video, a URL of any of these that fsspec opens, ``-`` (paths on standard input,
        one a line), the content of an image file (``bytes``, ``bytearray``, ``memoryview``), a binary file that is open
        (``BytesIO`` too), a PIL image, an array or tensor of uint8 or of floats in [0, 1], or a dataset.

        A folder is searched recursively, sorted by path, for image files, videos and Parquet files of images; archives
        are not opened, and Parquet files of anything else are left out.

        An open file is read when its turn comes, so it must still be open: from its start, wherever it stands; a stream
        that cannot go back is read from where it is, and so only once.

        An array of two dimensions is a grey picture (H, W). Of three dimensions the last holds the channels if it is
        1, 3 or 4 long, (H, W, C), else the first, if that is, (C, H, W). A tensor is read the other way round: first,
        then last. Four dimensions are a stack of images, (N, H, W, C) or (N, C, H, W) by the same rule.

        A dataset has a length and items by number, such as a torch ``Dataset``, torchvision's ``ImageFolder`` or a
        Hugging Face ``Dataset``. Its first item is looked at. Items are pictures, tuples that begin with one, mappings
        that hold one under ``image`` or ``img``, bytes of image files, open files, paths, or arrays of one image.
    stdin : binary stream, default ``sys.stdin.buffer``
        Read for ``-``.
    every : float, optional
        Of videos, one frame in so many seconds; default: every frame.

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
    >>> [ref.path for ref in list_images(b"the content of a file")]
    ['bytes[0]']
    """
    items = list(sources) if isinstance(sources, list | tuple) else [sources]
    if any(isinstance(item, Iterator) and not is_file_content(item) for item in items):
        raise UsageError("a generator can be read only once, and these images are needed again: give a dataset")
    if any(isinstance(item, str) and is_stream(item) for item in items):
        raise UsageError("a camera stream has no end: featdiff score reads it, or iter_images")

    # one file may be named twice
    refs = list({ref.identity: ref for ref in iter_images(items, stdin, every)}.values())

    streamed = _is_stdin(items)
    listed = bool(items) and all(isinstance(item, ImageRef) for item in items)  # the rest of an interrupted run, say
    if not (streamed or listed) and all(isinstance(ref, MissingRef) for ref in refs):
        first = refs[0] if refs else None
        raise UsageError(f"{first.path}: {first.reason}" if isinstance(first, MissingRef) else "no images were named")
    return refs


def iter_images(sources: object, stdin: IO[bytes] | None = None, every: float | None = None) -> Iterator[ImageRef]:
    """Every image behind ``sources`` as it is found: the first comes before a long listing ends.

    Parameters
    ----------
    sources, stdin, every
        As for :func:`list_images`, or generators of images, or a camera stream (see
        :func:`featdiff.data.streams.stream_refs`), which does not end by itself.

    Yields
    ------
    ImageRef
        In the order of :func:`list_images`. Of several sources, each image once; then all names stay in memory.
        Things that hold no image come too, and where nothing is found, a reference that says so.

    Raises
    ------
    UsageError
        A source is of no kind that can hold images.

    Examples
    --------
    >>> import numpy as np
    >>> from featdiff.data.references import iter_images
    >>> next(iter_images(np.zeros((2, 8, 8, 3)))).path
    'array[0][0]'
    """
    items = list(sources) if isinstance(sources, list | tuple) else [sources]
    several = len(items) > 1 or _is_stdin(items)
    seen: set[Hashable] = set()
    for number, item in enumerate(items):
        for ref in _from_item(item, number, len(items), stdin, every):
            if several and ref.identity in seen:
                continue
            if several:
                seen.add(ref.identity)
            yield ref


def _is_stdin(items: Iterable[object]) -> bool:
    return any(isinstance(item, str) and item == "-" for item in items)


def _from_item(
    item: object, number: int, count: int, stdin: IO[bytes] | None, every: float | None
) -> Iterator[ImageRef]:
    """The images of one source."""
    label = "dataset" if count == 1 else f"dataset[{number}]"
    if isinstance(item, str) and item == "-":
        for line in stdin or sys.stdin.buffer:
            for name in line.splitlines():
                if name.strip():
                    yield from _from_path(os.fsdecode(name), every)
    elif isinstance(item, str) and is_stream(item):
        yield from stream_refs(item, every)
    elif isinstance(item, str | os.PathLike):
        yield from _from_path(os.fspath(item), every)
    elif isinstance(item, ImageRef):
        yield item
    elif is_file_content(item):
        yield from refs_in_memory(item, number)
    elif is_map_style(item):
        yield from dataset_refs(item, label)
    elif isinstance(item, Iterator):
        yield from iter_refs(item, label)
    else:
        yield from refs_in_memory(item, number)


def ref_of(name: str, size: int | None = None) -> ImageRef:
    """The reference to one image by the name that :func:`iter_images` gave it; nothing is listed.

    Parameters
    ----------
    name : str
        A local file, a URL, a member of an archive at either (``a.zip/b.png``), a row of a Parquet file
        (``a.parquet#row=3``), or a frame of a video (``a.mp4#t=3.000``).
    size : int, optional
        Of a remote object in bytes, where it is known: saves a request.

    Returns
    -------
    ImageRef
        What cannot be found says so when it is read.

    Examples
    --------
    >>> from featdiff.data.references import ref_of
    >>> ref_of("s3://photos/a.jpg", size=5)
    RemoteRef(path='s3://photos/a.jpg', url='s3://photos/a.jpg', size=5)
    """
    part = _part_of(name)
    if part:
        return part
    inside = split_archive(name)
    if inside and inside[1]:
        return member_ref(inside[0], inside[1].rstrip("/"), printable(name))
    if is_url(name):
        return RemoteRef(printable(name), name, size)
    return FileRef(printable(name), name)


def _from_path(path: str, every: float | None) -> Iterator[ImageRef]:
    url = is_url(path)
    if is_stream(path):
        yield MissingRef(printable(path), "a camera stream, which can only be read alone")
        return
    if not url and os.path.isdir(path):
        yield from _or_none(_from_folder(path, every), path)
        return

    part = None if os.path.lexists(path) else _part_of(path)
    inside = split_archive(path)
    if part:
        yield part
    elif inside and url and is_pattern(inside[0]):
        for item in remote_refs(inside[0]):
            yield from [item] if isinstance(item, ImageRef) else archive_refs(item, inside[1])
    elif inside:
        yield from archive_refs(*inside)
    elif _holds_many(path) and not is_pattern(path) if url else os.path.isfile(path) and _holds_many(path):
        yield from parquet_refs(path) if is_parquet(path) else frame_refs(path, every)
    elif url:
        yield from _or_none(_from_url(path, every), path)
    elif os.path.lexists(path):
        yield FileRef(printable(path), path)
    elif glob.has_magic(path):
        names = sorted(glob.glob(path, recursive=True))
        for name in names:
            yield from _from_path(name, every)
        if not names:
            yield MissingRef(printable(path), "no file matches this pattern")
    else:
        yield MissingRef(printable(path), "no such file or folder")


def _part_of(name: str) -> ImageRef | None:
    """The row of a Parquet file or the frame of a video that a name means."""
    return parquet_ref(name) or frame_ref(name)


def _holds_many(path: str) -> bool:
    return is_parquet(path) or is_video(path)


def _or_none(refs: Iterable[ImageRef], folder: str) -> Iterator[ImageRef]:
    """The same, or a reference that says there are none."""
    found = False
    for ref in refs:
        found = True
        yield ref
    if not found:
        yield MissingRef(printable(folder), "no images in this folder")


def _from_url(url: str, every: float | None) -> Iterator[ImageRef]:
    """The images below a URL, or of a pattern, which names what it matches."""
    for item in remote_refs(url):
        if isinstance(item, ImageRef):
            yield item
        else:
            yield from _from_path(item, every) if is_pattern(url) else _in_folder(item, every)


def _from_folder(root: str, every: float | None) -> Iterator[ImageRef]:
    """Images below ``root``, sorted by path, folder by folder; links to folders are followed, loops are not."""
    seen: set[str] = set()
    waiting: list[tuple[str, bool]] = [(root, True)]  # the next one last
    while waiting:
        path, is_folder = waiting.pop()
        if not is_folder:
            yield from _in_folder(path, every) if _holds_many(path) else [FileRef(printable(path), path)]
            continue

        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        try:
            waiting += reversed(_entries(path))
        except OSError as problem:
            yield MissingRef(printable(path), f"folder cannot be read: {problem.strerror}")


def _in_folder(path: str, every: float | None) -> Iterator[ImageRef]:
    """The images of a video or a Parquet file that nobody named: a table of other things is none of them, and a
    package that is missing ends nothing.
    """
    try:
        if is_video(path):
            yield from frame_refs(path, every)
        elif holds_images(path):
            yield from parquet_refs(path)
    except UsageError as error:
        if error.argument:  # not about this file
            raise
        yield MissingRef(printable(path), str(error).removeprefix(f"{path}: "))


def _entries(folder: str) -> list[tuple[str, bool]]:
    """Folders and files of images in a folder, and which is which; as whole paths are sorted, a slash after folders."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            wanted = is_folder or has_image_suffix(entry.name) or _holds_many(entry.name)
            if wanted and not entry.name.startswith("."):
                found.append((os.path.join(folder, entry.name), is_folder))
    return sorted(found, key=lambda entry: printable(entry[0]) + "/" * entry[1])
