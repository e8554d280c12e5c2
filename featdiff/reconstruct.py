"""Noisy input -> reconstruction, in one step or several deterministic DDIM steps. Knows no score."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .noise import add_noise

if TYPE_CHECKING:
    from diffusers import DDIMScheduler


def reconstruct(
    denoiser: nn.Module,
    scheduler: DDIMScheduler,
    x: Tensor,
    noise: Tensor,
    start: int,
    stride: int | None = None,
) -> Tensor:
    """Noise ``x`` to time ``start`` with the given draws and denoise it again.

    Parameters
    ----------
    denoiser : module
        (x_t, t) -> estimate of x_0.
    scheduler : DDIMScheduler
        From :func:`featdiff.noise.make_scheduler`.
    x : (B, D)
    noise : (K, D)
        Shared by all rows; never drawn here, so that a row's result does not depend on the others.
    start : int
        Start time, 0 .. timesteps - 1.
    stride : int, optional
        Step of a DDIM path (eta = 0, DLSR eq. 2-3) from ``start`` down to 0; default: one step straight to x_0.

    Returns
    -------
    (B, K, D)
        One reconstruction for each row and draw.
    """
    rows, draws = len(x), len(noise)
    clean = x.repeat_interleave(draws, dim=0)
    drawn = noise.repeat(rows, 1)
    x_t = add_noise(scheduler, clean, drawn, torch.full((rows * draws,), start, device=x.device))
    scheduler.set_timesteps(scheduler.config.num_train_timesteps // (stride or start + 1))
    for t in range(start, -1, -(stride or start + 1)):
        x0_hat = denoiser(x_t, torch.full((rows * draws,), t, device=x.device))
        # the step that would pass t = 0 ends at alpha-bar = 1, where DDIM returns x0_hat itself
        x_t = x0_hat if t < (stride or start + 1) else scheduler.step(x0_hat, t, x_t, eta=0.0).prev_sample
    return x_t.unflatten(0, (rows, draws))
