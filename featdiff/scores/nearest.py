"""Distances to the nearest in-domain vectors, in all spaces that deep features offer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..features.layout import PRE_LOGITS, FeatureLayout, Part, block_normalise
from .coded import CodedIndex, make_coded_index
from .neighbors import Index
from .registry import Context, Features, Options, Score, register

# Beside the diffusion score, which has 1. It and the three below were set once, on sets far from and near to CIFAR-10
# (tests/benchmarks/RESULTS.md), for all data.
_WEIGHT_OF_A_SPACE = 4 / 3
# The total variance of the last stage; that of the other spaces is 1.
_LAST_STAGE = 2.0
# So many directions of most variance are shortened, by this power of their variance.
_DIRECTIONS = 64
_POWER = 1 / 16
# Vectors of so many numbers are rounded to 4 bits: over many numbers the errors of rounding average out, and the AUROC
# is as with 8 (tests/benchmarks/RESULTS.md). Shorter ones are rounded to 8.
_WIDE = 256
_LEVELS = 127
_LEVELS_WIDE = 7
# One level of 4 bits, in root mean squares of a vector: what is longer than 7 of them is cut off.
_STEP_WIDE = 0.55


class NearestNeighbors(Score):
    """Geometric mean of the distances to the ``neighbors`` nearest in-domain vectors.

    A vector holds all spaces that deep features offer side by side: the last stage and its spatial standard deviations,
    block-normalised; and of the pre-logits and of their spatial standard deviations the square root, brought to length
    1 (their lengths and sparsity tell most, so nothing is subtracted). Each space is centred and brought to a total
    variance of 1, the last stage to 2. In-domain images differ most in a few directions, where a distance says least.
    So the distance is |(C + v I)^(-1/16) (x - y)|, up to a factor, with the covariance C of the vectors and the mean v
    of its eigenvalues: the exponent is 0 for Euclidean and 1/2 for Mahalanobis distances. Only the directions of most
    variance are shortened; for the others the factor is about the same.

    The mean over the first neighbours says more than the k-th alone (Sun et al., ICML 2022): it looks at the density
    near the image at several scales. Vectors are kept as whole numbers with a scale each: of 8 bits, and where they are
    long of 4. The state dict holds two of the latter in a byte.

    Parameters
    ----------
    layout : FeatureLayout
    options : Options
        ``rows`` vectors are kept.

    Attributes
    ----------
    vectors : Tensor of shape (rows, width), int8
    scales : Tensor of shape (rows, 1)
    mean : Tensor of shape (width,)
        Of the spaces side by side.
    stretch : Tensor of shape (spaces,)
        What each space is multiplied with.
    directions : Tensor of shape (width, directions)
        Orthogonal; the square of the length of each is the share of a vector along it that is taken away. They are
        saved with 8 bits.
    steps : Tensor of shape (directions,)
        What the numbers of each direction are multiples of.
    """

    log_scale = True
    vectors: Tensor
    scales: Tensor
    mean: Tensor
    stretch: Tensor
    directions: Tensor
    steps: Tensor

    def __init__(self, layout: FeatureLayout, options: Options) -> None:
        super().__init__(layout)
        self.spaces = views(layout)
        self.widths = [sum(part.width for part in parts) for parts in _spaces(layout)]
        self.weight = _WEIGHT_OF_A_SPACE * len(self.spaces)
        self.k = min(options.neighbors, options.rows)
        self.backend = options.backend
        # in a tuple, so that a FAISS index is not taken for a submodule
        self._index: tuple[Index | CodedIndex, ...] = ()
        width = sum(self.widths)
        self.register_buffer("vectors", torch.zeros(options.rows, width, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(options.rows, 1))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("stretch", torch.ones(len(self.widths)))
        count = min(_DIRECTIONS, width)
        self.register_buffer("directions", torch.zeros(width, count))
        self.register_buffer("steps", torch.ones(count))
        self._in_pairs = width >= _WIDE and width % 2 == 0

    @torch.no_grad()
    def fit(self, features: Features, context: Context | None = None) -> Self:
        """Keep in-domain features (rows, D)."""
        rows = features[:].to(self.scales.device)
        self._fit_view(rows)
        self._keep(rows, slice(None))
        return self

    @torch.no_grad()
    def fit_further(
        self, older: Self, kept: np.ndarray, added: Features, bank: Features | None, context: Context | None = None
    ) -> Self:
        """Keep some of the older vectors as they are, and those of further rows; the older rows are not needed."""
        rows = torch.from_numpy(kept).to(older.scales.device)
        self.vectors[: len(kept)] = older.vectors[rows]
        self.scales[: len(kept)] = older.scales[rows]
        for name in ("mean", "stretch", "directions", "steps"):
            getattr(self, name).copy_(getattr(older, name))
        if len(added):
            self._keep(added[:].to(self.scales.device), slice(len(kept), None))
        return self

    def _fit_view(self, features: Tensor) -> None:
        """Set what :meth:`view` does to vectors, from in-domain rows (n, D)."""
        vectors = self._side_by_side(features)
        self.mean.copy_(vectors.mean(0))
        centred = (vectors - self.mean).split(self.widths, dim=1)
        total = torch.stack([part.square().sum(1).mean() for part in centred])
        wanted = torch.ones_like(total)
        wanted[0] = _LAST_STAGE
        self.stretch.copy_(torch.where(total > 0, (wanted / total).sqrt(), 1.0))

        width, count = self.directions.shape
        directions, variances = _principal(self._scaled(vectors), min(count, len(features)))
        mean_variance = float(wanted[total > 0].sum() / width) or 1.0
        shortened = (1 + variances / mean_variance) ** -_POWER
        directions = directions * (1 - shortened).sqrt()
        self.directions.zero_()
        self.steps.fill_(1.0)
        self.steps[: len(variances)] = directions.abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny) / _LEVELS
        # as they are saved
        self.directions[:, : len(variances)] = directions
        self.directions.copy_((self.directions / self.steps).round() * self.steps)

    def _keep(self, features: Tensor, place: slice) -> None:
        """Round the vectors of rows (n, D), and put them in their place."""
        vectors = self.view(features)
        smallest = torch.finfo(torch.float32).tiny
        if self._in_pairs:
            levels = _LEVELS_WIDE
            scales = _STEP_WIDE * vectors.square().mean(1, keepdim=True).sqrt().clamp_min(smallest)
        else:
            levels = _LEVELS
            scales = vectors.abs().amax(1, keepdim=True).clamp_min(smallest) / levels
        self.vectors[place] = (vectors / scales).round().clamp(-levels, levels).to(torch.int8)
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
        vectors = self._scaled(self._side_by_side(features))
        return vectors - (vectors @ self.directions) @ self.directions.T

    def _side_by_side(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> all spaces, as they are (B, width)."""
        return torch.cat([space(features) for space in self.spaces], dim=1)

    def _scaled(self, vectors: Tensor) -> Tensor:
        """Spaces side by side (B, width) -> the same centred, each of its total variance (B, width)."""
        parts = zip((vectors - self.mean).split(self.widths, dim=1), self.stretch, strict=True)
        return torch.cat([part * stretch for part, stretch in parts], dim=1)

    def search_coded(self) -> None:
        """From now on search by tensor operations alone, exactly, whatever the backend; for an export."""
        index = CodedIndex(self.vectors, self.scales)
        self.index = index  # a submodule, so that its tensors are found
        self._index = (index,)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "directions"] = (self.directions / self.steps).round().to(torch.int8)
        if self._in_pairs:
            destination[prefix + "vectors"] = _paired(self.vectors)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # the state dict is a copy that load_state_dict has made
        directions, vectors, steps = (state_dict.get(prefix + name) for name in ("directions", "vectors", "steps"))
        if directions is not None and steps is not None and directions.dtype == torch.int8:
            state_dict[prefix + "directions"] = directions * steps
        if self._in_pairs and vectors is not None and vectors.dtype == torch.uint8:
            state_dict[prefix + "vectors"] = _unpaired(vectors)
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
    return [NearestNeighbors(layout, options)]


def views(layout: FeatureLayout) -> list[Callable[[Tensor], Tensor]]:
    """Rows of features (B, D) -> vectors (B, width) of each space that neighbours are searched in."""
    return [functools.partial(_view, layout, parts) for parts in _spaces(layout)]


def _view(layout: FeatureLayout, parts: Sequence[Part], features: Tensor) -> Tensor:
    """Rows of features (B, D) -> vectors of one space (B, width)."""
    vectors = layout.take(features, parts)
    if parts[0].layer == PRE_LOGITS:
        return F.normalize(vectors.sign() * vectors.abs().sqrt(), dim=1)
    return block_normalise(vectors, [part.width for part in parts])


def _principal(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centred vectors (n, width) -> their directions of most variance, of length 1 (width, count), and the variances.

    By random projections, always the same ones (Halko et al., SIAM Review 2011).
    """
    from sklearn.utils.extmath import randomized_svd

    _, lengths, directions = randomized_svd(vectors.cpu().numpy(), count, n_iter=4, random_state=0)
    variances = torch.from_numpy(lengths).square() / len(vectors)
    return torch.from_numpy(directions.T.copy()).to(vectors), variances.to(vectors)


def _spaces(layout: FeatureLayout) -> list[list[Part]]:
    """What the vectors of each space are made of."""
    last = [layout.last_stage, layout.spatial_std(layout.last_stage)]
    spaces = [[part for part in last if part is not None]]
    if layout.pre_logits is not None:
        std = layout.spatial_std(layout.pre_logits)
        spaces += [[part] for part in (layout.pre_logits, std) if part is not None]
    return spaces
