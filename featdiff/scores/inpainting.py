"""The fitted middle of LMD: image -> mask -> inpaint -> distance -> aggregate, as one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.reconstruction import inpaint
from ..diffusion.schedules import make_sampler, noise_sources
from ..diffusion.unet import PixelDenoiser
from ..exceptions import UsageError, did_you_mean
from ..features.pixels import Pixels

#: How repetitions become one distance. LMD takes the median.
AGGREGATES = ("median", "mean", "min", "max")


class PixelHeads(nn.Module):
    """U-Net, masks, distances and in-domain statistics; its state dict is what a saved detector holds.

    ``masks`` (R, 1, H, W) bool, one for each repetition; ``mean`` and ``deviation`` (D,) of log distances.

    Parameters
    ----------
    pixels : Pixels
        What rows mean.
    denoiser, scheduler
        The network, and the diffusers schedule it was trained on.
    masks : (R, H, W) bool, True = known
    distances : modules by name, in order; the first one decides the score
    sampler, steps, resamplings
        See :func:`featdiff.diffusion.schedules.make_sampler` and :func:`featdiff.diffusion.reconstruction.inpaint`.
    aggregate : one of ``AGGREGATES``
    seed : decides the noise, together with the images and the repetition
    """

    masks: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        pixels: Pixels,
        denoiser: PixelDenoiser,
        scheduler: Any,
        masks: Tensor,
        distances: Mapping[str, nn.Module],
        *,
        sampler: str,
        steps: int,
        resamplings: int,
        aggregate: str,
        seed: int,
    ) -> None:
        super().__init__()
        if aggregate not in AGGREGATES:
            hint = did_you_mean(str(aggregate), list(AGGREGATES))
            raise UsageError(f"unknown aggregate {aggregate!r}{hint}; known: {', '.join(AGGREGATES)}")
        if resamplings > 1 and sampler == "dpm++":
            raise UsageError("dpm++ looks back on earlier steps, so that it cannot resample: choose ddim or ddpm")
        self.pixels, self.denoiser, self.scheduler = pixels, denoiser, scheduler
        self.distances = nn.ModuleDict(distances)
        self.sampler = make_sampler(sampler, scheduler, steps)
        self.resamplings, self.aggregate, self.seed = resamplings, aggregate, seed
        self.register_buffer("masks", masks[:, None])
        self.register_buffer("mean", torch.zeros(len(distances)))
        self.register_buffer("deviation", torch.ones(len(distances)))
        self.requires_grad_(False).eval()

    @property
    def names(self) -> list[str]:
        """Names of the distances."""
        return list(self.distances)

    def fit_statistics(self, distances: Tensor) -> None:
        """Set ``mean`` and ``deviation`` from distances of the images that calibrate (N, D)."""
        logs = _log(distances.to(self.mean))
        std = logs.std(0, correction=0)
        self.mean.copy_(logs.mean(0))
        self.deviation.copy_(torch.where(std > 0, std, 1.0))

    def scores(self, distances: Tensor) -> Tensor:
        """Distances (B, n), the first n of ``names`` -> z-scores of their logarithms (B, n), higher = more OOD."""
        n = distances.shape[1]
        return (_log(distances.to(self.mean)) - self.mean[:n]) / self.deviation[:n]

    @torch.inference_mode()
    def forward(self, rows: Tensor, names: Sequence[str] = ()) -> Tensor:
        """Rows of pixels (B, D) uint8 -> (B, distances) aggregated over repetitions; default: all distances."""
        x, inpainted = self.inpainted(rows)
        chosen = names or self.names
        found = [self._aggregated(self._measured(self.distances[name], x, inpainted)) for name in chosen]
        return torch.stack(found, dim=1)

    @torch.inference_mode()
    def inpainted(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B, D) uint8 -> images (B, C, H, W), and what became of them at each repetition (B, R, C, H, W)."""
        repetitions = len(self.masks)
        sources = noise_sources([row.cpu().numpy().tobytes() for row in rows], repetitions, self.seed)
        x = self.pixels.images(rows.to(self.masks.device))
        repeated = x.repeat_interleave(repetitions, dim=0)
        known = self.masks.repeat(len(x), 1, 1, 1)
        x_hat = inpaint(self.denoiser, self.sampler, repeated, known, sources, self.resamplings)
        return x, x_hat.clamp(-1, 1).unflatten(0, (len(x), repetitions))

    @torch.inference_mode()
    def shown(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows (B, D) -> images, masked (unknown pixels grey), inpainted (each (B, C, H, W)) and scores (B,).

        The inpainting is the repetition whose distance is nearest to the image's.
        """
        x, inpainted = self.inpainted(rows)
        distances = self._measured(self.distances[self.names[0]], x, inpainted)
        whole = self._aggregated(distances)
        nearest = (distances - whole[:, None]).abs().argmin(1)
        masked = torch.where(self.masks[nearest], x, 0.0)
        return x, masked, inpainted[torch.arange(len(x)), nearest], self.scores(whole[:, None])[:, 0]

    @staticmethod
    def _measured(distance: nn.Module, x: Tensor, inpainted: Tensor) -> Tensor:
        """(B, C, H, W), (B, R, C, H, W) -> (B, R)."""
        b, r = inpainted.shape[:2]
        found: Tensor = distance(x.repeat_interleave(r, dim=0), inpainted.flatten(0, 1))
        return found.unflatten(0, (b, r))

    def _aggregated(self, distances: Tensor) -> Tensor:
        if self.aggregate == "median":
            return distances.quantile(0.5, dim=1)  # of an even number the middle of the two, not the lower one
        reduced: Tensor = getattr(distances, f"a{self.aggregate}" if self.aggregate != "mean" else "mean")(1)
        return reduced


def _log(distances: Tensor) -> Tensor:
    return distances.clamp_min(torch.finfo(torch.float32).eps).log()
