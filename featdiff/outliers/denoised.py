"""Outliers made with the detector's own denoisers.

In: in-domain features of one class. Out: outlier features, pushed away from their denoised version.

A denoiser moves a feature vector to where in-domain features lie. The opposite direction leads away from them, and
along directions in which real features vary. (Our own method. Noise alone, as in :mod:`featdiff.outliers.boundary`,
mostly moves features in directions that no image ever takes.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.reconstruction import reconstruct
from ..diffusion.schedules import draw_noise
from ..exceptions import UsageError
from ..features.layout import Kind, Part
from ..scores.neighbors import make_index
from .boundary import KEEP, kth_distances
from .space import Space

if TYPE_CHECKING:
    from ..scores.fused import Heads

#: Length of the push, as a multiple of the residual. Of outliers that start from held-out CIFAR-10 images, a detector
#: with default settings flags 13, 33, 67, 94 and 100 % at 0.1, 0.25, 0.5, 1 and 2: differences show best at 0.5.
STRENGTH = 0.5
#: Where denoising starts, as shares of the noise schedule.
START_TIMES = (0.25, 0.5, 0.75)
#: Candidates for each start time, and noise samples averaged for each candidate.
ESTIMATES = 2
DRAWS = 2
#: Parts without a denoiser use the mean of this many neighbours, drawn from twice as many nearest ones.
NEIGHBORS = 5

_CANDIDATES = len(START_TIMES) * ESTIMATES


class DenoisedDirections:
    """Pushes features of one class away from their denoised version; ``DenoisedDirections(...)(seed)`` is one round.

    The outlier for features x is x + strength * (x - x_hat). For a layer with a denoiser, x has mean 0 and variance 1,
    and x_hat is its one-step reconstruction from fresh noise, averaged over noise samples; the result gets back the
    mean and standard deviation of the original. For other parts, x has length 1 and x_hat is the mean of near
    neighbours in the class; the result gets back the length of the original.

    Parameters
    ----------
    heads : Heads
        Of a fitted detector.
    space : Space
        Where distances are measured.
    features : Tensor of shape (N, D)
        The class, as the extractor returns it.
    points : Tensor of int, shape (P,)
        Indices into ``features`` of the images to start from.
    k : int
        Candidates with the largest distance to their k-th neighbour in the class are kept.
    strength : float, default 0.5
        Length of the push, as a multiple of x - x_hat.
    backend : str, default "auto"
        See :func:`featdiff.scores.neighbors.make_index`.
    keep : int, default 2
        Outliers for each point.

    Raises
    ------
    UsageError
        ``strength`` is not above 0.
    """

    def __init__(
        self,
        heads: Heads,
        space: Space,
        features: Tensor,
        points: Tensor,
        k: int,
        strength: float = STRENGTH,
        backend: str = "auto",
        keep: int = KEEP,
    ) -> None:
        check_strength(strength)
        self.space = space
        self.k = k
        self.strength = strength
        self.keep = keep
        self._diffusion = heads.diffusion
        self._vectors = space.join(features)
        self._start = features[points][:, : space.width]
        self._stages = heads.diffusion.stages(self._start).to(features)

        # parts without a denoiser: unit vectors of the points, and of their neighbours
        self._unit: dict[Part, Tensor] = {}
        self._neighbors: dict[Part, Tensor] = {}
        for part in space.parts:
            if part.kind is not Kind.MEAN:
                unit = F.normalize(features[:, part.columns], dim=1)
                self._unit[part] = unit[points]
                self._neighbors[part] = unit[_nearest(unit, points, backend)]

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
        candidates = self.candidates(seed)
        joined = self.space.join(candidates.flatten(0, 1))
        distances = kth_distances(joined, self._vectors, self.k).unflatten(0, candidates.shape[:2])
        best = distances.topk(self.keep, dim=1).indices
        return candidates.gather(1, best[..., None].expand(-1, -1, candidates.shape[2]))

    @torch.inference_mode()
    def candidates(self, seed: int) -> Tensor:
        """All candidates of one round; those of a point do not depend on the other points.

        Parameters
        ----------
        seed : int
            Decides the noise.

        Returns
        -------
        Tensor of shape (P, len(START_TIMES) * ESTIMATES, ``space.width``)
        """
        candidates = self._start[:, None].repeat(1, _CANDIDATES, 1)

        pushed = self._pushed_stages(seed).split(list(self._diffusion.widths), dim=2)
        for part, values in zip(self.space.layout.stages, pushed, strict=True):
            start = self._start[:, None, part.columns]
            values = values * start.std(2, correction=0, keepdim=True) + start.mean(2, keepdim=True)
            candidates[:, :, part.columns] = self.space.clamp(part, values)

        weights = self._neighbor_weights(seed).to(candidates)
        for part, unit in self._unit.items():
            x_hat = torch.einsum("cm,pmw->pcw", weights, self._neighbors[part])
            start = self._start[:, None, part.columns]
            candidates[:, :, part.columns] = self.space.restore_part(part, self._push(unit, x_hat), start)
        return candidates

    def _push(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """(P, W) and (P, C, W) -> (P, C, W)."""
        return x[:, None] + self.strength * (x[:, None] - x_hat)

    def _pushed_stages(self, seed: int) -> Tensor:
        """Outliers in the layers with a denoiser, of mean 0 and variance 1: (P, C, sum of widths)."""
        noise = draw_noise(_CANDIDATES * DRAWS, self._stages.shape[1], seed)
        pushed_parts = []
        for start_time, samples in zip(START_TIMES, noise.chunk(len(START_TIMES)), strict=True):
            start = round(start_time * (len(self._diffusion.scheduler.alphas_cumprod) - 1))
            x_hat = self._reconstructed(samples.to(self._stages), start)
            x_hat = x_hat.unflatten(1, (ESTIMATES, DRAWS)).mean(2)
            pushed_parts.append(self._push(self._stages, x_hat))

        pushed = torch.cat(pushed_parts, 1)
        return self._diffusion.normalised(pushed.flatten(0, 1)).to(pushed).unflatten(0, pushed.shape[:2])

    def _reconstructed(self, noise: Tensor, start: int) -> Tensor:
        """Denoised stages, one for each noise sample: (P, samples, sum of widths)."""
        device = self._diffusion.noise.device
        x = self._stages.to(device)
        return reconstruct(self._diffusion.denoiser, self._diffusion.scheduler, x, noise.to(device), start).to(
            self._stages
        )

    def _neighbor_weights(self, seed: int) -> Tensor:
        """Weight of each neighbour in the mean of each candidate: (C, neighbours)."""
        neighbors = min(2 * NEIGHBORS, len(self._vectors) - 1)
        chosen = -(-neighbors // 2)
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(_CANDIDATES, neighbors, generator=generator).argsort(1)
        return (order < chosen).float() / chosen


def check_strength(strength: float) -> None:
    """Refuse a ``strength`` that is not above 0 (``UsageError``)."""
    if not 0 < strength < float("inf"):
        raise UsageError(f"strength must be a number above 0, not {strength}", argument="strength")


def _nearest(vectors: Tensor, points: Tensor, backend: str) -> Tensor:
    """Indices (P, m) of the nearest other vectors of (N, W); m = 2 * ``NEIGHBORS``, or N - 1 if that is less."""
    count = min(2 * NEIGHBORS, len(vectors) - 1)
    indices = make_index(vectors, backend).search(vectors[points], count + 1)[1]
    is_point = (indices == points[:, None]).int()  # not always the first: there may be copies
    return indices.gather(1, is_point.argsort(dim=1, stable=True)[:, :count])
