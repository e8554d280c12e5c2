"""Folders of classes -> image references and their classes. Nothing is decoded here."""

from __future__ import annotations

import os

import numpy as np

from ..exceptions import UnlabelledError, UsageError
from .references import ImageRef, MissingRef, list_images, printable, split_archive

_WANTED = "classes are the folders below a folder or an archive that is named (photos/cat/1.png in photos/)"


def list_labelled(sources: object) -> tuple[list[ImageRef], np.ndarray, list[str]]:
    """Every image behind ``sources``, and its class: the first folder below the source that was named.

    Parameters
    ----------
    sources : str, Path, ImageRef, or a list of these
        Folders, zip or tar archives, and folders inside such (``data.zip/train``). Classes of the same name in several
        sources are one class. The class of a reference is the folder its image lies in. An image that is named twice
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
        An image without a folder of its own, or a source that is neither a folder nor an archive.
    UsageError
        Nothing there.
    """
    found: dict[str, tuple[ImageRef, str]] = {}
    for source in sources if isinstance(sources, list | tuple) else [sources]:
        base = _base(source)
        for ref in list_images(source):
            if isinstance(ref, MissingRef):
                raise UsageError(f"{ref.path}: {ref.reason}")
            found.setdefault(getattr(ref, "file", ref.path), (ref, _class_of(ref.path, base)))
    if not found:
        raise UsageError("no images were named")
    classes = sorted({name for _, name in found.values()})
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name] for _, name in found.values()], dtype=np.int64)
    return [ref for ref, _ in found.values()], labels, classes


def _base(source: object) -> str:
    """How the paths of all images below a source begin."""
    if isinstance(source, ImageRef):
        return os.path.dirname(os.path.dirname(source.path))
    if not isinstance(source, str | os.PathLike):
        raise UnlabelledError(f"images given as {type(source).__name__} have no class: {_WANTED}")
    path = os.fspath(source)
    if os.path.isdir(path):
        return printable(path)
    if (inside := split_archive(path)) is None:
        raise UnlabelledError(f"{printable(path)} is no folder and no archive: {_WANTED}")
    return f"{printable(inside[0])}/{inside[1]}"


def _class_of(path: str, base: str) -> str:
    parts = path.removeprefix(base).replace(os.sep, "/").strip("/").split("/")
    if len(parts) < 2:
        raise UnlabelledError(f"{path} lies in no class folder: {_WANTED}")
    return parts[0]
