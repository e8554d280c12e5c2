"""Outliers by the detector's own denoisers: in-domain rows pushed along what these cannot explain of them.

A denoiser takes a row to where in-domain rows lie; the other way round is away from them, along directions in which
real features vary. (Own method; noise alone, as in :mod:`featdiff.outliers.boundary`, mostly leaves in directions no
image ever takes.)
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
    from ..scores.fused import FusedHeads

#: How far, in times of what is left unexplained. Started from held-out CIFAR-10 images, a detector of the default
#: settings flags 13, 33, 67, 94 and 100 % at strengths of 0.1, 0.25, 0.5, 1 and 2: here differences show best.
STRENGTH = 0.5
#: Where denoising begins, as shares of the noise schedule; each gives so many candidates, means over so many draws.
START_TIMES, ESTIMATES, DRAWS = (0.25, 0.5, 0.75), 2, 2
#: Layers without a denoiser are explained by the mean of so many rows, drawn from twice as many nearest ones.
NEIGHBORS = 5


class Explained:
    """Pushes rows of one class away from what explains them: ``Explained(...)(seed)`` is one round.

    For a layer with a denoiser, x (mean 0, variance 1) is noised with fresh draws and denoised in one step; x_hat is
    the mean over draws. For other blocks, x has length 1 and x_hat is the mean of near rows of the class. The outlier
    is x + strength * (x - x_hat), with the mean and deviation, or the length, that its row had there.

    Parameters
    ----------
    heads : FusedHeads
        Of a fitted detector.
    space : Space
    rows : (N, D)
        The class, as the extractor gives it.
    points : (P,) row numbers where outliers start
    k : int
        The farthest candidates by their k-th neighbour in the class are kept.
    strength : float
    backend : str
        See :func:`featdiff.scores.neighbors.make_index`.
    keep : int
        Outliers of each point.

    Raises
    ------
    UsageError
        ``strength`` not above 0.
    """

    def __init__(
        self,
        heads: FusedHeads,
        space: Space,
        rows: Tensor,
        points: Tensor,
        k: int,
        strength: float = STRENGTH,
        backend: str = "auto",
        keep: int = KEEP,
    ) -> None:
        check_strength(strength)
        self.space, self.k, self.strength, self.keep = space, k, strength, keep
        self._diffusion = heads.diffusion
        self._own, self._vectors = rows[points][:, : space.width], space.join(rows)
        self._x = heads.stages(self._own).to(rows)
        self._unit: dict[Part, Tensor] = {}
        self._near: dict[Part, Tensor] = {}
        for part in space.parts:
            if part.kind is not Kind.MEAN:
                unit = F.normalize(rows[:, part.columns], dim=1)
                self._unit[part] = unit[points]
                self._near[part] = unit[_nearest(unit, points, backend)]

    @torch.inference_mode()
    def __call__(self, seed: int) -> Tensor:
        """(P, keep, ``space.width``) rows, the farthest first."""
        made = self.candidates(seed)
        joined = self.space.join(made.flatten(0, 1))
        distances = kth_distances(joined, self._vectors, self.k).unflatten(0, made.shape[:2])
        best = distances.topk(self.keep, dim=1).indices
        return made.gather(1, best[..., None].expand(-1, -1, made.shape[2]))

    @torch.inference_mode()
    def candidates(self, seed: int) -> Tensor:
        """(P, len(START_TIMES) * ESTIMATES, ``space.width``) rows; a point's do not depend on the other points."""
        made = self._own[:, None].repeat(1, len(START_TIMES) * ESTIMATES, 1)
        pushed = self._pushed_stages(seed).split(list(self._diffusion.widths), dim=2)
        for part, layer in zip(self.space.layout.stages, pushed, strict=True):
            own = self._own[:, None, part.columns]
            layer = layer * own.std(2, correction=0, keepdim=True) + own.mean(2, keepdim=True)
            made[:, :, part.columns] = self.space.clamp(part, layer)
        chosen = self._shares(seed).to(made)
        for part, unit in self._unit.items():
            x_hat = torch.einsum("cm,pmw->pcw", chosen, self._near[part])
            own = self._own[:, None, part.columns]
            made[:, :, part.columns] = self.space.restore_part(part, self._push(unit, x_hat), own)
        return made

    def _push(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """(P, W) and (P, C, W) -> (P, C, W)."""
        return x[:, None] + self.strength * (x[:, None] - x_hat)

    def _pushed_stages(self, seed: int) -> Tensor:
        """Layers with a denoiser, of mean 0 and variance 1: (P, C, sum of widths)."""
        noise = draw_noise(len(START_TIMES) * ESTIMATES * DRAWS, self._x.shape[1], seed)
        found = []
        for share, drawn in zip(START_TIMES, noise.chunk(len(START_TIMES)), strict=True):
            start = round(share * (len(self._diffusion.scheduler.alphas_cumprod) - 1))
            x_hat = self._reconstructed(drawn.to(self._x), start)
            found.append(self._push(self._x, x_hat.unflatten(1, (ESTIMATES, DRAWS)).mean(2)))
        pushed = torch.cat(found, 1)
        return self._diffusion.normalised(pushed.flatten(0, 1)).to(pushed).unflatten(0, pushed.shape[:2])

    def _reconstructed(self, noise: Tensor, start: int) -> Tensor:
        device = self._diffusion.noise.device
        x, drawn = self._x.to(device), noise.to(device)
        return reconstruct(self._diffusion.denoiser, self._diffusion.scheduler, x, drawn, start).to(self._x)

    def _shares(self, seed: int) -> Tensor:
        """What each near row counts in the mean of each candidate, (C, near rows)."""
        near = min(2 * NEIGHBORS, len(self._vectors) - 1)
        source = torch.Generator().manual_seed(seed)
        order = torch.rand(len(START_TIMES) * ESTIMATES, near, generator=source).argsort(1)
        return (order < -(-near // 2)).float() / -(-near // 2)


def check_strength(strength: float) -> None:
    """Refuse a ``strength`` not above 0 (``UsageError``)."""
    if not 0 < strength < float("inf"):
        raise UsageError(f"strength must be a number above 0, not {strength}")


def _nearest(vectors: Tensor, points: Tensor, backend: str) -> Tensor:
    """(N, W) -> row numbers (P, m) of the nearest other rows, where N allows m = 2 * ``NEIGHBORS``."""
    wanted = min(2 * NEIGHBORS, len(vectors) - 1)
    found = make_index(vectors, backend).search(vectors[points], wanted + 1)[1]
    itself = (found == points[:, None]).int()  # not always the first: there may be copies
    return found.gather(1, itself.argsort(dim=1, stable=True)[:, :wanted])
