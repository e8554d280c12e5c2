"""Outliers by noise around the boundary of a class, as in NPOS.

In: in-domain features of one class. Out: outlier features, made by adding Gaussian noise to the images of the class
that lie farthest from the others.

Sources: NPOS (Tao et al., ICLR 2023) and Dream-OOD (Du et al., NeurIPS 2023); OAL (arXiv 2406.16525) uses the same
outliers. Classes are processed one at a time, and all distances are those of :class:`featdiff.outliers.space.Space`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..exceptions import UsageError
from .space import Space

#: Which neighbour's distance decides, as published for 500 images; smaller classes use the same share of their images.
K = 300
SHARE = 0.6
#: Share of a class that is its boundary. (As published: 50 of 500 images.)
SELECT = 0.1
#: Candidates for each boundary image and round, and how many of them are kept. (As published: 1,500 and 2.)
CANDIDATES = 32
KEEP = 2

_BLOCK = 1 << 24  # distances computed at once, about 64 MB


def default_k(count: int) -> int:
    """Which neighbour's distance decides in a class of ``count`` images."""
    return max(1, min(K, int(SHARE * count)))


def check_neighbours(k: int | None, select: int | None = None) -> None:
    """Refuse a ``k`` or ``select`` below 1 (``UsageError``)."""
    for name, number in (("k", k), ("select", select)):
        if number is not None and number < 1:
            raise UsageError(f"{name} must be a whole number above 0, not {number}", argument=name)


def check_noise(sigma: float | None, candidates: int, keep: int = KEEP) -> None:
    """Refuse a ``sigma`` that is not above 0, and fewer candidates than are kept (``UsageError``)."""
    if sigma is not None and not 0 < sigma < float("inf"):
        raise UsageError(f"sigma must be a number above 0, not {sigma}", argument="sigma")
    if not 1 <= keep <= candidates:
        raise UsageError(
            f"of {candidates} candidates {keep} cannot be kept: ask for {keep} candidates or more",
            argument="candidates",
        )


def check_classes(counts: np.ndarray, k: int | None, classes: list[str]) -> None:
    """Refuse classes with too few images to make outliers from.

    Parameters
    ----------
    counts : ndarray of shape (classes,)
        Different readable images of each class.
    k : int or None
        Which neighbour's distance decides; None for the default of each class.
    classes : list of str
        Names, for the message.

    Raises
    ------
    UsageError
        A ``k`` below 1, or a class with fewer than 3 images or without a k-th neighbour.
    """
    check_neighbours(k)
    smallest = int(counts.argmin())
    reason = f"class {classes[smallest]!r} has {counts[smallest]} different readable images"
    if counts[smallest] < 3:
        raise UsageError(f"{reason}, and at least 3 are needed: add some, leave it out, or make all images one class")
    if k is not None and k >= counts[smallest]:
        raise UsageError(
            f"{reason}, too few for neighbour {k}: ask for k = {counts[smallest] - 1} or less, or add some",
            argument="k",
        )


def kth_distances(queries: Tensor, vectors: Tensor, k: int) -> Tensor:
    """Distance of each query to its k-th nearest vector.

    Computed by a matrix product. :mod:`featdiff.scores.neighbors` recomputes each neighbour's distance to full
    precision, which takes a hundred times as long for hundreds of wide neighbours.

    Parameters
    ----------
    queries : Tensor of shape (Q, D)
    vectors : Tensor of shape (N, D)
    k : int
        1 to N.

    Returns
    -------
    Tensor of shape (Q,)

    Examples
    --------
    >>> vectors = torch.tensor([[0.0], [1.0], [5.0]])
    >>> kth_distances(torch.tensor([[0.0]]), vectors, k=2).tolist()
    [1.0]
    """
    queries_at_once = max(1, _BLOCK // len(vectors))
    distances = []
    for block in queries.split(queries_at_once):
        products = block @ vectors.T
        squares = block.square().sum(1, keepdim=True) + vectors.square().sum(1) - 2 * products
        distances.append(squares.kthvalue(k, dim=1).values.clamp_min(0).sqrt())
    return torch.cat(distances)


def leave_one_out_distances(vectors: Tensor, k: int) -> Tensor:
    """Distance of each vector to the k-th nearest of the *other* vectors.

    Parameters
    ----------
    vectors : Tensor of shape (N, D)
    k : int
        1 to N - 1.

    Returns
    -------
    Tensor of shape (N,)

    Raises
    ------
    UsageError
        There is no k-th other vector.
    """
    if not 1 <= k < len(vectors):
        raise UsageError(f"k must lie in 1 .. {len(vectors) - 1} (vectors but one), not {k}", argument="k")
    return kth_distances(vectors, vectors, k + 1)  # the nearest of all is the vector itself


def boundary_points(vectors: Tensor, labels: np.ndarray, k: int, select: int | None = None) -> np.ndarray:
    """Find the images of each class that lie farthest from the others of that class.

    Parameters
    ----------
    vectors : Tensor of shape (N, D)
        Joined vectors; see :meth:`featdiff.outliers.space.Space.join`.
    labels : ndarray of int, shape (N,)
    k : int
        Which neighbour's distance, within the class, decides.
    select : int, optional
        How many images of each class to return (all, if it has fewer). Default: a tenth of the class.

    Returns
    -------
    ndarray of int, shape (B,)
        Indices into ``vectors``, class by class, the farthest first.

    Raises
    ------
    UsageError
        A class without a k-th neighbour, or ``select`` below 1.

    Examples
    --------
    >>> vectors = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    >>> boundary_points(vectors, np.zeros(4, dtype=int), k=1, select=1).tolist()
    [3]
    """
    check_neighbours(k, select)
    indices = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        distances = leave_one_out_distances(vectors[torch.from_numpy(members).to(vectors.device)], k)

        tenth = -(-len(members) // round(1 / SELECT))
        count = min(len(members), select or tenth)
        indices.append(members[distances.topk(count).indices.cpu().numpy()])
    return np.concatenate(indices)


class BoundaryNoise:
    """Draws outliers around boundary images of one class; ``BoundaryNoise(...)(seed)`` is one round.

    A candidate for a boundary vector b is b + sigma * noise, with each part scaled back to length 1. All boundary
    vectors share the noise. So the products of candidates and class vectors follow from those of b and those of the
    noise, and no candidate is multiplied with the whole class.

    Parameters
    ----------
    space : Space
        Where distances are measured.
    features : Tensor of shape (N, D)
        The class, as the extractor returns it.
    points : Tensor of int, shape (P,)
        Indices into ``features`` of the images to start from.
    k : int
        Candidates with the largest distance to their k-th neighbour are kept.
    sigma : float, optional
        Standard deviation of the noise on each number of a part of length 1 (as published: 0.07, for 768 numbers).
        Default: so large that the noise in a part is about as long as b's own distance to its k-th neighbour there.
    candidates : int, default 32
        Candidates for each point.
    keep : int, default 2
        Outliers for each point.

    Raises
    ------
    UsageError
        ``sigma`` is not above 0, or there are fewer candidates than are kept.

    Examples
    --------
    >>> from featdiff.features.layout import FeatureLayout
    >>> features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    >>> space = Space(FeatureLayout.of_stages({"layer1": 2, "layer2": 4}), features)
    >>> BoundaryNoise(space, features, torch.tensor([3, 7, 9]), k=5)(seed=0).shape
    torch.Size([3, 2, 6])
    """

    def __init__(
        self,
        space: Space,
        features: Tensor,
        points: Tensor,
        k: int,
        sigma: float | None = None,
        candidates: int = CANDIDATES,
        keep: int = KEEP,
    ) -> None:
        check_noise(sigma, candidates, keep)
        self.space = space
        self.features = features
        self.points = points
        self.k = k
        self.candidates = candidates
        self.keep = keep
        self._sigma = sigma
        self._vectors = space.join(features)
        self._unit = self._vectors * len(space.parts) ** 0.5  # every part has length 1

    @torch.inference_mode()
    def __call__(self, seed: int) -> Tensor:
        """Draw one round of outliers.

        Parameters
        ----------
        seed : int
            Decides the noise.

        Returns
        -------
        Tensor of shape (P, keep, ``space.width``)
            Features, the farthest of each point first.
        """
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.candidates, self.space.width, generator=generator).to(self.features)

        points_at_once = max(1, _BLOCK // (len(self.features) * self.candidates))
        return torch.cat([self._around(points, noise) for points in self.points.split(points_at_once)])

    def _around(self, points: Tensor, noise: Tensor) -> Tensor:
        """The outliers of some of the points."""
        distances, sigma = self._candidate_distances(points, noise)
        best = distances.topk(self.keep, dim=1).indices

        spread = sigma.repeat_interleave(torch.tensor(self.space.widths, device=sigma.device), dim=2)
        outliers = self._unit[points][:, None] + spread * noise[best]
        like = self.features[points].repeat_interleave(self.keep, dim=0)
        return self.space.restore(outliers.flatten(0, 1), like).unflatten(0, (-1, self.keep))

    def _candidate_distances(self, points: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """What orders the candidates by distance to their k-th neighbour (P, C), and sigma of each part (P, 1, parts).

        C is the number of candidates.
        """
        sigmas = []
        lengths = []
        boundary_products = []
        noise_products = []
        for unit, part_noise in zip(self.space.split(self._unit), self.space.split(noise), strict=True):
            boundary = unit[points]
            sigma = self._noise_std(boundary, unit)[:, None]
            # |b + sigma * noise|^2
            squares = (
                boundary.square().sum(1, keepdim=True)
                + 2 * sigma * (boundary @ part_noise.T)
                + sigma.square() * part_noise.square().sum(1)
            )
            lengths.append(squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt())
            sigmas.append(sigma)
            boundary_products.append(boundary @ unit.T)
            noise_products.append(part_noise @ unit.T)

        scale = 1 / torch.stack(lengths, -1)  # (P, C, parts)
        all_sigmas = torch.stack(sigmas, -1)  # (P, 1, parts)
        products = torch.einsum("pcb,bpn->pcn", scale, torch.stack(boundary_products))
        products += torch.einsum("pcb,bcn->pcn", scale * all_sigmas, torch.stack(noise_products))

        # candidates have length 1, so the rest of their squared distance gives the same order
        squared_distances = self._vectors.square().sum(1) - 2 * products / len(self.space.parts)
        return squared_distances.kthvalue(self.k, dim=2).values, all_sigmas

    def _noise_std(self, boundary: Tensor, unit: Tensor) -> Tensor:
        """Standard deviation of the noise around vectors (P, W) of one part -> (P,)."""
        if self._sigma is not None:
            return boundary.new_full((len(boundary),), self._sigma)
        return kth_distances(boundary, unit, self.k + 1) / unit.shape[1] ** 0.5  # the nearest is the vector itself


def draw_outliers(draw_round: Callable[[int], Tensor], n: int, seeds: np.random.SeedSequence) -> tuple[Tensor, Tensor]:
    """Repeat rounds with fresh noise until there are ``n`` outliers.

    Parameters
    ----------
    draw_round : callable
        Takes a seed, returns features (P, keep, D), the farthest of each point first; such as :class:`BoundaryNoise`.
    n : int
        Outliers to return.
    seeds : numpy.random.SeedSequence
        Spawned once for each round.

    Returns
    -------
    features : Tensor of shape (n, D)
        The first outlier of every point comes before the second ones.
    starts : Tensor of int, shape (n,)
        The point that each outlier started from.
    """
    features: list[Tensor] = []
    starts: list[Tensor] = []
    while sum(map(len, features)) < n:
        (seed,) = seeds.spawn(1)[0].generate_state(1, np.uint64)
        outliers = draw_round(int(seed >> np.uint64(1)))
        features.append(outliers.transpose(0, 1).flatten(0, 1))
        starts.append(torch.arange(len(outliers), device=outliers.device).repeat(outliers.shape[1]))
    return torch.cat(features)[:n], torch.cat(starts)[:n]
