"""Distances of images against closed forms and the packages they come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import ROOT
from torch import Tensor
from torch.nn import functional as F

from featdiff.exceptions import UsageError, WeightsError
from featdiff.features.backbones import load_backbone
from featdiff.features.extractor import FeatureExtractor
from featdiff.scores.distances import DISTANCES, LPIPS, MSE, PERCEPTUAL_NETWORKS, SSIM, FeatureCosine

SHARED = ROOT.parent / "shared" / "weights" / "squeezenet1_1.torchvision.safetensors"


def images(n: int = 3, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def lpips_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded random weights of squeezenet1_1, as a file of torchvision's would be."""
    from safetensors.torch import save_file
    from torchvision.models import squeezenet1_1

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = squeezenet1_1(weights=None).state_dict()
    file = tmp_path_factory.mktemp("weights") / "squeezenet1_1.safetensors"
    save_file(state, file)
    return file


@pytest.fixture(scope="module")
def features() -> FeatureCosine:
    return FeatureCosine(FeatureExtractor(load_backbone("test_resnet", pretrained=False)))


def test_mse_is_the_mean_of_squares() -> None:
    x = images()
    assert torch.equal(MSE()(x, x), torch.zeros(3))
    torch.testing.assert_close(MSE()(x, x + 0.5), torch.full((3,), 0.25))
    worst = MSE()(torch.ones(1, 3, 8, 8), -torch.ones(1, 3, 8, 8))
    assert worst.item() == pytest.approx(4)


def test_ssim_of_flat_images_is_the_closed_form() -> None:
    """Without variance only the luminance term is left: (2 a b + c) / (a^2 + b^2 + c), c = (0.01 * range)^2."""
    a, b, c = 0.6, -0.2, 0.02**2
    x, y = torch.full((1, 3, 32, 32), a), torch.full((1, 3, 32, 32), b)
    assert SSIM()(x, y).item() == pytest.approx(1 - (2 * a * b + c) / (a * a + b * b + c), abs=1e-4)
    assert SSIM()(x, x).item() == pytest.approx(0, abs=1e-6)


def test_ssim_grows_with_noise() -> None:
    x, noise = images(), images(seed=1)
    weak, middle, strong = (SSIM()(x, x + scale * noise) for scale in (0.1, 0.3, 1.0))
    assert (weak < middle).all() and (middle < strong).all()


def test_lpips_is_the_package_with_the_network_of_the_file(lpips_weights: Path) -> None:
    import lpips
    from safetensors.torch import load_file

    reference = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    state = load_file(lpips_weights)
    for name, parameter in reference.net.named_parameters():
        parameter.data = state["features." + name.split(".", 1)[1]]
    x, y = images(), images(seed=1)
    distances = LPIPS("squeeze", lpips_weights)(x, y)
    assert distances.shape == (3,)
    torch.testing.assert_close(distances, reference(x, y).flatten())
    assert (distances > 0).all()
    assert torch.equal(LPIPS("squeeze", lpips_weights)(x, x), torch.zeros(3))


def test_lpips_takes_grey_images_as_three_equal_channels(lpips_weights: Path) -> None:
    measure = LPIPS("squeeze", lpips_weights)
    x, y = images(channels=1), images(channels=1, seed=1)
    torch.testing.assert_close(measure(x, y), measure(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))


def test_the_state_of_lpips_is_its_trunk(lpips_weights: Path) -> None:
    full, empty = LPIPS("squeeze", lpips_weights), LPIPS("squeeze", load=False)
    assert all(name.startswith("trunk.") for name in full.state_dict())
    empty.load_state_dict(full.state_dict())
    x, y = images(), images(seed=1)
    assert torch.equal(full(x, y), empty(x, y))


@pytest.mark.skipif(not SHARED.exists(), reason="torchvision's own weights are not there")
def test_lpips_with_trained_weights_sees_noise_better_than_brightness() -> None:
    """What it is for: of two changes of the same mean square, the one that people see is the larger."""
    measure = LPIPS("squeeze", SHARED)
    smooth = F.interpolate(images(8)[:, :, :4, :4], size=32, mode="bicubic").clamp(-0.8, 0.8)
    noise = torch.randn(smooth.shape, generator=torch.Generator().manual_seed(2)) * 0.1
    assert (measure(smooth, smooth + noise) > 3 * measure(smooth, smooth + 0.1)).all()


def test_cosine_of_features(features: FeatureCosine) -> None:
    x, y = images(), images(seed=1)
    same, other, opposite = features(x, x), features(x, y), features(y, x)
    torch.testing.assert_close(same, torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(other, opposite)
    assert (other > 1e-4).all()
    assert not features.state_dict()


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_do_not_depend_on_the_batch(name: str, lpips_weights: Path, features: FeatureCosine) -> None:
    measure = {"lpips": LPIPS("squeeze", lpips_weights), "mse": MSE(), "ssim": SSIM(), "features": features}[name]
    x, y = images(), images(seed=1)
    with torch.inference_mode():
        alone = torch.cat([measure(x[i : i + 1], y[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(measure(x, y), alone, rtol=1e-4, atol=1e-5)


def test_weights_of_another_network_are_refused(seeded_backbone: Path) -> None:
    with pytest.raises(WeightsError, match=r"does not fit torchvision's squeezenet1_1: features\.0\."):
        LPIPS("squeeze", seeded_backbone)


def test_weights_of_other_shapes_are_refused(lpips_weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(lpips_weights)
    state["features.0.weight"] = state["features.0.weight"][:, :1].clone()
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="does not fit torchvision's squeezenet1_1"):
        LPIPS("squeeze", tmp_path / "other.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights file at"):
        LPIPS("squeeze", tmp_path / "nowhere.safetensors")


def test_weights_that_cannot_be_downloaded_say_what_else_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(WeightsError) as error:
        LPIPS("squeeze")
    assert "weights=FILE" in str(error.value) and "distances=mse,ssim" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("network", PERCEPTUAL_NETWORKS)
def test_lpips_knows_the_smallest_image_its_network_can_see(network: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        measure = LPIPS(network, load=False)  # random weights: only sizes matter here
    size = measure.smallest
    x, y = (torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    assert torch.isfinite(measure(x, y)).all()
    with pytest.raises(RuntimeError):
        measure(x[..., 1:, 1:], y[..., 1:, 1:])


def test_ssim_knows_the_smallest_image_its_window_fits_in() -> None:
    size = SSIM.smallest
    x, y = images()[..., :size, :size], images(seed=1)[..., :size, :size]
    assert torch.isfinite(SSIM()(x, y)).all()
    assert size == 11


def test_an_unknown_perceptual_network_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean squeeze"):
        LPIPS("squeez")
    assert set(PERCEPTUAL_NETWORKS) == {"squeeze", "alex", "vgg"}
