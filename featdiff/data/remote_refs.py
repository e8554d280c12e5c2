"""Images at URLs: objects of a store, files of a web server or of the hub, listed page by page."""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import has_magic
from typing import Any

from ..exceptions import UnreadableImage, one_line
from ..files.remote import ask, filesystem, read_bytes
from .archive_names import TAR_SUFFIXES, ZIP_SUFFIXES
from .image_refs import ImageRef, MissingRef, has_image_suffix, printable
from .limits import MAX_BYTES, check_bytes
from .parquet_refs import PARQUET_SUFFIXES
from .videos import VIDEO_SUFFIXES

# Files of many images: those of a folder, and what a pattern may match besides.
_OF_MANY = (*PARQUET_SUFFIXES, *VIDEO_SUFFIXES)
_ARCHIVES = (*ZIP_SUFFIXES, *TAR_SUFFIXES)


@dataclass(frozen=True)
class RemoteRef(ImageRef):
    """An object or a file at a URL; ``size`` in bytes, None if it is not known."""

    url: str
    size: int | None = None

    def bytes_to_read(self) -> int | None:
        return self.size

    def read(self) -> bytes:
        return self.read_within(MAX_BYTES)

    def read_within(self, max_bytes: int) -> bytes:
        check_bytes(self.size, max_bytes)
        try:
            content = read_bytes(self.url, max_bytes if self.size is None else None)
        except OSError as error:
            raise UnreadableImage(error.strerror or one_line(error)) from None
        check_bytes(len(content), max_bytes)
        return content


def remote_refs(url: str) -> Iterator[ImageRef | str]:
    """The images at a URL, as they are listed.

    Parameters
    ----------
    url : str
        An object, which needs no listing if it is named like an image or lies on a web server; a folder or the prefix
        of one, searched recursively; or a pattern.

    Yields
    ------
    ImageRef or str
        Sorted by name. Of videos and Parquet files, and of archives that a pattern matches, their URLs. A listing that
        breaks off ends with a reference that says why.

    Raises
    ------
    UsageError
        The scheme is unknown, or its client is not installed.
    """
    system, path = filesystem(url)
    web = url.startswith(("http://", "https://"))
    if not is_pattern(url) and not url.endswith("/") and (web or has_image_suffix(url)):
        yield RemoteRef(printable(url), url)
        return

    found = 0
    try:
        for name, size in _listed(system, url, path):
            found += 1
            yield RemoteRef(printable(name), name, size) if has_image_suffix(name) else name
    except FileNotFoundError as error:
        yield MissingRef(printable(url), error.strerror or "no such object")
        return
    except OSError as error:
        yield MissingRef(printable(url), f"the listing broke off after {found:,} images: {error.strerror}")
        return
    if not found:
        yield _only(url)


def _only(url: str) -> ImageRef:
    """What a URL is that has no images below it."""
    try:
        entry = ask(url, lambda system, path: system.info(path))
    except OSError as error:
        unmatched = isinstance(error, FileNotFoundError) and is_pattern(url)
        reason = "no object matches this pattern" if unmatched else error.strerror or one_line(error)
        return MissingRef(printable(url), reason)
    if entry["type"] == "file":
        return RemoteRef(printable(url), url, entry.get("size"))
    return MissingRef(printable(url), "no images in this folder")


def is_pattern(url: str) -> bool:
    """Whether a URL has a wildcard; of a web address only a star is one."""
    return "*" in url.partition("?")[0] if url.startswith("http") else has_magic(url)


def _listed(system: Any, url: str, path: str) -> Iterator[tuple[str, int | None]]:
    """URLs and sizes of the images below a path, or of those that match a pattern."""
    matches = None
    root = path
    if is_pattern(url):
        import re

        from fsspec.utils import glob_translate

        matches = re.compile(glob_translate(path)).match
        root = "/".join(itertools.takewhile(lambda part: not has_magic(part), path.split("/")))

    chain = url.rpartition("::")[0] + "::" if "::" in url else ""
    objects = _s3_objects(system, url, root) if hasattr(system, "call_s3") else _walk(url, root)
    below = root.rstrip("/") + "/" if root else ""
    for name, size in objects:
        hidden = any(part.startswith(".") for part in name.removeprefix(below).split("/"))
        suffixes = (*_OF_MANY, *_ARCHIVES) if matches else _OF_MANY
        wanted = has_image_suffix(name) or name.lower().endswith(suffixes)
        if hidden or not wanted or (matches and not matches(name)):
            continue
        yield chain + _as_named(url, system.unstrip_protocol(name)), size


def _as_named(url: str, listed: str) -> str:
    """What a client lists, by the scheme and store that people named; adlfs calls ``az://`` objects ``abfs://``."""
    scheme, _, rest = url.rpartition("::")[2].partition("://")
    store = rest.partition("/")[0]
    place = listed.partition("://")[2]
    if "@" in store and place.partition("/")[0] == store.partition("@")[0]:  # abfs://container@account.host/
        place = f"{store}/{place.partition('/')[2]}"
    return f"{scheme}://{place}"


def _s3_objects(system: Any, url: str, root: str) -> Iterator[tuple[str, int | None]]:
    """Objects page by page, as the store gives them: s3fs itself lists a whole prefix before it gives any."""
    bucket, _, prefix = root.partition("/")
    asked = {"Bucket": bucket, "Prefix": prefix.rstrip("/") + "/" if prefix else ""}
    while True:
        page = ask(url, lambda system, _: system.call_s3("list_objects_v2", **asked))  # noqa: B023
        for entry in page.get("Contents", ()):
            yield f"{bucket}/{entry['Key']}", entry["Size"]
        if not page.get("IsTruncated"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]


def _walk(url: str, root: str) -> Iterator[tuple[str, int | None]]:
    """Files below a folder, folder by folder, sorted by name."""
    entries: Iterable[dict[str, Any]] = ask(url, lambda system, _: system.ls(root, detail=True))
    folder = root.rstrip("/")
    for entry in sorted(entries, key=lambda entry: entry["name"].rstrip("/") + "/" * (entry["type"] == "directory")):
        name = entry["name"]
        if entry["type"] != "directory":
            yield name, entry.get("size")
        elif name.rstrip("/") != folder and not posixpath.basename(name.rstrip("/")).startswith("."):
            yield from _walk(url, name)
