"""Clean samples -> times and noise, and the loss of a denoiser on them, in training and on held-out samples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from .schedules import NoiseSchedule, add_noise

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# So many vectors of a batch share a time, at most: the network embeds each time once.
_SHARING = 8


def shared_times(count: int, timesteps: int, generator: torch.Generator) -> Tensor:
    """Random times of a batch (count,), one in each of as many equal parts of the schedule as there are times.

    Neighbours in the list, which may be alike, have different ones.
    """
    sharing = math.gcd(count, _SHARING)
    parts = count // sharing
    device = generator.device
    part = torch.randperm(parts, generator=generator, device=device)
    place = (part + torch.rand(parts, generator=generator, device=device)) / parts
    return (place * timesteps).long().clamp_max(timesteps - 1).repeat(sharing)


def by_time(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch (B, D) with :func:`shared_times` -> its vectors by time (T, B / T, D), and these times (T,)."""
    sharing = math.gcd(len(t), _SHARING)
    x, noise = (rearrange(values, "(sharing times) d -> times sharing d", sharing=sharing) for values in (x, noise))
    return x, noise, t[: len(t) // sharing]


def training_loss(
    denoiser: nn.Module, x: Tensor, noise: Tensor, t: Tensor, scheduler: NoiseSchedule | SchedulerMixin
) -> Tensor:
    """Mean squared error of what a denoiser makes of noised samples; the noise schedule says what it predicts."""
    target = x if scheduler.config.prediction_type == "sample" else noise
    prediction = denoiser(add_noise(scheduler, x, noise, t), t)
    return nn.functional.mse_loss(prediction.float(), target)


@torch.inference_mode()
def validation_loss(
    denoiser: nn.Module, x: Tensor, scheduler: NoiseSchedule | SchedulerMixin, seed: int, chunk_numbers: int = 1 << 20
) -> Tensor:
    """Loss on held-out samples, with times spread evenly and noise that is the same at every call.

    Parameters
    ----------
    denoiser : nn.Module
        The network. Its mode (training or eval) is kept.
    x : Tensor of shape (V, ...)
        Held-out clean samples.
    scheduler : NoiseSchedule or diffusers scheduler
        The noise schedule.
    seed : int
        Decides times and noise.
    chunk_numbers : int, default 2**20
        The samples that go through the network at once hold at most so many numbers (one sample, if it has more).

    Returns
    -------
    Tensor of shape ()
    """
    was_training = denoiser.training
    denoiser.eval()

    generator = torch.Generator(x.device).manual_seed(seed)
    even_times = (torch.arange(len(x), device=x.device) + 0.5) * scheduler.config.num_train_timesteps / len(x)
    t = even_times.long()[torch.randperm(len(x), generator=generator, device=x.device)]
    noise = torch.randn(x.shape, generator=generator, device=x.device)

    size = max(1, chunk_numbers // x[0].numel())
    losses = []
    for x_part, noise_part, t_part in zip(x.split(size), noise.split(size), t.split(size), strict=True):
        losses.append(len(x_part) * training_loss(denoiser, x_part, noise_part, t_part, scheduler))

    denoiser.train(was_training)
    return torch.stack(losses).sum() / len(x)
