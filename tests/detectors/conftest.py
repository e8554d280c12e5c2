"""Small detectors that several files of tests share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from featdiff import Detector


@pytest.fixture(scope="session")
def small(tiny_arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a detector that fits in a quarter of a second: two layers at 32 px."""
    return {
        **tiny_arguments,
        "layers": "layer1,layer2",
        "transform": {"input_size": (3, 32, 32)},
        "hidden_max": 64,
        "blocks": 1,
        "fpr": 0.2,
        "recipe": {"epochs": 4, "min_steps": 1, "batch_size": 16},
    }


@pytest.fixture(scope="session")
def files(sample_folders: dict[str, Path]) -> list[str]:
    """40 tiles to fit on; 8 of them calibrate."""
    return sorted(map(str, sample_folders["train"].iterdir()))[::9][:40]


@pytest.fixture(scope="session")
def fresh(sample_folders: dict[str, Path]) -> list[str]:
    """20 tiles to score."""
    return sorted(map(str, sample_folders["test"].iterdir()))[::6][:20]


@pytest.fixture(scope="session")
def fitted(small: dict[str, Any], files: list[str]) -> Detector:
    """A small detector fitted on ``files``; do not change it."""
    return Detector(**small).fit(files)


@pytest.fixture(scope="session")
def folders(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """120 tiles to train, 30 to test, 20 digits."""
    found = {}
    for name, count in (("train", 120), ("test", 30), ("digits", 20)):
        found[name] = tmp_path_factory.mktemp("pixel") / name
        found[name].mkdir()
        for file in sorted(sample_folders[name].iterdir())[:count]:
            shutil.copy(file, found[name])
    return found
