"""Noise schedules (diffusers schedulers) and where noise comes from. Knows no model and no feature."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..exceptions import UsageError, did_you_mean

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin

#: Ways from noise to an image, by the name of diffusers' scheduler. The last keeps earlier steps in mind.
SAMPLERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler"}


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config without what diffusers notes for itself, which differs from run to run."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


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


def make_pixel_scheduler(timesteps: int = 1000) -> DDPMScheduler:
    """The schedule of DDPM (Ho et al., 2020): linear betas from 1e-4 to 0.02, the network predicts the noise.

    With other numbers of times the betas are scaled, so that x_T is noise alone. DDPM and DDIM steps keep estimates
    of x_0 in [-1, 1].
    """
    from diffusers import DDPMScheduler

    scale = 1000 / timesteps
    return DDPMScheduler(num_train_timesteps=timesteps, beta_start=1e-4 * scale, beta_end=min(0.02 * scale, 0.999))


def make_sampler(kind: str, scheduler: SchedulerMixin, steps: int) -> Any:
    """A scheduler for denoising in ``steps`` steps along the schedule that a network was trained on.

    Parameters
    ----------
    kind : one of ``SAMPLERS``

    Raises
    ------
    UsageError
        An unknown sampler, or steps that do not divide the schedule evenly.
    """
    import diffusers

    if kind not in SAMPLERS:
        raise UsageError(f"unknown sampler {kind!r}{did_you_mean(kind, list(SAMPLERS))}; known: {', '.join(SAMPLERS)}")
    total = scheduler.config.num_train_timesteps
    if steps < 1 or total % steps:
        fitting = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise UsageError(f"steps must divide the {total} times of the noise schedule: one of {fitting}, not {steps}")
    # from the last time on, where there is nothing but noise
    kind_of = getattr(diffusers, SAMPLERS[kind])
    sampler = kind_of.from_config(scheduler.config, timestep_spacing="trailing", steps_offset=0)
    sampler.set_timesteps(steps)
    return sampler


def add_noise(scheduler: SchedulerMixin, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = sqrt(alpha-bar_t) x + sqrt(1 - alpha-bar_t) noise (DLSR eq. 1).

    x, noise : (B or 1, ..., D), both with as many axes; t : (B,) integers in 0 .. timesteps - 1.
    """
    # as diffusers' own, which keeps a tensor of its caller's device (or of a tracer) in the scheduler
    alpha_bar = scheduler.alphas_cumprod.to(x)[t].reshape(-1, *(1 for _ in x.shape[1:]))
    return alpha_bar**0.5 * x + (1 - alpha_bar) ** 0.5 * noise


def draw_noise(draws: int, width: int, seed: int) -> Tensor:
    """``draws`` standard normal vectors, (draws, width), from a generator of its own on the CPU.

    Drawn once when a detector is fitted, stored with it and shared by all images. They come in pairs of opposite
    sign (antithetic variates): the part of the reconstruction error that is linear in the noise cancels, so that two
    draws tell as much as several independent ones. With an odd number the last one has no partner.
    """
    half = torch.randn((draws + 1) // 2, width, generator=torch.Generator().manual_seed(seed))
    return torch.stack([half, -half], dim=1).flatten(0, 1)[:draws]


def noise_sources(contents: Sequence[bytes], repetitions: int, seed: int) -> list[torch.Generator]:
    """Generators on the CPU, one for each image and repetition: all repetitions of the first image, then the next.

    What they give depends on the image's content, the repetition and the seed: not on its neighbours in a batch, the
    order, or the device. diffusers' schedulers take such a list as ``generator``.
    """
    sources = []
    for content in contents:
        for repetition in range(repetitions):
            key = hashlib.blake2b(
                content, digest_size=7, salt=repetition.to_bytes(8, "big"), key=seed.to_bytes(8, "big")
            )
            sources.append(torch.Generator().manual_seed(int.from_bytes(key.digest(), "big")))
    return sources
