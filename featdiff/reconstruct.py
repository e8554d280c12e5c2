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
    clean, drawn = x.repeat_interleave(draws, dim=0), noise.repeat(rows, 1)

    def at(t: int) -> Tensor:
        return torch.full((rows * draws,), t, device=x.device)

    x_t = add_noise(scheduler, clean, drawn, at(start))
    x0_hat = denoiser(x_t, at(start))
    t = start
    while stride is not None and t >= stride:
        x_t = ddim_step(scheduler, x_t, x0_hat, t, t - stride)
        t -= stride
        x0_hat = denoiser(x_t, at(t))
    return x0_hat.unflatten(0, (rows, draws))


def ddim_step(scheduler: DDIMScheduler, x_t: Tensor, x0_hat: Tensor, t: int, earlier: int) -> Tensor:
    """x_t (B, D) and its estimate of x_0 -> x at an earlier time, without fresh noise (DDIM with eta = 0).

    diffusers' own step can only take strides that divide its schedule evenly, and keeps the stride in the scheduler.
    """
    alpha_bar, alpha_bar_earlier = (scheduler.alphas_cumprod[time].to(x_t) for time in (t, earlier))
    noise_hat = (x_t - alpha_bar.sqrt() * x0_hat) / (1 - alpha_bar).sqrt()
    return alpha_bar_earlier.sqrt() * x0_hat + (1 - alpha_bar_earlier).sqrt() * noise_hat
