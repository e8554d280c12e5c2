"""Banks of in-domain vectors in which neighbours are looked up, one for each space that deep features offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..features.hooks import SPREAD
from ..features.layout import LOGITS, PRE_LOGITS, block_normalise
from .neighbors import CodedIndex, Index, make_index


class Banks(nn.Module):
    """Distances to the nearest in-domain vectors, in up to three spaces.

    The last stage: mean and spatial deviation of its channels, each block-normalised. ``pre_logits``:
    the square root of their means, and of their deviations, each of length 1 (their lengths and sparsity tell most,
    so nothing is subtracted). Vectors are kept as 8-bit numbers with a scale each.

    Parameters
    ----------
    columns : mapping of names to slices
        Where an extractor's vectors lie: :attr:`featdiff.features.extractor.FeatureExtractor.columns`.
    rows : int
        Vectors in each bank.
    k : int
        Neighbours that count.
    backend : str
        See :func:`featdiff.scores.neighbors.make_index`.
    """

    scales_0: Tensor

    def __init__(self, columns: Mapping[str, slice], rows: int, k: int, backend: str = "auto") -> None:
        super().__init__()
        self.k, self.backend = min(k, rows), backend
        self.spaces = _spaces(columns)
        self._columns = dict(columns)
        self._indices: list[Index] = []
        for i, parts in enumerate(self.spaces.values()):
            width = sum(_width(columns[part]) for part in parts)
            self.register_buffer(f"vectors_{i}", torch.zeros(rows, width, dtype=torch.int8))
            self.register_buffer(f"scales_{i}", torch.ones(rows, 1))

    @property
    def names(self) -> list[str]:
        """``knn_<space>`` for each space."""
        return [f"knn_{space}" for space in self.spaces]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Banks:
        if isinstance(self._indices, list):  # those lie where the vectors lay
            self._indices = []
        return super()._apply(fn, recurse)

    @torch.inference_mode()
    def fit(self, features: Tensor) -> Banks:
        """Fill the banks with in-domain features (rows, D)."""
        for i, space in enumerate(self.spaces):
            vectors = self._view(features.to(self.scales_0.device), space)
            scales = vectors.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
            getattr(self, f"vectors_{i}").copy_((vectors / scales).round())
            getattr(self, f"scales_{i}").copy_(scales)
        self._indices = []
        return self

    @torch.inference_mode()
    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) -> (B, spaces): geometric mean of the distances to the ``k`` nearest, higher = more OOD.

        The mean over the first neighbours says more than the k-th alone (Sun et al., ICML 2022): it looks at the
        density near the image at several scales.
        """
        return torch.stack([self.distances(features, space) for space in self.spaces], dim=1)

    @torch.inference_mode()
    def distances(self, features: Tensor, space: str) -> Tensor:
        """The same in one space alone: (B, D) -> (B,)."""
        indices = self._indices  # kept by this name: another thread may move the banks
        if not indices:  # built when first needed: a loaded bank may lie on another device
            indices = self._indices = [make_index(self._bank(i), self.backend) for i in range(len(self.spaces))]
        index = indices[list(self.spaces).index(space)]
        found = index.search(self._view(features.to(self.scales_0.device), space), self.k)[0]
        tiny = torch.finfo(torch.float32).eps  # a copy of a bank's image has distance 0
        return found.clamp_min(tiny).log().mean(1).exp()

    def search_coded(self) -> None:
        """From now on search by tensor operations alone, exactly, whatever ``backend`` says; for an export."""
        found = [CodedIndex(*self._coded(i)) for i in range(len(self.spaces))]
        self._indices = cast(list[Index], nn.ModuleList(found))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_indices": []}  # a copy builds its own: FAISS' are not ours to copy

    def _coded(self, i: int) -> tuple[Tensor, Tensor]:
        """The 8-bit vectors (rows, width) of a space, and their scales (rows, 1)."""
        return getattr(self, f"vectors_{i}"), getattr(self, f"scales_{i}")

    def _bank(self, i: int) -> Tensor:
        vectors, scales = self._coded(i)
        return vectors.float() * scales

    def _view(self, features: Tensor, space: str) -> Tensor:
        parts = [features[:, self._columns[part]] for part in self.spaces[space]]
        if space.removesuffix(SPREAD) == PRE_LOGITS:
            return F.normalize(torch.cat([part.sign() * part.abs().sqrt() for part in parts], 1), dim=1)
        return block_normalise(torch.cat(parts, 1), [part.shape[1] for part in parts])


def _spaces(columns: Mapping[str, slice]) -> dict[str, Sequence[str]]:
    """Name of each space -> the columns it is made of."""
    stages = [name for name in columns if name.removesuffix(SPREAD) not in (PRE_LOGITS, LOGITS)]
    last = [name for name in stages if not name.endswith(SPREAD)][-1]
    spaces: dict[str, Sequence[str]] = {last: [name for name in (last, last + SPREAD) if name in columns]}
    return spaces | {name: [name] for name in (PRE_LOGITS, PRE_LOGITS + SPREAD) if name in columns}


def _width(columns: slice) -> int:
    return int(columns.stop - columns.start)
