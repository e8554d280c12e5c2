"""A file that grows for hours: written under another name, put in its place when it is whole, resumed after a kill."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

from ..exceptions import FeatdiffError, UsageError

#: What is not whole yet is called like the file, with this behind it; its record has ``.json`` behind that.
SUFFIX = ".partial"
_VERSION = 1
_BLOCK = 1 << 20
_READ_WRITE = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)


class PartialFile:
    """A file of which parts are written one after the other, ``NAME.partial`` until :meth:`finish`.

    Beside it lies a record, ``NAME.partial.json``: what the parts were made with, and a line for each part with the
    length and a SHA-256 of all data up to it. A process can be killed at any moment: what it wrote before is found
    whole, and what it began is cut off. An older file ``NAME`` stays as it is until the new one takes its place. One
    process at a time can write.

    Parameters
    ----------
    file : Path
        The file to be; a link is followed.
    made_with : mapping of str to JSON values
        What decides the content, by a name for people. Parts that were made with something else are not continued.
    resume : bool, default False
        Continue after the last whole part that an earlier process left, if there is one.

    Attributes
    ----------
    partial : Path
        Where the parts are.
    facts : dict
        What :meth:`append` was told with the last whole part; empty before the first.

    Raises
    ------
    UsageError
        Another process writes the same file, an earlier one left parts and ``resume`` is False, or those parts were
        made with something else.
    FeatdiffError
        The place cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from featdiff.files.partial import PartialFile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "rows.csv"
    ...     with PartialFile(file, {"model": "a"}) as parts:  # ends too early
    ...         parts.append(b"1", {"rows": 1})
    ...     with PartialFile(file, {"model": "a"}, resume=True) as parts:
    ...         rows = parts.facts["rows"]
    ...         parts.append(b"2", {"rows": 2})
    ...         parts.finish()
    ...     rows, file.read_bytes(), [path.name for path in Path(folder).iterdir()]
    (1, b'12', ['rows.csv'])
    """

    def __init__(self, file: Path, made_with: Mapping[str, Any], resume: bool = False) -> None:
        self._file = Path(os.path.realpath(file))
        self.partial = self._file.with_name(self._file.name + SUFFIX)
        self._record = self.partial.with_name(self.partial.name + ".json")
        self.facts: dict[str, Any] = {}
        self._size = 0  # of all whole parts
        self._digest = hashlib.sha256()

        self._begun = False
        self._data = -1
        self._lines = -1

        with self._named_errors():
            if self._file.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a directory")
            if self._file.exists() and not os.access(self._file, os.W_OK):
                raise PermissionError(errno.EACCES, "it is read-only")
            self._lines = _open_locked(self._record, self._file)
            try:
                self._data = os.open(self.partial, _READ_WRITE, 0o666)
                self._begin(dict(made_with), resume)
            except BaseException:
                self._give_up()
                raise

    # ---- begin ----

    def _begin(self, made_with: dict[str, Any], resume: bool) -> None:
        if self._file.exists():
            with contextlib.suppress(OSError):  # what was private stays private, where the disk knows of that
                os.chmod(self.partial, stat.S_IMODE(self._file.stat().st_mode))
        header, parts = self._read_record()
        if header is None and os.fstat(self._data).st_size:
            raise UsageError(f"{self.partial} was not written by featdiff, or its record is lost: move it away")

        end = self._find_last_part(parts)
        if self.facts and not resume:
            raise UsageError(
                f"{self.partial} holds what an interrupted run has done: resume it, or delete that file and its .json "
                "to begin again"
            )
        if self.facts and header is not None:
            _check_same(header, made_with, self.partial)

        os.ftruncate(self._data, self._size)
        os.lseek(self._data, self._size, os.SEEK_SET)
        os.ftruncate(self._lines, end)
        os.lseek(self._lines, end, os.SEEK_SET)
        if not self.facts:
            os.ftruncate(self._lines, 0)
            os.lseek(self._lines, 0, os.SEEK_SET)
            _write(self._lines, _line({"partial file": _VERSION, "made with": made_with}))
        self._begun = True

    def _read_record(self) -> tuple[dict[str, Any] | None, Iterator[tuple[int, dict[str, Any]]]]:
        """What the parts were made with, None without a record; then the end of each line and what it holds."""
        lines = _whole_lines(self._lines)
        _, first = next(lines, (0, {}))
        header = first.get("made with") if first.get("partial file") == _VERSION else None
        return (header, lines) if isinstance(header, dict) else (None, iter(()))

    def _find_last_part(self, parts: Iterator[tuple[int, dict[str, Any]]]) -> int:
        """Read the data as far as the record says what it is; returns where the last good line ends."""
        good_end = 0
        os.lseek(self._data, 0, os.SEEK_SET)
        for end, part in parts:
            size = part.get("size")
            facts = part.get("facts")
            if not isinstance(size, int) or not isinstance(facts, dict) or size < self._size:
                break
            digest = self._digest.copy()
            if not _hash_next(self._data, size - self._size, digest) or _seal(digest, facts) != part.get("sha256"):
                break
            self._digest = digest
            self._size = size
            self.facts = facts
            good_end = end
        return good_end

    # ---- write ----

    def append(self, data: bytes, facts: Mapping[str, Any]) -> None:
        """Write one part.

        Parameters
        ----------
        data : bytes
        facts : mapping of str to JSON values
            Kept as :attr:`facts`, also for who resumes.

        Raises
        ------
        FeatdiffError
            The disk is full or the place cannot be written; earlier parts are kept.
        """
        with self._named_errors():
            _write(self._data, data)
            digest = self._digest.copy()
            digest.update(data)
            size = self._size + len(data)
            _write(self._lines, _line({"size": size, "facts": dict(facts), "sha256": _seal(digest, facts)}))

        self._digest = digest
        self._size = size
        self.facts = dict(facts)

    def finish(self, convert: Callable[[IO[bytes], IO[bytes]], None] | None = None) -> None:
        """Put the file in its place.

        Parameters
        ----------
        convert : callable (source, target), optional
            Writes the file from the parts, where the two have different formats.

        Raises
        ------
        FeatdiffError
            The disk is full or the place cannot be written; all parts are kept.
        """
        with self._named_errors():
            os.ftruncate(self._data, self._size)
            os.fsync(self._data)
            data, self._data = self._data, -1
            os.close(data)  # Windows does not rename open files
            if convert is None:
                self.partial.replace(self._file)
            else:
                self._convert(convert)
                self.partial.unlink()

            if os.name == "nt":  # nor removes them; elsewhere the lock is held until the record is gone
                lines, self._lines = self._lines, -1
                os.close(lines)
            self._record.unlink()

    def _convert(self, convert: Callable[[IO[bytes], IO[bytes]], None]) -> None:
        converted = self.partial.with_name(self.partial.name + ".tmp")  # the lock covers it, too
        try:
            with self.partial.open("rb") as source, converted.open("wb") as target:
                with contextlib.suppress(OSError):
                    os.chmod(converted, stat.S_IMODE(self.partial.stat().st_mode))
                convert(source, target)
                target.flush()
                os.fsync(target.fileno())
            converted.replace(self._file)
        finally:  # also after Ctrl-C
            converted.unlink(missing_ok=True)

    def open(self) -> IO[bytes]:
        """What is in the parts, to be read from the beginning."""
        return self.partial.open("rb")

    # ---- end ----

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Cut off what was begun; without a whole part, nothing is left behind."""
        self._give_up()

    def _give_up(self) -> None:
        with contextlib.suppress(OSError):
            self._cut()
        for descriptor in (self._data, self._lines):  # the lock goes last
            if descriptor >= 0:
                os.close(descriptor)
        self._data = -1
        self._lines = -1

    def _cut(self) -> None:
        if self._data < 0 or not _is_at(self._data, self.partial):  # it is the finished file
            return
        if self._begun:
            os.ftruncate(self._data, self._size)
        if not self.facts and not os.fstat(self._data).st_size:
            self.partial.unlink()
        if not self.partial.exists() or not os.fstat(self._lines).st_size:
            self._record.unlink()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Errors of the system as one line that names the file."""
        try:
            yield
        except OSError as error:
            raise FeatdiffError(f"{self._file} cannot be written: {error.strerror or error}") from error


def _open_locked(record: Path, file: Path) -> int:
    """The descriptor of a record that no other process writes."""
    while True:
        descriptor = os.open(record, _READ_WRITE, 0o666)
        try:
            if not _lock(descriptor):
                raise UsageError(f"another process is writing {file}: wait for it, or choose another file")
            if _is_at(descriptor, record):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the other process finished in between, and this was its record


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether an open file still has this name."""
    return file.exists() and os.path.samestat(os.fstat(descriptor), file.stat())


def _lock(descriptor: int) -> bool:
    """Whether this process may write; the system gives the lock back when a process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        return True
    return True


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], partial: Path) -> None:
    now = json.loads(json.dumps(now))  # as it was read: with lists for tuples
    for name in (*before, *now):
        if before.get(name) != now.get(name):
            raise UsageError(
                f"{partial} was made with another {name} ({_shown(before.get(name))}, now {_shown(now.get(name))}): "
                "give the same command as then, or delete that file and its .json to begin again"
            )


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _whole_lines(descriptor: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Where each line ends and what it holds, up to one that is damaged or cut short."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    end = 0
    with os.fdopen(os.dup(descriptor), "rb") as stream:
        for line in stream:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not line.endswith(b"\n") or not isinstance(value, dict):
                return
            end += len(line)
            yield end, value


def _hash_next(descriptor: int, length: int, digest: Any) -> bool:
    """Add the next bytes of a file to a digest; False if there are fewer."""
    while length:
        block = os.read(descriptor, min(length, _BLOCK))
        if not block:
            return False
        digest.update(block)
        length -= len(block)
    return True


def _seal(digest: Any, facts: Mapping[str, Any]) -> str:
    """SHA-256 of all data so far (by its digest) and what was told with the last part."""
    return hashlib.sha256(digest.digest() + json.dumps(dict(facts)).encode()).hexdigest()


def _write(descriptor: int, data: bytes) -> None:
    """Write all of it; the system may take a piece at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
