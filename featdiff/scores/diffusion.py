"""The diffusion scores: denoiser, stored noise and in-domain statistics."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..diffusion.lfdn import LFDN, LayerwiseLFDN
from ..diffusion.reconstruction import reconstruct
from ..diffusion.schedules import add_noise, draw_noise, make_scheduler
from ..features.layout import block_normalise
from .fusion import log_statistics, log_z, weighted_sum
from .residuals import likelihood_regret, mfsim, mse

#: Scores that come from reconstructions alone.
DIFFUSION = ("layerwise", "mse", "mfsim", "lr")
# Set once, on sets far from and near to CIFAR-10 (README, "Measured"): a balance of the two, the same for all data.
_LAYER_EXPONENT = 0.75


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Work in float32 on this tensor's device, whatever autocast the caller is in: reconstruction errors are small."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class DiffusionHeads(nn.Module):
    """Denoiser, stored noise and in-domain statistics.

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
    def forward(self, features: Tensor, names: Sequence[str] = DIFFUSION) -> tuple[dict[str, Tensor], Tensor]:
        """Pooled features (B, D) -> ({name: (B,)}, layer scores (B, L)); higher = more OOD.

        Layer scores are log errors in in-domain standard deviations. ``layerwise`` sums them with weights
        C_l ** 0.75, between what is best far (sqrt(C_l), as if layers were independent) and near (C_l, as in ``mse``)
        from the training images. ``mse``, ``mfsim`` and ``lr`` are DLSR's scores.
        """
        x = self.normalised(features)
        late = self.reconstructions(self.denoiser, x)
        errors = _stacked_mse(x, late, self.widths)
        layers = log_z(errors, self.mean, self.deviation).mean(1)
        channels = torch.tensor(self.widths, device=x.device, dtype=x.dtype)
        share = channels / channels.sum()  # mean over all channels, as in the paper
        out: dict[str, Tensor] = {}
        if "layerwise" in names:
            out["layerwise"] = weighted_sum(layers, channels**_LAYER_EXPONENT)
        if "mse" in names:
            out["mse"] = (errors @ share).mean(1)
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
        if self.stride is None:  # one step for each: all start times and draws in one pass
            times, draws = self.noise.shape[:2]
            t = torch.tensor(self.start_times, device=x.device).repeat_interleave(draws)
            drawn = self.noise.flatten(0, 1)[:, None]
            x_hat = denoiser(add_noise(self.scheduler, x[None], drawn, t), t)  # (times x draws, B, D)
            return list(x_hat.unflatten(0, (times, draws)).mean(1))
        pairs = zip(self.start_times, self.noise, strict=True)
        return [reconstruct(denoiser, self.scheduler, x, draws, start, self.stride).mean(1) for start, draws in pairs]


def _stacked_mse(x: Tensor, reconstructions: list[Tensor], widths: Sequence[int]) -> Tensor:
    return torch.stack([mse(x, x_hat, widths) for x_hat in reconstructions], dim=1)
