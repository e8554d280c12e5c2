"""A bank of 8-bit numbers and queries -> the k nearest vectors of the bank, exactly, without a copy of it in floats."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .neighbors import BLOCK, SPARE, Index, check_finite, checked, chosen_backend, euclidean, make_index

# Queries that are so few that reading the bank is what takes time, and candidates beyond k for them.
_FEW = 2
_ROUGH_SPARE = 27
# Twice the largest error of a product in bfloat16, for vectors of length 1: both vectors and the result are rounded to
# 8 bits (2 ** -9 each).
_ROUGH_ERROR = 2 * 3.1 * 2**-9
# Vectors of 8-bit numbers that are in memory as floats at once.
_CODED_ROWS = 8192


def make_coded_index(codes: Tensor, scales: Tensor, backend: str = "auto") -> Index | CodedIndex:
    """Prepare a bank of 8-bit numbers for searching; see :func:`featdiff.scores.neighbors.make_index`.

    Parameters
    ----------
    codes : int8 Tensor of shape (n, d)
    scales : float32 Tensor of shape (n, 1)
    backend : str, default "auto"

    Returns
    -------
    Index or CodedIndex
    """
    if chosen_backend(codes, backend) == "torch":
        return CodedIndex(codes, scales)
    return make_index(codes.float() * scales, backend)


class CodedIndex(nn.Module):
    """Exact search in a bank of 8-bit numbers with one scale for each vector.

    The same neighbours and distances as :class:`TorchIndex` among the products, in a fraction of the memory. In a model
    that is exported (see :mod:`featdiff.export.export`) it is tensor operations alone, for any number of queries.

    A few queries take as long as it takes to read the bank. They are compared with a copy in bfloat16, half as long as
    the vectors, and exact distances choose among the candidates. The error of bfloat16 is bounded: where a vector that
    is no candidate could be as near, the search is made again in full precision.

    Parameters
    ----------
    codes : int8 Tensor of shape (n, d)
        The vectors, divided by their scales.
    scales : float32 Tensor of shape (n, 1)
        The scale of each vector.
    """

    codes: Tensor
    scales: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        bank = self.bank
        check_finite(bank, "the bank of neighbours")
        self.register_buffer("mean", bank.mean(0))
        centred = bank - self.mean
        self.register_buffer("squares", centred.square().sum(1))
        self._longest = float(self.squares.max().sqrt())
        # in a list, so that it is no part of the state
        self._rough = [centred.bfloat16()] if codes.device.type == "cpu" else []

    @property
    def bank(self) -> Tensor:
        """The vectors (n, d), computed from codes and scales."""
        return self.codes.float() * self.scales

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As :meth:`Index.search`; without checks of the queries and ``k`` where a graph is made."""
        if torch.compiler.is_compiling():
            return self._as_graph(queries, k)

        queries = checked(queries, self.codes, k)
        if self._rough and 0 < len(queries) <= _FEW and (found := self._among_rough(queries, k)):
            return found

        count = min(len(self.codes), k + SPARE)
        parts = []
        for some in queries.split(max(1, BLOCK // len(self.codes))):
            indices = self._squared(some - self.mean).topk(count, largest=False, sorted=False).indices
            parts.append(self._exactly(some, indices, k))
        distances, nearest = zip(*parts, strict=True)
        return torch.cat(distances), torch.cat(nearest)

    def _squared(self, centred: Tensor) -> Tensor:
        """Squared distances (Q, n) of queries around the mean, less their own squares; in full precision."""
        parts = [codes.float() @ centred.T for codes in self.codes.split(_CODED_ROWS)]
        return self.squares - 2 * (torch.cat(parts) * self.scales).T

    def _among_rough(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
        """The nearest of a few queries, if candidates by bfloat16 are sure to hold them."""
        count = min(len(self.codes), k + _ROUGH_SPARE)
        centred = queries - self.mean
        products = F.linear(centred.bfloat16(), self._rough[0])
        squared, indices = (self.squares - 2 * products.float()).topk(count, largest=False)
        distances, nearest = self._exactly(queries, indices, k)

        if count < len(self.codes):
            lengths = centred.norm(dim=1)
            others = squared[:, -1] + lengths * (lengths - _ROUGH_ERROR * self._longest)
            if not bool((distances[:, -1].square() < others).all()):
                return None
        return distances, nearest

    def _exactly(self, queries: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The nearest ``k`` of candidates (Q, c) by exact distance; of equally near ones, the lower index first."""
        indices = indices.sort(dim=1).values
        parts = []
        for some, candidates in zip(queries.split(256), indices.split(256), strict=True):  # a few, to save memory
            parts.append(euclidean(some, self.codes[candidates].float() * self.scales[candidates]))
        distances, order = torch.cat(parts).sort(dim=1, stable=True)
        return distances[:, :k], indices.gather(1, order[:, :k])

    def _as_graph(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The same, never looking at the number of queries or at their values."""
        count = min(len(self.codes), k + SPARE)
        products = (self.codes.float() @ (queries - self.mean).T) * self.scales
        indices = (self.squares - 2 * products.T).topk(count, largest=False).indices

        vectors = self.codes[indices].float() * self.scales[indices]
        best = euclidean(queries, vectors).topk(k, largest=False)
        return best.values, indices.gather(1, best.indices)
