"""Every preset is loadable and builds the detector it describes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from featdiff import Detector, PixelDetector
from featdiff.detectors import MODES
from featdiff.detectors.config import make_recipe
from featdiff.detectors.pixel_parts import make_network
from featdiff.features.layout import FeatureLayout
from featdiff.scores.diffusion import Diffusion

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


def arguments(name: str) -> dict[str, Any]:
    (file,) = [file for file in CONFIGS if file.stem == name]
    found: dict[str, Any] = tomllib.loads(file.read_text())["detector"]
    return found


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_preset_builds_a_detector(file: Path) -> None:
    settings = arguments(file.stem)
    kind = MODES[settings.pop("mode", "feature")]
    assert kind(**settings).settings.backbone


def test_small_lmd_is_the_default_of_the_pixel_mode() -> None:
    """All that the preset says, so that it can be read as what the mode does."""
    default, preset = PixelDetector(), arguments("lmd_small")
    assert preset.pop("mode") == "pixel"
    assert default.settings.recipe == PixelDetector(recipe=preset.pop("recipe")).settings.recipe
    for name, value in preset.items():
        setting = getattr(default.settings, name)
        assert (list(setting) if isinstance(setting, tuple) else setting) in (value, None), name
    network = make_network(default.settings)[0]
    assert (network.config.sample_size, network.config.in_channels) == (preset["size"], preset["channels"])


def test_lmd_preset_has_the_size_of_the_paper() -> None:
    """Width 128, multipliers 1-2-2-2, two blocks, attention at 16: DDPM's network for CIFAR-10, 35.7 M weights."""
    settings = arguments("lmd_paper_cifar10")
    del settings["mode"]
    detector = PixelDetector(**settings)
    network, scheduler = make_network(detector.settings)
    assert 35e6 < sum(p.numel() for p in network.parameters()) < 36.5e6
    assert network.config.down_block_types == ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
    assert scheduler.config.num_train_timesteps == detector.settings.steps == 1000
    assert (detector.settings.repetitions, detector.settings.mask) == (10, "checkerboard_alt")
    recipe = make_recipe(detector.settings.recipe)
    assert (recipe.learning_rate, recipe.warmup_steps, recipe.ema_decay, recipe.weight_decay) == (2e-4, 5000, 0.9999, 0)
    epochs, per_epoch = recipe.plan(40_000)
    assert abs(epochs * per_epoch - 1_300_000) < 400


def test_dlsr_preset_has_the_size_of_the_paper() -> None:
    """87 M weights on the 720 channels of EfficientNet-b4."""
    detector = Detector(**arguments("dlsr_paper"))
    names = ("joint", "hidden_ratio", "hidden_max", "blocks", "timesteps", "start_times", "draws", "stride", "seed")
    layout = FeatureLayout.of_stages({"a": 24, "b": 32, "c": 56, "d": 160, "e": 448})
    model = Diffusion(layout, **{name: getattr(detector.settings, name) for name in names})
    weights = sum(p.numel() for p in model.denoiser.parameters())
    assert 85e6 < weights < 87e6
    recipe = make_recipe(detector.settings.recipe)
    assert recipe.epochs == 150
    assert recipe.batch_size == 128
    assert detector.settings.head == "mfsim"
