"""Noisy input -> reconstruction: of vectors in one or several DDIM steps, of images around a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .schedules import NoiseSchedule, add_noise

_CLEAN = -1  # the time before the first one, at which there is no noise


def reconstruct(
    denoiser: nn.Module,
    scheduler: NoiseSchedule,
    x: Tensor,
    noise: Tensor,
    start: int,
    stride: int | None = None,
) -> Tensor:
    """Noise vectors to time ``start`` and denoise them again.

    Parameters
    ----------
    denoiser : nn.Module
        (x_t, t) -> estimate of x_0.
    scheduler : NoiseSchedule
        From :func:`featdiff.diffusion.schedules.make_scheduler`.
    x : Tensor of shape (B, D)
        Clean vectors.
    noise : Tensor of shape (K, D)
        Noise samples, shared by all vectors. They are never drawn here, so that the result for a vector does not depend
        on the others.
    start : int
        Start time, 0 to timesteps - 1.
    stride : int, optional
        Step of a DDIM path (eta = 0, DLSR eq. 2-3) from ``start`` down to 0. Default: one step straight to x_0.

    Returns
    -------
    Tensor of shape (B, K, D)
        One reconstruction for each vector and noise sample.

    Examples
    --------
    >>> import torch
    >>> from featdiff.diffusion.lfdn import LFDN
    >>> from featdiff.diffusion.schedules import draw_noise, make_scheduler
    >>> denoiser = LFDN(width=6, hidden=16, blocks=1)
    >>> reconstruct(denoiser, make_scheduler(), torch.ones(5, 6), draw_noise(2, 6, seed=0), start=20).shape
    torch.Size([5, 2, 6])
    """
    batch = x.shape[0]  # len(x) would fix the batch size of an export
    samples = len(noise)
    x = x.repeat_interleave(samples, dim=0)
    noise = noise.repeat(batch, 1)

    def times(t: int) -> Tensor:
        return torch.full((batch * samples,), t, device=x.device)

    x_t = add_noise(scheduler, x, noise, times(start))
    x0_hat = denoiser(x_t, times(start))

    t = start
    while stride is not None and t >= stride:
        x_t = ddim_step(scheduler, x_t, x0_hat, t, t - stride)
        t -= stride
        x0_hat = denoiser(x_t, times(t))

    return x0_hat.unflatten(0, (batch, samples))


def ddim_step(scheduler: NoiseSchedule, x_t: Tensor, x0_hat: Tensor, t: int, earlier: int) -> Tensor:
    """One DDIM step to an earlier time, without fresh noise (eta = 0).

    diffusers' own step only takes strides that divide its schedule evenly, and keeps the stride in the scheduler.

    Parameters
    ----------
    scheduler : NoiseSchedule
        The noise schedule.
    x_t : Tensor of shape (B, D)
        Noisy vectors at time ``t``.
    x0_hat : Tensor of shape (B, D)
        Estimates of the clean vectors.
    t : int
        Time of ``x_t``.
    earlier : int
        Time to go to.

    Returns
    -------
    Tensor of shape (B, D)
        The vectors at time ``earlier``.
    """
    alpha_bar = scheduler.alphas_cumprod[t].to(x_t)
    alpha_bar_earlier = scheduler.alphas_cumprod[earlier].to(x_t)
    noise_hat = (x_t - alpha_bar.sqrt() * x0_hat) / (1 - alpha_bar).sqrt()
    return alpha_bar_earlier.sqrt() * x0_hat + (1 - alpha_bar_earlier).sqrt() * noise_hat


def inpaint(
    denoiser: nn.Module,
    sampler: Any,
    x: Tensor,
    mask: Tensor,
    generators: Sequence[torch.Generator],
    resamplings: int = 1,
) -> Tensor:
    """Fill in the masked-out pixels of images with what the denoiser expects there (LMD, arXiv 2302.10326).

    Starts from noise. Before each step, the known pixels are replaced by a noised copy of the image (Song et al., 2021,
    app. I.2).

    Parameters
    ----------
    denoiser : nn.Module
        (x_t (B, C, H, W), t (B,)) -> what ``sampler`` expects: the noise, or x_0.
    sampler : diffusers scheduler
        From :func:`featdiff.diffusion.schedules.make_sampler`; its time steps are followed.
    x : Tensor of shape (B, C, H, W)
        Images in [-1, 1].
    mask : bool Tensor of shape (B or 1, 1, H, W)
        True where a pixel is known.
    generators : sequence of B torch.Generator
        Source of all noise of an image, see :func:`featdiff.diffusion.schedules.noise_sources`.
    resamplings : int, default 1
        How often each step is taken. Between two of them noise is added again, which makes known and unknown pixels
        agree better (RePaint, Lugmayr et al., CVPR 2022, alg. 1). Not for samplers that use the results of earlier
        steps.

    Returns
    -------
    Tensor of shape (B, C, H, W)
        The inpainted images. Their known pixels are those of ``x``.
    """
    from diffusers.utils.torch_utils import randn_tensor

    sampler.set_timesteps(len(sampler.timesteps))  # some samplers count their steps: start anew

    def draw() -> Tensor:
        noise: Tensor = randn_tensor(x.shape, list(generators), x.device)
        return noise

    times = sampler.timesteps.tolist()
    x_t = draw()
    for t, earlier in zip(times, [*times[1:], _CLEAN], strict=True):
        t_batch = torch.full((len(x),), t, device=x.device)

        for remaining in range(resamplings, 0, -1):
            x_t = torch.where(mask, _forward(sampler, x, draw(), _CLEAN, t), x_t)
            prediction = denoiser(x_t, t_batch)
            x_t = sampler.step(prediction, t, x_t, generator=list(generators)).prev_sample
            if remaining > 1:
                x_t = _forward(sampler, x_t, draw(), earlier, t)

    return torch.where(mask, x, x_t)


def _forward(sampler: Any, x: Tensor, noise: Tensor, earlier: int, t: int) -> Tensor:
    """Noise ``x`` from an earlier time to time ``t``, by the forward process between the two."""
    alpha_bar = sampler.alphas_cumprod
    ratio = alpha_bar[t] / (1.0 if earlier == _CLEAN else alpha_bar[earlier])
    return ratio.sqrt() * x + (1 - ratio).sqrt() * noise
