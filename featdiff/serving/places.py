"""Folders and files that may be local or behind a URL, as the results of many processes need them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..exceptions import FeatdiffError, first_line
from ..files import remote
from ..files.atomic import temporary_name, write_atomically


class Folder:
    """A folder of files that are written whole and never changed; made when the first is written.

    Parameters
    ----------
    name : str
        A path or a URL.
    """

    def __init__(self, name: str) -> None:
        self.name = name.rstrip("/") or name
        self._local = None if remote.is_url(name) else Path(name)

    def place(self, file: str) -> str:
        """Path or URL of a file."""
        return f"{self.name}/{file}"

    def names(self) -> set[str]:
        """Names of all files that are there, but for hidden ones; none if there is no such folder."""
        with self._reading(self.name):
            if self._local is None:
                names = remote.list_names(self.name)
            elif not self._local.exists():
                names = set()
            else:
                names = {entry.name for entry in os.scandir(self._local) if entry.is_file()}
        return {name for name in names if not name.startswith(".")}

    def has(self, file: str) -> bool:
        """Whether a file is there."""
        with self._reading(self.place(file)):
            return (self._local / file).exists() if self._local else remote.exists(self.place(file))

    def read(self, file: str) -> bytes | None:
        """The content of a file; None if there is no such file."""
        try:
            with self._reading(self.place(file)):
                return (self._local / file).read_bytes() if self._local else remote.read_bytes(self.place(file))
        except FileNotFoundError:
            return None

    def write(self, file: str, content: bytes) -> None:
        """Write a file whole or not at all (``FeatdiffError``: the disk is full, or it may not be written)."""
        with _writing(self.place(file)):
            if self._local is None:
                remote.write_whole(self.place(file), content)
            else:
                self._local.mkdir(parents=True, exist_ok=True)
                write_atomically(self._local / file, content)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise FeatdiffError(f"{name} cannot be read: {error.strerror or first_line(error)}") from None


@contextmanager
def placing(name: str) -> Iterator[IO[bytes]]:
    """A file that appears under its name when it is whole, however large it is.

    Parameters
    ----------
    name : str
        A path or a URL; what goes to a URL is a temporary file until then.

    Yields
    ------
    binary stream

    Raises
    ------
    FeatdiffError
        The disk is full or the place cannot be written; nothing is left behind, and an older file stays whole.
    """
    is_url = remote.is_url(name)
    if is_url:
        descriptor, path = tempfile.mkstemp(prefix="featdiff-")
        os.close(descriptor)
        temporary, target = Path(path), Path(path)
    else:
        target = Path(os.path.realpath(name))
        temporary = temporary_name(target)
    with _writing(name):
        try:
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            if is_url:
                remote.put_file(temporary, name)
            else:
                temporary.replace(target)
        finally:  # also after Ctrl-C
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def _writing(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FeatdiffError(f"{name} cannot be written: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    """What the system says; pyarrow says it in a longer message of its own."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or first_line(error)
