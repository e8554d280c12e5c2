"""Where a watch finds images: a folder that is looked at now and then, a manifest, or paths on standard input."""

from __future__ import annotations

import os
import queue
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import IO, Protocol

from ..data.image_refs import FileRef, ImageRef, MissingRef, has_image_suffix, printable
from ..data.references import iter_images, ref_of
from ..exceptions import FeatdiffError, UsageError, one_line
from .manifest import Manifest
from .watch_state import Key
from .watch_waiting import AT_ONCE, Waiting

# Paths on standard input that are taken at once.
_MOST_LINES = 1_000

IsDone = Callable[[Key], bool]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Arrival:
    """An image to be scored, and what tells it from others."""

    key: Key
    ref: ImageRef


class Source(Protocol):
    """Where images come from.

    ``pause``: seconds between two looks; ``over``: no more images will come; ``troubled``: the latest look could not
    read all that there may be.
    """

    pause: float
    over: bool

    @property
    def troubled(self) -> bool: ...

    def look(self, is_done: IsDone) -> int:
        """Find images that have no row; how many cannot be taken before another look, 0 for none."""

    def take(self) -> list[Arrival]:
        """Images that are ready, each once; empty if there are none."""

    def keeps(self, arrival: Arrival, readable: bool) -> bool:
        """Whether the row of an image counts now that it was read, or could not be read."""


def open_source(name: str, tell: Tell, pause: float, known: bool = False, stdin: IO[bytes] | None = None) -> Source:
    """The source of a name.

    Parameters
    ----------
    name : str
        A folder, a manifest, or ``-``.
    tell : callable
        Takes a line on folders that cannot be read.
    pause : float
        Seconds between two looks, in which a file must not change.
    known : bool, default False
        It was there before: a folder that is not there is waited for.
    stdin : binary stream, default ``sys.stdin.buffer``

    Raises
    ------
    UsageError
        There is no such folder, or the file is no manifest.
    """
    if name == "-":
        return Paths(stdin or _standard_input())
    if os.path.isdir(name) or (known and not os.path.exists(name)):
        return Folder(name, tell, pause)
    if os.path.exists(name):
        return Listed(name, tell, pause)
    raise UsageError(f"no folder or manifest {name}", argument="source")


class _Polled:
    """What is looked at now and then."""

    over = False

    def __init__(self, name: str, tell: Tell, pause: float) -> None:
        self.name = name
        self.pause = pause
        self._tell = tell
        self._waiting = Waiting(pause)
        self._troubles: dict[str, str] = {}

    def keeps(self, arrival: Arrival, readable: bool) -> bool:
        """Without what was changed or removed meanwhile: it comes again, or is no longer wanted."""
        if not isinstance(arrival.ref, FileRef):
            return True
        try:
            now = _key(arrival.key.name, os.stat(arrival.ref.file))
        except OSError:
            return readable
        return now == arrival.key

    @property
    def troubled(self) -> bool:
        return bool(self._troubles)

    def _trouble(self, place: str, reason: str = "") -> None:
        """Tell once that a place cannot be read, and once that it can be again."""
        before = self._troubles.pop(place, "")
        if reason:
            self._troubles[place] = reason
        if bool(reason) != bool(before):
            self._tell(f"{place}: {reason}; waiting for it" if reason else f"{place} is there again")


class Folder(_Polled):
    """Images below a folder; links to folders are followed, hidden names are not taken."""

    def look(self, is_done: IsDone) -> int:
        return self._waiting.look(self._found(is_done))

    def take(self) -> list[Arrival]:
        return [Arrival(key, self._ref(os.fsdecode(key.name))) for key in self._waiting.take()]

    def _ref(self, name: str) -> FileRef:
        path = os.path.join(self.name, name)
        return FileRef(printable(path), path)

    def _found(self, is_done: IsDone) -> Iterator[tuple[Key, bool]]:
        for name, status in self._files():
            key = _key(os.fsencode(name), status)
            if not is_done(key):
                yield key, True

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Names of images, as seen from the folder."""
        seen: set[tuple[int, int]] = set()
        folders = [""]
        while folders:
            folder = folders.pop()
            path = os.path.join(self.name, folder) if folder else self.name
            try:
                status = os.stat(path)
                if (status.st_dev, status.st_ino) in seen:  # a loop of links
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(path) as entries:
                    self._trouble(path)
                    for entry in entries:
                        name = os.path.join(folder, entry.name)
                        if entry.name.startswith("."):
                            continue
                        if entry.is_dir():
                            folders.append(name)
                        elif has_image_suffix(entry.name):
                            yield from _status_of(entry, name)
            except OSError as error:
                if folder and isinstance(error, FileNotFoundError):  # one that was removed is no news
                    self._troubles.pop(path, None)
                else:
                    self._trouble(path, error.strerror or str(error))


class Listed(_Polled):
    """Images of a manifest; files that are not there yet are waited for, and so is a longer manifest."""

    def __init__(self, name: str, tell: Tell, pause: float) -> None:
        super().__init__(name, tell, pause)
        self._version: tuple[int, int] | None = None
        self._left = True
        self._open()

    def look(self, is_done: IsDone) -> int:
        try:
            self._open()
            self._trouble(self.name)
        except (OSError, FeatdiffError) as error:
            self._trouble(self.name, getattr(error, "strerror", None) or one_line(error))
        if self._left:
            self._left = False
            self._waiting.look(self._found(is_done))
        return int(self._left)

    def take(self) -> list[Arrival]:
        return [Arrival(key, _listed(key)) for key in self._waiting.take()]

    def _open(self) -> None:
        """Read the manifest anew if it has changed."""
        status = os.stat(self.name)
        version = status.st_size, status.st_mtime_ns
        if version != self._version:
            self._manifest = Manifest(self.name)
            self._version = version
            self._left = True

    def _found(self, is_done: IsDone) -> Iterator[tuple[Key, bool]]:
        for number in range(self._manifest.blocks(AT_ONCE)):
            block = self._manifest.block(number, AT_ONCE)
            for uri, size in zip(block.uris, block.sizes.tolist(), strict=True):
                key = Key(os.fsencode(uri), size, 0)
                ref = _listed(key)
                try:
                    key = _key(key.name, os.stat(ref.file)) if isinstance(ref, FileRef) else key
                except OSError:
                    self._left = True
                    continue
                if not is_done(key):
                    self._left = True
                    yield key, isinstance(ref, FileRef)


class Paths:
    """Images whose paths come on a stream, one a line, as they come; nothing is waited for."""

    pause = 0.0
    troubled = False

    def __init__(self, stream: IO[bytes]) -> None:
        self.over = False
        self._lines: queue.Queue[bytes | None] = queue.Queue(_MOST_LINES)
        self._found: Iterator[Arrival] = iter(())
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            for name in line.splitlines():
                if name.strip():
                    self._lines.put(name)
        self._lines.put(None)

    def look(self, is_done: IsDone) -> int:
        """Wait for a path, and take what has come with it."""
        names: list[str] = []
        while not self.over and (not names or (len(names) < _MOST_LINES and not self._lines.empty())):
            line = self._lines.get()
            if line is None:
                self.over = True
            else:
                names.append(os.fsdecode(line))
        arrivals = (Arrival(self._key(ref), ref) for ref in chain.from_iterable(map(_images, names)))
        self._found = (arrival for arrival in arrivals if not is_done(arrival.key))
        return 0

    def take(self) -> list[Arrival]:
        arrivals = islice(self._found, AT_ONCE)
        return list({arrival.key.name: arrival for arrival in arrivals}.values())  # one may be named twice

    def _key(self, ref: ImageRef) -> Key:
        if isinstance(ref, FileRef):
            try:
                return _key(os.fsencode(ref.file), os.stat(ref.file))
            except OSError:
                return Key(os.fsencode(ref.file), -1, 0)
        return Key(ref.path.encode("utf-8", "surrogateescape"), -1, 0)

    def keeps(self, arrival: Arrival, readable: bool) -> bool:
        """All of them: they were named."""
        return True


def _key(name: bytes, status: os.stat_result) -> Key:
    return Key(name, status.st_size, status.st_mtime_ns)


def _status_of(entry: os.DirEntry[str], name: str) -> Iterator[tuple[str, os.stat_result]]:
    """Name and status of a file; nothing for what is none, or was removed."""
    try:
        status = entry.stat()
    except OSError:
        return
    if stat.S_ISREG(status.st_mode):
        yield name, status


def _standard_input() -> IO[bytes]:
    """A stream of its own: Python could not end while a thread waits in the one that it closes."""
    try:
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    except (OSError, ValueError):  # no file behind it
        return sys.stdin.buffer


def _images(name: str) -> Iterator[ImageRef]:
    """The images behind a path; one that says so, if they cannot be listed."""
    try:
        yield from iter_images("./-" if name == "-" else name)
    except FeatdiffError as error:
        yield MissingRef(printable(name), one_line(error))


def _listed(key: Key) -> ImageRef:
    """The image of a row of a manifest."""
    return ref_of(os.fsdecode(key.name), None if key.size < 0 else key.size)
