"""The schedule against its closed form and diffusers' DDPM; the noise samples."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from featdiff.diffusion.schedules import add_noise, draw_noise, make_scheduler


def closed_form_alpha_bars(timesteps: int = 100) -> np.ndarray:
    """Products of 1 - beta, with the square roots of beta evenly spaced."""
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, timesteps) ** 2
    return np.cumprod(1 - betas)


@pytest.mark.parametrize(
    ("t", "expected"), [(0, 0.9985), (2, 0.9953), (3, 0.9935), (10, 0.979), (50, 0.801), (99, 0.412)]
)
def test_alpha_bar_of_the_paper(t: int, expected: float) -> None:
    assert make_scheduler().alphas_cumprod[t].item() == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("timesteps", [1, 2, 100, 1000])
def test_alpha_bars_follow_the_closed_form(timesteps: int) -> None:
    actual = make_scheduler(timesteps).alphas_cumprod.numpy()
    np.testing.assert_allclose(actual, closed_form_alpha_bars(timesteps), rtol=2e-5)


def schedule_of_diffusers(timesteps: int = 100) -> DDIMScheduler:
    return DDIMScheduler(timesteps, 0.0015, 0.0195, "scaled_linear", prediction_type="sample", clip_sample=False)


@pytest.mark.parametrize("timesteps", [1, 2, 100, 1000])
def test_schedule_is_bit_by_bit_that_of_diffusers(timesteps: int) -> None:
    actual, expected = make_scheduler(timesteps), schedule_of_diffusers(timesteps)
    assert torch.equal(actual.alphas_cumprod, expected.alphas_cumprod)
    assert actual.config.prediction_type == expected.config.prediction_type
    assert actual.config.num_train_timesteps == expected.config.num_train_timesteps


def test_add_noise_is_the_closed_formula() -> None:
    source = torch.Generator().manual_seed(3)
    x, noise = torch.randn(100, 7, generator=source) * 30, torch.randn(100, 7, generator=source)
    alpha_bar = closed_form_alpha_bars()[:, None]
    expected = np.sqrt(alpha_bar) * x.double().numpy() + np.sqrt(1 - alpha_bar) * noise.double().numpy()
    actual = add_noise(make_scheduler(), x, noise, torch.arange(100))
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_add_noise_equals_the_ddpm_scheduler_of_diffusers() -> None:
    source = torch.Generator().manual_seed(4)
    x, noise = torch.randn(32, 5, generator=source), torch.randn(32, 5, generator=source)
    t = torch.randint(100, (32,), generator=source)
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 100) ** 2
    expected = DDPMScheduler(num_train_timesteps=100, trained_betas=betas).add_noise(x, noise, t)
    torch.testing.assert_close(add_noise(make_scheduler(), x, noise, t), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "noises"), [((4, 5), (4, 5)), ((1, 3, 5), (4, 1, 5)), ((4, 3, 5), (4, 3, 5))])
def test_add_noise_is_bit_by_bit_that_of_diffusers(shape: tuple[int, ...], noises: tuple[int, ...]) -> None:
    source = torch.Generator().manual_seed(4)
    x, noise = torch.randn(shape, generator=source), torch.randn(noises, generator=source)
    t = torch.tensor([0, 31, 31, 99])
    assert torch.equal(add_noise(make_scheduler(), x, noise, t), schedule_of_diffusers().add_noise(x, noise, t))


def test_add_noise_leaves_its_arguments_alone() -> None:
    x, noise, scheduler = torch.ones(2, 3), torch.full((2, 3), 2.0), make_scheduler()
    before = scheduler.alphas_cumprod
    add_noise(scheduler, x, noise, torch.tensor([5, 90]))
    assert scheduler.alphas_cumprod is before
    assert torch.equal(x, torch.ones(2, 3))
    assert torch.equal(noise, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_noise_samples_come_in_pairs_of_opposite_sign(count: int) -> None:
    noise = draw_noise(count, 11, seed=0)
    assert noise.shape == (count, 11)
    assert noise.dtype == torch.float32
    pairs = count // 2
    assert torch.equal(noise[0 : 2 * pairs : 2], -noise[1 : 2 * pairs : 2])
    distinct = noise[::2]
    assert len(torch.unique(distinct, dim=0)) == len(distinct)


def test_noise_samples_are_standard_normal() -> None:
    noise = draw_noise(2, 20_000, seed=5)[0]
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    assert (noise.abs() < 1).float().mean().item() == pytest.approx(0.6827, abs=0.015)


def test_noise_samples_follow_from_the_seed_alone() -> None:
    first = draw_noise(4, 6, seed=1)
    torch.randn(10)
    assert torch.equal(draw_noise(4, 6, seed=1), first)
    assert not torch.equal(draw_noise(4, 6, seed=2), first)


def test_drawing_leaves_the_global_random_states_untouched() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    draw_noise(4, 6, seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]
