"""A bank of 8-bit numbers and queries -> the k nearest vectors of the bank, exactly, without a copy of it in floats."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from .neighbors import BLOCK, SPARE, Index, check_finite, checked, chosen_backend, euclidean, make_index

# Candidates beyond k by products that are rounded.
_ROUGH_SPARE = 27
# Numbers of queries that are multiplied as whole numbers at once: more do not stay in the cache.
_WHOLE_NUMBERS = 1 << 18
# Sums of so many products of 8-bit numbers cannot overflow 32 bits.
_WIDEST = (2**31 - 1) // 127**2
# The second digit of such a query is that many times as fine as the first.
_FINER = 254
# Queries that are so few that reading the bank is what takes time; and beside products of whole numbers.
_FEW, _FEWEST = 16, 2
# The largest error of a product in bfloat16, for vectors of length 1: the query and the result are rounded (2 ** -9
# each), and half as much again is left for the sum. In whole numbers, what is left to rounding in between.
_ROUGH_ERROR = 3 * 2**-9
_WHOLE_ERROR = 1e-6
# Vectors of 8-bit numbers that are in memory as floats at once.
_CODED_ROWS = 8192


#: Queries (Q, d) and their lengths (Q,) -> their products with the codes (Q, n), and the largest error of these (Q,).
Multiply = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


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

    Where the processor multiplies 8-bit numbers, queries become such numbers as well, of two digits each. Elsewhere, a
    few queries take as long as it takes to read the bank: they are rounded to bfloat16 and multiplied with the 8-bit
    numbers as they are. Either way exact distances choose among the candidates. The error of rounding is bounded: where
    a vector that is no candidate could be as near, the search is made again in full precision.

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
        multiply = self._rough_products(len(queries))
        size = max(1, _WHOLE_NUMBERS // queries.shape[1] if multiply else BLOCK // len(self.codes))
        parts = [self._nearest(some, k, multiply) for some in queries.split(size)]
        if len(parts) == 1:
            return parts[0]
        distances, nearest = zip(*parts, strict=True)
        return torch.cat(distances), torch.cat(nearest)

    def _nearest(self, queries: Tensor, k: int, multiply: Multiply | None) -> tuple[Tensor, Tensor]:
        if multiply and (found := self._among_rough(queries, k, multiply)):
            return found
        count = min(len(self.codes), k + SPARE)
        indices = self._squared(queries - self.mean).topk(count, largest=False, sorted=False).indices
        return self._exactly(queries, indices, k)

    def _squared(self, centred: Tensor) -> Tensor:
        """Squared distances (Q, n) of queries around the mean, less their own squares; in full precision."""
        parts = [codes.float() @ centred.T for codes in self.codes.split(_CODED_ROWS)]
        return self.squares - 2 * (torch.cat(parts) * self.scales).T

    # ---- products that are rounded ----

    def _rough_products(self, count: int) -> Multiply | None:
        """The fastest way to multiply so many queries with the bank, if it is faster than in full precision."""
        codes = self.codes
        on_cpu = codes.device.type == self._rough[1].device.type == "cpu"  # a module may have been moved
        if not on_cpu or not count:
            return None
        whole = codes.shape[1] <= _WIDEST and multiplies_whole_numbers()
        # PyTorch reads whole, aligned blocks of the bank
        aligned = codes.shape[1] % 32 == 0 and codes.is_contiguous() and codes.data_ptr() % 64 == 0
        if aligned and sys.platform != "win32" and count <= (_FEWEST if whole else _FEW):
            return self._in_bfloat16
        return self._in_whole_numbers if whole else None

    def _in_whole_numbers(self, queries: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Products (Q, n) with the codes of queries (Q, d) in two digits of 8 bits, and the largest error of each query
        (Q,), for a vector of length 1."""
        steps = queries.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        shares = queries / steps
        first = shares.round()
        second = ((shares - first) * _FINER).round()

        products = torch._int_mm(torch.cat([first, second]).to(torch.int8), self.codes.T).float()
        ours, rest = products.split(len(queries))
        rounded = 0.5 / _FINER * queries.shape[1] ** 0.5 * steps[:, 0]
        return ours.add_(rest, alpha=1 / _FINER).mul_(steps), torch.add(rounded, lengths, alpha=_WHOLE_ERROR)

    def _in_bfloat16(self, queries: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The same of queries that are rounded to bfloat16."""
        products = torch.ops.aten._weight_int8pack_mm(queries.bfloat16(), self.codes, self._rough[0])
        return products, _ROUGH_ERROR * lengths

    def _among_rough(self, queries: Tensor, k: int, multiply: Multiply) -> tuple[Tensor, Tensor] | None:
        """The nearest of some queries, if candidates by rough products are sure to hold them."""
        count = min(len(self.codes), k + (SPARE if multiply == self._in_whole_numbers else _ROUGH_SPARE))
        centred = queries - self.mean
        lengths = centred.norm(dim=1)
        products, errors = multiply(centred, lengths)
        _, twice_scales, twice_mean = self._rough
        squared, indices = (self.squares - products * twice_scales).topk(count, largest=False)
        distances, nearest = self._exactly(queries, indices, k)

        if count < len(self.codes):
            # the vectors, unlike the queries, still have their mean
            rest = torch.addmv(lengths.square() - 2 * self._longest * errors, centred, twice_mean)
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


@cache
def multiplies_whole_numbers() -> bool:
    """Whether this processor has exact products of 8-bit numbers, several times as fast as those of floats.

    Without such instructions (AVX-512 VNNI, AMX) sums of two products may overflow, and little is gained.
    """
    try:
        if not torch.cpu._is_vnni_supported():
            return False
        return all(_is_exact(rows, sign) for rows in (1, 2, 32) for sign in (-1, 1))
    except (AttributeError, RuntimeError):  # an older PyTorch, or one for another kind of processor
        return False


def _is_exact(rows: int, sign: int) -> bool:
    """Whether the largest numbers are multiplied without an overflow in between."""
    ours = torch.full((rows, 96), 127, dtype=torch.int8)
    theirs = torch.full((64, 96), sign * 127, dtype=torch.int8)
    return bool((torch._int_mm(ours, theirs.T) == sign * 96 * 127 * 127).all())
