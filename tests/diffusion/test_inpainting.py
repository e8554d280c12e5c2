"""Inpainting: against diffusers' own loop and the ideal denoiser of a Gaussian; what a result may depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from featdiff.diffusion.masks import make_masks
from featdiff.diffusion.reconstruction import inpaint
from featdiff.diffusion.schedules import SAMPLERS, make_pixel_scheduler, make_sampler, noise_sources
from featdiff.diffusion.unet import PixelDenoiser, make_unet
from featdiff.exceptions import UsageError

SIZE = 8
CONTENTS = [bytes([i]) for i in range(3)]


class FlatImages(nn.Module):
    """The noise E[eps | x_t] for images of one grey value c ~ N(0, s^2) each: all that is known of x_0 is its mean."""

    variance = 0.25

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        a = make_pixel_scheduler().alphas_cumprod[t].reshape(-1, 1, 1, 1)
        pixels = x_t[0].numel()
        mean = x_t.mean((1, 2, 3), keepdim=True)
        # the mean of n noised pixels is sqrt(a) c + sqrt(1 - a) / sqrt(n) noise
        c = a.sqrt() * self.variance / (a * self.variance + (1 - a) / pixels) * mean
        return (x_t - a.sqrt() * c) / (1 - a).sqrt()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = make_unet(SIZE, 3, width=8, multipliers=(1, 2), blocks=1, attention=(), dropout=0.0)
        for parameter in unet.parameters():  # nothing may be zero, or the image would not matter
            nn.init.normal_(parameter, std=0.05)
    return PixelDenoiser(unet).eval().requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def board(kind: str = "checkerboard", blocks: int = 4) -> Tensor:
    return make_masks(kind, SIZE, 1, blocks=blocks)[:, None]


def run(network: nn.Module, x: Tensor, kind: str = "ddim", steps: int = 5, **options: Any) -> Tensor:
    sampler = make_sampler(kind, make_pixel_scheduler(), steps)
    options = {"mask": board(), "contents": CONTENTS[: len(x)], "resamplings": 1, "seed": 0} | options
    sources = noise_sources(options["contents"], 1, options["seed"])
    with torch.inference_mode():
        return inpaint(network, sampler, x, options["mask"], sources, options["resamplings"])


@pytest.mark.parametrize("kind", SAMPLERS)
def test_known_pixels_come_back_exactly_and_others_do_not(network: nn.Module, x: Tensor, kind: str) -> None:
    actual = run(network, x, kind)
    mask = board().expand_as(x)
    assert torch.equal(actual[mask], x[mask])
    assert (actual[~mask] != x[~mask]).all()
    assert torch.isfinite(actual).all()


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("resamplings", [1, 2])
def test_a_result_depends_on_no_other_image(network: nn.Module, x: Tensor, kind: str, resamplings: int) -> None:
    if kind == "dpm++" and resamplings > 1:
        return
    together = run(network, x, kind, resamplings=resamplings)
    backwards = run(network, x.flip(0), kind, resamplings=resamplings, contents=CONTENTS[::-1]).flip(0)
    alone = torch.cat(
        [run(network, x[i : i + 1], kind, resamplings=resamplings, contents=CONTENTS[i : i + 1]) for i in range(3)]
    )
    torch.testing.assert_close(backwards, together, rtol=0, atol=1e-4)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)
    torch.random.manual_seed(5)
    assert torch.equal(run(network, x, kind, resamplings=resamplings), together)  # nor on a global seed


def test_content_repetition_and_seed_decide_the_noise(network: nn.Module, x: Tensor) -> None:
    same = run(network, x[:1])
    assert torch.equal(run(network, x[:1]), same)
    assert not torch.equal(run(network, x[:1], contents=[b"another"]), same)
    assert not torch.equal(run(network, x[:1], seed=1), same)
    drawn = [torch.randn(4, generator=source) for source in noise_sources(CONTENTS, 2, 0)]
    assert len(drawn) == 6
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@torch.inference_mode()
def test_with_nothing_known_it_is_the_sampling_loop_of_diffusers(network: nn.Module, x: Tensor) -> None:
    nothing = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    actual = run(network, x[:1], "ddpm", steps=10, mask=nothing)

    (source,) = noise_sources(CONTENTS[:1], 1, 0)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    image = torch.randn(x[:1].shape, generator=source)
    for t in scheduler.timesteps:
        torch.randn(x[:1].shape, generator=source)  # the noise of the known pixels, of which there are none
        image = scheduler.step(network(image, t.expand(1)), t, image, generator=source).prev_sample
    torch.testing.assert_close(actual, image, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_ideal_denoiser_of_flat_images_fills_in_what_is_around(kind: str) -> None:
    """Half of the pixels say what the others are; a good inpainting comes near it from any noise."""
    values = torch.tensor([-0.7, 0.0, 0.6]).reshape(3, 1, 1, 1)
    actual = run(FlatImages(), values.expand(3, 3, SIZE, SIZE), kind, steps=50)
    unknown = ~board().expand_as(actual)
    filled = torch.stack([actual[i][unknown[i]].mean() for i in range(3)])
    torch.testing.assert_close(filled, values.flatten(), rtol=0, atol=0.15)


def test_resampling_makes_known_and_unknown_agree_better() -> None:
    """RePaint: more resamplings, smaller gaps (here the gap of one pass is large: a quarter of the image is known)."""
    size = SIZE // 2
    mask = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    mask[..., :size, :size] = True
    values = torch.linspace(-0.8, 0.8, 9).reshape(9, 1, 1, 1)
    contents = [bytes([i]) for i in range(9)]

    def gap(resamplings: int) -> float:
        x = values.expand(9, 3, SIZE, SIZE)
        actual = run(FlatImages(), x, "ddpm", steps=50, mask=mask, resamplings=resamplings, contents=contents)
        return float((actual - x)[~mask.expand_as(actual)].square().mean())

    assert gap(5) < 0.5 * gap(1)


def test_a_finished_run_leaves_the_sampler_fit_for_the_next(network: nn.Module, x: Tensor) -> None:
    sampler = make_sampler("dpm++", make_pixel_scheduler(), 5)
    with torch.inference_mode():
        first, second = (inpaint(network, sampler, x, board(), noise_sources(CONTENTS, 1, 0)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("kind", "steps", "words"),
    [
        ("dim", 5, "did you mean ddim"),
        ("ddim", 0, "must divide the 1000 times"),
        ("ddpm", 2000, "not 2000"),
        ("dpm++", 600, "500, 1000, not 600"),
    ],
)
def test_samplers_that_cannot_be_are_refused(kind: str, steps: int, words: str) -> None:
    with pytest.raises(UsageError) as error:
        make_sampler(kind, make_pixel_scheduler(), steps)
    assert words in str(error.value)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_every_sampler_starts_where_there_is_nothing_but_noise(kind: str) -> None:
    times = make_sampler(kind, make_pixel_scheduler(), 10).timesteps.tolist()
    assert (len(times), times[0]) == (10, 999)
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("timesteps", [50, 100, 1000])
def test_every_length_of_the_pixel_schedule_ends_in_noise(timesteps: int) -> None:
    scheduler = make_pixel_scheduler(timesteps)
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.alphas_cumprod[0] > 0.99
    assert scheduler.alphas_cumprod[-1] < 0.001
