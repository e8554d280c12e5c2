"""Features on disk: the backbone runs once per image content; vectors are memory-mapped afterwards.

A store is a folder of shards: a NumPy file of vectors and one of the digests of their images. Shards are never changed,
so several runs may write at once, an interrupted run resumes, and a second run finds its vectors by content.
"""

from __future__ import annotations

import contextlib
import errno
import io
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..exceptions import FeatdiffError
from ..files.atomic import write_atomically
from ..files.cache import cache_errors

_SHARD_BYTES = 4 << 20
_MAPPED_BYTES = 1 << 19
_FEW_SHARDS = 100  # more may not fit under the usual limit of open files
_VECTORS, _DIGESTS = ".vectors.npy", ".digests.npy"


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
        self._where: dict[bytes, tuple[int, int]] = {}
        with cache_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.folder.glob(f"*{_DIGESTS}")):
            self._open(file)

    def __contains__(self, digest: object) -> bool:
        return digest in self._where

    def __len__(self) -> int:
        return len(self._where)

    def add(self, digest: bytes, vector: np.ndarray) -> None:
        """Keep one vector (width,); written to disk when a shard is full, or by :meth:`flush`."""
        if digest in self._where:
            return
        self._where[digest] = (len(self._shards), len(self._pending))
        self._pending.append((digest, np.array(vector, dtype=self.dtype)))  # a copy: callers reuse their buffers
        if len(self._pending) == self._capacity:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as a shard of its own."""
        if not self._pending:
            return
        vectors = np.stack([vector for _, vector in self._pending])
        digests = np.frombuffer(b"".join(digest for digest, _ in self._pending), dtype=np.uint8).reshape(-1, 16)
        name = uuid.uuid4().hex
        files = {suffix: self.folder / f"{name}{suffix}" for suffix in (_VECTORS, _DIGESTS)}
        try:  # the digests are written last: a shard counts only when both files are whole
            for suffix, array in ((_VECTORS, vectors), (_DIGESTS, digests)):
                stream = io.BytesIO()
                np.save(stream, array, allow_pickle=False)
                with cache_errors(self.folder):
                    write_atomically(files[suffix], stream.getvalue())
        except BaseException:  # Ctrl-C, too
            _remove(files[_VECTORS])
            raise
        self._pending.clear()
        self._keep(_read(files[_VECTORS]))

    def table(self, digests: Sequence[bytes]) -> FeatureTable:
        """The vectors of ``digests``, in that order, as a table on disk."""
        self.flush()
        where = np.array([self._where[digest] for digest in digests], dtype=np.int32).reshape(-1, 2)
        return FeatureTable(self._shards, where, self.width, self.dtype)

    def _open(self, file: Path) -> None:
        try:
            digests = _read(file)
            shard = _read(file.with_name(file.name.replace(_DIGESTS, _VECTORS)))
        except FeatdiffError:
            raise
        except Exception:  # NumPy raises nearly anything on a damaged file
            return  # not a shard, or one damaged by a dying disk: its images are computed again
        arrays = isinstance(digests, np.ndarray) and isinstance(shard, np.ndarray)
        if not arrays or digests.dtype != np.uint8 or digests.ndim != 2 or digests.shape[1] != 16:
            return
        if shard.dtype != self.dtype or shard.shape != (len(digests), self.width):
            return
        for row, digest in enumerate(digests):
            self._where.setdefault(digest.tobytes(), (len(self._shards), row))
        self._keep(shard)

    def _keep(self, shard: np.ndarray) -> None:
        self._shards.append(shard)
        if len(self._shards) == _FEW_SHARDS:
            _allow_more_files()


def _read(file: Path) -> np.ndarray:
    """An array on disk: small ones are read, large ones mapped, which keeps a file open for each.

    Raises
    ------
    FeatdiffError
        More files than the system lets a process open.
    """
    mode: Any = "r" if file.stat().st_size >= _MAPPED_BYTES else None
    try:
        array: np.ndarray = np.load(file, mmap_mode=mode, allow_pickle=False)
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
