"""Copy, move and link files to new names: never over another file, and whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import unicodedata
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from ..exceptions import FeatdiffError
from .atomic import meant_for, temporary_name

# What a file system answers that has no hard links, or does not permit them for files of other users.
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)


def copy_new(source: Path | bytes, target: Path) -> None:
    """Write a copy under a name that is free.

    Parameters
    ----------
    source : Path or bytes
        A file, whose times and permissions are kept, or the content.
    target : Path
        In a folder that exists.

    Raises
    ------
    FileExistsError
        Something has that name. It stays as it is.
    OSError
        The source cannot be read or the copy not be written. Nothing is left behind.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from featdiff.files.placing import copy_new
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     copy_new(b"one", Path(folder) / "a.txt")
    ...     try:
    ...         copy_new(b"two", Path(folder) / "a.txt")
    ...     except FileExistsError:
    ...         print((Path(folder) / "a.txt").read_bytes())
    b'one'
    """
    if os.path.lexists(target):  # better asked before the work; the name is taken without a race below
        raise _exists(target)

    temporary = temporary_name(target)
    try:
        with temporary.open("xb") as stream:
            if isinstance(source, bytes):
                stream.write(source)
            else:
                with source.open("rb") as content:
                    shutil.copyfileobj(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        if isinstance(source, Path):
            with contextlib.suppress(OSError):  # some file systems have no permissions
                shutil.copystat(source, temporary)
        _rename_new(temporary, target)
    finally:  # also after Ctrl-C
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def move_new(source: Path, target: Path) -> None:
    """Move a file to a name that is free, also to another disk.

    Killed in between, it leaves the file under both names; to move it again finishes that.

    Parameters
    ----------
    source : Path
        A regular file.
    target : Path
        In a folder that exists.

    Raises
    ------
    FileExistsError
        Another file has that name. Both stay as they are.
    OSError
        The file cannot be moved. It stays where it is, and nothing is left behind.
    """
    if not stat.S_ISREG(os.lstat(source).st_mode):
        raise FeatdiffError("not a regular file: only those are moved")
    if os.path.lexists(target):
        if not os.path.samestat(os.lstat(source), os.lstat(target)):
            raise _exists(target)
        source.unlink()
        return

    try:
        _rename_new(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy_new(source, target)
        _remove_source(source, target)


def link_new(source: Path, target: Path) -> None:
    """Make a symbolic link with a name that is free.

    Parameters
    ----------
    source : Path
        What it leads to; an absolute path.
    target : Path
        The link, in a folder that exists.

    Raises
    ------
    FileExistsError
        Something has that name. It stays as it is.
    OSError
        The link cannot be made.
    """
    os.symlink(source, target)


def numbered(target: Path) -> Iterator[Path]:
    """This name, then ``name-2.png``, ``name-3.png`` and so on.

    Parameters
    ----------
    target : Path

    Examples
    --------
    >>> from itertools import islice
    >>> [name.name for name in islice(numbered(Path("a.png")), 3)]
    ['a.png', 'a-2.png', 'a-3.png']
    """
    yield target
    for number in count(2):
        yield target.with_name(f"{target.stem}-{number}{target.suffix}")


def remove_leftovers(target: Path) -> None:
    """Remove temporary files that a killed :func:`copy_new` has left; nobody may be writing this copy now."""
    for file in target.parent.glob("*.tmp"):
        if meant_for(file) == meant_for(temporary_name(target)):
            file.unlink()


def remove_empty(folder: Path, above: Path) -> None:
    """Remove a folder and those above it, as long as they are empty and lie below ``above``."""
    while above in folder.parents:
        try:
            folder.rmdir()
        except FileNotFoundError:  # it was not made yet
            pass
        except OSError:
            return
        folder = folder.parent


def same_for_any_disk(file: Path) -> Path:
    """A name as a disk sees it that does not tell capital letters, or ways to write an accent, from each other."""
    return Path(unicodedata.normalize("NFC", str(file)).casefold())


def sha256_of(source: Path | bytes) -> str:
    """SHA-256 of a file or of a content, in hexadecimal digits."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _rename_new(source: Path, target: Path) -> None:
    """Rename unless the new name is in use; ``os.rename`` would replace what has it."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        _remove_source(source, target)
        return

    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # the name is ours from here on
    try:
        os.replace(source, target)
    except BaseException:
        target.unlink()
        raise


def _remove_source(source: Path, target: Path) -> None:
    """Remove the old name, or if that fails, the new one."""
    try:
        source.unlink()
    except OSError:
        target.unlink()
        raise


def _exists(target: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "the name is in use", str(target))
