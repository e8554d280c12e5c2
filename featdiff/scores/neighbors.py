"""k nearest in-domain vectors: exact in torch on any device, or FAISS where it is installed and the bank is large.

One interface: ``make_index(bank).search(queries, k)``. Distances are always recomputed from the vectors themselves, so
every exact backend gives the same neighbours and the same numbers.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..exceptions import FeatdiffError, UsageError, did_you_mean

BACKENDS = ("auto", "torch", "faiss", "faiss-ivf", "faiss-hnsw", "faiss-pq")
CORESETS = ("random", "greedy", "cluster")
#: ``auto`` stays exact below this many vectors: there, exact search costs little beside the backbone.
LARGE = 100_000
#: ``auto`` compresses a bank above this size: inverted lists hold every vector once more.
_COMPRESS_BYTES = 8 << 30
_BLOCK = 1 << 24  # distances held at once, about 64 MB
#: Candidates beyond k: fast distances are rough between near vectors, exact ones then choose.
_SPARE = 8

_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = "faiss" in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


class Index(Protocol):
    """A bank of vectors (n, d) that can be searched."""

    bank: Tensor

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Queries (Q, d) -> Euclidean distances (Q, k), ascending, and row numbers in the bank (Q, k).

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
    bank : (n, d) float
        In-domain vectors; searched on the device they are on.
    backend : str
        ``torch`` and ``faiss`` are exact. ``faiss-ivf`` (inverted lists), ``faiss-hnsw`` (a graph) and ``faiss-pq``
        (inverted lists of compressed vectors) may miss a neighbour. ``auto`` is ``torch`` up to ``LARGE`` vectors,
        and where FAISS is missing or unsafe (macOS, a forked process); beyond, ``faiss-ivf``, or ``faiss-pq`` for
        more than 8 GB.

    Raises
    ------
    UsageError
        An empty bank or one with NaN, an unknown backend, or FAISS asked for and not installed.
    FeatdiffError
        FAISS asked for in a forked process, where it would hang.
    """
    check_backend(backend)
    if bank.dim() != 2 or 0 in bank.shape:
        raise UsageError(f"a bank of neighbours must have shape (n, d), not {tuple(bank.shape)}")
    _check_finite(bank.float(), "the bank of neighbours")
    if backend == "auto":
        backend = _choose(bank)
    if backend == "torch":
        return TorchIndex(bank)
    return FaissIndex(bank, backend)


def check_backend(backend: str) -> None:
    """Refuse an unknown backend (``UsageError``)."""
    if backend not in BACKENDS:
        hint = did_you_mean(str(backend), list(BACKENDS))
        raise UsageError(f"unknown backend {backend!r}{hint}; known: {', '.join(BACKENDS)}")


def _choose(bank: Tensor) -> str:
    unsafe = sys.platform == "darwin" or _forked
    if len(bank) <= LARGE or unsafe or faiss_module() is None:
        return "torch"
    return "faiss-pq" if bank.numel() * 4 > _COMPRESS_BYTES else "faiss-ivf"


def faiss_module() -> Any:
    """The ``faiss`` package of whichever distribution is installed, or None."""
    try:
        return importlib.import_module("faiss")
    except Exception:  # the GPU builds raise RuntimeError where CUDA's libraries are missing
        return None


class TorchIndex:
    """Exact search by blocks of the distance matrix."""

    def __init__(self, bank: Tensor) -> None:
        self.bank = bank.float()
        # distances lose digits far from the origin, so candidates are sought around the bank's mean
        self._mean = self.bank.mean(0)
        self._centred = self.bank - self._mean
        self._squares = self._centred.square().sum(1)

    @torch.inference_mode()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As :meth:`Index.search`."""
        queries = _checked(queries, self.bank, k)
        width = min(len(self.bank), _BLOCK)
        found = [self._nearest(part, k, width) for part in queries.split(max(1, _BLOCK // width))]
        return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])

    def _nearest(self, queries: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
        # |q - b|^2 = |q|^2 + |b|^2 - 2 q b loses digits for near vectors: a few candidates more, then exactly
        wanted, centred = min(len(self.bank), k + _SPARE), queries - self._mean
        values, rows = [], []
        for start in range(0, len(self.bank), width):
            part, squares = self._centred[start : start + width], self._squares[start : start + width]
            distances = squares - 2 * (part @ centred.T).T  # with few queries, faster than queries @ bank
            value, row = distances.topk(min(wanted, len(part)), largest=False)
            values.append(value)
            rows.append(row + start)
        best = torch.cat(values, 1).topk(wanted, largest=False).indices
        return _exactly(queries, self.bank, torch.cat(rows, 1).gather(1, best), k)


class CodedIndex(nn.Module):
    """Exact search in a bank of 8-bit numbers with a scale for each row, by tensor operations alone.

    What a file for other programs does (see :mod:`featdiff.export.export`): any number of queries at once, no look at
    their values, and the bank is kept at a quarter of its size. Neighbours and distances are :class:`TorchIndex`'s.

    Parameters
    ----------
    codes, scales : (n, d) int8, (n, 1) float32
        The bank is their product.
    """

    codes: Tensor
    scales: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("mean", self.bank.mean(0))
        self.register_buffer("squares", (self.bank - self.mean).square().sum(1))

    @property
    def bank(self) -> Tensor:
        """The vectors (n, d), computed anew."""
        return self.codes.float() * self.scales

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As :meth:`Index.search`, for queries and ``k`` that are known to be good."""
        wanted = min(len(self.codes), k + _SPARE)
        products = (self.codes.float() @ (queries - self.mean).T) * self.scales
        near = (self.squares - 2 * products.T).topk(wanted, largest=False).indices
        best = _distances(queries, self.codes[near].float() * self.scales[near]).topk(k, largest=False)
        return best.values, near.gather(1, best.indices)


class FaissIndex:
    """FAISS search: ``faiss`` (flat, exact), ``faiss-ivf``, ``faiss-hnsw`` or ``faiss-pq``; on GPUs if both the
    bank and the build are. Not to be used in a forked process (FAISS' threads do not survive a fork)."""

    def __init__(self, bank: Tensor, kind: str) -> None:
        faiss = _usable_faiss()
        self.bank = bank.float()
        self._process = os.getpid()
        vectors = np.ascontiguousarray(self.bank.cpu().numpy())
        self._index = _build(faiss, vectors, kind)
        if self.bank.device.type == "cuda" and hasattr(faiss, "index_cpu_to_all_gpus") and kind != "faiss-hnsw":
            self._index = faiss.index_cpu_to_all_gpus(self._index)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As :meth:`Index.search`."""
        if os.getpid() != self._process:
            raise _fork_error()
        queries = _checked(queries, self.bank, k)
        wanted = min(len(self.bank), 2 * k + 8)  # the exact distances put the best k first
        _, rows = self._index.search(np.ascontiguousarray(queries.cpu().numpy()), wanted)
        if len(short := np.flatnonzero((rows[:, :k] < 0).any(1))):
            # too few vectors in the lists that were looked at (row -1): those queries are searched exactly
            exact = TorchIndex(self.bank).search(queries[torch.from_numpy(short).to(queries.device)], k)[1]
            rows[short[:, None], np.arange(k)] = exact.cpu().numpy()
        rows = np.where(rows < 0, rows[:, :1], rows)
        return _exactly(queries, self.bank, torch.from_numpy(rows).to(queries.device), k)


def _usable_faiss() -> Any:
    if _forked:
        raise _fork_error()
    faiss = faiss_module()
    if faiss is None:
        raise UsageError(
            "FAISS is not installed: pip install 'featdiff[faiss]' (or 'featdiff[faiss-gpu]', never both), "
            "or use the backend torch"
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
        index.hnsw.efConstruction, index.hnsw.efSearch = 100, 256
    elif kind == "faiss-ivf":
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(d), d, lists)
    else:
        if n < 256:
            raise UsageError(f"faiss-pq needs at least 256 vectors, and there are {n}: use the backend torch")
        parts = next(m for m in range(min(d, 64), 0, -1) if d % m == 0)
        index = faiss.IndexIVFPQ(faiss.IndexFlatL2(d), d, lists, parts, 8)
    if not index.is_trained:
        some = np.random.default_rng(0).permutation(n)[: max(256, 64 * lists)]
        index.cp.max_points_per_centroid = 64
        index.train(vectors[np.sort(some)])
        index.nprobe = max(8, min(lists, 32))
    index.add(vectors)
    return index


def _exactly(queries: Tensor, bank: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The nearest ``k`` of candidate rows (Q, c), by true distance; among equal candidates, the lower row number."""
    rows = rows.sort(dim=1).values
    repeated = torch.zeros_like(rows, dtype=torch.bool)
    repeated[:, 1:] = rows[:, 1:] == rows[:, :-1]
    parts = zip(queries.split(256), rows.split(256), strict=True)
    distances = torch.cat([_distances(q, bank[r]) for q, r in parts])
    order = distances.masked_fill(repeated, torch.inf).sort(dim=1, stable=True)
    return order.values[:, :k], rows.gather(1, order.indices[:, :k])


def _distances(queries: Tensor, candidates: Tensor) -> Tensor:
    """(Q, d) to (Q, c, d) -> Euclidean (Q, c)."""
    return (candidates - queries[:, None]).square().sum(2).sqrt()


def _checked(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    if queries.dim() != 2 or queries.shape[1] != bank.shape[1]:
        raise UsageError(f"queries must have shape (Q, {bank.shape[1]}) like the bank, not {tuple(queries.shape)}")
    if not 1 <= k <= len(bank):
        raise UsageError(f"k must lie in 1 .. {len(bank)} (the size of the bank), not {k}")
    queries = queries.to(bank.device, torch.float32)
    if not torch.compiler.is_compiling():  # a compiled graph cannot look at values
        _check_finite(queries, "the queries")
    return queries


def _check_finite(vectors: Tensor, what: str) -> None:
    bad = (~torch.isfinite(vectors).all(1)).nonzero()
    if len(bad):
        raise UsageError(f"{what} hold NaN or infinite values, first in row {int(bad[0])}")


def coreset(vectors: Tensor, size: int, method: str = "random", seed: int = 0) -> np.ndarray:
    """Choose the rows of a bounded bank: (n, d) -> min(n, size) row numbers, ascending.

    Parameters
    ----------
    method : "random", "greedy" or "cluster"
        A uniform sample, which keeps the density that distances to several neighbours measure; the farthest point
        from those chosen so far, again and again (k-center, as in PatchCore, arXiv 2106.08265), which covers rare
        vectors; or the vectors nearest to the centres of k-means (scikit-learn's MiniBatchKMeans).

    Raises
    ------
    UsageError
        An unknown method, a size below 1, or NaN.
    """
    check_coreset(method)
    if size < 1:
        raise UsageError(f"the size of a bank must be above 0, not {size}")
    _check_finite(vectors, "the vectors of a bank")
    if len(vectors) <= size:
        return np.arange(len(vectors))
    if method == "random":
        return np.sort(np.random.default_rng(seed).permutation(len(vectors))[:size])
    return (_medoids if method == "cluster" else _farthest_first)(vectors.float(), size, seed)


def check_coreset(method: str) -> None:
    """Refuse an unknown method (``UsageError``)."""
    if method not in CORESETS:
        raise UsageError(f"unknown coreset {method!r}; known: {', '.join(CORESETS)}")


def _medoids(vectors: Tensor, size: int, seed: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    means = MiniBatchKMeans(size, random_state=seed, n_init=1, batch_size=max(1024, 2 * size))
    centres = torch.from_numpy(means.fit(vectors.cpu().numpy()).cluster_centers_)
    # two centres may share their nearest vector: the bank is then a little smaller, so others fill it up
    nearest = np.unique(TorchIndex(vectors).search(centres.to(vectors), 1)[1].cpu().numpy())
    others = np.setdiff1d(np.random.default_rng(seed).permutation(len(vectors)), nearest, assume_unique=True)
    return np.sort(np.concatenate([nearest, others[: size - len(nearest)]]))


def _farthest_first(vectors: Tensor, size: int, seed: int) -> np.ndarray:
    chosen = [int(np.random.default_rng(seed).integers(len(vectors)))]
    nearest = torch.full((len(vectors),), torch.inf, device=vectors.device)
    for _ in range(size - 1):
        nearest = torch.minimum(nearest, (vectors - vectors[chosen[-1]]).square().sum(1))
        nearest[chosen[-1]] = -1  # copies of a chosen vector come last, itself never
        chosen.append(int(nearest.argmax()))
    return np.sort(chosen)
