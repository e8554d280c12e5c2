"""Files anywhere, by URL: object stores, web servers, the hub and whatever else fsspec opens.

Requests time out and are tried again with growing waits; see :mod:`featdiff.files.retries`.
"""

from __future__ import annotations

import io
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from ..exceptions import UnreadableImage, UsageError
from .atomic import write_atomically
from .retries import retried

_Result = TypeVar("_Result")

# A scheme has two letters or more, so that C:\ is none; before it there may be others of a chain: zip://a.png::s3://...
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+(://[^:]*)?::)*[A-Za-z][A-Za-z0-9+.-]+://")
_SECONDS = "FEATDIFF_TIMEOUT"
_CONNECT = 10.0
_ANSWER = 30.0
# A server that gives a little now and then must end as well.
_WHOLE = 900.0
# What is read at a time from a server that does not say how much will come, and of an archive.
_AT_ONCE = 1 << 16
_AHEAD = 1 << 20
# Stores that show an object only when all of it is there; elsewhere a file gets its name when it is written.
_PUT_WHOLE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory", "oss"}
_LOCAL = {"file", "local"}


def is_url(name: str) -> bool:
    """Whether a name is a URL, or a chain of them as fsspec has it, and not the path of a file.

    Examples
    --------
    >>> from featdiff.files.remote import is_url
    >>> [is_url(name) for name in ("s3://b/a.jpg", "zip://*.jpg::s3://b/a.zip", "C:/a.jpg", "a.jpg")]
    [True, True, False, False]
    """
    return bool(_URL.match(name))


def timeout() -> float:
    """Seconds that a server may stay silent: ``$FEATDIFF_TIMEOUT``, or 30."""
    try:
        return max(0.1, float(os.environ.get(_SECONDS, _ANSWER)))
    except ValueError:
        return _ANSWER


def filesystem(url: str) -> tuple[Any, str]:
    """What fsspec opens for a URL, and the path of the URL in it; its requests are not tried again by itself.

    Raises
    ------
    UsageError
        The scheme is unknown, or its client is not installed.
    """
    return retried(url, lambda: _filesystem(url))


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    schemes = {part.partition("://")[0] for part in url.split("::")}
    options = {scheme: found for scheme in schemes if (found := _options(scheme))}
    system, path = url_to_fs(url, **options)
    if "s3" in schemes and hasattr(system, "retries"):
        system.retries = 1  # this file tries again, with one rule for all stores
    return system, path


def _options(scheme: str) -> dict[str, Any]:
    """Options of a client: listings are never old, and a silent server is not waited for."""
    seconds = timeout()
    if scheme in ("http", "https"):
        import aiohttp

        whole = max(_WHOLE, seconds)
        limits = aiohttp.ClientTimeout(total=whole, sock_connect=min(_CONNECT, seconds), sock_read=seconds)
        return {"client_kwargs": {"timeout": limits}}
    if scheme in ("s3", "s3a"):
        config = {"connect_timeout": min(_CONNECT, seconds), "read_timeout": seconds, "retries": {"max_attempts": 0}}
        # with more at once, s3fs asks for the size of each object before it reads it: twice the requests
        options: dict[str, Any] = {"use_listings_cache": False, "config_kwargs": config, "max_concurrency": 1}
        # boto3 looks there, too; but fsspec keeps a client for each set of options, and must know of another store
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return options | ({"endpoint_url": endpoint} if endpoint else {})
    if scheme in ("gs", "gcs", "abfs", "abfss", "az"):
        return {"use_listings_cache": False}
    return {}


def ask(url: str, action: Callable[[Any, str], _Result]) -> _Result:
    """What a call of the client gives, tried again where the failure may pass.

    Parameters
    ----------
    url : str
    action : callable (file system, path)

    Raises
    ------
    UsageError, OSError
        As for :func:`featdiff.files.retries.retried`.
    """
    system, path = filesystem(url)
    return retried(url, lambda: action(system, path))


# ---- reading ----


def read_bytes(url: str, max_bytes: int | None = None) -> bytes:
    """All of a remote file.

    Parameters
    ----------
    url : str
    max_bytes : int, optional
        More is refused: before it is read where the size is known, else while reading.

    Returns
    -------
    bytes

    Raises
    ------
    UnreadableImage
        More than ``max_bytes``.
    UsageError
        The scheme is unknown, or its client is not installed.
    OSError
        It cannot be had; ``strerror`` says why on one line.
    """
    return ask(url, lambda system, path: _read(system, path, max_bytes))


def _read(system: Any, path: str, max_bytes: int | None) -> bytes:
    if _is_web(system):
        from fsspec.asyn import sync

        return sync(system.loop, _download, system, path, max_bytes)

    if max_bytes is not None:
        _check(system.info(path).get("size"), max_bytes)
    content = system.cat_file(path)
    _check(len(content), max_bytes)
    return content


async def _download(system: Any, url: str, max_bytes: int | None) -> bytes:
    """One answer of a web server, which may lie about its size, or have no end."""
    session = await system.set_session()
    parts: list[bytes] = []
    size = 0
    async with session.get(system.encode_url(url)) as answer:
        answer.raise_for_status()
        _check(answer.content_length, max_bytes)
        async for part in answer.content.iter_chunked(_AT_ONCE):
            size += len(part)
            _check(size, max_bytes)
            parts.append(part)
    return b"".join(parts)


def _check(size: int | None, max_bytes: int | None) -> None:
    if size is not None and max_bytes is not None and size > max_bytes:
        raise UnreadableImage(
            f"{size:,} bytes or more, over the limit of {max_bytes:,} (max_bytes)", argument="max_bytes"
        )


def _is_web(system: Any) -> bool:
    return "http" in _protocols(system)


def read_range(url: str, start: int, end: int) -> bytes:
    """The bytes of a remote file from ``start`` up to ``end``; errors are those of :func:`read_bytes`."""
    return ask(url, lambda system, path: _read_range(system, path, start, end)) if end > start else b""


def open_input(path_or_url: str | os.PathLike[str], ahead: int = _AHEAD) -> BinaryIO:
    """A file or a URL, opened for reading; it can seek, and of a remote file only what is asked for is read.

    Parameters
    ----------
    path_or_url : str or Path
    ahead : int, default 1,048,576
        Bytes of a remote file that are read at a time.

    Raises
    ------
    UsageError, OSError
        As for :func:`read_bytes`. Reading raises the same.
    """
    name = os.fspath(path_or_url)
    if not is_url(name):
        return open(name, "rb")
    system, path = filesystem(name)
    if not getattr(system, "async_impl", False):
        return retried(name, lambda: cast(BinaryIO, system.open(path, "rb")))
    return cast(BinaryIO, io.BufferedReader(_Ranges(name), ahead))


class _Ranges(io.RawIOBase):
    """A remote file of which stretches are read."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.name = url
        self._at = 0
        size = ask(url, lambda system, path: system.info(path).get("size"))
        if size is None:
            raise OSError(5, f"the server does not say its size: name it simplecache::{url}", url)
        self._size = int(size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(22, "a place before the beginning", self._url)
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._at + len(view), self._size)
        if end <= self._at:
            return 0
        content = read_range(self._url, self._at, end)
        view[: len(content)] = content
        self._at += len(content)
        return len(content)


def _read_range(system: Any, path: str, start: int, end: int) -> bytes:
    if _is_web(system):
        from fsspec.asyn import sync

        content = sync(system.loop, _download_range, system, path, start, end)
    else:
        content = system.cat_file(path, start=start, end=end)
    if len(content) != end - start:
        raise OSError(5, f"{len(content):,} of {end - start:,} bytes came")
    return content


async def _download_range(system: Any, url: str, start: int, end: int) -> bytes:
    session = await system.set_session()
    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    async with session.get(system.encode_url(url), headers=headers) as answer:
        answer.raise_for_status()
        if answer.status != 206:
            raise UsageError(f"{url}: the server gives no parts of a file: name it simplecache::{url}")
        return await answer.read()


# ---- what is there ----


def version_of(file: str) -> tuple[int, int, int, int]:
    """Numbers that change when a file does, and in a forked child, which must not share the parent's file position."""
    if is_url(file):  # asking a store each time would cost as much as reading
        return os.getpid(), 0, 0, 0
    status = os.stat(file)
    return os.getpid(), status.st_ino, status.st_mtime_ns, status.st_size


def exists(url: str) -> bool:
    """Whether there is an object, or a folder with something in it.

    Raises
    ------
    UsageError, OSError
        It cannot be found out.
    """
    try:
        ask(url, lambda system, path: system.info(path))
    except FileNotFoundError:
        return False
    return True


def list_names(url: str) -> set[str]:
    """Names of the files directly below a folder; empty if there is none.

    Raises
    ------
    UsageError, OSError
        It cannot be listed.
    """

    def names(system: Any, path: str) -> set[str]:
        system.invalidate_cache(path)
        below = path.rstrip("/") + "/"
        files = [entry["name"] for entry in system.ls(path, detail=True) if entry["type"] == "file"]
        return {name.removeprefix(below) for name in files if name.startswith(below)} - {""}

    try:
        return ask(url, names)
    except FileNotFoundError:
        return set()


# ---- writing ----


def write_whole(url: str, content: bytes) -> None:
    """Write a remote file whole or not at all; an older one is replaced.

    Raises
    ------
    UsageError
        The scheme is unknown, its client is not installed, or it can only be read.
    OSError
        It cannot be written; ``strerror`` says why on one line.
    """
    ask(url, lambda system, path: _write(system, path, content))


def check_writable(url: str) -> None:
    """Refuse a URL of a store that cannot be written to, as far as that is known before (``UsageError``)."""
    if _is_web(filesystem(url)[0]):
        raise UsageError(f"{url}: a web server can only be read: write to a store (s3://, gs://, az://) or a file")


def put_file(file: Path, url: str) -> None:
    """Copy a local file to a URL, whole or not at all; errors are those of :func:`write_whole`."""
    ask(url, lambda system, path: _write(system, path, file))


def _write(system: Any, path: str, content: bytes | Path) -> None:
    if _is_web(system):
        raise NotImplementedError
    protocols = _protocols(system)
    if protocols & _LOCAL:
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content.read_bytes() if isinstance(content, Path) else content)
    elif protocols & _PUT_WHOLE:
        _put(system, path, content)
    else:
        folder, _, name = path.rpartition("/")
        temporary = f"{folder}/.{name[:40]}.{uuid.uuid4().hex[:8]}.tmp"
        system.makedirs(folder, exist_ok=True)
        _put(system, temporary, content)
        system.mv(temporary, path)


def _put(system: Any, path: str, content: bytes | Path) -> None:
    if isinstance(content, Path):
        system.put_file(str(content), path)
    else:
        system.pipe_file(path, content)


def _protocols(system: Any) -> set[str]:
    protocol = system.protocol
    return {protocol} if isinstance(protocol, str) else set(protocol)


def remove(url: str) -> None:
    """Remove a remote file; one that is gone already is fine.

    Raises
    ------
    UsageError, OSError
        It cannot be removed.
    """
    try:
        ask(url, lambda system, path: system.rm_file(path))
    except FileNotFoundError:
        return
