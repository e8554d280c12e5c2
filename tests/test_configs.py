"""Every preset is loadable and builds the detector it describes."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from featdiff import Detector
from featdiff.detectors.heads import DiffusionHeads

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_preset_builds_a_detector(file: Path) -> None:
    assert Detector(**tomllib.loads(file.read_text())["detector"]).arguments["backbone"]


def test_dlsr_preset_has_the_size_of_the_paper() -> None:
    """87 M weights on the 720 channels of EfficientNet-b4."""
    (file,) = [file for file in CONFIGS if file.stem == "dlsr_paper"]
    detector = Detector(**tomllib.loads(file.read_text())["detector"])
    names = ("joint", "hidden_ratio", "hidden_max", "blocks", "timesteps", "start_times", "draws", "stride", "seed")
    heads = DiffusionHeads((24, 32, 56, 160, 448), **{name: detector.arguments[name] for name in names})
    weights = sum(p.numel() for p in heads.denoiser.parameters())
    assert 85e6 < weights < 87e6
    assert detector.recipe.epochs == 150
    assert detector.recipe.batch_size == 128
    assert detector.head == "mfsim"
