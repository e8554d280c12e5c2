"""Shared fixtures: real classes at tiny size, no network, nothing outside pytest's temporary folders."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before any hub library is imported
os.environ["FEATDIFF_LOG_SECONDS"] = "0"  # what a command prints does not depend on how long it takes
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tiny networks gain nothing from threads and lose much when cores are busy

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from featdiff import Detector
from featdiff.data import samples
from featdiff.detectors import local_part
from featdiff.detectors.local_part import ALIKE
from featdiff.scores import local

#: Keyword arguments of a detector that fits in a second: a real timm network of 0.4 M weights at 160 px.
TINY: dict[str, Any] = {
    "backbone": "test_resnet",
    "pretrained": False,
    "layers": "layer1,layer2,layer4",
    "recipe": {"epochs": 2, "min_steps": 20, "batch_size": 64},
    "calibration": 0.2,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that the two processes end together."""
    items.sort(key=lambda item: item.path.name != "test_docs.py")


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A feature cache of this run alone (also for sub-processes)."""
    os.environ["FEATDIFF_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def _no_local_score_unless_asked() -> Iterator[None]:
    """To untrained networks the pictures of the tests are alike; ``decided_locally`` is for tests of the local score.

    Its denoisers train a tenth of the steps.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "RECIPE", replace(local.RECIPE, min_steps=100, max_steps=100))
        patch.setattr(local_part, "ALIKE", 0.0)
        yield


@pytest.fixture(scope="module")
def decided_locally() -> Iterator[None]:
    """``local="auto"`` decides as it does for users."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_part, "ALIKE", ALIKE)
        yield


@pytest.fixture(scope="session")
def sample_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The built-in sample set as PNG files: folders ``train`` (390), ``test`` (130) and ``digits`` (200)."""
    return samples.write(tmp_path_factory.mktemp("samples"))


@pytest.fixture
def few_images(tmp_path: Path) -> Path:
    """A folder of 6 small images whose sorted order is a.png .. f.png."""
    folder = tmp_path / "few"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "abcdef":
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def seeded_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of ``test_resnet`` with seeded random weights, as a user's local file would be."""
    from weights_files import write_seeded_backbone

    return write_seeded_backbone(tmp_path_factory.mktemp("weights") / "test_resnet.safetensors")


@pytest.fixture(scope="session")
def tiny_arguments(seeded_backbone: Path) -> dict[str, Any]:
    """Arguments of a tiny detector whose backbone is the same in every process."""
    return {**TINY, "pretrained": True, "weights": seeded_backbone}


@pytest.fixture(scope="session")
def tiny_detector(sample_folders: dict[str, Path], tiny_arguments: dict[str, Any]) -> Detector:
    """A tiny detector fitted on the sample tiles; do not change it."""
    return Detector(**tiny_arguments).fit(sample_folders["train"])


@pytest.fixture(autouse=True)
def _tiny_detector_keeps_its_engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Scoring 1,000 images chooses one, and with it another feature cache, for all tests that come later."""
    yield
    if "tiny_detector" in request.fixturenames:
        assert not request.getfixturevalue("tiny_detector").engine_note_


@pytest.fixture(scope="session")
def tiny_model(tiny_detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the saved tiny detector; do not change it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_detector.save_pretrained(folder)
    return folder


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[Path, str], Path]]:
    """Mount a small file system, a real disk that fills: ``mounted(folder, "64k")``."""
    done: list[Path] = []

    def mount(folder: Path, size: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted here")
        done.append(folder)
        return folder

    yield mount
    for folder in done:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # loaded tensors may still be mapped


@pytest.fixture
def featdiff_cli() -> Callable[..., Result]:
    """Run the installed command in this process: ``featdiff_cli("score", folder, "-m", model)``."""
    (script,) = entry_points(group="console_scripts", name="featdiff")
    main = script.load()

    def run(*arguments: object, **options: Any) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="featdiff", **options)

    return run
