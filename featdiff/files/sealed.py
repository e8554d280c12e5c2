"""Files of the cache that end in a checksum of what they hold, so that a damaged one is found when it is read.

The checksum covers the name as well: no file can take the place of another.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from pathlib import Path

from ..exceptions import DamagedCache
from .atomic import write_atomically

#: Length of a checksum.
CHECKSUM_BYTES = hashlib.sha256().digest_size


def checksum(data: bytes, name: str = "") -> bytes:
    """SHA-256 of a name and of data, 32 bytes."""
    hasher = hashlib.sha256(name.encode())
    hasher.update(data)
    return hasher.digest()


def write_sealed(file: Path, data: bytes) -> None:
    """Write data and its checksum, whole or not at all.

    Parameters
    ----------
    file : Path
    data : bytes

    Raises
    ------
    OSError
        As for :func:`featdiff.files.atomic.write_atomically`.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_sealed(Path(folder) / "a", b"hello")
    ...     read_sealed(Path(folder) / "a")
    b'hello'
    """
    write_atomically(file, data + checksum(data, file.name))


def read_sealed(file: Path) -> bytes:
    """What :func:`write_sealed` wrote.

    Raises
    ------
    ValueError
        The data is not what was written.
    OSError
        The file cannot be read.
    """
    content = file.read_bytes()
    data = content[:-CHECKSUM_BYTES]
    if checksum(data, file.name) != content[-CHECKSUM_BYTES:]:
        raise ValueError("the checksum does not fit the content")
    return data


def drop_damaged(damaged: Path, files: list[Path], then: str) -> None:
    """Remove a damaged file of the cache and what belongs to it, and warn; so it is said once.

    Parameters
    ----------
    damaged : Path
    files : list of Path
        Those that are removed, in this order.
    then : str
        What happens next, for the message.

    Warns
    -----
    DamagedCache
    """
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    warnings.warn(DamagedCache(f"{damaged} was damaged and is removed: {then}"), stacklevel=3)
