"""The diffusion scores: how badly a denoiser that knows in-domain features reconstructs an image's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Self

import torch
from torch import Tensor, nn

from ..diffusion.fit import fit_denoiser
from ..diffusion.lfdn import LFDN, LayerwiseLFDN
from ..diffusion.reconstruction import reconstruct
from ..diffusion.schedules import add_noise, draw_noise, make_scheduler
from ..diffusion.training import ReadSamples, TrainingState
from ..exceptions import UsageError
from ..features.layout import FeatureLayout, block_normalise
from ..runtime.randomness import seeded
from .fusion import log_statistics, log_z, weighted_sum
from .registry import Context, Features, Score
from .residuals import likelihood_regret, mfsim, mse

# Set once, on sets far from and near to CIFAR-10 (tests/benchmarks/RESULTS.md): a balance of the two, for all data.
_LAYER_EXPONENT = 0.75
# Stages of the rows that train are kept in memory up to this size (about 130,000 images of the default backbone).
_MOST_BYTES = 1 << 28


class Diffusion(nn.Module):
    """Denoiser, stored noise and in-domain statistics: what all diffusion scores share.

    Parameters
    ----------
    layout : FeatureLayout
        Whose stages are reconstructed.
    joint : bool
        One denoiser for all stages together, in place of one for each.
    hidden_ratio, hidden_max, blocks
        Size of the denoisers; see :class:`featdiff.Detector`.
    timesteps : int
        Length of the noise schedule.
    start_times : sequence of int
        Times to which features are noised.
    draws : int
        Noise samples for each start time.
    stride : int or None
        Step of a DDIM path; None: one step.
    seed : int
        Decides the initial weights and the noise.

    Attributes
    ----------
    denoiser, early : nn.Module
        The trained network, and the same after its first epoch (for likelihood regret).
    noise : Tensor of shape (start times, draws, sum of widths)
        Drawn once and shared by all images.
    mean, deviation : Tensors of shape (start times, stages)
        Of log errors of held-out images.
    """

    noise: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        layout: FeatureLayout,
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
        self.layout = layout
        self.widths = tuple(part.width for part in layout.stages)
        self.start_times = tuple(start_times)
        self.stride = stride
        self.scheduler = make_scheduler(timesteps)

        def network() -> nn.Module:
            if joint:
                return LFDN(width=sum(self.widths), hidden=hidden_max, blocks=blocks, time_width=hidden_max // 2)
            sizes = {"hidden_ratio": hidden_ratio, "hidden_max": hidden_max, "blocks": blocks}
            return LayerwiseLFDN(widths=list(self.widths), **sizes)

        with seeded(seed):
            self.denoiser = network()
            self.early = network()

        noise = draw_noise(len(start_times) * draws, sum(self.widths), seed)
        self.register_buffer("noise", noise.unflatten(0, (len(start_times), draws)))
        self.register_buffer("mean", torch.zeros(len(start_times), len(self.widths)))
        self.register_buffer("deviation", torch.ones(len(start_times), len(self.widths)))
        self.requires_grad_(False).eval()

    # ---- fit ----

    def fit(self, context: Context) -> TrainingState:
        """Train the denoiser, or take it from the checkpoint, and set the statistics from the validation rows."""
        validation = self.stages(context.validation[:])
        with full_precision(self.noise):
            state = fit_denoiser(
                self.denoiser,
                self.scheduler,
                self._reader(context.training),
                len(context.training),
                validation,
                context.recipe,
                context.seed,
                context.checkpoint,
                context.progress,
            )
            self.early.load_state_dict(state.early)
            with torch.inference_mode():
                self.fit_statistics(torch.cat([self.errors(part) for part in validation.split(1024)]))
        return state

    def _reader(self, training: Features) -> ReadSamples:
        """Indices of rows -> their stages, block-normalised: from memory, if those of all rows fit there."""
        if len(training) * self.noise.shape[-1] * self.noise.itemsize > _MOST_BYTES:
            return lambda indices: self.stages(training[indices])

        @cache
        def stages() -> Tensor:  # read when the first step is made: a finished training needs none
            return torch.cat([self.stages(part) for part in training.chunks()])

        return lambda indices: stages()[torch.from_numpy(indices).to(self.noise.device)]

    @torch.inference_mode()
    def fit_statistics(self, errors: Tensor) -> None:
        """Set ``mean`` and ``deviation`` from errors of held-out images (N, start times, stages)."""
        mean, deviation = log_statistics(errors)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    # ---- features -> errors ----

    def stages(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> their stages, block-normalised, on this module's device (B, sum of widths)."""
        return self.normalised(self.layout.take(features, self.layout.stages))

    def normalised(self, stages: Tensor) -> Tensor:
        """Stages side by side (B, sum of widths) -> block-normalised, on this module's device."""
        return block_normalise(stages.to(self.noise.device), self.widths)

    def reconstructions(self, denoiser: nn.Module, x: Tensor) -> list[Tensor]:
        """One reconstruction (B, D) for each start time, averaged over the stored noise samples.

        Averaging *before* comparing removes sampling variance from the error: what stays is what the denoiser gets
        wrong about this image. (DLSR compares each sample.)
        """
        if self.stride is None:  # all start times and samples in one pass
            times, draws = self.noise.shape[:2]
            t = torch.tensor(self.start_times, device=x.device).repeat_interleave(draws)
            noise = self.noise.flatten(0, 1)[:, None]
            x_hat = denoiser(add_noise(self.scheduler, x[None], noise, t), t)  # (times x draws, B, D)
            return list(x_hat.unflatten(0, (times, draws)).mean(1))

        x_hats = []
        for start, noise in zip(self.start_times, self.noise, strict=True):
            samples = reconstruct(denoiser, self.scheduler, x, noise, start, self.stride)
            x_hats.append(samples.mean(1))
        return x_hats

    def errors(self, x: Tensor) -> Tensor:
        """Normalised stages (B, D) -> mean squared error of each start time and stage (B, T, L)."""
        x_hats = self.reconstructions(self.denoiser, x)
        return torch.stack([mse(x, x_hat, self.widths) for x_hat in x_hats], dim=1)

    def layer_scores(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> log error of each stage in in-domain standard deviations (B, L)."""
        return self.standardised(self.errors(self.stages(features)))

    def standardised(self, errors: Tensor) -> Tensor:
        """Errors (B, start times, stages) -> of each stage in in-domain standard deviations of the log (B, L)."""
        return log_z(errors, self.mean, self.deviation).mean(1)

    def join(self, layer_scores: Tensor) -> Tensor:
        """Scores of the stages (B, L) -> one score (B,), higher = more OOD.

        Weights are C_l ** 0.75, between what is best far from the training images (sqrt(C_l), as if layers were
        independent) and near (C_l, as in ``mse``).
        """
        return weighted_sum(layer_scores, self.layer_weights(layer_scores))

    def layer_weights(self, like: Tensor) -> Tensor:
        """Weight of each stage in :meth:`join` (L,), before they are brought to length 1."""
        channels = torch.tensor(self.widths, device=like.device, dtype=like.dtype)
        return channels**_LAYER_EXPONENT

    def shares(self, like: Tensor) -> Tensor:
        """Share of all channels that each stage has (L,)."""
        channels = torch.tensor(self.widths, device=like.device, dtype=like.dtype)
        return channels / channels.sum()


class DiffusionScore(Score):
    """One of the scores that a :class:`Diffusion` gives; it keeps nothing of its own.

    Parameters
    ----------
    model : Diffusion
        Shared by several scores, and not a submodule of any.
    """

    def __init__(self, model: Diffusion) -> None:
        super().__init__(model.layout)
        self._shared = (model,)

    @property
    def model(self) -> Diffusion:
        """Denoiser, noise and statistics."""
        return self._shared[0]

    def fit(self, features: Features, context: Context | None = None) -> Self:
        """Train the shared denoiser on the context's training features."""
        if context is None:
            raise UsageError("a diffusion score is trained: it needs a context that says how")
        self.model.fit(context)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the shared model, but for the early network."""
        return _bytes(self.model) - _bytes(self.model.early)


class Layerwise(DiffusionScore):
    """Log errors of the stages in in-domain standard deviations, summed with weights; featdiff's own."""

    name = "layerwise"

    @torch.inference_mode()
    def forward(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> (B,), higher = more OOD."""
        return self.model.join(self.model.layer_scores(features))


class MeanSquaredError(DiffusionScore):
    """DLSR's MSE (arXiv 2411.10701): mean squared error over all channels, >= 0."""

    name = "mse"

    @torch.inference_mode()
    def forward(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> (B,), higher = more OOD."""
        errors = self.model.errors(self.model.stages(features))
        return (errors @ self.model.shares(errors)).mean(1)


class CosineDistance(DiffusionScore):
    """DLSR's MFsim (arXiv 2411.10701): 1 - cosine of a stage and its reconstruction, mean over stages, in [0, 2]."""

    name = "mfsim"

    @torch.inference_mode()
    def forward(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> (B,), higher = more OOD."""
        model = self.model
        x = model.stages(features)
        x_hats = model.reconstructions(model.denoiser, x)
        return torch.stack([mfsim(x, x_hat, model.widths).mean(1) for x_hat in x_hats]).mean(0)


class LikelihoodRegret(DiffusionScore):
    """DLSR's LR (arXiv 2411.10701): the error at the end of training less that after its first epoch."""

    name = "lr"

    @torch.inference_mode()
    def forward(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> (B,), higher = more OOD."""
        model = self.model
        x = model.stages(features)
        late = model.reconstructions(model.denoiser, x)
        early = model.reconstructions(model.early, x)

        shares = model.shares(x)
        regrets = [likelihood_regret(x, a, b, model.widths) @ shares for a, b in zip(late, early, strict=True)]
        return torch.stack(regrets).mean(0)

    @property
    def nbytes(self) -> int:
        """Bytes of the shared model, with the early network."""
        return _bytes(self.model)


#: The diffusion scores by name.
DIFFUSION: dict[str, type[DiffusionScore]] = {
    score.name: score for score in (Layerwise, MeanSquaredError, CosineDistance, LikelihoodRegret)
}


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Work in float32 on this tensor's device, whatever autocast the caller is in: reconstruction errors are small."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())
