"""Noisy input -> reconstruction: of vectors in one or several DDIM steps, of images around a mask. Knows no score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .schedules import add_noise

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

_CLEAN = -1  # the time before the first one: no noise


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
        From :func:`featdiff.diffusion.schedules.make_scheduler`.
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
    rows, draws = x.shape[0], len(noise)  # len(x) would fix the batch size of an export
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


def inpaint(
    denoiser: nn.Module,
    sampler: Any,
    x: Tensor,
    known: Tensor,
    sources: Sequence[torch.Generator],
    resamplings: int = 1,
) -> Tensor:
    """Fill in the unknown pixels of images with what the denoiser thinks belongs there (LMD, arXiv 2302.10326).

    Starts from noise; before each step the known pixels are replaced by their own noised copy (Song et al., 2021,
    app. I.2).

    Parameters
    ----------
    denoiser : module
        (x_t (B, C, H, W), t (B,)) -> what ``sampler`` expects: noise, or x_0.
    sampler : diffusers scheduler
        From :func:`featdiff.diffusion.schedules.make_sampler`; its time steps are followed.
    x : (B, C, H, W) in [-1, 1]
    known : (B or 1, 1, H, W) bool
    sources : B generators
        Where all noise of an image comes from, see :func:`featdiff.diffusion.schedules.noise_sources`.
    resamplings : int
        How often each step is taken; between two, noise is added again, which makes known and unknown pixels agree
        better (RePaint, Lugmayr et al., CVPR 2022, alg. 1). Not for samplers that keep earlier steps in mind.

    Returns
    -------
    (B, C, H, W)
        Known pixels are those of ``x``.
    """
    from diffusers.utils.torch_utils import randn_tensor

    sampler.set_timesteps(len(sampler.timesteps))  # some samplers count their steps

    def fresh() -> Tensor:
        drawn: Tensor = randn_tensor(x.shape, list(sources), x.device)
        return drawn

    times = sampler.timesteps.tolist()
    x_t = fresh()
    for t, earlier in zip(times, [*times[1:], _CLEAN], strict=True):
        at = torch.full((len(x),), t, device=x.device)
        for again in range(resamplings, 0, -1):
            x_t = torch.where(known, _forward(sampler, x, fresh(), _CLEAN, t), x_t)
            stepped = sampler.step(denoiser(x_t, at), t, x_t, generator=list(sources)).prev_sample
            x_t = _forward(sampler, stepped, fresh(), earlier, t) if again > 1 else stepped
    return torch.where(known, x, x_t)


def _forward(sampler: Any, x: Tensor, noise: Tensor, earlier: int, t: int) -> Tensor:
    """x at an earlier time -> x_t, by the forward process between the two."""
    alpha_bar = sampler.alphas_cumprod
    kept = alpha_bar[t] / (1.0 if earlier == _CLEAN else alpha_bar[earlier])
    return kept.sqrt() * x + (1 - kept).sqrt() * noise
