"""A bank of in-domain vectors and queries -> the k nearest vectors of the bank, and their distances.

There is one interface, ``make_index(bank).search(queries, k)``, and two kinds of backends: torch, exact on any device,
and FAISS, for large banks where it is installed. Distances are always recomputed from the vectors themselves, so that
all exact backends return the same neighbours and the same numbers. :func:`coreset` chooses the vectors of a bank.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..exceptions import FeatdiffError, UsageError, did_you_mean

#: Backends of the search, see :func:`make_index`.
BACKENDS = ("auto", "torch", "faiss", "faiss-ivf", "faiss-hnsw", "faiss-pq")
#: ``auto`` is exact up to this many vectors: there, exact search takes little time compared with the backbone.
LARGE = 100_000
# ``auto`` compresses a bank above this size, since inverted lists hold every vector a second time.
_COMPRESS_BYTES = 8 << 30
#: Number of distances in memory at once, about 64 MB.
BLOCK = 1 << 24
#: Candidates beyond k. Fast distances are inaccurate between near vectors; exact ones then choose among candidates.
SPARE = 8

_forked = False  # whether this process was forked from one that had loaded FAISS


def _mark_forked() -> None:
    global _forked
    _forked = "faiss" in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


class Index(Protocol):
    """A bank that can be searched.

    Attributes
    ----------
    bank : Tensor of shape (n, d)
        The vectors.
    """

    bank: Tensor

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The nearest vectors of the bank.

        Parameters
        ----------
        queries : Tensor of shape (Q, d)
            Vectors whose neighbours are searched.
        k : int
            Number of neighbours.

        Returns
        -------
        Tensor of shape (Q, k)
            Euclidean distances, ascending.
        Tensor of shape (Q, k)
            Indices of the neighbours in the bank.

        Raises
        ------
        UsageError
            Queries of another width, NaN or infinite ones, or ``k`` outside 1 .. n.
        """
        ...


def make_index(bank: Tensor, backend: str = "auto") -> Index:
    """Prepare a bank for searching.

    Parameters
    ----------
    bank : Tensor of shape (n, d)
        In-domain vectors. They are searched on their device.
    backend : str, default "auto"
        ``torch`` and ``faiss`` are exact. ``faiss-ivf`` (inverted lists), ``faiss-hnsw`` (a graph) and ``faiss-pq``
        (inverted lists of compressed vectors) may miss a neighbour. ``auto`` is ``torch`` up to ``LARGE`` vectors, and
        where FAISS is missing or unsafe (macOS, a forked process). For larger banks it is ``faiss-ivf``, or
        ``faiss-pq`` if they have more than 8 GB.

    Returns
    -------
    Index

    Raises
    ------
    UsageError
        An empty bank, NaN or infinite values, an unknown backend, or a FAISS backend where FAISS is not installed.
    FeatdiffError
        A FAISS backend in a forked process, where it would hang.

    Examples
    --------
    >>> bank = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    >>> distances, indices = make_index(bank, "torch").search(torch.zeros(1, 2), k=2)
    >>> distances.tolist(), indices.tolist()
    ([[0.0, 5.0]], [[0, 1]])
    """
    check_backend(backend)
    if bank.dim() != 2 or 0 in bank.shape:
        raise UsageError(f"a bank of neighbours must have shape (n, d), not {tuple(bank.shape)}")
    check_finite(bank.float(), "the bank of neighbours")
    backend = chosen_backend(bank, backend)
    return TorchIndex(bank) if backend == "torch" else FaissIndex(bank, backend)


def check_backend(backend: str) -> None:
    """Raise ``UsageError`` if a backend is unknown."""
    if backend not in BACKENDS:
        hint = did_you_mean(str(backend), list(BACKENDS))
        raise UsageError(f"unknown backend {backend!r}{hint}; known: {', '.join(BACKENDS)}", argument="backend")


def chosen_backend(bank: Tensor, backend: str) -> str:
    """The backend, where ``auto`` stands for one."""
    if backend != "auto":
        return backend
    unsafe = sys.platform == "darwin" or _forked
    if len(bank) <= LARGE or unsafe or faiss_module() is None:
        return "torch"
    return "faiss-pq" if bank.numel() * 4 > _COMPRESS_BYTES else "faiss-ivf"


def faiss_module() -> Any:
    """The package ``faiss`` of the installed distribution (for CPUs or GPUs), or None."""
    try:
        return importlib.import_module("faiss")
    except Exception:  # builds for GPUs raise RuntimeError where CUDA's libraries are missing
        return None


class TorchIndex:
    """Exact search, by blocks of the matrix of distances.

    Parameters
    ----------
    bank : Tensor of shape (n, d)
        In-domain vectors.
    """

    def __init__(self, bank: Tensor) -> None:
        self.bank = bank.float()
        # distances lose digits far from the origin, so candidates are searched around the bank's mean
        self._mean = self.bank.mean(0)
        self._centred = self.bank - self._mean
        self._squares = self._centred.square().sum(1)

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As :meth:`Index.search`."""
        queries = checked(queries, self.bank, k)
        width = min(len(self.bank), BLOCK)

        parts = [self._nearest(part, k, width) for part in queries.split(max(1, BLOCK // width))]
        distances, indices = zip(*parts, strict=True)
        return torch.cat(distances), torch.cat(indices)

    def _nearest(self, queries: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
        """The nearest ``k``, looking at ``width`` vectors of the bank at a time.

        |q - b|^2 = |q|^2 + |b|^2 - 2 q b is fast, but loses digits for near vectors. So it finds a few more candidates
        than are needed, among which exact distances choose. |q|^2 is left out: it does not change the order.
        """
        candidates = min(len(self.bank), k + SPARE)
        centred = queries - self._mean

        values = []
        indices = []
        for start in range(0, len(self.bank), width):
            part = self._centred[start : start + width]
            squares = self._squares[start : start + width]
            distances = squares - 2 * (part @ centred.T).T  # with few queries, faster than queries @ bank
            nearest = distances.topk(min(candidates, len(part)), largest=False)
            values.append(nearest.values)
            indices.append(nearest.indices + start)

        best = torch.cat(values, 1).topk(candidates, largest=False).indices
        return _exactly(queries, self.bank, torch.cat(indices, 1).gather(1, best), k)


class FaissIndex:
    """Search by FAISS; on GPUs if the bank is on one and the installed build supports them.

    Not for forked processes: FAISS' threads do not survive a fork.

    Parameters
    ----------
    bank : Tensor of shape (n, d)
        In-domain vectors.
    kind : str
        ``faiss`` (flat, exact), ``faiss-ivf``, ``faiss-hnsw`` or ``faiss-pq``.

    Raises
    ------
    UsageError
        FAISS is not installed, or too few vectors for ``faiss-pq``.
    FeatdiffError
        This process is forked.
    """

    def __init__(self, bank: Tensor, kind: str) -> None:
        faiss = _usable_faiss()
        self.bank = bank.float()
        self._process = os.getpid()
        self._index = _build(faiss, np.ascontiguousarray(self.bank.cpu().numpy()), kind)

        if self.bank.device.type == "cuda" and hasattr(faiss, "index_cpu_to_all_gpus") and kind != "faiss-hnsw":
            self._index = faiss.index_cpu_to_all_gpus(self._index)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As :meth:`Index.search`."""
        if os.getpid() != self._process:
            raise _fork_error()
        queries = checked(queries, self.bank, k)

        candidates = min(len(self.bank), 2 * k + 8)  # more than k, among which exact distances choose
        _, indices = self._index.search(np.ascontiguousarray(queries.cpu().numpy()), candidates)

        # FAISS marks with -1 what it did not find, as the lists that it searched held too few vectors:
        # such queries are searched exactly
        incomplete = np.flatnonzero((indices[:, :k] < 0).any(1))
        if len(incomplete):
            _, exact = TorchIndex(self.bank).search(queries[torch.from_numpy(incomplete).to(queries.device)], k)
            indices[incomplete[:, None], np.arange(k)] = exact.cpu().numpy()

        indices = np.where(indices < 0, indices[:, :1], indices)
        return _exactly(queries, self.bank, torch.from_numpy(indices).to(queries.device), k)


def _usable_faiss() -> Any:
    if _forked:
        raise _fork_error()
    faiss = faiss_module()
    if faiss is None:
        raise UsageError(
            "FAISS is not installed: pip install 'featdiff[faiss]' (or 'featdiff[faiss-gpu]', never both), "
            "or use the backend torch",
            argument="backend",
        )
    return faiss


def _fork_error() -> FeatdiffError:
    return FeatdiffError(
        "FAISS hangs in forked processes: start worker processes with 'spawn', or use the backend torch"
    )


def _build(faiss: Any, vectors: np.ndarray, kind: str) -> Any:
    n, d = vectors.shape
    # about 4 sqrt(n) lists, each trained on at least 39 vectors, as FAISS asks for
    lists = max(1, min(int(4 * n**0.5), n // 39))

    if kind == "faiss":
        index = faiss.IndexFlatL2(d)
    elif kind == "faiss-hnsw":
        index = faiss.IndexHNSWFlat(d, 32)
        index.hnsw.efConstruction = 100
        index.hnsw.efSearch = 256
    elif kind == "faiss-ivf":
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(d), d, lists)
    else:
        if n < 256:
            raise UsageError(
                f"faiss-pq needs at least 256 vectors, and there are {n}: use the backend torch", argument="backend"
            )
        parts = next(m for m in range(min(d, 64), 0, -1) if d % m == 0)
        index = faiss.IndexIVFPQ(faiss.IndexFlatL2(d), d, lists, parts, 8)

    if not index.is_trained:
        sample = np.random.default_rng(0).permutation(n)[: max(256, 64 * lists)]
        index.cp.max_points_per_centroid = 64
        index.train(vectors[np.sort(sample)])
        index.nprobe = max(8, min(lists, 32))
    index.add(vectors)
    return index


def _exactly(queries: Tensor, bank: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The nearest ``k`` of candidates (Q, c) by exact distance; of equally near ones, the lower index comes first.

    A candidate may occur more than once; its repetitions are ignored.
    """
    indices = indices.sort(dim=1).values
    repeated = torch.zeros_like(indices, dtype=torch.bool)
    repeated[:, 1:] = indices[:, 1:] == indices[:, :-1]

    count = 256  # a few at a time, to save memory
    if bank.device.type == "cpu" and not torch.compiler.is_compiling():
        # what the cache holds, 2 MB: three times as fast for 80 wide candidates
        count = max(1, (1 << 19) // (indices.shape[1] * bank.shape[1]))
    parts = zip(queries.split(count), indices.split(count), strict=True)
    distances = torch.cat([euclidean(some, bank[candidates]) for some, candidates in parts])
    order = distances.masked_fill(repeated, torch.inf).sort(dim=1, stable=True)
    return order.values[:, :k], indices.gather(1, order.indices[:, :k])


def euclidean(queries: Tensor, candidates: Tensor) -> Tensor:
    """Euclidean distances (Q, c) of queries (Q, d) to their candidates (Q, c, d)."""
    return (candidates - queries[:, None]).square().sum(2).sqrt()


def checked(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Queries on the bank's device in single precision."""
    if queries.dim() != 2 or queries.shape[1] != bank.shape[1]:
        raise UsageError(f"queries must have shape (Q, {bank.shape[1]}) like the bank, not {tuple(queries.shape)}")
    if not 1 <= k <= len(bank):
        raise UsageError(f"k must lie in 1 .. {len(bank)} (the size of the bank), not {k}", argument="k")

    queries = queries.to(bank.device, torch.float32)
    # a compiled graph cannot look at values, and a GPU would have to be waited for: there, the distances are NaN
    if queries.device.type == "cpu" and not torch.compiler.is_compiling():
        check_finite(queries, "the queries")
    return queries


def check_finite(vectors: Tensor, what: str) -> None:
    """Raise ``UsageError`` if a vector (n, d) holds NaN or infinite values."""
    if vectors.sum().isfinite():  # one pass; a sum of large finite values is looked at closely, too
        return
    bad = (~torch.isfinite(vectors).all(1)).nonzero()
    if len(bad):
        raise UsageError(f"{what} hold NaN or infinite values, first in row {int(bad[0])}")
