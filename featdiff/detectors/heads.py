"""The fitted middle of the pipeline: features -> noise -> denoise -> residual -> fuse, as one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..denoisers import LFDN, LayerwiseLFDN
from ..features import LOGITS, PRE_LOGITS, block_normalise
from ..fusion import Fusion, log_statistics, log_z, weighted_sum
from ..noise import add_noise, draw_noise, make_scheduler
from ..reconstruct import reconstruct
from ..residuals import likelihood_regret, mfsim, mse
from ..taps import SPREAD
from .banks import Banks
from .logit_heads import LogitHeads

#: Scores that come from reconstructions alone.
DIFFUSION = ("layerwise", "mse", "mfsim", "lr")
#: Scores that can be asked for.
HEADS = ("fused", *DIFFUSION)

# Set once, on sets far from and near to CIFAR-10 (README, "Measured"): a balance of the two, the same for all data.
_LAYER_EXPONENT = 0.75
_DIFFUSION_WEIGHT = 0.75


class FusedHeads(nn.Module):
    """Diffusion and neighbours in one score; its state dict is what a saved detector holds.

    ``diffusion`` reconstructs the stages, ``banks`` look up neighbours of deep features, ``logits`` asks a classifier's
    own logits, where that is wanted. Each of the heads ``layerwise``, ``knn_<space>`` ... and ``energy`` ... becomes a
    z-score (of a distance: of its logarithm) among held-out in-domain images (``mean`` and ``deviation`` (heads,)), and
    ``fusion`` joins them.

    Parameters
    ----------
    columns : mapping of names to slices
        Where the vectors lie: :attr:`featdiff.features.FeatureExtractor.columns`.
    neighbors : int
        Neighbours that count; 0 does without them.
    bank_rows : int
        Vectors in each bank.
    fusion, backend : str
        See :class:`featdiff.fusion.Fusion` and :func:`featdiff.neighbors.make_index`.
    logit_heads : some of :data:`featdiff.detectors.logit_heads.LOGIT_HEADS`
    diffusion : further arguments of :class:`DiffusionHeads`
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        columns: Mapping[str, slice],
        *,
        neighbors: int,
        bank_rows: int,
        fusion: str,
        backend: str,
        logit_heads: Sequence[str] = (),
        **diffusion: Any,
    ) -> None:
        super().__init__()
        layers = [name for name in columns if not name.endswith(SPREAD) and name != LOGITS]
        stages = [name for name in layers if name != PRE_LOGITS]
        self.diffusion = DiffusionHeads([columns[name].stop - columns[name].start for name in stages], **diffusion)
        self._stage_columns = [i for name in stages for i in range(columns[name].start, columns[name].stop)]
        self.banks = Banks(columns, bank_rows, neighbors, backend) if neighbors else None
        self.layers = [*stages, *(name for name in layers if self.banks and name == PRE_LOGITS)]
        self.logits = LogitHeads(logit_heads, columns) if logit_heads else None
        self.names = ["layerwise", *(self.banks.names if self.banks else []), *logit_heads]
        weights = [_DIFFUSION_WEIGHT, *(1.0 for _ in self.names[1:])]
        self.fusion = Fusion(len(self.names), fusion, weights)
        self.register_buffer("mean", torch.zeros(len(self.names)))
        self.register_buffer("deviation", torch.ones(len(self.names)))
        self.requires_grad_(False).eval()

    def stages(self, features: Tensor) -> Tensor:
        """Rows of an extractor (B, D) -> what the denoiser works on: block-normalised stages (B, sum of widths)."""
        return self.diffusion.normalised(self.pooled(features))

    def pooled(self, features: Tensor) -> Tensor:
        """Rows of an extractor (B, D) -> the stages as they are: what ``diffusion`` takes."""
        return features[:, self._stage_columns]

    def fill_banks(self, features: Tensor) -> None:
        """Give the banks their in-domain features (bank_rows, D); nothing to do without neighbours."""
        if self.banks is not None:
            self.banks.fit(features)

    @torch.inference_mode()
    def fit_statistics(self, features: Tensor) -> None:
        """Set all means and deviations from held-out in-domain features (N, D)."""
        with full_precision(self.mean):
            self.diffusion.fit_statistics(self.pooled(features))
            raw = torch.cat([self._raw(rows, ("layerwise",))[0] for rows in features.split(1024)])
            self.mean.copy_(raw.mean(0))
            self.deviation.copy_(raw.std(0, correction=0).clamp_min(0.05))
            self.fusion.fit(self._z(raw))

    @torch.inference_mode()
    def forward(self, features: Tensor, names: Sequence[str] = HEADS) -> tuple[dict[str, Tensor], Tensor]:
        """Rows of an extractor (B, D) -> ({name: (B,)}, layer scores (B, L)); higher = more OOD.

        ``fused`` joins the heads; asked for, it brings each ``knn_<space>`` along: the geometric mean of distances, and
        the heads that look at logits.
        The score of layer ``pre_logits`` is its neighbours', in standard deviations of its logarithm.
        """
        with full_precision(self.mean):
            raw, out, layers = self._raw(features, (*names, "layerwise"))
            z = self._z(raw)
            if "layerwise" not in names:
                del out["layerwise"]
            if "fused" in names:
                out = {"fused": self.fusion(z)} | out
                apart = {name: raw[:, i] for i, name in enumerate(self.names) if i}
                out |= {name: score.exp() if name.startswith("knn_") else score for name, score in apart.items()}
            if PRE_LOGITS in self.layers:
                layers = torch.cat([layers, z[:, [self.names.index(f"knn_{PRE_LOGITS}")]]], dim=1)
        return out, layers

    def _raw(self, features: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """What is standardised, (B, heads): the diffusion score, logarithms of distances, and scores of logits."""
        out, layers = self.diffusion(self.pooled(features), names)
        raw = out["layerwise"][:, None]
        if self.banks is not None:
            raw = torch.cat([raw, self.banks(features).log()], dim=1)
        if self.logits is not None:
            raw = torch.cat([raw, self.logits(features.to(raw.device))], dim=1)
        return raw, out, layers

    def _z(self, raw: Tensor) -> Tensor:
        return (raw - self.mean) / self.deviation


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
