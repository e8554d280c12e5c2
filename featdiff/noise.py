"""The noise schedule (a diffusers scheduler) and the stored noise draws. Knows no model and no feature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DDIMScheduler


def make_scheduler(timesteps: int = 100, beta_start: float = 0.0015, beta_end: float = 0.0195) -> DDIMScheduler:
    """The schedule of DLSR (arXiv 2411.10701): scaled-linear betas; alpha-bar falls from .9985 to .41, never to 0.

    The network predicts the clean sample, and nothing is clipped: features are not pixels in [-1, 1].
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=timesteps,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule="scaled_linear",
        prediction_type="sample",
        clip_sample=False,
    )


def add_noise(scheduler: DDIMScheduler, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = sqrt(alpha-bar_t) x + sqrt(1 - alpha-bar_t) noise (DLSR eq. 1).

    x, noise : (B or 1, ..., D), both with as many axes; t : (B,) integers in 0 .. timesteps - 1.
    """
    return scheduler.add_noise(x, noise, t)


def draw_noise(draws: int, width: int, seed: int) -> Tensor:
    """``draws`` standard normal vectors, (draws, width), from a generator of its own on the CPU.

    Drawn once when a detector is fitted, stored with it and shared by all images. They come in pairs of opposite
    sign (antithetic variates): the part of the reconstruction error that is linear in the noise cancels, so that two
    draws tell as much as several independent ones. With an odd number the last one has no partner.
    """
    half = torch.randn((draws + 1) // 2, width, generator=torch.Generator().manual_seed(seed))
    return torch.stack([half, -half], dim=1).flatten(0, 1)[:draws]
