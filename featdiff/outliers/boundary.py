"""Outliers by noise around the in-domain rows that lie farthest from the others of their class, as NPOS draws them.

Sources: NPOS (Tao et al., ICLR 2023) and Dream-OOD (Du et al., NeurIPS 2023); OAL (arXiv 2406.16525) uses the same
outliers. A class is taken by itself, and all distances are those of :class:`featdiff.outliers.space.Space`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..exceptions import UsageError
from .space import Space

#: As published: the k-th neighbour of 500 images; where there are fewer, the same share of them.
K, SHARE = 300, 0.6
#: As published: 50 of 500 images are boundary.
SELECT = 0.1
#: Candidates of each boundary row and round, of which the farthest are kept. (Published: 1,500, of which 2.)
CANDIDATES, KEEP = 32, 2

_BLOCK = 1 << 24  # distances held at once, about 64 MB


def default_k(rows: int) -> int:
    """Which neighbour's distance counts, in a class of so many rows."""
    return max(1, min(K, int(SHARE * rows)))


def check_neighbours(k: int | None, select: int | None = None) -> None:
    """Refuse a ``k`` or ``select`` below 1 (``UsageError``)."""
    for name, number in (("k", k), ("select", select)):
        if number is not None and number < 1:
            raise UsageError(f"{name} must be a whole number above 0, not {number}")


def check_noise(sigma: float | None, candidates: int, keep: int = KEEP) -> None:
    """Refuse a ``sigma`` not above 0, and fewer candidates than are kept (``UsageError``)."""
    if sigma is not None and not 0 < sigma < float("inf"):
        raise UsageError(f"sigma must be a number above 0, not {sigma}")
    if not 1 <= keep <= candidates:
        raise UsageError(f"of {candidates} candidates {keep} cannot be kept: ask for {keep} candidates or more")


def check_classes(counts: np.ndarray, k: int | None, classes: list[str]) -> None:
    """Refuse classes of so few rows that outliers cannot be made beside each (``k``: None for the default).

    Raises
    ------
    UsageError
        A ``k`` below 1, or a class with fewer than 3 rows, or without a k-th neighbour.
    """
    check_neighbours(k)
    smallest = int(counts.argmin())
    named = f"class {classes[smallest]!r} has {counts[smallest]} different readable images"
    if counts[smallest] < 3:
        raise UsageError(f"{named}, and at least 3 are needed: add some, leave it out, or make all images one class")
    if k is not None and k >= counts[smallest]:
        raise UsageError(f"{named}, too few for neighbour {k}: ask for k = {counts[smallest] - 1} or less, or add some")


def kth_distances(queries: Tensor, vectors: Tensor, k: int) -> Tensor:
    """Joined vectors (Q, D) and (N, D) -> (Q,): distance of each query to the k-th nearest of the vectors.

    By the matrix product: :mod:`featdiff.scores.neighbors` measures each neighbour once more, to the last digit, which
    for hundreds of wide ones takes a hundred times as long.
    """
    at_once = max(1, _BLOCK // len(vectors))
    return torch.cat([_kth(part @ vectors.T, part, vectors, k) for part in queries.split(at_once)])


def _kth(products: Tensor, queries: Tensor, vectors: Tensor, k: int) -> Tensor:
    squares = queries.square().sum(1, keepdim=True) + vectors.square().sum(1) - 2 * products
    return squares.kthvalue(k, dim=1).values.clamp_min(0).sqrt()


def own_kth_distances(vectors: Tensor, k: int) -> Tensor:
    """Joined vectors (N, D) -> (N,): distance to the k-th nearest of the *other* vectors.

    Raises
    ------
    UsageError
        No k-th other vector.
    """
    if not 1 <= k < len(vectors):
        raise UsageError(f"k must lie in 1 .. {len(vectors) - 1} (vectors but one), not {k}")
    return kth_distances(vectors, vectors, k + 1)  # the nearest of all is the vector itself


def boundary_points(vectors: Tensor, labels: np.ndarray, k: int, select: int | None = None) -> np.ndarray:
    """The rows of each class that lie farthest from the others of it.

    Parameters
    ----------
    vectors : (N, D)
        Joined vectors.
    labels : (N,) integers
    k : int
        The neighbour, within the class, whose distance counts.
    select : int, optional
        Rows of each class (all, if it has no more); default: a tenth of the class.

    Returns
    -------
    (B,) row numbers
        Class by class, the farthest first.

    Raises
    ------
    UsageError
        A class without a k-th neighbour, or ``select`` below 1.
    """
    check_neighbours(k, select)
    found = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        distances = own_kth_distances(vectors[torch.from_numpy(rows).to(vectors.device)], k)
        count = min(len(rows), select or -(-len(rows) // round(1 / SELECT)))
        found.append(rows[distances.topk(count).indices.cpu().numpy()])
    return np.concatenate(found)


class Beyond:
    """Draws outliers around boundary rows of one class: ``Beyond(...)(seed)`` is one round.

    Candidates of a boundary vector b are b + sigma * noise, each block brought to length 1 again. All boundary vectors
    share the noise, so products with the class come from those of b and those of the noise, and no candidate is
    multiplied with every row.

    Parameters
    ----------
    space : Space
    rows : (N, D)
        The class, as the extractor gives it.
    points : (P,) row numbers where outliers start
    k : int
        The farthest candidates by their k-th neighbour are kept.
    sigma : float, optional
        Deviation of the noise for each number of a block of length 1 (0.07 as published, for 768 numbers). Default:
        so much that the noise in a block is about as long as b's own distance to its k-th neighbour there.
    candidates, keep : int
        Of each point.

    Raises
    ------
    UsageError
        ``sigma`` not above 0, or fewer candidates than are kept.
    """

    def __init__(
        self,
        space: Space,
        rows: Tensor,
        points: Tensor,
        k: int,
        sigma: float | None = None,
        candidates: int = CANDIDATES,
        keep: int = KEEP,
    ) -> None:
        check_noise(sigma, candidates, keep)
        self.space, self.rows, self.points, self.k = space, rows, points, k
        self.candidates, self.keep = candidates, keep
        self._sigma = sigma
        self._vectors = space.join(rows)
        self._unit = self._vectors * len(space.parts) ** 0.5

    @torch.inference_mode()
    def __call__(self, seed: int) -> Tensor:
        """(P, keep, ``space.width``) rows, the farthest first."""
        source = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.candidates, self.space.width, generator=source).to(self.rows)
        at_once = max(1, _BLOCK // (len(self.rows) * self.candidates))
        return torch.cat([self._around(points, noise) for points in self.points.split(at_once)])

    def _around(self, points: Tensor, noise: Tensor) -> Tensor:
        sigmas, lengths, own, drawn = [], [], [], []
        for unit, e in zip(self.space.split(self._unit), self.space.split(noise), strict=True):
            b = unit[points]
            sigma = self._deviation(b, unit)[:, None]
            squares = b.square().sum(1, keepdim=True) + 2 * sigma * (b @ e.T) + sigma.square() * e.square().sum(1)
            lengths.append(squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt())
            sigmas.append(sigma)
            own.append(b @ unit.T)
            drawn.append(e @ unit.T)
        share, sigma = 1 / torch.stack(lengths, -1), torch.stack(sigmas, -1)  # (P, C, blocks), (P, 1, blocks)
        products = torch.einsum("pcb,bpn->pcn", share, torch.stack(own))
        products += torch.einsum("pcb,bcn->pcn", share * sigma, torch.stack(drawn))
        # candidates have length 1: what is left of their squared distances orders them alike
        distances = self._vectors.square().sum(1) - 2 * products / len(self.space.parts)
        best = distances.kthvalue(self.k, dim=2).values.topk(self.keep, dim=1).indices
        spread = sigma.repeat_interleave(torch.tensor(self.space.widths, device=sigma.device), dim=2)
        found = self._unit[points][:, None] + spread * noise[best]
        like = self.rows[points].repeat_interleave(self.keep, dim=0)
        return self.space.restore(found.flatten(0, 1), like).unflatten(0, (-1, self.keep))

    def _deviation(self, b: Tensor, unit: Tensor) -> Tensor:
        """Of the noise around vectors b (P, W) of one block: (P,)."""
        if self._sigma is not None:
            return b.new_full((len(b),), self._sigma)
        return kth_distances(b, unit, self.k + 1) / unit.shape[1] ** 0.5  # b itself is the nearest


def draw(rounds: Callable[[int], Tensor], n: int, seeds: np.random.SeedSequence) -> tuple[Tensor, Tensor]:
    """Repeat rounds with fresh noise until there are ``n`` outliers.

    Parameters
    ----------
    rounds : callable
        A seed -> rows (P, keep, D), the farthest of each point first.

    Returns
    -------
    (n, D) rows, and (n,) which point each started from. All points' first ones come before the second ones.
    """
    made: list[Tensor] = []
    starts: list[Tensor] = []
    while sum(map(len, made)) < n:
        (seed,) = seeds.spawn(1)[0].generate_state(1, np.uint64)
        found = rounds(int(seed >> np.uint64(1)))
        made.append(found.transpose(0, 1).flatten(0, 1))
        starts.append(torch.arange(len(found), device=found.device).repeat(found.shape[1]))
    return torch.cat(made)[:n], torch.cat(starts)[:n]
