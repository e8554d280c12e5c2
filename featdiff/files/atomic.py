"""Write files whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..exceptions import FeatdiffError

# Letters of a file's name that its temporary name repeats; whole names could become too long.
_REPEATED = 40
_TEMPORARY = re.compile(r"\.(.*)\.[0-9a-f]{8}\.tmp")


def write_atomically(file: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Parameters
    ----------
    file : Path
        An older file of this name is replaced; if anything fails, it stays whole.
    data : bytes
        All that the file shall hold.

    Raises
    ------
    OSError
        The disk is full or the place cannot be written. Nothing is left behind.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from featdiff.files.atomic import write_atomically
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder) / "a.txt", b"hello")
    ...     [file.name for file in Path(folder).iterdir()]
    ['a.txt']
    """
    write_together({file: data})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write several files: all are on disk in full, under temporary names, before the first takes its place.

    Parameters
    ----------
    contents : mapping of Path to bytes
        Files, in the order in which they take their places, and what each shall hold.

    Raises
    ------
    OSError
        As for :func:`write_atomically`.
    """
    temporary = {file: temporary_name(file) for file in contents}
    try:
        for file, data in contents.items():
            _write_through(temporary[file], data)
        for file in contents:
            temporary[file].replace(file)
    finally:  # also after Ctrl-C; nothing is left to remove if all went well
        for leftover in temporary.values():
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Fill a folder: a new one appears with all its files, in one that exists they replace others once all are written.

    Parameters
    ----------
    folder : Path
        Files in it that are not written stay.

    Yields
    ------
    Path
        Where to write the files, and folders of files. Errors of featdiff that name it name ``folder`` in its place.

    Raises
    ------
    FeatdiffError
        The disk is full or the place cannot be written; nothing is left behind, and older files stay whole.
    """
    existed = folder.exists()
    temporary = temporary_name(folder / "new" if existed else folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if existed:
            _move_into(temporary, folder)
        else:
            temporary.rename(folder)
    except FeatdiffError as error:
        raise type(error)(str(error).replace(str(temporary), str(folder)), argument=error.argument) from None
    except OSError as error:
        raise FeatdiffError(f"{folder} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into(source: Path, folder: Path) -> None:
    """Move all files below one folder to the same places below another."""
    for file in sorted(source.rglob("*")):
        target = folder / file.relative_to(source)
        if file.is_dir():
            target.mkdir(exist_ok=True)
        else:
            file.replace(target)


def temporary_name(file: Path) -> Path:
    """A name beside a file for what becomes it when it is whole."""
    return file.with_name(f".{file.name[:_REPEATED]}.{uuid.uuid4().hex[:8]}.tmp")


def meant_for(file: Path) -> str:
    """The name (its first 40 letters) of the file that this one was to become when its writer was killed; or empty."""
    match = _TEMPORARY.fullmatch(file.name)
    return match[1] if match else ""


def write_output(file: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that a user asked for: whole or not at all; a link is followed, a device is written directly.

    Parameters
    ----------
    file : str or Path
    data : bytes

    Raises
    ------
    FeatdiffError
        The disk is full or the place cannot be written; it names the file. An older file stays whole.
    """
    target = Path(os.path.realpath(file))
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)
        else:
            write_atomically(target, data)
    except OSError as error:
        raise FeatdiffError(f"{os.fspath(file)} cannot be written: {error.strerror or error}") from None


def _write_through(file: Path, data: bytes) -> None:
    """Write and wait until the data is on the disk."""
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
