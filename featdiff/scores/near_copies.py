"""Images among themselves: which are near-copies of each other, and which are odd.

Bursts, video frames and pictures of one part are near-copies. On both sides of a split they make false-alarm rates
wrong; in an audit they hide each other. No labels are needed: in a set of independent images, the nearest image is not
much nearer than the twentieth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.groups import connected
from .fusion import log
from .neighbors import make_index
from .registry import Features

# A split by chance is not to be trusted if so many images have near-copies, and it would give more false alarms than
# this where 5 % are asked for.
_MANY = 1 / 3
_TOLERATED = 0.1
# Two images are near-copies if they are nearer than a share of the distance to the 20th neighbour of either, or, since
# a long burst holds the 20th, too, of that to the quarter of all images. For the 20th the share is at most this:
_NEAR = 0.75
_RANK = 20
_FAR_SHARE = 0.25
# In m dimensions, the distance to the K-th of independent neighbours grows as K ** (1 / m). Photographs have 15 to 40;
# a share that would hold in 12 is careful.
_MOST_DIMENSIONS = 12
# Where there are fewer dimensions, near neighbours need not be copies: of independent images in m dimensions,
# (d_1 / d_K) ** m is below this number / K with about this probability.
_CHANCE = 0.2
# Nearer than this share of the median distance is the same, but for rounding. (Where all are copies, so is the 20th.)
_SAME = 1e-5
# Ranks, and shares of all images, between which the growth of distances tells the dimension.
_SLOPES = ((5, 20), (16, 64))
_FAR_SLOPES = ((0.125, 0.5), (0.5, 0.9))
# Neighbours that are looked at; more of one burst change nothing.
_NEIGHBORS = 64
# Fewer images have no nearest one that is much nearer than others.
_FEWEST = 4
# Nearest images whose distances are compared to estimate false alarms.
_SCORED = 5
# So many odd images that are alike must not hide each other: a tenth of all.
_ODD_SHARE = 0.1
# Images to which all are compared to find the odd ones.
_REFERENCE = 2000
# Images to which the distance of the quarter is estimated, and pairs for the scale of a space.
_SAMPLE = 1000
# Numbers of a vector after projection: distances keep within 2 to 4 %.
_WIDE, _NARROW = 1024, 256
_MANY_IMAGES = 20_000
# Numbers of a block of the matrix of distances.
_BLOCK = 1 << 25

#: Rows of features (B, D) -> vectors of one space in which neighbours are searched (B, width).
View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class NearCopies:
    """What :func:`find_near_copies` finds out about N images.

    Attributes
    ----------
    groups : ndarray of shape (N,) of int
        Number of the group of near-copies that each image belongs to, 0 .. groups - 1; most may be alone in theirs.
    copied : float
        Share of the images that have a near-copy.
    nearest : ndarray of shape (N,) of int
        The nearest image outside the own group; -1 if all images are in one group.
    false_alarms : float
        Estimate of the false-alarm rate that a split by chance would give where 5 % are asked for: of the images, this
        share is farther from all other groups than 95 % are from all other images.
    """

    groups: np.ndarray
    copied: float
    nearest: np.ndarray
    false_alarms: float

    @property
    def spoil_a_split(self) -> bool:
        """Whether a split by chance would give false alarms at twice the rate that is asked for, or more."""
        return self.copied >= _MANY and self.false_alarms >= _TOLERATED


def find_near_copies(features: Features, views: Sequence[View]) -> NearCopies:
    """Look for near-copies in a set.

    Parameters
    ----------
    features : Features
        Rows (N, D) of different images. Among fewer than four, nothing is a near-copy.
    views : sequence of callable
        Spaces in which distances are measured; each counts alike.

    Returns
    -------
    NearCopies
    """
    if len(features) < _FEWEST:
        alone = np.arange(len(features))
        nearest = nearest_outside(features, views, alone) if len(alone) > 1 else np.array([-1])
        return NearCopies(alone, 0.0, nearest, 0.0)

    vectors = _joint_vectors(features, views)
    distances, indices = _nearest(vectors, min(_NEIGHBORS, len(vectors) - 1))
    groups = _linked(vectors, distances, indices)
    copied = float((np.bincount(groups)[groups] > 1).mean())

    among_all = log(distances[:, :_SCORED]).mean(1).numpy()
    among_others, nearest = _outside(vectors, distances, indices, groups)
    limit = np.quantile(among_all, 0.95)
    return NearCopies(groups, copied, nearest, float((among_others > limit).mean()))


def nearest_outside(features: Features, views: Sequence[View], groups: np.ndarray) -> np.ndarray:
    """The nearest image outside the own group.

    Parameters
    ----------
    features : Features
        Rows (N, D) of different images.
    views : sequence of callable
        Spaces in which distances are measured; each counts alike.
    groups : ndarray of shape (N,) of int
        Group of each image.

    Returns
    -------
    ndarray of shape (N,) of int
        -1 if all images are in one group.
    """
    vectors = _joint_vectors(features, views)
    distances, indices = _nearest(vectors, min(_NEIGHBORS, len(vectors) - 1))
    return _outside(vectors, distances, indices, groups)[1]


@torch.inference_mode()
def oddness(features: Features, views: Sequence[View], groups: np.ndarray) -> np.ndarray:
    """How far each image of a set lies from the others, its own group left out.

    In each space, the mean logarithm of the distances to the nearest tenth of all, so that odd images that are alike
    do not hide each other; brought to median 0 and a spread of 1 for the bulk of the images (1.4826 times the median
    absolute deviation), summed over the spaces, and brought to the same scale again. Distances are measured to at most
    2,000 images, chosen at random. A group of more than a tenth of all is not left out: it is what is normal.

    Parameters
    ----------
    features : Features
        Rows (N, D) of different images.
    views : sequence of callable
        Spaces in which distances are measured; each counts alike.
    groups : ndarray of shape (N,) of int
        Group of each image.

    Returns
    -------
    ndarray of shape (N,)
        Higher = odder, 0 +- 1 for the bulk.
    """
    n = len(features)
    chosen = np.sort(np.random.default_rng(0).permutation(n)[:_REFERENCE])
    wanted = max(1, round(_ODD_SHARE * len(chosen)))
    sizes = np.bincount(groups)[groups]
    # below 0 stand images that are groups of their own
    labels = torch.from_numpy(np.where(sizes <= max(1, _ODD_SHARE * n), groups, -1 - np.arange(n)))

    total = np.zeros(n)
    for view in views:
        reference = view(features[chosen])
        logs = []
        start = 0
        for chunk in features.chunks():
            distances = torch.cdist(view(chunk), reference)
            own = labels[start : start + len(chunk), None] == labels[torch.from_numpy(chosen)]
            nearest = distances.masked_fill(own, torch.inf).topk(wanted, largest=False).values
            finite = torch.isfinite(nearest)
            logs.append(torch.where(finite, log(nearest), 0).sum(1) / finite.sum(1).clamp_min(1))
            start += len(chunk)
        total += _robust(torch.cat(logs).double().numpy())
    return _robust(total)


def _robust(values: np.ndarray) -> np.ndarray:
    """Median 0, and a median absolute deviation that a normal distribution of standard deviation 1 has."""
    centred = values - np.median(values)
    spread = 1.4826 * np.median(np.abs(centred))
    return np.asarray(centred / spread if spread > 0 else centred)


def _joint_vectors(features: Features, views: Sequence[View]) -> Tensor:
    """Vectors of all spaces side by side, each with a median distance of 1, projected at random (N, <= 1024)."""
    n = len(features)
    rng = np.random.default_rng(0)
    some = features[np.sort(rng.permutation(n)[:_SAMPLE])]

    scales = []
    widths = []
    for view in views:
        vectors = view(some)
        distances = torch.pdist(vectors)
        positive = distances[distances > 0]  # of a set of copies, most are 0
        scales.append(positive.median() if len(positive) else torch.tensor(1.0))
        widths.append(vectors.shape[1])

    width = _WIDE if n <= _MANY_IMAGES else _NARROW
    projection = None
    if sum(widths) > width:
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(sum(widths), width, generator=generator) / width**0.5

    joint = torch.empty(n, min(width, sum(widths)))
    start = 0
    for chunk in features.chunks():
        vectors = torch.cat([view(chunk) / scale for view, scale in zip(views, scales, strict=True)], dim=1)
        joint[start : start + len(chunk)] = vectors if projection is None else vectors @ projection
        start += len(chunk)
    return joint


def _nearest(vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest other vectors of each: distances ascending, and indices, both (N, k)."""
    distances, indices = make_index(vectors, "auto").search(vectors, k + 1)
    others = indices != torch.arange(len(vectors))[:, None]
    others[others.all(1), -1] = False  # hidden among copies of itself
    return distances[others].unflatten(0, (-1, k)), indices[others].unflatten(0, (-1, k))


def _linked(vectors: Tensor, distances: Tensor, indices: Tensor) -> np.ndarray:
    """Groups of near-copies, and of near-copies of these, and so on: a number for each image (N,)."""
    n, k = distances.shape
    rank = max(1, min(_RANK, round(_FAR_SHARE * n), k))
    far = _distance_to_share(vectors, _FAR_SHARE)
    dimension = _dimension(distances, vectors)
    near_limit = _share_at(rank, dimension) * distances[:, rank - 1]
    far_limit = _share_at(_FAR_SHARE * n, dimension) * far

    linked = distances < _SAME
    for limit in (near_limit, far_limit):
        linked |= distances < torch.minimum(limit[:, None], limit[indices])
    rows, columns = linked.nonzero().T.numpy()
    return connected(n, rows, indices.numpy()[rows, columns])


def _share_at(rank: float, dimension: float) -> float:
    """Near-copies are nearer than this share of the distance to the neighbour of this rank."""
    careful = _NEAR * (_RANK / rank) ** (1 / _MOST_DIMENSIONS)
    return float(min(careful, (_CHANCE / rank) ** (1 / dimension)))


def _dimension(distances: Tensor, vectors: Tensor) -> float:
    """The intrinsic dimension, from how distances grow with the rank.

    A burst is a jump in this growth, which looks like few dimensions between two ranks, and not between others. So the
    largest of several estimates is taken.
    """
    growths: list[tuple[float, Tensor]] = []
    for low, high in _SLOPES:
        if high <= distances.shape[1]:
            growths.append((high / low, log(distances[:, high - 1]) - log(distances[:, low - 1])))
    some = vectors[:: max(1, len(vectors) // _SAMPLE)]
    for share, larger in _FAR_SLOPES:
        near = _distance_to_share(vectors, share, some)
        far = _distance_to_share(vectors, larger, some)
        growths.append((larger / share, log(far) - log(near)))
    return max(math.log(ranks) / max(float(growth.median()), 1e-3) for ranks, growth in growths)


def _distance_to_share(vectors: Tensor, share: float, queries: Tensor | None = None) -> Tensor:
    """The distance of each query (all vectors, by default) within which a share of all vectors lie, from a sample."""
    chosen = np.random.default_rng(0).permutation(len(vectors))[:_SAMPLE]
    sample = vectors[torch.from_numpy(np.sort(chosen))]
    queries = vectors if queries is None else queries
    return torch.cat([torch.cdist(part, sample).quantile(share, dim=1) for part in queries.split(1024)])


def _outside(vectors: Tensor, distances: Tensor, indices: Tensor, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean log distance to the nearest vectors of other groups, and the nearest of them: (N,) each."""
    numbers = torch.from_numpy(groups)
    wanted = min(_SCORED, distances.shape[1])
    hidden = numbers[indices] == numbers[:, None]
    distances, order = distances.masked_fill(hidden, torch.inf).topk(wanted, largest=False)
    nearest = indices.gather(1, order)

    # large groups: all that were looked at may belong to the own one
    missing = (~torch.isfinite(distances).all(1)).nonzero().flatten()
    for rows in missing.split(max(1, _BLOCK // len(vectors))):
        block = torch.cdist(vectors[rows], vectors)
        block.masked_fill_(numbers[rows][:, None] == numbers, torch.inf)
        found = block.topk(wanted, largest=False)
        distances[rows] = found.values
        nearest[rows] = found.indices

    finite = torch.isfinite(distances)
    logs = torch.where(finite, log(distances), 0).sum(1) / finite.sum(1).clamp_min(1)
    alone = ~finite.any(1)  # all images are of one group
    logs[alone] = torch.inf
    nearest[alone, 0] = -1
    return logs.double().numpy(), nearest[:, 0].numpy()
