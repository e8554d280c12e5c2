"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

from ..exceptions import FeatdiffError


def write_atomically(file: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises
    ------
    FeatdiffError
        The disk is full or the place cannot be written.
    """
    try:
        write_whole(file, data)
    except OSError as error:
        raise _full(file.parent, error) from None


def _full(folder: Path, error: OSError) -> FeatdiffError:
    return FeatdiffError(
        f"the feature cache {folder} cannot be written: {error.strerror}. Free space or choose another with --cache; "
        "what was computed so far is kept"
    )


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def write_whole(file: Path, data: bytes) -> None:
    """Write a file whole or not at all (``OSError``)."""
    temporary = file.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        _write(temporary, data)
        temporary.replace(file)
    finally:  # also after Ctrl-C; there is nothing left to remove if all went well
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
