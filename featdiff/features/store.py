"""Features on disk: the backbone runs once per image content; vectors are memory-mapped afterwards.

A store is a folder of shards: a NumPy file of vectors, and a file of the digests of their images and of checksums of
both. Shards are never changed, so several runs may write at once, an interrupted run resumes, and a second run finds
its vectors by content. The checksum of the vectors is compared when a run first asks for one of them; a damaged shard
is removed, and its images are computed again.
"""

from __future__ import annotations

import contextlib
import errno
import io
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..exceptions import FeatdiffError
from ..files.atomic import write_atomically
from ..files.cache import cache_errors
from ..files.sealed import CHECKSUM_BYTES, checksum, drop_damaged, read_sealed, write_sealed
from .digests import DIGEST_BYTES, DigestIndex

Content = TypeVar("Content")

_SHARD_BYTES = 4 << 20
_MAPPED_BYTES = 1 << 19
_FEW_SHARDS = 100  # more may not fit under the usual limit of open files
_VECTORS, _DIGESTS = ".vectors.npy", ".digests"
# Errors of a dying disk, and of NumPy on a damaged file.
_DAMAGED = (errno.EIO, errno.EINVAL, None)
# Other files in the folder are not ours.
_OUR_NAMES = "[0-9a-f]" * 32 + _DIGESTS


class FeatureStore:
    """Vectors of one width, found by the digest of the image they came from.

    Parameters
    ----------
    folder : Path
        One folder per extractor (see :meth:`Extractor.key`); made when missing.
    width : int
        Length of a vector.
    dtype : NumPy type
        Of its numbers.
    """

    def __init__(self, folder: Path, width: int, dtype: type[np.number] = np.float32) -> None:
        self.folder, self.width, self.dtype = Path(folder), width, np.dtype(dtype)
        self._capacity = max(1, _SHARD_BYTES // (self.dtype.itemsize * width))
        self._pending: list[tuple[bytes, np.ndarray]] = []
        self._shards: list[np.ndarray] = []  # memory maps (n, width)
        self._unverified: dict[int, _Unverified] = {}  # shards that this run has not used yet
        self._index = DigestIndex()
        self._lock = threading.Lock()  # decoding threads ask for digests
        with cache_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        opened = map(self._open, sorted(self.folder.glob(_OUR_NAMES)))
        self._index.add_shards(shard for shard in opened if shard is not None)

    def __contains__(self, digest: object) -> bool:
        if not isinstance(digest, bytes):
            return False
        place = self._index.find(digest)
        while place is not None and place[0] in self._unverified:
            self._verify(place[0])
            place = self._index.find(digest)  # if that shard was damaged, another may hold it as well
        return place is not None

    def __len__(self) -> int:
        return len(self._index)

    def add(self, digest: bytes, vector: np.ndarray) -> None:
        """Keep one vector (width,); written to disk when a shard is full, or by :meth:`flush`."""
        if digest in self:
            return
        self._index.add(digest, (len(self._shards), len(self._pending)))
        self._pending.append((digest, np.array(vector, dtype=self.dtype)))  # a copy: callers reuse their buffers
        if len(self._pending) == self._capacity:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as a shard of its own."""
        if not self._pending:
            return
        stream = io.BytesIO()
        np.save(stream, np.stack([vector for _, vector in self._pending]), allow_pickle=False)
        vectors = stream.getvalue()
        digests = b"".join(digest for digest, _ in self._pending)

        file = self.folder / f"{uuid.uuid4().hex}{_DIGESTS}"
        try:  # the digests are written last: a shard counts only when both files are whole
            with cache_errors(self.folder):
                write_atomically(_vectors_of(file), vectors)
                write_sealed(file, digests + checksum(vectors))
        except BaseException:  # Ctrl-C, too
            _remove(_vectors_of(file))
            raise
        self._pending.clear()
        self._keep(_read(_vectors_of(file)))

    def table(self, digests: Sequence[bytes]) -> FeatureTable:
        """The vectors of ``digests``, in that order, as a table on disk.

        Raises
        ------
        FeatdiffError
            Some are not in the store; of those that ``in`` found a moment ago, none is missing.
        """
        self.flush()
        missing = sum(digest not in self for digest in digests)
        if missing:
            raise FeatdiffError(
                f"features of {missing:,} of {len(digests):,} images are not in the cache {self.folder} any more: run "
                "the same again, and they are computed anew",
                argument="cache",
            )
        return FeatureTable(self._shards, self._index.find_all(digests), self.width, self.dtype)

    def _open(self, file: Path) -> tuple[int, bytes] | None:
        """Number and digests of a shard; the checksum of its vectors is compared when they are first asked for."""
        content = _read_or_drop(read_sealed, file)
        vectors = _read_or_drop(_read, _vectors_of(file)) if content is not None else None
        if content is None or vectors is None:
            return None

        digests, expected = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
        shard = _Unverified(_vectors_of(file), expected)
        if vectors.dtype != self.dtype or vectors.shape != (len(digests) / DIGEST_BYTES, self.width):
            _read_or_drop(shard.check, shard.file)  # it is damaged, or holds vectors of another width
            return None

        number = len(self._shards)
        self._unverified[number] = shard
        self._keep(vectors)
        return number, digests

    def _verify(self, number: int) -> None:
        """Compare the checksum of a shard; a damaged one is removed and forgotten."""
        with self._lock:
            shard = self._unverified.get(number)
            if shard is None:  # another thread has done it
                return
            if _read_or_drop(shard.check, shard.file) is None:
                self._index.forget(number)
            del self._unverified[number]  # last: until now, others wait

    def _keep(self, shard: np.ndarray) -> None:
        self._shards.append(shard)
        if len(self._shards) == _FEW_SHARDS:
            _allow_more_files()


@dataclass(frozen=True)
class _Unverified:
    """A shard whose vectors were not compared with their checksum yet.

    Parameters
    ----------
    file : Path
        Of the vectors.
    expected : bytes
        Checksum of the file.
    """

    file: Path
    expected: bytes

    def check(self, file: Path) -> bool:
        """True; ``ValueError`` for a damaged file."""
        if checksum(file.read_bytes()) != self.expected:
            raise ValueError("the checksum does not fit the content")
        return True


def _vectors_of(file: Path) -> Path:
    """The vectors that belong to a file of digests."""
    return file.with_name(file.name.removesuffix(_DIGESTS) + _VECTORS)


def _drop(file: Path) -> None:
    """Remove the shard of which this file is damaged."""
    digests = file.with_name(file.name.removesuffix(_VECTORS).removesuffix(_DIGESTS) + _DIGESTS)
    drop_damaged(file, [digests, _vectors_of(digests)], "what it held is computed again")


def _read_or_drop(read: Callable[[Path], Content], file: Path) -> Content | None:
    """The content of one file of a shard; None where it is damaged, or cannot be read."""
    try:
        return read(file)
    except (FeatdiffError, MemoryError):
        raise
    except OSError as error:
        if error.errno not in _DAMAGED:  # another run has just removed it, or it may not be read
            return None
    except Exception:  # NumPy raises nearly anything on a damaged file
        pass
    _drop(file)
    return None


def _read(file: Path) -> np.ndarray:
    """An array on disk: small ones are read, large ones mapped, which keeps a file open for each.

    Raises
    ------
    FeatdiffError
        More files than the system lets a process open.
    """
    try:
        if file.stat().st_size >= _MAPPED_BYTES:
            return np.lib.format.open_memmap(file, mode="r")
        array: np.ndarray = np.lib.format.read_array(io.BytesIO(file.read_bytes()), allow_pickle=False)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise FeatdiffError(f"{file}: {error.strerror}: allow more (ulimit -n), and start again") from None
    return array


def _allow_more_files() -> None:
    """Raise this process's limit of open files to what the system grants (no such limit on Windows)."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Features:
    """Rows of features (N, D) that need not be in memory.

    A subclass says how many there are (``len``) and reads some of them (``features[indices]``).
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, indices: np.ndarray | slice) -> Tensor:
        """Some rows (n, D), on the CPU; ``features[:]`` reads all."""
        raise NotImplementedError

    def chunks(self, size: int = 1024) -> Iterator[Tensor]:
        """All rows in order, (<= size, D) at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def select(self, indices: np.ndarray) -> Features:
        """These rows alone, in this order; nothing is read yet."""
        return _Selected(self, indices)


class Rows(Features):
    """Features in memory.

    Parameters
    ----------
    rows : Tensor of shape (N, D)
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: np.ndarray | slice) -> Tensor:
        return self._rows[indices]


class Joined(Features):
    """Rows of several sets of features, end to end.

    Parameters
    ----------
    parts : sequence of Features
        Of one width; empty ones count for nothing.
    """

    def __init__(self, parts: Sequence[Features]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def __getitem__(self, indices: np.ndarray | slice) -> Tensor:
        rows = np.arange(len(self))[indices]
        places = np.searchsorted(self._ends, rows, side="right")
        found = [part[rows[places == i] - (self._ends[i] - len(part))] for i, part in enumerate(self._parts)]
        order = np.argsort(np.argsort(places, kind="stable"), kind="stable")
        return torch.cat(found)[torch.from_numpy(order)]


class _Selected(Features):
    def __init__(self, features: Features, indices: np.ndarray) -> None:
        self._features = features
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, indices: np.ndarray | slice) -> Tensor:
        return self._features[self._indices[indices]]


@dataclass
class FeatureTable(Features):
    """Features that stay on disk.

    Parameters
    ----------
    shards : list of ndarrays of shape (n, width)
        Memory maps.
    where : ndarray of shape (N, 2)
        Shard and row of each of the N vectors.
    width : int
    dtype : NumPy type
    """

    shards: list[np.ndarray]
    where: np.ndarray
    width: int
    dtype: np.dtype[np.number] = np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, indices: np.ndarray | slice) -> Tensor:
        """Some rows (n, D), on the CPU; ``table[:]`` reads all."""
        where = self.where[indices]
        out = np.empty((len(where), self.width), dtype=self.dtype)
        for shard in np.unique(where[:, 0]):
            here = where[:, 0] == shard
            out[here] = self.shards[shard][where[here, 1]]
        return torch.from_numpy(out)

    def select(self, indices: np.ndarray) -> FeatureTable:
        """These rows alone, in this order; nothing is read yet."""
        return FeatureTable(self.shards, self.where[indices], self.width, self.dtype)


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)
