"""Reconstruction against diffusers' own sampler, a hand-written path and the ideal denoiser of a Gaussian."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featdiff.diffusion.lfdn import LFDN
from featdiff.diffusion.reconstruction import reconstruct
from featdiff.diffusion.schedules import add_noise, draw_noise, make_scheduler


class IdealGaussian(nn.Module):
    """E[x_0 | x_t] for x_0 ~ N(0, diag(variance)): sqrt(a) s / (a s + 1 - a) x_t."""

    def __init__(self, variance: Tensor) -> None:
        super().__init__()
        self.variance = variance

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        a = make_scheduler().alphas_cumprod[t][:, None]
        return a.sqrt() * self.variance / (a * self.variance + 1 - a) * x_t


def random_network(width: int) -> nn.Module:
    network = LFDN(width=width, hidden=32, blocks=2)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=source))
    return network.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("start", [0, 3, 60, 99])
@torch.no_grad()
def test_one_step_is_the_denoiser_on_the_noised_input(x: Tensor, start: int) -> None:
    network, scheduler, noise = random_network(6), make_scheduler(), draw_noise(3, 6, seed=2)
    actual = reconstruct(network, scheduler, x, noise, start)
    assert actual.shape == (5, 3, 6)
    t = torch.full((5,), start)
    for k in range(3):
        expected = network(add_noise(scheduler, x, noise[k].expand(5, -1), t), t)
        torch.testing.assert_close(actual[:, k], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [0, 3, 40])
@torch.no_grad()
def test_stride_one_equals_the_ddim_loop_of_diffusers(x: Tensor, start: int) -> None:
    from diffusers import DDIMScheduler

    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 100) ** 2
    reference = DDIMScheduler(num_train_timesteps=100, trained_betas=betas, prediction_type="sample", clip_sample=False)
    reference.set_timesteps(100)
    network, noise = random_network(6), draw_noise(1, 6, seed=2)
    x_t = reference.add_noise(x, noise.expand(5, -1), torch.full((5,), start))
    for t in reference.timesteps[reference.timesteps <= start]:
        x_t = reference.step(network(x_t, t.expand(5)), int(t), x_t, eta=0.0).prev_sample
    actual = reconstruct(network, make_scheduler(), x, noise, start, stride=1)
    torch.testing.assert_close(actual[:, 0], x_t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2, 7, 10, 13, 15, 30, 40, 60, 90, 95, 96, 100, 101, 500])
@torch.no_grad()
def test_every_stride_follows_equations_2_and_3(x: Tensor, stride: int) -> None:
    """t, t - s, t - 2 s ...: each step goes from alpha-bar_t to alpha-bar_(t-s), the last returns x0_hat."""
    start, network, noise = 95, random_network(6), draw_noise(1, 6, seed=2)
    alpha_bar = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 100) ** 2)
    t, z = start, np.sqrt(alpha_bar[95]) * x.numpy() + np.sqrt(1 - alpha_bar[95]) * noise.numpy()
    while True:
        x0_hat = network(torch.tensor(z, dtype=torch.float32), torch.full((5,), t)).double().numpy()
        if t < stride:
            break
        eps = (z - np.sqrt(alpha_bar[t]) * x0_hat) / np.sqrt(1 - alpha_bar[t])
        t -= stride
        z = np.sqrt(alpha_bar[t]) * x0_hat + np.sqrt(1 - alpha_bar[t]) * eps
    actual = reconstruct(network, make_scheduler(), x, noise, start, stride)[:, 0]
    np.testing.assert_allclose(actual.numpy(), x0_hat, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("stride", [None, 1, 5, 20])
def test_last_step_returns_the_networks_estimate(stride: int | None) -> None:
    """The released code of the paper gives back a noisy vector, so its last call of the network is lost."""
    x, noise = torch.randn(2, 4), draw_noise(2, 4, seed=0)

    class Constant(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return torch.full_like(x_t, 7.0)

    actual = reconstruct(Constant(), make_scheduler(), x, noise, 20, stride)
    assert torch.equal(actual, torch.full((2, 2, 4), 7.0))


@pytest.mark.parametrize(
    ("start", "stride", "expected"),
    [
        (20, None, [20]),
        (0, None, [0]),
        (4, 1, [4, 3, 2, 1, 0]),
        (10, 5, [10, 5, 0]),
        (11, 5, [11, 6, 1]),
        (3, 50, [3]),
    ],
)
def test_times_that_the_network_is_asked_for(start: int, stride: int | None, expected: list[int]) -> None:
    asked: list[int] = []

    class Recorder(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            assert t.shape == (6,)
            assert len(t.unique()) == 1
            asked.append(int(t[0]))
            return x_t

    reconstruct(Recorder(), make_scheduler(), torch.randn(3, 4), draw_noise(2, 4, seed=0), start, stride)
    assert asked == expected


@pytest.mark.parametrize("stride", [None, 4])
@torch.no_grad()
def test_a_row_does_not_depend_on_the_other_rows(stride: int | None) -> None:
    network, scheduler, noise = random_network(6), make_scheduler(), draw_noise(2, 6, seed=2)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    together = reconstruct(network, scheduler, x, noise, 20, stride)
    alone = torch.cat([reconstruct(network, scheduler, row[None], noise, 20, stride) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(5))
    shuffled = reconstruct(network, scheduler, x[order], noise, 20, stride)
    torch.testing.assert_close(shuffled, together[order], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_order_of_calls_and_strides_does_not_matter(x: Tensor) -> None:
    """One scheduler serves all start times; nothing that a call leaves in it may reach the next."""
    network, noise, scheduler = random_network(6), draw_noise(2, 6, seed=2), make_scheduler()
    fresh = reconstruct(network, make_scheduler(), x, noise, 60, 20)
    reconstruct(network, scheduler, x, noise, 95, 5)
    reconstruct(network, scheduler, x, noise, 3)
    assert torch.equal(reconstruct(network, scheduler, x, noise, 60, 20), fresh)


def test_no_rows_give_no_reconstructions() -> None:
    actual = reconstruct(random_network(6), make_scheduler(), torch.empty(0, 6), draw_noise(2, 6, seed=2), 20)
    assert actual.shape == (0, 2, 6)


@pytest.mark.parametrize("stride", [None, 5])
def test_reconstruction_uses_no_random_numbers(x: Tensor, stride: int | None) -> None:
    network, scheduler, noise = random_network(6), make_scheduler(), draw_noise(2, 6, seed=2)
    state = torch.get_rng_state()
    first = reconstruct(network, scheduler, x, noise, 20, stride)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(reconstruct(network, scheduler, x, noise, 20, stride), first)


@pytest.mark.parametrize("start", [3, 20, 60, 95])
def test_ideal_denoiser_leaves_the_known_residual(start: int) -> None:
    """Mean over an antithetic pair: x - x_hat = (1 - a) / (a s + 1 - a) x in a direction of variance s."""
    variance = torch.tensor([4.0, 1.0, 0.25, 0.01])
    x, noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)), draw_noise(2, 4, seed=0)
    a = make_scheduler().alphas_cumprod[start]
    x_hat = reconstruct(IdealGaussian(variance), make_scheduler(), x, noise, start).mean(1)
    expected = (1 - a) / (a * variance + 1 - a) * x
    torch.testing.assert_close(x - x_hat, expected, rtol=1e-4, atol=1e-5)
    assert (expected[:, 3] / x[:, 3]).mean() > (expected[:, 0] / x[:, 0]).mean()  # rare directions are lost first


def test_ideal_denoiser_has_the_bayes_error_on_average() -> None:
    """E (x - x_hat)^2 over x and noise = s (1 - a) / (a s + 1 - a) in a direction of variance s."""
    variance, start = torch.tensor([4.0, 1.0, 0.25]), 60
    source = torch.Generator().manual_seed(7)
    x, noise = torch.randn(200, 3, generator=source) * variance.sqrt(), torch.randn(200, 3, generator=source)
    x = x / x.square().mean(0).sqrt() * variance.sqrt()  # these moments exactly, to need fewer samples
    noise = noise / noise.square().mean(0).sqrt()
    x_hat = reconstruct(IdealGaussian(variance), make_scheduler(), x, noise, start)
    a = make_scheduler().alphas_cumprod[start]
    actual = (x[:, None] - x_hat).square().mean((0, 1))
    torch.testing.assert_close(actual, variance * (1 - a) / (a * variance + 1 - a), rtol=0.01, atol=0)
