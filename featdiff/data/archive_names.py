"""Paths and URLs that lead into an archive."""

from __future__ import annotations

import os
from pathlib import Path

from ..files.remote import is_url

ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


def split_archive(path: str) -> tuple[str, str] | None:
    """``a/data.zip/train`` -> (``a/data.zip``, ``train/``); None if no part of the path is an archive file."""
    if is_url(path):
        return _split_url(path)
    parts = Path(path).parts
    for end in range(1, len(parts) + 1):
        archive = os.path.join(*parts[:end])
        if archive.lower().endswith(ZIP_SUFFIXES + TAR_SUFFIXES) and os.path.isfile(archive):
            return archive, "/".join((*parts[end:], ""))
    return None


def _split_url(url: str) -> tuple[str, str] | None:
    """The same of a URL, by its name alone; of a chain as fsspec has it (``zip://train::s3://b/a.zip``) as well."""
    outer, _, rest = url.partition("::")
    scheme, _, inside = outer.partition("://")
    if rest and scheme in ("zip", "tar"):
        return rest, f"{inside}/" if inside else ""

    parts = url.split("/")
    for end in range(1, len(parts) + 1):
        if parts[end - 1].lower().endswith(ZIP_SUFFIXES + TAR_SUFFIXES):
            return "/".join(parts[:end]), "/".join((*parts[end:], "")).lstrip("/")
    return None
