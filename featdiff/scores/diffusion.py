"""The diffusion scores: how badly a denoiser that knows in-domain features reconstructs an image's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..diffusion.fit import fit_denoiser
from ..diffusion.lfdn import LFDN, LayerwiseLFDN
from ..diffusion.reconstruction import reconstruct
from ..diffusion.schedules import draw_noise, make_scheduler
from ..diffusion.training import ReadSamples, TrainingState
from ..exceptions import UsageError
from ..features.layout import FeatureLayout, block_normalise
from ..runtime.randomness import seeded
from .denoising import FixedDenoiser
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
    denoiser, early : LFDN or LayerwiseLFDN
        The trained network, and the same after its first epoch (for likelihood regret; None where it was not saved).
        Their weights are rounded to what float16 can hold, in which they are saved.
    noise : Tensor of shape (start times, draws, sum of widths)
        Drawn once and shared by all images.
    channels : Tensor of shape (stages,)
        Width of each stage.
    mean, deviation : Tensors of shape (start times, stages)
        Of log errors of held-out images.
    """

    noise: Tensor
    channels: Tensor
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

        def network() -> LFDN | LayerwiseLFDN:
            if joint:
                return LFDN(width=sum(self.widths), hidden=hidden_max, blocks=blocks, time_width=hidden_max // 2)
            return LayerwiseLFDN(self.widths, hidden_ratio=hidden_ratio, hidden_max=hidden_max, blocks=blocks)

        with seeded(seed):
            self.denoiser = network()
            self.early: LFDN | LayerwiseLFDN | None = network()
        self._prepared: dict[nn.Module, FixedDenoiser] = {}

        noise = draw_noise(len(start_times) * draws, sum(self.widths), seed)
        self.register_buffer("noise", noise.unflatten(0, (len(start_times), draws)))
        self.register_buffer("channels", torch.tensor(self.widths, dtype=torch.float32), persistent=False)
        self.register_buffer("mean", torch.zeros(len(start_times), len(self.widths)))
        self.register_buffer("deviation", torch.ones(len(start_times), len(self.widths)))
        self.register_state_dict_post_hook(_in_half)
        self.requires_grad_(False).eval()

    # ---- fit ----

    def fit(self, context: Context) -> TrainingState:
        """Train the denoiser, or take it from the checkpoint, and set the statistics from the validation rows."""
        state = self._train(context)
        if self.early is None:
            self.early = copy.deepcopy(self.denoiser)
        self.early.load_state_dict(state.early)
        _round_to_half(self.early)
        return state

    def fit_further(self, older: Diffusion, context: Context) -> TrainingState:
        """Train the denoiser of an older model on, from where it is; its early network stays as it is."""
        if older.early is None:
            self.early = None
        self.load_state_dict(older.state_dict())
        return self._train(context)

    def _train(self, context: Context) -> TrainingState:
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
            _round_to_half(self.denoiser)
            with torch.no_grad():
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

    @torch.no_grad()
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

    def reconstructions(self, denoiser: LFDN | LayerwiseLFDN, x: Tensor) -> Tensor:
        """One reconstruction for each start time (T, B, D), averaged over the stored noise samples.

        Averaging *before* comparing removes sampling variance from the error: what stays is what the denoiser gets
        wrong about this image. (DLSR compares each sample.)
        """
        if self.stride is None:  # all start times and samples in one pass
            return self._fixed(denoiser)(x)

        x_hats = []
        for start, noise in zip(self.start_times, self.noise, strict=True):
            samples = reconstruct(denoiser, self.scheduler, x, noise, start, self.stride)
            x_hats.append(samples.mean(1))
        return torch.stack(x_hats)

    def _fixed(self, denoiser: LFDN | LayerwiseLFDN) -> FixedDenoiser:
        """The denoiser at the start times, prepared at its first use and again when its weights have changed."""
        compiling = torch.compiler.is_compiling()  # then its tensors belong to a graph
        fixed = None if compiling else self._prepared.get(denoiser)
        if fixed is None or not fixed.is_current():
            fixed = FixedDenoiser(denoiser, self.scheduler, self.start_times, self.noise)
            if not compiling:
                self._prepared[denoiser] = fixed
        return fixed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._prepared.clear()  # they lie where the weights lay
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": {}}  # a copy has weights of its own

    def errors(self, x: Tensor) -> Tensor:
        """Normalised stages (B, D) -> mean squared error of each start time and stage (B, T, L)."""
        return mse(x, self.reconstructions(self.denoiser, x), self.widths).transpose(0, 1)

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
        return self.channels.to(like.dtype) ** _LAYER_EXPONENT

    def shares(self, like: Tensor) -> Tensor:
        """Share of all channels that each stage has (L,)."""
        channels = self.channels.to(like.dtype)
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
        return _bytes(self.model, without="early.")


class Layerwise(DiffusionScore):
    """Log errors of the stages in in-domain standard deviations, summed with weights; featdiff's own."""

    name = "layerwise"

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> (B,), higher = more OOD."""
        return self.model.join(self.model.layer_scores(features))


class MeanSquaredError(DiffusionScore):
    """DLSR's MSE (arXiv 2411.10701): mean squared error over all channels, >= 0."""

    name = "mse"

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> (B,), higher = more OOD."""
        errors = self.model.errors(self.model.stages(features))
        return (errors @ self.model.shares(errors)).mean(1)


class CosineDistance(DiffusionScore):
    """DLSR's MFsim (arXiv 2411.10701): 1 - cosine of a stage and its reconstruction, mean over stages, in [0, 2]."""

    name = "mfsim"

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> (B,), higher = more OOD."""
        model = self.model
        x = model.stages(features)
        x_hats = model.reconstructions(model.denoiser, x)
        return mfsim(x.expand_as(x_hats), x_hats, model.widths).mean(2).mean(0)


class LikelihoodRegret(DiffusionScore):
    """DLSR's LR (arXiv 2411.10701): the error at the end of training less that after its first epoch."""

    name = "lr"

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> (B,), higher = more OOD."""
        model = self.model
        if model.early is None:
            raise UsageError("a saved detector has no early network for 'lr', unless that is its head")
        x = model.stages(features)
        late = model.reconstructions(model.denoiser, x)
        early = model.reconstructions(model.early, x)

        return (likelihood_regret(x, late, early, model.widths) @ model.shares(x)).mean(0)

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
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _round_to_half(network: nn.Module) -> None:
    """Round weights to float16, so that a saved detector scores the same as the one that was fitted."""
    for weight in network.parameters():
        weight.copy_(weight.half())


def _in_half(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """Keep the networks of a state dict in float16."""
    for name in state:
        if name.startswith((prefix + "denoiser.", prefix + "early.")):
            state[name] = state[name].half()


def _bytes(model: Diffusion, without: str = "nothing") -> int:
    return sum(tensor.nbytes for name, tensor in model.state_dict().items() if not name.startswith(without))
