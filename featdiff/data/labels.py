"""Folders of classes -> image references and their classes. Nothing is decoded here."""

from __future__ import annotations

import os
from collections.abc import Hashable

import numpy as np

from ..exceptions import UnlabelledError, UsageError
from ..files.remote import is_url
from .references import ImageRef, MissingRef, list_images, printable, split_archive

_WANTED = "classes are the folders below a folder or an archive that is named (photos/cat/1.png in photos/)"


def list_labelled(sources: object) -> tuple[list[ImageRef], np.ndarray, list[str]]:
    """Every image behind ``sources``, and its class: the first folder below the source.

    Parameters
    ----------
    sources : str, Path, ImageRef, or a list of these
        Folders, zip or tar archives, and folders inside these (``data.zip/train``). Classes of the same name in several
        sources are one class. The class of a reference is the folder of its image. An image that is named twice
        counts once, with its first class.

    Returns
    -------
    refs : list of ImageRef
        As from :func:`featdiff.data.references.list_images`, source by source.
    labels : (N,) int64
        Positions in ``classes``.
    classes : list of str
        Sorted.

    Raises
    ------
    UnlabelledError
        An image outside all class folders, or a source that is neither a folder nor an archive.
    UsageError
        Nothing there.
    """
    refs: dict[Hashable, ImageRef] = {}
    class_of: dict[Hashable, str] = {}
    for source in sources if isinstance(sources, list | tuple) else [sources]:
        base = _base(source)
        for ref in list_images(source):
            if isinstance(ref, MissingRef):
                raise UsageError(f"{ref.path}: {ref.reason}")

            name = _class_of(ref.path, base)
            refs.setdefault(ref.identity, ref)
            class_of.setdefault(ref.identity, name)
    if not refs:
        raise UsageError("no images were named")

    classes = sorted(set(class_of.values()))
    numbers = {name: i for i, name in enumerate(classes)}
    labels = np.array([numbers[class_of[identity]] for identity in refs], dtype=np.int64)
    return list(refs.values()), labels, classes


def _base(source: object) -> str:
    """The beginning that the paths of all images below a source share."""
    if isinstance(source, ImageRef):
        return os.path.dirname(os.path.dirname(source.path))
    if not isinstance(source, str | os.PathLike):
        raise UnlabelledError(f"images given as {type(source).__name__} have no class: {_WANTED}")

    path = os.fspath(source)
    inside = split_archive(path)
    if os.path.isdir(path) or (is_url(path) and inside is None):
        return printable(path)
    if inside is None:
        raise UnlabelledError(f"{printable(path)} is no folder and no archive: {_WANTED}")

    archive, folder = inside
    return f"{printable(archive)}/{folder}"


def _class_of(path: str, base: str) -> str:
    parts = path.removeprefix(base).replace(os.sep, "/").strip("/").split("/")
    if len(parts) < 2:
        raise UnlabelledError(f"{path} lies in no class folder: {_WANTED}")
    return parts[0]
