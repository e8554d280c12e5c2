"""Distances to the nearest in-domain vectors, one score for each space that deep features offer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..features.layout import PRE_LOGITS, FeatureLayout, Kind, Part, block_normalise
from .coded import CodedIndex, make_coded_index
from .neighbors import Index
from .registry import Context, Features, Options, Score, register

# Weights of the three spaces in the fused score: last stage, pre-logits, spatial std of the pre-logits. Set once, on
# sets far from and near to CIFAR-10 and on magnetic tiles (tests/benchmarks/RESULTS.md).
_WEIGHTS = (3.0, 0.5, 1.0)
# Vectors of so many numbers are rounded to 4 bits: over many numbers the errors of rounding average out, and the AUROC
# is as with 8 (tests/benchmarks/RESULTS.md). Shorter ones are rounded to 8.
_WIDE = 256
_LEVELS = 127
_LEVELS_WIDE = 7


class NearestNeighbors(Score):
    """Geometric mean of the distances to the ``neighbors`` nearest in-domain vectors, in one space.

    The mean over the first neighbours says more than the k-th alone (Sun et al., ICML 2022): it looks at the density
    near the image at several scales. Vectors are kept as whole numbers with a scale each: of 8 bits, and where they are
    long of 4. The state dict holds two of the latter in a byte.

    Parameters
    ----------
    layout : FeatureLayout
    parts : sequence of Part
        What a vector is made of. Stages and their spatial standard deviations are block-normalised. Of pre-logits and
        theirs the square root is taken and brought to length 1 (their lengths and sparsity tell most, so nothing is
        subtracted).
    options : Options
        ``rows`` vectors are kept.

    Attributes
    ----------
    vectors : Tensor of shape (rows, width), int8
    scales : Tensor of shape (rows, 1)
    """

    log_scale = True
    vectors: Tensor
    scales: Tensor

    def __init__(self, layout: FeatureLayout, parts: Sequence[Part], options: Options) -> None:
        super().__init__(layout)
        self.name = f"knn_{parts[0].name}"
        self.parts = tuple(parts)
        self.layer = PRE_LOGITS if parts[0].kind is Kind.PRE_LOGITS else None
        self.k = min(options.neighbors, options.rows)
        self.backend = options.backend
        # in a tuple, so that a FAISS index is not taken for a submodule
        self._index: tuple[Index | CodedIndex, ...] = ()
        width = sum(part.width for part in parts)
        self.register_buffer("vectors", torch.zeros(options.rows, width, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(options.rows, 1))
        self._in_pairs = width >= _WIDE and width % 2 == 0

    @torch.no_grad()
    def fit(self, features: Features, context: Context | None = None) -> Self:
        """Keep in-domain features (rows, D)."""
        self._keep(features, slice(None))
        return self

    @torch.no_grad()
    def fit_further(
        self, older: Self, kept: np.ndarray, added: Features, bank: Features | None, context: Context | None = None
    ) -> Self:
        """Keep some of the older vectors as they are, and those of further rows; the older rows are not needed."""
        rows = torch.from_numpy(kept).to(older.scales.device)
        self.vectors[: len(kept)] = older.vectors[rows]
        self.scales[: len(kept)] = older.scales[rows]
        self._keep(added, slice(len(kept), None))
        return self

    def _keep(self, features: Features, place: slice) -> None:
        """Round the vectors of rows, and put them in their place."""
        if not len(features):
            return
        vectors = self.view(features[:].to(self.scales.device))
        levels = _LEVELS_WIDE if self._in_pairs else _LEVELS
        scales = vectors.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / levels
        self.vectors[place] = (vectors / scales).round().to(torch.int8)
        self.scales[place] = scales
        self._index = ()

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> (B,), > 0, higher = more OOD."""
        return _mean_distance(self._search(features, self.k)[0])

    @torch.no_grad()
    def nearest(self, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The most similar kept vectors.

        Parameters
        ----------
        features : Tensor of shape (B, D)
        count : int
            How many; at most all that are kept.

        Returns
        -------
        distances : Tensor of shape (B, count)
            Euclidean, in the space of :meth:`view`, ascending.
        rows : Tensor of shape (B, count) of int
            Which of the rows that :meth:`fit` was given; of equally near ones, the lower number comes first.
        """
        return self._search(features, min(count, len(self.vectors)))

    @torch.no_grad()
    def without(self, features: Tensor, own: Tensor) -> Tensor:
        """As :meth:`forward`, without the kept vector of this number (B,); -1: with all."""
        wanted = min(self.k + 1, len(self.vectors))
        distances, indices = self._search(features, wanted)
        others = indices != own.to(indices.device)[:, None]
        kept = distances.masked_fill(~others, torch.inf).sort(dim=1).values
        return _mean_distance(kept[:, : min(self.k, max(1, wanted - 1))])

    def _search(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        index = self._index  # kept by this name: another thread may move the vectors
        if not index:  # built when first needed: a loaded score may lie on another device
            index = self._index = (make_coded_index(self.vectors, self.scales, self.backend),)
        return index[0].search(self.view(features.to(self.scales.device)), k)

    def view(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> vectors in which neighbours are searched (B, width)."""
        vectors = self.layout.take(features, self.parts)
        if self.parts[0].layer == PRE_LOGITS:
            return F.normalize(vectors.sign() * vectors.abs().sqrt(), dim=1)
        return block_normalise(vectors, [part.width for part in self.parts])

    def search_coded(self) -> None:
        """From now on search by tensor operations alone, exactly, whatever the backend; for an export."""
        index = CodedIndex(self.vectors, self.scales)
        self.index = index  # a submodule, so that its tensors are found
        self._index = (index,)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._in_pairs:
            destination[prefix + "vectors"] = _paired(self.vectors)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        name = prefix + "vectors"
        pairs = state_dict.get(name)
        if self._in_pairs and pairs is not None and pairs.dtype == torch.uint8:
            state_dict[name] = _unpaired(pairs)  # a copy that load_state_dict has made
        super()._load_from_state_dict(state_dict, prefix, *others)
        self._index = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not isinstance(getattr(self, "index", None), nn.Module):
            self._index = ()  # it lies where the vectors lay
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_index": ()}  # a copy builds its own: FAISS' are not ours to copy


def _mean_distance(distances: Tensor) -> Tensor:
    """Distances (B, k) -> their geometric mean (B,)."""
    smallest = torch.finfo(torch.float32).eps  # a copy of an image that is kept has distance 0
    return distances.clamp_min(smallest).log().mean(1).exp()


def _paired(codes: Tensor) -> Tensor:
    """Numbers -8 .. 7 (n, 2 d), int8 -> two in each byte (n, d), uint8; the first half in the lower bits."""
    low, high = (codes.to(torch.int16) & 15).to(torch.uint8).chunk(2, dim=1)
    return low | (high << 4)


def _unpaired(pairs: Tensor) -> Tensor:
    """The numbers again (n, 2 d), int8."""
    values = torch.cat([pairs & 15, pairs >> 4], dim=1).to(torch.int8)
    return torch.where(values > 7, values - 16, values)


@register("neighbors", head=True)
def neighbors(layout: FeatureLayout, options: Options) -> list[Score]:
    """In the last stage, in the pre-logits, and in the spatial standard deviations of these, where there are such."""
    scores = [NearestNeighbors(layout, parts, options) for parts in _spaces(layout)]
    if len(scores) == len(_WEIGHTS):
        for score, weight in zip(scores, _WEIGHTS, strict=True):
            score.weight = weight
    return list(scores)


def views(layout: FeatureLayout) -> list[Callable[[Tensor], Tensor]]:
    """Rows of features (B, D) -> vectors (B, width) of each space that :func:`neighbors` searches."""
    return [NearestNeighbors(layout, parts, Options(rows=1)).view for parts in _spaces(layout)]


def _spaces(layout: FeatureLayout) -> list[list[Part]]:
    """What the vectors of each space are made of."""
    last = [layout.last_stage, layout.spatial_std(layout.last_stage)]
    spaces = [[part for part in last if part is not None]]
    if layout.pre_logits is not None:
        std = layout.spatial_std(layout.pre_logits)
        spaces += [[part] for part in (layout.pre_logits, std) if part is not None]
    return spaces
