"""Files, folders, archives, globs, arrays and datasets -> an ordered list of image references."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator
from typing import IO

from ..exceptions import UsageError
from .archives import TAR_SUFFIXES, ZIP_SUFFIXES, TarMemberRef, TarRef, ZipRef, archive_refs, split_archive
from .datasets import dataset_refs, is_map_style
from .image_refs import IMAGE_SUFFIXES, FileRef, HeldRef, ImageRef, MissingRef, StreamRef, has_image_suffix, printable
from .memory import is_file_content, refs_in_memory

__all__ = [
    "IMAGE_SUFFIXES",
    "TAR_SUFFIXES",
    "ZIP_SUFFIXES",
    "FileRef",
    "HeldRef",
    "ImageRef",
    "MissingRef",
    "StreamRef",
    "TarMemberRef",
    "TarRef",
    "ZipRef",
    "list_images",
    "printable",
    "split_archive",
]


def list_images(sources: object, stdin: IO[bytes] | None = None) -> list[ImageRef]:
    """Every image behind ``sources``, each path once, in a fixed order.

    Parameters
    ----------
    sources : str, Path, bytes, open file, PIL image, array, tensor, dataset, ImageRef, or a list of these
        A file, a folder (searched recursively, sorted by path), a glob pattern, a zip or tar archive or a
        folder inside one (``data.zip/train``), ``-`` (paths on standard input, one a line), the content of an image
        file (``bytes``, ``bytearray``, ``memoryview``), a binary file that is open (``BytesIO`` too), a PIL image,
        an array or tensor of uint8 or of floats in [0, 1], or a dataset.

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
        elif is_file_content(item):
            refs += refs_in_memory(item, number)
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
        return archive_refs(*inside)

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
            if has_image_suffix(name):
                path = os.path.join(folder, name)
                yield FileRef(printable(path), path)

    for problem in problems:
        yield MissingRef(printable(problem.filename), f"folder cannot be read: {problem.strerror}")
