"""A bank of 8-bit numbers and queries -> the k nearest vectors of the bank, exactly, without a copy of it in floats."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from .neighbors import BLOCK, SPARE, Index, check_finite, checked, chosen_backend, euclidean, make_index

# Queries that are so few that reading the bank is what takes time, and candidates beyond k for them.
_FEW = 16
_ROUGH_SPARE = 27
# Twice the largest error of a rough product, for vectors of length 1: the query and the result are rounded to bfloat16
# (2 ** -9 each), and half as much again is left for the sum.
_ROUGH_ERROR = 2 * 3 * 2**-9
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

    A few queries take as long as it takes to read the bank. They are rounded to bfloat16 and multiplied with the 8-bit
    numbers as they are, and exact distances choose among the candidates. The error of rounding is bounded: where a
    vector that is no candidate could be as near, the search is made again in full precision.

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
        self._longest = float(bank.norm(dim=1).max())
        # constants of rough products; in a tuple, so that they are no part of the state
        self._rough = (torch.ones(len(codes), dtype=torch.bfloat16), 2 * scales.T, 2 * self.mean)

    @property
    def bank(self) -> Tensor:
        """The vectors (n, d), computed from codes and scales."""
        return self.codes.float() * self.scales

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As :meth:`Index.search`; without checks of the queries and ``k`` where a graph is made."""
        if torch.compiler.is_compiling():
            return self._as_graph(queries, k)

        queries = checked(queries, self.codes, k)
        if 0 < len(queries) <= _FEW and self._is_for_rough and (found := self._among_rough(queries, k)):
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

    @property
    def _is_for_rough(self) -> bool:
        """Whether PyTorch's product with 8-bit numbers takes these: it reads whole, aligned blocks of them."""
        codes = self.codes
        on_cpu = codes.device.type == self._rough[1].device.type == "cpu"  # a module may have been moved
        aligned = codes.shape[1] % 32 == 0 and codes.is_contiguous() and codes.data_ptr() % 64 == 0
        return on_cpu and aligned and sys.platform != "win32"  # where it is slow

    def _among_rough(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
        """The nearest of a few queries, if candidates by rough products are sure to hold them."""
        count = min(len(self.codes), k + _ROUGH_SPARE)
        centred = queries - self.mean
        ones, twice_scales, twice_mean = self._rough
        products = torch.ops.aten._weight_int8pack_mm(centred.bfloat16(), self.codes, ones)
        squared, indices = (self.squares - products * twice_scales).topk(count, largest=False)
        distances, nearest = self._exactly(queries, indices, k)

        if count < len(self.codes):
            lengths = centred.norm(dim=1)
            # the vectors, unlike the queries, still have their mean
            rest = torch.addmv(lengths * (lengths - _ROUGH_ERROR * self._longest), centred, twice_mean)
            if not bool((distances[:, -1].square() < squared[:, -1] + rest).all()):
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
