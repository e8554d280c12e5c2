"""The fitted middle of the pipeline: features -> noise -> denoise -> residual -> fuse, as one module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..denoisers import LFDN, LayerwiseLFDN
from ..features import block_normalise
from ..fusion import log_statistics, log_z, weighted_sum
from ..noise import draw_noise, make_scheduler
from ..reconstruct import reconstruct
from ..residuals import likelihood_regret, mfsim, mse

#: Scores that can be asked for; all come from the same reconstructions.
HEADS = ("layerwise", "mse", "mfsim", "lr")


class DiffusionHeads(nn.Module):
    """Denoiser, stored noise and in-domain statistics; its state dict is what a saved detector holds.

    ``denoiser`` is the trained network, ``early`` the same one after the first epoch (for likelihood regret),
    ``noise`` (start times, draws, sum of widths), ``mean`` and ``deviation`` (start times, layers) of log errors.
    Arguments as for :class:`featdiff.Detector`.
    """

    noise: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        widths: Sequence[int],
        *,
        joint: bool,
        hidden_ratio: float,
        hidden_max: int,
        blocks: int,
        timesteps: int,
        start_times: Sequence[int],
        draws: int,
        stride: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.widths, self.start_times, self.stride = tuple(widths), tuple(start_times), stride
        self.scheduler = make_scheduler(timesteps)
        with torch.random.fork_rng(devices=[]):  # seeded initial weights; the global random state is left alone
            torch.default_generator.manual_seed(seed)
            self.denoiser, self.early = (
                LFDN(width=sum(widths), hidden=hidden_max, blocks=blocks, time_width=hidden_max // 2)
                if joint
                else LayerwiseLFDN(widths=list(widths), hidden_ratio=hidden_ratio, hidden_max=hidden_max, blocks=blocks)
                for _ in range(2)
            )
        noise = draw_noise(len(start_times) * draws, sum(widths), seed)
        self.register_buffer("noise", noise.unflatten(0, (len(start_times), draws)))
        self.register_buffer("mean", torch.zeros(len(start_times), len(widths)))
        self.register_buffer("deviation", torch.ones(len(start_times), len(widths)))
        self.requires_grad_(False).eval()

    def normalised(self, features: Tensor) -> Tensor:
        """Pooled features (B, D) -> block-normalised, on this module's device."""
        return block_normalise(features.to(self.noise.device), self.widths)

    @torch.inference_mode()
    def fit_statistics(self, features: Tensor) -> None:
        """Set ``mean`` and ``deviation`` from held-out in-domain features (N, D)."""
        errors = torch.cat([self.errors(self.normalised(rows)) for rows in features.split(1024)])
        mean, deviation = log_statistics(errors)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    @torch.inference_mode()
    def forward(self, features: Tensor, names: Sequence[str] = HEADS) -> tuple[dict[str, Tensor], Tensor]:
        """Pooled features (B, D) -> ({name: (B,)}, layer scores (B, L)); higher = more OOD.

        Layer scores are log errors in in-domain standard deviations. ``layerwise`` sums them with weights sqrt(C_l):
        an error summed over C_l channels shows a shift sqrt(C_l) times as clearly as one channel does. ``mse``,
        ``mfsim`` and ``lr`` are DLSR's scores.
        """
        x = self.normalised(features)
        late = self.reconstructions(self.denoiser, x)
        layers = log_z(_stacked_mse(x, late, self.widths), self.mean, self.deviation).mean(1)
        channels = torch.tensor(self.widths, device=x.device, dtype=x.dtype)
        share = channels / channels.sum()  # mean over all channels, as in the paper
        out: dict[str, Tensor] = {}
        if "layerwise" in names:
            out["layerwise"] = weighted_sum(layers, channels.sqrt())
        if "mse" in names:
            out["mse"] = (_stacked_mse(x, late, self.widths) @ share).mean(1)
        if "mfsim" in names:
            out["mfsim"] = torch.stack([mfsim(x, x_hat, self.widths).mean(1) for x_hat in late]).mean(0)
        if "lr" in names:
            early = self.reconstructions(self.early, x)
            pairs = zip(late, early, strict=True)
            out["lr"] = torch.stack([likelihood_regret(x, a, b, self.widths) @ share for a, b in pairs]).mean(0)
        return out, layers

    def errors(self, x: Tensor) -> Tensor:
        """Normalised features (B, D) -> mean squared error of each start time and layer (B, T, L)."""
        return _stacked_mse(x, self.reconstructions(self.denoiser, x), self.widths)

    def reconstructions(self, denoiser: nn.Module, x: Tensor) -> list[Tensor]:
        """One reconstruction (B, D) for each start time, averaged over the stored draws.

        Averaging *before* comparing keeps the luck of the draws out of the error: what stays is what the denoiser
        gets wrong about this image. (DLSR compares each draw.)
        """
        pairs = zip(self.start_times, self.noise, strict=True)
        return [reconstruct(denoiser, self.scheduler, x, draws, start, self.stride).mean(1) for start, draws in pairs]


def _stacked_mse(x: Tensor, reconstructions: list[Tensor], widths: Sequence[int]) -> Tensor:
    return torch.stack([mse(x, x_hat, widths) for x_hat in reconstructions], dim=1)
