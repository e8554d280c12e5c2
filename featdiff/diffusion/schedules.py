"""Noise schedules and samplers, and the noise itself, drawn from seeds or from the content of images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..exceptions import UsageError, did_you_mean

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, SchedulerMixin

#: Names of samplers, and diffusers' schedulers for them. The last one (DPM-Solver++) uses the results of earlier steps.
SAMPLERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler"}


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Drop diffusers' private entries from a config: they differ from run to run.

    Parameters
    ----------
    config : mapping
        Config of a diffusers model or scheduler.

    Returns
    -------
    dict
        The entries whose names do not start with an underscore.
    """
    return {name: value for name, value in config.items() if not name.startswith("_")}


class ScheduleConfig(NamedTuple):
    """What a :class:`NoiseSchedule` says of itself, under diffusers' names.

    Attributes
    ----------
    num_train_timesteps : int
        Number of times.
    prediction_type : {"sample", "epsilon"}
        What the network predicts: the clean sample, or the noise.
    """

    num_train_timesteps: int
    prediction_type: str


class NoiseSchedule:
    """How much noise there is at each time: what training and reconstruction use of a diffusers scheduler.

    A scheduler of diffusers may stand in its place. Feature vectors do without one, since diffusers takes seconds to
    import.

    Parameters
    ----------
    betas : Tensor of shape (timesteps,)
        Variance of the noise that each time adds.

    Attributes
    ----------
    alphas_cumprod : Tensor of shape (timesteps,)
        Alpha-bar: how much of the sample's variance is left at each time.
    config : ScheduleConfig
        The network predicts the clean sample.
    """

    def __init__(self, betas: Tensor) -> None:
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.config = ScheduleConfig(len(betas), "sample")


def make_scheduler(timesteps: int = 100, beta_start: float = 0.0015, beta_end: float = 0.0195) -> NoiseSchedule:
    """The noise schedule of DLSR (arXiv 2411.10701): scaled-linear betas.

    With the defaults, alpha-bar falls from 0.9985 to 0.41 and never reaches 0. The network predicts the clean sample.

    Parameters
    ----------
    timesteps : int, default 100
        Number of times.
    beta_start : float, default 0.0015
        First beta.
    beta_end : float, default 0.0195
        Last beta.

    Returns
    -------
    NoiseSchedule

    Examples
    --------
    >>> round(float(make_scheduler().alphas_cumprod[-1]), 2)
    0.41
    """
    return NoiseSchedule(torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float32) ** 2)


def make_pixel_scheduler(timesteps: int = 1000) -> DDPMScheduler:
    """The noise schedule of DDPM (Ho et al., 2020): linear betas from 1e-4 to 0.02; the network predicts the noise.

    DDPM and DDIM steps clip their estimates of x_0 to [-1, 1].

    Parameters
    ----------
    timesteps : int, default 1000
        Number of times. For other numbers than 1000 the betas are scaled, so that x_T is still pure noise.

    Returns
    -------
    DDPMScheduler
    """
    from diffusers import DDPMScheduler

    scale = 1000 / timesteps
    return DDPMScheduler(num_train_timesteps=timesteps, beta_start=1e-4 * scale, beta_end=min(0.02 * scale, 0.999))


def make_sampler(kind: str, scheduler: SchedulerMixin, steps: int) -> Any:
    """A scheduler that denoises in ``steps`` steps along the schedule that a network was trained on.

    Parameters
    ----------
    kind : str
        One of ``SAMPLERS``.
    scheduler : diffusers scheduler
        The schedule of the training.
    steps : int
        Number of steps; must divide the number of times evenly.

    Returns
    -------
    diffusers scheduler
        Its time steps are set.

    Raises
    ------
    UsageError
        An unknown sampler, or a number of steps that does not divide the schedule evenly.
    """
    import diffusers

    if kind not in SAMPLERS:
        hint = did_you_mean(kind, list(SAMPLERS))
        raise UsageError(f"unknown sampler {kind!r}{hint}; known: {', '.join(SAMPLERS)}", argument="sampler")

    total = scheduler.config.num_train_timesteps
    if steps < 1 or total % steps:
        divisors = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise UsageError(
            f"steps must divide the {total} times of the noise schedule: one of {divisors}, not {steps}",
            argument="steps",
        )

    # "trailing" starts at the last time, where the image is pure noise
    scheduler_class = getattr(diffusers, SAMPLERS[kind])
    sampler = scheduler_class.from_config(scheduler.config, timestep_spacing="trailing", steps_offset=0)
    sampler.set_timesteps(steps)
    return sampler


def add_noise(scheduler: NoiseSchedule | SchedulerMixin, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Noise clean samples: x_t = sqrt(alpha-bar_t) x + sqrt(1 - alpha-bar_t) noise (DLSR eq. 1).

    Parameters
    ----------
    scheduler : NoiseSchedule or diffusers scheduler
        The noise schedule.
    x : Tensor of shape (B or 1, ..., D)
        Clean samples.
    noise : Tensor of shape (B or 1, ..., D)
        Standard normal noise, with as many axes as ``x``.
    t : Tensor of shape (B,)
        Integer times, 0 to timesteps - 1.

    Returns
    -------
    Tensor of shape (B, ..., D)
    """
    # scheduler.add_noise does the same, but keeps a tensor on its caller's device (or of a tracer) in the scheduler
    alpha_bar = scheduler.alphas_cumprod.to(x)[t].reshape(-1, *(1 for _ in x.shape[1:]))
    return alpha_bar**0.5 * x + (1 - alpha_bar) ** 0.5 * noise


def draw_noise(count: int, width: int, seed: int) -> Tensor:
    """Draw standard normal vectors on the CPU, without touching the global random state.

    They are drawn once when a detector is fitted, stored with it and shared by all images. They come in pairs of
    opposite sign (antithetic variates): the part of the reconstruction error that is linear in the noise cancels, so
    that two noise samples are worth several independent ones. If ``count`` is odd, the last one has no partner.

    Parameters
    ----------
    count : int
        Number of noise samples.
    width : int
        Length of a vector.
    seed : int
        Decides the noise.

    Returns
    -------
    Tensor of shape (count, width)

    Examples
    --------
    >>> noise = draw_noise(4, 3, seed=0)
    >>> noise.shape, bool((noise[0] == -noise[1]).all())
    (torch.Size([4, 3]), True)
    """
    half = torch.randn((count + 1) // 2, width, generator=torch.Generator().manual_seed(seed))
    return torch.stack([half, -half], dim=1).flatten(0, 1)[:count]


def noise_sources(contents: Sequence[bytes], repetitions: int, seed: int) -> list[torch.Generator]:
    """Random generators on the CPU, one for each image and repetition.

    The noise of an image depends on its content, the repetition and the seed. It does not depend on the other images of
    the batch, their order, or the device.

    Parameters
    ----------
    contents : sequence of bytes
        The content of each image.
    repetitions : int
        Number of generators for each image.
    seed : int
        Decides the noise, together with content and repetition.

    Returns
    -------
    list of torch.Generator
        All repetitions of the first image, then those of the next. diffusers' schedulers take such a list as
        ``generator``.
    """
    generators = []
    for content in contents:
        for repetition in range(repetitions):
            digest = hashlib.blake2b(
                content,
                digest_size=7,
                salt=repetition.to_bytes(8, "big"),
                key=seed.to_bytes(8, "big"),
            ).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
            generators.append(generator)
    return generators
